# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Aggregation(ABC):
    """An aggregation map ``pi``: from a micro state to a macro value.

    Definition 2 of *Meaningful Causal Aggregation and Paradoxical Confounding*: a map
    that is surjective, but not injective. A new map is one class in one file; it owes
    :meth:`__call__`, and :meth:`weights` if it is linear. Instances are immutable and
    compare by what they compute.

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
