# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from pyro_macro.aggregation.base import Aggregation, AsSum, indicator
from pyro_macro.errors import NotAMicroState


@dataclass(frozen=True)
class Count(Aggregation):
    """How many elements are in a category.

    :param category: the value that counts.

    >>> import torch
    >>> Count(2)(torch.tensor([0, 2, 1, 2]))
    tensor(2.)
    """

    category: float

    def __post_init__(self) -> None:
        number = isinstance(self.category, (int, float))
        if not number or not math.isfinite(self.category):
            raise NotAMicroState(
                f"Count: category is {self.category!r}. Expected a number, one of the "
                "values that the micro sites can have."
            )

    def __call__(self, state: Tensor) -> Tensor:
        floating = state if state.is_floating_point() else state.float()
        return indicator(floating, self.category).sum(-1)

    def as_sums(self, values: Tensor, total: Tensor) -> tuple[AsSum, ...]:
        return (AsSum(indicator(values, self.category), total, total),)
