# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs under ``do``, inside and outside, on every kind of site."""

import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import do

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    TOLERANCE,
    assert_same_law,
    done,
    fused_market,
    gaussian_law,
    market,
    table_of,
    tensors,
    valued,
    weather,
    weather_table,
)
from .models import stochastic

VALUES = {"h": -1.0, "a": 2.0, "m": 1.5, "b": -3.0}
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(VALUES, n)]


def law_of(model, values):
    """The law of the kept sites that are not set themselves."""
    return gaussian_law(model, [name for name in KEPT if name not in values])


def wanted_law(values):
    return MARKET.law([name for name in KEPT if name not in values], values)


# Outside


@pytest.mark.parametrize("names", SUBSETS, ids=str)
def test_do_outside_has_the_law_of_the_program_under_it(names):
    values = {name: VALUES[name] for name in names}
    fused = fused_market(allow=["m", "h"])
    found = law_of(do(fused, tensors(values)), values)
    torch.testing.assert_close(found, wanted_law(values), **TOLERANCE)
    unfused = law_of(do(market, tensors(values)), values)
    torch.testing.assert_close(found, unfused, **TOLERANCE)


@pytest.mark.parametrize("form", ["wrapper", "decorator", "context"])
@pytest.mark.parametrize("name", ["a", "m"])
def test_do_outside_in_each_of_its_forms(form, name):
    values, fused = {name: VALUES[name]}, fused_market()
    if form == "wrapper":
        model = do(fused, tensors(values))
    elif form == "decorator":
        model = do(data=tensors(values))(fused)
    else:

        def model():
            with do(data=tensors(values)):
                return fused()

    torch.testing.assert_close(law_of(model, values), wanted_law(values), **TOLERANCE)


def test_do_outside_on_a_kept_site_shows_what_it_would_have_been():
    """The natural value is in the trace, as in a program that is not fused."""
    model = do(fused_market(), tensors({"a": 2.0}))
    trace = poutine.trace(model).get_trace()
    assert set(stochastic(trace)) == set(KEPT)
    assert not trace.nodes["a"]["is_observed"]
    assert trace.nodes["a"]["value"] != 2.0
    torch.testing.assert_close(trace.nodes["a"]["fn"].mean, torch.tensor(2.0))
    torch.testing.assert_close(trace.nodes["a"]["fn"].variance, torch.tensor(10.0))


@pytest.mark.parametrize("names", [["a"], ["b"], ["a", "m"], ["a", "b"]], ids=str)
def test_do_outside_on_a_kept_site_has_one_joint_law_with_its_natural_value(names):
    """As in a single-world intervention graph: both have h for a cause."""
    values = {name: VALUES[name] for name in names}
    model = do(fused_market(), tensors(values))
    found = assert_same_law(model, do(market, tensors(values)), KEPT)
    torch.testing.assert_close(found, MARKET.law(KEPT, values), **TOLERANCE)


@pytest.mark.parametrize("value", [0.0, 0, torch.tensor(0.0), torch.zeros(())])
@pytest.mark.parametrize("name", ["a", "m"])
def test_do_outside_with_zero_in_each_of_its_forms(value, name):
    model = do(fused_market(), {name: value})
    wanted = wanted_law({name: 0.0})
    torch.testing.assert_close(law_of(model, [name]), wanted, **TOLERANCE)


def test_do_outside_returns_the_value_that_is_set():
    def model():
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        m = pyro.sample("m", dist.Normal(h, 1.0))
        a = pyro.sample("a", dist.Normal(h + m, 1.0))
        return a

    fused = pm.consolidate(model, "a", allow=["m"])
    assert do(fused, tensors({"a": 5.0}))() == 5.0


@pytest.mark.parametrize("values", [{"h": 1}, {"a": 1}, {"m": 2}, {"m": 0, "a": 0}])
def test_do_outside_of_a_finite_program(values):
    def model():
        with poutine.block(hide=["y"]):
            fused()

    fused = pm.consolidate(weather, ["a", "b"], allow=["m", "h"])
    names = [name for name in ("a", "b") if name not in values]
    found = table_of(do(model, tensors(values)), names)
    wanted = weather_table(names, values)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_do_outside_of_a_finite_program_has_one_joint_law_with_its_natural_value():
    def model():
        with poutine.block(hide=["y"]):
            fused()

    fused = pm.consolidate(weather, ["a", "b"], allow=["m", "h"])
    for values in ({"a": 1}, {"a": 0}, {"a": 1, "m": 2}):
        found = table_of(do(model, tensors(values)), ["a", "b"])
        wanted = weather_table(["a", "b"], values)
        torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_do_outside_of_an_explicit_intervention():
    allow = [{"m": 1.5}, {"m": 0.0, "h": 1.0}]
    fused = fused_market(allow=allow)
    for values in allow:
        found = law_of(do(fused, tensors(values)), values)
        torch.testing.assert_close(found, wanted_law(values), **TOLERANCE)
        with_kept = {**values, "a": 4.0}
        found = law_of(do(fused, tensors(with_kept)), with_kept)
        torch.testing.assert_close(found, wanted_law(with_kept), **TOLERANCE)
    for values in ({"m": 1.0}, {"h": 1.0}, {"m": 1.5, "h": 1.0}, {"h": 1.0, "m": 0.1}):
        with pytest.raises(pm.InterventionNotAllowed):
            do(fused, tensors(values))()


def test_do_outside_on_a_deterministic_site_that_is_fused():
    def model():
        h = pyro.sample("h", dist.Normal(1.0, 1.5))
        d = pyro.deterministic("d", 2 * h)
        a = pyro.sample("a", dist.Normal(d, 1.0))
        pyro.sample("b", dist.Normal(a + h, 1.0))

    fused = pm.consolidate(model, ["a", "b"], allow=["d"])
    assert_same_law(fused, model, ["a", "b"])
    data = tensors({"d": 5.0})
    assert_same_law(do(fused, data), do(model, data), ["a", "b"])


def test_do_outside_on_a_deterministic_site_that_is_kept():
    def model():
        h = pyro.sample("h", dist.Normal(1.0, 1.5))
        a = pyro.sample("a", dist.Normal(h, 1.0))
        d = pyro.deterministic("d", 2 * a)
        pyro.sample("b", dist.Normal(d + h, 1.0))

    fused = pm.consolidate(model, ["a", "d", "b"])
    assert_same_law(fused, model, ["a", "b"])
    data = tensors({"d": 5.0})
    assert_same_law(do(fused, data), do(model, data), ["a", "b"])
    nodes = poutine.trace(do(fused, data)).get_trace().nodes
    torch.testing.assert_close(nodes["d"]["value"], 2 * nodes["a"]["value"])


def test_do_outside_on_an_observed_site():
    y = torch.tensor(6.0)
    fused = fused_market(keep=["a"], model_args=(y,))
    data = tensors({"y": 1.0})
    trace = poutine.trace(do(fused, data)).get_trace(y)
    assert trace.nodes["y"]["value"] == y
    assert do(fused, data)(y) == 1.0


# Inside


@pytest.mark.parametrize("names", SUBSETS, ids=str)
def test_do_inside_has_the_law_of_the_program_under_it(names):
    """What it would have been is a site of that program, like any other."""
    values = {name: VALUES[name] for name in names}
    fused = fused_market(do(market, tensors(values)), keep=KEPT, allow=())
    found = gaussian_law(fused, KEPT)
    torch.testing.assert_close(found, MARKET.law(KEPT, values), **TOLERANCE)
    assert fused.sites == KEPT


def test_do_inside_makes_what_it_cuts_off_disappear():
    fused = pm.consolidate(do(market, tensors({"m": 1.5, "h": 0.0})), ["y"])
    assert fused.sites == ("y",)
    torch.testing.assert_close(
        gaussian_law(fused, ["y"]), MARKET.law(["y"], {"m": 1.5, "h": 0.0}), **TOLERANCE
    )


@pytest.mark.parametrize("inside", [["a"], ["m"], ["h"]], ids=str)
@pytest.mark.parametrize("outside", [["a"], ["m"], ["b"], ["a", "m"]], ids=str)
def test_do_inside_and_outside(inside, outside):
    """On one site that inside wins: what is set outside no one is computed from."""
    first = {name: VALUES[name] for name in inside}
    second = {name: VALUES[name] + 5.0 for name in outside}
    fused = fused_market(do(market, tensors(first)))
    values = {**second, **first}
    found = law_of(do(fused, tensors(second)), values)
    torch.testing.assert_close(found, wanted_law(values), **TOLERANCE)
    if not set(inside) & set(outside):  # Pyro itself does not end at a site set twice
        unfused = law_of(do(do(market, tensors(first)), tensors(second)), values)
        torch.testing.assert_close(found, unfused, **TOLERANCE)


def test_do_inside_with_a_value_that_is_an_argument():
    def model(value):
        return do(market, {"m": value})()

    fused = pm.consolidate(model, KEPT, model_args=(torch.tensor(0.0),))
    for m in (1.5, -4.0):
        found = gaussian_law(fused, KEPT, torch.tensor(m))
        torch.testing.assert_close(found, MARKET.law(KEPT, {"m": m}), **TOLERANCE)


# Twice


@pytest.mark.parametrize("first", [["a"], ["m"], ["h"]], ids=str)
@pytest.mark.parametrize("second", [["b"], ["h"], ["m"], ["b", "h"]], ids=str)
def test_two_do_outside_each_act(first, second):
    """On a fused site the inner one wins, as inside."""
    inner = {name: VALUES[name] for name in first}
    outer = {name: VALUES[name] + 5.0 for name in second}
    fused = fused_market(allow=["m", "h"])
    values = {**outer, **inner}
    found = law_of(do(do(fused, tensors(inner)), tensors(outer)), values)
    torch.testing.assert_close(found, wanted_law(values), **TOLERANCE)


def test_two_do_outside_on_one_kept_site_are_an_error_as_in_pyro():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        for model in (fused_market(), market):
            twice = do(do(model, tensors({"a": 1.0})), tensors({"a": 2.0}))
            with pytest.raises((RecursionError, pm.PyroMacroError)):
                twice()


def test_do_outside_leaves_nothing_behind():
    """Runs under interventions and without take turns."""
    fused = fused_market(allow=["m", "h"])
    for values in ({}, {"m": 1.5}, {}, {"h": 0.0}, {"a": 1.0}, {"m": 2.5}, {}):
        found = law_of(done(fused, tensors(values)), values)
        torch.testing.assert_close(found, wanted_law(values), **TOLERANCE)


# Chains: the last one wins


def chain(n=6):
    x = pyro.sample("x0", dist.Normal(1.0, 1.0))
    for t in range(1, n):
        x = pyro.sample(f"x{t}", dist.Normal(0.9 * x, 0.5))
    return x


@pytest.mark.parametrize("times", [[2], [4], [2, 4], [1, 2, 3, 4], [0], [0, 3]])
def test_do_along_a_chain_the_last_one_wins(times):
    names = [f"x{t}" for t in range(1, 5)]
    fused = pm.consolidate(chain, ["x0", "x5"], allow=names)
    assert fused.sites == ("x0", "x5")
    data = tensors({f"x{t}": float(10 * t + 1) for t in times})
    last = max(times)
    mean = torch.tensor(0.9 ** (5 - last) * (10 * last + 1))
    variance = torch.tensor(sum(0.25 * 0.81**k for k in range(5 - last)))
    for _ in range(2):
        fn = poutine.trace(do(fused, data)).get_trace().nodes["x5"]["fn"]
        torch.testing.assert_close(fn.mean, mean, **TOLERANCE)
        torch.testing.assert_close(fn.variance, variance, **TOLERANCE)


def test_do_along_a_chain_cuts_off_what_was_before():
    fused = pm.consolidate(chain, ["x0", "x5"], allow=["x3"])
    data = tensors({"x3": 1.0})
    _, cov = gaussian_law(do(fused, data), ["x0", "x5"])
    assert cov[0, 1] == 0
    _, cov = gaussian_law(fused, ["x0", "x5"])
    torch.testing.assert_close(cov[0, 1], torch.tensor(0.9**5), **TOLERANCE)


# Values


@pytest.mark.parametrize("name", ["a", "m"])
def test_do_outside_takes_a_grid_along_a_plate(name):
    grid = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    fused = do(fused_market(), {name: grid})

    def run():
        with pyro.plate("grid", 4, dim=-1):
            fused()

    start = tensors({n: torch.zeros(4) for n in KEPT})
    nodes = poutine.trace(valued(run, start)).get_trace().nodes
    for i, value in enumerate(grid):
        single = do(fused_market(), {name: value})
        start = tensors(dict.fromkeys(KEPT, 0.0))
        wanted = poutine.trace(valued(single, start)).get_trace().nodes
        for kept in KEPT:
            if kept == name:
                continue
            fn, expected = nodes[kept]["fn"], wanted[kept]["fn"]
            torch.testing.assert_close(fn.mean.expand(4)[i], expected.mean, **TOLERANCE)
            torch.testing.assert_close(
                fn.variance.expand(4)[i], expected.variance, **TOLERANCE
            )


def test_do_outside_refuses_what_does_not_fit_a_fused_site():
    """Pyro takes any value in silence."""
    fused = fused_market()
    for value in (torch.tensor(float("nan")), "1.0", None.__class__):
        with pytest.raises((pm.InterventionNotAllowed, NotImplementedError)):
            do(fused, {"m": value})()
    finite = pm.consolidate(weather, ["a", "b"], allow=["m"])
    for value in (3, -1, 0.5, float("inf")):
        with pytest.raises(pm.InterventionNotAllowed, match="m"):
            do(finite, {"m": torch.tensor(value)})()


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.bool])
def test_do_outside_takes_a_value_of_another_dtype(dtype):
    data = {"m": torch.tensor(1).to(dtype)}
    found = law_of(do(fused_market(), data), data)
    torch.testing.assert_close(found, wanted_law({"m": 1.0}), **TOLERANCE)


def test_do_outside_has_gradients_with_respect_to_the_value():
    value = torch.tensor(1.5, requires_grad=True)
    model = do(fused_market(), {"m": value})
    trace = poutine.trace(
        poutine.condition(model, tensors({"a": 1.0, "b": 2.0, "y": 3.0}))
    ).get_trace()
    (found,) = torch.autograd.grad(trace.log_prob_sum(), value)
    # The same of the closed form
    other = torch.tensor(1.5, requires_grad=True)
    law = dist.MultivariateNormal(*MARKET.law(KEPT, {"m": other}))
    density = law.log_prob(torch.tensor([1.0, 2.0, 3.0]))
    (wanted,) = torch.autograd.grad(density, other)
    torch.testing.assert_close(found, wanted, **TOLERANCE)
