# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``macro_do`` and ``aggregate`` on sites that are kept, around and inside.

The parts of a macro-variable share a cause that is fused away: in the consolidated
program they are correlated, without one acting on the other, and what was hidden acts
on the effect as well.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope

import pyro_macro as pm

from .consolidated import TOLERANCE, assert_same_law, gaussian_law, tensors, valued
from .models import (
    NATURAL,
    SALES,
    A,
    B,
    assert_only_added,
    assert_same_program,
    assert_same_traces,
    given_total,
    is_deterministic,
    on_fibre,
    sales_total,
    stochastic,
    stores,
    stores_law,
    under,
)

KEPT = ("z", "x1", "x2", "y")
GIVEN_Z = {SALES: pm.Natural(33.0, given=["z"])}


def shelf(y=None):
    """h is hidden, and acts on both parts and on the effect; m is on the way there."""
    z = pyro.sample("z", dist.Normal(1.0, 1.5))
    h = pyro.sample("h", dist.Normal(z, 0.5))
    x1 = pyro.sample("x1", dist.Normal(10 + 2 * h, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20 - h, 1.0))
    m = pyro.sample("m", dist.Normal(x1 + 3 * x2, 0.5))
    return pyro.sample("y", dist.Normal(m + 5 * h + z, 0.5), obs=y)


def fused_shelf(model=shelf, keep=KEPT, allow=("m",), **kwargs):
    return pm.consolidate(model, keep, allow, **kwargs)


def parts_law(z=None):
    """Mean and covariance of (x1, x2), given z or with z integrated out."""
    slope = torch.tensor([2.0, -1.0])
    own = torch.diag(torch.tensor([4.0, 1.0]))
    mean, variance = (1.0, 2.5) if z is None else (z.unsqueeze(-1), 0.25)
    return torch.tensor([10.0, 20.0]) + slope * mean, own + variance * torch.outer(
        slope, slope
    )


def effect(z, x1, x2, values, y=None):
    """The effect where the parts are set: h is what z makes it, whatever they are."""
    if "m" in values:
        mean, variance = values["m"] + 6 * z, 0.25 + 25 * 0.25
    else:
        mean, variance = x1 + 3 * x2 + 6 * z, 0.25 + 0.25 + 25 * 0.25
    return pyro.sample("y", dist.Normal(mean, variance**0.5), obs=y)


def shelf_by_hand(micro, **values):
    """:param micro: from z to the parts, a site of which is the first one."""

    def program(y=None):
        z = pyro.sample("z", dist.Normal(1.0, 1.5))
        x1, x2 = micro(z)
        return effect(z, x1, x2, values, y)

    return program


def natural(value=33.0, given=False):
    def micro(z):
        mean, cov = given_total(*parts_law(z if given else None), [[1.0, 1.0]], [value])
        x1 = pyro.sample("x1", dist.Normal(mean[..., 0], cov[0, 0].sqrt()))
        return x1, pyro.deterministic("x2", value - x1)

    return micro


def at_point(x1, x2):
    def micro(z):
        return (
            pyro.deterministic("x1", torch.tensor(x1)),
            pyro.deterministic("x2", torch.tensor(x2)),
        )

    return micro


def right_or_refused(model, by_hand, *args, **kwargs):
    """The right program, or an error that says what to change; nothing in between."""
    try:
        poutine.trace(model).get_trace(*args)
    except pm.PyroMacroError:
        return
    assert_same_program(model, by_hand, *args, **kwargs)


# The realizations


@pytest.mark.parametrize("values", [{}, {"m": 40.0}], ids=str)
@pytest.mark.parametrize("given", [False, True])
def test_macro_do_on_kept_sites_has_the_natural_law(values, given):
    intervened = pm.macro_do(fused_shelf(), GIVEN_Z if given else NATURAL)
    model = poutine.do(intervened, data=tensors(values)) if values else intervened
    by_hand = shelf_by_hand(natural(given=given), **values)
    trace = assert_same_program(model, by_hand, macros=("sales", "m"))
    assert "h" not in trace.nodes
    y = torch.tensor(70.0)
    assert_same_program(model, by_hand, y, macros=("sales", "m"))


@pytest.mark.parametrize("given", [False, True])
def test_macro_do_on_kept_sites_has_the_same_effect_as_unfused(given):
    """The law of the effect: a mixture over nothing but what is in the trace."""
    by_hand = shelf_by_hand(natural(given=given))
    wanted = gaussian_law(by_hand, ["y"])
    n = 4000
    interventions = GIVEN_Z if given else NATURAL
    for program in (shelf, fused_shelf()):
        with pyro.plate("draws", n, dim=-1):
            trace = poutine.trace(pm.macro_do(program, interventions)).get_trace()
        y = trace.nodes["y"]["value"]
        mean, variance = wanted[0][0], wanted[1][0, 0]
        assert (y.mean() - mean).abs() < 5 * (variance / n).sqrt()
        assert (y.var() - variance).abs() < 5 * variance * (2 / n) ** 0.5


REALIZATIONS = {
    "Allocate": (pm.Allocate(33.0, [1 / 3, 2 / 3]), at_point(11.0, 22.0)),
    "MaxEntropy": (
        pm.MaxEntropy(
            33.0,
            reference=dist.Normal(torch.tensor([10.0, 20.0]).double(), 1.0).to_event(1),
        ),
        None,
    ),
    "Explicit": (
        pm.Explicit(
            33.0, lambda v: dist.Delta(torch.stack([v / 3, 2 * v / 3]), event_dim=1)
        ),
        at_point(11.0, 22.0),
    ),
}


@pytest.mark.parametrize("name", REALIZATIONS)
def test_macro_do_of_other_realizations_cuts_the_parts_off(name):
    realization, micro = REALIZATIONS[name]
    if micro is None:

        def micro(z):
            x1 = pyro.sample("x1", dist.Normal(11.5, 0.5**0.5))
            return x1, pyro.deterministic("x2", 33 - x1)

    model = pm.macro_do(fused_shelf(), {SALES: realization})
    trace = assert_same_program(model, shelf_by_hand(micro))
    assert "h" not in trace.nodes


@pytest.mark.parametrize("absorb", ["x1", "x2"])
def test_macro_do_residual_draws_the_other_part_from_its_own_law(absorb):
    """With its causes integrated out: those fused away, and those kept."""

    def micro(z):
        mean, cov = parts_law()
        if absorb == "x2":
            x1 = pyro.sample("x1", dist.Normal(mean[0], cov[0, 0].sqrt()))
        else:
            x1 = pyro.sample("x1", dist.Normal(33 - mean[1], cov[1, 1].sqrt()))
        return x1, pyro.deterministic("x2", 33 - x1)

    unfused = pm.macro_do(shelf, {SALES: pm.Residual(33.0, absorb=absorb)})
    fused = pm.macro_do(fused_shelf(), {SALES: pm.Residual(33.0, absorb=absorb)})
    laws = [
        poutine.trace(m).get_trace().nodes["sales__micro"]["fn"] for m in (unfused,)
    ]
    trace = assert_same_program(fused, shelf_by_hand(micro))
    value = trace.nodes["sales__micro"]["value"]
    found = trace.nodes["sales__micro"]["fn"].log_prob(value)
    torch.testing.assert_close(found, laws[0].log_prob(value), **TOLERANCE)


def test_macro_do_on_the_natural_state_keeps_what_it_tells_of_the_effect():
    """What is added to sales is added to a natural state, which is that of one world.

    There is one ``h`` behind the natural parts and the effect.
    """
    fused = pm.macro_do(fused_shelf(), {SALES: pm.Shift(5.0, along=[0.25, 0.75])})
    mean, cov = gaussian_law(shelf, list(KEPT))
    gain = torch.linalg.solve(cov[:3, :3], cov[:3, 3])
    for point in ([0.0, 10.0, 20.0], [1.0, 15.0, 18.0], [-1.0, 5.0, 21.0]):
        z, *natural_parts = torch.tensor(point)
        values = {"z": z, "sales__micro": torch.stack(natural_parts)}
        try:
            trace = poutine.trace(valued(fused, values)).get_trace()
        except pm.PyroMacroError:
            return
        wanted = mean[3] + gain @ (torch.tensor(point) - mean[:3])
        wanted = wanted + 5 * (0.25 + 3 * 0.75)  # what is added moves the effect
        found = trace.nodes["y"]["fn"]
        torch.testing.assert_close(found.mean, wanted, **TOLERANCE)
        variance = cov[3, 3] - gain @ cov[:3, 3]
        torch.testing.assert_close(found.variance, variance, **TOLERANCE)


def test_macro_do_given_a_fused_site_is_an_error():
    """It is no site of the program any more: it cannot be held at its value."""
    model = pm.macro_do(fused_shelf(), {SALES: pm.Natural(33.0, given=["h"])})
    with pytest.raises(pm.PyroMacroError, match="'h'"):
        model()


@pytest.mark.parametrize("micro", [["x1", "h"], ["m", "x1"], ["h", "m"]], ids=str)
def test_macro_do_on_a_fused_site_is_an_error(micro):
    total = pm.MacroVariable("total", micro=micro)
    for realization in (pm.Allocate(1.0, [0.5, 0.5]), pm.Natural(1.0)):
        with pytest.raises(pm.PyroMacroError):
            pm.macro_do(fused_shelf(), {total: realization})()


def test_macro_do_in_a_context_is_right_or_refused():
    fused = fused_shelf()
    point = {SALES: pm.Allocate(33.0, [1 / 3, 2 / 3])}
    cases = [
        (GIVEN_Z, natural(given=True)),
        (NATURAL, natural()),
        (point, at_point(11.0, 22.0)),
    ]
    for interventions, micro in cases:
        model = under("context", pm.macro_do, fused, interventions)
        right_or_refused(model, shelf_by_hand(micro))


def test_macro_do_as_decorator():
    model = under("decorator", pm.macro_do, fused_shelf(), NATURAL)
    assert_same_program(model, shelf_by_hand(natural()))


def test_macro_do_leaves_the_consolidated_program_as_it_was():
    fused = fused_shelf()
    pm.macro_do(fused, NATURAL)()
    assert_same_law(fused, shelf, KEPT)


@pytest.mark.parametrize("given", [False, True])
def test_macro_do_in_a_plate_outside(given):
    def run(model):
        def outer():
            with pyro.plate("n", 4, dim=-1):
                return model()

        return outer

    model = pm.macro_do(fused_shelf(), GIVEN_Z if given else NATURAL)
    trace = assert_same_program(run(model), run(shelf_by_hand(natural(given=given))))
    assert trace.nodes["sales__micro"]["value"].shape == (4, 2)


def test_macro_do_over_a_plate_inside():
    total = pm.MacroVariable("total", micro="x", over="products")

    def model():
        with pyro.plate("products", 3, dim=-1):
            h = pyro.sample("h", dist.Normal(torch.tensor([1.0, 2.0, 3.0]), 1.0))
            x = pyro.sample("x", dist.Normal(2 * h, 1.0))
            pyro.sample("y", dist.Normal(x + h, 1.0))

    def by_hand():
        mean, cov = torch.tensor([2.0, 4.0, 6.0]), 5 * torch.eye(3)
        x = on_fibre("total", *given_total(mean, cov, [[1.0] * 3], [20.0]), 20.0)
        with pyro.plate("products", 3, dim=-1):
            x = pyro.deterministic("x", x)
            loc = x + torch.tensor([1.0, 2.0, 3.0])
            pyro.sample("y", dist.Normal(loc, 2.0**0.5))

    fused = pm.consolidate(model, ["x", "y"])
    intervened = pm.macro_do(fused, {total: pm.Natural(20.0)})
    assert_same_program(intervened, by_hand, macros=("total",))


# With do and condition


def test_macro_do_outside_of_do_is_right_or_refused():
    model = pm.macro_do(poutine.do(fused_shelf(), data=tensors({"m": 40.0})), NATURAL)
    by_hand = shelf_by_hand(natural(), m=40.0)
    right_or_refused(model, by_hand, macros=("sales", "m"))


def test_macro_do_outside_of_a_forbidden_do_is_an_error():
    for name in ("h", "y"):
        fused = fused_shelf(keep=["z", "x1", "x2"], allow=["m"])
        inside = pm.macro_do(poutine.do(fused, data=tensors({name: 1.0})), NATURAL)
        outside = poutine.do(pm.macro_do(fused, NATURAL), data=tensors({name: 1.0}))
        with pytest.raises(pm.PyroMacroError):
            inside()
        with pytest.raises(pm.InterventionNotAllowed, match=f"do\\({name}"):
            outside()


@pytest.mark.parametrize("given", [False, True])
def test_macro_do_outside_of_condition_is_right_or_refused(given):
    data = tensors({"z": 2.0})
    model = pm.macro_do(
        poutine.condition(fused_shelf(), data), GIVEN_Z if given else NATURAL
    )
    # Observed inside, z is held by the natural law
    by_hand = poutine.condition(shelf_by_hand(natural(given=True)), data)
    right_or_refused(model, by_hand)


@pytest.mark.parametrize("given", [False, True])
def test_macro_do_inside_of_condition(given):
    data = tensors({"z": 2.0, "y": 70.0})
    model = pm.macro_do(fused_shelf(), GIVEN_Z if given else NATURAL)
    by_hand = shelf_by_hand(natural(given=given))
    assert_same_program(
        poutine.condition(model, data), poutine.condition(by_hand, data)
    )


def test_macro_do_of_a_program_that_is_conditioned_inside():
    data = tensors({"z": 2.0})
    model = pm.macro_do(fused_shelf(poutine.condition(shelf, data)), NATURAL)
    by_hand = poutine.condition(shelf_by_hand(natural(given=True)), data)
    assert_same_program(model, by_hand)


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_macro_do_and_do_on_a_part_are_an_error(where):
    data = tensors({"x1": 1.0})
    if where == "inside":
        model = pm.macro_do(poutine.do(fused_shelf(), data=data), NATURAL)
    else:
        model = poutine.do(pm.macro_do(fused_shelf(), NATURAL), data=data)
    with pytest.raises(pm.PyroMacroError, match="x1"):
        model()


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_macro_do_and_scope_are_right_or_refused(where):
    fused = fused_shelf()
    if where == "outside":
        model, macro = scope(pm.macro_do(fused, NATURAL), prefix="s"), "s/sales"
    else:
        micro = pm.MacroVariable("sales", micro=["s/x1", "s/x2"])
        model = pm.macro_do(scope(fused, prefix="s"), {micro: pm.Natural(33.0)})
        macro = "sales"

    def by_hand():
        class Rename(poutine.messenger.Messenger):
            def _pyro_sample(self, msg):
                if not msg["name"].endswith("__free"):
                    msg["name"] = "s/" + msg["name"]

        return Rename()(shelf_by_hand(natural()))()

    right_or_refused(model, by_hand, macros=(macro,))


@pytest.mark.parametrize("handler", ["mask", "scale", "block", "replay"])
def test_macro_do_around_a_consolidated_program_in_another_handler(handler):
    fused = fused_shelf()
    by_hand = shelf_by_hand(natural())
    if handler == "mask":
        wrap = lambda m: poutine.mask(m, mask=False)  # noqa: E731
    elif handler == "scale":
        wrap = lambda m: poutine.scale(m, scale=0.3)  # noqa: E731
    elif handler == "block":
        wrap = lambda m: poutine.block(m, hide=["y"])  # noqa: E731
    else:
        source = poutine.trace(fused).get_trace()
        source.remove_node("x1")
        source.remove_node("x2")
        wrap = lambda m: poutine.replay(m, trace=source)  # noqa: E731
    right_or_refused(pm.macro_do(wrap(fused), NATURAL), wrap(by_hand))


# Two macro_do


FIRST, SECOND = slice(0, 2), slice(2, 4)
A_ROW, B_ROW = [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]


def fused_stores():
    """``z`` is fused away: a cause of both micro states and of the effect."""
    return pm.consolidate(stores, ["a1", "b1", "a2", "b2", "y"])


def stores_by_hand(law_a, law_b):
    def by_hand():
        a1, a2 = on_fibre("A", *law_a, 5.0).unbind(-1)
        b1, b2 = on_fibre("B", *law_b, 6.0).unbind(-1)
        for name, value in (("a1", a1), ("a2", a2), ("b1", b1), ("b2", b2)):
            pyro.deterministic(name, value)
        mean = a1 + 2 * a2 + 3 * b1 - b2 + 0.5
        pyro.sample("y", dist.Normal(mean, 1.25**0.5))

    return by_hand


def law_given(part, rows, values):
    mean, cov = given_total(*stores_law(), rows, values)
    return mean[part], cov[part, part]


@pytest.mark.parametrize("inner", ["A", "B"])
def test_two_macro_do_on_disjoint_sites_nested(inner):
    a, b = {A: pm.Natural(5.0)}, {B: pm.Natural(6.0)}
    first, second = (a, b) if inner == "A" else (b, a)
    model = pm.macro_do(pm.macro_do(fused_stores(), first), second)
    by_hand = stores_by_hand(
        law_given(FIRST, [A_ROW], [5.0]), law_given(SECOND, [B_ROW], [6.0])
    )
    right_or_refused(model, by_hand, macros=("A", "B"))


def test_two_macro_do_on_disjoint_sites_in_one_handler():
    model = pm.macro_do(fused_stores(), {A: pm.Natural(5.0), B: pm.Natural(6.0)})
    nodes = poutine.trace(model).get_trace().nodes
    mean, cov = given_total(*stores_law(), [A_ROW, B_ROW], [5.0, 6.0])
    found = sum(
        nodes[n]["fn"].log_prob(nodes[n]["value"]) for n in ("A__micro", "B__micro")
    )
    free = torch.stack([nodes["a1"]["value"], nodes["b1"]["value"]])
    law = dist.MultivariateNormal(mean[[0, 2]], cov[[0, 2]][:, [0, 2]])
    torch.testing.assert_close(found, law.log_prob(free), **TOLERANCE)
    a1, b1 = free
    mean = a1 + 2 * (5 - a1) + 3 * b1 - (6 - b1) + 0.5
    torch.testing.assert_close(nodes["y"]["fn"].mean, mean, **TOLERANCE)
    torch.testing.assert_close(nodes["y"]["fn"].variance, torch.tensor(1.25))
    assert "z" not in nodes


@pytest.mark.parametrize("order", [1, -1])
def test_two_macro_do_one_given_the_other(order):
    pairs = [(A, pm.Natural(5.0)), (B, pm.Natural(6.0, given=[A]))]
    model = pm.macro_do(fused_stores(), dict(pairs[::order]))
    by_hand = stores_by_hand(
        law_given(FIRST, [A_ROW], [5.0]),
        law_given(SECOND, [A_ROW, B_ROW], [5.0, 6.0]),
    )
    assert_same_program(model, by_hand, macros=("A", "B"))


OVERLAP = pm.MacroVariable("overlap", micro=["x2", "z"])
SHARED = pm.MacroVariable("shared", micro=["a2", "b2"])


def test_two_macro_do_on_a_shared_site_are_an_error():
    allocated = {SHARED: pm.Allocate(5.0, [0.5, 0.5])}
    first = {A: pm.Natural(5.0)}
    with pytest.raises(pm.PyroMacroError, match="'a2' belongs to both"):
        pm.macro_do(fused_stores(), {**first, **allocated})()
    for inner, outer in ((first, allocated), (allocated, first)):
        with pytest.raises(pm.PyroMacroError):
            pm.macro_do(pm.macro_do(fused_stores(), inner), outer)()
    with pytest.raises(pm.PyroMacroError):
        pm.macro_do(pm.macro_do(fused_stores(), first), {A: pm.Natural(6.0)})()


def test_two_macro_do_on_a_shared_site_in_one_handler_have_their_joint_law():
    model = pm.macro_do(fused_stores(), {A: pm.Natural(5.0), SHARED: pm.Natural(6.0)})
    nodes = poutine.trace(model).get_trace().nodes
    law = nodes["A_shared__micro"]["fn"]
    mean, cov = stores_law()
    part = [0, 1, 3]  # a1, a2, b2
    mean, cov = given_total(
        mean[part],
        cov[part][:, part],
        [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]],
        [5.0, 6.0],
    )
    torch.testing.assert_close(law.mean, mean, **TOLERANCE)
    torch.testing.assert_close(law.covariance_matrix, cov, **TOLERANCE)


# Inside


def test_macro_do_inside_is_part_of_the_program():
    inside = pm.macro_do(shelf, NATURAL)
    keep = ["z", "sales__micro", "x1", "x2", "y"]
    fused = pm.consolidate(inside, keep, allow=["m"])
    # A law that cannot be taken apart may keep others from being fused, too
    fuses = "h" not in fused.sites
    by_hand = shelf_by_hand(natural()) if fuses else natural_unfused
    assert_same_program(fused, by_hand)
    data = tensors({"m": 40.0})
    set_m = poutine.do(fused, data=data)
    if fuses:
        by_hand = shelf_by_hand(natural(), m=40.0)
        assert_same_program(set_m, by_hand, macros=("sales", "m"))
    else:
        assert_same_program(set_m, poutine.do(natural_unfused, data=data))


def test_macro_do_inside_leaves_what_it_sets_to_nobody_else():
    inside = pm.macro_do(shelf, NATURAL)
    fused = pm.consolidate(inside, ["z", "sales__micro", "x1", "x2", "y"], ["m"])
    for name in {"h", "x1", "sales"} - ({"h"} & set(fused.sites)):
        with pytest.raises(pm.PyroMacroError):
            poutine.do(fused, data=tensors({name: 1.0}))()


def test_macro_do_inside_and_outside():
    """Nested around: the outer one reads a program in which the inner one acts."""
    inside = pm.macro_do(stores, {A: pm.Natural(5.0)})
    keep = ["A__micro", "a1", "a2", "b1", "b2", "y"]
    fused = pm.consolidate(inside, keep)
    model = pm.macro_do(fused, {B: pm.Natural(6.0)})
    laws = law_given(FIRST, [A_ROW], [5.0]), law_given(SECOND, [B_ROW], [6.0])
    if "z" in fused.sites:
        unfused = pm.macro_do(inside, {B: pm.Natural(6.0)})
        source = poutine.trace(unfused).get_trace()
        assert_same_traces(
            poutine.trace(poutine.replay(model, trace=source)).get_trace(),
            source,
            macros=("B",),
        )
    else:
        assert_same_program(model, stores_by_hand(*laws), macros=("A", "B"))


def test_macro_do_inside_of_a_point_fuses():
    inside = pm.macro_do(shelf, {SALES: pm.Allocate(33.0, [1 / 3, 2 / 3])})
    fused = pm.consolidate(inside, ["y"])
    assert fused.sites == ("y",)
    mean, cov = gaussian_law(fused, ["y"])
    torch.testing.assert_close(mean, torch.tensor([11.0 + 66.0 + 6.0]), **TOLERANCE)
    wanted = 36 * 2.25 + 0.5 + 25 * 0.25
    torch.testing.assert_close(cov, torch.tensor([[wanted]]), **TOLERANCE)


# aggregate


@pytest.mark.parametrize("form", ["wrapper", "decorator", "context"])
def test_aggregate_on_kept_sites_only_adds_the_total(form):
    fused = fused_shelf()
    model = under(form, pm.aggregate, fused, [SALES])
    assert_only_added(model, fused, sales_total)


def test_aggregate_has_the_law_of_the_total_of_the_program():
    n = 4000
    with pyro.plate("draws", n, dim=-1):
        trace = poutine.trace(pm.aggregate(fused_shelf(), [SALES])).get_trace()
    total = trace.nodes["sales"]["value"]
    # Var = 14 + 3.5 - 2 * 5: without what they share it would be 17.5
    assert (total.mean() - 31).abs() < 5 * (7.5 / n) ** 0.5
    assert (total.var() - 7.5).abs() < 5 * 7.5 * (2 / n) ** 0.5


def test_aggregate_on_a_fused_site_is_an_unknown_site():
    total = pm.MacroVariable("total", micro=["x1", "h"])
    with pytest.raises(pm.UnknownSite, match="'h'"):
        pm.aggregate(fused_shelf(), [total])()


def test_aggregate_inside_may_be_kept():
    inside = pm.aggregate(shelf, [SALES])
    fused = pm.consolidate(inside, ["sales", "y"], allow=["m", "x1"])
    for values in ({}, {"m": 40.0}, {"x1": 5.0}):
        model = poutine.do(fused, data=tensors(values)) if values else fused
        mean, cov = gaussian_law(model, ["sales", "y"])
        # x1 + x2 in place of x2, in the program as it is
        whole_mean, whole_cov = gaussian_law(
            poutine.do(shelf, data=tensors(values)) if values else shelf, list(KEPT)
        )
        total = torch.tensor([0.0, 1.0, 1.0, 0.0])
        if "x1" in values:  # the total is of the value that propagates
            total = torch.tensor([0.0, 0.0, 1.0, 0.0])
        rows = torch.stack([total, torch.tensor([0.0, 0.0, 0.0, 1.0])])
        shift = torch.tensor([values.get("x1", 0.0), 0.0])
        torch.testing.assert_close(mean, rows @ whole_mean + shift, **TOLERANCE)
        torch.testing.assert_close(cov, rows @ whole_cov @ rows.T, **TOLERANCE)


def test_aggregate_and_macro_do_together():
    model = pm.aggregate(pm.macro_do(fused_shelf(), NATURAL), [OVERLAP])
    trace = poutine.trace(model).get_trace()
    found = stochastic(trace)
    assert is_deterministic(found["overlap"])
    total = found["x2"]["value"] + found["z"]["value"]
    torch.testing.assert_close(found["overlap"]["value"], total)
    assert_same_program(
        pm.macro_do(pm.aggregate(shelf, [OVERLAP]), NATURAL),
        pm.aggregate(natural_unfused, [OVERLAP]),
    )


def natural_unfused():
    z = pyro.sample("z", dist.Normal(1.0, 1.5))
    h = pyro.sample("h", dist.Normal(z, 0.5))
    x1, x2 = natural()(z)
    m = pyro.sample("m", dist.Normal(x1 + 3 * x2, 0.5))
    pyro.sample("y", dist.Normal(m + 5 * h + z, 0.5))


def test_law_by_hand_is_that_of_the_program():
    """The comparison itself: the parts by hand, and a wrong one that is seen."""
    found = gaussian_law(shelf, ["x1", "x2"])
    torch.testing.assert_close(found, parts_law(), **TOLERANCE)
    with pytest.raises(AssertionError):
        assert_same_program(
            pm.macro_do(fused_shelf(), NATURAL), shelf_by_hand(natural(34.0))
        )
