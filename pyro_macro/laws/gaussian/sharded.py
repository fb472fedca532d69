# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Gaussian micro states that lie on several ranks.

Each rank has its own elements, and what they have from noises outside of the sharded
plate, which are the same on all ranks. All that a law needs of the others are sums over
elements: rows of weights times vectors, and quadratic forms.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.laws.base import MicroFibre
from pyro_macro.laws.gaussian.covariance import (
    Covariance,
    Dense,
    Shared,
    add_product,
)
from pyro_macro.laws.gaussian.fibre import FibreDistribution, NaturalNormal
from pyro_macro.laws.gaussian.structure import Structure
from pyro_macro.laws.upstream import Evidence
from pyro_macro.program.inner import shards_of
from pyro_macro.sharding.across import NO_COORDINATES


def refuse_apart(evidence: Sequence[Evidence], what: str) -> None:
    """An error if what is known of a micro state lies on several ranks itself."""
    for known in evidence:
        for frame in known.frames:
            if shards_of(frame) is not None:
                raise UnsupportedLaw(
                    f"{what}: what is known of {known.name!r} in plate {frame.name!r}, "
                    "which is split over ranks, tells of sites that the micro state "
                    "depends on. Hold these sites themselves, with given=[...]."
                )


class Sharded(Covariance):
    """Elements on several ranks, independent between slots of the sharded plate.

    Vectors are those of this rank's elements.

    :param here: the covariance of these; its noise comes slot by slot.
    """

    def __init__(self, here: Covariance, shards: Any) -> None:
        self.here, self.shards = here, shards

    def across(self, contraction: Tensor) -> Tensor:
        return self.shards.sum(contraction)

    def count(self, size: int) -> int:
        return size // self.shards.here * self.shards.size

    def matmul(self, matrix: Tensor) -> Tensor:
        return self.here.matmul(matrix)

    def solve(self, matrix: Tensor) -> Tensor:
        return self.here.solve(matrix)

    @cached_property
    def _logdet(self) -> Tensor:
        return self.across(self.here.logdet())

    def logdet(self) -> Tensor:
        return self._logdet

    @property
    def noise_size(self) -> int:
        return self.here.noise_size

    def noise(self, shape: Size, like: Tensor) -> Tensor:
        each = self.noise_size // self.shards.here
        size = shape + Size([self.shards.here, each])
        return self.shards.normal(size, len(shape), like).flatten(-2)

    def colour(self, noise: Tensor) -> Tensor:
        return self.here.colour(noise)

    def diagonal(self) -> Tensor:
        return self.here.diagonal()


class ShardedStructure(Structure):
    """The structure of a covariance whose elements lie on several ranks.

    Noises inside of the sharded plate have to be local to its slots; those outside
    are shared by all ranks.
    """

    coarsest = 1

    def covariance(self, what: str) -> Covariance:
        shards = self.layout.shards
        if not self.grain:
            raise UnsupportedLaw(
                f"{what}: its sites {self.layout.names} have different shapes within "
                f"{shards!r}, which is split over ranks. Expected the same."
            )
        groups, shared = self._groups()
        for noise in shared:
            if any(shards_of(frame) is not None for frame in noise.frames):
                raise UnsupportedLaw(
                    f"{what}: site {noise.key[0]!r} in {shards!r}, which is split over "
                    "ranks, acts on other slots than its own, or on all places of a "
                    "plate inside. Expected slots that depend on one another through "
                    "sites outside of the plate alone."
                )
        covariance: Covariance = Sharded(self._of(groups, what), shards)
        return Shared(covariance, self._columns(shared)) if shared else covariance


class ShardedNatural(NaturalNormal):
    """``P(X | rows @ X = value)`` of elements that lie on several ranks.

    A draw takes one message, of ``rows @ x`` and, for the first draw, of what makes up
    ``rows C rows'``. The log density is that of the whole micro state, the same number
    on all ranks, with the last element that counts solved for.

    :param loc: of the elements of this rank, shape ``batch + (K,)``, in float64.
    :param covariance: a :class:`Sharded` one, and what its elements share.
    :param rows: the weights of the elements of this rank, shape ``(m, K)``; no element
        counts in two of them.
    :param value: shape ``batch + (m,)``.
    :param pivots: not used: one rank alone cannot choose them.
    """

    def __init__(
        self,
        loc: Tensor,
        covariance: Covariance,
        rows: Tensor,
        value: Tensor,
        pivots: Tensor | None = None,
    ) -> None:
        none = torch.empty(0, dtype=torch.long, device=rows.device)
        FibreDistribution.__init__(self, loc, covariance, rows, value, none)
        self._draws: list[weakref.ref[Tensor]] = []  # those of its copies too
        self._solved: tuple[Dense, Tensor] | None = None

    def has_drawn(self, draw: Tensor) -> bool:
        """Whether this is a draw of its own, which is on the fibre."""
        return any(known() is draw for known in self._draws)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        draw = super().rsample(sample_shape)
        self._draws[:] = [weakref.ref(draw)]
        return draw

    @property
    def total(self) -> Dense:  # type: ignore[override]
        """The covariance of ``rows @ X``."""
        return self._exact._with([])[0]

    @property
    def gain(self) -> Tensor:  # type: ignore[override]
        """The natural direction of the elements of this rank."""
        return self._exact._with([])[1]

    @property
    def _exact(self) -> ShardedNatural:
        return self if self._finer is None else self._finer  # type: ignore[return-value]

    def _with(self, contractions: list[Tensor]) -> tuple[Dense, Tensor, list[Tensor]]:
        """The total and the gain, and sums over the ranks in the same message.

        ``C`` is that of the elements of each rank, plus or minus ``F F'`` for what they
        share: all that is needed of other ranks is ``rows C rows'`` and ``rows F``.
        """
        shards = self.covariance.shards
        if self._solved is not None:
            sums = shards.sums(contractions) if contractions else []
            return (*self._solved, sums)
        factors, here = [], self.covariance
        while isinstance(here, Shared):
            factors.append((here.sign, here.factor))
            here = here.base
        crossed = here.matmul(self.rows.mT)
        parts = [self.rows @ crossed, *(self.rows @ factor for _, factor in factors)]
        total, *rest = shards.sums([*parts, *contractions])
        sums = rest[len(factors) :]
        for (sign, factor), shared in zip(factors, rest, strict=False):
            total = total + sign * shared @ shared.mT
            crossed = crossed + sign * factor @ shared.mT
        dense = Dense(torch.linalg.cholesky(total))
        self._solved = dense, dense.solve(crossed.mT).mT
        return (*self._solved, sums)

    def _onto(self, x: Tensor, own: bool = False) -> Tensor:
        # In float64: what is lost here is missed by the total
        exact = self._exact
        _, gain, (total,) = exact._with([x.double() @ exact.rows.mT])
        miss = (exact.value - total).to(x.dtype)
        return add_product(x, gain.to(x.dtype), miss, own)

    def _miss(self, x: Tensor) -> Tensor:
        exact = self._exact
        total = exact.covariance.across(x.double() @ exact.rows.mT)
        return (exact.value - total).to(x.dtype)

    def _log_solved(self) -> Tensor:
        """Each row's last weight that is not zero, on any rank."""
        shards = self.covariance.shards
        order = torch.arange(1, self.rows.shape[-1] + 1, device=self.rows.device)
        last = ((self.rows != 0) * order).argmax(-1, keepdim=True)
        table = self.rows.new_zeros(shards.ranks.count, len(self.rows))
        table[shards.ranks.rank] = self.rows.gather(-1, last).squeeze(-1)
        table = shards.sum(table)
        order = torch.arange(1, len(table) + 1, device=self.rows.device)
        last = ((table != 0) * order.unsqueeze(-1)).argmax(0, keepdim=True)
        return table.gather(0, last).abs().log().sum()

    @property
    def support(self) -> Any:  # type: ignore[override]
        return MicroFibre(
            inside=torch.isfinite,
            total=lambda x: self.value - self._miss(x),
            value=self.value,
            coordinates=f"{NO_COORDINATES}.",
            event_dim=1,
        )
