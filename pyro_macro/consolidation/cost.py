# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What a program costs: the declared measure in place of Kolmogorov's."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_macro.reports import Report, Row


@dataclass(frozen=True)
class Cost:
    """What one evaluation of a program costs, and what is stored for it.

    :ivar equations: how many sites there are.
    :ivar draws: how many random numbers they take; each is a latent variable to
        inference.
    :ivar operations: multiplications and additions, of numbers that are not zero;
        looking up a row of a table is one for each of its axes, and any other operation
        one for each element.
    :ivar numbers: how many are stored, zeros left out.
    """

    equations: int = 0
    draws: int = 0
    operations: int = 0
    numbers: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.equations + other.equations,
            self.draws + other.draws,
            self.operations + other.operations,
            self.numbers + other.numbers,
        )

    def exceeds(self, other: Cost) -> bool:
        """Whether it is more: random numbers count first, operations second."""
        return (self.draws, self.operations) > (other.draws, other.operations)


@dataclass(frozen=True, repr=False)
class CostReport(Report):
    """The cost of a program before and after consolidation."""

    before: Cost
    after: Cost

    def summary(self) -> str:
        return (
            f"{self.before.equations} equations became {self.after.equations}, "
            f"{self.before.draws} random numbers {self.after.draws}."
        )

    def rows(self) -> list[Row]:
        return [
            {"": name, **vars(cost)}
            for name, cost in (("before", self.before), ("after", self.after))
        ]


def nonzero(tensor: Tensor) -> int:
    return int(torch.count_nonzero(tensor))


def size_of(shape: torch.Size) -> int:
    return math.prod(shape)
