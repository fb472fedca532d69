# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``MaxEntropy``: uniform on finite and bounded fibres, and with a reference."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import (
    assert_cdf,
    assert_counts,
    assert_same_law,
    law_of,
    run,
    states_of,
)
from pyro import poutine
from scipy import integrate, stats
from torch.distributions import biject_to

import pyro_macro as pm

MICRO = ["x0", "x1", "x2"]
TOTAL = pm.MacroVariable("m", MICRO)


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def macro_of(aggregation, count=3):
    return pm.MacroVariable("m", MICRO[:count], aggregation=aggregation)


def sites(*fns):
    def model():
        for i, fn in enumerate(fns):
            pyro.sample(f"x{i}", fn)

    return model


# Finite fibres


def finite():
    return [
        dist.Categorical(t(0.9, 0.05, 0.05)),
        dist.Binomial(3, t(0.9)[0]),
        dist.Bernoulli(0.01),
    ]


@pytest.mark.parametrize(
    "aggregation, value",
    [
        (pm.Sum(), 3.0),
        (pm.Linear([1.0, 2.0, 1.0]), 4.0),
        (pm.Max(), 2.0),
        (pm.Min(), 0.0),
        (pm.Count(1), 1.0),
        (pm.Custom(lambda x: x.prod(-1)), 0.0),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_all_micro_states_of_a_finite_fibre_are_equally_likely(aggregation, value):
    """The pseudo-inverse of Zennaro et al.: one over the size of the fibre."""
    law = law_of(sites(*finite()), macro_of(aggregation), pm.MaxEntropy(value))
    assert law.method == "exact: finite, uniform"
    states = states_of(range(3), range(4), range(2))
    states = states[aggregation(states) == value]
    probs = torch.full((len(states),), 1 / len(states))
    torch.testing.assert_close(law.log_prob(states).exp(), probs)
    assert sorted(law.enumerate_support().tolist()) == sorted(states.tolist())
    assert_counts(law.sample((10_000,)), states, probs)
    torch.testing.assert_close(law.log_total.item(), math.log(len(states)))


def test_states_that_cannot_be_do_not_count():
    fns = [dist.Categorical(logits=t(0.0, -math.inf, 1.0)), dist.Bernoulli(0.5)]
    law = law_of(sites(*fns), macro_of(pm.Max(), 2), pm.MaxEntropy(2.0))
    states = [[2.0, 0.0], [2.0, 1.0]]
    assert sorted(law.enumerate_support().tolist()) == states
    law = law_of(sites(*fns), macro_of(pm.Sum(), 2), pm.MaxEntropy(1.0))
    found = law.log_prob(t([0.0, 1.0], [1.0, 0.0]))
    torch.testing.assert_close(found, t(0.0, -math.inf))


def test_causes_of_a_finite_micro_state_do_not_matter():
    def model():
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        with pyro.plate("o", 4):
            pyro.sample("x", dist.Bernoulli(torch.sigmoid(3 * c + torch.arange(4.0))))

    macro = pm.MacroVariable("m", "x", over="o")
    law = law_of(model, macro, pm.MaxEntropy(2.0))
    support = law.enumerate_support()
    assert len(support) == 6
    torch.testing.assert_close(law.log_prob(support), torch.full((6,), -math.log(6)))


def test_counts_whose_sum_is_given_have_a_finite_fibre():
    fns = [dist.Poisson(0.1), dist.Poisson(30.0), dist.Poisson(2.0)]
    law = law_of(sites(*fns), TOTAL, pm.MaxEntropy(4.0))
    states = states_of(*[range(5)] * 3)
    states = states[states.sum(-1) == 4]
    probs = torch.full((len(states),), 1 / len(states))
    assert_counts(law.sample((10_000,)), states, probs)
    torch.testing.assert_close(law.log_prob(states).exp(), probs)


def test_many_coins_are_drawn_uniformly():
    """Of 500 coins 120 show heads: any, whatever their probabilities."""

    def model():
        with pyro.plate("o", 500):
            pyro.sample("x", dist.Bernoulli(torch.linspace(0.01, 0.99, 500)))

    macro = pm.MacroVariable("m", "x", over="o")
    law = law_of(model, macro, pm.MaxEntropy(120.0))
    draws = law.sample((2000,))
    assert (draws.sum(-1) == 120).all()
    wanted = math.lgamma(121) + math.lgamma(381) - math.lgamma(501)
    torch.testing.assert_close(law.log_prob(draws[0]).item(), wanted)
    mean, error = 0.24, (0.24 * 0.76 / 2000) ** 0.5
    assert ((draws.mean(0) - mean).abs() < 5 * error).all()
    halves = stats.hypergeom(500, 250, 120).pmf(np.arange(121))
    assert_counts(
        draws[:, :250].sum(-1, keepdim=True),
        states_of(range(121)),
        torch.tensor(halves),
    )


def test_slots_of_a_plate_have_fibres_of_their_own():
    values = t([1.0], [3.0])

    def model():
        with pyro.plate("k", 2, dim=-2), pyro.plate("o", 3, dim=-1):
            pyro.sample("x", dist.Categorical(t(0.8, 0.1, 0.1)))

    macro = pm.MacroVariable("m", "x", over="o")
    nodes = run(model, macro, pm.MaxEntropy(values)).nodes
    assert nodes["x"]["value"].dtype == torch.long
    assert (nodes["x"]["value"].sum(-1, True) == values).all()
    law = nodes["m__micro"]["fn"]
    draws = law.sample((4000,))
    for i in range(2):
        states = states_of(*[range(3)] * 3)
        states = states[states.sum(-1) == values[i]]
        probs = torch.full((len(states),), 1 / len(states))
        assert_counts(draws[:, i, 0], states, probs)


# Bounded fibres


def test_positive_sites_are_uniform_on_the_scaled_simplex():
    fns = [dist.Gamma(9.0, 1.0), dist.LogNormal(0.0, 1.0), dist.Exponential(4.0)]
    macro = macro_of(pm.Linear([1.0, 2.0, 4.0]))
    law = law_of(sites(*fns), macro, pm.MaxEntropy(6.0))
    assert "uniform on the scaled simplex" in law.method
    assert law.method.startswith("exact")
    draws = law.sample((4000,))
    torch.testing.assert_close(draws @ t(1.0, 2.0, 4.0), torch.full((4000,), 6.0))
    for k, weight in enumerate((1.0, 2.0, 4.0)):
        assert_cdf(draws[:, k], stats.beta(1, 2, scale=6 / weight).cdf)
    # With respect to (x0, x1): the triangle x0 + 2 x1 < 6 has area 9
    torch.testing.assert_close(law.log_prob(draws[:5]).exp(), torch.full((5,), 1 / 9))


def test_bounded_sites_are_uniform_on_the_polytope():
    fns = [dist.Beta(5.0, 1.0), dist.Uniform(-1.0, 2.0), dist.Beta(0.5, 0.5)]
    law = law_of(sites(*fns), TOTAL, pm.MaxEntropy(1.8))
    n = 400_000
    x = torch.rand(n, 2) * t(1.0, 3.0) - t(0.0, 1.0)
    rest = 1.8 - x.sum(-1)
    met = (rest > 0) & (rest < 1)
    near = torch.cat([x, rest.unsqueeze(-1)], -1)[met]
    assert_same_law(law.sample((3000,)), near[:20_000])
    volume = 3 * float(met.double().mean())
    error = volume * float(((1 - met.double().mean()) / met.sum()) ** 0.5)
    state = near[:1]
    assert abs(1 / law.log_prob(state).exp().item() - volume) < 4 * error


def test_bounded_and_half_bounded_sites_together():
    fns = [dist.Exponential(1.0), dist.Uniform(0.0, 1.0), dist.HalfNormal(1.0)]
    law = law_of(sites(*fns), TOTAL, pm.MaxEntropy(3.0))
    draws = law.sample((4000,))
    # x1 has density proportional to the length 3 - x1
    assert_cdf(draws[:, 1], lambda x: (3 * x - x**2 / 2) / 2.5)
    torch.testing.assert_close(law.log_prob(draws[:2]).exp(), torch.full((2,), 1 / 2.5))


@pytest.mark.parametrize("value", [-3.0, -0.5])
def test_positive_sites_with_negative_weights(value):
    fns = [dist.Exponential(1.0), dist.Gamma(2.0, 1.0)]
    macro = macro_of(pm.Linear([-1.0, -2.0]), 2)
    law = law_of(sites(*fns), macro, pm.MaxEntropy(value))
    draws = law.sample((2000,))
    assert (draws > 0).all()
    assert_cdf(draws[:, 0], stats.uniform(0, -value).cdf)
    torch.testing.assert_close(law.log_prob(draws[0]).item(), -math.log(-value))


def test_vector_sites_and_plates_are_elements_of_the_polytope():
    def model():
        with pyro.plate("k", 2, dim=-2), pyro.plate("o", 3, dim=-1):
            pyro.sample("x", dist.Uniform(0.0, t([1.0], [2.0])))

    macro = pm.MacroVariable("m", "x", over="o")
    values = t([1.2], [2.5])
    trace = run(model, macro, pm.MaxEntropy(values))
    x = trace.nodes["x"]["value"]
    torch.testing.assert_close(x.sum(-1, keepdim=True), values)
    assert (x[0] < 1).all()
    law = trace.nodes["m__micro"]["fn"]
    assert law.batch_shape == (2, 1)
    # Irwin-Hall: 3/4 - (x - 3/2)^2 for three, in the middle
    areas = t(0.75 - 0.3**2, 4 * (0.75 - 0.25**2))
    torch.testing.assert_close(law.log_prob(law.sample()).exp()[:, 0], 1 / areas)


def test_inference_through_the_polytope_has_the_posterior_by_numbers():
    """The coordinates and the density fit: an integral over the coordinates is one."""
    fns = [dist.Uniform(0.0, 1.0), dist.Uniform(0.0, 2.0), dist.Uniform(0.0, 1.0)]
    law = law_of(sites(*fns), TOTAL, pm.MaxEntropy(1.7))
    transform = biject_to(law.support)
    axis = torch.linspace(-20, 20, 600)
    z = torch.cartesian_prod(axis, axis)
    x = transform(z)
    logs = transform.log_abs_det_jacobian(z, x) - law.log_volume
    total = logs.exp().sum() * (axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total.item(), 1.0, rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "fns, macro, value, error, message",
    [
        (["real", "unit"], pm.Sum(), 1.0, pm.UnsupportedLaw, "unbounded.*reference="),
        (["positive", "unit"], pm.Sum(), -1.0, pm.Infeasible, "between 0 and inf"),
        (["unit", "unit"], pm.Sum(), 2.5, pm.Infeasible, "2.5 cannot.*0 and 2"),
        (
            ["positive", "positive"],
            pm.Linear([1.0, -1.0]),
            1.0,
            pm.UnsupportedLaw,
            "unbounded",
        ),
        (["coin", "coin"], pm.Sum(), 3.0, pm.Infeasible, "cannot be reached"),
    ],
)
def test_fibres_on_which_nothing_is_uniform_are_refused(
    fns, macro, value, error, message
):
    kinds = {
        "real": dist.Normal(0.0, 1.0),
        "positive": dist.Gamma(2.0, 1.0),
        "unit": dist.Beta(2.0, 2.0),
        "coin": dist.Bernoulli(0.5),
    }
    with pytest.raises(error, match=f"'m'.*{message}"):
        law_of(
            sites(*[kinds[kind] for kind in fns]),
            macro_of(macro, 2),
            pm.MaxEntropy(value),
        )


def test_an_interval_that_a_nonlinear_map_makes_is_refused():
    fns = [dist.Beta(2.0, 1.0), dist.Beta(1.0, 1.0)]
    squares = macro_of(pm.Custom(lambda x: x.square().sum(-1)), 2)
    with pytest.raises(pm.UnsupportedLaw, match="not linear"):
        law_of(sites(*fns), squares, pm.MaxEntropy(1.0))


# With a reference


def test_a_normal_reference_is_conditioned_on_the_value():
    mean, covariance = (
        t(1.0, 2.0, 0.0),
        t([2.0, 0.5, 0.0], [0.5, 1.0, 0.3], [0, 0.3, 3]),
    )
    reference = dist.MultivariateNormal(mean, covariance)
    fns = [dist.Cauchy(0.0, 1.0)] * 3
    law = law_of(sites(*fns), TOTAL, pm.MaxEntropy(7.0, reference))
    one = torch.ones(3)
    gain = covariance @ one / covariance.sum()
    torch.testing.assert_close(law.mean, mean + gain * (7 - mean.sum()))
    torch.testing.assert_close(
        law.variance,
        (covariance - torch.outer(gain, covariance @ one)).diagonal(),
    )
    state = t(1.0, 4.0, 2.0)
    joint = reference.log_prob(state)
    total = dist.Normal(mean.sum(), covariance.sum().sqrt()).log_prob(t(7.0)[0])
    torch.testing.assert_close(law.log_prob(state), joint - total)


def test_a_reference_over_counts_is_conditioned_on_the_value():
    reference = dist.Poisson(t(1.0, 2.0, 4.0)).to_event(1)
    fns = [dist.Geometric(0.5)] * 3
    trace = run(sites(*fns), TOTAL, pm.MaxEntropy(5.0, reference))
    law = trace.nodes["m__micro"]["fn"]
    wanted = stats.multinomial(5, [1 / 7, 2 / 7, 4 / 7])
    states = states_of(*[range(6)] * 3)
    states = states[states.sum(-1) == 5]
    probs = torch.tensor([wanted.pmf(s.long().numpy()) for s in states]).flatten()
    torch.testing.assert_close(law.log_prob(states).exp(), probs)
    assert_counts(law.sample((8000,)), states, probs)


def test_a_reference_along_a_plate_that_stays():
    loc = t([0.0, 1.0], [5.0, -1.0])

    def model():
        with pyro.plate("k", 2):
            pyro.sample("x0", dist.Cauchy(0.0, 1.0))
            pyro.sample("x1", dist.Cauchy(0.0, 1.0))

    reference = dist.Normal(loc, t(1.0, 2.0)).to_event(1)
    law = law_of(model, macro_of(pm.Sum(), 2), pm.MaxEntropy(t(2.0, 3.0), reference))
    rest = t(2.0, 3.0) - loc.sum(-1)
    wanted = loc + rest.unsqueeze(-1) * t(0.2, 0.8)
    torch.testing.assert_close(law.mean, wanted)


def test_a_reference_of_the_wrong_shape_is_refused():
    for reference in (
        dist.Normal(0.0, 1.0),
        dist.Normal(torch.zeros(2), 1).to_event(1),
    ):
        with pytest.raises(
            pm.PyroMacroError, match=r"reference has event shape .*\(3,\)"
        ):
            law_of(
                sites(*[dist.Normal(0.0, 1.0)] * 3),
                TOTAL,
                pm.MaxEntropy(1.0, reference),
            )


def test_seeds_repeat_and_reading_takes_no_random_numbers():
    for fns in (finite(), [dist.Uniform(0.0, 2.0)] * 3, [dist.Gamma(2.0, 1.0)] * 3):
        intervened = pm.macro_do(sites(*fns), {TOTAL: pm.MaxEntropy(3.0)})
        pyro.set_rng_seed(2)
        node = poutine.trace(intervened).get_trace().nodes["m__micro"]
        pyro.set_rng_seed(2)
        torch.testing.assert_close(node["fn"].sample(), node["value"], rtol=0, atol=0)


def test_the_density_of_two_uniforms_integrates_to_one():
    fns = [dist.Uniform(0.0, 1.0), dist.Uniform(0.0, 3.0)]
    macro = macro_of(pm.Linear([2.0, 1.0]), 2)
    law = law_of(sites(*fns), macro, pm.MaxEntropy(1.5))

    def density(x0):
        state = t(x0, 1.5 - 2 * x0)
        return law.log_prob(state).exp().item() if law.support.check(state) else 0.0

    total, _ = integrate.quad(density, 0, 1, points=[0.75])
    assert abs(total - 1) < 1e-6
