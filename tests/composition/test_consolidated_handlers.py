# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs under ``mask``, ``scale``, ``block``, ``scope``, ``lift``, ...

Answers are those of the program fused by hand under the same handler. Where a handler
inside keeps a site from being fused, they are those of a program with that site.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import name_count, scope
from pyro.infer.reparam import LocScaleReparam

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    SETTINGS,
    TOLERANCE,
    assert_same_law,
    done,
    fused_market,
    gaussian_law,
    market,
    tensors,
)
from .models import assert_same_gradients, assert_same_program, stochastic

Y = torch.tensor(6.0, dtype=torch.float64)
MASK = torch.tensor([True, False, True])
VALUES = pytest.mark.parametrize("values", SETTINGS, ids=str)
WHERE = pytest.mark.parametrize("where", ["inside", "outside"])


def both(where, wrap, values=None, keep=KEPT):
    """A program under a handler, inside or outside, and the same fused by hand."""
    values = values or {}
    by_hand = MARKET.fused(keep, **values)
    if where == "inside":
        model = done(fused_market(wrap(market), keep), tensors(values))
    else:
        model = wrap(done(fused_market(keep=keep), tensors(values)))
    return model, wrap(by_hand)


def log_probs(trace):
    trace.compute_log_prob()
    return {n: s["log_prob"] for n, s in stochastic(trace).items()}


# mask


def masked(mask, *names):
    """Masks a whole program, or some of its sites."""

    def wrap(model):
        class Masked(poutine.messenger.Messenger):
            def _pyro_sample(self, msg):
                if msg["name"] in names:
                    old = msg["mask"]
                    msg["mask"] = mask if old is None else mask & old

        def run(*args):
            with Masked() if names else poutine.mask(mask=mask):
                return model(*args)

        return run

    return wrap


@VALUES
@pytest.mark.parametrize("mask", [True, False])
def test_mask_outside_of_a_whole_program(mask, values):
    trace = assert_same_program(*both("outside", masked(mask), values), macros=("m",))
    assert (trace.log_prob_sum() == 0) == (not mask)


@VALUES
def test_mask_outside_hides_slots(values):
    def wrap(model):
        def run(*args):
            with pyro.plate("n", 3, dim=-1), poutine.mask(mask=MASK):
                return model(*args)

        return run

    trace = assert_same_program(*both("outside", wrap, values), macros=("m",))
    for name in KEPT:
        assert ((log_probs(trace)[name] != 0) == MASK).all()


@VALUES
def test_mask_inside_that_hides_nothing(values):
    assert_same_program(*both("inside", masked(True), values), macros=("m",))


def test_mask_inside_of_a_whole_program_is_no_law_to_integrate():
    """Masked, h has no density: what is not kept is drawn as it was."""
    fused = fused_market(masked(False)(market))
    trace = poutine.trace(fused).get_trace()
    assert trace.log_prob_sum() == 0
    assert set(KEPT) <= set(fused.sites)
    assert_same_law(fused, market, KEPT)


def test_mask_inside_of_data_leaves_what_it_would_tell_unknown():
    """y is masked: the density is that of a and b, and of what has to stay for it."""
    wrap = masked(False, "y")
    fused = fused_market(wrap(market), model_args=(Y,))
    trace = assert_same_program(fused, wrap(MARKET.fused(fused.sites)), Y)
    assert log_probs(trace)["y"] == 0
    model = poutine.condition(fused, tensors({"a": 1.0, "b": 2.0}))
    trace = poutine.trace(model).get_trace(Y)
    law = dist.MultivariateNormal(*MARKET.law(["a", "b"], {}))
    wanted = law.log_prob(torch.tensor([1.0, 2.0]))
    if "m" in fused.sites:
        m = trace.nodes["m"]["value"]
        mean, cov = MARKET.law(["a", "b", "m"], {})
        law = dist.MultivariateNormal(mean, cov)
        wanted = law.log_prob(torch.stack([torch.tensor(1.0), torch.tensor(2.0), m]))
    torch.testing.assert_close(trace.log_prob_sum(), wanted, **TOLERANCE)


def test_mask_inside_of_a_site_that_would_be_fused():
    """The density of h does not count: nobody can integrate it."""
    fused = fused_market(masked(False, "h")(market))
    assert "h" in fused.sites
    by_hand = masked(False, "h")(MARKET.fused(fused.sites))
    trace = assert_same_program(fused, by_hand)
    assert log_probs(trace)["h"] == 0


@pytest.mark.parametrize("name", ["a", "b"])
def test_mask_inside_of_a_kept_site(name):
    """What is masked is drawn as ever, and tells nothing of its causes."""
    wrap = masked(False, name)
    fused = fused_market(wrap(market))
    assert_same_program(fused, wrap(MARKET.fused(fused.sites)))
    assert_same_law(fused, market, KEPT)


@pytest.mark.parametrize("given", [None, [0.0, 1.0, 2.0]])
def test_mask_inside_of_slots(given):
    def model(mask):
        with pyro.plate("n", 3, dim=-1):
            h = pyro.sample("h", dist.Normal(torch.arange(3.0), 1.5))
            with poutine.mask(mask=mask):
                a = pyro.sample("a", dist.Normal(2 * h, 1.0))
            m = pyro.sample("m", dist.Normal(a, 0.5))
            pyro.sample("b", dist.Normal(m, 1.0))

    def by_hand(mask):
        with pyro.plate("n", 3, dim=-1):
            h = pyro.sample("h", dist.Normal(torch.arange(3.0), 1.5))
            with poutine.mask(mask=mask):
                a = pyro.sample("a", dist.Normal(2 * h, 1.0))
            pyro.sample("b", dist.Normal(a, 1.25**0.5))

    fused = pm.consolidate(model, ["a", "b"], ["m"], model_args=(MASK,))
    assert fused.sites == ("h", "a", "b")
    data = {} if given is None else tensors({"a": given})
    for mask in (MASK, ~MASK):  # as an argument, it may be another one
        assert_same_program(
            poutine.condition(fused, data), poutine.condition(by_hand, data), mask
        )


# scale


def scaled(scale, *names):
    def wrap(model):
        class Scaled(poutine.messenger.Messenger):
            def _pyro_sample(self, msg):
                if msg["name"] in names:
                    msg["scale"] = msg["scale"] * scale

        def run(*args):
            with Scaled() if names else poutine.scale(scale=scale):
                return model(*args)

        return run

    return wrap


@VALUES
@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_scale_outside_of_a_whole_program(scale, values):
    model, by_hand = both("outside", scaled(scale), values)
    trace = assert_same_program(model, by_hand, macros=("m",))
    assert trace.nodes["y"]["scale"] == scale


def test_scale_outside_of_slots():
    weights = torch.tensor([0.5, 2.0, 3.0])

    def wrap(model):
        def run(*args):
            with pyro.plate("n", 3, dim=-1), poutine.scale(scale=weights):
                return model(*args)

        return run

    assert_same_program(*both("outside", wrap))


def test_scale_inside_of_a_whole_program_is_no_law_to_integrate():
    """A power of a joint density is not that of the marginal density: all stays."""
    fused = fused_market(scaled(0.3)(market))
    trace = assert_same_program(fused, scaled(0.3)(market))
    assert set(stochastic(trace)) == set(MARKET.scales)


@pytest.mark.parametrize("name", ["h", "a", "b", "y"])
def test_scale_inside_of_a_site(name):
    """Its causes cannot be integrated against a power of its density."""
    wrap = scaled(0.3, name)
    fused = fused_market(wrap(market))
    assert_same_program(fused, wrap(MARKET.fused(fused.sites)))
    assert_same_law(fused, market, KEPT)
    if name == "h":
        assert "h" in fused.sites


def test_scale_inside_of_data_of_a_kept_cause():
    """Nothing is fused between: the scale stays, and is that of an argument."""

    def model(scale, y=None):
        h = pyro.sample("h", dist.Normal(1.0, 1.5))
        a = pyro.sample("a", dist.Normal(2 * h, 1.0))
        with poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(a, 0.7), obs=y)

    def by_hand(scale, y=None):
        a = pyro.sample("a", dist.Normal(2.0, 10.0**0.5))
        with poutine.scale(scale=scale):
            pyro.sample("y", dist.Normal(a, 0.7), obs=y)

    fused = pm.consolidate(model, "a", model_args=(torch.tensor(1.0), Y))
    assert fused.sites == ("a", "y")
    for scale in (0.3, 5.0):
        assert_same_program(fused, by_hand, torch.tensor(scale), Y)


@WHERE
def test_scale_has_the_gradients_by_hand(where):
    def model():
        weight = pyro.param("weight", torch.tensor(2.0))
        h = pyro.sample("h", dist.Normal(1.0, 1.5))
        a = pyro.sample("a", dist.Normal(weight * h, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    def by_hand():
        weight = pyro.param("weight", torch.tensor(2.0))
        variance = 1 + (1.5 * weight) ** 2
        a = pyro.sample("a", dist.Normal(weight, variance.sqrt()))
        pyro.sample("b", dist.Normal(a, 1.0))

    wrap = scaled(0.3, "b")
    if where == "inside":
        fused = pm.consolidate(wrap(model), ["a", "b"])
    else:
        fused = wrap(pm.consolidate(model, ["a", "b"]))
    assert_same_program(fused, wrap(by_hand))
    assert_same_gradients(fused, wrap(by_hand))


def test_mask_and_scale_inside_and_outside():
    wrap = scaled(0.3)
    inner = scaled(2.0, "y")
    fused = fused_market(inner(market), keep=["h", "m", "y"])
    by_hand = inner(MARKET.fused(fused.sites))
    trace = assert_same_program(wrap(fused), wrap(by_hand))
    assert trace.nodes["y"]["scale"] == 0.6


# block


HIDDEN = [["a"], ["y"], ["a", "b"], ["m"]]


@VALUES
@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_block_outside_hides_sites_and_changes_nothing_else(hidden, values):
    model = done(fused_market(), tensors(values))
    pyro.set_rng_seed(5)
    plain = poutine.trace(model).get_trace()
    pyro.set_rng_seed(5)
    trace = poutine.trace(poutine.block(model, hide=hidden)).get_trace()
    assert set(stochastic(trace)) == set(stochastic(plain)) - set(hidden)
    for name, node in stochastic(trace).items():
        torch.testing.assert_close(node["value"], plain.nodes[name]["value"])
    plain.compute_log_prob()
    lost = sum(plain.nodes[n]["log_prob_sum"] for n in hidden if n in plain.nodes)
    torch.testing.assert_close(trace.log_prob_sum(), plain.log_prob_sum() - lost)


@VALUES
def test_block_outside_that_exposes_one_site(values):
    model = poutine.block(done(fused_market(), tensors(values)), expose=["b"])
    trace = poutine.trace(model).get_trace()
    assert set(stochastic(trace)) == {"b"}


@pytest.mark.parametrize("model", [market, None], ids=["unfused", "fused"])
def test_block_between_hides_from_a_do_outside_as_in_pyro(model):
    """A site that is hidden from a handler is not what the handler speaks of."""
    blocked = poutine.block(model or fused_market(), hide=["a", "m", "b"])
    draws = []
    for data in ({}, {"m": 1.5}, {"a": 1.0, "b": 1.0}, {"h": 5.0}):
        if "h" in data:
            blocked = poutine.block(blocked, hide=["h"])
        pyro.set_rng_seed(5)
        draws.append(poutine.do(blocked, tensors(data))().item())
    assert len(set(draws)) == 1


@pytest.mark.parametrize("hidden", [["m"], ["a", "m"], ["b"], ["a", "b", "m"]], ids=str)
@pytest.mark.parametrize("values", [{"m": 1.5}, {"a": 1.0}, {"b": 1.0}], ids=str)
def test_block_around_do_leaves_the_intervention(hidden, values):
    draws, fused = [], fused_market()
    for names in ([], hidden):
        pyro.set_rng_seed(5)
        model = poutine.block(done(fused, tensors(values)), hide=names)
        trace = poutine.trace(model).get_trace()
        assert not set(hidden) & set(trace.nodes) or not names
        draws.append(trace.nodes["y"]["value"].item())
    pyro.set_rng_seed(5)
    without = poutine.trace(fused).get_trace()
    assert draws[0] == draws[1] != without.nodes["y"]["value"].item()


@pytest.mark.parametrize("name", ["h", "m", "a"])
def test_block_inside_is_chance_that_nobody_can_integrate(name):
    """Unseen, it cannot be fused; what is drawn has the law of the program."""
    hidden = poutine.block(market, hide=[name])
    kept = [n for n in KEPT if n != name]
    fused = fused_market(hidden, keep=kept, allow=())
    n, rows = 400, []
    for _ in range(n):
        trace = poutine.trace(fused).get_trace()
        assert name not in trace.nodes
        rows.append(torch.stack([trace.nodes[k]["value"] for k in kept]))
    draws = torch.stack(rows)
    mean, cov = MARKET.law(kept, {})
    deviation = cov.diagonal().sqrt()
    assert ((draws.mean(0) - mean).abs() < 5 * deviation / n**0.5).all()
    size = torch.outer(deviation, deviation)
    assert ((draws.T.cov() - cov).abs() < 5 * size * (2 / n) ** 0.5).all()


def test_block_inside_that_hides_a_site_to_be_kept_is_an_unknown_site():
    with pytest.raises(pm.UnknownSite, match="'a'"):
        fused_market(poutine.block(market, hide=["a"]))
    with pytest.raises(pm.UnknownSite, match="'m'"):
        fused_market(poutine.block(market, hide=["m"]))


# scope


def renamed(model, prefix="s"):
    class Rename(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            msg["name"] = f"{prefix}/{msg['name']}"

    return Rename()(model)


SCOPED = [f"s/{name}" for name in KEPT]


@VALUES
def test_scope_outside_names_all_sites_once(values):
    model = scope(done(fused_market(), tensors(values)), prefix="s")
    by_hand = renamed(MARKET.fused(KEPT, **values))
    trace = assert_same_program(model, by_hand, macros=("s/m",))
    assert set(stochastic(trace)) == {*SCOPED, *(f"s/{name}" for name in values)}


@VALUES
def test_scope_inside_is_part_of_the_names(values):
    fused = fused_market(scope(market, prefix="s"), keep=SCOPED, allow=["s/m"])
    assert list(fused.sites) == SCOPED
    model = done(fused, {f"s/{n}": torch.tensor(v) for n, v in values.items()})
    by_hand = renamed(MARKET.fused(KEPT, **values))
    assert_same_program(model, by_hand, macros=("s/m",))


def test_scope_inside_without_its_prefix_is_an_unknown_site():
    with pytest.raises(pm.UnknownSite, match="'a'.*'s/a'"):
        fused_market(scope(market, prefix="s"))


@pytest.mark.parametrize("data", [{"m": 1.5}, {"h": 0.0}, {"m": 1.5, "h": 0.0}])
def test_scope_inside_of_do_in_prefixed_names(data):
    fused = fused_market(allow=["m", "h"])
    prefixed = tensors({f"s/{name}": value for name, value in data.items()})
    model = poutine.do(scope(fused, prefix="s"), prefixed)
    by_hand = renamed(MARKET.fused(KEPT, **data))
    assert_same_program(model, by_hand, macros=tuple(prefixed))


@pytest.mark.parametrize("name", ["a", "b"])
def test_scope_inside_of_do_on_a_kept_site_in_its_prefixed_name(name):
    rest = [n for n in KEPT if n != name]
    model = poutine.do(
        scope(fused_market(), prefix="s"), {f"s/{name}": torch.tensor(2.0)}
    )
    found = gaussian_law(model, [f"s/{n}" for n in rest])
    torch.testing.assert_close(found, MARKET.law(rest, {name: 2.0}), **TOLERANCE)


def test_scope_inside_of_do_in_names_without_prefix_is_nothing_as_in_pyro():
    for model in (fused_market(), market):
        blocked = poutine.do(scope(model, prefix="s"), tensors({"m": 9.0, "h": 9.0}))
        found = gaussian_law(blocked, SCOPED)
        torch.testing.assert_close(found, MARKET.law(KEPT, {}), **TOLERANCE)


def test_scopes_inside_and_outside():
    fused = fused_market(scope(market, prefix="s"), keep=SCOPED, allow=["s/m"])
    model = scope(fused, prefix="t")
    by_hand = renamed(renamed(MARKET.fused(KEPT)), "t")
    assert_same_program(model, by_hand)
    set_m = poutine.do(model, tensors({"t/s/m": 1.5}))
    by_hand = renamed(renamed(MARKET.fused(KEPT, m=1.5)), "t")
    assert_same_program(set_m, by_hand, macros=("t/s/m",))
    between = scope(poutine.do(fused, tensors({"s/m": 1.5})), prefix="t")
    assert_same_program(between, by_hand, macros=("t/s/m",))


def test_one_program_in_two_scopes_is_intervened_on_apart():
    fused = fused_market()

    def model(inner):
        def run():
            for prefix in ("s", "t"):
                with scope(prefix=prefix):
                    inner()

        return run

    data = tensors({"s/m": 1.5, "t/b": 2.0})
    names = [f"{p}/{n}" for p in "st" for n in KEPT if (p, n) != ("t", "b")]
    assert_same_law(
        poutine.do(model(fused), data), poutine.do(model(market), data), names
    )


def test_condition_outside_of_scope_in_prefixed_names():
    data = tensors({"s/a": 1.0, "s/y": 6.0})
    model = poutine.condition(scope(fused_market(), prefix="s"), data)
    by_hand = poutine.condition(renamed(MARKET.fused(KEPT)), data)
    assert_same_program(model, by_hand)


def test_name_count_outside():
    """Names that are used twice are counted; what is set is counted with them."""
    fused = fused_market()

    def model(inner):
        def run():
            inner()
            inner()

        return name_count(run)

    names = [*KEPT, *(f"{name}__1" for name in KEPT)]
    assert_same_law(model(fused), model(market), names)
    for data in ({"a__1": 1.0}, {"m": 1.5}, {"m__1": 1.5}):
        rest = [n for n in names if n not in data]
        found = poutine.do(model(fused), tensors(data))
        try:
            poutine.trace(found).get_trace()
        except pm.PyroMacroError:
            continue
        assert_same_law(found, poutine.do(model(market), tensors(data)), rest)


# lift


def priced():
    weight = pyro.param("weight", torch.tensor(2.0))
    level = pyro.param("level", torch.tensor(1.0))
    h = pyro.sample("h", dist.Normal(level, 1.5))
    a = pyro.sample("a", dist.Normal(weight * h, 1.0))
    m = pyro.sample("m", dist.Normal(a - h, 0.5))
    b = pyro.sample("b", dist.Normal(0.5 * m + h, 1.2))
    pyro.sample("y", dist.Normal(b + m + 3, 0.7))


def priced_by_hand(**values):
    def program():
        weight = pyro.param("weight", torch.tensor(2.0))
        level = pyro.param("level", torch.tensor(1.0))
        law = MARKET.with_weight("a", "h", weight)
        law = type(MARKET)(law.weights, {"h": level, "y": 3.0}, law.scales)
        law.emit(KEPT, values)

    return program


def lifted(model, *names):
    priors = {"weight": dist.Normal(2.0, 0.5), "level": dist.Normal(1.0, 2.0)}
    return poutine.lift(model, prior={name: priors[name] for name in names})


@VALUES
@pytest.mark.parametrize("names", [["level"], ["weight", "level"]], ids=str)
def test_lift_outside_draws_the_parameters_in_each_run(names, values):
    model = lifted(done(fused_market(priced), tensors(values)), *names)
    by_hand = lifted(priced_by_hand(**values), *names)
    trace = assert_same_program(model, by_hand, macros=("m",))
    assert set(names) <= set(stochastic(trace))
    assert set(pyro.get_param_store().keys()) == {"weight", "level"} - set(names)


def test_lift_outside_draws_parameters_anew_in_each_slot():
    def run(model):
        def outer():
            with pyro.plate("outer", 3, dim=-1):
                return lifted(model, "weight", "level")()

        return outer

    model = run(fused_market(priced))
    trace = assert_same_program(model, run(priced_by_hand()))
    assert trace.nodes["weight"]["value"].shape == (3,)


@VALUES
@pytest.mark.parametrize("names", [["level"], ["weight", "level"]], ids=str)
def test_lift_inside_makes_sites_that_may_be_kept(names, values):
    fused = fused_market(lifted(priced, *names), keep=[*names, *KEPT])
    assert set(fused.sites) == {*names, *KEPT}
    model = done(fused, tensors(values))
    by_hand = lifted(priced_by_hand(**values), *names)
    assert_same_program(model, by_hand, macros=("m",))


@VALUES
def test_lift_inside_makes_sites_that_may_be_fused(values):
    """The level is a cause like any other; h ~ N(1, 1.5^2 + 2^2)."""
    fused = fused_market(lifted(priced, "level"))
    assert fused.sites == KEPT
    found = gaussian_law(done(fused, tensors(values)), KEPT)
    law = MARKET.with_scale("h", (1.5**2 + 2.0**2) ** 0.5)
    torch.testing.assert_close(found, law.law(KEPT, values), **TOLERANCE)


def test_lift_inside_of_what_does_not_fuse_stays():
    """a is not affine in (weight, h): one of them has to stay."""
    fused = fused_market(lifted(priced, "weight"))
    assert {"weight", "h"} & set(fused.sites)
    if "h" not in fused.sites:
        assert_same_program(fused, lifted(priced_by_hand(), "weight"))


# replay


@VALUES
def test_replay_of_a_trace_of_the_consolidated_program_repeats_it(values):
    model = done(fused_market(), tensors(values))
    trace = poutine.trace(model).get_trace()
    again = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    for name, node in stochastic(trace).items():
        torch.testing.assert_close(
            again.nodes[name]["value"], node["value"], rtol=0, atol=0
        )
    torch.testing.assert_close(again.log_prob_sum(), trace.log_prob_sum())


@WHERE
@VALUES
def test_replay_of_a_trace_of_the_unfused_program_takes_what_is_kept(where, values):
    guide = poutine.trace(market).get_trace()
    model = fused_market()
    if where == "outside":
        model = poutine.replay(done(model, tensors(values)), trace=guide)
    else:
        model = done(poutine.replay(model, trace=guide), tensors(values))
    by_hand = poutine.replay(MARKET.fused(KEPT, **values), trace=guide)
    trace = assert_same_program(model, by_hand, macros=("m",))
    for name in KEPT:
        assert trace.nodes[name]["value"] == guide.nodes[name]["value"]
    if values:
        assert trace.nodes["m"]["value"] == values["m"]


def test_replay_inside_is_chance_held_at_its_value():
    """A replayed site is a latent one with its value: its density counts."""
    guide = poutine.trace(market).get_trace()
    for name in ("m", "b", "y", "a"):
        guide.remove_node(name)
    fused = fused_market(poutine.replay(market, trace=guide), keep=["h", *KEPT])
    by_hand = poutine.replay(MARKET.fused(fused.sites), trace=guide)
    trace = assert_same_program(fused, by_hand)
    assert trace.nodes["h"]["value"] == guide.nodes["h"]["value"]


def test_replay_of_parameters_is_what_the_laws_are_computed_from():
    params = {"weight": torch.tensor(-1.0), "level": torch.tensor(4.0)}
    for value in params.values():
        value.unconstrained = lambda value=value: value  # as the store hands them out
    model = poutine.replay(fused_market(priced), params=params)
    by_hand = poutine.replay(priced_by_hand(), params=params)
    assert_same_program(model, by_hand)
    mean = gaussian_law(model, ["a"])[0]
    torch.testing.assert_close(mean, torch.tensor([-4.0]), **TOLERANCE)


def test_substitute_of_parameters_is_what_the_laws_are_computed_from():
    data = tensors({"weight": -1.0, "level": 4.0})
    for where in ("outside", "inside"):
        if where == "outside":
            model = poutine.substitute(fused_market(priced), data=data)
        else:
            model = fused_market(poutine.substitute(priced, data=data))
        by_hand = poutine.substitute(priced_by_hand(), data=data)
        assert_same_program(model, by_hand)


# reparam


CENTERED = [0.0, 0.5]


def reparam(model, *names, centered=0.0):
    return poutine.reparam(model, {name: LocScaleReparam(centered) for name in names})


@VALUES
@pytest.mark.parametrize("centered", CENTERED)
@pytest.mark.parametrize("names", [["a"], ["b"], ["a", "b", "y"]], ids=str)
def test_reparam_outside_of_kept_sites(names, centered, values):
    model = reparam(done(fused_market(), tensors(values)), *names, centered=centered)
    by_hand = reparam(MARKET.fused(KEPT, **values), *names, centered=centered)
    trace = assert_same_program(model, by_hand, macros=("m",))
    assert {f"{name}_decentered" for name in names} <= set(stochastic(trace))


@VALUES
@pytest.mark.parametrize("name", ["h", "m"])
def test_reparam_outside_of_a_fused_site_changes_nothing(name, values):
    model = reparam(done(fused_market(), tensors(values)), name)
    try:
        poutine.trace(model).get_trace()
    except pm.PyroMacroError:
        assert name in values
        return
    assert_same_program(model, MARKET.fused(KEPT, **values), macros=("m",))


@VALUES
@pytest.mark.parametrize("centered", CENTERED)
@pytest.mark.parametrize("names", [["h"], ["m"], ["h", "m"]], ids=str)
def test_reparam_inside_of_fused_sites(names, centered, values):
    """The decentered site is fused along with what is computed from it."""
    fused = fused_market(reparam(market, *names, centered=centered))
    assert fused.sites == KEPT
    model = done(fused, tensors(values))
    assert_same_program(model, MARKET.fused(KEPT, **values), macros=("m",))


@VALUES
@pytest.mark.parametrize("centered", CENTERED)
@pytest.mark.parametrize("name", ["a", "b"])
def test_reparam_inside_of_kept_sites(name, centered, values):
    """What is kept is the site itself: its decentered one is fused."""
    fused = fused_market(reparam(market, name, centered=centered))
    assert fused.sites == KEPT
    found = gaussian_law(done(fused, tensors(values)), KEPT)
    torch.testing.assert_close(found, MARKET.law(KEPT, values), **TOLERANCE)


def test_reparam_inside_with_the_decentered_site_kept():
    fused = fused_market(reparam(market, "a"), keep=["a_decentered", "b"])
    assert_same_law(fused, reparam(market, "a"), ["a_decentered", "b"])


@WHERE
def test_reparam_and_do_on_the_same_site(where):
    """What is set is what b is computed from, however ``a`` is drawn."""
    data = tensors({"a": 2.0})
    if where == "inside":
        model = poutine.do(fused_market(reparam(market, "a")), data)
    else:
        model = reparam(poutine.do(fused_market(), data), "a")
    found = gaussian_law(model, ["b", "y"])
    torch.testing.assert_close(found, MARKET.law(["b", "y"], {"a": 2.0}), **TOLERANCE)


def test_do_outside_of_reparam_is_right_or_refused():
    """Pyro itself fails here, with an error of its own."""
    data = tensors({"a": 2.0})
    model = poutine.do(reparam(fused_market(), "a"), data)
    try:
        poutine.trace(model).get_trace()
    except Exception as error:
        with pytest.raises(type(error)):
            poutine.do(reparam(market, "a"), data)()
        return
    found = gaussian_law(model, ["b", "y"])
    torch.testing.assert_close(found, MARKET.law(["b", "y"], {"a": 2.0}), **TOLERANCE)


def test_do_outside_of_reparam_on_another_site():
    data = tensors({"m": 1.5})
    model = poutine.do(reparam(fused_market(), "a"), data)
    by_hand = reparam(MARKET.fused(KEPT, m=1.5), "a")
    assert_same_program(model, by_hand, macros=("m",))


# equalize


@pytest.mark.parametrize("names", [["a", "b"], ["b", "y"], ["a", "y"]], ids=str)
def test_equalize_outside_is_right_or_refused(names):
    """The second site is replaced by the first: it tells nothing of its causes."""
    model = poutine.equalize(fused_market(), names)
    rest = [name for name in KEPT if name != names[1]]
    try:
        found = gaussian_law(model, rest)
    except pm.PyroMacroError:
        return
    wanted = gaussian_law(poutine.equalize(market, names), rest)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("names", [["a", "m"], ["h", "b"], ["h", "m"]], ids=str)
def test_equalize_outside_of_a_fused_site_is_an_error(names):
    with pytest.raises(pm.PyroMacroError):
        poutine.equalize(fused_market(), names)()


def test_equalize_outside_that_keeps_the_law_is_a_condition():
    names = ["a", "b"]
    trace = assert_same_program(
        poutine.equalize(fused_market(), names, keep_dist=True),
        poutine.equalize(MARKET.fused(KEPT), names, keep_dist=True),
    )
    assert trace.nodes["a"]["value"] == trace.nodes["b"]["value"]


def test_equalize_inside_is_right_or_stays():
    fused = fused_market(poutine.equalize(market, ["a", "b"]), keep=["a", "y"])
    assert_same_law(fused, poutine.equalize(market, ["a", "b"]), ["a", "y"])


# infer_config


@WHERE
def test_infer_config_reaches_the_sites_that_are_kept(where):
    def config(site):
        return {"was": site["name"]} if site["type"] == "sample" else {}

    if where == "inside":
        model = fused_market(poutine.infer_config(market, config_fn=config))
    else:
        model = poutine.infer_config(fused_market(), config_fn=config)
    trace = assert_same_program(model, MARKET.fused(KEPT))
    for name in KEPT:
        assert trace.nodes[name]["infer"]["was"] == name


def test_what_a_program_says_to_inference_is_kept():
    def model():
        h = pyro.sample("h", dist.Normal(0.0, 1.0), infer={"lost": True})
        pyro.sample("a", dist.Normal(h, 1.0), infer={"is_auxiliary": True})

    trace = poutine.trace(pm.consolidate(model, "a")).get_trace()
    assert trace.nodes["a"]["infer"] == {"is_auxiliary": True}
    # Not one dictionary for all runs: handlers write into it
    trace.nodes["a"]["infer"]["more"] = 1
    fused = pm.consolidate(model, "a")
    poutine.trace(fused).get_trace().nodes["a"]["infer"]["more"] = 1
    again = poutine.trace(fused).get_trace()
    assert again.nodes["a"]["infer"] == {"is_auxiliary": True}
