# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_macro.aggregation.base import Aggregation, AsSum
from pyro_macro.errors import NotAMicroState


@dataclass(frozen=True)
class Stacked(Aggregation):
    """Several maps of parts of one micro state, as one vector of macro values.

    What several macro-variables over the same sites become, when they are set
    together.

    :param maps: each map, and the sites that it is of, in its order.
    """

    maps: tuple[tuple[Aggregation, tuple[str, ...]], ...]
    _places: tuple[tuple[int, ...], ...] = field(default=(), repr=False)
    event_dim = 1

    def within(self, layout: Any) -> Stacked:
        """The same, for micro states in this order.

        :raises NotAMicroState: if rows of linear maps are dependent.
        """
        places = tuple(
            tuple(i for name in names for i in layout.place(name))
            for _, names in self.maps
        )
        found = Stacked(self.maps, places)
        rows = found.weights(torch.zeros(layout.size, dtype=torch.float64))
        if rows is not None and torch.linalg.matrix_rank(rows) < len(rows):
            raise NotAMicroState(
                f"{[aggregation for aggregation, _ in self.maps]}: the macro-variables "
                "that share micro sites are dependent, so that some of their values "
                "could never be had together. Leave out what follows from the others."
            )
        return found

    def _parts(self, state: Tensor) -> list[tuple[Aggregation, Tensor]]:
        return [
            (aggregation, state[..., list(places)])
            for (aggregation, _), places in zip(self.maps, self._places, strict=True)
        ]

    def __call__(self, state: Tensor) -> Tensor:
        values = [
            aggregation(part) if aggregation.event_dim else aggregation(part)[..., None]
            for aggregation, part in self._parts(state)
        ]
        return torch.cat(values, -1)

    def weights(self, state: Tensor) -> Tensor | None:
        spread = []
        for (aggregation, part), places in zip(
            self._parts(state), self._places, strict=True
        ):
            rows = aggregation.weights(part)
            if rows is None:
                return None
            wide = rows.new_zeros(len(rows), state.shape[-1])
            wide[:, list(places)] = rows
            spread.append(wide)
        return torch.cat(spread)

    def split(self, total: Tensor) -> list[Tensor]:
        """The macro value of each map."""
        sizes = self.sizes(total)
        parts = total.split(sizes, -1)
        return [
            part if aggregation.event_dim else part.squeeze(-1)
            for part, (aggregation, _) in zip(parts, self.maps, strict=True)
        ]

    def sizes(self, like: Tensor) -> list[int]:
        """How many macro values each map has."""
        sizes = []
        for (aggregation, _), places in zip(self.maps, self._places, strict=True):
            rows = aggregation.weights(like.new_zeros(len(places)))
            sizes.append(1 if rows is None else len(rows))
        return sizes

    def as_sums(self, values: Tensor, total: Tensor) -> tuple[AsSum, ...] | None:
        found: list[AsSum] = []
        parts = zip(self.maps, self._places, self.split(total), strict=True)
        for (aggregation, _), places, own in parts:
            sums = aggregation.as_sums(values[list(places)], own)
            if sums is None:
                return None
            for condition in sums:
                shape = condition.terms.shape[:-2] + values.shape
                terms = condition.terms.new_zeros(shape)
                terms[..., list(places), :] = condition.terms
                found.append(AsSum(terms, condition.low, condition.high))
        return tuple(found)

    def largest(self, size: int, total: Tensor) -> float | None:
        bounds, covered = [], set()
        parts = zip(self.maps, self._places, self.split(total), strict=True)
        for (aggregation, _), places, own in parts:
            bound = aggregation.largest(len(places), own)
            if bound is not None:
                bounds.append(bound)
                covered |= set(places)
        return max(bounds) if len(covered) == size else None
