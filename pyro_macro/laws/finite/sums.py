# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Sums of independent parts with finitely many values, exactly.

A balanced tree over the parts: going up, the probabilities of sums of ever more
parts; going down, given the sum of a node, a draw of what its left half has of it.
All nodes of a level are one tensor operation, and so are all draws.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Log probability of what cannot be: finite, so that gradients do not become NaN
NEVER = -1e100
_CELLS = 1 << 24  # of the largest temporary table


def log_sum(table: Tensor, dim: int = -1) -> Tensor:
    """``logsumexp`` that stays :data:`NEVER` where nothing is possible."""
    return torch.logsumexp(table, dim).clamp(min=NEVER)


def choose(cdf: Tensor, rows: Tensor) -> Tensor:
    """Draws from some rows of a table of cumulative weights.

    :param cdf: shape ``(n, R)``, cumulative but not normalized.
    :param rows: which row each draw is from, any shape.
    :returns: indices ``0..R-1``, of that shape.
    """
    size = cdf.shape[-1]
    flat, start = cdf.reshape(-1), rows * size
    target = torch.rand(rows.shape, dtype=cdf.dtype, device=cdf.device)
    target = target.mul_(1 - 1e-12).mul_(flat[start + size - 1])
    found = torch.zeros_like(rows)  # how many entries are not above the target
    step = 1 << (size.bit_length() - 1)
    while step:
        probe = found + step
        inside = probe <= size
        entry = flat[start + (probe - 1).clamp_(max=size - 1)]
        found = torch.where(inside & (entry <= target), probe, found)
        step >>= 1
    return found


def cumulative(logits: Tensor) -> Tensor:
    """Cumulative weights of each row, the largest weight being one."""
    most = logits.amax(-1, keepdim=True)
    return (logits - most).exp_().cumsum_(-1)


def convolve(left: Tensor, right: Tensor, most: int) -> Tensor:
    """Log probabilities of ``l + r``, from those of independent ``l`` and ``r``.

    :param left: shape ``(n, R)``.
    :param right: shape ``(n, R)``.
    :param most: the largest sum of interest.
    :returns: shape ``(n, min(2R - 1, most + 1))``.
    """
    size = left.shape[-1]
    sums = torch.arange(min(2 * size - 1, most + 1), device=left.device)
    parts = []
    for i in range(0, len(left), step := max(1, _CELLS // (len(sums) * size))):
        parts.append(log_sum(_splits(left[i : i + step], right[i : i + step], sums)))
    return torch.cat(parts)


def _splits(left: Tensor, right: Tensor, sums: Tensor) -> Tensor:
    """Log weights of the ways to split sums: ``(n, S, R)``, by what the left has.

    :param sums: shape ``(S,)``, or ``(n, S)`` for different ones in each row.
    """
    size = left.shape[-1]
    rest = sums.unsqueeze(-1) - torch.arange(size, device=left.device)
    possible = (rest >= 0) & (rest < size)
    rest = rest.clamp(0, size - 1)
    if sums.dim() == 1:
        taken = right[:, rest]  # (n, S, R)
    else:
        taken = right.unsqueeze(1).expand(-1, sums.shape[-1], -1).gather(-1, rest)
    return left.unsqueeze(-2) + torch.where(possible, taken, NEVER)


class SumTree:
    """The sum of independent parts, each ``0, 1, .., R - 1``.

    :param parts: log probabilities of each part, shape ``(B, n, R)``: ``B``
        independent sums of ``n`` parts.
    :param most: the largest sum of interest.
    :ivar total: log probabilities of the sums, shape ``(B, most + 1)`` or less.

    >>> coins = torch.full((1, 3, 2), 0.5, dtype=torch.float64).log()
    >>> SumTree(coins, 3).total.exp()
    tensor([[0.1250, 0.3750, 0.3750, 0.1250]], dtype=torch.float64)
    """

    def __init__(self, parts: Tensor, most: int) -> None:
        self.count, depth = parts.shape[1], max(parts.shape[1] - 1, 0).bit_length()
        self.levels = [parts[..., : most + 1]]
        missing = (1 << depth) - self.count
        if missing:  # parts that are always zero
            none = parts.new_full((len(parts), missing, parts.shape[-1]), NEVER)
            none[..., 0] = 0.0
            self.levels = [torch.cat([parts, none], 1)[..., : most + 1]]
        for _ in range(depth):
            below = self.levels[-1]
            pairs = below.unflatten(1, (-1, 2))
            above = convolve(
                pairs[:, :, 0].flatten(0, 1), pairs[:, :, 1].flatten(0, 1), most
            )
            self.levels.append(above.unflatten(0, (len(below), -1)))
        self.total = self.levels[-1][:, 0]

    def split(self, rows: Tensor, sums: Tensor) -> Tensor:
        """Draws of the parts, given their sums.

        :param rows: which of the ``B`` sums each draw is of, shape ``(T,)``.
        :param sums: its value, shape ``(T,)``.
        :returns: shape ``(T, n)``.
        """
        with torch.no_grad():
            now = sums.unsqueeze(-1)  # (T, nodes)
            for level in reversed(self.levels[:-1]):
                now = torch.cat(
                    [
                        self._halve(level, rows[i : i + step], now[i : i + step])
                        for step in [max(1, _CELLS // level[0].numel())]
                        for i in range(0, max(len(rows), 1), step)
                    ]
                )
            return now[:, : self.count]

    def _halve(self, level: Tensor, rows: Tensor, sums: Tensor) -> Tensor:
        """What the children in ``level`` have of the sums of their parents."""
        pairs = level.unflatten(1, (-1, 2))
        left, right = pairs[:, :, 0], pairs[:, :, 1]  # (B, nodes, R)
        nodes, size = left.shape[1:]
        node = rows.unsqueeze(-1) * nodes + torch.arange(nodes, device=rows.device)
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        most = min(2 * size - 1, int(sums.max()) + 1 if sums.numel() else 1)
        if len(left) * most <= len(rows) * nodes:
            every = torch.arange(most, device=rows.device)
            cdf = cumulative(_splits(left, right, every)).flatten(0, 1)
            mine = choose(cdf, node * most + sums)
        else:
            flat = node.flatten()
            weights = _splits(left[flat], right[flat], sums.reshape(-1, 1))
            cdf = cumulative(weights.squeeze(1))
            each = torch.arange(len(flat), device=rows.device)
            mine = choose(cdf, each).reshape(node.shape)
        return torch.stack([mine, sums - mine], -1).flatten(-2)


def states_on(codes: Tensor, allowed: Tensor, limit: int) -> Tensor | None:
    """All ways to choose a value for each element so that their sum is allowed.

    :param codes: what each value counts, shape ``(n, V)``; negative if excluded.
    :param allowed: which sums are allowed, shape ``(R,)``.
    :param limit: the largest number of states.
    :returns: indices of values, shape ``(states, n)``; ``None`` if there are more.
    """
    n, size = len(codes), len(allowed)
    ends = [allowed]  # which sums of the first elements can still end well
    for own in codes.flip(0).unbind(0):
        end = torch.zeros_like(allowed)
        for code in own[(own >= 0) & (own < size)].unique().tolist():
            end[: size - code] |= ends[-1][code:]
        ends.append(end)
    states = torch.zeros(1, 0, dtype=torch.long, device=codes.device)
    sums = torch.zeros(1, dtype=torch.long, device=codes.device)
    for k in range(n):
        extended = sums.unsqueeze(-1) + codes[k]
        possible = (codes[k] >= 0) & (extended < size)
        possible &= ends[n - 1 - k][extended.clamp(0, size - 1)]
        which, value = possible.nonzero().unbind(-1)
        if len(which) > limit:
            return None
        states = torch.cat([states[which], value.unsqueeze(-1)], -1)
        sums = extended[which, value]
    return states


def log_count(codes: Tensor, allowed: Tensor) -> float:
    """The logarithm of the number of such states."""
    size = len(allowed)
    parts = scatter_codes(torch.zeros_like(codes, dtype=torch.float64), codes, size)
    total = SumTree(parts.unsqueeze(0), size - 1).total[0]
    counted = total[allowed[: len(total)]]
    return float(log_sum(counted)) if counted.numel() else -math.inf


def scatter_codes(logits: Tensor, codes: Tensor, size: int) -> Tensor:
    """Log probabilities of codes, from those of the values that have them.

    :param logits: shape ``(..., V)``.
    :param codes: shape ``(..., V)``, broadcasting against it; negative if excluded.
    :returns: shape ``(..., size)``.
    """
    codes = codes.expand(logits.shape)
    inside = (codes >= 0) & (codes < size)
    logits = torch.where(inside, logits, NEVER)
    index = codes.clamp(0, size - 1)
    most = logits.new_full(logits.shape[:-1] + (size,), NEVER)
    most = most.scatter_reduce(-1, index, logits.detach(), "amax")
    mass = (logits - most.gather(-1, index)).exp()
    mass = torch.where(inside & (logits > NEVER), mass, 0.0)
    sums = torch.zeros_like(most).scatter_add(-1, index, mass)
    return torch.where(sums > 0, sums.clamp(min=1e-300).log() + most, NEVER)
