# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous micro sites with finite ancestors: exact mixtures, by hand and by numbers.

By hand: for each configuration ``c`` the joint density of the sites and the density of
their total, weighted with ``P(c)``.
"""

import itertools

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
    run,
)
from pyro import poutine
from scipy import integrate, stats
from torch.distributions import biject_to

import pyro_macro as pm

PAIR = pm.MacroVariable("m", ["x0", "x1"])
P = [0.2, 0.5, 0.3]
LOC = [[0.0, 1.0], [2.0, -1.0], [1.0, 4.0]]
SCALE = [[1.0, 0.5], [0.7, 2.0], [1.5, 1.0]]


def t(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def normals():
    c = pyro.sample("c", dist.Categorical(t(P)))
    for i in range(2):
        pyro.sample(f"x{i}", dist.Normal(t(LOC)[c, i], t(SCALE)[c, i]))


def gammas():
    """Of one rate, whatever the cause."""
    c = pyro.sample("c", dist.Categorical(t(P)))
    rate = t([0.5, 1.0, 3.0])[c]
    for i in range(2):
        size = t([[1.5, 2.0], [4.0, 1.2], [2.5, 6.0]])[c, i]
        pyro.sample(f"x{i}", dist.Gamma(size, rate))


def extremes():
    c = pyro.sample("c", dist.Categorical(t(P)))
    for i in range(2):
        pyro.sample(f"x{i}", dist.Normal(t(LOC)[c, i], t(SCALE)[c, i]))


def normal_given(c, total):
    """The weight of a cause, and the law of the first element, given the total."""
    (m0, m1), (s0, s1) = LOC[c], SCALE[c]
    v0, v1 = s0**2, s1**2
    weight = P[c] * stats.norm(m0 + m1, (v0 + v1) ** 0.5).pdf(total)
    mean = m0 + v0 / (v0 + v1) * (total - m0 - m1)
    return weight, stats.norm(mean, (v0 * v1 / (v0 + v1)) ** 0.5)


def gamma_given(c, total):
    size, rate = [[1.5, 2.0], [4.0, 1.2], [2.5, 6.0]][c], [0.5, 1.0, 3.0][c]
    weight = P[c] * stats.gamma(sum(size), scale=1 / rate).pdf(total)
    return weight, stats.beta(*size, scale=total)


CASES = {
    "normal": (normals, normal_given, 2.5, (-np.inf, np.inf)),
    "gamma": (gammas, gamma_given, 3.0, (0, 3.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_law_is_the_mixture_by_hand(case):
    model, by_hand, total, ends = CASES[case]
    law = law_of(model, PAIR, pm.Natural(total))
    assert law.method.startswith("exact: mixture of 3, each: ")
    weights, parts = zip(*[by_hand(c, total) for c in range(3)], strict=True)
    weights = np.array(weights)
    torch.testing.assert_close(law.log_total.item(), np.log(weights.sum()))
    share = weights / weights.sum()
    assert share.min() > 0.02

    def mixed(of):
        return sum(s * of(part) for s, part in zip(share, parts, strict=True))

    x0 = np.linspace(0.1, 2.4, 20)
    states = torch.stack([t(x0), total - t(x0)], -1)
    found = law.log_prob(states).exp()
    torch.testing.assert_close(found, t(mixed(lambda part: part.pdf(x0))))

    def density(x):
        return law.log_prob(t([x, total - x])).exp().item()

    assert abs(integrate.quad(density, *ends)[0] - 1) < 1e-6
    draws = law.sample((8000,))
    torch.testing.assert_close(draws.sum(-1), torch.full((8000,), total))
    assert_cdf(draws[:, 0], lambda x: mixed(lambda part: part.cdf(x)))
    mean = mixed(lambda part: part.mean())
    square = mixed(lambda part: part.var() + part.mean() ** 2)
    torch.testing.assert_close(law.mean, t([mean, total - mean]))
    torch.testing.assert_close(law.variance, t([square - mean**2] * 2))


def test_a_mixture_of_extremes_is_the_one_by_hand():
    macro = pm.MacroVariable("m", ["x0", "x1"], aggregation=pm.Max())
    law = law_of(extremes, macro, pm.Natural(1.5))
    assert "mixture of 3, each: extreme" in law.method
    total = density = 0.0
    for c in range(3):
        one, two = (stats.norm(LOC[c][i], SCALE[c][i]) for i in range(2))
        total += P[c] * (one.pdf(1.5) * two.cdf(1.5) + two.pdf(1.5) * one.cdf(1.5))
        density += P[c] * one.pdf(0.3) * two.pdf(1.5)
    torch.testing.assert_close(law.log_total.item(), np.log(total))
    found = law.log_prob(t([0.3, 1.5])).exp().item()
    torch.testing.assert_close(found, density / total)
    draws = law.sample((4000,))
    assert (draws.amax(-1) == 1.5).all()
    attains = sum(
        P[c]
        * stats.norm(LOC[c][1], SCALE[c][1]).pdf(1.5)
        * stats.norm(LOC[c][0], SCALE[c][0]).cdf(1.5)
        for c in range(3)
    )
    count = int((draws[:, 1] == 1.5).sum())
    assert stats.binomtest(count, 4000, attains / total).pvalue > 1e-3


def test_three_elements_integrate_to_one():
    def model():
        c = pyro.sample("c", dist.Bernoulli(0.4))
        with pyro.plate("o", 3):
            pyro.sample("x", dist.Gamma(t([2.0, 1.5, 3.0]) + c, 1.0 + 2 * c))

    macro = pm.MacroVariable("m", "x", over="o", aggregation=pm.Linear([1.0] * 3))
    law = law_of(model, macro, pm.Natural(3.0))
    u, w = np.polynomial.legendre.leggauss(80)
    u, w = t((u + 1) / 2), t(w / 2)
    x0, x1 = 3 * u.unsqueeze(-1), u * (3 - 3 * u.unsqueeze(-1))
    volume = 3 * w.unsqueeze(-1) * w * (3 - 3 * u.unsqueeze(-1))
    states = torch.stack([x0.expand_as(x1), x1, 3 - x0 - x1], -1)
    total = (law.log_prob(states).exp() * volume).sum().item()
    torch.testing.assert_close(total, 1.0, rtol=1e-5, atol=0)


def test_rejection_in_a_narrow_window_finds_the_same_draws():
    n = 1_000_000
    c = torch.distributions.Categorical(t(P)).sample((n,))
    nature = torch.normal(t(LOC)[c], t(SCALE)[c])
    near = nature[(nature.sum(-1) - 2.5).abs() < 0.01]
    assert len(near) > 2000
    draws = law_of(normals, PAIR, pm.Natural(2.5)).sample((len(near),))
    assert_same_law(draws, near)


def test_gaussian_ancestors_are_integrated_out_beside_the_finite_ones():
    def model():
        c = pyro.sample("c", dist.Bernoulli(0.3))
        z = pyro.sample("z", dist.Normal(3 * c, 1 + c))
        pyro.sample("x0", dist.Normal(z, 1.0))
        pyro.sample("x1", dist.Normal(2 * z - c, 0.5))

    law = law_of(model, PAIR, pm.Natural(4.0))
    joint = total = 0.0
    for c, weight in ((0, 0.7), (1, 0.3)):
        slope, variance = np.array([1.0, 2.0]), (1 + c) ** 2
        mean = slope * 3 * c - np.array([0, c])
        covariance = np.diag([1, 0.25]) + variance * np.outer(slope, slope)
        joint += weight * stats.multivariate_normal(mean, covariance).pdf([1.2, 2.8])
        total += weight * stats.norm(mean.sum(), covariance.sum() ** 0.5).pdf(4.0)
    torch.testing.assert_close(law.log_prob(t([1.2, 2.8])).exp().item(), joint / total)
    torch.testing.assert_close(law.log_total.item(), np.log(total))


def test_a_mixture_of_normals_with_weights_and_causes_of_its_elements():
    """Eight configurations: a cause for each element."""
    weights = [1.0, -2.0, 0.5]

    def model():
        with pyro.plate("o", 3):
            z = pyro.sample("z", dist.Bernoulli(t([0.2, 0.5, 0.7])))
            pyro.sample("x", dist.Normal(2 * z, 1 + z))

    macro = pm.MacroVariable("m", "x", over="o", aggregation=pm.Linear(weights))
    law = law_of(model, macro, pm.Natural(0.7))
    assert "mixture of 8" in law.method
    w, state = t(weights), t([1.1, 0.4, 0.8])
    assert abs(w @ state - 0.7) < 1e-12
    joint = total = 0.0
    for z in itertools.product((0.0, 1.0), repeat=3):
        z = t(z)
        prior = dist.Bernoulli(t([0.2, 0.5, 0.7])).log_prob(z).sum().exp()
        joint += prior * dist.Normal(2 * z, 1 + z).log_prob(state).sum().exp()
        spread = (w.square() * (1 + z).square()).sum().sqrt()
        total += prior * dist.Normal(w @ (2 * z), spread).log_prob(t(0.7)).exp()
    torch.testing.assert_close(law.log_total.sum(), total.log())
    # The measure is that of all elements but the one that the law solves for: which
    # one that is, the draws of a law without causes tell
    ratio = (law.log_prob(state) - (joint / total).log()).exp().item()
    assert any(abs(ratio - abs(x)) < 1e-9 for x in weights)


def test_slots_with_own_causes_have_mixtures_of_their_own():
    prior = t([[0.2], [0.9]])
    values = t([[1.0], [3.0]])

    def model():
        with pyro.plate("k", 2, dim=-2):
            c = pyro.sample("c", dist.Bernoulli(prior))
            with pyro.plate("o", 2, dim=-1):
                pyro.sample("x", dist.Normal(2 * c + t([0.0, 1.0]), 1.0))

    macro = pm.MacroVariable("m", "x", over="o")
    law = law_of(model, macro, pm.Natural(values))
    assert law.batch_shape == (2, 1)
    draws = law.sample((5000,))
    assert draws.shape == (5000, 2, 1, 2)
    for i in range(2):

        def alone(i=i):
            c = pyro.sample("c", dist.Bernoulli(prior[i, 0]))
            with pyro.plate("o", 2):
                pyro.sample("x", dist.Normal(2 * c + t([0.0, 1.0]), 1.0))

        own = law_of(alone, macro, pm.Natural(values[i, 0]))
        torch.testing.assert_close(
            law.log_prob(draws)[:, i, 0],
            own.log_prob(draws[:, i]).reshape(-1),
        )
        torch.testing.assert_close(law.log_total[i, 0], own.log_total.sum())
        torch.testing.assert_close(law.mean[i, 0], own.mean.reshape(2))
        others = own.sample((5000,)).reshape(-1, 2)
        assert_same_law(draws[:, i, 0, :1], others[:, :1])


def test_a_given_cause_leaves_one_part_of_the_mixture():
    outside = poutine.condition(
        pm.macro_do(normals, {PAIR: pm.Natural(2.5, given="c")}),
        data={"c": torch.tensor(2)},
    )
    law = poutine.trace(outside).get_trace().nodes["m__micro"]["fn"]
    _, wanted = normal_given(2, 2.5)
    torch.testing.assert_close(law.mean[0].item(), wanted.mean())
    torch.testing.assert_close(law.variance[0].item(), wanted.var())


def test_a_grid_of_values_comes_out_along_its_plate():
    grid = t([-1.0, 2.5, 6.0])
    with pyro.plate("grid", 3):
        law = run(normals, PAIR, pm.Natural(grid)).nodes["m__micro"]["fn"]
    assert law.batch_shape == (3,)
    for i, total in enumerate(grid.tolist()):
        weight = sum(normal_given(c, total)[0] for c in range(3))
        torch.testing.assert_close(law.log_total[i].item(), np.log(weight))
        single = law_of(normals, PAIR, pm.Natural(total))
        state = t([0.3, total - 0.3])
        torch.testing.assert_close(
            law.log_prob(on(grid, 0.3))[i], single.log_prob(state)
        )


def on(grid, x0):
    return torch.stack([torch.full_like(grid, x0), grid - x0], -1)


@pytest.mark.parametrize("case", CASES)
def test_an_expanded_mixture_draws_anew_and_seeds_repeat(case):
    model, by_hand, total, _ = CASES[case]
    law = law_of(model, PAIR, pm.Natural(total)).expand((3000, 2))
    pyro.set_rng_seed(2)
    draws = law.sample()
    assert draws.shape == (3000, 2, 2)
    assert len(draws[..., 0].unique()) == 6000
    assert abs(torch.corrcoef(draws[..., 0].T)[0, 1]) < 5 / 3000**0.5
    weights, parts = zip(*[by_hand(c, total) for c in range(3)], strict=True)
    share = np.array(weights) / sum(weights)
    assert_cdf(
        draws[..., 0].flatten(),
        lambda x: sum(s * part.cdf(x) for s, part in zip(share, parts, strict=True)),
    )
    assert law.log_prob(draws).shape == (3000, 2)
    assert law.sample((2,)).shape == (2, 3000, 2, 2)
    pyro.set_rng_seed(2)
    torch.testing.assert_close(law.sample(), draws, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_sites(dtype):
    torch.set_default_dtype(dtype)

    def model():
        c = pyro.sample("c", dist.Bernoulli(0.3))
        pyro.sample("x0", dist.Normal(c, 1.0))
        pyro.sample("x1", dist.Normal(-c, 2.0))

    trace = run(model, PAIR, pm.Natural(1.0))
    assert trace.nodes["x0"]["value"].dtype == dtype
    assert trace.nodes["m__micro"]["log_prob"].dtype == dtype


def test_the_log_density_has_the_gradient_of_differences():
    state = t([0.7, 1.8])

    def density(theta):
        def model():
            c = pyro.sample("c", dist.Bernoulli(logits=theta[0]))
            pyro.sample("x0", dist.Normal(theta[1] * c, theta[2].exp()))
            pyro.sample("x1", dist.Normal(theta[3] - c, 1 + theta[4].exp() * c))

        law = law_of(model, PAIR, pm.Natural(2.5))
        return law.log_prob(state) + 0.3 * law.log_total

    assert_gradient(density, t([0.3, 2.0, -0.2, 0.5, 0.1]))


@pytest.mark.parametrize("case", CASES)
def test_coordinates_are_those_of_the_fibre(case):
    model, _, total, _ = CASES[case]
    law = law_of(model, PAIR, pm.Natural(total))
    transform = biject_to(law.support)
    z = torch.linspace(-2, 2, 5).unsqueeze(-1)
    x = transform(z)
    torch.testing.assert_close(x.sum(-1), torch.full((5,), total))
    assert law.support.check(x).all()
    torch.testing.assert_close(transform.inv(x), z)
    # d x0 / d z, for the density is that of all elements but the last
    slope = [
        torch.autograd.functional.jacobian(lambda z: transform(z)[0], point)[0]
        for point in z
    ]
    found = transform.log_abs_det_jacobian(z, x).reshape(5)
    torch.testing.assert_close(found, torch.stack(slope).abs().log())


def test_reading_takes_no_random_numbers_and_leaves_no_parameters():
    intervened = pm.macro_do(normals, {PAIR: pm.Natural(2.5)})
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(4)
        draws.append(poutine.trace(intervened).get_trace())
    pyro.set_rng_seed(4)
    plain = poutine.trace(normals).get_trace()
    torch.testing.assert_close(
        draws[0].nodes["x0"]["value"], draws[1].nodes["x0"]["value"], rtol=0, atol=0
    )
    assert plain.nodes["c"]["value"] == draws[0].nodes["c"]["value"]
    assert len(pyro.get_param_store()) == 0


@pytest.mark.slow
def test_nuts_through_a_mixture_has_the_posterior_by_numbers():
    def watched():
        c = pyro.sample("c", dist.Categorical(t(P)))
        x = [
            pyro.sample(f"x{i}", dist.Normal(t(LOC)[c, i], t(SCALE)[c, i]))
            for i in range(2)
        ]
        pyro.sample("y", dist.Normal(x[0] - 0.5, 1.0), obs=t(1.0))

    kernel = pyro.infer.NUTS(pm.macro_do(watched, {PAIR: pm.Natural(2.5)}))
    mcmc = pyro.infer.MCMC(kernel, 200, 100, disable_progbar=True)
    mcmc.run()
    x0 = mcmc.get_samples()["m__micro"][:, 0]
    grid = np.linspace(-8, 10, 6001)
    prior = sum(
        w * part.pdf(grid) for w, part in (normal_given(c, 2.5) for c in range(3))
    )
    posterior = prior * stats.norm(grid - 0.5, 1).pdf(1.0)
    posterior /= posterior.sum()
    mean = (grid * posterior).sum()
    deviation = (posterior * (grid - mean) ** 2).sum() ** 0.5
    assert abs(x0.mean() - mean) < 5 * deviation / 50**0.5
    assert abs(x0.std() / deviation - 1) < 0.4
