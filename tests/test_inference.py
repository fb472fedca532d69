# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Inference under macro interventions, against conjugate closed forms.

Two problems. *Prices*: each day total sales were set to a value and realized
naturally, sales and revenue were seen; the posterior of the prices is Gaussian.
*Micro states*: prices are known, only revenue was seen; the posterior of the micro
state, a latent with K - 1 free coordinates, is Gaussian on the fibre.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    JitTrace_ELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.autoguide.initialization import init_to_mean
from pyro.poutine import block, condition

import pyro_macro as pm

DAYS, NOISE = 12, 2.0
MU = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
SIGMA = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
ALPHA = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
SALES = pm.MacroVariable("sales", micro="x", over="products")
TOTALS = torch.linspace(-2.0, 9.0, DAYS, dtype=torch.float64)
INTERVENTION = {SALES: pm.Natural(TOTALS.unsqueeze(-1))}


def shop(revenue=None):
    products = pyro.plate("products", 3, dim=-1)
    with products:
        alpha = pyro.sample("alpha", dist.Normal(2.0, 1.5))
    with pyro.plate("days", DAYS, dim=-2):
        with products:
            x = pyro.sample("x", dist.Normal(MU, SIGMA))
        mean = (alpha * x).sum(-1, keepdim=True)
        pyro.sample("revenue", dist.Normal(mean, NOISE), obs=revenue)


def data():
    """Sales and revenue of days on which total sales were set."""
    pyro.set_rng_seed(1)
    truth = condition(pm.macro_do(shop, INTERVENTION), {"alpha": ALPHA})
    nodes = pyro.poutine.trace(truth).get_trace().nodes
    return nodes["sales__micro"]["value"], nodes["revenue"]["value"]


def posterior_of_prices(x, revenue):
    """Bayesian linear regression with known noise: mean and covariance."""
    x = x.reshape(DAYS, 3)
    precision = torch.eye(3) / 1.5**2 + x.mT @ x / NOISE**2
    shift = torch.full((3,), 2.0) / 1.5**2 + x.mT @ revenue.reshape(-1) / NOISE**2
    return torch.linalg.solve(precision, shift), torch.linalg.inv(precision)


def posterior_of_states(revenue):
    """P(x | total, revenue) a day: condition the Gaussian on two linear equations."""
    covariance = torch.diag(SIGMA**2)
    rows = torch.stack([torch.ones(3), ALPHA])
    crossed = covariance @ rows.mT
    seen = rows @ crossed + torch.diag(torch.tensor([0.0, NOISE**2]))
    gain = torch.linalg.solve(seen, crossed.mT).mT
    values = torch.stack([TOTALS, revenue.reshape(-1)], -1)
    mean = MU + (values - rows @ MU) @ gain.mT
    return mean, covariance - gain @ crossed.mT


def learn(model, guide, steps, elbo=None, lr=0.05):
    optimizer = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.02 ** (1 / steps)})
    elbo = elbo or Trace_ELBO(num_particles=4, vectorize_particles=True)
    svi = SVI(model, guide, optimizer, elbo)
    for _ in range(steps):
        svi.step()


def nuts(model, samples=300, warmup=150):
    mcmc = MCMC(
        NUTS(model, jit_compile=False),
        num_samples=samples,
        warmup_steps=warmup,
        disable_progbar=True,
    )
    mcmc.run()
    return mcmc.get_samples(), mcmc.diagnostics()


def compare(samples, diagnostics, mean, variance):
    """Means within 5 Monte Carlo errors, variances within a third.

    The errors come from the effective sample sizes that the chain reports.
    """
    size = diagnostics["n_eff"].reshape(mean.shape).clamp(max=len(samples))
    error = (variance / size).sqrt()
    assert ((samples.mean(0).reshape(mean.shape) - mean).abs() < 5 * error).all()
    ratio = samples.var(0).reshape(mean.shape) / variance
    assert ((ratio - 1).abs() < 5 * (2 / size).sqrt()).all()


def test_nuts_learns_prices():
    x, revenue = data()
    model = condition(pm.macro_do(shop, INTERVENTION), {"sales__micro": x})
    seen = condition(model, {"revenue": revenue})
    samples, diagnostics = nuts(seen)
    mean, covariance = posterior_of_prices(x, revenue)
    compare(samples["alpha"], diagnostics["alpha"], mean, covariance.diagonal())


def test_nuts_infers_the_micro_state_from_revenue():
    _, revenue = data()
    known = condition(pm.macro_do(shop, INTERVENTION), {"alpha": ALPHA})
    samples, diagnostics = nuts(condition(known, {"revenue": revenue}))
    states = samples["sales__micro"]
    assert states.shape[1:] == (DAYS, 1, 3)
    total = states.sum(-1) - TOTALS.unsqueeze(-1)
    assert total.abs().max() < 1e-10
    mean, covariance = posterior_of_states(revenue)
    variance = covariance.diagonal().expand(DAYS, 3)
    compare(states.reshape(-1, DAYS, 3), diagnostics["sales__micro"], mean, variance)


def test_svi_learns_prices_with_a_full_covariance():
    x, revenue = data()
    model = condition(
        pm.macro_do(shop, INTERVENTION), {"sales__micro": x, "revenue": revenue}
    )
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    learn(model, guide, 1000)
    mean, covariance = posterior_of_prices(x, revenue)
    found = guide.get_posterior()
    scale = covariance.diagonal().sqrt()
    assert ((found.mean - mean).abs() < 0.3 * scale).all()
    error = (found.covariance_matrix - covariance) / (scale[:, None] * scale)
    assert error.abs().max() < 0.2


def test_svi_infers_the_micro_state_in_k_minus_1_coordinates():
    """The guide lives on free coordinates: 2 a day, the third solved for."""
    _, revenue = data()
    model = condition(
        pm.macro_do(shop, INTERVENTION), {"alpha": ALPHA, "revenue": revenue}
    )
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    learn(model, guide, 1000)
    assert guide.latent_dim == 2 * DAYS
    mean, covariance = posterior_of_states(revenue)
    found = guide.median()["sales__micro"].reshape(DAYS, 3)
    scale = covariance.diagonal().sqrt()
    assert ((found - mean).abs() < 0.3 * scale).all()
    states = guide()["sales__micro"]
    assert (states.sum(-1).reshape(-1) - TOTALS).abs().max() < 1e-10


def test_svi_with_a_diagonal_guide_finds_the_mean():
    x, revenue = data()
    model = condition(
        pm.macro_do(shop, INTERVENTION), {"sales__micro": x, "revenue": revenue}
    )
    guide = AutoNormal(model, init_scale=0.1)
    learn(model, guide, 1000)
    mean, covariance = posterior_of_prices(x, revenue)
    found = guide.median()["alpha"].reshape(3)
    # A diagonal Gaussian has the right mean, and the conditional variances
    spread = covariance.diagonal().sqrt()
    assert ((found - mean).abs() < 0.3 * spread).all()
    scale = pyro.param("AutoNormal.scales.alpha").detach().reshape(3)
    expected = torch.linalg.inv(covariance).diagonal().rsqrt()
    assert ((scale / expected - 1).abs() < 0.2).all()


def test_svi_with_enumeration_learns_prices():
    """A site of two kinds of days is summed out exactly: a mixture of regressions."""
    x, revenue = data()
    bonus = torch.tensor([0.0, 4.0])

    @config_enumerate
    def model():
        products = pyro.plate("products", 3, dim=-1)
        with products:
            alpha = pyro.sample("alpha", dist.Normal(2.0, 1.5))
        kind = pyro.sample("kind", dist.Bernoulli(0.5))
        with pyro.plate("days", DAYS, dim=-2):
            with products:
                sold = pyro.sample("x", dist.Normal(MU, SIGMA))
            mean = (alpha * sold).sum(-1, keepdim=True) + bonus[kind.long()]
            pyro.sample("revenue", dist.Normal(mean, NOISE), obs=revenue)

    seen = condition(pm.macro_do(model, INTERVENTION), {"sales__micro": x})
    guide = AutoMultivariateNormal(block(seen, hide=["kind"]), init_scale=0.3)
    learn(seen, guide, 1000, TraceEnum_ELBO(num_particles=4, vectorize_particles=True))
    parts = [posterior_of_prices(x, revenue - b) for b in bonus]
    evidence = torch.stack(
        [
            dist.MultivariateNormal(
                2.0 * x.reshape(DAYS, 3).sum(-1) + b,
                1.5**2 * x.reshape(DAYS, 3) @ x.reshape(DAYS, 3).mT
                + NOISE**2 * torch.eye(DAYS),
            ).log_prob(revenue.reshape(-1))
            for b in bonus
        ]
    )
    weights = evidence.softmax(0)
    mean = sum(w * m for w, (m, _) in zip(weights, parts, strict=True))
    spread = parts[0][1].diagonal().sqrt()
    assert ((guide.get_posterior().mean - mean).abs() < 0.3 * spread).all()


def test_jit_is_right_or_refused():
    """Compiled where the micro state has no random ancestors; said where it has."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("products", 3):
            x = pyro.sample("x", dist.Normal(z + MU, SIGMA))
        pyro.sample("y", dist.Normal((ALPHA * x).sum(-1), 1.0), obs=torch.tensor(20.0))

    def losses(model, elbo):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        guide = AutoDelta(model, init_loc_fn=init_to_mean)  # no random numbers
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        return torch.tensor([svi.step() for _ in range(3)])

    held = pm.macro_do(model, {SALES: pm.Natural(9.0, given="z")})
    compiled = JitTrace_ELBO(ignore_jit_warnings=True)
    torch.testing.assert_close(losses(held, compiled), losses(held, Trace_ELBO()))
    free = pm.macro_do(model, {SALES: pm.Natural(9.0)})
    with pytest.raises(pm.UnsupportedLaw, match=r"jit cannot trace.*given=\['z'\]"):
        losses(free, JitTrace_ELBO(ignore_jit_warnings=True))
