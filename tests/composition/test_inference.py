# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Vectorized particles, ``Predictive``, ``Importance``, autoguides and NUTS.

In the shop with total 33 and an observed y all is Gaussian, so that posterior and
evidence have a closed form. Under the exact posterior as guide, each particle has the
log evidence as its ELBO, to the last digit.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Importance, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import biject_to

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    given_total,
    market,
    market_by_hand_given_z,
    replayed,
    shop,
    shop_by_hand,
)

Y = torch.tensor(70.0, dtype=torch.float64)
GIVEN_Z = {SALES: pm.Natural(33.0, given=["z"])}


def posterior():
    """Mean and covariance of (x1, w) given y, and the log evidence.

    y = 99 - 2 x1 + w + e with x1 ~ N(12.4, 0.8), w ~ N(1, 9), e ~ N(0, 0.25).
    """
    prior = torch.tensor([12.4, 1.0, 0.0]), torch.diag(torch.tensor([0.8, 9.0, 0.25]))
    mean, cov = given_total(*prior, [[-2.0, 1.0, 1.0]], [Y - 99])
    evidence = dist.Normal(99 - 24.8 + 1, 12.45**0.5).log_prob(Y)
    return mean[:2], cov[:2, :2], evidence


def exact_guide(y):
    mean, cov, _ = posterior()
    latent = pyro.sample(
        "latent", dist.MultivariateNormal(mean, cov), infer={"is_auxiliary": True}
    )
    x1, w = latent.unbind(-1)
    micro = torch.stack([x1, 33 - x1], -1)
    pyro.sample("sales__micro", dist.Delta(micro, event_dim=1))
    pyro.sample("w", dist.Delta(w))


# Trace_ELBO


@pytest.mark.parametrize("vectorized", [True, False])
def test_particles_each_have_the_log_evidence_under_the_exact_posterior(do, vectorized):
    *_, evidence = posterior()
    model = do(shop, NATURAL)
    elbo = Trace_ELBO(
        num_particles=7, vectorize_particles=vectorized, max_plate_nesting=0
    )
    # Means of 7 equal numbers: a single particle that was off would show
    torch.testing.assert_close(
        torch.tensor(-elbo.loss(model, exact_guide, Y)), evidence
    )


def test_vectorized_particles_find_their_plate_themselves(do):
    *_, evidence = posterior()
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True)
    found = torch.tensor(-elbo.loss(do(shop, NATURAL), exact_guide, Y))
    torch.testing.assert_close(found, evidence)


def vectorized(model, n):
    def run(*args):
        with pyro.plate("particles", n, dim=-2):
            return model(*args)

    return run


def test_vectorized_particles_with_a_grid_in_a_plate_of_the_model(do):
    grid = torch.tensor([30.0, 33.0, 40.0])

    def model():
        with pyro.plate("grid", 3, dim=-1):
            do(shop, {SALES: pm.Natural(grid)})()

    trace = poutine.trace(vectorized(model, 5)).get_trace()
    nodes = trace.nodes
    total = nodes["x1"]["value"] + nodes["x2"]["value"]
    torch.testing.assert_close(total, grid.expand(5, 3))
    assert len(nodes["x1"]["value"].unique()) == 15

    def by_hand():
        with pyro.plate("grid", 3, dim=-1):
            shop_by_hand(grid)

    expected = poutine.trace(replayed(vectorized(by_hand, 5), trace)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), expected.log_prob_sum())


def test_vectorized_particles_each_hold_their_own_given_cause(do):
    # Equal losses at the same values of all particles
    n = 6
    z = 1 + torch.randn(n, 1)
    x1 = 12 + torch.randn(n, 1)

    def guide(y):
        pyro.sample("z", dist.Delta(z[:, 0]))
        micro = torch.stack([x1, 33 - x1], -1)[:, 0]
        pyro.sample("sales__micro", dist.Delta(micro, event_dim=1))

    def guide_by_hand(y):
        pyro.sample("z", dist.Delta(z[:, 0]))
        pyro.sample("x1", dist.Delta(x1[:, 0]))

    def by_hand(y):
        market_by_hand_given_z(y=y)

    elbo = Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=0)
    found = elbo.loss(do(market, GIVEN_Z), guide, Y)
    wanted = elbo.loss(by_hand, guide_by_hand, Y)
    assert found == pytest.approx(wanted, rel=1e-10)


def test_vectorized_particles_have_the_gradient_by_hand(do):
    def model(y):
        loc = pyro.param("loc", torch.tensor(10.0))
        x1 = pyro.sample("x1", dist.Normal(loc, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + w, 0.5), obs=y)

    # d/d loc log N(x1; loc + 0.8 (13 - loc), 0.8) = 0.2 (x1 - 12.4) / 0.8
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True, max_plate_nesting=0)
    pyro.set_rng_seed(4)
    value = elbo.differentiable_loss(do(model, NATURAL), exact_guide, Y)
    loc = pyro.get_param_store()["loc"].unconstrained()
    (found,) = torch.autograd.grad(value, loc)
    pyro.set_rng_seed(4)
    with pyro.plate("particles", 7, dim=-1):
        draw = poutine.trace(exact_guide).get_trace(Y).nodes["sales__micro"]["value"]
    wanted = -0.2 * (draw[..., 0].mean() - 12.4) / 0.8
    torch.testing.assert_close(found, wanted)


# Predictive


def predict(model, n, parallel, **kwargs):
    sites = kwargs.pop("return_sites", ())
    return Predictive(
        model, num_samples=n, parallel=parallel, return_sites=sites, **kwargs
    )


@pytest.fixture(params=[True, False], ids=["parallel", "sequential"])
def parallel(request):
    return request.param


def test_predictive_holds_the_total_in_each_sample(do, parallel):
    n = 40
    names = ["sales", "sales__micro", "x1", "x2", "w", "y"]
    out = predict(do(shop, NATURAL), n, parallel, return_sites=names)()
    assert set(out) == set(names)
    total = out["x1"] + out["x2"]
    torch.testing.assert_close(total.reshape(n), torch.full((n,), 33.0))
    sales = out["sales"].expand(n) if out["sales"].dim() else out["sales"]
    torch.testing.assert_close(sales, torch.full_like(sales, 33.0))
    assert len(out["x1"].unique()) == n, "each sample is a draw of its own"
    assert out["sales__micro"].reshape(-1, 2).shape == (n, 2)


def test_predictive_returns_the_values_that_propagate(do, parallel):
    # Not a fresh natural draw, as `Predictive` of `poutine.do` returns
    out = predict(do(shop, NATURAL), 20, parallel)()
    assert set(out) == {"sales", "sales__micro", "x1", "x2", "w", "y"}
    x1, w, y = (out[name].reshape(-1) for name in ("x1", "w", "y"))
    # y - w = 99 - 2 x1 + e with |e| < 5 sd: chance 1e-5 in 20 draws
    assert ((y - w) - (99 - 2 * x1)).abs().max() < 2.5


def test_predictive_draws_from_the_law_by_hand():
    # Mean and variance of x1: beyond 4 standard errors with a chance of 1.3e-4
    n = 4000
    out = predict(pm.macro_do(shop, NATURAL), n, True, return_sites=["x1", "y"])()
    assert abs(out["x1"].mean() - 12.4) < 4 * (0.8 / n) ** 0.5
    assert abs(out["x1"].var() - 0.8) < 4 * 0.8 * (2 / n) ** 0.5
    assert abs(out["y"].mean() - 75.2) < 4 * (12.45 / n) ** 0.5
    assert abs(out["y"].var() - 12.45) < 4 * 12.45 * (2 / n) ** 0.5


TOTAL = pm.MacroVariable("total", micro="x", over="products")


def products():
    with pyro.plate("products", 3, dim=-1):
        pyro.sample("x", dist.Normal(torch.tensor([1.0, 2.0, 3.0]), 1.0))


def test_predictive_never_adds_up_over_the_samples(do, add, parallel):
    n = 8
    out = predict(
        do(products, {TOTAL: pm.Natural(9.0)}), n, parallel, return_sites=["x"]
    )
    x = out()["x"]
    assert x.shape == (n, 3)
    torch.testing.assert_close(x.sum(-1), torch.full((n,), 9.0))
    out = predict(add(products, [TOTAL]), n, parallel, return_sites=["x", "total"])()
    torch.testing.assert_close(out["total"].reshape(n), out["x"].sum(-1))
    assert len(out["total"].unique()) == n


def test_predictive_of_aggregate_has_the_total_of_each_sample(add, parallel):
    n = 8
    out = predict(add(shop, [SALES]), n, parallel, return_sites=["x1", "x2", "sales"])()
    torch.testing.assert_close(
        out["sales"].reshape(n), (out["x1"] + out["x2"]).reshape(n)
    )


def test_predictive_holds_the_given_cause_of_each_posterior_sample(do, parallel):
    z = torch.tensor([-5.0, 0.0, 5.0, 10.0])
    model = poutine.block(do(market, GIVEN_Z), hide=["y"])
    names = ["sales__micro", "x1", "x2"]
    runs = []
    for _ in range(60):
        predictive = Predictive(
            model, posterior_samples={"z": z}, parallel=parallel, return_sites=names
        )
        out = predictive()
        runs.append(out["x1"].reshape(4))
        torch.testing.assert_close(
            (out["x1"] + out["x2"]).reshape(4), torch.full((4,), 33.0)
        )
    draws = torch.stack(runs)
    # x1 ~ N(10 + 2z + 0.8 (3 - z), 0.8): 4 means, beyond 4.5 s.e. with chance 3e-5
    wanted = 12.4 + 1.2 * z
    assert ((draws.mean(0) - wanted).abs() < 4.5 * (0.8 / 60) ** 0.5).all()


def test_predictive_with_samples_of_micro_sites_is_an_error_that_names_one(parallel):
    # As from a posterior of the unaltered program: they would undo the intervention
    samples = {"x1": torch.ones(4), "w": torch.zeros(4)}
    model = pm.macro_do(shop, NATURAL)
    predictive = Predictive(model, posterior_samples=samples, parallel=parallel)
    with pytest.raises(pm.PyroMacroError, match="'x1' is set by macro_do"):
        predictive()


def test_predictive_with_a_bare_grid_of_values_is_an_error_that_says_what_to_do(do):
    model = do(shop, {SALES: pm.Natural(torch.tensor([30.0, 33.0, 40.0]))})
    with pytest.raises(pm.PyroMacroError, match="plate of its own"):
        predict(model, 5, True)()


def test_predictive_with_a_grid_in_a_named_plate(do, parallel):
    grid = torch.tensor([30.0, 33.0, 40.0])

    def model():
        with pyro.plate("grid", 3, dim=-1):
            do(shop, {SALES: pm.Natural(grid)})()

    out = predict(model, 6, parallel, return_sites=["x1", "x2", "y"])()
    torch.testing.assert_close(out["x1"] + out["x2"], grid.expand(6, 3))
    assert out["y"].shape == (6, 3)


# Importance


def test_importance_weights_are_the_evidence_under_the_exact_posterior(do):
    *_, evidence = posterior()

    importance = Importance(do(shop, NATURAL), exact_guide, num_samples=5)
    importance.run(Y)
    weights = torch.stack([torch.as_tensor(w) for w in importance.log_weights])
    torch.testing.assert_close(weights, evidence.expand(5))
    for trace in importance.exec_traces:
        x = trace.nodes["x1"]["value"] + trace.nodes["x2"]["value"]
        torch.testing.assert_close(x, torch.tensor(33.0))


def test_importance_from_the_prior_estimates_the_evidence():
    *_, evidence = posterior()
    pyro.set_rng_seed(11)
    n = 400
    importance = Importance(pm.macro_do(shop, NATURAL), num_samples=n)
    importance.run(Y)
    weights = torch.stack([torch.as_tensor(w) for w in importance.log_weights]).exp()
    # Mean of n weights in [0, 0.8]: within 5 of its standard errors
    error = weights.std() / n**0.5
    assert abs(weights.mean() - evidence.exp()) < 5 * error


# Autoguides


def affine(site):
    """The free coordinate of the shop's fibre as a function of x1: start, slope."""
    points = torch.tensor([[0.0, 33.0], [1.0, 32.0]])
    start, stop = biject_to(site["fn"].support).inv(points)[:, 0]
    return start, stop - start


def free_posterior(guide):
    """The exact posterior in the unconstrained coordinates of a guide."""
    mean, cov, evidence = posterior()
    start, slope = affine(guide.prototype_trace.nodes["sales__micro"])
    scale = torch.stack([slope, torch.tensor(1.0)])
    shift = torch.stack([start, torch.tensor(0.0)])
    return shift + scale * mean, scale * cov * scale.unsqueeze(-1), evidence


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_autoguide_draws_on_the_fibre_and_matches_the_model(do, kind):
    model = do(shop, NATURAL)
    guide = kind(model)
    for _ in range(3):
        out = guide(Y)
        assert set(out) == {"sales__micro", "w"}
        torch.testing.assert_close(out["sales__micro"].sum(-1), torch.tensor(33.0))
    Trace_ELBO().loss(model, guide, Y)
    median = guide.median(Y)
    torch.testing.assert_close(median["sales__micro"].sum(-1), torch.tensor(33.0))


def five():
    with pyro.plate("products", 5, dim=-1):
        pyro.sample("x", dist.Normal(torch.arange(5.0), 1.0))
    pyro.sample("w", dist.Normal(0.0, 1.0))


def test_auto_normal_has_all_coordinates_but_one(do):
    guide = AutoNormal(do(five, {TOTAL: pm.Natural(9.0)}))
    guide()
    assert guide.locs.total__micro.shape == (4,)
    assert guide.scales.total__micro.shape == (4,)
    assert guide.locs.w.shape == ()


def test_auto_multivariate_normal_has_all_coordinates_but_one(do):
    guide = AutoMultivariateNormal(do(five, {TOTAL: pm.Natural(9.0)}))
    guide()
    assert guide.latent_dim == 5  # 4 of the micro state, 1 of w
    assert guide.loc.shape == (5,)
    assert guide.scale_tril.shape == (5, 5)


def test_auto_multivariate_normal_has_all_coordinates_but_m_of_m_totals(do):
    pair = pm.MacroVariable(
        "total",
        micro="x",
        over="products",
        aggregation=pm.Linear([[1.0] * 5, [0.0, 1.0, 2.0, 3.0, 4.0]]),
    )
    guide = AutoMultivariateNormal(
        do(five, {pair: pm.Natural(torch.tensor([9.0, 1.0]))})
    )
    out = guide()
    assert guide.latent_dim == 4
    x = out["total__micro"]
    torch.testing.assert_close(x.sum(), torch.tensor(9.0))
    torch.testing.assert_close((x * torch.arange(5.0)).sum(), torch.tensor(1.0))


def test_auto_multivariate_normal_can_be_the_exact_posterior(do):
    # At the exact posterior each particle has the log evidence as its ELBO: the guide's
    # Jacobian and the density on the fibre belong together
    model = do(shop, NATURAL)
    guide = AutoMultivariateNormal(model)
    guide(Y)
    mean, cov, evidence = free_posterior(guide)
    factor = torch.linalg.cholesky(cov)
    with torch.no_grad():
        guide.loc.copy_(mean)
        guide.scale = factor.diagonal()
        guide.scale_tril = factor / factor.diagonal().unsqueeze(-1)
    for vectorize in (False, True):
        elbo = Trace_ELBO(
            num_particles=5, vectorize_particles=vectorize, max_plate_nesting=0
        )
        found = torch.tensor(-elbo.loss(model, guide, Y))
        torch.testing.assert_close(found, evidence, rtol=1e-7, atol=1e-7)


def mean_field(guide):
    """Sets an AutoNormal to the best mean field; its distance from the posterior."""
    mean, cov, evidence = free_posterior(guide)
    variance = 1 / torch.linalg.inv(cov).diagonal()
    with torch.no_grad():
        guide.locs.sales__micro = mean[:1]
        guide.locs.w = mean[1]
        guide.scales.sales__micro = variance[:1].sqrt()
        guide.scales.w = variance[1].sqrt()
    distance = torch.distributions.kl_divergence(
        dist.MultivariateNormal(mean, torch.diag(variance)),
        dist.MultivariateNormal(mean, cov),
    )
    return evidence, distance


def test_auto_normal_at_the_best_mean_field_has_the_elbo_by_hand(do):
    model = do(shop, NATURAL)
    guide = AutoNormal(model)
    guide(Y)
    evidence, distance = mean_field(guide)
    n = 2000
    elbo = Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=0)
    found = torch.tensor(-elbo.loss(model, guide, Y))
    # The particles' log ratio has a variance below 2 KL + KL^2 + 1 < 9 here
    assert distance < 2
    assert abs(found - (evidence - distance)) < 4.5 * (9.0 / n) ** 0.5


def test_auto_normal_of_a_plate_that_stays_has_the_free_coordinates_of_each_slot(do):
    def model():
        with pyro.plate("regions", 3, dim=-1):
            pyro.sample("x1", dist.Normal(10.0, 2.0))
            pyro.sample("x2", dist.Normal(20.0, 1.0))

    values = torch.tensor([30.0, 33.0, 50.0])
    guide = AutoNormal(do(model, {SALES: pm.Natural(values)}))
    out = guide()
    assert guide.locs.sales__micro.shape == (3, 1)
    torch.testing.assert_close(out["sales__micro"].sum(-1), values)


@pytest.mark.parametrize("value", ["one", "several"])
def test_auto_normal_of_a_subsampled_plate_is_on_the_fibre_or_an_error(do, value):
    def model():
        with pyro.plate("regions", 6, subsample_size=2, dim=-1):
            pyro.sample("x1", dist.Normal(10.0, 2.0))
            pyro.sample("x2", dist.Normal(20.0, 1.0))

    def create_plates():
        return pyro.plate("regions", 6, subsample_size=2, dim=-1)

    values = torch.arange(6.0) if value == "several" else torch.tensor(33.0)
    intervened = pm.macro_do(model, {SALES: pm.Natural(values)})
    guide = AutoNormal(intervened, create_plates=create_plates)
    elbo = Trace_ELBO()
    for _ in range(5):
        try:
            elbo.loss(intervened, guide)
        except pm.OffFibre:
            # The guide keeps the fibres of the slots that it has first seen
            assert value == "several"
            return
    assert guide.locs.sales__micro.shape == (6, 1)
    assert value == "one", "five subsamples of two of six are never all the same"


def test_svi_with_auto_normal_finds_the_posterior_by_hand():
    def model(y):
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 2.0), obs=y)

    # y = 99 - 2 x1 + e with Var e = 4: the precision is 1 / 0.8 + 2^2 / 4
    precision = 2.25
    mean = (12.4 / 0.8 + 2 * (99 - Y) / 4) / precision
    model = pm.macro_do(model, NATURAL)
    guide = AutoNormal(model, init_scale=0.5)
    elbo = Trace_ELBO(num_particles=20, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}), elbo)
    for _ in range(200):
        svi.step(Y)
    start, slope = affine(guide.prototype_trace.nodes["sales__micro"])
    found = (guide.locs.sales__micro.detach() - start) / slope
    scale = (guide.scales.sales__micro.detach() / slope).abs()
    # The steps shrink to 0.002: what is left is far below 0.05 of a scale of 0.67
    assert abs(found - mean) < 0.05
    assert abs(scale * precision**0.5 - 1) < 0.05


# MCMC


def test_nuts_sees_the_free_coordinates_and_the_density_by_hand(do):
    initial, potential, transforms, _ = initialize_model(
        do(shop, NATURAL), model_args=(Y,)
    )
    assert initial["sales__micro"].shape == (1,)
    transform = transforms["sales__micro"].inv
    for free in (torch.tensor([-1.3]), torch.tensor([0.4])):
        free = free.requires_grad_()
        x = transform(free)
        torch.testing.assert_close(x.sum(), torch.tensor(33.0))
        data = {"x1": x[0], "w": torch.tensor(2.0), "y": Y}
        by_hand = poutine.trace(poutine.condition(shop_by_hand, data)).get_trace()
        # The coordinate of the density is x1
        (slope,) = torch.autograd.grad(x[0], free, create_graph=True)
        wanted = -by_hand.log_prob_sum() - slope.abs().log().sum()
        found = potential({"sales__micro": free, "w": torch.tensor(2.0)})
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(v, free)[0] for v in (found, wanted)]
        torch.testing.assert_close(*gradients)


def test_nuts_holds_the_given_cause_at_each_value():
    _, potential, transforms, _ = initialize_model(
        pm.macro_do(market, GIVEN_Z), model_args=(Y,)
    )
    free = torch.tensor([0.3], requires_grad=True)
    x = transforms["sales__micro"].inv(free)
    (slope,) = torch.autograd.grad(x[0], free)
    for z in (torch.tensor(-1.0), torch.tensor(3.0)):
        data = {"x1": x[0], "z": z}
        by_hand = poutine.condition(market_by_hand_given_z, data)
        wanted = -poutine.trace(by_hand).get_trace(y=Y).log_prob_sum()
        found = potential({"sales__micro": free, "z": z})
        torch.testing.assert_close(found, wanted - slope.abs().log().sum())


@pytest.mark.slow
def test_nuts_samples_the_posterior_on_the_fibre():
    mean, cov, _ = posterior()
    mcmc = MCMC(
        NUTS(pm.macro_do(shop, NATURAL)),
        num_samples=150,
        warmup_steps=100,
        disable_progbar=True,
    )
    mcmc.run(Y)
    samples = mcmc.get_samples()
    x = samples["sales__micro"]
    assert x.shape == (150, 2)
    torch.testing.assert_close(x.sum(-1), torch.full((150,), 33.0))
    draws = torch.stack([x[:, 0], samples["w"]], -1)
    size = pyro.ops.stats.effective_sample_size(draws.unsqueeze(0))
    error = (cov.diagonal() / size.clamp(max=150)).sqrt()
    # Two means, beyond 4.5 standard errors with a chance of 2e-5
    assert ((draws.mean(0) - mean).abs() < 4.5 * error).all()
    assert ((draws.std(0) / cov.diagonal().sqrt() - 1).abs() < 0.35).all()


def test_nuts_in_a_short_run_stays_on_the_fibre(do):
    mcmc = MCMC(
        NUTS(do(shop, NATURAL), max_tree_depth=2),
        num_samples=5,
        warmup_steps=5,
        disable_progbar=True,
    )
    mcmc.run(Y)
    x = mcmc.get_samples()["sales__micro"]
    torch.testing.assert_close(x.sum(-1), torch.full((5,), 33.0))
    assert len(x[:, 0].unique()) > 1
