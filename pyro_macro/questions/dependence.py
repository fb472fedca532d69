# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Are two quantities independent? A permutation test on draws."""

from __future__ import annotations

import torch
from torch import Tensor

_CELLS = 1 << 24  # of the largest temporary table


def independence(
    one: Tensor, other: Tensor, permutations: int = 999, seed: int = 0
) -> tuple[float, float]:
    """The largest distance correlation, and the p-value of the test that all are zero.

    Zero only of independent quantities (Székely, Rizzo and Bakirov 2007). The statistic
    is the sum of the squared distance correlations; under permutations its law is
    exact: the test has its level.

    :param one: draws, shape ``(n, N, a)``, of ``n`` pairs of quantities.
    :param other: shape ``(n, N, b)``.
    """
    generator = torch.Generator().manual_seed(seed)
    a, b = _centred(one.double()), _centred(other.double())  # (n, N, N)
    observed = (a * b).sum((-1, -2))
    size = a.shape[1]
    step = max(1, _CELLS // size**2)
    shuffled = torch.zeros(permutations, dtype=torch.float64, device="cpu")
    for mine, yours in zip(a.flatten(1), b, strict=True):
        order = torch.rand(
            permutations, size, generator=generator, device="cpu"
        ).argsort(-1)
        for start in range(0, permutations, step):
            some = order[start : start + step]
            moved = yours[some.unsqueeze(-1), some.unsqueeze(-2)]
            shuffled[start : start + step] += moved.flatten(1) @ mine
    p_value = (1 + (shuffled >= observed.sum() * (1 - 1e-9)).sum()) / (1 + permutations)
    return float(observed.clamp(min=0).max().sqrt()), float(p_value)


def _centred(draws: Tensor) -> Tensor:
    """Distances, with rows and columns of mean zero and norm one: ``(n, N, N)``."""
    scaled = draws / draws.std(1, keepdim=True).clamp(min=1e-300)
    distances = torch.cdist(scaled, scaled)
    rows = distances.mean(-1, keepdim=True)
    centred = distances - rows - rows.mT + rows.mean(-2, keepdim=True)
    return centred / centred.norm(dim=(-1, -2), keepdim=True).clamp(min=1e-300)
