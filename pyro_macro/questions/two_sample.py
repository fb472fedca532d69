# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Are two samples of numbers from one distribution? A permutation test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CELLS = 1 << 23  # of the largest temporary table
POWER = 0.8
SPLITS, HALVINGS = 40, 7


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a two-sample test found, for each of ``n`` pairs of samples.

    :ivar p_value: adjusted for the number of pairs, shape ``(n,)``: a false alarm at
        any of them has the probability of the level.
    :ivar distance: the Wasserstein-2 distance of the samples.
    :ivar detectable: the least shift of one distribution that the test sees in four of
        five cases, in the units of the samples.
    """

    p_value: Tensor
    distance: Tensor
    detectable: Tensor


def compare(
    one: Tensor,
    other: Tensor,
    level: float,
    permutations: int | None = None,
    seed: int = 0,
) -> Comparison:
    """Compares samples by their energy distance, with a permutation test.

    The energy distance of two distributions on the line is twice the integral of the
    squared difference of their distribution functions: zero only if they are equal
    (Székely and Rizzo 2013). Under permutations its law is exact, whatever the
    distributions: the test has its level. Several pairs are compared at once, each with
    the largest statistic of all pairs under the same permutations (Westfall and Young
    1993), in standard deviations.

    :param one: independent draws, shape ``(n, N)``. Draws at one place of the second
        dimension belong together, and may depend on one another.
    :param other: the same, of any number.
    :param level: at which something is held to be seen, for ``detectable``.
    :param permutations: by default 999, or more for small levels.
    """
    count = max(999, int(10 / level) - 1) if permutations is None else permutations
    generator = torch.Generator().manual_seed(seed)
    pooled, order = torch.cat([one, other], -1).double().sort(-1)
    gaps = pooled.diff(dim=-1)  # (n, 2N - 1)
    sizes = one.shape[-1], other.shape[-1]
    observed = _energy((order < sizes[0]).double(), gaps, sizes)
    shuffled = _under_permutations(order, gaps, sizes, count, generator)  # (P, n)
    mean, spread = shuffled.mean(0), shuffled.std(0).clamp(min=1e-300)
    largest = ((shuffled - mean) / spread).amax(-1)  # (P,)
    found = (observed - mean) / spread
    # Rounding must not break ties
    p_value = (1 + (largest >= found.unsqueeze(-1) - 1e-9).sum(-1)) / (1 + count)
    p_value = torch.where(observed > 0, p_value, 1.0)
    limit = mean + spread * largest.quantile(1 - level)
    detectable = _detectable(pooled, limit, sizes, generator)
    return Comparison(p_value, _wasserstein(one, other), detectable)


def _energy(first: Tensor, gaps: Tensor, sizes: tuple[int, int]) -> Tensor:
    """From whether each pooled draw, in ascending order, is of the first sample."""
    mine = first.cumsum(-1)[..., :-1]
    total = torch.arange(1, gaps.shape[-1] + 1, dtype=gaps.dtype, device=gaps.device)
    difference = mine / sizes[0] - (total - mine) / sizes[1]
    return 2 * (difference.square() * gaps).sum(-1)


def _under_permutations(
    order: Tensor,
    gaps: Tensor,
    sizes: tuple[int, int],
    count: int,
    generator: torch.Generator,
) -> Tensor:
    parts = []
    step = max(1, _CELLS // order.numel())
    for start in range(0, count, step):
        keys = torch.rand(
            min(step, count - start), sum(sizes), generator=generator, device="cpu"
        )
        first = (keys.argsort(-1) < sizes[0]).to(gaps)
        parts.append(_energy(first[:, order], gaps, sizes))  # (P, n)
    return torch.cat(parts)


def _detectable(
    pooled: Tensor, limit: Tensor, sizes: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """By moving one half of random splits until four of five of them are seen."""
    spread = pooled.std(-1)  # (n,)
    low, high = torch.full_like(spread, -7.0), torch.full_like(spread, 2.5)  # logs
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        seen = []
        for _ in range(SPLITS):
            keys = torch.rand(pooled.shape[-1], generator=generator, device="cpu")
            first = keys.argsort(-1) < sizes[0]
            moved = pooled + first * (middle.exp() * spread).unsqueeze(-1)
            ordered, order = moved.sort(-1)
            statistic = _energy(first[order].double(), ordered.diff(dim=-1), sizes)
            seen.append(statistic > limit)
        enough = torch.stack(seen).double().mean(0) >= POWER
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return torch.where(high < 2.4, high.exp() * spread, torch.inf)


def _wasserstein(one: Tensor, other: Tensor) -> Tensor:
    """Of the two samples: the integral over levels of the difference of quantiles."""
    one, other = one.double().sort(-1).values, other.double().sort(-1).values
    n, m = one.shape[-1], other.shape[-1]
    if n == m:
        return (one - other).square().mean(-1).sqrt()
    # In units of 1 / (n m), so that levels are whole numbers
    ends = torch.cat(
        [
            torch.arange(1, n + 1, device="cpu") * m,
            torch.arange(1, m + 1, device="cpu") * n,
        ]
    ).unique()
    width = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype, device="cpu")) / (n * m)
    difference = one[..., (ends - 1) // m] - other[..., (ends - 1) // n]
    return (difference.square() * width).sum(-1).sqrt()
