# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Normal laws on a fibre under which an effect is distributed as wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_macro.laws.gaussian.covariance import Dense, log_normal, matvec
from pyro_macro.laws.gaussian.fibre import FibreDistribution, NaturalNormal


class LeverNormal(NaturalNormal):
    """Some elements (levers) make up the macro value, the others follow their own law.

    ``P(X_rest) P(X_levers | X_rest, rows @ X = value)``: with one lever for each macro
    value that is :class:`ResidualNormal`, with all of them :class:`NaturalNormal`.

    :param levers: their indices, shape ``(l,)``.
    """

    def __init__(self, *args: Any, levers: Tensor, **kwargs: Any) -> None:
        FibreDistribution.__init__(self, *args, **kwargs)
        columns = torch.zeros(self.rows.shape[1], len(levers)).to(self.rows)
        columns[levers, torch.arange(len(levers), device=levers.device)] = 1.0
        self._precision = self.covariance.solve(columns)  # (..., K, l)
        within = torch.linalg.inv(self._precision[..., levers, :])  # Cov(levers | rest)
        self._moved = self.rows[:, levers] @ within  # (..., m, l)
        self.total = Dense(torch.linalg.cholesky(self._moved @ self.rows[:, levers].mT))
        self.gain = columns @ self.total.solve(self._moved).mT  # (..., K, m)

    def _log_density(self, value: Tensor) -> Tensor:
        centred = value - self.loc
        inside = log_normal(self.covariance, centred)
        away = matvec(self._moved, matvec(self._precision.mT, centred))
        solved = torch.linalg.det(self.rows[:, self.pivots]).abs().log()
        return inside - log_normal(self.total, away) - solved

    @property
    def log_total(self) -> Tensor:
        raise NotImplementedError

    def _variance(self) -> Tensor:
        crossed = self.covariance.matmul(self.rows.mT)  # (..., K, m)
        explained = (self.gain @ (self.rows @ crossed) - 2 * crossed) * self.gain
        return self.covariance.diagonal() + explained.sum(-1)

    def _covariance(self) -> Tensor:
        size = self.rows.shape[1]
        identity = torch.eye(size, dtype=self.loc.dtype, device=self.loc.device)
        linear = identity - self.gain @ self.rows
        return linear @ self.covariance.dense(self.loc) @ linear.mT


@dataclass(frozen=True, eq=False)
class Stretch:
    """The least move of a normal law after which ``alpha.X`` has given moments.

    ``X = X0 + direction ((factor - 1) alpha.(X0 - E X0) + shift) / |direction|^2``:
    among all laws that ``direction`` and its complement allow, this is the closest to
    that of ``X0`` in Wasserstein-2 distance, for a move has to change ``alpha.X``, and
    ``direction`` is the shortest way to do so.

    :ivar alpha: shape ``(K,)``.
    :ivar direction: the projection of ``alpha`` on what may be moved without a change
        of the macro value, shape ``(K,)``.
    :ivar factor: of the standard deviation of ``alpha.X``, shape ``(...,)``; not zero.
    :ivar shift: of the mean of ``alpha.X``, shape ``(...,)``.
    """

    alpha: Tensor
    direction: Tensor
    factor: Tensor
    shift: Tensor

    @property
    def step(self) -> Tensor:
        """What one unit of ``alpha.X`` takes, shape ``(K,)``."""
        return self.direction / self.direction.square().sum()


class StretchedNormal(FibreDistribution):
    """A normal law on a fibre after a :class:`Stretch`.

    :param base: the law before.
    """

    def __init__(self, base: NaturalNormal, stretch: Stretch) -> None:
        super().__init__(base.loc, base.covariance, base.rows, base.value, base.pivots)
        self.base, self.centre = base, base._onto(base.loc)
        self.alpha, self.step = stretch.alpha, stretch.step
        self.factor, self.shift = stretch.factor, stretch.shift
        self._batch_shape = torch.broadcast_shapes(
            self._batch_shape, stretch.factor.shape, stretch.shift.shape
        )

    @property
    def moved(self) -> Tensor:
        """The Wasserstein-2 distance from the law before."""
        exact: Any = self._exact
        spread = (exact.factor - 1).square() * exact._moments()[1]
        return (spread + exact.shift.square()).sqrt() * exact.step.norm()

    def to(self, dtype: torch.dtype) -> StretchedNormal:
        new: Any = super().to(dtype)
        if new is not self:
            new.base = self.base.to(dtype)
        return new

    def _onto(self, x: Tensor, own: bool = False) -> Tensor:
        x = self.base._onto(x, own)
        along = (x - self.centre) @ self.alpha
        move = (self.factor - 1) * along + self.shift
        return x + move.unsqueeze(-1) * self.step

    def _log_density(self, value: Tensor) -> Tensor:
        along = (value - self.centre) @ self.alpha  # factor * that before, and shift
        before = (along - self.shift) / self.factor
        value = value - (along - before).unsqueeze(-1) * self.step
        return self.base._log_density(value) - self.factor.log()

    def _moments(self) -> tuple[Tensor, Tensor]:
        """``Cov(X0, alpha.X0)``, shape ``(..., K)``, and ``Var(alpha.X0)``."""
        crossed = times(self.base, self.alpha)
        return crossed, crossed @ self.alpha

    def _variance(self) -> Tensor:
        crossed, variance = self._moments()
        more = (self.factor - 1).unsqueeze(-1) * self.step
        both = more * (2 * crossed + more * variance.unsqueeze(-1))
        return self.base._variance() + both

    def _covariance(self) -> Tensor:
        crossed, variance = self._moments()
        more = (self.factor - 1).unsqueeze(-1) * self.step
        mixed = more.unsqueeze(-1) * crossed.unsqueeze(-2)
        square = more.unsqueeze(-1) * more.unsqueeze(-2) * variance[..., None, None]
        return self.base._covariance() + mixed + mixed.mT + square


def times(law: NaturalNormal, vector: Tensor) -> Tensor:
    """The covariance of a law on a fibre, times a vector, shape ``(..., K)``."""
    column = vector.unsqueeze(-1)
    inner = column - law.rows.mT @ (law.gain.mT @ column)
    moved = law.covariance.matmul(inner)
    return (moved - law.gain @ (law.rows @ moved)).squeeze(-1)


def lever_direction(rows: Tensor, alpha: Tensor, levers: Tensor | None) -> Tensor:
    """The projection of ``alpha`` on moves of the levers that keep the macro value.

    :param rows: shape ``(m, K)``.
    :param levers: shape ``(l,)``; all elements by default.
    :returns: shape ``(K,)``; zero where there is no such move.
    """
    index = levers
    if index is None:
        index = torch.arange(len(alpha), device=alpha.device)
    some, within = alpha[index], rows[:, index]
    solved = torch.linalg.pinv(within @ within.mT, hermitian=True) @ (within @ some)
    found = some - within.mT @ solved
    rounding = 1e-10 * some.abs().max()
    found = torch.where(found.abs().max() > rounding, found, torch.zeros_like(found))
    return torch.zeros_like(alpha).index_copy(0, index, found)
