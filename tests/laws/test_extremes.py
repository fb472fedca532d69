# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous sites given the largest or the smallest of them."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import (
    assert_cdf,
    assert_gradient,
    assert_same_law,
    law_of,
    product_of,
    run,
)
from scipy import integrate, stats
from torch.distributions import biject_to

import pyro_macro as pm
from pyro_macro.laws.extremes import quantile

MICRO = ["x0", "x1", "x2"]


def macro_of(aggregation):
    return pm.MacroVariable("m", MICRO, aggregation=aggregation)


def sites(*fns):
    def model():
        for i, fn in enumerate(fns):
            pyro.sample(f"x{i}", fn)

    return model


def normals():
    return [dist.Normal(0.0, 1.0), dist.Normal(1.0, 2.0), dist.Normal(-1.0, 0.5)]


def positives():
    return [dist.Exponential(0.7), dist.Gamma(2.0, 1.5), dist.LogNormal(0.2, 0.6)]


def bounded():
    # torch knows no cdf of Beta
    return [dist.Uniform(-1.0, 2.0), dist.Kumaraswamy(2.0, 3.0), dist.Laplace(0.0, 1.0)]


SCIPY = {
    normals: [stats.norm(0, 1), stats.norm(1, 2), stats.norm(-1, 0.5)],
    positives: [
        stats.expon(scale=1 / 0.7),
        stats.gamma(2, scale=1 / 1.5),
        stats.lognorm(0.6, scale=math.exp(0.2)),
    ],
}
CASES = [
    (normals, pm.Max(), 0.7),
    (normals, pm.Max(), 3.5),
    (normals, pm.Min(), -0.8),
    (positives, pm.Max(), 1.4),
    (positives, pm.Min(), 0.4),
]
IDS = [f"{f.__name__} {a!r} {v}" for f, a, v in CASES]


def within(fn, value, sign):
    return fn.cdf(value) if sign > 0 else fn.sf(value)


def log_total_of(fns, value, sign):
    """The density of the extreme: sum over which element attains it."""
    terms = []
    for j, fn in enumerate(fns):
        others = [within(f, value, sign) for i, f in enumerate(fns) if i != j]
        terms.append(fn.pdf(value) * np.prod(others))
    return np.log(sum(terms)), np.array(terms) / sum(terms)


@pytest.mark.parametrize("program, aggregation, value", CASES, ids=IDS)
def test_the_density_is_that_of_the_joint_over_that_of_the_extreme(
    program, aggregation, value
):
    law = law_of(sites(*program()), macro_of(aggregation), pm.Natural(value))
    assert law.method == "exact: extreme of independent sites"
    log_total, _ = log_total_of(SCIPY[program], value, aggregation.sign)
    torch.testing.assert_close(law.log_total.item(), log_total)
    draws = law.sample((50,))
    joint = sum(fn.logpdf(draws[:, i].numpy()) for i, fn in enumerate(SCIPY[program]))
    torch.testing.assert_close(law.log_prob(draws), torch.tensor(joint) - log_total)


@pytest.mark.parametrize("program, aggregation, value", CASES, ids=IDS)
def test_draws_attain_the_extreme_with_the_right_element_and_truncate_the_others(
    program, aggregation, value
):
    law = law_of(sites(*program()), macro_of(aggregation), pm.Natural(value))
    n, sign = 6000, aggregation.sign
    draws = law.sample((n,))
    assert (aggregation(draws) == value).all()
    attains = draws == value
    assert (attains.sum(-1) == 1).all()
    fns = SCIPY[program]
    _, share = log_total_of(fns, value, sign)
    assert stats.chisquare(attains.sum(0), n * share).pvalue > 1e-3
    for i, fn in enumerate(fns):
        for j in range(3):
            own = draws[attains[:, j], i] if j != i else draws[:0]
            if len(own) > 50:
                assert_cdf(
                    own,
                    lambda x, fn=fn: (
                        fn.cdf(x) / fn.cdf(value)
                        if sign > 0
                        else 1 - fn.sf(x) / fn.sf(value)
                    ),
                )


@pytest.mark.parametrize("aggregation", [pm.Max(), pm.Min()], ids=repr)
def test_the_density_sums_and_integrates_to_one(aggregation):
    """Over which of two elements attains the value, and where the other one is."""
    macro = pm.MacroVariable("m", MICRO[:2], aggregation=aggregation)
    law = law_of(sites(*positives()[:2]), macro, pm.Natural(1.1))
    ends = (0, 1.1) if aggregation.sign > 0 else (1.1, 60)

    def density(x):
        """Summed over which of the two attains."""
        states = torch.tensor([[1.1, x], [x, 1.1]])
        return law.log_prob(states).exp().sum().item()

    total, _ = integrate.quad(density, *ends, epsabs=1e-10, limit=200)
    assert abs(total - 1) < 1e-7


@pytest.mark.parametrize("aggregation", [pm.Max(), pm.Min()], ids=repr)
def test_rejection_in_a_narrow_window_finds_the_same_draws(aggregation):
    fns = positives()
    nature = torch.stack([fn.sample((400_000,)) for fn in fns], -1)
    value = 1.2
    near = nature[(aggregation(nature) - value).abs() < 0.005]
    assert len(near) > 800
    law = law_of(sites(*fns), macro_of(aggregation), pm.Natural(value))
    draws = law.sample((len(near),))
    # The one that attains moves within the window
    jitter = (torch.rand_like(draws) - 0.5) * 0.01
    draws = torch.where(draws == value, draws + jitter, draws)
    assert_same_law(draws, near)


def test_bounded_sites_and_many_elements():
    fns = bounded()
    law = law_of(sites(*fns), macro_of(pm.Max()), pm.Natural(0.9))
    draws = law.sample((20_000,))
    assert (draws.amax(-1) == 0.9).all() and (draws[:, 1] >= 0).all()
    nature = torch.stack([fn.sample((600_000,)) for fn in fns], -1)
    near = nature[(nature.amax(-1) - 0.9).abs() < 0.01]
    attains = torch.stack([(near == near.amax(-1, True))[:, i] for i in range(3)], -1)
    mine = (draws == 0.9).double().mean(0)
    error = (mine * (1 - mine) * (1 / len(near) + 1 / 20_000)).sqrt()
    assert ((attains.double().mean(0) - mine).abs() < 4 * error + 0.005).all()


def test_states_beyond_or_without_the_extreme_have_no_density():
    law = law_of(sites(*normals()), macro_of(pm.Max()), pm.Natural(0.7))
    assert law.support.check(torch.tensor([0.7, 0.1, -1.0]))
    for state in ([0.7, 0.8, -1.0], [0.6, 0.1, -1.0]):
        assert not law.support.check(torch.tensor(state))
        with pytest.raises(ValueError, match="support"):
            law.log_prob(torch.tensor(state))


@pytest.mark.parametrize("aggregation", [pm.Max(), pm.Min()], ids=repr)
def test_the_log_density_has_the_gradient_of_differences(aggregation):
    state = torch.tensor([0.5, 0.2, -0.4])
    state = state if aggregation.sign > 0 else -state

    def density(theta):
        fns = [dist.Normal(theta[i], theta[3 + i].exp()) for i in range(3)]
        law = law_of(
            sites(*fns), macro_of(aggregation), pm.Natural(0.5 * aggregation.sign)
        )
        return law.log_prob(state) + 0.3 * law.log_total

    assert_gradient(density, torch.tensor([0.1, -0.3, 0.4, 0.2, -0.1, 0.3]))


def test_gradients_stay_finite_at_the_ends_of_supports():
    """At a value that an element cannot have, it is not what attains."""
    theta = torch.tensor([0.7, 1.4], requires_grad=True)

    def model():
        pyro.sample("x0", dist.Uniform(0.0, theta[0]))
        pyro.sample("x1", dist.Exponential(theta[1]))
        pyro.sample("x2", dist.Exponential(1.0))

    law = law_of(model, macro_of(pm.Max()), pm.Natural(0.9))
    draws = law.sample((500,))
    assert (draws[:, 0] < 0.7).all()
    (gradient,) = torch.autograd.grad(law.log_prob(draws).sum() + law.log_total, theta)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slots_of_plates_have_values_and_laws_of_their_own(dtype):
    loc = torch.tensor([[0.0, 1.0, 2.0], [5.0, 3.0, 1.0]], dtype=dtype)
    values = torch.tensor([[1.5], [4.0]], dtype=dtype)

    def model():
        with pyro.plate("k", 2, dim=-2), pyro.plate("o", 3, dim=-1):
            pyro.sample("x", dist.Normal(loc, torch.ones((), dtype=dtype)))

    macro = pm.MacroVariable("m", "x", over="o", aggregation=pm.Max())
    trace = run(model, macro, pm.Natural(values))
    assert trace.nodes["x"]["value"].dtype == dtype
    torch.testing.assert_close(trace.nodes["x"]["value"].amax(-1, True), values)
    law = trace.nodes["m__micro"]["fn"]
    draws = law.sample((4000,))
    assert draws.shape == (4000, 2, 1, 3) and draws.dtype == dtype
    for i in range(2):
        fns = [stats.norm(float(m), 1) for m in loc[i]]
        log_total, share = log_total_of(fns, float(values[i]), 1)
        torch.testing.assert_close(
            law.log_total[i, 0].item(), log_total, rtol=1e-5, atol=1e-5
        )
        attains = (draws[:, i, 0] == values[i]).sum(0)
        assert stats.chisquare(attains, 4000 * share).pvalue > 1e-3


def test_a_grid_and_an_expanded_law():
    grid = torch.tensor([-0.5, 0.5, 2.0])
    with pyro.plate("grid", 3):
        trace = run(sites(*normals()), macro_of(pm.Max()), pm.Natural(grid))
    x = torch.stack([trace.nodes[name]["value"] for name in MICRO], -1)
    torch.testing.assert_close(x.amax(-1), grid)
    law = trace.nodes["m__micro"]["fn"].expand((40, 3))
    pyro.set_rng_seed(1)
    draws = law.sample()
    assert len(draws[:, 0].unique(dim=0)) == 40
    assert law.log_prob(draws).shape == (40, 3)
    pyro.set_rng_seed(1)
    torch.testing.assert_close(law.sample(), draws, rtol=0, atol=0)


def test_a_thousand_elements():
    def model():
        with pyro.plate("o", 1000):
            pyro.sample("x", dist.Exponential(torch.linspace(0.5, 2.0, 1000)))

    macro = pm.MacroVariable("m", "x", over="o", aggregation=pm.Max())
    law = law_of(model, macro, pm.Natural(9.0))
    draws = law.sample((500,))
    assert (draws.amax(-1) == 9).all()
    rates = torch.linspace(0.5, 2.0, 1000)
    hazard = rates / (rates * 9).expm1()
    share = hazard / hazard.sum()
    slow = (draws == 9).double()[:, :100].sum()
    p = share[:100].sum()
    assert abs(slow - 500 * p) < 5 * (500 * p * (1 - p)).sqrt()
    total = (1 - (-9 * rates).exp()).log().sum() + hazard.sum().log()
    torch.testing.assert_close(law.log_total, total)


def test_there_are_no_coordinates_and_the_message_says_why():
    law = law_of(sites(*normals()), macro_of(pm.Max()), pm.Natural(0.7))
    with pytest.raises(pm.UnsupportedLaw, match="its extreme is mixed.*Predictive"):
        biject_to(law.support)


@pytest.mark.parametrize(
    "aggregation, value", [(pm.Max(), -0.3), (pm.Min(), -0.3), (pm.Max(), 0.0)]
)
def test_an_extreme_off_the_supports_is_refused(aggregation, value):
    with pytest.raises(pm.Infeasible, match="'m'.*cannot be reached"):
        law_of(sites(*positives()), macro_of(aggregation), pm.Natural(value))


def test_the_extreme_of_continuous_and_finite_sites_together_is_refused_and_named():
    fns = [dist.Normal(0.0, 1.0), dist.Bernoulli(0.5), dist.Normal(0.0, 1.0)]
    with pytest.raises(pm.UnsupportedLaw, match="'x1' is Bernoulli"):
        law_of(sites(*fns), macro_of(pm.Max()), pm.Natural(0.7))


def test_quantiles_by_bisection_are_those_of_scipy():
    p = torch.tensor([1e-9, 1e-3, 0.3, 0.5, 0.9, 0.999, 1 - 1e-9])
    for part, known in [
        (dist.Gamma(0.3, 2.0), stats.gamma(0.3, scale=0.5)),
        (dist.Gamma(50.0, 0.1), stats.gamma(50, scale=10)),
        (dist.Gamma(2.0, 1.0), stats.gamma(2)),
    ]:
        found = quantile(part, p)
        wanted = torch.tensor(known.ppf(p.numpy()))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-12)


def test_finite_sites_have_the_same_extremes_by_dynamic_programming():
    """A cross-check of the two laws: uniform dice, of more and more sides."""
    sides = 400
    die = dist.Categorical(torch.ones(sides))
    law = law_of(sites(die, die, die), macro_of(pm.Max()), pm.Natural(100.0))
    uniform = dist.Uniform(-0.5, sides - 0.5)
    other = law_of(
        sites(uniform, uniform, uniform), macro_of(pm.Max()), pm.Natural(100.0)
    )
    n = 5000
    draws = law.sample((n,)) + torch.rand(n, 3) - 0.5
    smooth = other.sample((n,)) + torch.rand(n, 3) - 0.5
    assert_same_law(draws, smooth)
    states, probs, _ = product_of(
        [dist.Categorical(torch.ones(4))] * 2, [range(4)] * 2, lambda x: x.amax(-1), 2
    )
    assert len(states) == 5 and probs.unique().numel() == 1


@pytest.mark.parametrize("family", [dist.Weibull, dist.Gumbel, dist.Pareto])
def test_families_that_are_made_of_transforms_are_the_same_when_run(family):
    """Their cumulative probabilities make inverse transforms, which are no change."""

    def model():
        with pyro.plate("o", 6):
            return pyro.sample("x", family(2.0, 1.5))

    top = pm.MacroVariable("m", "x", over="o", aggregation=pm.Max())
    value = pm.macro_do(model, {top: pm.Natural(4.0)})()
    assert value.max() == 4.0 and (value == 4.0).sum() == 1
