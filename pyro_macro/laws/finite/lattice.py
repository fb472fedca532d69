# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Conditions on sums, in whole numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from pyro_macro.aggregation.base import AsSum

LONGEST = 1 << 20  # the largest range of a sum


@dataclass(frozen=True, eq=False)
class Codes:
    """What values count, in whole numbers from zero.

    :ivar codes: shape ``(..., K, V)``; negative for a value that cannot be.
    :ivar allowed: which sums are allowed, shape ``(..., R)``.
    """

    codes: Tensor
    allowed: Tensor


def step_of(terms: Tensor) -> float | None:
    """The largest number of which all differences are multiples.

    :param terms: shape ``(..., V)``; NaN where a value is excluded.
    :returns: ``None`` if there is none, or sums would have too many values.
    """
    low = terms.nan_to_num(nan=math.inf).amin(-1, keepdim=True)
    differences = (terms - low).flatten()
    differences = differences[differences.isfinite() & (differences > 0)]
    if not differences.numel():
        return 1.0
    least = differences.min()
    ratios = (differences / least).mul(1e9).round().div(1e9).unique()
    if len(ratios) > LONGEST:
        return None
    common = 1
    for ratio in ratios.tolist():
        if ratio * common == round(ratio * common):
            continue
        near = Fraction(ratio).limit_denominator(1000)
        if abs(float(near) - ratio) > 1e-7 * ratio:
            return None
        common = math.lcm(common, near.denominator)
        if common > 10_000:
            return None
    return float(least) / common


def _longest(terms: Tensor, step: float) -> float:
    ranges = terms.nan_to_num(nan=-math.inf).amax(-1)
    ranges = ranges - terms.nan_to_num(nan=math.inf).amin(-1)
    return float(ranges.clamp(min=0).sum(-1).max()) / step


def is_lattice(sums: Sequence[AsSum]) -> list[float] | None:
    """The steps of some sums, ``None`` if they have none."""
    steps, size = [], 1.0
    for condition in sums:
        step = step_of(condition.terms)
        if step is None:
            return None
        steps.append(step)
        size *= _longest(condition.terms, step) + 1
    return steps if size <= LONGEST else None


def codes_of(sums: Sequence[AsSum]) -> Codes:
    """Several conditions as one, each with digits of its own.

    :param sums: conditions for which :func:`is_lattice` holds, on sums of shape
        ``(B, Bs)``.
    """
    codes: Tensor | None = None
    allowed: Tensor | None = None
    size = 1
    for condition in sums:
        terms, step = condition.terms, step_of(condition.terms)
        assert step is not None
        low = terms.nan_to_num(nan=math.inf).amin(-1)
        low = torch.where(low.isfinite(), low, 0.0)
        own = ((terms - low.unsqueeze(-1)) / step).round()
        excluded = own.isnan()
        own = own.nan_to_num().to(torch.long)
        start = low.sum(-1)
        first = torch.ceil((condition.low - start) / step - 1e-6)
        last = torch.floor((condition.high - start) / step + 1e-6)
        longest = int(own.amax(-1).sum(-1).max())
        index = torch.arange(longest + 1, device=terms.device)
        met = (index >= first.unsqueeze(-1)) & (index <= last.unsqueeze(-1))
        own = own * size
        if codes is None or allowed is None:
            codes, allowed = torch.where(excluded, -1, own), met
        else:
            excluded = excluded | (codes < 0)
            codes = torch.where(excluded, -1, codes + own)
            allowed = (met.unsqueeze(-1) & allowed.unsqueeze(-2)).flatten(-2)
        size *= longest + 1
    assert codes is not None and allowed is not None
    most = int(allowed.flatten(0, -2).any(0).nonzero().max()) if allowed.any() else 0
    return Codes(codes, allowed[..., : most + 1])
