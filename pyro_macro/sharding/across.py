# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Aggregation maps and supports of micro states that lie on several ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to, constraints, transform_to

from pyro_macro.aggregation import Aggregation, Linear, Mean, Sum
from pyro_macro.errors import UnsupportedLaw
from pyro_macro.program.layout import Layout

NO_COORDINATES = (
    "the elements of this latent site lie on several ranks, so that it has no free "
    "coordinates for NUTS and autoguides. Leave it to the model (a guide without it), "
    "or run on one process with a plain plate"
)


class AcrossShards(Aggregation):
    """A linear map of micro states of which each rank has a part.

    :param aggregation: the map of the whole: one with a single row.
    :param layout: of the part of this rank.
    :raises UnsupportedLaw: if it is another map.
    """

    def __init__(self, aggregation: Aggregation, layout: Layout, what: str) -> None:
        known = isinstance(aggregation, (Sum, Mean, Linear))
        if not known or aggregation.event_dim:
            raise UnsupportedLaw(
                f"{what}: {aggregation!r} over {layout.shards!r}, which is split over "
                "ranks. Expected a linear map with one value: Sum(), Mean() or "
                "Linear(weights)."
            )
        self.aggregation, self.layout = aggregation, layout

    def __repr__(self) -> str:
        return repr(self.aggregation)

    def __call__(self, state: Tensor) -> Tensor:
        if isinstance(self.aggregation, Linear):
            here = state.double() @ self.weights(state)[0].double()
        else:
            here = state.sum(-1, dtype=torch.float64)
        total = self.layout.shards.sum(here)
        if isinstance(self.aggregation, Mean):
            total = total / self.layout.full_size
        return total.to(state.dtype)

    def weights(self, state: Tensor) -> Tensor:
        """The rows for the elements of this rank."""
        if isinstance(self.aggregation, Mean):
            return state.new_full((1, state.shape[-1]), 1.0 / self.layout.full_size)
        if isinstance(self.aggregation, Linear):
            return self.layout.mine(self.aggregation.matrix, repr(self)).to(state)
        return state.new_ones(1, state.shape[-1])

    def is_injective(self, state: Tensor) -> bool:
        return self.layout.full_size == 1


def fitted(aggregation: Aggregation, layout: Layout, what: str) -> Aggregation:
    """The map, for micro states whose elements are in this order, on their ranks."""
    if layout.shards is not None:
        return AcrossShards(aggregation, layout, what)
    return aggregation.within(layout)


class Apart(constraints.Constraint):
    """A support of elements that lie on several ranks: checked on each of its own.

    :param here: the support of the elements of this rank.
    """

    event_dim = 1

    def __init__(self, here: Any) -> None:
        self.here = here

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return self.here.is_discrete

    def check(self, value: Tensor) -> Tensor:
        return self.here.check(value)

    def __repr__(self) -> str:
        return f"Apart({self.here!r})"


@biject_to.register(Apart)
@transform_to.register(Apart)
def _no_coordinates(constraint: Apart) -> Any:
    raise UnsupportedLaw(f"{NO_COORDINATES}.")
