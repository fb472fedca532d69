# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``lift`` and ``replay``, inside and outside."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    assert_only_added,
    assert_same_program,
    market,
    market_by_hand_given_z,
    sales_total,
    shop,
    shop_by_hand,
    stochastic,
)

GIVEN_Z = {SALES: pm.Natural(33.0, given=["z"])}


# lift


def priced():
    mu = pyro.param("mu", torch.tensor(10.0))
    sigma = pyro.param("sigma", torch.tensor(2.0), constraint=constraints.positive)
    x1 = pyro.sample("x1", dist.Normal(mu, sigma))
    x2 = pyro.sample("x2", dist.Normal(2 * mu, 1.0))
    pyro.sample("y", dist.Normal(x1 + 3 * x2 + mu, 0.5))


def priced_by_hand_held():
    """mu is a parameter, or held at its value."""
    mu = pyro.param("mu", torch.tensor(10.0))
    sigma = pyro.param("sigma", torch.tensor(2.0), constraint=constraints.positive)
    gain = sigma**2 / (sigma**2 + 1)
    x1 = pyro.sample("x1", dist.Normal(mu + gain * (33 - 3 * mu), gain.sqrt()))
    x2 = pyro.deterministic("x2", 33 - x1)
    pyro.sample("y", dist.Normal(x1 + 3 * x2 + mu, 0.5))


def priced_by_hand_integrated():
    """mu ~ N(10, 1.5) is a cause of both parts, integrated out."""
    mu = pyro.param("mu", torch.tensor(10.0))
    sigma = pyro.param("sigma", torch.tensor(2.0), constraint=constraints.positive)
    v1, v2, c = sigma**2 + 2.25, 1 + 4 * 2.25, 2 * 2.25
    gain = (v1 + c) / (v1 + v2 + 2 * c)
    law = dist.Normal(10 + gain * (33 - 30), (v1 - gain * (v1 + c)).sqrt())
    x1 = pyro.sample("x1", law)
    x2 = pyro.deterministic("x2", 33 - x1)
    pyro.sample("y", dist.Normal(x1 + 3 * x2 + mu, 0.5))


def lifted(model, *names):
    priors = {"mu": dist.Normal(10.0, 1.5), "sigma": dist.LogNormal(0.5, 0.3)}
    return poutine.lift(model, prior={name: priors[name] for name in names})


def test_lift_inside_makes_a_parameter_a_cause_to_be_integrated_out():
    model = pm.macro_do(lifted(priced, "mu"), NATURAL)
    trace = assert_same_program(model, lifted(priced_by_hand_integrated, "mu"))
    assert "mu" in trace.stochastic_nodes


def test_lift_inside_with_given_holds_the_lifted_parameters(do):
    names = ["mu", "sigma"]
    model = do(lifted(priced, *names), {SALES: pm.Natural(33.0, given=names)})
    trace = assert_same_program(model, lifted(priced_by_hand_held, *names))
    assert {"mu", "sigma"} <= set(trace.stochastic_nodes)


def test_lift_inside_of_a_scale_without_given_is_integrated_out_by_draws():
    """The moments of x1 are integrals over sigma: given it, the program is Gaussian."""
    chains = pm.Chains(num_samples=100, warmup_steps=50, num_chains=1, progress=False)
    natural = {SALES: pm.Natural(33.0, sampler=chains)}
    model = pm.macro_do(lifted(priced, "mu", "sigma"), natural)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", pm.NotConverged)
        trace = poutine.trace(model).get_trace()
    law = trace.nodes["sales__micro"]["fn"]
    assert law.method.startswith("Monte Carlo: NUTS on the fibre")
    torch.testing.assert_close(law.draws.sum(-1), torch.full((100,), 33.0))
    sigma = torch.linspace(0.0, 12.0, 4001)[1:]
    v1, v2, c = sigma**2 + 2.25, 1 + 4 * 2.25, 2 * 2.25
    variance = v1 + v2 + 2 * c
    weight = dist.LogNormal(0.5, 0.3).log_prob(sigma)
    weight = weight + dist.Normal(30.0, variance.sqrt()).log_prob(torch.tensor(33.0))
    weight = weight.softmax(0)
    gain = (v1 + c) / variance
    means, variances = 10 + 3 * gain, v1 - gain * (v1 + c)
    mean = (weight * means).sum()
    spread = (weight * (variances + (means - mean).square())).sum().sqrt()
    assert (law.draws[:, 0].mean() - mean).abs() < 5 * spread / 20**0.5
    assert (law.draws[:, 0].std() / spread - 1).abs() < 5 / 40**0.5
    # Draws have no density: parameters with priors belong in `given`
    with pytest.raises(pm.UnsupportedLaw, match="without a normalized density"):
        trace.log_prob_sum()


@pytest.mark.parametrize("given", [[], ["mu", "sigma"]], ids=str)
def test_lift_outside_holds_the_parameters_in_each_run(do, given):
    # To the handler they are parameters, which are held anyway
    names = ["mu", "sigma"]
    model = lifted(do(priced, {SALES: pm.Natural(33.0, given=given)}), *names)
    trace = assert_same_program(model, lifted(priced_by_hand_held, *names))
    assert {"mu", "sigma"} <= set(trace.stochastic_nodes)
    assert len(pyro.get_param_store()) == 0, "lifted parameters are no parameters"


def test_lift_outside_draws_parameters_anew_in_each_slot(do):
    def run(model):
        def outer():
            with pyro.plate("outer", 3, dim=-1):
                return lifted(model, "mu", "sigma")()

        return outer

    model = run(do(priced, {SALES: pm.Natural(33.0)}))
    trace = assert_same_program(model, run(priced_by_hand_held))
    assert trace.nodes["mu"]["value"].shape == (3,)


def test_lift_is_seen_by_aggregate(add):
    model = lifted(priced, "mu", "sigma")
    assert_only_added(add(model, [SALES]), model, sales_total)
    assert_only_added(lifted(add(priced, [SALES]), "mu", "sigma"), model, sales_total)


# replay


def test_replay_of_a_trace_of_the_intervened_model_repeats_it(do):
    model = do(market, GIVEN_Z)
    trace = poutine.trace(model).get_trace()
    again = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    assert set(stochastic(again)) == set(stochastic(trace))
    for name, node in stochastic(trace).items():
        torch.testing.assert_close(
            again.nodes[name]["value"], node["value"], rtol=0, atol=0
        )
    torch.testing.assert_close(again.log_prob_sum(), trace.log_prob_sum())
    assert (
        poutine.trace(model).get_trace().nodes["y"]["value"]
        != again.nodes["y"]["value"]
    )


@pytest.mark.parametrize(
    "realization",
    [
        pm.Natural(33.0),
        pm.Residual(33.0, absorb="x2"),
        pm.Allocate(33.0, [0.5, 0.5]),
        pm.Proportional(33.0),
    ],
    ids=lambda r: type(r).__name__,
)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_replay_of_a_trace_of_the_unaltered_model_keeps_the_intervention(
    do, where, realization
):
    guide = poutine.trace(shop).get_trace()
    if where == "outside":
        model = poutine.replay(do(shop, {SALES: realization}), trace=guide)
    else:
        model = do(poutine.replay(shop, trace=guide), {SALES: realization})
    nodes = poutine.trace(model).get_trace().nodes
    total = nodes["x1"]["value"] + nodes["x2"]["value"]
    torch.testing.assert_close(total, torch.tensor(33.0))
    torch.testing.assert_close(nodes["sales"]["value"], torch.tensor(33.0))
    assert nodes["x1"]["value"] != guide.nodes["x1"]["value"]
    assert nodes["w"]["value"] == guide.nodes["w"]["value"]
    # What is downstream has the mean of what propagates
    mean = nodes["x1"]["value"] + 3 * nodes["x2"]["value"] + nodes["w"]["value"]
    torch.testing.assert_close(nodes["y"]["fn"].mean, mean)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_replay_of_a_trace_of_the_unaltered_model_has_the_density_by_hand(do, where):
    guide = poutine.trace(market).get_trace()
    for name in ("x1", "x2"):
        guide.remove_node(name)
    if where == "outside":
        model = poutine.replay(do(market, GIVEN_Z), trace=guide)
    else:
        model = do(poutine.replay(market, trace=guide), GIVEN_Z)
    trace = assert_same_program(
        model, poutine.replay(market_by_hand_given_z, trace=guide)
    )
    for name in ("z", "y"):
        assert trace.nodes[name]["value"] == guide.nodes[name]["value"]


def test_replay_of_a_latent_site_off_the_fibre_is_an_error(do):
    model = do(shop, NATURAL)
    trace = poutine.trace(model).get_trace()
    trace.nodes["sales__micro"]["value"] = torch.tensor([13.0, 21.0])
    with pytest.raises(pm.OffFibre, match="34.*33"):
        poutine.replay(model, trace=trace)()


def test_replay_of_parameters_is_what_the_law_is_computed_from(do):
    params = {"mu": torch.tensor(7.0), "sigma": torch.tensor(1.0)}
    for value in params.values():
        value.unconstrained = lambda value=value: value  # as the store hands them out
    model = poutine.replay(do(priced, NATURAL), params=params)
    trace = poutine.trace(model).get_trace()
    torch.testing.assert_close(
        trace.nodes["sales__micro"]["fn"].mean, torch.tensor([13.0, 20.0])
    )


def test_replay_is_seen_by_aggregate(add):
    guide = poutine.trace(shop).get_trace()
    model = poutine.replay(shop, trace=guide)
    outside = poutine.replay(add(shop, [SALES]), trace=guide)
    for program in (outside, add(model, [SALES])):
        trace = assert_only_added(program, model, sales_total)
        total = guide.nodes["x1"]["value"] + guide.nodes["x2"]["value"]
        torch.testing.assert_close(trace.nodes["sales"]["value"], total)


def test_comparison_sees_another_macro_value():
    with pytest.raises(AssertionError):
        assert_same_program(
            pm.macro_do(shop, NATURAL), lambda: shop_by_hand(torch.tensor(34.0))
        )
