# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Sums of finite parts: trees, splits and lists of states, against numpy and lists."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from brute_force import assert_counts, assert_gradient

from pyro_macro.laws.finite.sums import (
    NEVER,
    SumTree,
    choose,
    convolve,
    cumulative,
    log_count,
    log_sum,
    scatter_codes,
    states_on,
)


def random_parts(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=generator).log_softmax(-1)


def by_numpy(parts):
    """The probabilities of the sum of independent parts, shape ``(n, R)``."""
    total = np.ones(1)
    for part in parts.exp().numpy():
        total = np.convolve(total, part)
    return torch.tensor(total)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
def test_a_tree_has_the_convolution_of_its_parts(count):
    parts = random_parts(2, count, 4)
    tree = SumTree(parts, 3 * count)
    for b in range(2):
        wanted = by_numpy(parts[b])
        torch.testing.assert_close(tree.total[b].exp()[: len(wanted)], wanted)
        assert not tree.total[b].exp()[len(wanted) :].any()


def test_a_tree_up_to_a_sum_is_the_beginning_of_the_whole_tree():
    parts = random_parts(1, 7, 5)
    whole = SumTree(parts, 28).total[0]
    for most in (0, 1, 3, 11):
        torch.testing.assert_close(SumTree(parts, most).total[0], whole[: most + 1])


def test_a_tree_of_a_thousand_coins_is_accurate_far_from_the_mean():
    p = torch.linspace(0.02, 0.6, 1000)
    tree = SumTree(torch.stack([1 - p, p], -1).log().unsqueeze(0), 1000)
    wanted = by_numpy(torch.stack([1 - p, p], -1).log())
    likely = wanted > 1e-290
    assert likely.sum() > 500
    torch.testing.assert_close(
        tree.total[0][likely], wanted[likely].log(), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("draws", [1, 30_000])
def test_splits_of_a_sum_follow_the_joint_law(draws):
    """Few draws look at their own rows only, many at a table of all sums."""
    parts = random_parts(2, 3, 3, seed=1)
    tree = SumTree(parts, 6)
    states = torch.tensor(list(itertools.product(range(3), repeat=3)))
    rows = torch.arange(2).repeat_interleave(draws)
    sums = torch.tensor([3, 4]).repeat_interleave(draws)
    if draws == 1:  # 30,000 times one draw
        found = [tree.split(rows, sums) for _ in range(2000)]
        found = torch.stack(found, 1)
    else:
        found = tree.split(rows, sums).reshape(2, draws, 3)
    for b, total in enumerate((3, 4)):
        on = states[states.sum(-1) == total]
        probs = parts[b, torch.arange(3), on].sum(-1).exp()
        assert_counts(found[b], on, probs)


@pytest.mark.parametrize("count", [5, 6, 33])
def test_splits_add_up_whatever_the_number_of_parts(count):
    tree = SumTree(random_parts(1, count, 3), 2 * count)
    sums = torch.arange(2 * count + 1).repeat(20)
    drawn = tree.split(torch.zeros_like(sums), sums)
    assert drawn.shape == (len(sums), count)
    assert (drawn.sum(-1) == sums).all()
    assert (drawn >= 0).all() and (drawn <= 2).all()


def test_the_total_of_a_tree_has_the_gradient_of_differences():
    logits = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(2))
    assert_gradient(lambda x: SumTree(x.log_softmax(-1), 10).total[0, 4], logits)


def test_what_cannot_be_has_gradient_zero_and_not_nan():
    logits = torch.tensor([[[0.3, -0.2], [0.1, NEVER]]], requires_grad=True)
    total = SumTree(logits, 2).total[0]
    assert total[2] <= NEVER / 2
    (gradient,) = torch.autograd.grad(total[:2].sum(), logits)
    assert gradient.isfinite().all()


def test_convolutions_in_pieces_are_those_in_one(monkeypatch):
    left, right = random_parts(9, 4), random_parts(9, 4, seed=3)
    whole = convolve(left, right, 6)
    monkeypatch.setattr("pyro_macro.laws.finite.sums._CELLS", 1)
    torch.testing.assert_close(convolve(left, right, 6), whole)
    parts = random_parts(2, 5, 3)
    tree = SumTree(parts, 10)
    rows, sums = torch.arange(2).repeat(3), torch.full((6,), 4)
    assert (tree.split(rows, sums).sum(-1) == 4).all()


def test_choices_follow_the_weights_of_their_row():
    logits = torch.tensor([[0.0, 1.0, -1.0, NEVER], [NEVER, 2.0, NEVER, 2.5]])
    rows = torch.arange(2).repeat(20_000)
    drawn = choose(cumulative(logits), rows)
    states = torch.arange(4.0).unsqueeze(-1)
    for row in range(2):
        assert_counts(drawn[rows == row], states, logits[row].softmax(-1))


def test_a_choice_is_never_of_what_cannot_be():
    logits = torch.full((1, 7), NEVER)
    logits[0, 3] = -900.0
    drawn = choose(cumulative(logits), torch.zeros(10_000, dtype=torch.long))
    assert (drawn == 3).all()


def test_codes_that_coincide_share_their_probabilities():
    logits = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.3, 0.2]]).log()
    codes = torch.tensor([2, 0, 2, -1])
    found = scatter_codes(logits, codes, 4).exp()
    wanted = torch.tensor([[0.2, 0.0, 0.4, 0.0], [0.25, 0.0, 0.55, 0.0]])
    torch.testing.assert_close(found, wanted)
    # Codes beyond the size are left out
    beyond = scatter_codes(logits, torch.tensor([5, 0, 1, 1]), 2).exp()
    torch.testing.assert_close(beyond, torch.tensor([[0.2, 0.7], [0.25, 0.5]]))


def test_codes_of_tiny_probabilities_do_not_underflow():
    logits = torch.tensor([[-2000.0, -2001.0, -3.0]])
    found = scatter_codes(logits, torch.tensor([0, 0, 1]), 2)
    wanted = -2000 + math.log1p(math.exp(-1))
    torch.testing.assert_close(found, torch.tensor([[wanted, -3.0]]))


def test_codes_have_the_gradient_of_differences():
    codes = torch.tensor([1, 0, 1, 2])
    assert_gradient(
        lambda x: scatter_codes(x.log_softmax(-1), codes, 3)[0, 1],
        torch.tensor([[0.3, -1.0, 0.4, 0.1]]),
    )


CODES = torch.tensor([[0, 1, 5], [2, 0, -1], [3, 1, 1]])
ALLOWED = torch.zeros(9, dtype=torch.bool)
ALLOWED[[3, 4, 8]] = True


def test_states_are_all_that_have_an_allowed_sum():
    found = states_on(CODES, ALLOWED, 100)
    wanted = [
        state
        for state in itertools.product(range(3), repeat=3)
        if state[1] != 2
        and (total := sum(CODES[k, v] for k, v in enumerate(state))) < 9
        and ALLOWED[total]
    ]
    assert Counter(map(tuple, found.tolist())) == Counter(wanted)
    assert len(wanted) > 4
    assert math.isclose(log_count(CODES, ALLOWED), math.log(len(wanted)))
    assert states_on(CODES, ALLOWED, len(wanted)) is not None
    assert states_on(CODES, ALLOWED, len(wanted) - 1) is None


@pytest.mark.parametrize("most", range(9))
def test_states_of_small_sums_leave_out_large_values(most):
    """Values count more than the largest sum, by a little and by a lot."""
    codes = torch.arange(9).expand(2, 9)
    found = states_on(codes, torch.arange(most + 1) == most, 100)
    wanted = {(i, most - i) for i in range(most + 1)}
    assert set(map(tuple, found.tolist())) == wanted


def test_no_state_is_no_error():
    none = torch.zeros(4, dtype=torch.bool)
    assert states_on(CODES, none, 100).shape == (0, 3)
    assert log_count(CODES, none) < -1e50


def test_states_of_few_sums_among_many_are_found_without_listing_all():
    codes = torch.arange(2).expand(40, 2)
    found = states_on(codes, torch.arange(2) == 1, 100)
    assert found.shape == (40, 40) and (found.sum(-1) == 1).all()


def test_log_sum_of_nothing_stays_what_cannot_be():
    table = torch.full((2, 3), NEVER)
    assert (log_sum(table) <= NEVER / 2).all()
    assert log_sum(torch.full((2, 3), 10 * NEVER)).min() >= NEVER
