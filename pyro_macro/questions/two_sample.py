# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Are two samples of numbers from one distribution? A permutation test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_CELLS = 1 << 23  # of the largest temporary table
POWER = 0.8


@dataclass(frozen=True, eq=False)
class Comparison:
    """What a two-sample test found, for each of ``n`` pairs of samples.

    :ivar p_value: shape ``(n,)``.
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
    permutations: int = 999,
    seed: int = 0,
) -> Comparison:
    """Compares samples by their energy distance, with a permutation test.

    The energy distance of two distributions on the line is twice the integral of the
    squared difference of their distribution functions: zero only if they are equal
    (Székely and Rizzo 2013). Under permutations its law is exact, whatever the
    distributions: the test has its level.

    :param one: independent draws, shape ``(n, N)``.
    :param other: the same.
    :param level: at which something is held to be seen, for ``detectable``.
    """
    generator = torch.Generator().manual_seed(seed)
    pooled, order = torch.cat([one, other], -1).double().sort(-1)
    gaps = pooled.diff(dim=-1)  # (n, 2N - 1)
    first = (order < one.shape[-1]).double()
    sizes = one.shape[-1], other.shape[-1]
    observed = _energy(first, gaps, sizes)
    shuffled = _under_permutations(gaps, sizes, permutations, generator)  # (P, n)
    # Rounding must not break ties
    least = observed * (1 - 1e-9)
    p_value = (1 + (shuffled >= least).sum(0)) / (1 + permutations)
    limit = shuffled.quantile(1 - level, 0)
    detectable = _detectable(pooled, limit, sizes, generator)
    return Comparison(p_value, _wasserstein(one, other), detectable)


def _energy(first: Tensor, gaps: Tensor, sizes: tuple[int, int]) -> Tensor:
    """From whether each pooled draw, in ascending order, is of the first sample."""
    mine = first.cumsum(-1)[..., :-1]
    total = torch.arange(1, gaps.shape[-1] + 1, dtype=gaps.dtype, device=gaps.device)
    difference = mine / sizes[0] - (total - mine) / sizes[1]
    return 2 * (difference.square() * gaps).sum(-1)


def _under_permutations(
    gaps: Tensor, sizes: tuple[int, int], count: int, generator: torch.Generator
) -> Tensor:
    whole = sum(sizes)
    parts = []
    # Each permutation serves all pairs
    step = max(1, _CELLS // (whole * max(1, len(gaps))))
    for start in range(0, count, step):
        n = min(step, count - start)
        keys = torch.rand(n, whole, generator=generator)
        first = (keys.argsort(-1) < sizes[0]).double().to(gaps.device)
        parts.append(_energy(first.unsqueeze(1), gaps, sizes))
    return torch.cat(parts)


def _detectable(
    pooled: Tensor, limit: Tensor, sizes: tuple[int, int], generator: torch.Generator
) -> Tensor:
    """By moving one half of random splits, further and further."""
    splits, steps = 40, 24
    spread = pooled.std(-1)  # (n,)
    shifts = torch.logspace(-3, 1, steps, dtype=torch.float64)
    found = torch.full_like(spread, torch.inf)
    for shift in shifts.flip(0).tolist():
        seen = []
        for _ in range(max(1, splits * len(pooled) * pooled.shape[-1] // _CELLS)):
            n = max(1, min(splits, _CELLS // pooled.numel()))
            keys = torch.rand(n, 1, pooled.shape[-1], generator=generator)
            first = keys.argsort(-1) < sizes[0]  # (R, 1, 2N)
            moved = pooled + first * (shift * spread).unsqueeze(-1)
            ordered, order = moved.sort(-1)
            labels = first.expand(moved.shape).gather(-1, order).double()
            statistic = _energy(labels, ordered.diff(dim=-1), sizes)
            seen.append((statistic > limit).double())
        power = torch.cat(seen).mean(0)
        found = torch.where(power >= POWER, shift * spread, found)
        if bool((power < POWER).all()):
            break
    return found


def _wasserstein(one: Tensor, other: Tensor) -> Tensor:
    one, other = one.double().sort(-1).values, other.double().sort(-1).values
    if one.shape[-1] != other.shape[-1]:
        levels = torch.linspace(0, 1, min(one.shape[-1], other.shape[-1]))
        levels = levels.to(one)
        one, other = (s.quantile(levels, -1).mT for s in (one, other))
    return (one - other).square().mean(-1).sqrt()
