# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What a consolidated program was not prepared for is an error, however it is asked.

Pyro is silent about sites that a program does not have. Here they were fused away: an
intervention on them has effects, which could not be computed.
"""

import functools
import itertools
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer import (
    MCMC,
    NUTS,
    SVI,
    Importance,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_dependencies, render_model
from pyro.infer.reparam import LocScaleReparam

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    TOLERANCE,
    fused_market,
    gaussian_law,
    market,
    tensors,
    weather,
)

NOT_ALLOWED = pytest.raises(pm.InterventionNotAllowed)


def in_plate(model):
    def run(*args):
        with pyro.plate("outer", 2, dim=-1):
            return model(*args)

    return run


def in_context(handler):
    def wrap(model):
        def run(*args):
            with handler():
                return model(*args)

        return run

    return wrap


def replay(model):
    return poutine.replay(model, trace=poutine.trace(MARKET.fused(KEPT)).get_trace())


HANDLERS = {
    "trace": poutine.trace,
    "condition": lambda m: poutine.condition(m, tensors({"a": 1.0})),
    "do kept": lambda m: poutine.do(m, tensors({"b": 1.0})),
    "do allowed": lambda m: poutine.do(m, tensors({"m": 1.0})),
    "plate": in_plate,
    "mask": lambda m: poutine.mask(m, mask=False),
    "scale": lambda m: poutine.scale(m, scale=0.5),
    "block others": lambda m: poutine.block(m, hide=["a"]),
    "block expose": lambda m: poutine.block(m, expose=["h", "m", "x", "y"]),
    "lift": lambda m: poutine.lift(m, prior={"none": dist.Normal(0.0, 1.0)}),
    "replay": replay,
    "reparam": lambda m: poutine.reparam(m, {"a": LocScaleReparam()}),
    "config_enumerate": config_enumerate,
    "enum": lambda m: poutine.enum(config_enumerate(m), first_available_dim=-2),
    "infer_config": lambda m: poutine.infer_config(m, config_fn=lambda site: {}),
    "uncondition": poutine.uncondition,
    "seed": lambda m: poutine.seed(m, rng_seed=3),
    "broadcast": poutine.broadcast,
    "context": in_context(lambda: poutine.mask(mask=True)),
    "markov": lambda m: pyro.markov(m),
    "aggregate": lambda m: pm.aggregate(m, [TOTAL]),
    "macro_do": lambda m: pm.macro_do(m, {TOTAL: pm.Allocate(3.0, [0.5, 0.5])}),
}
TOTAL = pm.MacroVariable("total", micro=["w1", "w2"])


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("name", ["h", "x"])
def test_forbidden_do_outside_of_another_handler(handler, name):
    """``x`` would be computed from what is kept alone: it is not allowed, either."""
    model = HANDLERS[handler](forbidding())
    with NOT_ALLOWED as raised:
        poutine.do(model, data=tensors({name: 1.0}))()
    assert f"do({name}" in str(raised.value)
    assert "m" in str(raised.value)


@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("name", ["h", "x"])
def test_forbidden_do_inside_of_another_handler(handler, name):
    model = HANDLERS[handler](poutine.do(forbidding(), data=tensors({name: 1.0})))
    with pytest.raises(pm.PyroMacroError) as raised:
        model()
    if handler != "macro_do":  # it reads ahead, and has an error of its own
        assert raised.type is pm.InterventionNotAllowed


@functools.cache
def forbidding():
    def model(y=None):
        h = pyro.sample("h", dist.Normal(1.0, 1.5))
        a = pyro.sample("a", dist.Normal(2 * h, 1.0))
        m = pyro.sample("m", dist.Normal(a - h, 0.5))
        b = pyro.sample("b", dist.Normal(0.5 * m + h, 1.2))
        x = pyro.deterministic("x", a + b)
        pyro.sample("w1", dist.Normal(h, 1.0))
        pyro.sample("w2", dist.Normal(h, 1.0))
        return pyro.sample("y", dist.Normal(x + m, 0.7), obs=y)

    return pm.consolidate(model, [*KEPT, "w1", "w2"], allow=["m"])


@pytest.mark.parametrize(
    "pair",
    list(itertools.permutations(["plate", "mask", "condition", "replay"], 2)),
    ids=str,
)
def test_forbidden_do_between_two_handlers(pair):
    first, second = (HANDLERS[name] for name in pair)
    data, fused = tensors({"h": 1.0}), forbidding()
    for model in (
        first(poutine.do(second(fused), data=data)),
        poutine.do(first(second(fused)), data=data),
        first(second(poutine.do(fused, data=data))),
    ):
        with NOT_ALLOWED:
            model()


@pytest.mark.parametrize("allowed", ["a", "m"])
def test_forbidden_do_beside_an_allowed_one(allowed):
    both = tensors({allowed: 1.0, "h": 2.0})
    one, other = ({name: value} for name, value in both.items())
    for model in (
        poutine.do(fused_market(), data=both),
        poutine.do(poutine.do(fused_market(), data=one), data=other),
        poutine.do(poutine.do(fused_market(), data=other), data=one),
    ):
        with NOT_ALLOWED as raised:
            model()
        assert "do(h" in str(raised.value)


def test_forbidden_do_under_a_scope():
    fused = fused_market()
    data = tensors({"h": 1.0})
    prefixed = {"s/h": data["h"]}
    for model in (
        scope(poutine.do(fused, data=data), prefix="s"),
        poutine.do(scope(fused, prefix="s"), data=prefixed),
        poutine.do(poutine.mask(scope(fused, prefix="s"), mask=True), data=prefixed),
        poutine.do(
            scope(scope(fused, prefix="s"), prefix="t"), data={"t/s/h": data["h"]}
        ),
        scope(poutine.do(scope(fused, prefix="s"), data=prefixed), prefix="t"),
    ):
        with NOT_ALLOWED as raised:
            model()
        assert "do(h" in str(raised.value)


def test_forbidden_do_under_a_block_that_lets_it_through():
    data, fused = tensors({"h": 1.0}), fused_market()
    for shown in (
        {"hide": ["a", "b"]},
        {"expose": ["h"]},
        {"hide_fn": lambda site: site["name"] == "m"},
        {"hide_types": ["param"]},
        {"expose_types": ["sample"]},
        {"hide_fn": lambda site: site["is_observed"]},
    ):
        with NOT_ALLOWED:
            poutine.do(poutine.block(fused, **shown), data=data)()
    for hidden in ({"hide": ["h"]}, {"hide_all": True}, {"expose": ["y"]}):
        inside = poutine.do(fused, data=data)
        with NOT_ALLOWED:
            poutine.block(inside, **hidden)()


def test_forbidden_do_as_a_context_around_a_caller():
    """The program is called deep inside of what the context is around."""
    fused = fused_market()

    def outer():
        pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 2, dim=-1):
            return fused()

    with NOT_ALLOWED, poutine.do(data=tensors({"h": 1.0})):
        outer()
    outer()


def test_forbidden_do_by_an_effect_of_counterfactual_kind():
    """A do whose data is a trace: all of its sites are set."""
    with pytest.raises((pm.InterventionNotAllowed, pm.PyroMacroError)):
        poutine.do(fused_market(), data={"h": torch.zeros(())})()


@pytest.mark.parametrize("allow", [(), ["m"], [{"m": 1.0}], ["m", {"h": 2.0}]])
def test_message_names_what_was_asked_and_what_is_allowed(allow):
    fused = fused_market(allow=allow)
    with NOT_ALLOWED as raised:
        poutine.do(fused, data=tensors({"h": 7.5}))()
    text = str(raised.value)
    assert "do(h = 7.5)" in text
    if allow:
        assert "m" in text.split("llowed")[-1]
    assert "allow" in text and "keep" in text


def test_program_works_again_after_an_error():
    fused = fused_market()
    with NOT_ALLOWED:
        poutine.do(fused, data=tensors({"h": 1.0}))()
    found = gaussian_law(fused, KEPT)
    torch.testing.assert_close(found, MARKET.law(KEPT, {}), **TOLERANCE)
    assert not pyro.poutine.runtime._PYRO_STACK


def test_params_are_not_made_by_a_run_that_is_refused():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        h = pyro.sample("h", dist.Normal(loc, 1.0))
        pyro.sample("a", dist.Normal(h, 1.0))

    fused = pm.consolidate(model, "a")
    with NOT_ALLOWED:
        poutine.do(fused, data=tensors({"h": 1.0}))()
    assert not set(pyro.get_param_store().keys())


def test_do_under_a_name_that_an_unknown_handler_gave_is_an_error():
    """What reaches a kept site in disguise is never taken for an observation."""

    class Renamed(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            msg["name"] = f"{msg['name']}_of_mine"

    model = poutine.do(Renamed()(fused_market()), data=tensors({"a_of_mine": 1.0}))
    with pytest.raises(pm.PyroMacroError, match="'a'.*a_of_mine"):
        model()


# Through inference


def forbidden(name="h"):
    return poutine.do(fused_market(), data=tensors({name: 1.0}))


def test_forbidden_do_under_predictive():
    for parallel in (True, False):
        for samples in (None, {"a": torch.zeros(3)}):
            predictive = Predictive(
                forbidden(), samples, num_samples=3, parallel=parallel
            )
            with NOT_ALLOWED:
                predictive()


def test_forbidden_do_under_elbos_guides_and_chains():
    y = torch.tensor(1.0)
    guide = AutoNormal(MARKET.fused(KEPT))
    guide(y)
    for vectorized in (True, False):
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorized)
        with NOT_ALLOWED:
            elbo.loss(forbidden(), guide, y)
    with NOT_ALLOWED:
        TraceEnum_ELBO().loss(config_enumerate(forbidden()), guide, y)
    with NOT_ALLOWED:
        SVI(forbidden(), guide, pyro.optim.Adam({}), Trace_ELBO()).step(y)
    with NOT_ALLOWED:
        AutoNormal(forbidden())(y)
    with NOT_ALLOWED:
        MCMC(NUTS(forbidden()), 1, 1, disable_progbar=True).run(y)
    with NOT_ALLOWED:
        Importance(forbidden(), guide, num_samples=2).run(y)


def test_forbidden_do_under_views():
    with NOT_ALLOWED:
        render_model(forbidden())
    with NOT_ALLOWED:
        get_dependencies(forbidden())


def test_forbidden_do_of_a_finite_program():
    fused = pm.consolidate(weather, ["a", "b"], allow=["m"])
    for name in ("h", "y"):  # y is left out, and nothing depends on it
        with NOT_ALLOWED:
            poutine.do(fused, data=tensors({name: 1.0}))()


def test_forbidden_do_of_what_could_not_be_taken_apart():
    """The program is run as it is: that an intervention would work is no promise."""

    def model():
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        scale = 2.0 if h > 0 else 1.0
        a = pyro.sample("a", dist.Normal(h, scale))
        m = pyro.sample("m", dist.Normal(a, 1.0))
        pyro.sample("b", dist.Normal(m, 1.0))

    fused = pm.consolidate(model, ["a", "b"], allow=["m"])
    poutine.do(fused, data=tensors({"m": 1.0, "a": 2.0}))()
    if "h" not in fused.sites:
        with NOT_ALLOWED:
            poutine.do(fused, data=tensors({"h": 1.0}))()


# Consolidated twice


def test_allowed_by_the_first_alone_is_not_allowed_by_the_second():
    """The outer program no longer has what the inner one could still do."""
    twice = pm.consolidate(fused_market(), ["b", "y"])
    for name in ("a", "m", "h"):
        with NOT_ALLOWED:
            poutine.do(twice, data=tensors({name: 1.0}))()
    found = gaussian_law(poutine.do(twice, data=tensors({"b": 1.0})), ["y"])
    # The first has a and b without their cause: do(b) there is do(b) of the market
    torch.testing.assert_close(found, MARKET.law(["y"], {"b": 1.0}), **TOLERANCE)


def test_allowed_by_both_has_its_effect():
    try:
        twice = pm.consolidate(fused_market(), ["b", "y"], allow=["m", "a"])
    except pm.PyroMacroError:
        twice = pm.consolidate(fused_market(), ["b", "y"], allow=["a"])
    found = gaussian_law(poutine.do(twice, data=tensors({"a": 1.0})), ["b", "y"])
    torch.testing.assert_close(found, MARKET.law(["b", "y"], {"a": 1.0}), **TOLERANCE)


def test_program_with_a_consolidated_part_inside_is_right_or_refused():
    """The part is one of a greater program, which is consolidated as a whole."""

    def whole(part):
        def model():
            t = pyro.sample("t", dist.Normal(0.0, 1.0))
            pyro.sample("s", dist.Normal(part() + t, 1.0))

        return model

    names = ["b", "s"]
    data = tensors({"a": 1.0})
    wanted = gaussian_law(poutine.do(whole(market), data=data), names)
    for model in (whole(fused_market()), in_scope_and_out(fused_market())):
        renamed = [f"s/{n}" if model.__name__ == "run" else n for n in names[:1]]
        allow = ["s/a"] if model.__name__ == "run" else ["a"]
        try:
            fused = pm.consolidate(model, renamed, allow=allow)
            found = gaussian_law(poutine.do(fused, data={allow[0]: data["a"]}), renamed)
        except pm.PyroMacroError:
            continue
        torch.testing.assert_close(found[0], wanted[0][:1], **TOLERANCE)
        torch.testing.assert_close(found[1], wanted[1][:1, :1], **TOLERANCE)


def in_scope_and_out(model):
    def run():
        with scope(prefix="s"):
            return model()

    return run


def test_allowed_interventions_pass_all_of_the_handlers():
    """The comparison itself: it is not the handlers that fail."""
    for name, handler in HANDLERS.items():
        if name == "do allowed":
            continue
        model = poutine.do(handler(forbidding()), data=tensors({"m": 1.0}))
        assert model() is not None
    assert gaussian_law(market, KEPT)[0].shape == (3,)
