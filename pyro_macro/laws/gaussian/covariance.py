# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Covariance matrices that are never written out.

Each class offers the same few operations on vectors ``(..., K)`` and matrices
``(..., K, m)``, at a cost that is linear in ``K`` wherever its structure allows:
``K`` variances, ``K`` variances and a few shared noises, many small blocks, and
combinations of these. All are batched, and all are differentiable.
"""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.program.shapes import broadcast_shapes


class Covariance(ABC):
    """A positive definite matrix of size ``K``, possibly batched.

    :cvar shards: how its elements are split over ranks; ``None`` if they are all here.
    """

    shards: Any = None

    def across(self, contraction: Tensor) -> Tensor:
        """A sum over all elements, from that over those that are here."""
        return contraction

    def count(self, size: int) -> int:
        """The number of all elements, from that of those that are here."""
        return size

    @abstractmethod
    def matmul(self, matrix: Tensor) -> Tensor:
        """The product with ``matrix``, shape ``(..., K, m)``."""

    @abstractmethod
    def solve(self, matrix: Tensor) -> Tensor:
        """The product of the inverse with ``matrix``, shape ``(..., K, m)``."""

    @abstractmethod
    def logdet(self) -> Tensor:
        """The logarithm of the determinant, of the shape of the batch."""

    @property
    @abstractmethod
    def noise_size(self) -> int:
        """How many standard normal numbers make one draw."""

    @abstractmethod
    def colour(self, noise: Tensor) -> Tensor:
        """Standard normal noise ``(..., noise_size)`` as centred draws ``(..., K)``."""

    @abstractmethod
    def diagonal(self) -> Tensor:
        """The variances, shape ``(..., K)``."""

    def to(self, dtype: torch.dtype) -> Covariance:
        """The same with its tensors, and what was computed from them, in ``dtype``."""
        new = copy.copy(self)
        for name, part in vars(self).items():
            if isinstance(part, (Tensor, Covariance)):
                setattr(new, name, part.to(dtype))
        return new

    def sample(self, shape: Size, like: Tensor) -> Tensor:
        """Centred normal draws of shape ``shape + (K,)``, reparametrized.

        :param shape: a shape that the batch broadcasts to.
        :param like: a tensor with the dtype and device of the draws.
        """
        return self.colour(self.noise(shape, like))

    def noise(self, shape: Size, like: Tensor) -> Tensor:
        """Standard normal noise for draws of shape ``shape + (K,)``."""
        size = shape + Size([self.noise_size])
        return torch.randn(size, dtype=like.dtype, device=like.device)

    def quadratic(self, vector: Tensor) -> Tensor:
        """``x' C^-1 x`` for ``x`` of shape ``(..., K)``."""
        column = vector.unsqueeze(-1)
        return self.across((column * self.solve(column)).sum((-2, -1)))

    def dense(self, like: Tensor) -> Tensor:
        """The matrix itself: for small sizes, and for tests."""
        size = self.diagonal().shape[-1]
        return self.matmul(torch.eye(size, dtype=like.dtype, device=like.device))


class Diagonal(Covariance):
    """Independent elements.

    :param variance: shape ``(..., K)``.
    """

    def __init__(self, variance: Tensor) -> None:
        self.variance = variance

    def matmul(self, matrix: Tensor) -> Tensor:
        return self.variance.unsqueeze(-1) * matrix

    def solve(self, matrix: Tensor) -> Tensor:
        return matrix / self.variance.unsqueeze(-1)

    def logdet(self) -> Tensor:
        return self.variance.log().sum(-1)

    @property
    def noise_size(self) -> int:
        return self.variance.shape[-1]

    def colour(self, noise: Tensor) -> Tensor:
        return self.variance.sqrt() * noise

    def sample(self, shape: Size, like: Tensor) -> Tensor:
        size = shape + Size([self.noise_size])
        noise = torch.randn(size, dtype=like.dtype, device=like.device)
        scale = self.variance.sqrt()
        return noise.mul_(scale) if may_overwrite(scale) else scale * noise

    def diagonal(self) -> Tensor:
        return self.variance


class Dense(Covariance):
    """A matrix given by its Cholesky factor.

    :param cholesky: lower triangular, shape ``(..., K, K)``.
    """

    def __init__(self, cholesky: Tensor) -> None:
        self.cholesky = cholesky

    def matmul(self, matrix: Tensor) -> Tensor:
        return self.cholesky @ (self.cholesky.mT @ matrix)

    def solve(self, matrix: Tensor) -> Tensor:
        batch = broadcast_shapes(self.cholesky.shape[:-2], matrix.shape[:-2])
        factor = self.cholesky.expand(batch + self.cholesky.shape[-2:])
        return torch.cholesky_solve(matrix.expand(batch + matrix.shape[-2:]), factor)

    def logdet(self) -> Tensor:
        return 2 * self.cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1)

    @property
    def noise_size(self) -> int:
        return self.cholesky.shape[-1]

    def colour(self, noise: Tensor) -> Tensor:
        return matvec(self.cholesky, noise)

    def diagonal(self) -> Tensor:
        return self.cholesky.square().sum(-1)


class Shared(Covariance):
    """A covariance plus that of a few noises shared by all elements: ``C + F F'``.

    :param base: the covariance ``C``.
    :param factor: ``F``, shape ``(..., K, r)``.
    """

    sign = 1

    def __init__(self, base: Covariance, factor: Tensor) -> None:
        self.base, self.factor, self.shards = base, factor, base.shards
        self._solved = base.solve(factor)  # C^-1 F
        if self.shards is None:
            _ = self._cholesky

    @cached_property
    def _cholesky(self) -> Tensor:
        inner = self.sign * self.across(self.factor.mT @ self._solved)  # (..., r, r)
        identity = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
        return torch.linalg.cholesky(identity + inner)

    def across(self, contraction: Tensor) -> Tensor:
        return self.base.across(contraction)

    def count(self, size: int) -> int:
        return self.base.count(size)

    def noise(self, shape: Size, like: Tensor) -> Tensor:
        if self.shards is None:
            return super().noise(shape, like)
        # What is shared is the same on all ranks
        size = shape + self.factor.shape[-1:]
        shared = torch.randn(size, dtype=like.dtype, device=like.device)
        return torch.cat([self.base.noise(shape, like), shared], -1)

    def matmul(self, matrix: Tensor) -> Tensor:
        shared = self.factor @ self.across(self.factor.mT @ matrix)
        return self.base.matmul(matrix) + self.sign * shared

    def solve(self, matrix: Tensor) -> Tensor:
        # Woodbury's identity, with the capacitance matrix I +- F' C^-1 F
        small = Dense(self._cholesky).solve(self.across(self._solved.mT @ matrix))
        return self.base.solve(matrix) - self.sign * self._solved @ small

    def logdet(self) -> Tensor:
        return self.base.logdet() + Dense(self._cholesky).logdet()

    @property
    def noise_size(self) -> int:
        return self.base.noise_size + self.factor.shape[-1]

    def colour(self, noise: Tensor) -> Tensor:
        own, shared = noise.split([self.base.noise_size, self.factor.shape[-1]], -1)
        return self.base.colour(own) + matvec(self.factor, shared)

    def diagonal(self) -> Tensor:
        return self.base.diagonal() + self.sign * self.factor.square().sum(-1)


class Explained(Shared):
    """What remains of a covariance once correlated quantities are known: ``C - F F'``.

    :param base: the covariance ``C`` of the elements.
    :param factor: ``F``, the covariance of the elements with uncorrelated quantities
        of variance one that have become known; shape ``(..., K, r)``.
    """

    sign = -1

    def __init__(self, base: Covariance, factor: Tensor) -> None:
        super().__init__(base, factor)
        _ = self._cholesky  # here, and in this dtype, it may fail

    def colour(self, noise: Tensor) -> Tensor:
        # Draw the elements, then the known quantities given them, and take out what
        # the latter explain.
        own, rest = noise.split([self.base.noise_size, self.factor.shape[-1]], -1)
        draw = self.base.colour(own)
        known = self.across(matvec(self._solved.mT, draw))
        known = known + matvec(self._cholesky, rest)
        return draw - matvec(self.factor, known)


class Blocks(Covariance):
    """Independent blocks of equal size, interleaved as in a grid.

    The vector of ``K = outer * slots * inner`` elements, in row-major order, falls
    into ``slots`` independent blocks of the ``outer * inner`` elements that share a
    slot.

    :param within: the covariance of the blocks, batch ``(..., slots)``.
    """

    def __init__(self, within: Covariance, outer: int, slots: int, inner: int) -> None:
        self.within, self.grid = within, (outer, slots, inner)

    def _split(self, matrix: Tensor) -> Tensor:
        outer, slots, inner = self.grid
        batch, columns = matrix.shape[:-2], matrix.shape[-1:]
        grid = matrix.reshape(batch + (outer, slots, inner) + columns)
        grid = grid.transpose(-4, -3)  # (..., slots, outer, inner, m)
        return grid.reshape(batch + (slots, outer * inner) + columns)

    def _join(self, matrix: Tensor) -> Tensor:
        outer, slots, inner = self.grid
        batch, columns = matrix.shape[:-3], matrix.shape[-1:]
        grid = matrix.reshape(batch + (slots, outer, inner) + columns)
        grid = grid.transpose(-4, -3)
        return grid.reshape(batch + (outer * slots * inner,) + columns)

    def matmul(self, matrix: Tensor) -> Tensor:
        return self._join(self.within.matmul(self._split(matrix)))

    def solve(self, matrix: Tensor) -> Tensor:
        return self._join(self.within.solve(self._split(matrix)))

    def logdet(self) -> Tensor:
        return self.within.logdet().sum(-1)

    @property
    def noise_size(self) -> int:
        return self.grid[1] * self.within.noise_size

    def colour(self, noise: Tensor) -> Tensor:
        split = noise.unflatten(-1, (self.grid[1], self.within.noise_size))
        return self._join(self.within.colour(split).unsqueeze(-1)).squeeze(-1)

    def diagonal(self) -> Tensor:
        return self._join(self.within.diagonal().unsqueeze(-1)).squeeze(-1)


def log_normal(covariance: Covariance, centred: Tensor) -> Tensor:
    """The log density of a centred normal at ``centred``, shape ``(..., K)``."""
    size = covariance.count(centred.shape[-1])
    return -0.5 * (
        covariance.quadratic(centred)
        + covariance.logdet()
        + size * math.log(2 * math.pi)
    )


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """``matrix @ vector``, batched; one large product where the matrix is single."""
    if matrix.dim() == 2:
        return vector @ matrix.mT
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def may_overwrite(*operands: Tensor) -> bool:
    """Whether a tensor of our own may be changed in place, by these operands.

    Neither derivatives nor transforms of torch may need what it was. A fresh tensor of
    many draws costs more than all arithmetic on it.
    """
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in operands)
    return not needed and torch._C._functorch.maybe_current_level() is None


def add_product(
    start: Tensor, matrix: Tensor, vector: Tensor, own: bool = False
) -> Tensor:
    """``start + matrix @ vector``, batched; in one pass where the matrix is single.

    :param own: whether ``start`` is nobody else's, and may be overwritten.
    """
    own = own and may_overwrite(start, matrix, vector)
    if matrix.shape[-1] == 1 and start.shape[:-1] != vector.shape[:-1]:
        return torch.addcmul(start, vector, matrix.mT.squeeze(-2))
    if matrix.dim() > 2 or start.dim() < 2 or start.shape[:-1] != vector.shape[:-1]:
        product = matvec(matrix, vector)
        fits = own and start.shape == broadcast_shapes(start.shape, product.shape)
        return start.add_(product) if fits else start + product
    flat, columns = start.flatten(0, -2), vector.flatten(0, -2)
    add = flat.addmm_ if own and start.is_contiguous() else flat.addmm
    return add(columns, matrix.mT).reshape(start.shape)
