# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated models whose parameters are on a device, also under ``do``."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

import pyro_macro as pm


def affine(t):
    zero, one, half = t(0.0), t(1.0), t(0.5)

    def model():
        h = pyro.sample("h", dist.Normal(zero, one))
        a = pyro.sample("a", dist.Normal(2 * h, one))
        m = pyro.sample("m", dist.Normal(a - h, half))
        b = pyro.sample("b", dist.Normal(0.5 * m + h, one))
        return pyro.sample("y", dist.Normal(b + m + 3, half))

    return model


def in_plates(t):
    zero, one, weights = t(0.0), t(1.0), t(0.5, 1.0, 2.0)

    def model():
        h = pyro.sample("h", dist.Normal(zero, one))
        with pyro.plate("k", 3):
            a = pyro.sample("a", dist.Normal(h * weights, one))
            m = pyro.sample("m", dist.Normal(a - h, one))
            b = pyro.sample("b", dist.Normal(m * weights, one))
            pyro.sample("y", dist.Normal(a + b, one))

    return model


def finite(t):
    half = t(0.4)
    two = t([0.2, 0.8], [0.6, 0.4])
    three = t([0.2, 0.3, 0.5], [0.6, 0.3, 0.1])

    def model():
        h = pyro.sample("h", dist.Bernoulli(half))
        a = pyro.sample("a", dist.Categorical(two[h.long()]))
        m = pyro.sample("m", dist.Categorical(three[a]))
        b = pyro.sample("b", dist.Bernoulli(0.1 + 0.2 * m + 0.3 * h))
        return pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * b))

    return model


def mixture(t):
    """A Gaussian site behind finite ones."""
    half, one = t(0.4), t(1.0)

    def model():
        h = pyro.sample("h", dist.Bernoulli(half))
        a = pyro.sample("a", dist.Bernoulli(0.2 + 0.5 * h))
        m = pyro.sample("m", dist.Bernoulli(0.1 + 0.2 * a))
        b = pyro.sample("b", dist.Bernoulli(0.1 + 0.2 * m + 0.3 * h))
        return pyro.sample("y", dist.Normal(b - m + 0.5, one))

    return model


def computed(t):
    """Deterministic sites with formulas, thresholds and a constant among them."""
    zero, one = t(0.0), t(1.0)

    def model():
        h = pyro.sample("h", dist.Normal(zero, one))
        a = pyro.deterministic("a", 2 * h + 1)
        m = pyro.deterministic("m", torch.where(a > 0, a - h, a + h))
        b = pyro.deterministic("b", m * m - m * m + 2.0)
        pyro.deterministic("y", b * a + m)

    return model


MODELS = [affine, in_plates, finite, mixture, computed]
KEPT = ("a", "y")


def sites(trace):
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def assert_on(place, trace):
    for name, node in sites(trace).items():
        assert place.holds(node["value"]), name
        value = node["fn"].log_prob(node["value"])
        assert place.holds(value), name


@pytest.mark.parametrize("made", MODELS)
@pytest.mark.parametrize("setting", [None, 1.0])
def test_fused_runs_stay_on_the_device(place, made, setting):
    fused = pm.consolidate(made(place), keep=KEPT, allow=["m"])
    model = fused
    if setting is not None:
        value = place(setting)
        kept = fused.typical("m")
        model = poutine.do(fused, data={"m": value.to(kept.dtype).expand(kept.shape)})
    for run in (model, model):
        assert_on(place, poutine.trace(run).get_trace())


@pytest.mark.parametrize("made", MODELS)
def test_as_much_is_fused_as_on_the_cpu(place, made):
    found, expected = (
        pm.consolidate(made(t), keep=KEPT).method for t in (place, place.on_cpu())
    )
    assert found == expected


@pytest.mark.parametrize("made", MODELS)
def test_their_laws_are_those_of_the_cpu(fine, made):
    torch.set_default_dtype(torch.float64)
    traces = []
    for t in (fine, fine.on_cpu()):
        fused = pm.consolidate(made(t), keep=KEPT)
        if traces:
            data = {n: v["value"].cpu() for n, v in sites(traces[0]).items()}
            fused = poutine.condition(fused, data=data)
        traces.append(poutine.trace(fused).get_trace())
    found, expected = (trace.log_prob_sum() for trace in traces)
    assert fine.holds(torch.as_tensor(found)) or made is computed
    assert torch.as_tensor(found).cpu() == pytest.approx(float(expected), rel=1e-9)
    for name, node in sites(traces[1]).items():
        assert torch.allclose(sites(traces[0])[name]["value"].cpu(), node["value"])


@pytest.mark.parametrize("made", [affine, finite, mixture])
def test_observed_sites_condition_them(fine, made):
    torch.set_default_dtype(torch.float64)
    found = []
    for t in (fine, fine.on_cpu()):
        like = pm.consolidate(made(t), keep=KEPT).typical("a")
        data = {"a": torch.ones_like(like), "y": torch.ones_like(t(1.0))}
        fused = pm.consolidate(made(t), keep=KEPT)
        trace = poutine.trace(poutine.condition(fused, data=data)).get_trace()
        found.append(float(trace.log_prob_sum()))
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("made", MODELS)
def test_no_difference_is_seen(fine, made):
    torch.set_default_dtype(torch.float64)
    model = made(fine)
    fused = pm.consolidate(model, keep=KEPT, allow=["m"])
    setting = {"m": fused.typical("m") * 0 + 1}
    report = pm.verify_consolidation(model, fused, [setting], draws=30)
    assert report


def test_explicit_interventions_are_told_on_any_device(fine):
    torch.set_default_dtype(torch.float64)
    setting = torch.tensor([1.0, 2.0, 3.0])
    fused = pm.consolidate(in_plates(fine), keep=KEPT, allow=[{"m": setting}])
    for value in (setting.to(fine.device), setting.to(fine.device).clone()):
        trace = poutine.trace(poutine.do(fused, data={"m": value})).get_trace()
        assert_on(fine, trace)
    with pytest.raises(pm.InterventionNotAllowed):
        poutine.do(fused, data={"m": setting.to(fine.device) + 1})()


def test_learned_laws_are_on_the_device(place):
    zero, one = place(0.0), place(1.0)

    def model():
        h = pyro.sample("h", dist.Normal(zero, one))
        a = pyro.sample("a", dist.Normal(h.tanh(), one))
        m = pyro.sample("m", dist.Normal(a.sin() + h, one))
        pyro.sample("y", dist.Normal((a * m).tanh(), one))

    how = pm.Approximation(1.0, draws=50, steps=2, components=2, width=4)
    fused = pm.consolidate(model, keep=KEPT, allow=["m"], approximate=how)
    assert_on(place, poutine.trace(fused).get_trace())
    done = poutine.do(fused, data={"m": place(0.5)})
    assert_on(place, poutine.trace(done).get_trace())


def test_totals_of_consolidated_models(place):
    macro = pm.MacroVariable("total", ["a", "b"])
    fused = pm.consolidate(affine(place), keep=["a", "b", "y"])
    apart = pm.MacroVariable("total", ["x1", "x2"])
    natural = pm.macro_do(_pair(place), {apart: pm.Natural(1.0)})
    assert_on(place, poutine.trace(pm.aggregate(fused, [macro])).get_trace())
    assert_on(place, poutine.trace(natural).get_trace())


def _pair(t):
    zero, one = t(0.0), t(1.0)

    def model():
        h = pyro.sample("h", dist.Normal(zero, one))
        c = pyro.sample("c", dist.Normal(h, one))
        x1 = pyro.sample("x1", dist.Normal(c, one))
        x2 = pyro.sample("x2", dist.Normal(c - h, one))
        pyro.sample("y", dist.Normal(x1 + x2 + h, one))

    return pm.consolidate(model, keep=["x1", "x2", "y"])
