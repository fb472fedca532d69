# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws without a closed form: draws by NUTS on the fibre.

Compared with integrals over the fibre by numbers and with rejection in a narrow window.
"""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import assert_same_law
from pyro import poutine
from pyro.infer import MCMC
from scipy import integrate, stats
from torch.distributions import biject_to

import pyro_macro as pm

PAIR = pm.MacroVariable("m", ["x0", "x1"])
QUIET = pm.Chains(num_samples=150, warmup_steps=50, num_chains=1, progress=False)
TINY = pm.Chains(num_samples=12, warmup_steps=5, num_chains=1, progress=False)
LONG = pm.Chains(num_samples=800, warmup_steps=200, num_chains=2, progress=False)


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def gammas(rate=2.0):
    pyro.sample("x0", dist.Gamma(2.0, 1.0))
    pyro.sample("x1", dist.Gamma(3.0, rate))


def site(intervened):
    return poutine.trace(intervened).get_trace().nodes["m__micro"]


def law_of(model, macro, value, sampler=QUIET, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pm.NotConverged)
        natural = pm.Natural(value, sampler=sampler, **kwargs)
        return site(pm.macro_do(model, {macro: natural}))["fn"]


def moments(density, low, high):
    """Mean and standard deviation of a density on an interval."""
    x = np.linspace(low, high, 20_001)[1:-1]
    p = np.array(density(x))
    p = p / p.sum()
    mean = (x * p).sum()
    return mean, ((x - mean) ** 2 * p).sum() ** 0.5, x, p.cumsum()


def assert_moments(draws, mean, deviation, effective):
    """Within five standard errors, of so many independent draws."""
    assert abs(float(draws.mean()) - mean) < 5 * deviation / effective**0.5
    assert abs(float(draws.std()) / deviation - 1) < 5 / effective**0.5


def test_two_gammas_of_other_rates_have_the_moments_of_the_integral():
    law = law_of(gammas, PAIR, 3.0)
    assert law.method.startswith("Monte Carlo: NUTS on the fibre, 150 draws, R-hat")
    draws = law.draws
    assert draws.shape == (150, 2)
    torch.testing.assert_close(draws.sum(-1), torch.full((150,), 3.0))

    def density(x):
        one, two = stats.gamma(2), stats.gamma(3, scale=0.5)
        return one.pdf(x) * two.pdf(3 - x)

    mean, deviation, _, _ = moments(density, 0, 3)
    assert_moments(draws[:, 0], mean, deviation, 30)
    found = law.sample((5000,))
    assert (found.unsqueeze(1) == draws).all(-1).any(-1).all()  # those that are stored


def test_draws_are_kept_for_the_next_run_and_a_changed_parameter_starts_chains(
    monkeypatch,
):
    rate = pyro.param("rate", t(2.0)[0])
    natural = pm.Natural(3.0, sampler=TINY)
    runs = []
    own = MCMC.run

    def counted(self, *args, **kwargs):
        runs.append(1)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(MCMC, "run", counted)

    def model():
        gammas(pyro.param("rate", rate))

    intervened = pm.macro_do(model, {PAIR: natural})
    first = site(intervened)["fn"]
    assert len(runs) == 1
    pyro.set_rng_seed(5)
    second = site(intervened)["fn"]
    assert len(runs) == 1 and second.draws is first.draws
    # Of the same realization in another program that says the same
    site(pm.macro_do(gammas, {PAIR: natural}))
    assert len(runs) == 1
    with torch.no_grad():
        pyro.param("rate").fill_(4.0)
    site(intervened)
    assert len(runs) == 2
    # Another value is another realization
    site(pm.macro_do(model, {PAIR: pm.Natural(2.0, sampler=TINY)}))
    assert len(runs) == 3

    def refuse(self, *args, **kwargs):
        raise AssertionError("a chain was started")

    monkeypatch.setattr(MCMC, "run", refuse)
    site(intervened)
    with torch.no_grad():
        pyro.param("rate").fill_(2.0)
    assert site(intervened)["fn"].draws is first.draws


def test_a_given_value_is_part_of_what_draws_are_kept_by():
    def model():
        c = pyro.sample("c", dist.Gamma(2.0, 1.0))
        pyro.sample("x0", dist.Gamma(2.0, c))
        pyro.sample("x1", dist.Gamma(3.0, 1.0))

    natural = pm.Natural(3.0, given="c", sampler=TINY)
    intervened = pm.macro_do(model, {PAIR: natural})
    draws = []
    for c in (0.2, 9.0, 0.2):
        law = site(poutine.condition(intervened, data={"c": t(c)[0]}))["fn"]
        draws.append(law.draws)
    assert draws[0] is draws[2]
    assert draws[0][:, 0].mean() - draws[1][:, 0].mean() > 0.5


def test_the_user_s_random_state_and_parameters_stay_as_they_were():
    def model():
        gammas(pyro.param("rate", t(2.0)[0]))

    intervened = pm.macro_do(model, {PAIR: pm.Natural(3.0, sampler=TINY)})
    drawn = []
    for _ in range(2):  # the second run starts no chain
        pyro.set_rng_seed(9)
        first = site(intervened)["value"]
        drawn.append(torch.cat([first, torch.rand(2)]))
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=0)
    assert set(pyro.get_param_store().keys()) == {"rate"}
    pyro.set_rng_seed(9)
    again = pm.macro_do(model, {PAIR: pm.Natural(3.0, sampler=TINY)})
    torch.testing.assert_close(site(again)["value"], drawn[0][:2], rtol=0, atol=0)


def test_no_progress_bar_is_silent_and_one_is_shown_by_default(capfd, monkeypatch):
    # Pyro shows no bars where these variables are set.
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    law_of(gammas, PAIR, 3.0, TINY)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""
    few = pm.Chains(num_samples=20, warmup_steps=5, num_chains=1)
    assert few.progress
    law_of(gammas, PAIR, 3.0, sampler=few)
    captured = capfd.readouterr()
    assert "Sample" in captured.err + captured.out


def test_too_few_draws_are_warned_of():
    few = pm.Chains(num_samples=4, warmup_steps=1, num_chains=1, progress=False)
    intervened = pm.macro_do(gammas, {PAIR: pm.Natural(3.0, sampler=few)})
    with pytest.warns(
        pm.NotConverged, match="'m'.*not mixed: R-hat.*effective.*num_samples=16"
    ):
        site(intervened)


def test_chains_that_do_not_move_are_warned_of(monkeypatch):
    own = MCMC.get_samples

    def stuck(self, *args, **kwargs):
        samples = own(self, *args, **kwargs)
        return {n: v[:1].expand(v.shape).clone() for n, v in samples.items()}

    monkeypatch.setattr(MCMC, "get_samples", stuck)
    intervened = pm.macro_do(gammas, {PAIR: pm.Natural(3.0, sampler=TINY)})
    with pytest.warns(pm.NotConverged, match="'m'.*have not mixed: R-hat inf"):
        site(intervened)


def test_the_density_and_the_coordinates_are_refused():
    law = law_of(gammas, PAIR, 3.0, TINY)
    with pytest.raises(pm.UnsupportedLaw, match="without a normalized density.*Predic"):
        law.log_prob(t(1.0, 2.0))
    intervened = pm.macro_do(gammas, {PAIR: pm.Natural(3.0, sampler=TINY)})
    with pytest.raises(pm.UnsupportedLaw, match="without a normalized density"):
        poutine.trace(intervened).get_trace().log_prob_sum()
    with pytest.raises(pm.UnsupportedLaw, match="'m'.*without a density"):
        biject_to(law.support)
    assert law.support.check(t(1.0, 2.0))
    assert not law.support.check(t(1.0, 2.1))
    assert not law.support.check(t(-1.0, 4.0))


@pytest.mark.parametrize(
    "wrong", [{"num_samples": 3}, {"warmup_steps": 0}, {"num_chains": 1.5}], ids=str
)
def test_malformed_chains(wrong):
    with pytest.raises(pm.PyroMacroError, match=f"Chains: {next(iter(wrong))}="):
        pm.Chains(**wrong)


def test_an_expanded_law_draws_anew_and_slots_of_one_draw_stay_together():
    def model():
        with pyro.plate("k", 2, dim=-2), pyro.plate("o", 2, dim=-1):
            pyro.sample("x", dist.Gamma(t(2.0, 3.0), t([1.0], [0.5]) * t(1.0, 2.0)))

    macro = pm.MacroVariable("m", "x", over="o")
    law = law_of(model, macro, t([2.0], [5.0]), TINY)
    assert law.batch_shape == (2, 1)
    many = law.expand((30, 2, 1))
    pyro.set_rng_seed(3)
    drawn = many.sample((4,))
    assert drawn.shape == (4, 30, 2, 1, 2)
    torch.testing.assert_close(drawn.sum(-1), t([2.0], [5.0]).expand(4, 30, 2, 1))
    together = drawn.reshape(120, 1, -1) == law.draws.reshape(1, 12, -1)
    assert together.all(-1).any(-1).all()
    assert len(drawn.reshape(120, -1).unique(dim=0)) > 5
    pyro.set_rng_seed(3)
    torch.testing.assert_close(many.sample((4,)), drawn, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_have_the_dtype_of_the_sites(dtype):
    torch.set_default_dtype(dtype)
    law = law_of(gammas, PAIR, 3.0, TINY)
    assert law.sample().dtype == dtype
    torch.testing.assert_close(
        law.draws.sum(-1), torch.full((12,), 3.0), rtol=1e-6, atol=1e-6
    )


def test_a_program_that_draws_numbers_behind_the_back_of_pyro_is_refused():
    def model():
        pyro.sample("x0", dist.Gamma(2.0, 1 + torch.rand(())))
        pyro.sample("x1", dist.Gamma(3.0, 2.0))

    with pytest.raises(
        pm.UnsupportedLaw, match="two runs of the program.*sample sites"
    ):
        law_of(model, PAIR, 3.0)


def test_what_cannot_be_sampled_is_refused_and_named():
    def counts():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x0", dist.Poisson(z.exp()))
        pyro.sample("x1", dist.Poisson(2.0))

    with pytest.raises(pm.UnsupportedLaw, match="'x0' is Poisson.*'z'.*given"):
        law_of(counts, PAIR, 3.0)

    def simplex():
        pyro.sample("x0", dist.Dirichlet(torch.ones(3)))
        pyro.sample("x1", dist.Gamma(2.0, 1.0))

    with pytest.raises(pm.UnsupportedLaw, match="'x0' has support.*constraints"):
        law_of(simplex, PAIR, 3.0)

    def market():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("o", 2):
            pyro.sample("y", dist.Gamma(2.0, z.exp()))
        pyro.sample("x0", dist.Gamma(2.0, z.exp()))
        pyro.sample("x1", dist.Gamma(2.0, 1.0))

    other = pm.MacroVariable("other", "y", over="o")
    with pytest.raises(pm.UnsupportedLaw, match="given 'other'.*given=.'y'."):
        law_of(market, PAIR, 3.0, given=other)


# Against rejection, and integrals


def rejected(nature, total, value, window):
    near = nature[(total(nature) - value).abs() < window]
    assert len(near) > 500
    return near


def thinned(law, count=270):
    """Draws that are about independent."""
    draws = law.draws.reshape(len(law.draws), -1)
    return draws[:: max(1, len(draws) // count)]


@pytest.mark.slow
def test_gammas_of_other_rates_have_the_law_of_the_integral():
    law = law_of(gammas, PAIR, 3.0, LONG)
    one, two = stats.gamma(2), stats.gamma(3, scale=0.5)
    _, _, x, cdf = moments(lambda x: one.pdf(x) * two.pdf(3 - x), 0, 3)
    found = stats.kstest(thinned(law)[:, 0], lambda at: np.interp(at, x, cdf))
    assert found.pvalue > 1e-3
    assert law.r_hat < 1.02 and law.effective > 200


@pytest.mark.slow
def test_three_gammas_with_weights_have_the_law_of_rejection():
    def model():
        with pyro.plate("o", 3):
            pyro.sample("x", dist.Gamma(t(2.0, 0.8, 3.0), t(1.0, 2.0, 0.7)))

    w = t(1.0, 2.0, 0.5)
    macro = pm.MacroVariable("m", "x", over="o", aggregation=pm.Linear(w))
    law = law_of(model, macro, 4.0, LONG)
    nature = torch.distributions.Gamma(t(2.0, 0.8, 3.0), t(1.0, 2.0, 0.7))
    near = rejected(nature.sample((400_000,)), lambda x: x @ w, 4.0, 0.01)
    assert_same_law(thinned(law), near)


@pytest.mark.slow
def test_a_box_of_uniforms_and_betas_has_the_law_of_rejection():
    def model():
        pyro.sample("x0", dist.Uniform(-1.0, 2.0))
        pyro.sample("x1", dist.Beta(2.0, 0.7))
        pyro.sample("x2", dist.Beta(3.0, 1.5))

    macro = pm.MacroVariable("m", ["x0", "x1", "x2"])
    law = law_of(model, macro, 2.2, LONG)
    n = 400_000
    nature = torch.stack(
        [
            torch.rand(n) * 3 - 1,
            torch.distributions.Beta(2.0, 0.7).sample((n,)),
            torch.distributions.Beta(3.0, 1.5).sample((n,)),
        ],
        -1,
    )
    near = rejected(nature, lambda x: x.sum(-1), 2.2, 0.003)
    assert_same_law(thinned(law), near)


@pytest.mark.slow
def test_a_scale_with_a_prior_and_a_finite_cause_are_integrated_out():
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        c = pyro.sample("c", dist.Bernoulli(0.3))
        pyro.sample("x0", dist.Normal(3 * c, scale))
        pyro.sample("x1", dist.Normal(0.0, 1.0))

    law = law_of(model, PAIR, 2.5, LONG)
    n = 1_000_000
    scale = torch.distributions.LogNormal(0.0, 0.5).sample((n,))
    c = torch.distributions.Bernoulli(0.3).sample((n,))
    nature = torch.stack([torch.normal(3 * c, scale), torch.randn(n)], -1)
    near = rejected(nature, lambda x: x.sum(-1), 2.5, 0.005)
    assert_same_law(thinned(law), near)


@pytest.mark.slow
def test_a_vector_of_sums_has_the_law_of_rejection():
    def model():
        with pyro.plate("o", 4):
            pyro.sample("x", dist.Laplace(t(0.0, 1.0, 2.0, 0.0), t(1.0, 0.5, 2.0, 1.0)))

    rows = t([1.0, 1.0, 1.0, 1.0], [0.5, -1.0, 0.0, 2.0])
    macro = pm.MacroVariable("m", "x", over="o", aggregation=pm.Linear(rows))
    value = t(4.0, 1.0)
    law = law_of(model, macro, value, LONG)
    torch.testing.assert_close(law.draws @ rows.mT, value.expand(1600, 2))
    fn = torch.distributions.Laplace(t(0.0, 1.0, 2.0, 0.0), t(1.0, 0.5, 2.0, 1.0))
    nature = fn.sample((2_000_000,))
    near = nature[((nature @ rows.mT - value).abs() < 0.12).all(-1)]
    assert len(near) > 500
    assert_same_law(thinned(law), near)


@pytest.mark.slow
def test_a_nonlinear_map_has_the_law_of_rejection():
    """With the co-area factor: without it the law would be another one."""

    def total(x):
        return x[..., 0].exp() + x[..., 1] ** 2

    def model():
        pyro.sample("x0", dist.Normal(0.0, 1.0))
        pyro.sample("x1", dist.Normal(0.5, 1.0))

    macro = pm.MacroVariable("m", PAIR.micro, aggregation=pm.Custom(total))
    law = law_of(model, macro, 2.0, LONG)
    torch.testing.assert_close(
        total(law.draws), torch.full((len(law.draws),), 2.0), rtol=1e-6, atol=1e-6
    )
    nature = torch.randn(1_000_000, 2) + t(0.0, 0.5)
    near = rejected(nature, total, 2.0, 0.002)
    assert_same_law(thinned(law), near)
    # x1 alone, with the derivative by hand: x0 = log(2 - x1^2), |d pi/d x0| = 2 - x1^2

    def density(x):
        rest = 2 - x**2
        return stats.norm.pdf(np.log(rest)) * stats.norm(0.5).pdf(x) / rest

    mean, deviation, x, cdf = moments(density, -(2**0.5), 2**0.5)
    found = stats.kstest(thinned(law)[:, 1], lambda at: np.interp(at, x, cdf))
    assert found.pvalue > 1e-3


@pytest.mark.slow
def test_a_product_of_positive_sites_has_the_law_of_the_integral():
    def model():
        pyro.sample("x0", dist.Gamma(2.0, 1.0))
        pyro.sample("x1", dist.LogNormal(0.0, 0.7))

    macro = pm.MacroVariable(
        "m", PAIR.micro, aggregation=pm.Custom(lambda x: x.prod(-1))
    )
    law = law_of(model, macro, 1.5, LONG)

    def density(x):
        return stats.gamma(2).pdf(x) * stats.lognorm(0.7).pdf(1.5 / x) / x

    _, _, x, cdf = moments(density, 0, 25)
    found = stats.kstest(thinned(law)[:, 0], lambda at: np.interp(at, x, cdf))
    assert found.pvalue > 1e-3


@pytest.mark.slow
def test_slots_that_share_a_latent_scale_have_one_law():
    """Two slots, one scale: their fibres are coupled through it."""

    def model():
        scale = pyro.sample("scale", dist.Gamma(2.0, 2.0))
        with pyro.plate("k", 2, dim=-2), pyro.plate("o", 2, dim=-1):
            pyro.sample("x", dist.Normal(0.0, scale))

    macro = pm.MacroVariable("m", "x", over="o")
    law = law_of(model, macro, t([0.5], [3.0]), LONG)
    half = (law.draws[..., 0] - law.draws[..., 1]).reshape(-1, 2) / 2
    # x0 - x1 is independent of the total given the scale: N(0, scale^2 / 2) halves
    s = np.linspace(1e-3, 25, 50_000)
    logs = stats.gamma(2, scale=0.5).logpdf(s) + sum(
        stats.norm(0, s * 2**0.5).logpdf(v) for v in (0.5, 3.0)
    )
    p = np.exp(logs - logs.max())
    p /= p.sum()
    variance = (p * s**2 / 2).sum()
    fourth = 3 * (p * (s**2 / 2) ** 2).sum()
    for i in range(2):
        error = ((fourth - variance**2) / 250) ** 0.5
        assert abs(half[:, i].square().mean() - variance) < 5 * error
    coupled = (half[:, 0].square() * half[:, 1].square()).mean()
    assert coupled > 1.2 * variance**2  # apart, they would be independent


@pytest.mark.slow
def test_an_observed_site_upstream_counts():
    def model():
        scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
        y = pyro.sample("y", dist.Gamma(3.0, scale), obs=t(0.2)[0])
        pyro.sample("x0", dist.Normal(y, scale))
        pyro.sample("x1", dist.Normal(0.0, 1.0))

    law = law_of(model, PAIR, 3.0, LONG)

    def density(x, s):
        return (
            stats.lognorm(1).pdf(s)
            * stats.gamma(3, scale=1 / s).pdf(0.2)
            * stats.norm(0.2, s).pdf(x)
            * stats.norm.pdf(3 - x)
        )

    s = np.linspace(1e-3, 60, 8000)
    x = np.linspace(-3, 6, 400)
    p = np.array([integrate.trapezoid(density(v, s), s) for v in x])
    cdf = p.cumsum() / p.sum()
    found = stats.kstest(thinned(law)[:, 0], lambda at: np.interp(at, x, cdf))
    assert found.pvalue > 1e-3


@pytest.mark.slow
def test_a_grid_of_values_is_sampled_in_one_run():
    grid = t(1.0, 3.0, 6.0)
    with pyro.plate("grid", 3):
        law = law_of(gammas, PAIR, grid, LONG)
    assert law.batch_shape == (3,)
    one, two = stats.gamma(2), stats.gamma(3, scale=0.5)
    for i, value in enumerate(grid.tolist()):
        _, _, x, cdf = moments(lambda x, v=value: one.pdf(x) * two.pdf(v - x), 0, value)
        draws = law.draws[::5, i]
        torch.testing.assert_close(draws.sum(-1), torch.full((len(draws),), value))
        found = stats.kstest(draws[:, 0], lambda at, x=x, c=cdf: np.interp(at, x, c))
        assert found.pvalue > 1e-3
