# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs under ``condition``, inside and outside; ``uncondition``."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import condition

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    SETTINGS,
    TOLERANCE,
    done,
    fused_market,
    market,
    tensors,
    weather,
    weather_table,
)
from .models import assert_same_program, stochastic

# The default dtype is set after these are made
ANY = {name: torch.tensor(i + 0.5, dtype=torch.float64) for i, name in enumerate(KEPT)}
H = {"h": torch.tensor(2.0, dtype=torch.float64)}
M = {"m": torch.tensor(1.5, dtype=torch.float64)}
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(KEPT, n)]


# Inside


@pytest.mark.parametrize("names", SUBSETS, ids=str)
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_condition_inside_on_a_kept_site_observes_it(names, values):
    data = {name: ANY[name] for name in names}
    model = done(fused_market(condition(market, data)), tensors(values))
    by_hand = condition(MARKET.fused(KEPT, **values), data)
    trace = assert_same_program(model, by_hand, macros=("m",))
    assert {n for n in KEPT if trace.nodes[n]["is_observed"]} == set(names)


@pytest.mark.parametrize("name", KEPT)
def test_condition_inside_keeps_what_is_observed(name):
    fused = pm.consolidate(condition(market, {name: ANY[name]}), ["a"])
    assert set(fused.sites) == {"a", name}
    by_hand = condition(MARKET.fused(fused.sites), {name: ANY[name]})
    assert_same_program(fused, by_hand)


@pytest.mark.parametrize("name", ["h", "m"])
def test_condition_inside_on_a_site_that_would_be_fused_keeps_it(name):
    data = H if name == "h" else M
    fused = fused_market(condition(market, data))
    names = [n for n in MARKET.scales if n in (*KEPT, name)]
    assert fused.sites == tuple(names)
    assert_same_program(fused, condition(MARKET.fused(names), data))
    # It may be set as well, and is observed to have been what it was
    values = {"m": -2.0}
    model = done(fused, tensors(values))
    trace = poutine.trace(condition(model, {"a": ANY["a"]})).get_trace()
    earlier = {n: trace.nodes[n]["value"] for n in names if n not in ("b", "y")}
    mean, variance = natural_given(values, earlier, "b")
    torch.testing.assert_close(trace.nodes["b"]["fn"].mean, mean, **TOLERANCE)
    torch.testing.assert_close(trace.nodes["b"]["fn"].variance, variance, **TOLERANCE)


def test_condition_inside_of_a_finite_program_observes():
    data = tensors({"a": 1.0})
    fused = pm.consolidate(condition(weather, data), ["b"], ["m"])
    assert fused.sites == ("a", "b")
    joint = weather_table(["a", "b"])
    trace = poutine.trace(fused).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["a"]["is_observed"]
    found = trace.nodes["a"]["log_prob_sum"].exp()
    torch.testing.assert_close(found, joint[1].sum(), **TOLERANCE)
    found = trace.nodes["b"]["fn"].probs
    torch.testing.assert_close(found, joint[1, 1] / joint[1].sum(), **TOLERANCE)


def test_condition_inside_with_other_data_in_each_run():
    """The data is an argument: one consolidation serves all of it."""

    def model(data):
        return condition(market, {"b": data})()

    fused = pm.consolidate(model, KEPT, model_args=(torch.tensor(0.0),))
    for b in (1.0, -2.0):
        data = tensors({"b": b})
        by_hand = condition(MARKET.fused(KEPT), data)
        assert_same_program(lambda data=data: fused(data["b"]), by_hand)


# Outside


@pytest.mark.parametrize("names", SUBSETS, ids=str)
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_condition_outside_on_kept_sites_observes_them(names, values):
    data = {name: ANY[name] for name in names}
    model = condition(done(fused_market(), tensors(values)), data)
    by_hand = condition(MARKET.fused(KEPT, **values), data)
    trace = assert_same_program(model, by_hand, macros=("m",))
    assert {n for n in KEPT if trace.nodes[n]["is_observed"]} == set(names)


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_condition_outside_on_all_kept_sites_has_their_log_density(values):
    model = condition(done(fused_market(), tensors(values)), ANY)
    trace = poutine.trace(model).get_trace()
    law = dist.MultivariateNormal(*MARKET.law(KEPT, values))
    wanted = law.log_prob(torch.stack(list(ANY.values())))
    torch.testing.assert_close(trace.log_prob_sum(), wanted, **TOLERANCE)


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_condition_outside_moves_the_later_sites_as_in_the_joint_law(values):
    """``E[y | a, b]`` and ``E[b | a]``: what is hidden is learned about."""
    data = {name: ANY[name] for name in ("a", "b")}
    model = condition(done(fused_market(), tensors(values)), data)
    fn = poutine.trace(model).get_trace().nodes["y"]["fn"]
    mean, cov = MARKET.law(KEPT, values)
    gain = torch.linalg.solve(cov[:2, :2], cov[:2, 2])
    wanted = mean[2] + gain @ (torch.stack(list(data.values())) - mean[:2])
    torch.testing.assert_close(fn.mean, wanted, **TOLERANCE)
    torch.testing.assert_close(fn.variance, cov[2, 2] - gain @ cov[:2, 2], **TOLERANCE)


def test_condition_outside_within_the_condition_inside():
    inside = condition(market, {"y": ANY["y"]})
    model = condition(fused_market(inside), {"a": ANY["a"]})
    by_hand = condition(MARKET.fused(KEPT), {"y": ANY["y"], "a": ANY["a"]})
    trace = assert_same_program(model, by_hand)
    assert [n for n in KEPT if trace.nodes[n]["is_observed"]] == ["a", "y"]


def test_condition_outside_with_a_trace_as_data():
    source = poutine.trace(MARKET.fused(KEPT)).get_trace()
    trace = assert_same_program(
        condition(fused_market(), source), condition(MARKET.fused(KEPT), source)
    )
    assert all(trace.nodes[name]["is_observed"] for name in KEPT)


@pytest.mark.parametrize("form", ["wrapper", "decorator", "context"])
def test_condition_outside_in_each_of_its_forms(form):
    data, fused = {"a": ANY["a"]}, fused_market()
    if form == "wrapper":
        model = condition(fused, data)
    elif form == "decorator":
        model = condition(data=data)(fused)
    else:

        def model():
            with condition(data=data):
                return fused()

    assert_same_program(model, condition(MARKET.fused(KEPT), data))


# On what was fused away: an error


@pytest.mark.parametrize("data", [H, M, {**ANY, **M}], ids=lambda d: str(list(d)))
@pytest.mark.parametrize("values", [{}, {"a": 1.0}], ids=str)
def test_condition_outside_on_a_fused_site_is_an_error(data, values):
    model = condition(done(fused_market(), tensors(values)), data)
    with pytest.raises(pm.PyroMacroError, match="'[hm]' is conditioned on.*keep"):
        model()


def test_condition_on_a_fused_site_that_is_set_as_well_is_an_error():
    """Pyro takes the natural value for observed: there is none here."""
    for first, second in [(condition, poutine.do), (poutine.do, condition)]:
        model = first(second(fused_market(), data=M), data=M)
        with pytest.raises(pm.PyroMacroError, match="'m' is conditioned on"):
            model()


def test_condition_outside_with_a_trace_of_the_unfused_program_is_an_error():
    source = poutine.trace(market).get_trace()
    with pytest.raises(pm.PyroMacroError, match="'[hm]' is conditioned on"):
        condition(fused_market(), source)()


def test_condition_outside_on_an_unknown_site_is_nothing_as_in_pyro():
    data = {"other": torch.tensor(1.0)}
    assert_same_program(condition(fused_market(), data), MARKET.fused(KEPT))


def test_condition_on_a_dropped_site_is_an_error():
    """Nothing depends on y here: it is neither kept nor computed."""
    fused = fused_market(keep=["a"])
    with pytest.raises(pm.PyroMacroError, match="'y' is conditioned on.*keep"):
        condition(fused, {"y": ANY["y"]})()


# Around do: what a site would have been


def natural_given(values, data, name):
    """``E[name | data]`` where the natural values of sites that are set are data."""
    names = [*data, name]
    mean, cov = MARKET.law(names, values)
    gain = torch.linalg.solve(cov[:-1, :-1], cov[:-1, -1])
    mean = mean[-1] + gain @ (torch.stack(list(data.values())) - mean[:-1])
    return mean, cov[-1, -1] - gain @ cov[:-1, -1]


def test_condition_outside_of_do_on_the_same_site_is_of_its_natural_value():
    """``b`` under do(a = 2) where ``a`` would have been 0.5: h is learned about."""
    data, values = {"a": ANY["a"]}, {"a": 2.0}
    fused = condition(done(fused_market(), tensors(values)), data)
    mean, variance = natural_given(values, data, "b")
    fn = poutine.trace(fused).get_trace().nodes["b"]["fn"]
    torch.testing.assert_close(fn.mean, mean, **TOLERANCE)
    torch.testing.assert_close(fn.variance, variance, **TOLERANCE)


def test_condition_inside_of_do_on_the_same_site_is_of_its_natural_value():
    data, values = {"a": ANY["a"]}, {"a": 2.0}
    fused = done(condition(fused_market(), data), tensors(values))
    mean, variance = natural_given(values, data, "b")
    trace = poutine.trace(fused).get_trace()
    torch.testing.assert_close(trace.nodes["b"]["fn"].mean, mean, **TOLERANCE)
    torch.testing.assert_close(trace.nodes["b"]["fn"].variance, variance, **TOLERANCE)


# uncondition


def test_uncondition_outside_draws_what_is_observed():
    y = torch.tensor(6.0)
    fused = fused_market(model_args=(y,))
    trace = poutine.trace(poutine.uncondition(fused)).get_trace(y)
    assert not trace.nodes["y"]["is_observed"]
    assert trace.nodes["y"]["value"] != y
    assert_same_program(
        poutine.uncondition(fused), poutine.uncondition(MARKET.fused(KEPT)), y
    )


def test_uncondition_inside_leaves_nothing_observed():
    inside = poutine.uncondition(condition(market, {"b": ANY["b"]}))
    fused = fused_market(inside, keep=["a", "y"])
    trace = assert_same_program(fused, MARKET.fused(["a", "y"]))
    assert set(stochastic(trace)) == {"a", "y"}


def test_condition_inside_on_a_plate_of_data():
    y = torch.tensor([1.0, 4.0, 9.0])

    def model():
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3, dim=-1):
            h = pyro.sample("h", dist.Normal(t, 2.0))
            pyro.sample("y", dist.Normal(h, 1.0))

    def by_hand():
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3, dim=-1):
            pyro.sample("y", dist.Normal(t, 5.0**0.5), obs=y)

    assert_same_program(pm.consolidate(condition(model, {"y": y}), "t"), by_hand)
    assert_same_program(condition(pm.consolidate(model, ["t", "y"]), {"y": y}), by_hand)
