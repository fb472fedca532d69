# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``Coarsen``: a table from micro states of finite support to macro values."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import assert_counts, law_of, product_of, run, states_of

import pyro_macro as pm

GRADE = pm.Coarsen({0: 0, 1: 0, 2: 1, 3: 1, 4: 2})
XOR = pm.Coarsen([[0, 1], [1, 0]])


def test_numbers_and_tuples_and_arrays_say_the_same():
    by_tuple = pm.Coarsen({(a, b): float(a != b) for a in range(2) for b in range(2)})
    state = states_of(range(2), range(2))
    assert XOR(state).tolist() == by_tuple(state).tolist() == [0, 1, 1, 0]
    assert GRADE(torch.tensor([[0], [2], [4], [1]])).tolist() == [0, 1, 2, 0]
    assert pm.Coarsen(torch.tensor([0.5, 0.5, 2.0]))(torch.tensor([2])) == 2.0


def test_tables_compare_by_their_entries():
    assert pm.Coarsen([[0, 1], [1, 0]]) == XOR
    assert hash(XOR) == hash(pm.Coarsen([[0, 1], [1, 0]]))
    assert pm.Coarsen([[0, 1], [1, 1]]) != XOR and XOR != GRADE
    assert repr(XOR) == "Coarsen(<4 micro states to 2 macro values>)"


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64])
def test_states_of_all_kinds_are_looked_up(dtype):
    state = torch.tensor([[0, 1], [1, 1]], dtype=dtype)
    found = XOR(state)
    assert found.tolist() == [1.0, 0.0] and found.is_floating_point()
    assert not state.is_floating_point() or found.dtype == dtype


@pytest.mark.parametrize(
    "mapping, message",
    [
        ({}, "different lengths, or there are none"),
        ({0: 1, (0, 1): 1}, "different lengths"),
        ({0: 1, 1: 2}, "injective"),
        ([1.0, 2.0, 3.0], "injective"),
    ],
)
def test_tables_that_are_no_aggregation_are_refused(mapping, message):
    with pytest.raises(pm.NotAMicroState, match=message):
        pm.Coarsen(mapping)


def test_states_that_the_table_lacks_are_named():
    with pytest.raises(pm.NotAMicroState, match=r"no entry.*\[5.0\]|no entry.*\[5\]"):
        GRADE(torch.tensor([[1], [5]]))
    with pytest.raises(pm.NotAMicroState, match="has 3 element.*the table have 2"):
        XOR(torch.tensor([0, 1, 1]))


def student():
    x = pyro.sample("x", dist.Categorical(torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1])))
    pyro.deterministic("points", torch.tensor([0.0, 1.0, 4.0, 9.0, 16.0])[x])


def test_one_site_given_its_grade():
    macro = pm.MacroVariable("grade", "x", aggregation=GRADE)
    law = law_of(student, macro, pm.Natural(1.0))
    probs = law.log_prob(torch.tensor([[2.0], [3.0]])).exp()
    torch.testing.assert_close(probs, torch.tensor([0.5, 0.5]))
    law = law_of(student, macro, pm.Natural(0.0))
    probs = law.log_prob(torch.tensor([[0.0], [1.0]])).exp()
    torch.testing.assert_close(probs, torch.tensor([1 / 3, 2 / 3]))
    torch.testing.assert_close(law.log_total.exp().item(), 0.3)
    nodes = run(student, macro, pm.Natural(2.0)).nodes
    assert nodes["x"]["value"] == 4 and nodes["x"]["value"].dtype == torch.long
    assert nodes["points"]["value"] == 16


def test_one_site_whose_state_follows_is_drawn_so():
    """A macro value with one state only is no reason to refuse the others."""
    macro = pm.MacroVariable("grade", "x", aggregation=GRADE)
    assert (law_of(student, macro, pm.Natural(2.0)).sample((5,)) == 4).all()
    with pytest.raises(pm.Infeasible, match="cannot be reached"):
        law_of(student, macro, pm.Natural(3.0))


def test_slots_of_a_plate_have_grades_of_their_own():
    probs = torch.tensor([[0.1, 0.2, 0.3, 0.3, 0.1], [0.4, 0.1, 0.1, 0.3, 0.1]])

    def model():
        with pyro.plate("k", 2):
            pyro.sample("x", dist.Categorical(probs))

    macro = pm.MacroVariable("grade", "x", aggregation=GRADE)
    law = law_of(model, macro, pm.Natural(torch.tensor([0.0, 1.0])))
    draws = law.sample((4000,))
    states = states_of(range(5))
    assert_counts(draws[:, 0], states, torch.tensor([1, 2, 0, 0, 0]) / 3)
    assert_counts(draws[:, 1], states, torch.tensor([0, 0, 1, 3, 0]) / 4)


def test_several_sites_given_a_table_of_their_states():
    def model():
        c = pyro.sample("c", dist.Bernoulli(0.3))
        pyro.sample("x0", dist.Bernoulli(0.2 + 0.5 * c))
        pyro.sample("x1", dist.Bernoulli(0.6 - 0.3 * c))

    macro = pm.MacroVariable("xor", ["x0", "x1"], aggregation=XOR)
    law = law_of(model, macro, pm.Natural(1.0))
    weights = {}
    for x0, x1 in ((0, 1), (1, 0)):
        weights[x0, x1] = sum(
            p * (q0 if x0 else 1 - q0) * (q1 if x1 else 1 - q1)
            for p, q0, q1 in ((0.7, 0.2, 0.6), (0.3, 0.7, 0.3))
        )
    wanted = torch.tensor(list(weights.values()))
    states = torch.tensor(list(weights)).double()
    torch.testing.assert_close(law.log_prob(states).exp(), wanted / wanted.sum())
    torch.testing.assert_close(law.log_total, wanted.sum().log())
    assert_counts(law.sample((4000,)), states, wanted)


def test_a_table_is_the_same_as_the_function_that_it_lists():
    table = torch.zeros(2, 4, 3)
    for a, b, c in states_of(range(2), range(4), range(3)).long().tolist():
        table[a, b, c] = (a + b * c) % 3

    def model():
        pyro.sample("x0", dist.Bernoulli(0.3))
        pyro.sample("x1", dist.Binomial(3, torch.tensor(0.6)))
        pyro.sample("x2", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))

    fns = [
        dist.Bernoulli(0.3),
        dist.Binomial(3, torch.tensor(0.6)),
        dist.Categorical(torch.tensor([0.2, 0.3, 0.5])),
    ]
    macro = pm.MacroVariable("m", ["x0", "x1", "x2"], aggregation=pm.Coarsen(table))
    law = law_of(model, macro, pm.Natural(2.0))
    states, probs, log_total = product_of(
        fns,
        [range(2), range(4), range(3)],
        lambda x: (x[:, 0] + x[:, 1] * x[:, 2]) % 3,
        2.0,
    )
    torch.testing.assert_close(law.log_prob(states).exp(), probs)
    torch.testing.assert_close(law.log_total, log_total)
    assert len(law.enumerate_support()) == len(states)


def test_a_table_of_counts_without_end_is_refused():
    def model():
        pyro.sample("x", dist.Poisson(1.0))

    macro = pm.MacroVariable("grade", "x", aggregation=GRADE)
    with pytest.raises(pm.UnsupportedLaw, match="'x' is Poisson"):
        law_of(model, macro, pm.Natural(1.0))


def test_a_site_with_more_values_than_the_table_says_which():
    def model():
        pyro.sample("x", dist.Categorical(torch.ones(7)))

    macro = pm.MacroVariable("grade", "x", aggregation=GRADE)
    with pytest.raises(pm.NotAMicroState, match=r"no entry for the micro state \[5"):
        law_of(model, macro, pm.Natural(1.0))


def test_the_macro_value_is_a_deterministic_site():
    macro = pm.MacroVariable("grade", "x", aggregation=GRADE)
    nodes = pyro.poutine.trace(pm.aggregate(student, [macro])).get_trace().nodes
    wanted = [0, 0, 1, 1, 2][int(nodes["x"]["value"])]
    assert nodes["grade"]["value"] == wanted
