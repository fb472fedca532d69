# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs under inference: particles, ``Predictive``, guides, NUTS.

With an observed y all is Gaussian, so that posterior and evidence have a closed form.
Under the exact posterior as guide, each particle has the log evidence as its ELBO, to
the last digit.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    JitTrace_ELBO,
    Predictive,
    Trace_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from pyro.infer.mcmc.util import initialize_model

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    SETTINGS,
    TOLERANCE,
    done,
    fused_market,
    gaussian_law,
    market,
    tensors,
    valued,
    weather,
    weather_table,
)
from .models import stochastic

Y = torch.tensor(6.0, dtype=torch.float64)
VALUES = pytest.mark.parametrize("values", SETTINGS, ids=str)
# Of a kept site that is set, what it would have been is a latent site as well
ALL_VALUES = pytest.mark.parametrize("values", [*SETTINGS, {"a": 2.0}], ids=str)
PARALLEL = pytest.mark.parametrize("parallel", [True, False])


def posterior(values):
    """Mean and covariance of (a, b) given y, and the log evidence."""
    mean, cov = MARKET.law(KEPT, values)
    gain = cov[:2, 2] / cov[2, 2]
    evidence = dist.Normal(mean[2], cov[2, 2].sqrt()).log_prob(Y)
    mean = mean[:2] + gain * (Y - mean[2])
    return mean, cov[:2, :2] - torch.outer(gain, cov[:2, 2]), evidence


def exact_guide(values):
    mean, cov, _ = posterior(values)

    def guide(y):
        latent = pyro.sample(
            "latent", dist.MultivariateNormal(mean, cov), infer={"is_auxiliary": True}
        )
        for name, value in zip("ab", latent.unbind(-1), strict=True):
            pyro.sample(name, dist.Delta(value))

    return guide


# ELBOs


@ALL_VALUES
@pytest.mark.parametrize("vectorized", [True, False])
@pytest.mark.parametrize("kind", [Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO])
def test_particles_each_have_the_log_evidence_under_the_exact_posterior(
    kind, vectorized, values
):
    *_, evidence = posterior(values)
    model = done(fused_market(), tensors(values))
    elbo = kind(num_particles=7, vectorize_particles=vectorized, max_plate_nesting=0)
    # Means of 7 equal numbers: a single particle that was off would show
    found = torch.tensor(-elbo.loss(model, exact_guide(values), Y))
    torch.testing.assert_close(found, evidence, **TOLERANCE)


@ALL_VALUES
def test_vectorized_particles_find_their_plate_themselves(values):
    *_, evidence = posterior(values)
    model = done(fused_market(), tensors(values))
    elbo = Trace_ELBO(num_particles=7, vectorize_particles=True)
    found = torch.tensor(-elbo.loss(model, exact_guide(values), Y))
    torch.testing.assert_close(found, evidence, **TOLERANCE)


def test_vectorized_particles_each_have_their_own_law():
    n = 5
    particles = torch.randn(n, 2)

    def guide(y):
        # The particles' plate makes each of these one of theirs
        for i, name in enumerate("ab"):
            pyro.sample(name, dist.Delta(particles[:, i]))

    elbo = Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=0)
    found = torch.tensor(-elbo.loss(fused_market(), guide, Y))
    law = dist.MultivariateNormal(*MARKET.law(KEPT, {}))
    points = torch.cat([particles, Y.expand(n, 1)], -1)
    torch.testing.assert_close(found, law.log_prob(points).mean(), **TOLERANCE)


def grouped(y=None):
    t = pyro.sample("t", dist.Normal(0.5, 1.0))
    with pyro.plate("n", 3, dim=-1):
        h = pyro.sample("h", dist.Normal(t, 1.5))
        a = pyro.sample("a", dist.Normal(2 * h, 1.0))
        m = pyro.sample("m", dist.Normal(a - h, 0.5))
        pyro.sample("y", dist.Normal(m + h, 0.7), obs=y)


@pytest.mark.parametrize("m", [None, 1.5])
@pytest.mark.parametrize("vectorized", [True, False])
def test_particles_of_a_program_with_a_plate_inside(vectorized, m):
    """t is the only latent site that is kept: y_i has the variance of t in common."""
    fused = pm.consolidate(grouped, ["t", "y"], ["m"])
    data = {} if m is None else tensors({"m": m})
    model = done(fused, data)
    y = torch.tensor([1.0, 3.0, -1.0])
    mean, cov = gaussian_law(done(grouped, data), ["t", "y"])
    gain = torch.linalg.solve(cov[1:, 1:], cov[1:, 0])
    loc = mean[0] + gain @ (y - mean[1:])
    scale = (cov[0, 0] - gain @ cov[1:, 0]).sqrt()

    def guide(y):
        pyro.sample("t", dist.Normal(loc, scale))

    elbo = Trace_ELBO(
        num_particles=7, vectorize_particles=vectorized, max_plate_nesting=1
    )
    evidence = dist.MultivariateNormal(mean[1:], cov[1:, 1:]).log_prob(y)
    found = torch.tensor(-elbo.loss(model, guide, y))
    torch.testing.assert_close(found, evidence, **TOLERANCE)


def trained(y=None):
    weight = pyro.param("weight", torch.tensor(2.0))
    h = pyro.sample("h", dist.Normal(1.0, 1.5))
    a = pyro.sample("a", dist.Normal(weight * h, 1.0))
    m = pyro.sample("m", dist.Normal(a - h, 0.5))
    b = pyro.sample("b", dist.Normal(0.5 * m + h, 1.2))
    return pyro.sample("y", dist.Normal(b + m + 3, 0.7), obs=y)


@pytest.mark.parametrize("vectorized", [True, False])
def test_particles_have_the_gradients_of_the_evidence(vectorized):
    """All of a and b is fused: the loss is minus the log evidence."""
    fused = pm.consolidate(trained, ["y"])
    elbo = Trace_ELBO(
        num_particles=4, vectorize_particles=vectorized, max_plate_nesting=0
    )
    loss = elbo.differentiable_loss(fused, lambda y: None, Y)
    weight = pyro.get_param_store()["weight"]
    (found,) = torch.autograd.grad(loss, weight)
    mean, cov = MARKET.with_weight("a", "h", weight).law(["y"], {})
    evidence = dist.Normal(mean[0], cov[0, 0].sqrt()).log_prob(Y)
    (wanted,) = torch.autograd.grad(-evidence, weight)
    assert wanted != 0
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_svi_finds_the_parameter_of_highest_evidence():
    fused = pm.consolidate(trained, ["y"])
    svi = SVI(fused, lambda y: None, pyro.optim.Adam({"lr": 0.2}), Trace_ELBO())
    for _ in range(50):
        svi.step(Y)
    weight = pyro.param("weight").item()
    assert evidence_at(weight) > max(evidence_at(w) for w in WEIGHTS) - 1e-3


WEIGHTS = [w / 10 for w in range(-50, 50)]


def evidence_at(weight):
    mean, cov = MARKET.with_weight("a", "h", weight).law(["y"], {})
    return dist.Normal(mean[0], cov[0, 0].sqrt()).log_prob(Y).item()


def test_jitted_elbo_has_the_value_of_the_plain_one():
    elbo, jitted = Trace_ELBO(), JitTrace_ELBO(ignore_jit_warnings=True)
    model = fused_market(trained)

    def guide(y):
        for name in "ab":
            pyro.sample(name, dist.Delta(torch.tensor(1.0)))

    for y in (Y, Y + 3):
        found, wanted = jitted.loss(model, guide, y), elbo.loss(model, guide, y)
        assert abs(found - wanted) < 1e-8
    with torch.no_grad():
        pyro.get_param_store()["weight"] = torch.tensor(-1.0)
    found, wanted = jitted.loss(model, guide, Y), elbo.loss(model, guide, Y)
    assert abs(found - wanted) < 1e-8


# Predictive


def predict(model, n, parallel, **kwargs):
    return Predictive(model, num_samples=n, parallel=parallel, **kwargs)


def moments_agree(draws, mean, cov):
    n = len(draws)
    deviation = cov.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / n**0.5).all()
    size = torch.outer(deviation, deviation)
    assert ((draws.T.cov() - cov).abs() < 5 * size * (2 / n) ** 0.5).all()


@PARALLEL
@ALL_VALUES
def test_predictive_has_the_joint_law(parallel, values):
    n = 4000 if parallel else 400
    out = predict(done(fused_market(), tensors(values)), n, parallel)()
    assert set(out) == {*KEPT, *values}
    draws = torch.stack([out[name].reshape(n) for name in KEPT], -1)
    moments_agree(draws, *MARKET.law(KEPT, values))


@PARALLEL
def test_predictive_has_the_shapes_of_the_program(parallel):
    fused = pm.consolidate(grouped, ["t", "a", "y"])
    for kwargs in ({}, {"return_sites": ["a", "y"]}):
        found = predict(fused, 5, parallel, **kwargs)()
        wanted = predict(grouped, 5, parallel, **kwargs)()
        for name, value in found.items():
            assert value.shape == wanted[name].shape
        assert set(found) == set(wanted) - {"h", "m"}


@PARALLEL
def test_predictive_takes_posterior_samples_of_kept_sites(parallel):
    """``y`` given each of the samples: through what is hidden, too."""
    n = 5
    a, b = torch.randn(2, n)
    for names in (["a", "b"], ["a"], ["b"]):
        samples = {name: {"a": a, "b": b}[name] for name in names}
        out = Predictive(
            spied := Spy(fused_market()), posterior_samples=samples, parallel=parallel
        )()
        mean, cov = MARKET.law(KEPT, {})
        assert set(out) == set(KEPT) - set(names)
        # Earlier runs were to find out about shapes
        means = torch.cat([m.reshape(-1) for m in spied.means])[-n:]
        others = {"a": a, "b": b}
        for name in {"a", "b"} - set(names):
            others[name] = out[name].reshape(n)
        points = torch.stack([others["a"], others["b"]], -1)
        gain = torch.linalg.solve(cov[:2, :2], cov[:2, 2])
        wanted = mean[2] + (points - mean[:2]) @ gain
        torch.testing.assert_close(means, wanted, **TOLERANCE)


class Spy:
    """Notes the mean of y in each run."""

    def __init__(self, model):
        self.model, self.means = model, []

    def __call__(self, *args):
        with poutine.trace() as recorded:
            self.model(*args)
        fn = recorded.trace.nodes["y"]["fn"]
        if isinstance(recorded.trace.nodes["y"]["value"], torch.Tensor):
            self.means.append(fn.mean)


@PARALLEL
def test_predictive_takes_posterior_samples_under_an_intervention(parallel):
    n = 6
    a = torch.randn(n)
    model = done(fused_market(), tensors({"m": 1.5}))
    rows = []
    for _ in range(100):
        out = Predictive(model, posterior_samples={"a": a}, parallel=parallel)()
        assert (out["m"] == 1.5).all()
        rows.append(out["y"].reshape(n))
        if not parallel and len(rows) == 20:
            break
    draws = torch.stack(rows)
    mean, cov = MARKET.law(["a", "y"], {"m": 1.5})
    gain = cov[0, 1] / cov[0, 0]
    wanted = mean[1] + gain * (a - mean[0])
    variance = cov[1, 1] - gain * cov[0, 1]
    error = (draws.mean(0) - wanted).abs()
    assert (error < 5 * (variance / len(draws)).sqrt()).all()


@PARALLEL
def test_predictive_with_samples_of_a_fused_site_is_an_error(parallel):
    """As from a posterior of the unfused program: keep what is to be held."""
    samples = {"a": torch.zeros(4), "h": torch.zeros(4)}
    predictive = Predictive(
        fused_market(), posterior_samples=samples, parallel=parallel
    )
    with pytest.raises(pm.PyroMacroError, match="'h' is conditioned on.*keep"):
        predictive()


@PARALLEL
def test_predictive_of_a_finite_program(parallel):
    n = 4000 if parallel else 400
    fused = pm.consolidate(weather, ["a", "b"], ["m"])
    for values in ({}, {"m": 2}):
        out = predict(done(fused, tensors(values)), n, parallel)()
        found = torch.bincount((2 * out["a"] + out["b"]).long().reshape(n), minlength=4)
        wanted = weather_table(["a", "b"], values).flatten()
        error = (found / n - wanted).abs()
        assert (error < 5 * (wanted * (1 - wanted) / n).sqrt()).all()


@PARALLEL
def test_predictive_of_a_finite_program_with_posterior_samples(parallel):
    a = torch.tensor([0.0, 1.0] * 300)
    fused = pm.consolidate(weather, ["a", "b"])
    out = Predictive(fused, posterior_samples={"a": a}, parallel=parallel)()
    table = weather_table(["a", "b"])
    for value in (0, 1):
        p = table[value, 1] / table[value].sum()
        found = out["b"].reshape(-1)[a == value].mean()
        assert (found - p).abs() < 5 * (p * (1 - p) / 300).sqrt()


@PARALLEL
def test_predictive_with_a_grid_in_a_named_plate(parallel):
    grid = torch.tensor([-1.0, 0.0, 4.0])
    fused = fused_market()

    def model():
        with pyro.plate("grid", 3, dim=-1):
            poutine.do(fused, data={"m": grid})()

    n = 600 if parallel else 200
    out = predict(model, n, parallel)()
    assert out["y"].shape == (n, 3)
    for i in range(3):
        mean, cov = MARKET.law(["y"], {"m": grid[i]})
        error = (out["y"][:, i].mean() - mean[0]).abs()
        assert error < 5 * (cov[0, 0] / n).sqrt()


# Importance


@ALL_VALUES
def test_importance_weights_are_the_evidence_under_the_exact_posterior(values):
    *_, evidence = posterior(values)
    model = done(fused_market(), tensors(values))
    importance = Importance(model, exact_guide(values), num_samples=5)
    importance.run(Y)
    weights = torch.stack([torch.as_tensor(w) for w in importance.log_weights])
    torch.testing.assert_close(weights, evidence.expand(5), **TOLERANCE)


# Autoguides


@ALL_VALUES
@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
def test_autoguide_has_the_sites_that_are_kept_and_their_loss(kind, values):
    """The same seed gives the loss of the program fused by hand."""
    losses = []
    for model in (
        done(fused_market(), tensors(values)),
        MARKET.fused(KEPT, **values),
    ):
        pyro.clear_param_store()
        guide = kind(model)
        pyro.set_rng_seed(5)
        found = guide(Y)
        assert set(found) == {"a", "b"}
        pyro.set_rng_seed(5)
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=True)
        losses.append(torch.tensor(elbo.loss(model, guide, Y)))
    torch.testing.assert_close(*losses, **TOLERANCE)


def test_auto_normal_has_a_coordinate_for_each_element():
    guide = AutoNormal(pm.consolidate(grouped, ["t", "a", "y"]))
    guide(torch.zeros(3))
    assert guide.locs.t.shape == ()
    assert guide.locs.a.shape == (3,)
    assert len(list(guide.locs.parameters())) == 2


@ALL_VALUES
def test_auto_multivariate_normal_can_be_the_exact_posterior(values):
    model = done(fused_market(), tensors(values))
    guide = AutoMultivariateNormal(model)
    guide(Y)
    assert guide.latent_dim == 2
    mean, cov, evidence = posterior(values)
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


@VALUES
def test_auto_normal_at_the_best_mean_field_has_the_elbo_by_hand(values):
    model = done(fused_market(), tensors(values))
    guide = AutoNormal(model)
    guide(Y)
    mean, cov, evidence = posterior(values)
    variance = 1 / torch.linalg.inv(cov).diagonal()
    with torch.no_grad():
        for i, name in enumerate("ab"):
            setattr(guide.locs, name, mean[i])
            setattr(guide.scales, name, variance[i].sqrt())
    distance = torch.distributions.kl_divergence(
        dist.MultivariateNormal(mean, torch.diag(variance)),
        dist.MultivariateNormal(mean, cov),
    )
    n = 4000
    elbo = Trace_ELBO(num_particles=n, vectorize_particles=True, max_plate_nesting=0)
    found = torch.tensor(-elbo.loss(model, guide, Y))
    # An ELBO's draws are those of a quadratic form: within 0.1 at this many
    assert (found - (evidence - distance)).abs() < 0.1


def test_auto_normal_is_trained():
    model = fused_market()
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.2}), Trace_ELBO(num_particles=4))
    for _ in range(60):
        svi.step(Y)
    mean, cov, _ = posterior({})
    found = torch.stack([guide.median(Y)[name] for name in "ab"])
    assert ((found - mean).abs() < cov.diagonal().sqrt()).all()


def test_autoguide_of_data_that_conditions_the_program():
    model = poutine.condition(fused_market(), {"y": Y})
    guide = AutoNormal(model)
    assert set(guide()) == {"a", "b"}
    inside = fused_market(poutine.condition(market, {"y": Y}))
    assert set(AutoNormal(inside)()) == {"a", "b"}


# NUTS


@ALL_VALUES
def test_nuts_sees_the_density_of_the_program_by_hand(values):
    fused = done(fused_market(), tensors(values))
    _, potential, transforms, _ = initialize_model(fused, (Y,))
    assert set(transforms) == {"a", "b"}
    law = dist.MultivariateNormal(*MARKET.law(KEPT, values))
    for a, b in [(0.0, 0.0), (3.0, -1.0)]:
        point = tensors({"a": a, "b": b})
        for value in point.values():
            value.requires_grad_()
        found = potential(point)
        wanted = -law.log_prob(torch.stack([*point.values(), Y]))
        torch.testing.assert_close(found, wanted, **TOLERANCE)
        gradients = [
            torch.autograd.grad(p, list(point.values())) for p in (found, wanted)
        ]
        torch.testing.assert_close(*gradients, **TOLERANCE)


@pytest.mark.filterwarnings("ignore")
@VALUES
def test_nuts_in_a_short_run_draws_what_is_kept(values):
    model = done(fused_market(), tensors(values))
    mcmc = MCMC(NUTS(model, max_tree_depth=3), 20, 30, disable_progbar=True)
    mcmc.run(Y)
    samples = mcmc.get_samples()
    assert set(samples) == {"a", "b"}
    mean, cov, _ = posterior(values)
    for i, name in enumerate("ab"):
        assert samples[name].shape == (20,)
        assert len(samples[name].unique()) > 3
        assert (samples[name].mean() - mean[i]).abs() < 3 * cov[i, i].sqrt()


@pytest.mark.filterwarnings("ignore")
def test_nuts_sums_a_discrete_site_that_is_kept():
    def model(y=None):
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Bernoulli(0.3))
        a = pyro.sample("a", dist.Normal(h, 1.0))
        pyro.sample("y", dist.Normal(a + 2 * c, 1.0), obs=y)

    fused = pm.consolidate(model, ["a", "c", "y"])
    _, potential, transforms, _ = initialize_model(fused, (Y,))
    assert set(transforms) == {"a"}
    a = torch.tensor(1.0)
    prior = dist.Normal(0.0, 2**0.5).log_prob(a)
    terms = [
        torch.tensor(p).log() + dist.Normal(a + 2 * c, 1.0).log_prob(Y)
        for c, p in ((0, 0.7), (1, 0.3))
    ]
    wanted = -(prior + torch.logsumexp(torch.stack(terms), 0))
    torch.testing.assert_close(potential({"a": a}), wanted, **TOLERANCE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@VALUES
def test_nuts_samples_the_posterior(values):
    model = done(fused_market(), tensors(values))
    mcmc = MCMC(NUTS(model), 1500, 200, disable_progbar=True)
    mcmc.run(Y)
    draws = torch.stack([mcmc.get_samples()[name] for name in "ab"], -1)
    mean, cov, _ = posterior(values)
    # As many as 300 independent draws at the least
    deviation = cov.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / 300**0.5).all()
    size = torch.outer(deviation, deviation)
    assert ((draws.T.cov() - cov).abs() < 5 * size * (2 / 300) ** 0.5).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_nuts_runs_chains_in_processes():
    """The program goes to other processes as any model does."""
    kernel = NUTS(fused_market())
    mcmc = MCMC(kernel, 20, 20, num_chains=2, disable_progbar=True)
    mcmc.run(Y)
    assert mcmc.get_samples(group_by_chain=True)["a"].shape == (2, 20)


def test_posterior_by_hand_is_that_of_the_program():
    """The comparison itself."""
    law = gaussian_law(market, list(KEPT))
    torch.testing.assert_close(law, MARKET.law(KEPT, {}), **TOLERANCE)
    elbo = Trace_ELBO(max_plate_nesting=0)
    *_, evidence = posterior({})
    found = torch.tensor(-elbo.loss(fused_market(), exact_guide({"m": 1.5}), Y))
    assert (found - evidence).abs() > 1e-3
    trace = poutine.trace(valued(fused_market(), tensors({"a": 1.0}))).get_trace()
    assert stochastic(trace)["a"]["value"] == 1.0
