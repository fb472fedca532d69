# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Conditions on sums in whole numbers: the states that meet the codes are the same."""

import itertools

import pytest
import torch

from pyro_macro.aggregation.base import AsSum
from pyro_macro.laws.finite.lattice import LONGEST, codes_of, is_lattice, step_of


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


@pytest.mark.parametrize(
    "terms, step",
    [
        (t([0.0, 1.0, 2.0]), 1.0),
        (t([0.0, 1.0], [0.0, 0.5]), 0.5),
        (t([0.0, 2.0], [0.0, 3.0]), 1.0),
        (t([0.0, 1.0], [0.0, 2.0], [0.0, 1 / 3]), 1 / 3),
        (t([0.0, 0.1], [0.0, 0.25]), 0.05),
        (t([0.0, 1.0], [0.0, 1.5], [0.0, 5 / 3]), 1 / 6),
        (t([5.0, 7.0], [100.0, 104.0]), 2.0),  # offsets do not matter
        (t([-3.0, 3.0], [1.0, -1.0]), 2.0),
        (t([0.0, 1e-4], [0.0, 3e-4]), 1e-4),
        (t([1.0, 1.0], [2.0, 2.0]), 1.0),  # nothing varies
        (t([0.0, float("nan"), 4.0], [0.0, float("nan"), 6.0]), 2.0),
        (t([0.0, 0.7, 1.4, 2.1]) / 13, 0.7 / 13),
    ],
    ids=str,
)
def test_steps(terms, step):
    torch.testing.assert_close(step_of(terms), step, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    "terms",
    [
        t([0.0, 1.0], [0.0, 2.0**0.5]),
        t([0.0, 1.0], [0.0, 1.000001]),
        t([0.0, 1.0, 2.718281828]),
    ],
    ids=str,
)
def test_no_step(terms):
    assert step_of(terms) is None


def condition(terms, low, high=None):
    high = low if high is None else high
    return AsSum(terms, t([low]), t([high]))


def test_a_sum_with_too_many_values_is_no_lattice():
    assert is_lattice([condition(t([0.0, 1.0], [0.0, LONGEST - 2.0]), 1.0)]) == [1.0]
    assert is_lattice([condition(t([0.0, 1.0], [0.0, LONGEST + 0.0]), 1.0)]) is None
    both = condition(t([0.0, 1.0], [0.0, 2000.0]), 1.0)
    assert is_lattice([both]) is not None
    assert is_lattice([both, both]) is None


def met_by_codes(codes, states):
    """Which states, as indices of values, have an allowed sum of codes."""
    own, allowed = codes.codes, codes.allowed.reshape(-1)
    own = own.reshape(own.shape[-2:])
    found = []
    for state in states:
        each = [int(own[k, v]) for k, v in enumerate(state)]
        total = sum(each)
        ok = min(each) >= 0 and total < len(allowed) and bool(allowed[total])
        found.append(ok)
    return found


def met_by_sums(conditions, states):
    found = []
    for state in states:
        totals = [
            sum(float(c.terms[k, v]) for k, v in enumerate(state)) for c in conditions
        ]
        found.append(
            all(
                float(c.low) - 1e-9 <= total <= float(c.high) + 1e-9
                for c, total in zip(conditions, totals, strict=True)
            )
        )
    return found


NAN = float("nan")


@pytest.mark.parametrize(
    "conditions",
    [
        [condition(t([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]), 2.0)],
        [condition(t([-1.0, 1.0, 2.0], [0.5, -0.5, 0.0]), 1.5)],
        [condition(t([0.0, 1.0, 2.0], [0.0, 0.1, 0.7]), 1.1)],
        [condition(t([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]), 2.0, 3.0)],
        [condition(t([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]), 0.3)],  # between the steps
        [condition(t([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]), 9.0)],  # beyond
        [condition(t([0.0, 1.0, 2.0], [0.0, 1.0, 2.0]), -1.0)],
        [condition(t([0.0, NAN, 1.0], [1.0, 0.0, NAN]), 1.0)],
        [
            condition(t([0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]), 3.0),
            condition(t([0.0, 1.0, 4.0], [0.0, -2.0, 1.0], [0.0, 0.5, 3.0]), 1.5),
        ],
        [
            condition(t([0.0, 1.0, NAN], [0.0, 1.0, 2.0]), 1.0, 2.0),
            condition(t([1.0, 0.0, 1.0], [NAN, 2.0, 3.0]), 3.0),
        ],
    ],
    ids=lambda c: f"{len(c)} conditions",
)
def test_codes_are_met_by_the_same_states(conditions):
    count = conditions[0].terms.shape[0]
    states = list(itertools.product(range(3), repeat=count))
    found = met_by_codes(codes_of(conditions), states)
    wanted = met_by_sums(conditions, states)
    assert found == wanted


def test_codes_of_rounded_sums_are_met():
    """A third, ten times, is not ten thirds in binary."""
    terms = (torch.arange(2.0) / 3).expand(10, 2)
    total = terms[:, 1].sum()
    codes = codes_of([condition(terms, float(total))])
    assert codes.allowed.flatten().nonzero().flatten().tolist() == [10]
    single = (torch.arange(2.0, dtype=torch.float32) / 3).double().expand(10, 2)
    codes = codes_of([condition(single, 10 / 3)])
    assert codes.allowed.flatten().nonzero().flatten().tolist() == [10]


def test_sums_of_their_own_for_each_row():
    terms = t([0.0, 1.0], [0.0, 2.0])
    value = t([0.0], [1.0], [3.0])
    codes = codes_of([AsSum(terms, value, value)])
    assert codes.allowed.shape == (3, 1, 4)
    where = codes.allowed.nonzero()[:, [0, 2]].tolist()
    assert where == [[0, 0], [1, 1], [2, 3]]
