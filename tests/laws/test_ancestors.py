# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Finite micro states with finite ancestors, which are summed out or held.

Each program is listed with all values of all of its sites, and conditioned by picking
rows. In the programs plates that are aggregated over are ``o`` (dim -1), those that
stay are ``k`` (dim -2).
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import (
    assert_counts,
    given,
    joint_values,
    law_of,
    log_joint,
    run,
)
from pyro import poutine

import pyro_macro as pm

BIT = range(2)
GENERATOR = torch.Generator().manual_seed(0)
TABLE = torch.rand(400, generator=GENERATOR, dtype=torch.float64) * 0.8 + 0.1


def p(*index, at=0):
    """A probability that depends on some finite values, by a fixed random table."""
    total = torch.zeros(()) + at
    for place, i in enumerate(index):
        total = total * 3 + torch.as_tensor(i).double() + place
    return TABLE[(total * 7 + 13).long() % 400]


def bernoulli(name, probs):
    return pyro.sample(name, dist.Bernoulli(probs))


def o(size=3):
    return pyro.plate("o", size, dim=-1)


def k(size=2):
    return pyro.plate("k", size, dim=-2)


I3 = torch.arange(3.0, dtype=torch.float64)
J2 = torch.arange(2.0, dtype=torch.float64).unsqueeze(-1)


def cause():
    c = pyro.sample("c", dist.Categorical(torch.tensor([0.5, 0.2, 0.3])))
    with o():
        bernoulli("x", p(c, I3))


def chain():
    a = bernoulli("a", 0.3)
    b = pyro.sample("b", dist.Binomial(2, p(a, at=1)))
    c = pyro.deterministic("c", 1 - b)
    with o():
        bernoulli("x", p(c + 1, I3, at=2))


def own_causes():
    with o():
        z = bernoulli("z", p(I3))
        bernoulli("x", p(z, I3, at=1))


def shared_and_own_causes():
    g = bernoulli("g", 0.4)
    with o():
        z = bernoulli("z", p(g, I3))
        bernoulli("x", p(z, g, I3, at=1))


SINGLE = {
    cause: {"c": (range(3), (1,)), "x": (BIT, (3,))},
    chain: {"a": (BIT, (1,)), "b": (range(3), (1,)), "x": (BIT, (3,))},
    own_causes: {"z": (BIT, (3,)), "x": (BIT, (3,))},
    shared_and_own_causes: {"g": (BIT, (1,)), "z": (BIT, (3,)), "x": (BIT, (3,))},
}
SUM = pm.MacroVariable("m", "x", over="o")
AGGREGATIONS = {
    "sum": (pm.Sum(), 2.0),
    "weighted": (pm.Linear([1.0, 2.0, 3.0]), 3.0),
    "max": (pm.Max(), 1.0),
    "count": (pm.Count(0), 1.0),
    "parity": (pm.Custom(lambda x: x.sum(-1) % 2), 1.0),
}


def assert_law(law, states, probs, log_total=None, draws=8000):
    torch.testing.assert_close(law.log_prob(states).exp(), probs)
    support = law.enumerate_support(expand=False)
    assert sorted(support.reshape(-1, states.shape[-1]).tolist()) == states.tolist()
    if log_total is not None:
        torch.testing.assert_close(law.log_total.sum(), log_total)
    assert_counts(law.sample((draws,)), states, probs)


@pytest.mark.parametrize("which", AGGREGATIONS)
@pytest.mark.parametrize("program", SINGLE, ids=lambda f: f.__name__)
def test_ancestors_of_one_micro_state_are_summed_out(program, which):
    aggregation, value = AGGREGATIONS[which]
    values = joint_values(SINGLE[program])
    logs = log_joint(program, values)
    states = values["x"]
    met = (aggregation(states) - value).abs() < 1e-9
    macro = pm.MacroVariable("m", "x", over="o", aggregation=aggregation)
    law = law_of(program, macro, pm.Natural(value))
    assert "ancestor(s) summed out" in law.method
    assert_law(law, *given(logs, states, met))


# Several sites of different shapes


def test_sites_of_different_shapes_with_a_cause_in_common():
    def model():
        c = bernoulli("c", 0.35)
        probs = torch.stack([p(c), p(c, at=1), p(c, at=2)], -1)
        pyro.sample("x", dist.Categorical(probs))
        with o():
            z = bernoulli("z", p(c, I3))
            pyro.sample("y", dist.Binomial(2, p(z, I3, at=3)))

    macro = pm.MacroVariable("m", ["x", "y"], over="o")
    sites = {
        "c": (BIT, (1,)),
        "z": (BIT, (3,)),
        "x": (range(3), (1,)),
        "y": (range(3), (3,)),
    }
    values = joint_values(sites)
    logs = log_joint(model, values)
    states = torch.cat([values["x"], values["y"]], -1)
    law = law_of(model, macro, pm.Natural(4.0))
    assert_law(law, *given(logs, states, states.sum(-1) == 4), draws=20_000)


def test_elements_of_two_sites_with_own_causes_in_common():
    """What a group of elements has of the total tells of the cause of the group."""

    def model():
        g = bernoulli("g", 0.4)
        with o(2):
            z = bernoulli("z", p(g, I3[:2]))
            pyro.sample("x", dist.Binomial(2, p(z, I3[:2], at=1)))
            bernoulli("y", p(z, g, I3[:2], at=3))

    macro = pm.MacroVariable("m", ["x", "y"], over="o")
    sites = {
        "g": (BIT, (1,)),
        "z": (BIT, (2,)),
        "x": (range(3), (2,)),
        "y": (BIT, (2,)),
    }
    values = joint_values(sites)
    logs = log_joint(model, values)
    states = torch.cat([values["x"], values["y"]], -1)
    law = law_of(model, macro, pm.Natural(3.0))
    assert_law(law, *given(logs, states, states.sum(-1) == 3), draws=20_000)


# Plates that stay


def slots_with_own_causes():
    with k():
        c = bernoulli("c", p(J2))
        with o():
            bernoulli("x", p(c, J2, I3, at=1))


def cause_of_all_slots():
    g = bernoulli("g", 0.4)
    with k(), o():
        bernoulli("x", p(g, J2, I3))


def causes_at_all_levels():
    g = bernoulli("g", 0.4)
    with k():
        c = bernoulli("c", p(g, J2, at=1))
        with o():
            z = bernoulli("z", p(c, J2, I3, at=2))
            bernoulli("x", p(z, g, J2, I3, at=3))


def causes_across_slots():
    """One cause for each element, shared by all slots."""
    elements = o()
    with elements:
        h = bernoulli("h", p(I3))
    with k(), elements:
        bernoulli("x", p(h, J2, I3, at=1))


X6 = (BIT, (2, 3))
SLOTS = torch.tensor([2.0, 1.0], dtype=torch.float64).unsqueeze(-1)
PLATED = {
    cause_of_all_slots: {"g": (BIT, (1, 1)), "x": X6},
    causes_at_all_levels: {
        "g": (BIT, (1, 1)),
        "c": (BIT, (2, 1)),
        "z": (BIT, (2, 3)),
        "x": X6,
    },
    causes_across_slots: {"h": (BIT, (1, 3)), "x": X6},
}


def test_causes_of_a_slot_leave_the_slots_apart():
    law = law_of(slots_with_own_causes, SUM, pm.Natural(SLOTS))
    assert law.batch_shape == (2, 1) and law.event_shape == (3,)
    draws = law.sample((8000,))
    values = joint_values({"c": (BIT, (2, 1)), "x": X6})
    logs = log_joint(slots_with_own_causes, values)
    for slot in range(2):
        states = values["x"][:, slot]
        states, probs, log_total = given(logs, states, states.sum(-1) == SLOTS[slot, 0])
        assert_counts(draws[:, slot, 0], states, probs)
        torch.testing.assert_close(law.log_total[slot, 0], log_total)
        at = states.reshape(-1, 1, 1, 3).expand(-1, 2, 1, 3).clone()
        at[:, 1 - slot] = torch.tensor([0.0, 1.0, 1.0][:: 1 if slot else -1])
        at[:, 1 - slot, 0, 1] = SLOTS[1 - slot, 0] - 1
        torch.testing.assert_close(law.log_prob(at)[:, slot, 0].exp(), probs)


@pytest.mark.parametrize("program", PLATED, ids=lambda f: f.__name__)
def test_causes_that_slots_share_make_their_law_a_joint_one(program):
    law = law_of(program, SUM, pm.Natural(SLOTS))
    assert law.batch_shape.numel() == 1 and law.event_shape == (6,)
    values = joint_values(PLATED[program])
    logs = log_joint(program, values)
    x = values["x"]
    met = (x.sum(-1, keepdim=True) == SLOTS).all(1).squeeze(-1)
    states, probs, log_total = given(logs, x.flatten(1), met)
    # The order of the elements is that of the sites in a run
    nodes = run(program, SUM, pm.Natural(SLOTS)).nodes
    torch.testing.assert_close(nodes["x"]["value"].sum(-1, keepdim=True), SLOTS)
    vector, own = nodes["m__micro"]["value"].flatten(), nodes["x"]["value"]
    assert sorted(vector.tolist()) == sorted(own.flatten().tolist())
    order = elements_in_order(law, program)
    torch.testing.assert_close(law.log_total.sum(), log_total)
    at = states[:, order]
    torch.testing.assert_close(
        law.log_prob(at.reshape(-1, *law.batch_shape, 6)).flatten().exp(), probs
    )
    assert_counts(law.sample((20_000,)).reshape(-1, 6), at, probs)


def elements_in_order(law, program):
    """Which element of the flattened site each element of the vector is."""
    order = []
    for i in range(6):
        marked = torch.zeros(law.batch_shape + (6,))
        marked[..., i] = 1.0
        with pyro.validation_enabled(False):
            replayed = poutine.condition(
                pm.macro_do(program, {SUM: pm.Natural(SLOTS)}),
                data={"m__micro": marked},
            )
            x = poutine.trace(replayed).get_trace().nodes["x"]["value"]
        order.append(int(x.flatten().nonzero()))
    return order


def test_a_shared_cause_couples_the_slots():
    """The same slots apart would have another law: the test above is able to fail."""
    law = law_of(cause_of_all_slots, SUM, pm.Natural(SLOTS))
    draws = law.sample((20_000,)).reshape(-1, 6)
    order = elements_in_order(law, cause_of_all_slots)
    x = torch.empty_like(draws)
    x[:, order] = draws
    values = joint_values(PLATED[cause_of_all_slots])
    logs = log_joint(cause_of_all_slots, values)
    own = values["x"]
    met = (own.sum(-1, keepdim=True) == SLOTS).all(1).squeeze(-1)
    states, probs, _ = given(logs, own.flatten(1), met)
    wanted = torch.cov(states.T, aweights=probs, correction=0)
    between = wanted[:3, 3:]
    assert between.abs().max() > 0.01
    torch.testing.assert_close(torch.cov(x.T)[:3, 3:], between, rtol=0, atol=0.01)


# What is held or observed


@pytest.mark.parametrize("held", [0.0, 1.0])
def test_a_given_ancestor_is_held(held):
    model = poutine.condition(shared_and_own_causes, data={"g": torch.tensor(held)})
    outside = poutine.condition(
        pm.macro_do(shared_and_own_causes, {SUM: pm.Natural(2.0, given="g")}),
        data={"g": torch.tensor(held)},
    )
    values = joint_values({"g": ([held], (1,)), "z": (BIT, (3,)), "x": (BIT, (3,))})
    logs = log_joint(shared_and_own_causes, values)
    states = values["x"]
    states, probs, _ = given(logs, states, states.sum(-1) == 2)
    law = poutine.trace(outside).get_trace().nodes["m__micro"]["fn"]
    assert_law(law, states, probs)
    # An observation upstream is held without being given
    inside = law_of(model, SUM, pm.Natural(2.0))
    assert_law(inside, states, probs)


def test_an_observed_ancestor_tells_of_those_above_it():
    def model():
        a = bernoulli("a", 0.3)
        w = pyro.sample("w", dist.Bernoulli(p(a)), obs=torch.tensor(1.0))
        with o():
            bernoulli("x", p(a, w, I3, at=1))

    def all_of_it():
        a = bernoulli("a", 0.3)
        w = bernoulli("w", p(a))
        with o():
            bernoulli("x", p(a, w, I3, at=1))

    values = joint_values({"a": (BIT, (1,)), "w": ([1.0], (1,)), "x": (BIT, (3,))})
    logs = log_joint(all_of_it, values)
    states = values["x"]
    law = law_of(model, SUM, pm.Natural(2.0))
    assert_law(law, *given(logs, states, states.sum(-1) == 2)[:2])


def beside(observed=None):
    a = bernoulli("a", 0.3)
    obs = None if observed is None else torch.tensor(observed)
    pyro.sample("w", dist.Bernoulli(p(a, at=5)), obs=obs)
    with o():
        bernoulli("x", p(a, I3, at=1))


@pytest.mark.parametrize("told", [False, True])
def test_an_observation_beside_the_micro_state_counts_if_it_is_given(told):
    w = [1.0] if told else BIT
    values = joint_values({"a": (BIT, (1,)), "w": (w, (1,)), "x": (BIT, (3,))})
    logs = log_joint(beside, values)
    states = values["x"]
    states, probs, _ = given(logs, states, states.sum(-1) == 2)
    realization = pm.Natural(2.0, given="w" if told else ())
    assert_law(law_of(beside, SUM, realization, 1.0), states, probs)


@pytest.mark.parametrize("kind", ["sum", "max"])
def test_a_given_macro_variable_tells_of_common_causes(kind):
    def model():
        a = bernoulli("a", 0.3)
        with o():
            bernoulli("y", p(a, I3, at=5))
            bernoulli("x", p(a, I3, at=1))

    aggregation = {"sum": pm.Sum(), "max": pm.Max()}[kind]
    other = pm.MacroVariable("other", "y", over="o", aggregation=aggregation)
    y = torch.tensor([1.0, 0.0, 0.0])
    outside = poutine.condition(
        pm.macro_do(model, {SUM: pm.Natural(2.0, given=other)}), data={"y": y}
    )
    law = poutine.trace(outside).get_trace().nodes["m__micro"]["fn"]
    values = joint_values({"a": (BIT, (1,)), "y": (BIT, (3,)), "x": (BIT, (3,))})
    logs = log_joint(model, values)
    states = values["x"]
    known = aggregation(values["y"]) == aggregation(y)
    assert_law(law, *given(logs, states, known & (states.sum(-1) == 2))[:2])


def test_given_sites_of_each_slot_are_held_there():
    def model():
        with k():
            c = bernoulli("c", p(J2))
            with o():
                bernoulli("x", p(c, J2, I3, at=1))

    c = torch.tensor([[0.0], [1.0]])
    outside = poutine.condition(
        pm.macro_do(model, {SUM: pm.Natural(SLOTS, given="c")}), data={"c": c}
    )
    law = poutine.trace(outside).get_trace().nodes["m__micro"]["fn"]
    assert law.batch_shape == (2, 1)
    draws = law.sample((8000,))
    for slot in range(2):
        fns = [dist.Bernoulli(q) for q in p(c, J2, I3, at=1)[slot]]
        values = joint_values({f"x{i}": (BIT, ()) for i in range(3)})
        states = torch.stack(list(values.values()), -1)
        logs = sum(fn.log_prob(states[:, i]) for i, fn in enumerate(fns))
        states, probs, log_total = given(logs, states, states.sum(-1) == SLOTS[slot, 0])
        assert_counts(draws[:, slot, 0], states, probs)
        torch.testing.assert_close(law.log_total[slot, 0], log_total)


# Outside plates, gradients, refusals


def test_a_grid_of_values_with_ancestors():
    grid = torch.tensor([1.0, 2.0, 3.0]).reshape(3, 1)
    with pyro.plate("grid", 3, dim=-2):
        trace = run(shared_and_own_causes, SUM, pm.Natural(grid))
    law = trace.nodes["m__micro"]["fn"]
    torch.testing.assert_close(trace.nodes["x"]["value"].sum(-1, True), grid)
    values = joint_values(SINGLE[shared_and_own_causes])
    logs = log_joint(shared_and_own_causes, values)
    draws = law.sample((5000,))
    for i, value in enumerate(grid.flatten()):
        states = values["x"]
        states, probs, log_total = given(logs, states, states.sum(-1) == value)
        assert_counts(draws[:, i].reshape(-1, 3), states, probs)
        torch.testing.assert_close(law.log_total.flatten()[i], log_total)


def test_a_given_ancestor_in_an_outside_plate_is_held_in_each_world():
    g = torch.tensor([0.0, 1.0, 1.0, 0.0]).reshape(4, 1)
    intervened = pm.macro_do(shared_and_own_causes, {SUM: pm.Natural(2.0, given="g")})
    with pyro.plate("worlds", 4, dim=-2):
        outside = poutine.condition(intervened, data={"g": g})
        law = poutine.trace(outside).get_trace().nodes["m__micro"]["fn"]
    for i in range(4):
        values = joint_values(
            {"g": ([g[i, 0].item()], (1,)), "z": (BIT, (3,)), "x": (BIT, (3,))}
        )
        logs = log_joint(shared_and_own_causes, values)
        states = values["x"]
        states, probs, _ = given(logs, states, states.sum(-1) == 2)
        at = states.unsqueeze(1).unsqueeze(1).expand(-1, 4, 1, -1)
        found = law.log_prob(at).reshape(len(states), 4)[:, i]
        torch.testing.assert_close(found.exp(), probs)


def test_gradients_go_through_the_ancestors_that_are_summed_out():
    state = torch.tensor([1.0, 0.0, 1.0])

    def program(theta):
        def model():
            g = bernoulli("g", theta[0].sigmoid())
            with o():
                z = bernoulli("z", (theta[1] * g + I3 - 1).sigmoid())
                bernoulli("x", (theta[2] * z - g + theta[3]).sigmoid())

        return model

    values = joint_values(SINGLE[shared_and_own_causes])
    theta = torch.tensor([0.3, -0.8, 1.1, 0.2], requires_grad=True)
    law = law_of(program(theta), SUM, pm.Natural(2.0))
    found = torch.autograd.grad(law.log_prob(state) + 0.3 * law.log_total.sum(), theta)
    logs = log_joint(program(theta), values)
    same = (values["x"] == state).all(-1)
    fibre = values["x"].sum(-1) == 2
    total = logs[fibre].logsumexp(0)
    wanted = torch.autograd.grad(logs[same].logsumexp(0) - 0.7 * total, theta)
    assert wanted[0].abs().min() > 1e-4
    torch.testing.assert_close(found, wanted)


def test_a_cause_with_infinitely_many_values_is_refused_and_named():
    def model():
        n = pyro.sample("n", dist.Poisson(2.0))
        with o():
            bernoulli("x", (n - 2 + I3).sigmoid())

    with pytest.raises(
        pm.UnsupportedLaw, match=r"'n', which is Poisson.*given=\['n'\]"
    ):
        law_of(model, SUM, pm.Natural(2.0))
    intervened = pm.macro_do(model, {SUM: pm.Natural(2.0, given="n")})
    nodes = poutine.trace(intervened).get_trace().nodes
    assert nodes["x"]["value"].sum() == 2


def test_many_causes_are_refused_by_their_number():
    def model():
        total = 0.0
        for i in range(21):
            total = total + bernoulli(f"c{i}", 0.5)
        with o():
            bernoulli("x", (total - 10 + I3).sigmoid())

    with pytest.raises(pm.UnsupportedLaw, match="'m'.*c20.*joint values.*given="):
        law_of(model, SUM, pm.Natural(2.0))


def test_many_own_causes_are_no_trouble():
    """A thousand elements with a cause each: those are summed out one by one."""
    q = torch.linspace(0.1, 0.6, 1000)

    def model():
        g = bernoulli("g", 0.4)
        with pyro.plate("o", 1000):
            z = bernoulli("z", q)
            bernoulli("x", 0.2 + 0.5 * z - 0.1 * g)

    def totals(g):
        table = torch.ones(1, dtype=torch.float64)
        for a in q * (0.7 - 0.1 * g) + (1 - q) * (0.2 - 0.1 * g):
            table = torch.nn.functional.pad(table, (0, 1)) * (1 - a) + (
                torch.nn.functional.pad(table, (1, 0)) * a
            )
        return table

    law = law_of(model, SUM, pm.Natural(350.0))
    weights = torch.stack([0.6 * totals(0)[350], 0.4 * totals(1)[350]])
    torch.testing.assert_close(law.log_total.sum(), weights.sum().log())
    draws = law.sample((200,))
    assert (draws.sum(-1) == 350).all()


def test_reading_under_all_configurations_takes_no_random_numbers():
    intervened = pm.macro_do(causes_at_all_levels, {SUM: pm.Natural(SLOTS)})
    pyro.set_rng_seed(8)
    trace = poutine.trace(intervened).get_trace()
    pyro.set_rng_seed(8)
    again = poutine.trace(intervened).get_trace()
    torch.testing.assert_close(
        trace.nodes["x"]["value"], again.nodes["x"]["value"], rtol=0, atol=0
    )
    pyro.set_rng_seed(8)
    plain = poutine.trace(causes_at_all_levels).get_trace()
    assert plain.nodes["g"]["value"] == trace.nodes["g"]["value"]
    assert len(pyro.get_param_store()) == 0
