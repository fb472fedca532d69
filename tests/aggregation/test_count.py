# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``Count``: how many elements are in a category."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import assert_is_law, law_of, product_of

import pyro_macro as pm


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64])
def test_elements_of_the_category_are_counted(dtype):
    state = torch.tensor([[0, 2, 1, 2], [1, 1, 0, 0]], dtype=dtype)
    for category, wanted in ((2, [2.0, 0.0]), (0.0, [1.0, 2.0]), (7, [0.0, 0.0])):
        count = pm.Count(category)(state)
        assert count.tolist() == wanted
        assert count.is_floating_point()


def test_categories_that_are_no_whole_numbers_are_met_to_rounding():
    state = torch.tensor([0.1 + 0.2, 0.3, 0.4])
    assert pm.Count(0.3)(state) == 2


def test_counts_compare_by_their_category():
    assert pm.Count(1) == pm.Count(1) and pm.Count(1) != pm.Count(2)
    assert hash(pm.Count(1)) == hash(pm.Count(1))
    assert repr(pm.Count(1)) == "Count(category=1)"
    assert pm.Count(1).weights(torch.zeros(3)) is None


@pytest.mark.parametrize("category", [float("nan"), float("inf"), "a", None])
def test_a_category_that_is_no_number_is_refused(category):
    with pytest.raises(pm.NotAMicroState, match="Count: category is"):
        pm.Count(category)


def patients():
    pyro.sample("x0", dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))
    pyro.sample("x1", dist.Binomial(3, torch.tensor(0.6)))
    pyro.sample("x2", dist.Bernoulli(0.4))


FNS = [
    lambda: dist.Categorical(torch.tensor([0.1, 0.2, 0.7])),
    lambda: dist.Binomial(3, torch.tensor(0.6)),
    lambda: dist.Bernoulli(0.4),
]


@pytest.mark.parametrize("category, value", [(1, 2.0), (2, 1.0), (0, 0.0)])
def test_the_law_given_a_count_is_the_joint_law_conditioned(category, value):
    macro = pm.MacroVariable("m", ["x0", "x1", "x2"], aggregation=pm.Count(category))
    law = law_of(patients, macro, pm.Natural(value))
    states, probs, log_total = product_of(
        [fn() for fn in FNS],
        [range(3), range(4), range(2)],
        lambda x: (x == category).double().sum(-1),
        value,
    )
    assert_is_law(law, states, probs, log_total)


def test_counts_that_cannot_be_are_refused():
    macro = pm.MacroVariable("m", ["x0", "x1", "x2"], aggregation=pm.Count(2))
    for value in (3.0, -1.0, 0.5):
        with pytest.raises(pm.Infeasible, match="cannot be reached"):
            law_of(patients, macro, pm.Natural(value))


def test_a_count_of_poissons_has_an_infinite_fibre():
    def model():
        with pyro.plate("o", 3):
            pyro.sample("x", dist.Poisson(1.0))

    macro = pm.MacroVariable("m", "x", over="o", aggregation=pm.Count(0))
    with pytest.raises(pm.UnsupportedLaw, match="'x' is Poisson.*infinitely many"):
        law_of(model, macro, pm.Natural(2.0))


def test_counting_continuous_sites_is_refused():
    def model():
        pyro.sample("x0", dist.Normal(0.0, 1.0))
        pyro.sample("x1", dist.Normal(0.0, 1.0))

    macro = pm.MacroVariable("m", ["x0", "x1"], aggregation=pm.Count(0))
    with pytest.raises(pm.UnsupportedLaw, match="'m'"):
        law_of(model, macro, pm.Natural(1.0))


def test_the_count_is_a_deterministic_site():
    macro = pm.MacroVariable("m", ["x0", "x1", "x2"], aggregation=pm.Count(1))
    nodes = pyro.poutine.trace(pm.aggregate(patients, [macro])).get_trace().nodes
    values = [float(nodes[f"x{i}"]["value"]) for i in range(3)]
    assert nodes["m"]["value"] == values.count(1.0)
