# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A law on micro states that are listed, with their probabilities."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.laws.base import EnumerableLaw


class OneOf(constraints.Constraint):
    """The states in a list, shape ``(S, K)``."""

    event_dim = 1
    is_discrete = True

    def __init__(self, states: Tensor) -> None:
        self.states = states

    def check(self, value: Tensor) -> Tensor:
        return _places(self.states, value)[1]

    def __repr__(self) -> str:
        return f"OneOf({len(self.states)} states)"


class ListedLaw(EnumerableLaw):
    """Micro states and their probabilities.

    :param states: shape ``(S, K)``.
    :param weights: their probabilities, shape ``batch + (S,)``.
    :param dtype: of the draws.
    :param method: how the law is known, in words.
    """

    def __init__(
        self,
        states: Tensor,
        weights: Tensor,
        dtype: torch.dtype,
        method: str = "exact: a table",
    ) -> None:
        self.states, self.weights, self.dtype = states, weights, dtype
        self.method = method
        super().__init__(weights.shape[:-1], states.shape[1:])

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> OneOf:  # type: ignore[override]
        return OneOf(self.states)

    @cached_property
    def _states(self) -> Tensor | None:  # type: ignore[override]
        likely = self.weights.reshape(-1, self.weights.shape[-1]) > 0
        return self.states[likely[0]] if bool((likely == likely[0]).all()) else None

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        weights = self.weights.expand(self.batch_shape + self.weights.shape[-1:])
        drawn = torch.distributions.Categorical(weights).sample(Size(sample_shape))
        return self.states[drawn].to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        weights = self.weights.expand(shape + self.weights.shape[-1:])
        place, known = _places(self.states, value)
        chosen = weights.gather(-1, place.expand(shape).unsqueeze(-1)).squeeze(-1)
        return torch.where(known, chosen, 0.0).log().to(self.dtype)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        mean = (self.weights @ self.states).to(self.dtype)
        return mean.expand(self.batch_shape + self.event_shape)


def _places(states: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Which state each value is, and whether it is any."""
    same = torch.isclose(value.unsqueeze(-2).to(states), states, rtol=1e-6, atol=1e-9)
    same = same.all(-1)
    return same.byte().argmax(-1), same.any(-1)
