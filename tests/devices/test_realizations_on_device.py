# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Interventions on models whose parameters are on a device.

Draws and log densities are on it, in the dtype of the model, and laws are those that
the same model has on the CPU.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from placed_models import (
    CASES,
    GAUSSIAN,
    PAIR,
    VECTOR,
    confounded,
    plate,
    shares,
    shop,
    vector,
)
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.util import site_is_subsample

import pyro_macro as pm


def random_sites(trace):
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def assert_on(place, trace):
    """All values are on the device, and in its dtype unless their sites count."""
    values = {n: node["value"] for n, node in random_sites(trace).items()}
    counts = any(not v.is_floating_point() for n, v in values.items() if n != "y")
    for name, value in values.items():
        assert place.holds(value), name
        if value.is_floating_point() and not counts:
            assert value.dtype == place.dtype, name


def law_in(trace):
    (name,) = [n for n in trace.nodes if n.endswith("__micro")]
    return trace.nodes[name]["fn"], trace.nodes[name]["value"]


def run(case, t):
    """A trace in which a cause that the law depends on has a value."""
    model, interventions = case(t)
    model = poutine.condition(model, {"z": t(1.0)})
    return poutine.trace(pm.macro_do(model, interventions)).get_trace()


def assert_densities_on(place, trace):
    trace.compute_log_prob()
    assert place.holds(trace.log_prob_sum())
    for node in random_sites(trace).values():
        assert place.holds(node["log_prob"])


@pytest.mark.parametrize("name", CASES)
def test_runs_stay_on_the_device(place_of, name):
    torch.set_default_dtype(torch.float64)
    place = place_of(torch.float32)
    trace = run(CASES[name], place)
    assert_on(place, trace)
    assert_densities_on(place, trace)


@pytest.mark.parametrize("name", CASES)
def test_laws_are_those_of_the_cpu(place_of, name):
    torch.set_default_dtype(torch.float32)
    place = place_of(torch.float64)
    there, here = (run(CASES[name], t) for t in (place, place.on_cpu()))
    assert_on(place, there)
    assert_densities_on(place, there)
    names = [n for n in there.nodes if n.endswith("__micro")]
    for micro in names:
        value, law = there.nodes[micro]["value"], here.nodes[micro]["fn"]
        found = there.nodes[micro]["log_prob"].cpu()
        assert torch.allclose(found, law.log_prob(value.cpu()), 1e-9, 1e-9)
    assert names or name.startswith("allocate")
    if not names:  # a point
        assert torch.equal(there.nodes["x"]["value"].cpu(), here.nodes["x"]["value"])


@pytest.mark.parametrize("name", GAUSSIAN)
def test_descriptions_are_those_of_the_cpu(fine, name):
    torch.set_default_dtype(torch.float64)
    said = [
        repr(pm.macro_do(*CASES[name](t)).describe()) for t in (fine, fine.on_cpu())
    ]
    assert said[0] == said[1]


@pytest.mark.parametrize("name", ["natural", "residual", "natural, plate", "shift"])
def test_plates_around_them_do_too(place, name):
    model, interventions = CASES[name](place)
    with pyro.plate("draws", 3, dim=-2):
        trace = poutine.trace(pm.macro_do(model, interventions)).get_trace()
    assert_on(place, trace)
    assert trace.nodes["x"]["value"].shape[0] == 3
    assert place.holds(trace.log_prob_sum())


@pytest.mark.parametrize(
    "realization",
    [
        lambda t: pm.Natural(5.0),
        lambda t: pm.Residual(t(5.0), absorb=1),
        lambda t: pm.Allocate(5.0, [0.1, 0.2, 0.3, 0.4]),
        lambda t: pm.Shift(1.0),
        lambda t: pm.Proportional(5.0),
    ],
)
def test_contexts_do_too(place, realization):
    model = vector(place)
    with (
        poutine.trace() as traced,
        pm.macro_do(interventions={VECTOR: realization(place)}),
    ):
        model()
    assert_on(place, traced.trace)


def test_contexts_over_several_sites_do_too(place):
    model = shop(place)
    with poutine.trace() as traced:
        with pm.macro_do(interventions={PAIR: pm.Natural(33.0)}):
            model()
    assert_on(place, traced.trace)
    total = traced.trace.nodes["x1"]["value"] + traced.trace.nodes["x2"]["value"]
    assert abs(total.item() - 33.0) < 1e-4


@pytest.mark.parametrize("aggregation", [pm.Sum(), pm.Mean(), pm.Max(), pm.Count(1)])
def test_aggregates_are_on_the_device(place, aggregation):
    macro = pm.MacroVariable("total", "x", aggregation=aggregation)
    trace = poutine.trace(pm.aggregate(vector(place), [macro])).get_trace()
    assert_on(place, trace)


def test_values_of_a_table_are_on_the_device(place):
    model, interventions = CASES["natural, coarsen"](place)
    trace = poutine.trace(pm.aggregate(model, list(interventions))).get_trace()
    assert_on(place, trace)


@pytest.mark.parametrize("plate_of_values", [pm.grid, pyro.plate])
def test_grids_of_values_are_on_the_device(place, plate_of_values):
    values = place(3.0, 5.0, 7.0).unsqueeze(-1)
    model = pm.macro_do(
        plate(place), {pm.MacroVariable("total", "x", over="k"): pm.Natural(values)}
    )
    with plate_of_values("values", 3, dim=-2):
        trace = poutine.trace(model).get_trace()
    assert_on(place, trace)
    totals = trace.nodes["x"]["value"].sum(-1, keepdim=True)
    assert torch.allclose(totals, values, 1e-4)


@pytest.mark.parametrize(
    "fn",
    [
        lambda t, x: dist.Normal(x, t(1.0)),
        lambda t, x: dist.Gamma(x.exp(), t(1.0)),
        lambda t, x: dist.Bernoulli(logits=x),
        lambda t, x: dist.Categorical(logits=torch.stack([x, -x], -1)),
        lambda t, x: dist.Exponential(x.exp()),
    ],
)
def test_noise_of_a_grid_is_on_the_device(place, fn):
    ten, one = place(1.0), place(1.0)

    def model():
        x1 = pyro.sample("x1", dist.Normal(ten, one))
        x2 = pyro.sample("x2", dist.Normal(one, one))
        return pyro.sample("y", fn(place, x1 - x2))

    values = place(1.0, 2.0)
    with pm.grid("values", 2, dim=-1):
        trace = poutine.trace(
            pm.macro_do(model, {PAIR: pm.Natural(values)})
        ).get_trace()
    assert_on(place, trace)


@pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
def test_chains_run_on_the_device(fine):
    few = pm.Chains(num_samples=4, warmup_steps=1, num_chains=1, progress=False)
    natural = pm.macro_do(shares(fine), {PAIR: pm.Natural(1.0, sampler=few)})
    trace = poutine.trace(natural).get_trace()
    assert_on(fine, trace)
    fn, value = law_in(trace)
    assert fine.holds(fn.draws) and fine.holds(fn.sample((5,)))
    assert torch.allclose(value.sum(-1), torch.ones_like(value.sum(-1)), 1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
def test_chains_on_curved_fibres_run_on_the_device(fine):
    few = pm.Chains(num_samples=4, warmup_steps=1, num_chains=1, progress=False)
    one, two = fine(1.0), fine(2.0)

    def model():
        pyro.sample("x1", dist.Normal(one, two))
        pyro.sample("x2", dist.Normal(one, one))

    macro = pm.MacroVariable(
        "total", ["x1", "x2"], aggregation=pm.Custom(lambda x: x.exp().sum(-1))
    )
    natural = pm.macro_do(model, {macro: pm.Natural(3.0, sampler=few)})
    assert_on(fine, poutine.trace(natural).get_trace())


def test_flows_are_fitted_on_the_device(fine):
    flow = pm.Flow(0.5, 1.5, num_draws=60, steps=1, progress=False)
    natural = pm.macro_do(shares(fine), {PAIR: pm.Natural(1.0, sampler=flow)})
    trace = poutine.trace(natural).get_trace()
    assert_on(fine, trace)
    assert fine.holds(trace.log_prob_sum())


def test_gradients_are_on_the_device(place):
    mean = place(1.0, 2.0, 3.0).requires_grad_()
    ones = place(1.0, 1.0, 1.0)

    def model():
        x = pyro.sample("x", dist.Normal(mean, ones).to_event(1))
        return (x * mean).sum()

    effect = pm.macro_do(model, {VECTOR: pm.Natural(5.0)})()
    (slope,) = torch.autograd.grad(effect, mean)
    assert place.holds(slope) and bool(slope.isfinite().all())


def test_predictive_draws_are_on_the_device(place):
    natural = pm.macro_do(confounded(place), {VECTOR: pm.Natural(5.0)})
    drawn = Predictive(natural, num_samples=4, parallel=True)()
    assert place.holds(drawn["x"]) and place.holds(drawn["y"])
