# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The two-sample test behind Monte Carlo verdicts, against direct computations."""

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_macro.questions import two_sample
from pyro_macro.questions.two_sample import compare

LEVEL = 1e-3


def draws(seed, n, count, law="normal"):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, count, generator=generator, dtype=torch.float64)
    return {"normal": normal, "skewed": normal.exp(), "tied": normal.round()}[law]


def energy(one, other):
    """``2 E|X - Y| - E|X - X'| - E|Y - Y'|``, pair by pair."""

    def mean(a, b):
        return (a[..., :, None] - b[..., None, :]).abs().mean((-1, -2))

    return 2 * mean(one, other) - mean(one, one) - mean(other, other)


def wasserstein(one, other):
    """The Wasserstein-2 distance of two samples, by their quantile functions."""
    one, other = np.sort(one), np.sort(other)
    levels = np.union1d(
        np.arange(len(one) + 1) / len(one), np.arange(len(other)) / len(other)
    )
    middle = (levels[1:] + levels[:-1]) / 2
    first = one[(middle * len(one)).astype(int)]
    second = other[(middle * len(other)).astype(int)]
    return np.sqrt(((first - second) ** 2 * np.diff(levels)).sum())


def statistic(one, other):
    """What the test computes from two samples."""
    pooled, order = torch.cat([one, other], -1).sort(-1)
    first = (order < one.shape[-1]).double()
    sizes = one.shape[-1], other.shape[-1]
    return two_sample._energy(first, pooled.diff(dim=-1), sizes)


@pytest.mark.parametrize("law", ["normal", "skewed", "tied"])
@pytest.mark.parametrize("sizes", [(30, 30), (17, 40), (40, 17), (1, 5), (2, 2)])
def test_statistic_is_the_energy_distance(law, sizes):
    one = draws(1, 4, sizes[0], law)
    other = 0.3 + 1.5 * draws(2, 4, sizes[1], law)
    torch.testing.assert_close(statistic(one, other), energy(one, other))


def test_statistic_does_not_depend_on_the_order_of_ties():
    one = torch.tensor([[0.0, 0.0, 1.0, 1.0, 2.0]])
    other = torch.tensor([[1.0, 0.0, 2.0, 2.0, 0.0]])
    for _ in range(5):
        shuffled = one[:, torch.randperm(5)], other[:, torch.randperm(5)]
        torch.testing.assert_close(statistic(*shuffled), energy(one, other))
    assert statistic(one, one).item() == 0


@pytest.mark.parametrize("law", ["normal", "tied"])
@pytest.mark.parametrize("sizes", [(5, 5), (4, 6)])
def test_p_value_is_that_of_all_permutations(law, sizes):
    """Small samples, of which scipy goes through all splits."""
    for seed in range(4):
        one = draws(10 + seed, 1, sizes[0], law)
        other = draws(50 + seed, 1, sizes[1], law) + seed % 2
        exact = stats.permutation_test(
            (one[0].numpy(), other[0].numpy()),
            # Ties are no ties where the same sum was rounded in another order
            lambda a, b: round(float(energy(torch.tensor(a), torch.tensor(b))), 9),
            n_resamples=np.inf,
            alternative="greater",
        ).pvalue
        count = 4000
        found = float(compare(one, other, 0.05, permutations=count).p_value)
        least, most = stats.binom.interval(1 - LEVEL, count, exact)
        assert (1 + least) / (1 + count) <= found <= (1 + most) / (1 + count)


def test_p_value_is_never_zero():
    one = draws(0, 1, 50)
    assert float(compare(one, one + 100, 0.01, 99).p_value) == 1 / 100


@pytest.fixture
def without_detectable(monkeypatch):
    """What is detectable takes most of the time."""
    nothing = lambda pooled, *rest: torch.zeros(len(pooled))  # noqa: E731
    monkeypatch.setattr(two_sample, "_detectable", nothing)


@pytest.mark.parametrize("law", ["normal", "tied"])
def test_p_values_are_those_of_a_test(law, without_detectable):
    """Of samples from one law a share ``a`` at most has a p-value of ``a`` or less."""
    one, other = draws(3, 600, 25, law), draws(4, 600, 35, law)
    found = torch.cat(
        [compare(one[[i]], other[[i]], 0.05, 199, seed=i).p_value for i in range(600)]
    )
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = int((found <= level).sum())
        assert rejected <= stats.binom(600, level).ppf(1 - LEVEL)
        if law == "normal":
            assert rejected >= stats.binom(600, level).ppf(LEVEL)


def test_p_values_of_several_pairs_are_for_all_together(without_detectable):
    """Some pair has a p-value of ``a`` or less in a share ``a`` of cases.

    Draws at one place depend on one another, and have other scales in each pair.
    """
    scale = torch.tensor([1.0, 100.0, 1e-3, 1.0, 5.0]).double().unsqueeze(-1)
    smallest = []
    for i in range(400):
        parts = [
            draws(s, 5, n) + 2 * draws(s + 1, 1, n)
            for s, n in ((4 * i, 20), (4 * i + 2, 30))
        ]
        one, other = (scale * part for part in parts)
        smallest.append(compare(one, other, 0.05, 199, seed=i).p_value.min())
    for level in (0.01, 0.05, 0.2, 0.5):
        rejected = int((torch.stack(smallest) <= level).sum())
        assert rejected <= stats.binom(400, level).ppf(1 - LEVEL)
        assert rejected >= stats.binom(400, level).ppf(LEVEL)


@pytest.mark.parametrize("law", ["normal", "skewed", "tied"])
@pytest.mark.parametrize("sizes", [(40, 40), (30, 50)])
def test_pairs_are_compared_one_by_one(law, sizes):
    """Together a pair is seen a bit less: its p-value is for the largest of all."""
    one, other = draws(5, 6, sizes[0], law), draws(6, 6, sizes[1], law) + 0.2
    scale = torch.tensor([1.0, 100.0, 1e-3, 1.0, 1.0, 5.0]).double().unsqueeze(-1)
    one, other = one * scale, other * scale
    one[3] += 100
    together = compare(one, other, 0.05, 199)
    for i in range(6):
        alone = compare(one[i : i + 1], other[i : i + 1], 0.05, 199)
        assert float(together.p_value[i]) >= float(alone.p_value)
        torch.testing.assert_close(together.distance[i : i + 1], alone.distance)
        ratio = float(together.detectable[i] / alone.detectable[0])
        assert 0.9 < ratio < 2.3
    assert float(together.p_value[3]) == 1 / 200


def test_units_do_not_matter():
    one, other = draws(7, 2, 60), draws(8, 2, 60) * 2
    here, there = (
        compare(one, other, 0.05),
        compare(5 + 1e4 * one, 5 + 1e4 * other, 0.05),
    )
    torch.testing.assert_close(here.p_value, there.p_value)
    torch.testing.assert_close(1e4 * here.distance, there.distance)
    torch.testing.assert_close(1e4 * here.detectable, there.detectable)


def test_seeds():
    one, other = draws(9, 3, 50), draws(10, 3, 50)
    first, again = (compare(one, other, 0.05, seed=3) for _ in range(2))
    for name in ("p_value", "distance", "detectable"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.p_value, compare(one, other, 0.05, seed=4).p_value)


def test_the_random_state_is_left_alone():
    state = torch.get_rng_state()
    compare(draws(9, 3, 50), draws(10, 3, 50), 0.05)
    assert torch.equal(torch.get_rng_state(), state)


def test_wasserstein_of_equal_sizes():
    one, other = draws(11, 5, 33, "skewed"), draws(12, 5, 33) * 3
    expected = [
        wasserstein(a, b) for a, b in zip(one.numpy(), other.numpy(), strict=True)
    ]
    found = compare(one, other, 0.05, 19).distance
    torch.testing.assert_close(found, torch.tensor(expected))


def test_wasserstein_of_unequal_sizes():
    """The quantile functions of samples are steps."""
    one = torch.tensor([[0.0, 1.0]])
    other = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    assert float(compare(one, other, 0.05, 19).distance) == pytest.approx(0, abs=1e-9)
    one, other = draws(11, 5, 30, "skewed"), draws(12, 5, 47) * 3
    expected = [
        wasserstein(a, b) for a, b in zip(one.numpy(), other.numpy(), strict=True)
    ]
    found = compare(one, other, 0.05, 19).distance
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-6, atol=1e-9)


def test_wasserstein_against_a_normal_law():
    """Of ``N(0, 1)`` and ``N(1, 4)``: ``1 + (2 - 1)^2``, squared."""
    one, other = draws(13, 1, 20000), 1 + 2 * draws(14, 1, 20000)
    found = float(two_sample._wasserstein(one, other))
    assert found == pytest.approx(2**0.5, rel=0.03)


def test_equal_means_are_told_apart():
    """The test is on distributions, not on means."""
    one, other = draws(15, 1, 400), 2 * draws(16, 1, 400)
    assert float(compare(one, other, 0.01, 999).p_value) == 1 / 1000


def test_constant_samples():
    same = compare(torch.ones(2, 30), torch.ones(2, 30), 0.05, 99)
    assert same.p_value.tolist() == [1.0, 1.0] and same.distance.tolist() == [0.0, 0.0]
    apart = compare(torch.ones(1, 30), torch.zeros(1, 30), 0.05, 99)
    assert float(apart.p_value) == 1 / 100 and float(apart.distance) == 1.0


def test_more_draws_detect_less():
    sizes = [
        float(compare(draws(1, 1, n), draws(2, 1, n), 0.01).detectable)
        for n in (50, 300, 1800)
    ]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "count, law", [(100, "normal"), (300, "normal"), (200, "skewed")]
)
def test_detectable_shift_is_seen_in_four_of_five_cases(count, law, monkeypatch):
    """A shift of that size, in new samples."""
    level, cases = 0.01, 200
    pairs = [(draws(s, 1, count, law), draws(s + 1, 1, count, law)) for s in range(9)]
    found = [compare(one, other, level).detectable for one, other in pairs]
    shift = float(torch.cat(found).median())
    nothing = lambda pooled, *rest: torch.zeros(len(pooled))  # noqa: E731
    monkeypatch.setattr(two_sample, "_detectable", nothing)

    def power(shift):
        one, other = draws(22, cases, count, law), draws(23, cases, count, law) + shift
        found = [
            compare(one[[i]], other[[i]], level, 499, seed=i).p_value
            for i in range(cases)
        ]
        return float((torch.cat(found) <= level).double().mean())

    seen, less = power(shift), power(shift / 1.5)
    print(f"\npower at {shift:.3f}: {seen:.2f}, at two thirds of it: {less:.2f}")
    assert seen > 0.8 - 3.1 * (0.16 / cases) ** 0.5
    assert seen < 0.8 + 3.1 * (0.16 / cases) ** 0.5 + 0.08  # it is found by splits
    assert less < 0.7


@pytest.mark.slow
def test_many_pairs_at_a_small_level():
    """The permutations that a small level needs are more than one tensor may hold."""
    one, other = draws(30, 300, 20), draws(31, 300, 20)
    found = compare(one, other, 1e-5, permutations=60_000)
    assert found.p_value.shape == found.detectable.shape == (300,)
