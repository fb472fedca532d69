# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from pyro_macro.aggregation.base import Aggregation


@dataclass(frozen=True)
class Custom(Aggregation):
    """Any function of the micro state.

    :param fn: maps shape ``batch + (K,)`` to ``batch``, or to ``batch + (m,)`` with
        ``event_dim=1``. It must not be injective (Definition 2).
    :param event_dim: 1 if the macro value is a vector.

    >>> import torch
    >>> Custom(lambda x: x.square().sum(-1))(torch.tensor([3.0, 4.0]))
    tensor(25.)
    """

    fn: Callable[[Tensor], Tensor]
    event_dim: int = 0

    def __call__(self, state: Tensor) -> Tensor:
        return self.fn(state)
