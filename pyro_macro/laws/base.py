# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What every law of a micro state offers, and the fibres that laws live on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from pyro.ops.provenance import extract_provenance, track_provenance
from torch import Size, Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

from pyro_macro.errors import UnsupportedLaw


def tolerance(tensor: Tensor) -> float:
    """How far a sum may miss its value, relative to the size of its terms."""
    return 1e3 * torch.finfo(tensor.dtype).eps


class MicroLaw(TorchDistribution):
    """A distribution of a stacked micro state, event shape ``(K,)``.

    A new law owes ``sample`` (or ``rsample``), ``log_prob``, ``support`` and
    :attr:`method`. Expanding it copies nothing.

    :ivar method: how the law is known, in words; begins with ``exact`` if it is.
    """

    arg_constraints: dict[str, Any] = {}
    method: str = "exact"

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._batch_shape = Size(batch_shape)
        return new

    def caused_by(self, causes: frozenset[Any]) -> Any:
        """The same, with a density that Pyro sees to come from elsewhere."""
        kind = type(self)

        class Caused(kind):  # type: ignore[misc, valid-type]
            def log_prob(self, value: Tensor) -> Tensor:
                plain, own = extract_provenance(value)
                return track_provenance(super().log_prob(plain), causes | own)

        Caused.__name__ = kind.__name__
        new = self.expand(self.batch_shape)
        new.__class__ = Caused
        return new

    @property
    def cost(self) -> str:
        """What a run costs, in words."""
        return f"{self.event_shape[0]} random numbers a draw"

    @property
    def log_total(self) -> Tensor:
        """The log density of the macro value itself, shape ``batch``."""
        raise NotImplementedError

    def _rows(self, base: Size, shape: Size, like: Tensor) -> Tensor:
        """For each of the draws in ``shape``: which element of ``base`` it is of.

        :param like: a tensor on their device.
        """
        index = torch.arange(base.numel(), device=like.device)
        return index.reshape(base).expand(shape).flatten()


ENUMERABLE = 10_000  # states, at most


class EnumerableLaw(MicroLaw):
    """A law on finitely many states, which are listed where they are few.

    A new one owes :attr:`_states`.

    :ivar dtype: of the draws.
    """

    dtype: torch.dtype

    @property
    def _states(self) -> Tensor | None:
        """All states, shape ``(n, K)``; ``None`` if there are many, or they differ."""
        raise NotImplementedError

    @property
    def has_enumerate_support(self) -> bool:  # type: ignore[override]
        return self.event_shape[0] <= 64 and self._states is not None

    def enumerate_support(self, expand: bool = True) -> Tensor:
        states = self._states
        if states is None:
            raise NotImplementedError(
                f"{self.method}: the fibre differs along the batch, or has more than "
                f"{ENUMERABLE} states."
            )
        shape = (-1,) + (1,) * len(self.batch_shape) + self.event_shape
        states = states.to(self.dtype).reshape(shape)
        if expand:
            states = states.expand(states.shape[:1] + self.batch_shape + (-1,))
        return states


class MicroFibre(constraints.Constraint):
    """The micro states in a support that have a given macro value.

    :param inside: from states, shape ``(..., K)``, to whether each element is in its
        support.
    :param total: from states to macro values.
    :param value: the macro value.
    :param event_dim: of the macro value.
    :param coordinates: a transform from free coordinates to the fibre; or why there
        is none, in words.
    """

    event_dim = 1

    def __init__(
        self,
        inside: Callable[[Tensor], Tensor],
        total: Callable[[Tensor], Tensor],
        value: Tensor,
        coordinates: Transform | str,
        is_discrete: bool = False,
        event_dim: int = 0,
    ) -> None:
        self.inside, self.total, self.value = inside, total, value
        self.coordinates, self._macro_dim = coordinates, event_dim
        self._is_discrete = is_discrete

    @property
    def is_discrete(self) -> bool:  # type: ignore[override]
        return self._is_discrete

    def check(self, value: Tensor) -> Tensor:
        miss = (self.total(value) - self.value).abs()
        size = value.abs().amax(-1) * value.shape[-1]
        size = size[(...,) + (None,) * self._macro_dim]
        met = miss <= tolerance(value) * (size + self.value.abs())
        met = met.flatten(-self._macro_dim).all(-1) if self._macro_dim else met
        return met & self.inside(value).all(-1)

    def __repr__(self) -> str:
        return "MicroFibre()"


@biject_to.register(MicroFibre)
@transform_to.register(MicroFibre)
def _coordinates(constraint: MicroFibre) -> Transform:
    if isinstance(constraint.coordinates, str):
        raise UnsupportedLaw(constraint.coordinates)
    return constraint.coordinates
