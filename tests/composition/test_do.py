# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``poutine.do`` and a second ``macro_do``, inside and outside."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    A,
    B,
    assert_only_added,
    assert_same_program,
    given_total,
    market,
    market_by_hand,
    market_by_hand_given_z,
    on_fibre,
    sales_total,
    shop,
    shop_by_hand,
    stores,
    stores_law,
)

GIVEN_Z = {SALES: pm.Natural(33.0, given=["z"])}


# Another site


def test_do_inside_on_a_cause_makes_it_a_constant_of_the_natural_law():
    model = pm.macro_do(poutine.do(market, {"z": 2.0}), NATURAL)
    assert_same_program(model, poutine.do(market_by_hand_given_z, {"z": 2.0}))


def test_do_outside_on_a_cause_leaves_the_natural_law_as_it_was():
    model = poutine.do(pm.macro_do(market, NATURAL), {"z": 2.0})
    assert_same_program(model, poutine.do(market_by_hand, {"z": 2.0}))


def test_do_outside_on_a_given_cause_holds_it_at_the_value_that_was_set(do):
    model = poutine.do(do(market, GIVEN_Z), {"z": 2.0})
    assert_same_program(model, poutine.do(market_by_hand_given_z, {"z": 2.0}))


def test_do_inside_on_a_given_cause_holds_it_at_the_value_that_was_set(do):
    model = do(poutine.do(market, {"z": 2.0}), GIVEN_Z)
    assert_same_program(model, poutine.do(market_by_hand_given_z, {"z": 2.0}))


def test_do_on_an_effect_leaves_the_micro_law_as_it_was(do):
    by_hand = poutine.do(shop_by_hand, {"w": -4.0})
    assert_same_program(do(poutine.do(shop, {"w": -4.0}), NATURAL), by_hand)
    assert_same_program(poutine.do(do(shop, NATURAL), {"w": -4.0}), by_hand)


def test_do_on_another_site_is_seen_by_aggregate(add):
    model = poutine.do(market, {"z": 2.0})
    assert_only_added(add(model, [SALES]), model, sales_total)
    assert_only_added(poutine.do(add(market, [SALES]), {"z": 2.0}), model, sales_total)


# A micro site, the macro value, the latent site


@pytest.mark.parametrize("name", ["x1", "x2"])
@pytest.mark.parametrize(
    "realization",
    [pm.Natural(33.0), pm.Proportional(33.0), pm.Allocate(33.0, [1.0, 0.0])],
    ids=lambda r: type(r).__name__,
)
def test_do_inside_on_a_micro_site_is_an_error_that_names_it(do, name, realization):
    model = do(poutine.do(shop, {name: 12.0}), {SALES: realization})
    with pytest.raises(pm.PyroMacroError, match=f"'{name}'.*poutine.do. inside"):
        model()


@pytest.mark.parametrize("name", ["x1", "x2"])
@pytest.mark.parametrize(
    "realization",
    [pm.Natural(33.0), pm.Proportional(33.0), pm.Allocate(33.0, [1.0, 0.0])],
    ids=lambda r: type(r).__name__,
)
def test_do_outside_on_a_micro_site_is_an_error_that_names_it(do, name, realization):
    model = poutine.do(do(shop, {SALES: realization}), {name: 12.0})
    with pytest.raises(pm.PyroMacroError, match=f"'{name}'.*poutine.do. outside"):
        model()


def test_do_outside_on_the_macro_value_is_an_error_that_names_it(do):
    model = poutine.do(do(shop, NATURAL), {"sales": 40.0})
    with pytest.raises(pm.PyroMacroError, match="'sales'"):
        model()


def test_do_outside_on_the_latent_site_sets_the_micro_state(do):
    model = poutine.do(do(shop, NATURAL), {"sales__micro": torch.tensor([13.0, 20.0])})
    nodes = poutine.trace(model).get_trace().nodes
    assert (nodes["x1"]["value"], nodes["x2"]["value"]) == (13.0, 20.0)


def test_do_outside_on_the_latent_site_off_the_fibre_is_an_error(do):
    model = poutine.do(do(shop, NATURAL), {"sales__micro": torch.tensor([13.0, 21.0])})
    with pytest.raises(pm.OffFibre, match="34.*33"):
        model()


def test_do_outside_on_a_micro_site_is_what_aggregate_adds_up(add):
    model = poutine.do(add(shop, [SALES]), {"x1": 12.0})
    nodes = poutine.trace(model).get_trace().nodes
    torch.testing.assert_close(nodes["sales"]["value"], 12.0 + nodes["x2"]["value"])
    assert nodes["x1"]["value"] != 12.0, "Pyro keeps the natural value in the trace"


def test_do_inside_on_a_micro_site_is_refused_by_aggregate(add):
    with pytest.raises(pm.PyroMacroError, match="'x1'.*[Tt]urn the two round"):
        add(poutine.do(shop, {"x1": 12.0}), [SALES])()


def test_do_outside_on_an_aggregated_value_is_an_error_that_names_it(add):
    # It would change nothing below: the sum is no cause of its parts
    with pytest.raises(pm.PyroMacroError, match="sales"):
        poutine.do(add(shop, [SALES]), {"sales": 40.0})()


# Two macro_do on disjoint sites


def held(form, *names, micro):
    """A context needs all random sites so far in ``given``, those it adds included."""
    return [*names, micro] if form == "context" else list(names)


def on_both(law_a, law_b):
    """``stores`` by hand: laws of both micro states, as functions of z."""

    def by_hand():
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        a1, a2 = on_fibre("A", *law_a(z), 5.0).unbind(-1)
        b1, b2 = on_fibre("B", *law_b(z), 6.0).unbind(-1)
        for name, value in (("a1", a1), ("a2", a2), ("b1", b1), ("b2", b2)):
            pyro.deterministic(name, value)
        pyro.sample("y", dist.Normal(a1 + 2 * a2 + 3 * b1 - b2 + z, 0.5))

    return by_hand


def law_of(part, rows, values, held=False):
    """The law of a part of (a1, a2, b1, b2) given rows of it, and z if ``held``."""

    def law(z):
        mean, cov = given_total(*stores_law(z if held else None), rows, values)
        return mean[part], cov[part, part]

    return law


FIRST, SECOND = slice(0, 2), slice(2, 4)
A_ROW, B_ROW = [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]
BOTH = ("A", "B")


@pytest.mark.parametrize("inner", ["A", "B"])
def test_two_nested_macro_do_each_follow_the_law_of_their_program(inner):
    # Cut off by the first, one micro state says nothing about the other
    a, b = {A: pm.Natural(5.0)}, {B: pm.Natural(6.0)}
    first, second = (a, b) if inner == "A" else (b, a)
    model = pm.macro_do(pm.macro_do(stores, first), second)
    by_hand = on_both(law_of(FIRST, [A_ROW], [5.0]), law_of(SECOND, [B_ROW], [6.0]))
    assert_same_program(model, by_hand, macros=BOTH)


def test_two_nested_macro_do_with_given_hold_the_cause(do, form):
    model = do(
        do(stores, {A: pm.Natural(5.0, given=["z"])}),
        {B: pm.Natural(6.0, given=held(form, "z", micro="A__micro"))},
    )
    by_hand = on_both(
        law_of(FIRST, [A_ROW], [5.0], held=True),
        law_of(SECOND, [B_ROW], [6.0], held=True),
    )
    assert_same_program(model, by_hand, macros=BOTH)


def test_two_macro_do_in_one_handler_with_given_hold_the_cause(do, form):
    given = held(form, "z", micro="A__micro")
    model = do(
        stores,
        {A: pm.Natural(5.0, given=["z"]), B: pm.Natural(6.0, given=given)},
    )
    by_hand = on_both(
        law_of(FIRST, [A_ROW], [5.0], held=True),
        law_of(SECOND, [B_ROW], [6.0], held=True),
    )
    assert_same_program(model, by_hand, macros=BOTH)


@pytest.mark.parametrize("order", [1, -1])
def test_two_macro_do_in_one_handler_may_hold_one_another(order):
    # P(a | A = 5) and P(b | B = 6, A = 5)
    pairs = [(A, pm.Natural(5.0)), (B, pm.Natural(6.0, given=[A]))]
    model = pm.macro_do(stores, dict(pairs[::order]))
    by_hand = on_both(
        law_of(FIRST, [A_ROW], [5.0]),
        law_of(SECOND, [A_ROW, B_ROW], [5.0, 6.0]),
    )
    assert_same_program(model, by_hand, macros=BOTH)


def test_two_macro_do_in_one_handler_that_are_dependent_have_their_joint_law():
    model = pm.macro_do(stores, {A: pm.Natural(5.0), B: pm.Natural(6.0)})
    mean, cov = given_total(*stores_law(), [A_ROW, B_ROW], [5.0, 6.0])
    nodes = poutine.trace(model).get_trace().nodes
    found = sum(
        nodes[n]["fn"].log_prob(nodes[n]["value"]) for n in ("A__micro", "B__micro")
    )
    free = torch.stack([nodes["a1"]["value"], nodes["b1"]["value"]])
    law = dist.MultivariateNormal(mean[[0, 2]], cov[[0, 2]][:, [0, 2]])
    assert torch.isclose(found, law.log_prob(free))


def test_two_macro_do_in_one_handler_that_are_dependent_need_a_joint_law():
    model = pm.macro_do(stores, {A: pm.Natural(5.0), B: pm.Residual(6.0, "b1")})
    with pytest.raises(pm.UnsupportedLaw, match="'A' and 'B' are dependent.*'z'"):
        model()


@pytest.mark.parametrize("order", [1, -1])
def test_two_macro_do_in_one_handler_hold_the_value_that_is_set(order):
    # One is moved to a point: the other may be held at its value, or not
    pairs = [(A, pm.Allocate(5.0, [0.4, 0.6])), (B, pm.Natural(6.0, given=[A]))]
    model = pm.macro_do(stores, dict(pairs[::order]))

    def by_hand():
        z = pyro.sample("z", dist.Normal(0.5, 1.0))
        law = law_of(SECOND, [A_ROW, B_ROW], [5.0, 6.0])
        b1, b2 = on_fibre("B", *law(z), 6.0).unbind(-1)
        a1, a2 = torch.tensor(2.0), torch.tensor(3.0)
        for name, value in (("a1", a1), ("a2", a2), ("b1", b1), ("b2", b2)):
            pyro.deterministic(name, value)
        pyro.sample("y", dist.Normal(a1 + 2 * a2 + 3 * b1 - b2 + z, 0.5))

    assert_same_program(model, by_hand, macros=BOTH)


def two_floors():
    shop()
    u1 = pyro.sample("u1", dist.Normal(1.0, 1.0))
    u2 = pyro.sample("u2", dist.Normal(2.0, 3.0))
    pyro.sample("v", dist.Normal(u1 - u2, 1.0))


def two_floors_by_hand():
    shop_by_hand()
    u1 = pyro.sample("u1", dist.Normal(1.0 + 0.1 * (5 - 3), (1 - 0.1) ** 0.5))
    u2 = pyro.deterministic("u2", 5 - u1)
    pyro.sample("v", dist.Normal(u1 - u2, 1.0))


UPPER = pm.MacroVariable("upper", micro=["u1", "u2"])


def test_two_macro_do_on_independent_parts_of_a_program(do, form):
    given = ["sales__micro", "w", "y"] if form == "context" else []
    upper = {UPPER: pm.Natural(5.0, given=given)}
    nested = do(do(two_floors, NATURAL), upper)
    together = do(two_floors, {**NATURAL, **upper})
    for model in (nested, together):
        assert_same_program(model, two_floors_by_hand, macros=("sales", "upper"))


def test_two_nested_macro_do_may_come_in_either_order(form, do):
    if form == "context":
        upper = {UPPER: pm.Natural(5.0, given=["sales__micro", "w", "y"])}
    else:
        upper = {UPPER: pm.Natural(5.0)}
    model = do(do(two_floors, upper), NATURAL)
    assert_same_program(model, two_floors_by_hand, macros=("sales", "upper"))


def test_second_macro_do_may_hold_a_site_after_the_first():
    upper = {UPPER: pm.Natural(5.0, given=["w"])}
    model = pm.macro_do(pm.macro_do(two_floors, NATURAL), upper)
    assert_same_program(model, two_floors_by_hand, macros=("sales", "upper"))


@pytest.mark.parametrize("realization", [pm.Proportional(5.0), pm.Shift(2.0)])
def test_second_macro_do_may_act_on_the_natural_state(do, form, realization):
    if form == "context" and isinstance(realization, pm.Shift):
        held = ["sales__micro", "w", "y"]
        realization = pm.Shift(2.0, given=held)

    def by_hand():
        shop_by_hand()
        loc, scale = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
        natural = pyro.sample("upper__micro", dist.Normal(loc, scale).to_event(1))
        if isinstance(realization, pm.Shift):
            u1, u2 = natural + 2.0 * torch.tensor([0.1, 0.9])
        else:
            u1, u2 = natural * 5.0 / natural.sum()
        pyro.deterministic("u1", u1)
        pyro.deterministic("u2", u2)
        pyro.sample("v", dist.Normal(u1 - u2, 1.0))

    model = do(do(two_floors, NATURAL), {UPPER: realization})
    assert_same_program(model, by_hand, macros=("sales", "upper"))


@pytest.mark.parametrize("effect_first", [False, True])
def test_two_macro_do_where_one_acts_on_the_other(effect_first):
    # r_i = 2 x_i + noise: P(r | R = v) has the x_i integrated out, as they are given
    # X = 33 where that is the program intervened on, or as they were where not.
    revenue = pm.MacroVariable("revenue", micro=["r1", "r2"])

    def chain():
        for i, (loc, scale) in enumerate([(10.0, 2.0), (20.0, 1.0)], start=1):
            x = pyro.sample(f"x{i}", dist.Normal(loc, scale))
            pyro.sample(f"r{i}", dist.Normal(2 * x, 1.0))

    on_r = {revenue: pm.Natural(70.0)}
    if effect_first:
        model = pm.macro_do(pm.macro_do(chain, on_r), NATURAL)
        mean = torch.tensor([20.0, 40.0])
        cov = torch.diag(torch.tensor([17.0, 5.0]))
    else:
        model = pm.macro_do(pm.macro_do(chain, NATURAL), on_r)
        mean = 2 * torch.tensor([12.4, 20.6])
        cov = 4 * 0.8 * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]) + torch.eye(2)

    def by_hand():
        x1 = pyro.sample("x1", dist.Normal(12.4, 0.8**0.5))
        pyro.deterministic("x2", 33 - x1)
        law = given_total(mean, cov, [[1.0, 1.0]], [70.0])
        r1, r2 = on_fibre("revenue", *law, 70.0).unbind(-1)
        pyro.deterministic("r1", r1)
        pyro.deterministic("r2", r2)

    assert_same_program(model, by_hand, macros=("sales", "revenue"))


# Two macro_do on shared sites


OVERLAP = pm.MacroVariable("overlap", micro=["x2", "w"])


def test_two_nested_macro_do_on_a_shared_site_are_an_error_that_names_it(do):
    allocated = {OVERLAP: pm.Allocate(5.0, [0.5, 0.5])}
    for first, second in ((NATURAL, allocated), (allocated, NATURAL)):
        with pytest.raises(pm.PyroMacroError, match="'x2' is already set by a"):
            do(do(shop, first), second)()


def test_two_macro_do_on_the_same_variable_are_an_error(do):
    with pytest.raises(pm.PyroMacroError, match="already set by a macro_do inside"):
        do(do(shop, NATURAL), {SALES: pm.Natural(30.0)})()


def test_two_macro_do_on_a_shared_site_in_one_handler_are_an_error_that_names_it(do):
    with pytest.raises(pm.PyroMacroError, match="'x2' belongs to both"):
        do(shop, {**NATURAL, OVERLAP: pm.Allocate(5.0, [1.0, 0.0])})()


def test_two_macro_do_on_a_shared_site_in_one_handler_have_their_joint_law(do):
    nodes = poutine.trace(do(shop, {**NATURAL, OVERLAP: pm.Natural(25.0)})).get_trace()
    law = nodes.nodes["sales_overlap__micro"]["fn"]
    # x1, x2, w with x1 + x2 = 33 and x2 + w = 25
    mean, cov = given_total(
        torch.tensor([10.0, 20.0, 1.0]),
        torch.diag(torch.tensor([4.0, 1.0, 9.0])),
        [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]],
        [33.0, 25.0],
    )
    assert torch.allclose(law.mean, mean) and torch.allclose(law.covariance_matrix, cov)


def test_two_macro_do_of_one_name_in_one_handler_are_an_error(do):
    other = pm.MacroVariable("sales", micro=["w", "y"])
    with pytest.raises(pm.PyroMacroError, match="two macro-variables have the name"):
        do(shop, {**NATURAL, other: pm.Natural(5.0)})()


def test_aggregates_may_share_sites(add):
    def totals(trace):
        x2, w = trace.nodes["x2"]["value"], trace.nodes["w"]["value"]
        return sales_total(trace) | {"overlap": x2 + w}

    assert_only_added(add(shop, [SALES, OVERLAP]), shop, totals)
    assert_only_added(add(add(shop, [SALES]), [OVERLAP]), shop, totals)
