# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Means and covariances, and how far normal laws are apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """Mean and covariance of a vector, shapes ``(..., m)`` and ``(..., m, m)``."""

    mean: Tensor
    covariance: Tensor

    @property
    def variance(self) -> Tensor:
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp(min=0)

    def given(self, known: Sequence[int] | slice, value: Tensor) -> Moments:
        """Of the other elements, once some are known to have a value.

        :param value: shape ``(..., k)``.
        """
        index = torch.arange(self.mean.shape[-1], device=self.mean.device)[known]
        left = self.mean.new_ones(self.mean.shape[-1], dtype=torch.bool)
        left[index] = False
        rest = left.nonzero().squeeze(-1)
        within = self.covariance[..., index[:, None], index]
        crossed = self.covariance[..., rest[:, None], index]
        solved = crossed @ inverse(within)
        surprise = (value - self.mean[..., index]).unsqueeze(-1)
        mean = self.mean[..., rest] + (solved @ surprise).squeeze(-1)
        covariance = self.covariance[..., rest[:, None], rest] - solved @ crossed.mT
        return Moments(mean, covariance.expand(mean.shape + mean.shape[-1:]))


def inverse(matrix: Tensor) -> Tensor:
    """Of a covariance; where it has no inverse, the one on the directions it has."""
    factor, bad = torch.linalg.cholesky_ex(matrix)
    thin = factor.diagonal(dim1=-2, dim2=-1)
    if not bool(bad.any()) and bool((thin > 1e-6 * thin.amax()).all()):
        return torch.cholesky_inverse(factor)
    return torch.linalg.pinv(matrix, hermitian=True)


def two_wasserstein(one: Moments, other: Moments) -> Tensor:
    """The Wasserstein-2 distance of normal laws, shape ``(...,)``.

    The means' distance and the Bures distance of the covariances, squared and added.
    """
    means = (one.mean - other.mean).square().sum(-1)
    if one.mean.shape[-1] == 1:
        spreads = one.variance.sqrt() - other.variance.sqrt()
        return (means + spreads.square().sum(-1)).sqrt()
    half = root(one.covariance)
    crossed = root(half @ other.covariance @ half)
    spread = _trace(one.covariance) + _trace(other.covariance) - 2 * _trace(crossed)
    return (means + spread.clamp(min=0)).sqrt()


def kullback_leibler(one: Moments, other: Moments) -> Tensor:
    """``KL(one || other)`` of normal laws, in nats, shape ``(...,)``.

    Infinite where one of them has a direction without variance, unless they are equal.
    """
    size = one.mean.shape[-1]
    factor, bad = torch.linalg.cholesky_ex(other.covariance)
    mine, worse = torch.linalg.cholesky_ex(one.covariance)
    gap = (one.mean - other.mean).unsqueeze(-1)
    bad = (bad > 0) | (worse > 0)
    eye = torch.eye(size).to(factor).expand_as(factor)
    factor, mine = (torch.where(bad[..., None, None], eye, f) for f in (factor, mine))
    spread = torch.linalg.solve_triangular(factor, mine, upper=False)
    away = torch.linalg.solve_triangular(factor, gap, upper=False)
    logs = [f.diagonal(dim1=-2, dim2=-1).log().sum(-1) for f in (factor, mine)]
    squares = spread.square().sum((-2, -1)) + away.square().sum((-2, -1))
    result = 0.5 * (squares - size) + logs[0] - logs[1]
    same = two_wasserstein(one, other) == 0
    return torch.where(bad, torch.where(same, 0.0, math.inf), result.clamp(min=0))


def root(matrix: Tensor) -> Tensor:
    """The symmetric square root of a covariance."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def _trace(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1).sum(-1)
