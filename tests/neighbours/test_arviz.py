# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``arviz.from_pyro`` on runs under ``macro_do``, its numbers against closed forms.

Each day total sales were set to a value and realized in some way, and revenue was seen;
prices are to be learned.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive
from pyro.poutine import condition

import pyro_macro as pm

az = pytest.importorskip("arviz", reason="needs ArviZ: pip install '.[neighbours]'")
if not hasattr(az, "from_pyro"):
    pytest.skip("needs ArviZ before 1.0, which reads Pyro", allow_module_level=True)

DAYS, NOISE, SAMPLES = 5, 2.0, 40
MU = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
SIGMA = torch.tensor([2.0, 1.0, 3.0], dtype=torch.float64)
SHARES = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
SALES = pm.MacroVariable("sales", micro="x", over="products")
TOTALS = torch.linspace(-2.0, 9.0, DAYS, dtype=torch.float64).unsqueeze(-1)
REVENUE = torch.tensor([[-3.0], [4.0], [6.5], [11.0], [17.0]], dtype=torch.float64)


def shop(revenue=None):
    products = pyro.plate("products", 3, dim=-1)
    with products:
        price = pyro.sample("price", dist.Normal(2.0, 1.5))
    with pyro.plate("days", DAYS, dim=-2):
        with products:
            x = pyro.sample("x", dist.Normal(MU, SIGMA))
        mean = (price * x).sum(-1, keepdim=True)
        pyro.sample("revenue", dist.Normal(mean, NOISE), obs=revenue)


def converted(realization, given=None, samples=SAMPLES):
    """What ArviZ makes of a chain, and of draws of the posterior and of the prior."""
    model = pm.macro_do(shop, {SALES: realization})
    model = condition(model, data=given) if given else model
    kernel = NUTS(model, max_tree_depth=4)
    mcmc = MCMC(kernel, samples, warmup_steps=samples // 2, disable_progbar=True)
    mcmc.run(REVENUE)
    drawn = mcmc.get_samples()
    data = az.from_pyro(
        mcmc,
        posterior_predictive=Predictive(model, drawn)(),
        prior=Predictive(model, num_samples=20, parallel=True)(),
        log_likelihood=True,
        dims={"price": ["product"]},
        coords={"product": ["tea", "milk", "eggs"]},
    )
    return data, drawn


def log_likelihood(data, x):
    """The log density of revenue at the draws of prices, shape (1, draws, days, 1)."""
    mean = (data.posterior["price"].values[:, :, None] * x).sum(-1, keepdims=True)
    error = (REVENUE.numpy() - mean) / NOISE
    return -0.5 * error**2 - np.log(NOISE * np.sqrt(2.0 * np.pi))


@pytest.fixture(scope="module")
def natural():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    yield converted(pm.Natural(TOTALS))
    torch.set_default_dtype(dtype)


def test_the_groups(natural):
    data, _ = natural
    latent = {"price", "sales__micro"}
    found = {group: set(data[group].data_vars) for group in data.groups()}
    assert found == {
        "posterior": latent,
        "posterior_predictive": {"revenue", "sales", "x"},
        # Deterministic sites count as observed, as those of pyro.deterministic do
        "log_likelihood": {"revenue", "sales", "x"},
        "observed_data": {"revenue", "sales", "x"},
        "prior": latent,
        "prior_predictive": {"revenue", "sales", "x"},
        "sample_stats": {"diverging"},
    }
    assert list(data.posterior["price"].coords["product"]) == ["tea", "milk", "eggs"]


def test_posterior_draws_are_on_the_fibre(natural):
    data, samples = natural
    for name in ("price", "sales__micro"):
        found = data.posterior[name].values
        np.testing.assert_array_equal(found[0], samples[name].numpy())
    total = data.posterior["sales__micro"].values.sum(-1)
    expected = np.broadcast_to(TOTALS.numpy(), total.shape)
    np.testing.assert_allclose(total, expected, atol=1e-9)


@pytest.mark.filterwarnings("ignore:For one or more samples:UserWarning")
def test_log_likelihoods_are_those_of_the_draws(natural):
    data, _ = natural
    expected = log_likelihood(data, data.posterior["sales__micro"].values.squeeze(-2))
    np.testing.assert_allclose(data.log_likelihood["revenue"].values, expected)
    for name in ("sales", "x"):
        assert (data.log_likelihood[name].values == 0.0).all()
    found = az.waic(data, var_name="revenue")
    fit = np.log(np.exp(expected).mean((0, 1))).sum()
    assert abs(found.elpd_waic - (fit - expected.var((0, 1)).sum())) < 1e-8


def test_predictions_follow_the_draws(natural):
    data, _ = natural
    predicted = data.posterior_predictive
    state = data.posterior["sales__micro"].values
    np.testing.assert_allclose(predicted["x"].values, state.squeeze(-2))
    sales = np.broadcast_to(TOTALS.numpy(), (1, SAMPLES, DAYS, 1))
    np.testing.assert_allclose(predicted["sales"].values, sales)
    mean = data.posterior["price"].values[:, :, None] * state.squeeze(-2)
    z = (predicted["revenue"].values - mean.sum(-1, keepdims=True)) / NOISE
    assert abs(z.mean()) < 5 / np.sqrt(z.size)
    assert abs((z**2).mean() - 1.0) < 5 * np.sqrt(2.0 / z.size)


def test_prior_draws_are_of_the_intervened_model(natural):
    prior = natural[0].prior["sales__micro"].values  # (1, 20, days, products)
    expected = np.broadcast_to(TOTALS.squeeze(-1).numpy(), (1, 20, DAYS))
    np.testing.assert_allclose(prior.sum(-1), expected, atol=1e-9)


def test_the_summary_is_that_of_the_exact_posterior():
    """The micro state was seen too: Bayesian linear regression with known noise."""
    pyro.set_rng_seed(1)
    x = natural_states()
    data, _ = converted(pm.Natural(TOTALS), {"sales__micro": x}, samples=100)
    rows = x.reshape(DAYS, 3)
    precision = torch.eye(3) / 1.5**2 + rows.mT @ rows / NOISE**2
    shift = torch.full((3,), 2.0) / 1.5**2 + rows.mT @ REVENUE.squeeze(-1) / NOISE**2
    mean = torch.linalg.solve(precision, shift).numpy()
    table = az.summary(data, var_names=["price"], round_to="none")
    assert list(table.index) == ["price[tea]", "price[milk]", "price[eggs]"]
    assert (abs(table["mean"] - mean) < 5 * table["mcse_mean"]).all()
    scale = torch.linalg.inv(precision).diagonal().sqrt().numpy()
    assert (abs(table["sd"] - scale) < 5 * table["mcse_sd"]).all()


def natural_states():
    model = pm.macro_do(shop, {SALES: pm.Natural(TOTALS)})
    return pyro.poutine.trace(model).get_trace().nodes["sales__micro"]["value"]


def test_a_realization_without_a_latent_site():
    data, _ = converted(pm.Allocate(TOTALS, shares=SHARES), samples=10)
    assert set(data.posterior.data_vars) == {"price"}
    x = (TOTALS * SHARES).numpy()
    np.testing.assert_allclose(data.observed_data["x"].values, x)
    np.testing.assert_allclose(data.posterior_predictive["x"].values[0, 0], x)
    found = data.log_likelihood["revenue"].values
    np.testing.assert_allclose(found, log_likelihood(data, x))


@pytest.mark.parametrize("parallel", [True, False])
def test_predictions_without_a_chain(parallel):
    model = pm.macro_do(shop, {SALES: pm.Natural(TOTALS)})
    drawn = Predictive(model, num_samples=30, parallel=parallel)()
    data = az.from_pyro(posterior_predictive=drawn, prior=drawn)
    assert data.groups() == ["posterior_predictive", "prior"]
    x = data.posterior_predictive["x"].values
    assert x.shape == (1, 30, DAYS, 3)
    sales = np.broadcast_to(TOTALS.squeeze(-1).numpy(), (1, 30, DAYS))
    np.testing.assert_allclose(x.sum(-1), sales, atol=1e-9)
    np.testing.assert_array_equal(data.prior["x"].values, x)
