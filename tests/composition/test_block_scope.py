# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``block`` and ``scope``, inside and outside."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    assert_only_added,
    assert_same_program,
    market,
    market_by_hand_given_z,
    shop,
    shop_by_hand,
    stochastic,
)

GIVEN_Z = {SALES: pm.Natural(33.0, given=["z"])}


def parts():
    pyro.sample("x1", dist.Normal(10.0, 2.0))
    pyro.sample("x2", dist.Normal(20.0, 1.0))


# block


@pytest.mark.parametrize("name", ["x1", "x2"])
@pytest.mark.parametrize(
    "realization",
    [pm.Natural(33.0), pm.Proportional(33.0), pm.Allocate(33.0, [1.0, 0.0])],
    ids=lambda r: type(r).__name__,
)
def test_block_inside_that_hides_a_micro_site_is_an_unknown_site(do, name, realization):
    model = do(poutine.block(parts, hide=[name]), {SALES: realization})
    with pytest.raises(pm.UnknownSite, match=f"no site '{name}'.*Did you mean 'x"):
        model()


def test_block_inside_that_hides_a_micro_site_keeps_a_context_from_going_on():
    with pytest.raises(pm.PyroMacroError, match="'x1' is used before the last"):
        with pm.macro_do(interventions=NATURAL):
            poutine.block(shop, hide=["x2"])()


@pytest.mark.parametrize("name", ["x1", "x2"])
def test_block_inside_that_hides_a_micro_site_is_unknown_to_aggregate(add, name):
    with pytest.raises(pm.UnknownSite, match=f"no site '{name}'"):
        add(poutine.block(shop, hide=[name]), [SALES])()


def test_block_inside_that_hides_another_site_changes_nothing_else(do):
    trace = poutine.trace(do(poutine.block(shop, hide=["w"]), NATURAL)).get_trace()
    assert set(stochastic(trace)) == {"sales", "sales__micro", "x1", "x2", "y"}
    site = trace.nodes["sales__micro"]
    torch.testing.assert_close(site["fn"].mean, torch.tensor([12.4, 20.6]))


def test_block_inside_that_hides_a_cause_is_never_a_wrong_law():
    # Unseen, z can be neither integrated out nor held: the law of X at some z that
    # is not even that of the run is not P(X | 33)
    model = pm.macro_do(poutine.block(market, hide=["z"]), NATURAL)
    with pytest.raises(pm.PyroMacroError):
        model()


def test_block_inside_that_hides_a_given_cause_is_an_unknown_site(do):
    with pytest.raises(pm.UnknownSite, match="given.*no site 'z'"):
        do(poutine.block(market, hide=["z"]), GIVEN_Z)()


HIDDEN = [["x1"], ["sales__micro"], ["sales"], ["x1", "x2", "sales", "sales__micro"]]


@pytest.mark.parametrize("hidden", HIDDEN, ids=str)
def test_block_outside_hides_sites_and_changes_nothing_else(do, hidden):
    pyro.set_rng_seed(5)
    plain = poutine.trace(do(shop, NATURAL)).get_trace()
    pyro.set_rng_seed(5)
    trace = poutine.trace(poutine.block(do(shop, NATURAL), hide=hidden)).get_trace()
    assert set(stochastic(trace)) == set(stochastic(plain)) - set(hidden)
    for name, node in stochastic(trace).items():
        torch.testing.assert_close(node["value"], plain.nodes[name]["value"])
    plain.compute_log_prob()
    lost = sum(plain.nodes[name]["log_prob_sum"] for name in hidden)
    torch.testing.assert_close(trace.log_prob_sum(), plain.log_prob_sum() - lost)


def test_block_outside_of_a_cause_that_is_given(do):
    model = do(market, GIVEN_Z)
    pyro.set_rng_seed(5)
    plain = poutine.trace(model).get_trace()
    pyro.set_rng_seed(5)
    trace = poutine.trace(poutine.block(model, hide=["z"])).get_trace()
    assert set(stochastic(trace)) == set(stochastic(plain)) - {"z"}
    torch.testing.assert_close(trace.nodes["y"]["value"], plain.nodes["y"]["value"])


def test_block_outside_lets_the_plates_around_it_draw_one_micro_state(do):
    # As Pyro has it: a hidden site is not seen by the plates outside of the block
    def run():
        with pyro.plate("n", 3, dim=-1):
            return poutine.block(do(shop, NATURAL))()

    assert poutine.trace(run).get_trace().nodes["_RETURN"]["value"].shape == ()


def test_block_outside_of_aggregate_hides_the_macro_value(add):
    trace = poutine.trace(poutine.block(add(shop, [SALES]), hide=["sales"])).get_trace()
    assert set(stochastic(trace)) == {"x1", "x2", "w", "y"}
    model = poutine.block(shop, hide=["w"])
    trace = poutine.trace(add(model, [SALES])).get_trace()
    assert set(stochastic(trace)) == {"x1", "x2", "y", "sales"}


# scope


SCOPED = pm.MacroVariable("sales", micro=["s/x1", "s/x2"])


def renamed(model, *names):
    """Hand-written names under the scope of the program, others as they are."""

    class Rename(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] not in names:
                msg["name"] = "s/" + msg["name"]

    return Rename()(model)


def test_scope_outside_names_all_sites_once(do):
    model = scope(do(shop, NATURAL), prefix="s")
    trace = assert_same_program(model, renamed(shop_by_hand), macros=("s/sales",))
    assert set(stochastic(trace)) == {
        f"s/{n}" for n in ("sales", "sales__micro", "x1", "x2", "w", "y")
    }


def test_scope_outside_of_given(do):
    model = scope(do(market, GIVEN_Z), prefix="s")
    assert_same_program(model, renamed(market_by_hand_given_z), macros=("s/sales",))


def test_scope_inside_is_part_of_the_names_of_micro_sites(do, form):
    inside = scope(shop, prefix="s")
    model = do(inside, {SCOPED: pm.Natural(33.0)})
    # A context adds its sites where the program runs, inside of the scope
    macro = "s/sales" if form == "context" else "sales"
    trace = assert_same_program(model, renamed(shop_by_hand), macros=(macro,))
    assert set(stochastic(trace)) == {
        macro,
        macro + "__micro",
        "s/x1",
        "s/x2",
        "s/w",
        "s/y",
    }


def test_scope_inside_of_given(do, form):
    given_z = {SCOPED: pm.Natural(33.0, given=["s/z"])}
    model = do(scope(market, prefix="s"), given_z)
    macro = "s/sales" if form == "context" else "sales"
    assert_same_program(model, renamed(market_by_hand_given_z), macros=(macro,))


def test_scope_inside_without_its_prefix_is_an_unknown_site_with_a_hint(do):
    with pytest.raises(pm.UnknownSite, match="'x1'.*'s/x1'"):
        do(scope(shop, prefix="s"), NATURAL)()


def test_scopes_inside_and_outside(do, form):
    model = scope(do(scope(shop, prefix="s"), {SCOPED: pm.Natural(33.0)}), prefix="t")
    macro = "t/s/sales" if form == "context" else "t/sales"
    trace = poutine.trace(model).get_trace()
    assert set(stochastic(trace)) == {macro, macro + "__micro"} | {
        f"t/s/{n}" for n in ("x1", "x2", "w", "y")
    }


def test_one_program_in_two_scopes_is_intervened_on_apart(do):
    def model():
        with scope(prefix="s"):
            shop()
        with scope(prefix="t"):
            shop()

    other = pm.MacroVariable("other", micro=["t/x1", "t/x2"])
    interventions = {
        SCOPED: pm.Allocate(33.0, [0.5, 0.5]),
        other: pm.Allocate(10.0, [0.5, 0.5]),
    }
    trace = poutine.trace(do(model, interventions)).get_trace()
    assert trace.nodes["s/x1"]["value"] == 16.5
    assert trace.nodes["t/x1"]["value"] == 5.0


def test_scope_of_aggregate(add, form):
    def totals(trace, prefix=""):
        x = [trace.nodes[f"s/x{i}"]["value"] for i in (1, 2)]
        return {prefix + "sales": x[0] + x[1]}

    model = scope(shop, prefix="s")
    # Outside, the macro value has the prefix too; in a context inside as well
    outside = scope(add(shop, [SALES]), prefix="s")
    assert_only_added(outside, model, lambda t: totals(t, "s/"))
    prefix = "s/" if form == "context" else ""
    assert_only_added(add(model, [SCOPED]), model, lambda t: totals(t, prefix))


def test_scope_outside_does_not_double_the_prefix_of_a_draw(do):
    trace = poutine.trace(scope(do(parts, NATURAL), prefix="s")).get_trace()
    assert not any("s/s/" in name for name in trace.nodes)
