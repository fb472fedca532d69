# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_macro.aggregation.base import Aggregation, AsSum, indicator


class Extreme(Aggregation):
    """The largest element, or the smallest.

    :cvar sign: 1 for the largest, -1 for the smallest.
    """

    sign: int

    def is_injective(self, state: Tensor) -> bool:
        return state.shape[-1] == 1

    def as_sums(self, values: Tensor, total: Tensor) -> tuple[AsSum, ...]:
        # How many elements attain it: at least one, and none lies beyond
        bound = total[..., None, None]
        attains = indicator(values, bound)
        beyond = (self.sign * (values - bound) > 0) & (attains == 0)
        terms = torch.where(beyond, torch.nan, attains)
        most = torch.full_like(total, len(values))
        return (AsSum(terms, torch.ones_like(total), most),)


@dataclass(frozen=True)
class Max(Extreme):
    """The largest element.

    >>> Max()(torch.tensor([1.0, 4.0, 2.0]))
    tensor(4.)
    """

    sign = 1

    def largest(self, size: int, total: Tensor) -> float:
        return max(float(total.max()), 0.0)

    def __call__(self, state: Tensor) -> Tensor:
        return state.amax(-1)


@dataclass(frozen=True)
class Min(Extreme):
    """The smallest element.

    >>> Min()(torch.tensor([1.0, 4.0, 2.0]))
    tensor(1.)
    """

    sign = -1

    def __call__(self, state: Tensor) -> Tensor:
        return state.amin(-1)
