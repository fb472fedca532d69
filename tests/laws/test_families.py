# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Closed families: Poisson, binomial, negative binomial and gamma sites given a sum.

Compared with the joint law listed state by state, with scipy's closed forms, and with
numerical integrals.
"""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import (
    assert_cdf,
    assert_counts,
    assert_gradient,
    assert_is_law,
    law_of,
    product_of,
    run,
)
from pyro import poutine
from scipy import integrate, stats

import pyro_macro as pm

TOTAL = pm.MacroVariable("total", ["x0", "x1", "x2"])


def t(*numbers):
    return torch.tensor(numbers)


def sites(*fns):
    def model():
        for i, fn in enumerate(fns):
            pyro.sample(f"x{i}", fn)

    return model


COUNTS = {
    "Poisson": lambda: [dist.Poisson(rate) for rate in (1.0, 2.5, 0.4)],
    "binomial": lambda: [
        dist.Binomial(4, torch.tensor(0.3)),
        dist.Binomial(2, torch.tensor(0.3)),
        dist.Bernoulli(0.3),
    ],
    "binomial by logits": lambda: [
        dist.Binomial(3, logits=torch.tensor(-2.0)),
        dist.Bernoulli(logits=torch.tensor(-2.0)),
        dist.Binomial(5, logits=torch.tensor(-2.0)),
    ],
    "negative binomial": lambda: [
        dist.NegativeBinomial(3.0, torch.tensor(0.35)),
        dist.NegativeBinomial(0.7, torch.tensor(0.35)),
        dist.Geometric(0.65),
    ],
}
METHODS = {
    "Poisson": "multinomial",
    "binomial": "hypergeometric",
    "binomial by logits": "hypergeometric",
    "negative binomial": "Dirichlet-multinomial",
}


def values_of(fn, most):
    finite = fn.has_enumerate_support
    return fn.enumerate_support().tolist() if finite else range(most + 1)


def listed(fns, total):
    values = [values_of(fn, total) for fn in fns]
    return product_of(fns, values, lambda x: x.sum(-1), total)


@pytest.mark.parametrize("total", [0, 1, 5])
@pytest.mark.parametrize("family", COUNTS)
def test_counts_given_their_sum_are_the_joint_law_conditioned(family, total):
    fns = COUNTS[family]()
    law = law_of(sites(*fns), TOTAL, pm.Natural(float(total)))
    assert law.method.startswith("exact") and METHODS[family] in law.method
    states, probs, log_total = listed(fns, total)
    assert_is_law(law, states, probs, log_total)
    assert_counts(law.sample((20_000,)), states, probs)
    torch.testing.assert_close(law.mean, (probs.unsqueeze(-1) * states).sum(0))


def scipy_counterpart(family, total):
    if family == "Poisson":
        return stats.multinomial(total, np.array([1.0, 2.5, 0.4]) / 3.9)
    if family == "binomial":
        return stats.multivariate_hypergeom([4, 2, 1], total)
    return stats.dirichlet_multinomial([3.0, 0.7, 1.0], total)


@pytest.mark.parametrize("family", ["Poisson", "binomial", "negative binomial"])
def test_counts_given_their_sum_have_the_densities_of_scipy(family):
    law = law_of(sites(*COUNTS[family]()), TOTAL, pm.Natural(5.0))
    states = law.enumerate_support()
    fn = scipy_counterpart(family, 5)
    wanted = [float(fn.logpmf(x.long().numpy())) for x in states]
    torch.testing.assert_close(law.log_prob(states), torch.tensor(wanted))


@pytest.mark.parametrize("family", COUNTS)
def test_counts_of_one_weight_are_counted_in_steps_of_it(family):
    fns = COUNTS[family]()
    for aggregation, total in ((pm.Linear([2.5] * 3), 10.0), (pm.Mean(), 4 / 3)):
        macro = pm.MacroVariable("total", TOTAL.micro, aggregation=aggregation)
        law = law_of(sites(*fns), macro, pm.Natural(total))
        assert METHODS[family] in law.method
        assert_is_law(law, *listed(fns, 4))
    negative = pm.MacroVariable("total", TOTAL.micro, aggregation=pm.Linear([-1.0] * 3))
    assert_is_law(law_of(sites(*fns), negative, pm.Natural(-4.0)), *listed(fns, 4))


@pytest.mark.parametrize(
    "family, values, message",
    [
        ("Poisson", (-1.0, 2.5), "a whole number from 0"),
        ("binomial", (-1.0, 8.0, 2.5), "a whole number from 0 to 7"),
        ("negative binomial", (-1.0, 0.5), "a whole number from 0"),
    ],
)
def test_a_sum_that_counts_cannot_have_is_refused(family, values, message):
    for value in values:
        with pytest.raises(
            pm.Infeasible, match=f"'total'.*{value:g} cannot.*{message}"
        ):
            law_of(sites(*COUNTS[family]()), TOTAL, pm.Natural(value))


@pytest.mark.parametrize("family", COUNTS)
def test_states_off_the_fibre_of_a_sum_have_no_density(family):
    law = law_of(sites(*COUNTS[family]()), TOTAL, pm.Natural(3.0))
    assert law.support.check(t(1.0, 1.0, 1.0))
    for state in (t(1.0, 1.0, 2.0), t(4.0, -1.0, 0.0), t(1.5, 0.5, 1.0)):
        inside = bool(law.support.check(state))
        assert not inside, f"{state.tolist()} is on the fibre"
        with pytest.raises(ValueError, match="support"):
            law.log_prob(state)


# Parameters in tensors: plates, grids, gradients


PLATED = pm.MacroVariable("total", "x", over="parts")
MAKE = {
    "Poisson": lambda size, p: dist.Poisson(size),
    "binomial": lambda size, p: dist.Binomial(size.round(), p),
    "Bernoulli": lambda size, p: dist.Bernoulli(p + 0 * size),
    "negative binomial": lambda size, p: dist.NegativeBinomial(size, p),
    "geometric": lambda size, p: dist.Geometric(p + 0 * size),
    "gamma": lambda size, p: dist.Gamma(size, p),
    "exponential": lambda size, p: dist.Exponential(p + 0 * size),
    "chi-squared": lambda size, p: dist.Chi2(size),
}
SIZES = torch.tensor([[1.0, 2.0, 3.0, 2.0], [4.0, 1.0, 1.0, 2.0]]).double()
P = torch.tensor([[0.3], [0.6]]).double()


def shops(make, dtype=torch.float64):
    def model():
        with pyro.plate("shops", 2, dim=-2), pyro.plate("parts", 4, dim=-1):
            pyro.sample("x", make(SIZES.to(dtype), P.to(dtype)))

    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", MAKE)
def test_each_slot_of_a_plate_that_stays_has_its_own_law(family, dtype):
    values = t([2.0], [3.0]).to(dtype)
    trace = run(shops(MAKE[family], dtype), PLATED, pm.Natural(values))
    law = trace.nodes["total__micro"]["fn"]
    assert law.batch_shape == (2, 1)
    assert trace.nodes["x"]["value"].dtype == dtype
    draws = law.sample((50,))
    assert draws.dtype == dtype and draws.shape == (50, 2, 1, 4)
    torch.testing.assert_close(draws.sum(-1), values.expand(50, 2, 1))
    double = draws.double()  # back on the fibre in double precision
    double = double * (values / double.sum(-1)).unsqueeze(-1)
    for i in range(2):

        def alone(i=i):
            with pyro.plate("parts", 4):
                pyro.sample("x", MAKE[family](SIZES[i], P[i]))

        own = law_of(alone, PLATED, pm.Natural(values[i, 0].item()))
        torch.testing.assert_close(
            law.log_prob(draws)[:, i, 0].double(),
            own.log_prob(double[:, i, 0]),
            rtol=1e-4,
            atol=1e-4,
        )
        torch.testing.assert_close(
            law.log_total[i, 0].double(), own.log_total, rtol=1e-4, atol=1e-4
        )
        torch.testing.assert_close(law.mean[i, 0].double(), own.mean)


@pytest.mark.parametrize("family", MAKE)
def test_a_grid_of_sums_comes_out_along_its_plate(family):
    grid = torch.arange(1.0, 4.0).reshape(3, 1, 1)
    intervened = pm.macro_do(shops(MAKE[family]), {PLATED: pm.Natural(grid)})
    with pyro.plate("grid", 3, dim=-3):
        nodes = poutine.trace(intervened).get_trace().nodes
    x = nodes["x"]["value"]
    assert x.shape == (3, 2, 4)
    torch.testing.assert_close(x.sum(-1), grid[..., 0].expand(3, 2))
    law = nodes["total__micro"]["fn"]
    assert law.batch_shape == (3, 2, 1)
    single = law_of(shops(MAKE[family]), PLATED, pm.Natural(2.0))
    torch.testing.assert_close(
        law.log_prob(nodes["total__micro"]["value"])[1],
        single.log_prob(nodes["total__micro"]["value"][1]),
    )


@pytest.mark.parametrize("family", MAKE)
def test_an_expanded_law_draws_anew_and_seeds_repeat(family):
    law = law_of(shops(MAKE[family]), PLATED, pm.Natural(3.0)).expand((40, 2, 1))
    assert law.batch_shape == (40, 2, 1)
    pyro.set_rng_seed(3)
    first = law.sample()
    assert first.shape == (40, 2, 1, 4)
    assert len(first[:, 0, 0].unique(dim=0)) > 3
    assert law.log_prob(first).shape == (40, 2, 1)
    pyro.set_rng_seed(3)
    torch.testing.assert_close(law.sample(), first, rtol=0, atol=0)


@pytest.mark.parametrize("family", MAKE)
def test_reading_takes_no_random_numbers_and_leaves_no_parameters(family):
    intervened = pm.macro_do(shops(MAKE[family]), {PLATED: pm.Natural(3.0)})
    pyro.set_rng_seed(11)
    node = poutine.trace(intervened).get_trace().nodes["total__micro"]
    pyro.set_rng_seed(11)
    torch.testing.assert_close(node["fn"].sample(), node["value"], rtol=0, atol=0)
    assert len(pyro.get_param_store()) == 0


def test_poisson_log_density_has_the_gradient_of_differences():
    state = t(2.0, 1.0, 0.0, 3.0)

    def density(rate):
        def model():
            with pyro.plate("parts", 4):
                pyro.sample("x", dist.Poisson(rate))

        law = law_of(model, PLATED, pm.Natural(6.0))
        return law.log_prob(state) + 0.3 * law.log_total

    assert_gradient(density, t(0.5, 1.0, 2.0, 3.0))


def test_negative_binomial_log_density_has_the_gradient_of_differences():
    state = t(2.0, 1.0, 0.0, 3.0)

    def density(size):
        def model():
            with pyro.plate("parts", 4):
                pyro.sample("x", dist.NegativeBinomial(size[:4], logits=size[4]))

        law = law_of(model, PLATED, pm.Natural(6.0))
        return law.log_prob(state) + 0.3 * law.log_total

    assert_gradient(density, t(0.5, 1.0, 2.0, 3.0, -0.7))


def test_the_total_of_binomials_has_the_gradient_of_differences():
    def density(logit):
        def model():
            with pyro.plate("parts", 3):
                pyro.sample("x", dist.Binomial(t(1.0, 4.0, 2.0), logits=logit))

        return law_of(model, PLATED, pm.Natural(3.0)).log_total

    assert_gradient(density, t(-0.4)[0])


def gammas(theta, weights=(1.0, 1.0, 1.0)):
    """Sizes, and a rate: those of the weighted elements are equal."""
    rate = theta[3] * torch.tensor(weights)

    def model():
        with pyro.plate("parts", 3):
            pyro.sample("x", dist.Gamma(theta[:3], rate))

    return model


THETA = [0.8, 2.0, 3.5, 0.6]
WEIGHTED = pm.MacroVariable(
    "total", "x", over="parts", aggregation=pm.Linear([1.0, 2.0, 0.5])
)


def test_gamma_log_density_has_the_gradient_of_differences():
    state = t(1.0, 2.5, 1.5)

    def density(theta):
        law = law_of(gammas(theta), PLATED, pm.Natural(5.0))
        return law.log_prob(state) + 0.3 * law.log_total

    assert_gradient(density, torch.tensor(THETA))


@pytest.mark.parametrize("macro", [PLATED, WEIGHTED], ids=["sum", "weighted"])
def test_gamma_draws_carry_the_gradient_of_their_expectation(macro):
    """E sum_i c_i x_i^2 given the total, against the Dirichlet's second moments."""
    weights = macro.aggregation.weights(torch.zeros(3))[0]
    c = t(1.0, -0.3, 0.5)

    def expectation(theta):
        size, total = theta[:3], theta[:3].sum()
        second = size * (size + 1) / (total * (total + 1))
        return (c * second * (theta[4] / weights).square()).sum()

    theta = torch.tensor([*THETA, 5.0], requires_grad=True)
    law = law_of(gammas(theta, tuple(weights.tolist())), macro, pm.Natural(theta[4]))
    draws = law.rsample((200_000,))
    mean = (c * draws.square()).sum(-1)
    (found,) = torch.autograd.grad(mean.mean(), theta)
    (wanted,) = torch.autograd.grad(expectation(theta), theta)
    assert wanted[[0, 1, 2, 4]].abs().min() > 0
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("total", [0.7, 30.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5)], ids=str)
def test_gamma_density_is_that_of_the_joint_over_that_of_the_total(weights, total):
    theta, w = torch.tensor(THETA), torch.tensor(weights)
    macro = pm.MacroVariable("total", "x", over="parts", aggregation=pm.Linear(weights))
    law = law_of(gammas(theta, weights), macro, pm.Natural(total))
    assert "Dirichlet" in law.method
    x = torch.distributions.Dirichlet(torch.ones(3)).sample((50,)) * total / w
    joint = dist.Gamma(theta[:3], theta[3] * w).log_prob(x).sum(-1)
    log_total = torch.tensor(
        stats.gamma(6.3, scale=1 / 0.6).logpdf(total)  # of the weighted sum
    )
    # From (x0, x1, x2) to (x0, x1, total): the volume changes by the last weight
    torch.testing.assert_close(law.log_prob(x), joint - log_total - w[2].log())
    torch.testing.assert_close(law.log_total, log_total)


def test_two_gammas_have_a_density_that_integrates_to_one():
    def model():
        pyro.sample("x0", dist.Gamma(1.7, 0.8))
        pyro.sample("x1", dist.Gamma(2.2, 2.0))

    macro = pm.MacroVariable("total", ["x0", "x1"], aggregation=pm.Linear([2.0, 5.0]))
    law = law_of(model, macro, pm.Natural(8.0))
    assert "Dirichlet" in law.method

    def density(x0):
        return law.log_prob(t(x0, (8 - 2 * x0) / 5)).exp().item()

    found, error = integrate.quad(density, 0, 4)
    assert abs(found - 1) < 1e-8 + error


def test_three_gammas_have_a_density_that_integrates_to_one():
    law = law_of(gammas(t(1.8, 2.0, 3.5, 0.6), (1, 2, 0.5)), WEIGHTED, pm.Natural(3.0))
    u, w = np.polynomial.legendre.leggauss(60)
    u, w = torch.tensor((u + 1) / 2), torch.tensor(w / 2)
    x0, x1 = 3 * u.unsqueeze(-1), u * (3 - 3 * u.unsqueeze(-1)) / 2
    volume = 3 * w.unsqueeze(-1) * w * (3 - 3 * u.unsqueeze(-1)) / 2
    states = torch.stack([x0.expand_as(x1), x1, (3 - x0 - 2 * x1) / 0.5], -1)
    total = (law.log_prob(states).exp() * volume).sum()
    torch.testing.assert_close(total.item(), 1.0, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5)], ids=str)
def test_gamma_draws_have_beta_marginals(weights):
    macro = pm.MacroVariable("total", "x", over="parts", aggregation=pm.Linear(weights))
    law = law_of(gammas(torch.tensor(THETA), weights), macro, pm.Natural(5.0))
    draws = law.sample((4000,))
    torch.testing.assert_close(draws @ torch.tensor(weights), torch.full((4000,), 5.0))
    for i, size in enumerate(THETA[:3]):
        cdf = stats.beta(size, 6.3 - size, scale=5 / weights[i]).cdf
        assert_cdf(draws[:, i], cdf)
        marginal = stats.beta(size, 6.3 - size, scale=5 / weights[i])
        torch.testing.assert_close(law.mean[i].item(), marginal.mean())
        torch.testing.assert_close(law.variance[i].item(), marginal.var())


def test_gamma_draws_are_what_rejection_in_a_narrow_window_finds():
    gamma = torch.distributions.Gamma(t(0.8, 2.0, 3.5), t(0.6))
    nature = gamma.sample((600_000,))
    near = nature[(nature.sum(-1) - 5).abs() < 0.05]
    assert len(near) > 2000
    law = law_of(gammas(torch.tensor(THETA)), PLATED, pm.Natural(5.0))
    draws = law.sample((len(near),))
    for a, b in ((draws, near), (draws[:, :1] / draws, near[:, :1] / near)):
        for k in (1, 2):
            assert stats.ks_2samp(a[:, k], b[:, k]).pvalue > 1e-3


def test_gammas_of_other_rates_are_no_family():
    def model():
        pyro.sample("x0", dist.Gamma(1.7, 0.8))
        pyro.sample("x1", dist.Gamma(2.2, 0.80001))

    few = pm.Chains(num_samples=4, warmup_steps=1, num_chains=1, progress=False)
    macro = pm.MacroVariable("total", ["x0", "x1"])
    with pytest.warns(pm.NotConverged):
        intervened = pm.macro_do(model, {macro: pm.Natural(3.0, sampler=few)})
        law = poutine.trace(intervened).get_trace().nodes["total__micro"]["fn"]
    assert law.method.startswith("Monte Carlo")


def test_a_thousand_poissons_have_binomial_marginals():
    rates = torch.linspace(0.1, 5.0, 1000)

    def model():
        with pyro.plate("parts", 1000):
            pyro.sample("x", dist.Poisson(rates))

    law = law_of(model, PLATED, pm.Natural(2500.0))
    draws = law.sample((2000,))
    assert (draws.sum(-1) == 2500).all()
    share = rates / rates.sum()
    mean, variance = 2500 * share, 2500 * share * (1 - share)
    assert ((draws.mean(0) - mean).abs() < 5 * (variance / 2000).sqrt()).all()
    ratio = draws.var(0) / variance
    assert abs(ratio.mean() - 1) < 0.01
    states = torch.arange(30.0).unsqueeze(-1)
    for k in (0, 500, 999):
        probs = torch.tensor(stats.binom(2500, share[k].item()).pmf(np.arange(30)))
        assert_counts(draws[:, k], states, probs)


def test_a_thousand_binomials_of_one_probability_have_hypergeometric_marginals():
    sizes = torch.arange(1000.0) % 5 + 1

    def model():
        with pyro.plate("parts", 1000):
            pyro.sample("x", dist.Binomial(sizes, 0.2))

    law = law_of(model, PLATED, pm.Natural(700.0))
    assert "hypergeometric" in law.method
    draws = law.sample((1000,))
    assert (draws.sum(-1) == 700).all() and (draws <= sizes).all()
    for k in (1, 4, 998):
        n = int(sizes[k])
        probs = stats.hypergeom(3000, n, 700).pmf(np.arange(n + 1))
        states = torch.arange(n + 1.0).unsqueeze(-1)
        assert_counts(draws[:, k], states, torch.tensor(probs))
    # Two of them together: rows of a table, of which pairs are independent of the sum
    pair = draws[:, [4, 9]].sum(-1, keepdim=True)
    probs = torch.tensor(stats.hypergeom(3000, 10, 700).pmf(np.arange(11)))
    assert_counts(pair, torch.arange(11.0).unsqueeze(-1), probs)


def test_a_hundred_geometrics_have_polya_marginals():
    def model():
        with pyro.plate("parts", 100):
            pyro.sample("x", dist.Geometric(0.3))

    draws = law_of(model, PLATED, pm.Natural(250.0)).sample((3000,))
    assert (draws.sum(-1) == 250).all()
    probs = torch.tensor(stats.betabinom(250, 1, 99).pmf(np.arange(60)))
    states = torch.arange(60.0).unsqueeze(-1)
    for k in (0, 63, 64, 99):
        assert_counts(draws[:, k], states, probs)


def test_shares_of_zero_are_never_drawn():
    def model():
        with pyro.plate("parts", 3):
            pyro.sample("x", dist.Poisson(t(0.0, 2.0, 0.0)))

    law = law_of(model, PLATED, pm.Natural(4.0))
    assert (law.sample((100,)) == t(0.0, 4.0, 0.0)).all()
    assert law.log_prob(t(0.0, 4.0, 0.0)) == 0


def test_large_sums_in_single_precision_are_met_exactly():
    rates = torch.linspace(1.0, 2.0, 50, dtype=torch.float32)

    def model():
        with pyro.plate("parts", 50):
            pyro.sample("x", dist.Poisson(rates))

    law = law_of(model, PLATED, pm.Natural(10_000_000.0))
    draws = law.sample((20,))
    assert draws.dtype == torch.float32
    assert (draws.double().sum(-1) == 1e7).all()
    share = rates.double() / rates.double().sum()
    error = (1e7 * share * (1 - share) / 20).sqrt()
    assert ((draws.double().mean(0) - 1e7 * share).abs() < 5 * error).all()


@pytest.mark.slow
def test_inference_through_a_gamma_law_is_that_of_the_dirichlet():
    """The posterior of a share given one noisy look at it, by NUTS and by grid."""

    def model():
        x0 = pyro.sample("x0", dist.Gamma(2.0, 1.0))
        pyro.sample("x1", dist.Gamma(3.0, 1.0))
        pyro.sample("y", dist.Normal(x0, 0.5), obs=torch.tensor(1.5))

    macro = pm.MacroVariable("total", ["x0", "x1"])
    kernel = pyro.infer.NUTS(pm.macro_do(model, {macro: pm.Natural(6.0)}))
    mcmc = pyro.infer.MCMC(kernel, 400, 100, disable_progbar=True)
    mcmc.run()
    x0 = mcmc.get_samples()["total__micro"][:, 0]
    grid = np.linspace(1e-6, 6 - 1e-6, 4001)
    posterior = stats.beta(2, 3, scale=6).pdf(grid) * stats.norm(grid, 0.5).pdf(1.5)
    posterior /= posterior.sum()
    mean = (grid * posterior).sum()
    deviation = math.sqrt((posterior * (grid - mean) ** 2).sum())
    assert abs(x0.mean() - mean) < 5 * deviation / math.sqrt(100)
    assert abs(x0.std() / deviation - 1) < 0.25
