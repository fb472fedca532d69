# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``reparam`` with ``LocScaleReparam``, inside and outside."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam

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

CENTERED = [0.0, 0.5]


def reparam(model, *names, centered=0.0):
    return poutine.reparam(model, {name: LocScaleReparam(centered) for name in names})


# A micro site


def decentered(model, centered, *laws):
    """``model`` with the sites that a reparametrization inside leaves behind."""

    def run():
        for name, loc, scale in laws:
            pyro.sample(
                name + "_decentered", dist.Normal(loc * centered, scale**centered)
            )
        return model()

    return run


X1, X2 = ("x1", 10.0, 2.0), ("x2", 20.0, 1.0)


@pytest.mark.parametrize("centered", CENTERED)
@pytest.mark.parametrize("which", [[X1], [X2], [X1, X2]], ids=["x1", "x2", "both"])
def test_reparam_inside_of_a_micro_site_leaves_its_law_as_it_was(which, centered):
    names = [name for name, *_ in which]
    model = pm.macro_do(reparam(shop, *names, centered=centered), NATURAL)
    trace = assert_same_program(model, decentered(shop_by_hand, centered, *which))
    torch.testing.assert_close(
        trace.nodes["sales__micro"]["fn"].mean, torch.tensor([12.4, 20.6])
    )


def test_reparam_inside_of_a_micro_site_with_causes_integrated_out():
    model = pm.macro_do(reparam(market, "x1"), NATURAL)
    assert_same_program(model, decentered(market_by_hand, 0.0, X1))


def test_reparam_inside_of_a_micro_site_is_refused_by_a_context():
    # The decentered sites come before, and the context cannot tell what they do
    with pytest.raises(pm.UnsupportedLaw, match="x1_decentered"):
        with pm.macro_do(interventions=NATURAL):
            reparam(shop, "x1")()


@pytest.mark.parametrize(
    "realization",
    [pm.Residual(33.0, absorb="x2"), pm.Allocate(33.0, [0.5, 0.5])],
    ids=lambda r: type(r).__name__,
)
def test_reparam_inside_of_a_micro_site_for_other_realizations(realization):
    trace = poutine.trace(
        pm.macro_do(reparam(shop, "x1"), {SALES: realization})
    ).get_trace()
    nodes = trace.nodes
    total = nodes["x1"]["value"] + nodes["x2"]["value"]
    torch.testing.assert_close(total, torch.tensor(33.0))
    if isinstance(realization, pm.Residual):
        site = nodes["sales__micro"]
        wanted = dist.Normal(10.0, 2.0).log_prob(site["value"][0])
        torch.testing.assert_close(site["fn"].log_prob(site["value"]), wanted)


def test_reparam_inside_of_a_micro_site_for_the_natural_state():
    # The natural state is a function of the decentered site, which stays its cause
    model = pm.macro_do(reparam(shop, "x1"), {SALES: pm.Shift(5.0)})
    nodes = poutine.trace(model).get_trace().nodes
    natural = 10 + 2 * nodes["x1_decentered"]["value"]
    torch.testing.assert_close(nodes["x1"]["value"], natural + 4.0)


@pytest.mark.parametrize("name", ["x1", "x2"])
@pytest.mark.parametrize(
    "realization",
    [pm.Natural(33.0), pm.Proportional(33.0), pm.Allocate(33.0, [0.5, 0.5])],
    ids=lambda r: type(r).__name__,
)
def test_reparam_outside_of_a_micro_site_is_an_error_that_says_what_to_do(
    do, name, realization
):
    model = reparam(do(shop, {SALES: realization}), name)
    with pytest.raises(pm.PyroMacroError, match="cannot be reparametrized.*inside"):
        model()


def test_reparam_outside_of_the_latent_site_is_no_silent_change(do):
    # As Pyro says of every distribution that is no location and scale
    with pytest.raises(AttributeError, match="scale"):
        reparam(do(shop, NATURAL), "sales__micro")()


# Another site


@pytest.mark.parametrize("centered", CENTERED)
def test_reparam_inside_of_a_cause_that_is_integrated_out(centered):
    model = pm.macro_do(reparam(market, "z", centered=centered), NATURAL)
    trace = assert_same_program(model, reparam(market_by_hand, "z", centered=centered))
    assert "z_decentered" in trace.stochastic_nodes


@pytest.mark.parametrize("centered", CENTERED)
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_reparam_of_a_given_cause_holds_it_at_its_value(do, form, where, centered):
    # A context needs all random sites so far in `given`
    given = ["z", "z_decentered"] if form == "context" else ["z"]
    given_z = {SALES: pm.Natural(33.0, given=given)}
    if where == "inside":
        model = do(reparam(market, "z", centered=centered), given_z)
    else:
        model = reparam(do(market, given_z), "z", centered=centered)
    by_hand = reparam(market_by_hand_given_z, "z", centered=centered)
    trace = assert_same_program(model, by_hand)
    assert "z_decentered" in trace.stochastic_nodes


@pytest.mark.parametrize("centered", CENTERED)
def test_reparam_inside_of_a_cause_that_is_given_with_all_it_is_made_of(do, centered):
    given = {SALES: pm.Natural(33.0, given=["z", "z_decentered"])}
    model = do(reparam(market, "z", centered=centered), given)
    by_hand = reparam(market_by_hand_given_z, "z", centered=centered)
    assert_same_program(model, by_hand)


@pytest.mark.parametrize("centered", CENTERED)
def test_reparam_outside_of_a_cause_leaves_the_natural_law_as_it_was(centered):
    model = reparam(pm.macro_do(market, NATURAL), "z", centered=centered)
    assert_same_program(model, reparam(market_by_hand, "z", centered=centered))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_reparam_of_an_effect(do, where):
    if where == "inside":
        model = do(reparam(shop, "w"), NATURAL)
    else:
        model = reparam(do(shop, NATURAL), "w")
    assert_same_program(model, reparam(shop_by_hand, "w"))


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_reparam_of_what_depends_on_the_micro_state(do, where):
    if where == "inside":
        model = do(reparam(shop, "y"), NATURAL)
    else:
        model = reparam(do(shop, NATURAL), "y")
    trace = assert_same_program(model, reparam(shop_by_hand, "y"))
    assert "y_decentered" in stochastic(trace)


def test_reparam_is_seen_by_aggregate(add):
    for names in (["x1"], ["x1", "x2"], ["w"]):
        model = reparam(shop, *names)
        assert_only_added(add(model, [SALES]), model, sales_total)
        assert_only_added(reparam(add(shop, [SALES]), *names), model, sales_total)
