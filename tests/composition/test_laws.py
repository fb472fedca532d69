# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws that are not Gaussian: plain calls, ``condition``, ``do``, two interventions.

Each law is compared with the program after the intervention, written by hand.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine import condition

import pyro_macro as pm

from .laws import (
    CASES,
    EXTREME,
    FINITE,
    GAMMA,
    GIVEN,
    POISSON,
    SAMPLED,
    ByHand,
    chance_of_one,
    every_law,
    pair,
    shares,
    splits,
)
from .models import SALES, assert_only_added, assert_same_program, stochastic

W = {"w": torch.tensor(2.0, dtype=torch.float64)}
Y = {"y": torch.tensor(9.0, dtype=torch.float64)}
pytestmark = pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")


# Plain calls and traces


@every_law
def test_plain_call_returns_what_the_program_returns(law):
    assert law.intervened().shape == ()
    assert law.intervened(Y["y"]) == 9.0


@every_law
def test_trace_has_the_density_of_the_program_by_hand(law):
    trace = assert_same_program(law.intervened, law.case.by_hand)
    own = {"sales", "sales__micro", "x1", "x2", "w", "y"}
    assert set(stochastic(trace)) == own | ({"c"} if law.case.cause else set())
    x = trace.nodes["sales__micro"]["value"]
    torch.testing.assert_close(law.case.total(x), torch.tensor(law.case.value))


@every_law
def test_draws_are_as_often_as_by_hand(law):
    # Within 4.5 standard errors: chance 1e-5 each
    def mean(program):
        with pyro.plate("draws", 400, dim=-1):
            x = poutine.trace(program).get_trace().nodes["sales__micro"]["value"]
        return x[..., 0].mean(), x[..., 0].var() / 400

    found, error = mean(law.intervened)
    wanted, other = mean(law.case.by_hand)
    assert abs(found - wanted) < 4.5 * (error + other).sqrt() + 1e-12


def test_trace_of_draws_on_the_fibre_has_no_density():
    trace = poutine.trace(pm.macro_do(SAMPLED.model, SAMPLED.interventions)).get_trace()
    x = trace.nodes["sales__micro"]["value"]
    torch.testing.assert_close(x.sum(), torch.tensor(4.0))
    assert trace.nodes["sales__micro"]["fn"].method.startswith("Monte Carlo: NUTS")
    with pytest.raises(pm.UnsupportedLaw, match="without a normalized density"):
        trace.log_prob_sum()


def test_trace_of_the_smallest_has_the_density_by_hand(do):
    # f1(x1) f2(x2) / (f1 S2 + S1 f2), at 1, S the chance to lie above
    smallest = pm.MacroVariable("sales", ["x1", "x2"], (), pm.Min())
    f1, f2 = torch.exp(torch.tensor(-1.0)), torch.tensor(0.25)
    total = f1 * 0.75 + f1 * f2
    model = do(EXTREME.model, {smallest: pm.Natural(1.0)})
    for _ in range(5):
        trace = poutine.trace(model).get_trace()
        trace.compute_log_prob()
        x1, x2 = trace.nodes["sales__micro"]["value"]
        wanted = -x1 + f2.log() - total.log()
        torch.testing.assert_close(trace.nodes["sales__micro"]["log_prob"], wanted)
    # The first attains it with probability f1 S2 / total = 3/4
    with pyro.plate("draws", 400):
        x = poutine.trace(model).get_trace().nodes["sales__micro"]["value"]
    assert abs((x[:, 0] == 1.0).double().mean() - 0.75) < 4.5 * (0.1875 / 400) ** 0.5


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_aggregate_outside_sees_the_value_and_inside_the_natural_one(case):
    outside = pm.MacroVariable("again", case.macro.micro, (), case.macro.aggregation)
    model = pm.aggregate(pm.macro_do(case.model, case.interventions), [outside])
    nodes = poutine.trace(model).get_trace().nodes
    torch.testing.assert_close(nodes["again"]["value"], torch.tensor(case.value))
    plain = [pm.MacroVariable("plain", case.macro.micro, (), case.macro.aggregation)]
    assert_only_added(
        pm.aggregate(case.model, plain),
        case.model,
        lambda trace: {
            "plain": case.total(
                torch.stack([trace.nodes[n]["value"] for n in ("x1", "x2")], -1)
            )
        },
    )


def test_finite_law_is_refused_by_a_context_that_has_seen_the_cause_drawn():
    with pytest.raises(pm.UnsupportedLaw, match=r"context manager.*\['c'\]"):
        with pm.macro_do(interventions=FINITE.interventions):
            FINITE.model()


# condition


@every_law
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("data", [W, Y], ids=["beside", "effect"])
def test_condition_on_another_site_moves_no_micro_law(law, where, data):
    by_hand = condition(law.case.by_hand, data)
    if where == "inside":
        model = law.do(condition(law.case.model, data))
    else:
        model = condition(law.intervened, data)
    assert_same_program(model, by_hand)


@pytest.mark.parametrize("c", [0.0, 1.0])
def test_condition_inside_on_a_cause_is_held_and_outside_it_is_not(c):
    data = {"c": torch.tensor(c)}
    inside = pm.macro_do(condition(FINITE.model, data), FINITE.interventions)
    assert_same_program(inside, condition(GIVEN.by_hand, data))
    outside = condition(pm.macro_do(FINITE.model, FINITE.interventions), data)
    assert_same_program(outside, condition(FINITE.by_hand, data))
    for model in (
        pm.macro_do(condition(GIVEN.model, data), GIVEN.interventions),
        condition(pm.macro_do(GIVEN.model, GIVEN.interventions), data),
    ):
        assert_same_program(model, condition(GIVEN.by_hand, data))


@every_law
@pytest.mark.parametrize("name", ["x1", "x2"])
def test_condition_on_a_micro_site_is_an_error_that_names_it(law, name):
    data = {name: torch.tensor(3.5)}
    with pytest.raises(pm.PyroMacroError, match=f"'{name}' is observed"):
        law.do(condition(law.case.model, data))()
    with pytest.raises(pm.PyroMacroError, match=f"'{name}' is set by macro_do"):
        condition(law.intervened, data)()


@every_law
def test_condition_on_the_latent_site_sets_the_micro_state(law):
    state = law.case.draw(torch.Size(), torch.tensor(1.0))
    model = condition(law.intervened, {"sales__micro": state})
    trace = assert_same_program(model, law.case.by_hand)
    assert trace.nodes["sales__micro"]["is_observed"]
    for i, name in enumerate(["x1", "x2"]):
        torch.testing.assert_close(trace.nodes[name]["value"], state[i])


@every_law
def test_condition_on_the_latent_site_off_the_fibre_is_an_error(law):
    state = torch.tensor(law.case.off)
    with pytest.raises(pm.OffFibre, match=f"'sales'.*Expected {law.case.value}"):
        condition(law.intervened, {"sales__micro": state})()


# do


@every_law
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_do_on_another_site_moves_no_micro_law(law, where):
    by_hand = poutine.do(law.case.by_hand, W)
    if where == "inside":
        model = law.do(poutine.do(law.case.model, W))
    else:
        model = poutine.do(law.intervened, W)
    assert_same_program(model, by_hand)


def test_do_inside_on_a_cause_is_held_and_outside_it_is_not():
    data = {"c": torch.tensor(1.0)}
    inside = pm.macro_do(poutine.do(FINITE.model, data), FINITE.interventions)
    assert_same_program(inside, poutine.do(GIVEN.by_hand, data))
    outside = poutine.do(pm.macro_do(FINITE.model, FINITE.interventions), data)
    assert_same_program(outside, poutine.do(FINITE.by_hand, data))


@every_law
@pytest.mark.parametrize("name", ["x1", "x2"])
def test_do_on_a_micro_site_is_an_error_that_names_it(law, name):
    data = {name: torch.tensor(3.5)}
    with pytest.raises(pm.PyroMacroError, match=f"'{name}'.*poutine.do. inside"):
        law.do(poutine.do(law.case.model, data))()
    with pytest.raises(pm.PyroMacroError, match=f"'{name}'.*poutine.do. outside"):
        poutine.do(law.intervened, data)()


# Two interventions


COUNTS = pm.MacroVariable("counts", micro=["n1", "n2"])


def two_kinds():
    """Parts of two kinds, and counts whose rates no part acts on."""
    x1 = pyro.sample("x1", dist.Gamma(2.0, 3.0))
    x2 = pyro.sample("x2", dist.Gamma(1.5, 3.0))
    n1 = pyro.sample("n1", dist.Poisson(2.0))
    n2 = pyro.sample("n2", dist.Poisson(3.0))
    pyro.sample("y", dist.Normal(x1 - x2 + 2 * n1 - n2, 1.0))


def two_kinds_by_hand():
    gamma = ByHand(
        lambda x: GAMMA.log_density(x, None), lambda s: 4 * shares().sample(s)
    )
    x1, x2 = pyro.sample("sales__micro", gamma).unbind(-1)
    counts = ByHand(lambda x: splits().log_prob(x), lambda s: splits().sample(s))
    n1, n2 = pyro.sample("counts__micro", counts).unbind(-1)
    for name, value in (("x1", x1), ("x2", x2), ("n1", n1), ("n2", n2)):
        pyro.deterministic(name, value)
    pyro.sample("y", dist.Normal(x1 - x2 + 2 * n1 - n2, 1.0))


@pytest.mark.parametrize("how", ["one handler", "nested", "nested the other way"])
def test_two_interventions_on_disjoint_sites_each_have_their_law(form, do, how):
    a, b = {SALES: pm.Natural(4.0)}, {COUNTS: pm.Natural(5.0)}
    if form == "context":  # hold what is drawn before
        b = {COUNTS: pm.Natural(5.0, given=["sales__micro"])}
    if how == "one handler":
        model = do(two_kinds, {**a, **b})
    else:
        first, second = (a, b) if how == "nested" else (b, a)
        model = do(do(two_kinds, first), second)
    assert_same_program(model, two_kinds_by_hand, macros=("sales", "counts"))


@every_law
def test_two_interventions_on_a_shared_site_are_an_error_that_names_it(law):
    overlap = pm.MacroVariable("overlap", micro=["x2", "w"])
    allocated = {overlap: pm.Allocate(5.0, [0.5, 0.5])}
    with pytest.raises(pm.PyroMacroError, match="'x2' is already set by a"):
        law.do(law.intervened, allocated)()
    with pytest.raises(pm.PyroMacroError, match="'x2' is already set by a"):
        law.do(law.do(law.case.model, allocated))()
    with pytest.raises(pm.PyroMacroError, match="'x2' belongs to both"):
        pm.macro_do(law.case.model, {**law.case.interventions, **allocated})


def dependent():
    """Counts with the cause of the finite parts; given their sum they tell of it."""
    c = pyro.sample("c", dist.Bernoulli(0.4))
    FINITE.parts(c)
    for i in (1, 2):
        pyro.sample(f"n{i}", dist.Poisson(1 + c))


@pytest.mark.parametrize("given", [[], ["c"]], ids=str)
def test_two_interventions_on_dependent_sites_are_joint_or_hold_the_cause(given):
    rates = torch.tensor([2.0, 4.0])  # of the sum of the counts
    told = (
        torch.tensor([0.6, 0.4]) * dist.Poisson(rates).log_prob(torch.tensor(5.0)).exp()
    )

    def by_hand():
        c = pyro.sample("c", dist.Bernoulli(0.4))
        one = chance_of_one(c) if given else chance_of_one(prior=told.tolist())
        own = ByHand(
            lambda x: dist.Bernoulli(one).log_prob(x[..., 0]),
            lambda shape: pair(torch.bernoulli(one.expand(shape)), 2.0),
        )
        even = dist.Multinomial(5, torch.tensor([0.5, 0.5]))
        x = pyro.sample("sales__micro", own)
        n = pyro.sample("counts__micro", ByHand(even.log_prob, even.sample))
        for name, value in zip(
            ["x1", "x2", "n1", "n2"], [*x.unbind(-1), *n.unbind(-1)], strict=True
        ):
            pyro.deterministic(name, value)

    both = {SALES: pm.Natural(2.0, given=given), COUNTS: pm.Natural(5.0, given=given)}
    model = pm.macro_do(dependent, both)
    assert_same_program(model, by_hand, macros=("sales", "counts"))


def test_comparison_sees_another_law():
    for case, other in ((GAMMA, POISSON), (EXTREME, GAMMA)):
        model = pm.macro_do(case.model, case.interventions)
        with pytest.raises((AssertionError, ValueError)):
            assert_same_program(model, other.by_hand)
