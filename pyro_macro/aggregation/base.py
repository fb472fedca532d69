# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class AsSum:
    """A fibre among finitely many values, written as a condition on a sum.

    The micro states with the macro value are those with ``low <= sum of terms <=
    high``, each element contributing the term of its value.

    :ivar terms: shape ``(..., K, V)``; NaN for a value that no such state has.
    :ivar low: the least sum, shape ``(...)``.
    :ivar high: the largest.
    """

    terms: Tensor
    low: Tensor
    high: Tensor


class Aggregation(ABC):
    """An aggregation map ``pi``: from a micro state to a macro value.

    Definition 2 of *Meaningful Causal Aggregation and Paradoxical Confounding*: a map
    that is surjective, but not injective. A new map is one class in one file; it owes
    :meth:`__call__`, :meth:`weights` if it is linear, and :meth:`as_sums` if it can be
    taken element by element. Instances are immutable and compare by what they compute.

    :cvar event_dim: 0 if the macro value is a number, 1 if it is a vector.
    """

    event_dim: int = 0

    @abstractmethod
    def __call__(self, state: Tensor) -> Tensor:
        """The macro value of a micro state.

        :param state: shape ``batch + (K,)``.
        :returns: shape ``batch``, or ``batch + (m,)`` for a vector of macro values.
        """

    def weights(self, state: Tensor) -> Tensor | None:
        """The rows of a linear map, shape ``(m, K)``; ``None`` if it is not linear.

        :param state: a micro state, for its size, dtype and device.
        """
        return None

    def within(self, layout: Any) -> Aggregation:
        """The same map, for micro states whose elements are in this order.

        :param layout: knows the place of each site.
        """
        return self

    def is_injective(self, state: Tensor) -> bool:
        """Whether the map is known to be injective on micro states like this one."""
        rows = self.weights(state)
        return rows is not None and rows.shape[0] >= rows.shape[1]

    def largest(self, size: int, total: Tensor) -> float | None:
        """The largest value that an element can have, if none is negative.

        :param size: the number of elements.
        :param total: the macro value.
        :returns: ``None`` if there is no limit.
        """
        rows = self.weights(total.new_zeros(size))
        if rows is None or bool((rows < 0).any()):
            return None
        totals = total.reshape(-1, rows.shape[0]).amax(0)  # (m,)
        bounds = torch.where(rows > 0, totals.unsqueeze(-1) / rows, torch.inf)
        most = float(bounds.amin(0).max())
        return max(most, 0.0) if most < float("inf") else None

    def as_sums(self, values: Tensor, total: Tensor) -> tuple[AsSum, ...] | None:
        """The fibre over ``total`` as conditions on sums; ``None`` if it is not that.

        :param values: the values that each element may have, shape ``(K, V)``.
        :param total: macro values, shape ``batch`` (with ``(m,)`` for a vector).
        """
        rows = self.weights(values[:, 0])
        if rows is None:
            return None
        totals = total.unbind(-1) if self.event_dim else [total]
        return tuple(
            AsSum(row.unsqueeze(-1) * values, total, total)
            for row, total in zip(rows, totals, strict=True)
        )


def indicator(values: Tensor, of: Tensor | float) -> Tensor:
    """One where a value is ``of``, zero elsewhere, to float tolerance."""
    of = torch.as_tensor(of, dtype=values.dtype, device=values.device)
    return torch.isclose(values, of, rtol=1e-6, atol=1e-9).to(values)
