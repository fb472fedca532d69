# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs: plain calls and traces, and what is left alone."""

import functools
import inspect
import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    OF_A,
    SETTINGS,
    TOLERANCE,
    assert_same_law,
    done,
    fused_market,
    gaussian_law,
    market,
    table_of,
    tensors,
    weather,
    weather_joint,
    weather_table,
)
from .models import (
    assert_same_gradients,
    assert_same_program,
    is_deterministic,
    stochastic,
)

Y = torch.tensor(6.0, dtype=torch.float64)


# Plain call


def test_plain_call_returns_what_the_model_returns():
    fused = fused_market()
    trace = poutine.trace(fused).get_trace()
    assert trace.nodes["_RETURN"]["value"] is trace.nodes["y"]["value"]
    assert torch.equal(fused(Y), Y)


def test_plain_call_returns_a_function_of_what_is_kept():
    def model():
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Normal(h, 1.0))
        return {"a": a, "twice": (2 * a, torch.tensor(5.0))}

    trace = poutine.trace(pm.consolidate(model, "a")).get_trace()
    a, found = trace.nodes["a"]["value"], trace.nodes["_RETURN"]["value"]
    torch.testing.assert_close(found, {"a": a, "twice": (2 * a, torch.tensor(5.0))})


def test_plain_call_draws_anew_each_time():
    fused = fused_market()
    assert len({fused().item() for _ in range(5)}) == 5


def test_plain_call_has_the_signature_and_the_name_of_the_model():
    fused = fused_market()
    assert inspect.signature(fused) == inspect.signature(market)
    assert fused.__name__ == "market"
    assert fused.unfused is market
    assert fused.sites == KEPT
    for name in KEPT:
        assert name in repr(fused)


@pytest.mark.parametrize("values", [*SETTINGS, {"a": 2.0}, {"b": 2.0}], ids=str)
def test_plain_call_draws_as_often_as_in_closed_form(values):
    n, model = 20000, done(fused_market(), tensors(values))
    with pyro.plate("draws", n, dim=-1):
        trace = poutine.trace(model).get_trace()
    names = [name for name in KEPT if name not in values]
    draws = torch.stack([trace.nodes[name]["value"] for name in names], -1)
    mean, cov = MARKET.law(names, values)
    deviation = cov.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / n**0.5).all()
    size = torch.outer(deviation, deviation)
    assert ((draws.T.cov() - cov).abs() < 5 * size * (2 / n) ** 0.5).all()


def test_plain_call_of_a_finite_program_draws_as_often_as_in_the_table():
    n = 20000
    with pyro.plate("draws", n, dim=-1):
        trace = poutine.trace(pm.consolidate(weather, ["a", "b"])).get_trace()
    a, b = (trace.nodes[name]["value"] for name in "ab")
    found = torch.bincount((2 * a + b).long(), minlength=4) / n
    wanted = weather_table(["a", "b"]).flatten()
    assert ((found - wanted).abs() < 5 * (wanted * (1 - wanted) / n).sqrt()).all()


# trace


@pytest.mark.parametrize("keep", [KEPT, ("a", "y"), ("b", "y"), ("h", "y"), ("y",)])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_trace_has_the_density_in_closed_form(keep, values):
    model = done(fused_market(keep=keep), tensors(values))
    trace = poutine.trace(model).get_trace(Y)
    order = [name for name in MARKET.scales if name in keep]
    point = torch.stack([trace.nodes[name]["value"] for name in order])
    mean, cov = MARKET.law(order, values)
    wanted = dist.MultivariateNormal(mean, cov).log_prob(point)
    torch.testing.assert_close(trace.log_prob_sum(), wanted, **TOLERANCE)
    assert set(stochastic(trace)) == {*keep, *values}
    assert trace.nodes["y"]["is_observed"]


@pytest.mark.parametrize("keep", [KEPT, ("b", "y"), ("y",)])
@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_trace_has_the_sites_by_hand(keep, values):
    model = done(fused_market(keep=keep), tensors(values))
    by_hand = MARKET.fused(keep, **values)
    trace = assert_same_program(model, by_hand, macros=("m",))
    assert list(trace.stochastic_nodes) == list(keep)
    assert_same_program(model, by_hand, Y, macros=("m",))


def test_trace_holds_a_fused_site_that_is_set_as_a_deterministic_one():
    trace = poutine.trace(done(fused_market(), tensors({"m": 1.5}))).get_trace()
    trace.compute_log_prob()
    site = trace.nodes["m"]
    assert is_deterministic(site)
    assert site["is_observed"]
    assert site["value"] == 1.5
    assert site["log_prob_sum"] == 0


@pytest.mark.parametrize("values", [{}, {"m": 2}, {"h": 1}, {"m": 0, "h": 0}], ids=str)
def test_trace_of_a_finite_program_has_the_table_by_hand(values):
    def model():
        with poutine.block(hide=["y"]):
            fused()

    fused = pm.consolidate(weather, ["a", "b"], allow=["m", "h"])
    found = table_of(done(model, tensors(values)), ["a", "b"])
    wanted = weather_table(["a", "b"], values)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("values", [{}, {"m": 2}], ids=str)
def test_trace_of_a_finite_program_has_mixtures_below_it(values):
    """``P(a, b, y) = sum over h, m of P(h, a, m, b) N(y; b - m + 0.5, 0.7)``."""
    fused = done(pm.consolidate(weather, ["a", "b"], ["m"]), tensors(values))
    y = torch.tensor(0.3)
    for a, b in [(0, 0), (0, 1), (1, 0), (1, 1)]:
        data = tensors({"a": float(a), "b": float(b)})
        trace = poutine.trace(poutine.condition(fused, data)).get_trace(y)
        m = torch.arange(3.0) if "m" not in values else torch.tensor(values["m"])
        density = dist.Normal(b - m + 0.5, 0.7).log_prob(y).exp()
        wanted = (weather_joint(values)[:, a, :, b].sum(0) * density).sum().log()
        torch.testing.assert_close(trace.log_prob_sum(), wanted, **TOLERANCE)


def test_trace_of_a_finite_program_alone_in_what_is_kept():
    fused = pm.consolidate(weather, ["y"])
    trace = poutine.trace(fused).get_trace(torch.tensor(0.3))
    density = torch.zeros(())
    for (_, _, m, b), p in np.ndenumerate(weather_joint().numpy()):
        density += p * dist.Normal(b - m + 0.5, 0.7).log_prob(torch.tensor(0.3)).exp()
    torch.testing.assert_close(trace.log_prob_sum(), density.log(), **TOLERANCE)


def test_trace_holds_other_statements_as_they_are():
    def model():
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Normal(h, 1.0))
        pyro.factor("f", -(a**2))
        pyro.deterministic("d", 2 * a)

    trace = poutine.trace(pm.consolidate(model, ["a", "d"])).get_trace()
    trace.compute_log_prob()
    a = trace.nodes["a"]["value"]
    torch.testing.assert_close(trace.nodes["f"]["log_prob_sum"], -(a**2))
    torch.testing.assert_close(trace.nodes["d"]["value"], 2 * a)
    assert is_deterministic(trace.nodes["d"])
    wanted = dist.Normal(0.0, 2**0.5).log_prob(a) - a**2
    torch.testing.assert_close(trace.log_prob_sum(), wanted, **TOLERANCE)


def test_trace_of_what_does_not_fuse_is_that_of_the_program():
    # A factor of h is no conditional distribution of anything: h stays
    def model():
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        pyro.factor("f", h.cos())
        pyro.sample("a", dist.Normal(h, 1.0))

    fused = pm.consolidate(model, ["a"])
    assert fused.sites == ("h", "f", "a")
    assert_same_program(fused, model)


# Parameters


def trained(y=None):
    weight = pyro.param("weight", torch.tensor(2.0))
    scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
    h = pyro.sample("h", dist.Normal(1.0, 1.5))
    a = pyro.sample("a", dist.Normal(weight * h, 1.0))
    m = pyro.sample("m", dist.Normal(a - h, scale))
    b = pyro.sample("b", dist.Normal(0.5 * m + h, 1.2))
    return pyro.sample("y", dist.Normal(b + m + 3, 0.7), obs=y)


def trained_by_hand(keep, **values):
    def program(y=None):
        weight = pyro.param("weight", torch.tensor(2.0))
        scale = pyro.param("scale", torch.tensor(0.5), constraint=constraints.positive)
        law = MARKET.with_weight("a", "h", weight).with_scale("m", scale)
        return law.emit(keep, values, y)

    return program


@pytest.mark.parametrize("keep", [KEPT, ("y",)])
@pytest.mark.parametrize("data", [{}, {"y": 1.0}], ids=str)
def test_trace_has_the_gradients_in_closed_form(keep, data):
    model = poutine.condition(fused_market(trained, keep), tensors(data))
    by_hand = poutine.condition(trained_by_hand(keep), tensors(data))
    assert_same_program(model, by_hand)
    assert_same_gradients(model, by_hand)


def test_trace_has_the_gradients_in_closed_form_where_a_fused_site_is_set():
    model = poutine.do(fused_market(trained), tensors({"m": 1.5}))
    law = trained_by_hand(KEPT, m=1.5)
    pyro.param("weight", torch.tensor(2.0))
    trace = poutine.trace(model).get_trace(Y)
    for node in stochastic(trace).values():
        node["value"] = node["value"].detach()
    weight = pyro.get_param_store()["weight"]
    gradients = []
    for program in (poutine.replay(model, trace=trace), poutine.replay(law, trace)):
        log_prob = poutine.trace(program).get_trace(Y).log_prob_sum()
        gradients.append(torch.autograd.grad(log_prob, weight)[0])
    assert gradients[1] != 0
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_trace_follows_parameters_that_change():
    fused = fused_market(trained)
    fused()
    for weight in (2.0, -1.0, 0.0):
        with torch.no_grad():
            pyro.get_param_store()["weight"] = torch.tensor(weight)
        law = MARKET.with_weight("a", "h", weight)
        found, wanted = gaussian_law(fused, KEPT), law.law(KEPT, {})
        torch.testing.assert_close(found, wanted, **TOLERANCE)


# Arguments


def test_arguments_are_what_the_laws_are_computed_from():
    def model(x, scale, *, shift):
        h = pyro.sample("h", dist.Normal(x["left"], 1.0))
        a = pyro.sample("a", dist.Normal(h * x["right"], scale))
        pyro.sample("b", dist.Normal(h + a + shift, 1.0))

    def tensor(left, right):
        return {"left": torch.tensor(left), "right": torch.tensor(right)}

    fused = pm.consolidate(
        model, ["a", "b"], model_args=(tensor(0.0, 1.0), 1.0), model_kwargs={"shift": 1}
    )
    for x, scale, shift in [
        (tensor(2.0, -1.0), 1.0, 1),
        (tensor(1.0, 0.0), 1.0, 1),
        (tensor(1.0, 3.0), 0.1, 1),
        (tensor(1.0, 3.0), 0.1, torch.tensor(5.0)),
    ]:

        def run(program, x=x, scale=scale, shift=shift):
            return lambda: program(x, scale=scale, shift=shift)

        assert_same_law(run(fused), run(model), ["a", "b"])


def test_arguments_of_another_shape_make_another_program():
    def model(x, y=None):
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), dim=-1):
            pyro.sample("y", dist.Normal(slope * x + h, 0.5), obs=y)

    fused = pm.consolidate(model, ["slope", "y"], model_args=(torch.ones(2),))
    for x in (torch.ones(2), torch.tensor([1.0, 2.0]), torch.arange(4.0)):
        assert_same_law(fused, model, ["slope", "y"], x)


def test_arguments_that_are_observed_stay():
    fused = fused_market(keep=["a"], model_args=(Y,))
    assert fused.sites == ("a", "y")
    trace = poutine.trace(fused).get_trace(torch.tensor(1.0))
    assert trace.nodes["y"]["value"] == 1.0


class Batch:
    """Data as some libraries hand it out: what it holds may change."""

    def __init__(self, values):
        self.values = values

    def __getitem__(self, i):
        return self.values[i]


@pytest.mark.parametrize("kind", [np.array, list, Batch, lambda v: {0: v[0], 1: v[1]}])
def test_arguments_that_are_no_tensors_are_seen_to_change(kind):
    def model(x):
        h = pyro.sample("h", dist.Normal(float(x[0]), 1.0))
        pyro.sample("a", dist.Normal(h * float(x[1]), 1.0))

    def check(x, first, second):
        mean, cov = gaussian_law(fused, ["a"], x)
        torch.testing.assert_close(mean, torch.tensor([first * second]))
        torch.testing.assert_close(cov, torch.tensor([[second**2 + 1]]))

    fused = pm.consolidate(model, "a", model_args=(kind([1.0, 2.0]),))
    for first, second in [(1.0, 2.0), (3.0, 2.0), (1.0, -1.0), (1.0, 2.0)]:
        check(kind([first, second]), first, second)
    x = kind([1.0, 2.0])
    check(x, 1.0, 2.0)
    (x.values if isinstance(x, Batch) else x)[0] = 10.0
    check(x, 10.0, 2.0)


def test_arguments_have_gradients():
    def model(x):
        h = pyro.sample("h", dist.Normal(x[0], 1.0))
        pyro.sample("a", dist.Normal(h * x[1], 1.0))

    fused = pm.consolidate(model, "a", model_args=(torch.zeros(2),))
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    data = poutine.condition(fused, {"a": torch.tensor(5.0)})
    found = poutine.trace(data).get_trace(x).log_prob_sum()
    wanted = dist.Normal(x[0] * x[1], (x[1] ** 2 + 1).sqrt()).log_prob(
        torch.tensor(5.0)
    )
    torch.testing.assert_close(found, wanted, **TOLERANCE)
    gradients = [torch.autograd.grad(v, x)[0] for v in (found, wanted)]
    torch.testing.assert_close(*gradients, **TOLERANCE)


# Ways to run


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("where", ["both", "run", "consolidate"])
def test_runs_without_gradients(mode, where):
    pyro.param("weight", torch.tensor(2.0))
    if where == "run":
        fused = fused_market(trained, allow=["m", "h"])
    else:
        with mode():
            fused = fused_market(trained, allow=["m", "h"])
    for values in ({}, {"m": 1.5}, {"h": 0.5}):
        model = done(fused, tensors(values))
        if where == "consolidate":
            found = gaussian_law(model, KEPT)
        else:
            with mode():
                found = gaussian_law(model, KEPT)
        torch.testing.assert_close(found, MARKET.law(KEPT, values), **TOLERANCE)


@pytest.mark.parametrize("values", [*SETTINGS, {"a": 2.0}], ids=str)
def test_runs_in_single_precision(values):
    torch.set_default_dtype(torch.float32)
    fused = fused_market()
    data = {name: torch.tensor(value) for name, value in values.items()}
    trace = poutine.trace(done(fused, data)).get_trace()
    for name in KEPT:
        assert trace.nodes[name]["value"].dtype == torch.float32
        assert trace.nodes[name]["fn"].mean.dtype == torch.float32
    found = gaussian_law(done(fused, data), KEPT)
    wanted = MARKET.law(KEPT, values)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_runs_of_methods_and_partial_functions():
    class Model:
        level = 2.0

        def __call__(self, y=None):
            return self.method(1.0, y=y)

        def method(self, scale, y=None):
            h = pyro.sample("h", dist.Normal(self.level, 1.0))
            return pyro.sample("a", dist.Normal(h, scale), obs=y)

    model = Model()
    wanted = torch.tensor([2.0]), torch.tensor([[2.0]])
    for callable_ in (model, functools.partial(model.method, 1.0), model.__call__):
        fused = pm.consolidate(callable_, "a")
        torch.testing.assert_close(gaussian_law(fused, ["a"]), wanted, **TOLERANCE)
    fused = pm.consolidate(model.method, "a", model_args=(1.0,))
    found = gaussian_law(fused, ["a"], 1.0)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_runs_that_call_it_more_than_once():
    fused = fused_market()

    def model():
        with poutine.block():
            fused()
        first = fused()
        with poutine.block(), poutine.do(data=tensors({"m": 5.0})):
            fused()
        return first

    assert_same_program(model, MARKET.fused(KEPT))


# What is left alone


def test_random_state_is_left_as_it_was():
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    for model, keep in [(market, KEPT), (weather, ["a"]), (trained, ["y"])]:
        pm.consolidate(model, keep, allow=["m"])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


def test_random_state_of_a_run_does_not_depend_on_what_was_prepared():
    """A run that prepares the program for its arguments draws what others draw."""
    draws = []
    for arguments in ((), (Y,)):
        fused = fused_market(model_args=arguments)
        for _ in range(2):
            pyro.set_rng_seed(5)
            trace = poutine.trace(fused).get_trace()
            draws.append([trace.nodes[name]["value"].item() for name in KEPT])
    assert draws[0] == draws[1] == draws[2] == draws[3]


@pytest.mark.parametrize("values", SETTINGS, ids=str)
@pytest.mark.parametrize("model, keep", [(market, KEPT), (weather, ["a", "b", "y"])])
def test_same_seed_gives_the_same_draws(model, keep, values):
    draws = []
    for _ in range(2):
        fused = done(pm.consolidate(model, keep, ["m"]), {"m": torch.tensor(1)})
        for _ in range(2):
            pyro.set_rng_seed(5)
            trace = poutine.trace(fused).get_trace()
            draws.append([trace.nodes[name]["value"].item() for name in keep])
    assert draws[0] == draws[1] == draws[2] == draws[3]


def test_param_store_is_left_as_it_was():
    pyro.param("other", torch.tensor(1.0))
    fused = fused_market(trained)
    assert set(pyro.get_param_store().keys()) == {"other"}
    fused()
    assert set(pyro.get_param_store().keys()) == {"other", "weight", "scale"}


def test_param_store_keeps_the_values_it_has():
    pyro.param("weight", torch.tensor(7.0))
    unconstrained = pyro.param("weight").unconstrained()
    fused = fused_market(trained)
    fused()
    assert pyro.param("weight").unconstrained() is unconstrained
    assert pyro.param("weight") == 7.0


def test_params_are_initialized_once_a_run():
    calls = []

    def start():
        calls.append(1)
        return torch.randn(())

    def model():
        weight = pyro.param("weight", start)
        h = pyro.sample("h", dist.Normal(weight, 1.0))
        pyro.sample("a", dist.Normal(h, 1.0))

    fused = pm.consolidate(model, "a")
    calls.clear()
    weight = poutine.trace(fused).get_trace().nodes["a"]["fn"].mean
    assert len(calls) == 1
    torch.testing.assert_close(weight, pyro.param("weight"))
    fused()
    assert len(calls) == 1


def test_model_is_left_as_it_was():
    before = {**vars(market)}
    table = torch.tensor(OF_A)

    def model():
        a = pyro.sample("a", dist.Bernoulli(0.5))
        m = pyro.sample("m", dist.Categorical(table[a.long()]))
        pyro.sample("b", dist.Bernoulli(0.1 + 0.2 * m))

    fused_market()
    fused = pm.consolidate(model, "b", allow=["m"])
    poutine.do(fused, tensors({"m": 1}))()
    assert vars(market) == before
    assert torch.equal(table, torch.tensor(OF_A))
    wanted = poutine.trace(model).get_trace()
    assert set(stochastic(wanted)) == {"a", "m", "b"}


def test_validation_is_left_as_it_was():
    for enabled in (True, False):
        with pyro.validation_enabled(enabled):
            fused_market()()
            assert pyro.poutine.util.is_validation_enabled() == enabled


def test_statements_are_shown_once_to_handlers_outside():
    seen = []

    class Count(poutine.messenger.Messenger):
        def _process_message(self, msg):
            seen.append((msg["type"], msg["name"]))

    with Count():
        fused = fused_market(trained)
    assert not seen
    with Count():
        fused()
        first = list(seen)
        fused(Y)
    assert sorted(first) == [
        ("param", "scale"),
        ("param", "weight"),
        ("sample", "a"),
        ("sample", "b"),
        ("sample", "y"),
    ]
    assert sorted(seen) == sorted(2 * first)


def test_handlers_around_consolidate_do_not_act_on_what_is_read():
    """What stands around the call of ``consolidate`` is not around the model."""
    with poutine.do(data=tensors({"m": 5.0})), poutine.condition(data={"h": Y}):
        with poutine.trace() as recorded, poutine.mask(mask=False):
            fused = fused_market()
    assert not stochastic(recorded.trace)
    found, wanted = gaussian_law(fused, KEPT), MARKET.law(KEPT, {})
    torch.testing.assert_close(found, wanted, **TOLERANCE)


# Consolidated twice


def test_consolidated_twice_is_as_consolidated_once():
    twice = pm.consolidate(fused_market(), ["b", "y"])
    assert twice.sites == ("b", "y")
    found, wanted = gaussian_law(twice, ["b", "y"]), MARKET.law(["b", "y"], {})
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_law_that_is_read_is_that_in_closed_form():
    """The comparison itself: of the program as it is, and of one that differs."""
    for values in ({}, {"m": 1.5}, {"a": 2.0}, {"a": 1.0, "m": 2.0}):
        found = gaussian_law(done(market, tensors(values)), KEPT)
        torch.testing.assert_close(found, MARKET.law(KEPT, values), **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_same_law(fused_market(), done(market, tensors({"m": 1.5})), KEPT)
    with pytest.raises(AssertionError):
        other = MARKET.with_scale("m", 0.6)
        assert_same_program(fused_market(), other.fused(KEPT))
    hidden = poutine.block(weather, hide=["y"])
    wanted = weather_table(["a", "m", "b"])
    torch.testing.assert_close(table_of(hidden, ["a", "m", "b"]), wanted)
