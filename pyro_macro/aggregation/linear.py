# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_macro.aggregation.base import Aggregation
from pyro_macro.errors import NotAMicroState


@dataclass(frozen=True)
class Sum(Aggregation):
    """The sum of all elements.

    >>> Sum()(torch.tensor([1.0, 2.0, 4.0]))
    tensor(7.)
    """

    def __call__(self, state: Tensor) -> Tensor:
        return state.sum(-1)

    def weights(self, state: Tensor) -> Tensor:
        return state.new_ones(1, state.shape[-1])


@dataclass(frozen=True)
class Mean(Aggregation):
    """The average of all elements.

    >>> Mean()(torch.tensor([1.0, 2.0, 6.0]))
    tensor(3.)
    """

    def __call__(self, state: Tensor) -> Tensor:
        return state.mean(-1)

    def weights(self, state: Tensor) -> Tensor:
        size = state.shape[-1]
        return state.new_full((1, size), 1.0 / size)


class Linear(Aggregation):
    """Weighted sums: ``weights @ x``.

    Elements are in the order of the micro sites, within a site along the plates of
    ``over`` and then along its event dimensions. The weights define the variable:
    they are copied, and gradients do not flow to them.

    :param weights: shape ``(K,)`` for one macro value, ``(m, K)`` for a vector of
        them; finite, with independent rows.
    :raises NotAMicroState: if they are not.

    >>> Linear([1.0, 3.0])(torch.tensor([10.0, 20.0]))
    tensor(70.)
    """

    def __init__(
        self, weights: Tensor | Sequence[float] | Sequence[Sequence[float]]
    ) -> None:
        # Sequences straight to float64: the default dtype may not be that of the model
        tensor = torch.as_tensor(weights, dtype=torch.float64).detach().cpu().clone()
        if tensor.dim() not in (1, 2) or tensor.numel() == 0:
            raise NotAMicroState(
                f"Linear: weights have shape {tuple(tensor.shape)}. Expected (K,) for "
                "one macro value or (m, K) for m of them."
            )
        if not torch.isfinite(tensor).all():
            raise NotAMicroState("Linear: weights contain NaN or infinity.")
        matrix = torch.atleast_2d(tensor)
        if torch.linalg.matrix_rank(matrix) < matrix.shape[0]:
            raise NotAMicroState(
                "Linear: the rows of the weights are dependent (or all zero), so that "
                "some macro values could never be reached. Leave out the rows that "
                "follow from the others."
            )
        self._matrix = matrix
        self.event_dim = tensor.dim() - 1

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Linear)
            and self.event_dim == other.event_dim
            and torch.equal(self._matrix, other._matrix)
        )

    def __hash__(self) -> int:
        return hash((self.event_dim, self._matrix.numpy().tobytes()))

    def __repr__(self) -> str:
        shown = self._matrix if self.event_dim else self._matrix[0]
        if self._matrix.numel() > 6:
            return f"Linear(<weights of shape {tuple(shown.shape)}>)"
        return f"Linear({shown.tolist()})"

    @property
    def matrix(self) -> Tensor:
        """The weights, shape ``(m, K)``, in float64."""
        return self._matrix

    def __call__(self, state: Tensor) -> Tensor:
        result = state @ self.weights(state).mT
        return result if self.event_dim else result.squeeze(-1)

    def weights(self, state: Tensor) -> Tensor:
        size = self._matrix.shape[-1]
        if state.shape[-1] != size:
            raise NotAMicroState(
                f"{self!r}: the micro state has {state.shape[-1]} elements, the "
                f"weights are for {size}. Give one weight for each element."
            )
        return self._matrix.to(state)
