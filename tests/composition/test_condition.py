# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``condition``, inside and outside."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.poutine import condition

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    assert_only_added,
    assert_same_program,
    market,
    market_by_hand,
    market_by_hand_given_z,
    sales_total,
    shop,
    shop_by_hand,
    stochastic,
)

# The default dtype is set after these are made
Z = {"z": torch.tensor(2.0, dtype=torch.float64)}
Y = {"y": torch.tensor(70.0, dtype=torch.float64)}
ON_FIBRE = {"sales__micro": torch.tensor([13.0, 20.0], dtype=torch.float64)}


# Another site


def test_condition_inside_on_a_cause_makes_it_known_to_the_natural_law(do):
    # The program that is intervened on has z observed: its own P(X | 33) holds z
    model = do(condition(market, Z), NATURAL)
    trace = assert_same_program(model, condition(market_by_hand_given_z, Z))
    assert trace.nodes["z"]["is_observed"]


def test_condition_outside_on_a_cause_leaves_the_natural_law_as_it_was():
    # The intervention cuts z off, so that seeing z says nothing about X
    model = condition(pm.macro_do(market, NATURAL), Z)
    trace = assert_same_program(model, condition(market_by_hand, Z))
    assert trace.nodes["z"]["is_observed"]


def test_condition_outside_of_a_context_is_no_substitute_for_given():
    with pytest.raises(pm.UnsupportedLaw, match="given=.'z'."):
        with condition(data=Z), pm.macro_do(interventions=NATURAL):
            market()


def test_condition_outside_on_a_given_cause_holds_it_at_the_condition(do):
    model = condition(do(market, {SALES: pm.Natural(33.0, given=["z"])}), Z)
    trace = assert_same_program(model, condition(market_by_hand_given_z, Z))
    assert trace.nodes["z"]["is_observed"]


def test_condition_inside_on_an_effect_is_a_likelihood_and_moves_no_micro_law(do):
    model = do(condition(shop, Y), NATURAL)
    trace = assert_same_program(model, condition(shop_by_hand, Y))
    torch.testing.assert_close(
        trace.nodes["sales__micro"]["fn"].mean, torch.tensor([12.4, 20.6])
    )


def test_condition_outside_on_an_effect_is_a_likelihood_and_moves_no_micro_law(do):
    model = condition(do(shop, NATURAL), Y)
    trace = assert_same_program(model, condition(shop_by_hand, Y))
    torch.testing.assert_close(
        trace.nodes["sales__micro"]["fn"].mean, torch.tensor([12.4, 20.6])
    )


def test_condition_on_an_effect_of_a_given_cause_holds_the_cause_only(do):
    realization = {SALES: pm.Natural(33.0, given=["z"])}
    for model in (
        do(condition(market, Y), realization),
        condition(do(market, realization), Y),
    ):
        assert_same_program(model, condition(market_by_hand_given_z, Y))


def test_condition_on_another_site_is_seen_by_aggregate(add):
    model = condition(market, Z)
    assert_only_added(add(model, [SALES]), model, sales_total)
    assert_only_added(condition(add(market, [SALES]), Z), model, sales_total)


# A micro site


@pytest.mark.parametrize("name", ["x1", "x2"])
@pytest.mark.parametrize("realization", [pm.Natural(33.0), pm.Proportional(33.0)])
def test_condition_inside_on_a_micro_site_is_an_error_that_names_it(
    do, name, realization
):
    model = do(condition(shop, {name: torch.tensor(12.0)}), {SALES: realization})
    with pytest.raises(pm.PyroMacroError, match=f"'{name}' is observed"):
        model()


@pytest.mark.parametrize("name", ["x1", "x2"])
@pytest.mark.parametrize("realization", [pm.Natural(33.0), pm.Proportional(33.0)])
def test_condition_outside_on_a_micro_site_is_an_error_that_names_it(
    do, name, realization
):
    model = condition(do(shop, {SALES: realization}), {name: torch.tensor(12.0)})
    with pytest.raises(pm.PyroMacroError, match=f"'{name}' is set by macro_do"):
        model()


def test_condition_on_a_micro_site_is_seen_by_aggregate(add):
    data = {"x1": torch.tensor(12.0)}
    model = condition(shop, data)
    inside = assert_only_added(add(model, [SALES]), model, sales_total)
    outside = assert_only_added(condition(add(shop, [SALES]), data), model, sales_total)
    for trace in (inside, outside):
        assert trace.nodes["x1"]["value"] == 12.0


# The macro value


def test_condition_outside_on_the_macro_value_is_an_error_that_names_it(do):
    model = condition(do(shop, NATURAL), {"sales": torch.tensor(40.0)})
    with pytest.raises(pm.PyroMacroError, match="the macro value 'sales'"):
        model()


def test_condition_outside_on_an_aggregated_value_is_an_error_that_names_it(add):
    model = condition(add(shop, [SALES]), {"sales": torch.tensor(40.0)})
    with pytest.raises(pm.PyroMacroError, match="sales"):
        model()


def test_condition_inside_on_names_of_the_handler_changes_nothing_of_the_wrapper():
    # Inside, the program has no such sites yet, and Pyro passes over unknown names
    data = {"sales": torch.tensor(40.0), **ON_FIBRE}
    trace = assert_same_program(
        pm.macro_do(condition(shop, data), NATURAL), shop_by_hand
    )
    assert not trace.nodes["sales__micro"]["is_observed"]


def test_condition_inside_on_the_macro_value_is_an_error_of_the_context():
    # A context adds its sites where the program runs, so that handlers there see them
    model = condition(shop, {"sales": torch.tensor(40.0)})
    with pytest.raises(pm.PyroMacroError, match="the macro value 'sales'"):
        with pm.macro_do(interventions=NATURAL):
            model()


# The latent site


def test_condition_outside_on_the_latent_site_sets_the_micro_state(do):
    model = condition(do(shop, NATURAL), ON_FIBRE)
    pyro.set_rng_seed(3)
    trace = poutine.trace(model).get_trace()
    nodes = stochastic(trace)
    assert nodes["sales__micro"]["is_observed"]
    assert (nodes["x1"]["value"], nodes["x2"]["value"]) == (13.0, 20.0)
    # The rest of the run follows it, and its density is that of x1
    data = {"x1": torch.tensor(13.0)} | {n: nodes[n]["value"] for n in ("w", "y")}
    expected = poutine.trace(condition(shop_by_hand, data)).get_trace()
    torch.testing.assert_close(trace.log_prob_sum(), expected.log_prob_sum())


@pytest.mark.parametrize(
    "realization", [pm.Natural(33.0), pm.Residual(33.0, absorb="x2")]
)
def test_condition_on_the_latent_site_off_the_fibre_is_an_error(do, realization):
    off = {"sales__micro": torch.tensor([13.0, 21.0])}
    model = condition(do(shop, {SALES: realization}), off)
    with pytest.raises(pm.OffFibre, match="34.*33"):
        model()


def test_condition_on_the_natural_state_sets_what_is_rescaled(do):
    natural = {"sales__micro": torch.tensor([11.0, 11.0])}
    model = condition(do(shop, {SALES: pm.Proportional(33.0)}), natural)
    nodes = poutine.trace(model).get_trace().nodes
    assert (nodes["x1"]["value"], nodes["x2"]["value"]) == (16.5, 16.5)


def test_uncondition_inside_lets_an_observed_part_be_set(do):
    def observed():
        with condition(data={"x1": torch.tensor(12.0)}):
            return shop()

    assert_same_program(do(poutine.uncondition(observed), NATURAL), shop_by_hand)
