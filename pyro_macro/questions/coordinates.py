# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Aggregates as the first of new coordinates (Appendix C of the paper).

With ``Xb = 1.X`` and ``Yb = alpha.X``, coordinates ``H X`` whose first is ``Xb`` write
``Yb = beta Xb + U_beta``, and ``do(xb)`` moves ``Xb`` and leaves the others. What
``beta`` is, and whether ``U_beta`` looks like a confounder, is a matter of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import Infeasible, OffFibre, PyroMacroError
from pyro_macro.laws.base import tolerance

Numbers = Tensor | Sequence[Any] | float


def direction_of(
    alpha: Numbers, coefficient: Numbers, weights: Numbers | None = None
) -> Tensor:
    """The shortest direction of unit total with a given structural coefficient.

    A shift of the micro state by ``delta * direction`` moves ``Xb`` by ``delta`` and
    ``Yb = alpha.X`` by ``coefficient * delta`` (Lemma 14, Appendix C.1)::

        direction = 1/N + (c - mean(alpha)) / (v.alpha) v,   v = alpha - mean(alpha) 1

    :param alpha: the prices, shape ``(..., N)``.
    :param coefficient: ``alpha.direction``, any shape that broadcasts with ``(...)``.
    :param weights: of the aggregate ``Xb = weights.X``, shape ``(N,)``; ones for the
        sum. ``1`` in the formula is ``weights`` then.
    :returns: shape ``(..., N)``, in float64; fit for ``Shift(delta, along=...)``.
    :raises Infeasible: if ``alpha`` is a multiple of the weights, whose coefficient is
        that multiple in every direction, and another is asked for.

    >>> direction_of([1.0, 3.0], 1.4)
    tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    alpha = _numbers("direction_of", "alpha", alpha)
    weights = _weights("direction_of", weights, alpha)
    wanted = _numbers("direction_of", "coefficient", coefficient, 0).unsqueeze(-1)
    start = weights / weights.square().sum()
    multiple = (alpha * start).sum(-1, keepdim=True)
    v = alpha - multiple * weights
    length = v.norm(dim=-1, keepdim=True)
    fixed = length <= tolerance(v) * alpha.norm(dim=-1, keepdim=True)
    missing = wanted - multiple
    bad = fixed & (missing.abs() > tolerance(v) * (wanted.abs() + multiple.abs()))
    if bool(bad.any()):
        one, other = torch.broadcast_tensors(wanted, multiple)
        raise Infeasible(
            f"direction_of: the coefficient is {one[bad][0].item():g}, and alpha is "
            f"{other[bad][0].item():g} times the weights of the aggregate, so that it "
            "has that coefficient in every direction (Lemma 14). Ask for that one, or "
            "give an alpha whose elements differ."
        )
    along = v / torch.where(fixed, 1.0, length.square())
    return start + torch.where(fixed, 0.0, missing) * along


def change_of_coordinates(direction: Numbers, weights: Numbers | None = None) -> Tensor:
    """Coordinates in which the aggregate moves along a direction (Lemma 14).

    The invertible matrix ``H`` with ones in its first row and ``direction`` in the
    first column of its inverse; its other rows are an orthonormal basis of the
    direction's complement. To add one to the first coordinate of ``H X`` and leave the
    others is to add ``direction`` to ``X``.

    :param direction: shape ``(..., N)``, with ``1.direction = 1``.
    :param weights: of the aggregate, shape ``(N,)``: the first row, instead of ones.
    :returns: ``H``, shape ``(..., N, N)``, in float64.
    :raises OffFibre: if the total of the direction is not one.

    >>> H = change_of_coordinates([0.8, 0.2])
    >>> H[0]
    tensor([1., 1.], dtype=torch.float64)
    >>> torch.linalg.inv(H)[:, 0]
    tensor([0.8000, 0.2000], dtype=torch.float64)
    """
    who = "change_of_coordinates"
    found = _numbers(who, "direction", direction)
    weights = _weights(who, weights, found)
    total, size = (found * weights).sum(-1), (found * weights).abs().sum(-1)
    off = (total - 1).abs() > 1e-6 * size  # the rounding of float32
    if bool(off.any()):
        raise OffFibre(
            f"{who}: the direction has total {total[off][0].item():.9g}. Expected 1, "
            "for a shift along it by one has to add one to the aggregate: divide by it."
        )
    # The reflection that takes the direction to the first axis: its other rows are
    # orthonormal, and orthogonal to the direction
    mirror = found / found.norm(dim=-1, keepdim=True)
    first = mirror[..., :1]
    first = first + torch.where(first < 0, -1.0, 1.0)  # no cancellation
    mirror = torch.cat([first, mirror[..., 1:]], -1)
    scaled = mirror * (2 / mirror.square().sum(-1, keepdim=True))
    eye = torch.eye(found.shape[-1], dtype=found.dtype, device=found.device)
    rows = eye - scaled.unsqueeze(-1) * mirror.unsqueeze(-2)
    top = weights.expand_as(found).unsqueeze(-2)
    return torch.cat([top, rows[..., 1:, :]], -2)


def coordinate_noise(
    alpha: Numbers, coefficient: Numbers, weights: Numbers | None = None
) -> Tensor:
    """The row ``u`` with ``U_beta = Yb - beta Xb = u.X`` (Appendix C).

    It is the same in all coordinates with that coefficient.

    :param alpha: the prices, shape ``(..., N)``.
    :param coefficient: ``beta``, any shape that broadcasts with ``(...)``.
    :param weights: of the aggregate, shape ``(N,)``; ones for the sum.
    :returns: shape ``(..., N)``, in float64.

    >>> coordinate_noise([1.0, 3.0], 1.4)
    tensor([-0.4000,  1.6000], dtype=torch.float64)
    """
    alpha = _numbers("coordinate_noise", "alpha", alpha)
    weights = _weights("coordinate_noise", weights, alpha)
    beta = _numbers("coordinate_noise", "coefficient", coefficient, 0)
    return alpha - beta.unsqueeze(-1) * weights


def noise_covariance(
    alpha: Numbers,
    covariance: Numbers,
    coefficient: Numbers,
    weights: Numbers | None = None,
) -> Tensor:
    """``Cov(Xb, U_beta) = Cov(Xb, Yb) - beta Var Xb``: how confounded ``Xb`` looks.

    Zero only where ``beta`` is the slope of the regression of ``Yb`` on ``Xb``, and
    without bound as ``beta`` grows (Appendix C).

    :param alpha: the prices, shape ``(..., N)``.
    :param covariance: of the micro state, shape ``(N, N)``.
    :param coefficient: ``beta``, any shape that broadcasts with ``(...)``.
    :param weights: of the aggregate, shape ``(N,)``; ones for the sum.
    :returns: shape ``(...)``, in float64.

    >>> noise_covariance([1.0, 3.0], [[4.0, 0.0], [0.0, 1.0]], [0.0, 1.4, 2.0])
    tensor([ 7.,  0., -3.], dtype=torch.float64)
    """
    who = "noise_covariance"
    alpha = _numbers(who, "alpha", alpha)
    weights = _weights(who, weights, alpha)
    beta = _numbers(who, "coefficient", coefficient, 0)
    matrix, size = _numbers(who, "covariance", covariance), alpha.shape[-1]
    if matrix.shape != (size, size):
        raise PyroMacroError(
            f"{who}: covariance has shape {tuple(matrix.shape)}. Expected ({size}, "
            f"{size}), for alpha has {size} elements."
        )
    crossed = matrix @ weights  # Cov(X, Xb)
    return alpha @ crossed - beta * (weights @ crossed)


def _numbers(who: str, which: str, given: Any, event_dim: int = 1) -> Tensor:
    """Finite numbers in float64, with an event dimension if asked for."""
    try:
        numbers = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PyroMacroError(
            f"{who}: {which} is {given!r}. Expected numbers."
        ) from error
    if numbers.dim() < event_dim or (event_dim and numbers.shape[-1] == 0):
        raise PyroMacroError(
            f"{who}: {which} has shape {tuple(numbers.shape)}. Expected a number for "
            "each element of the micro state in the rightmost dimension."
        )
    if not bool(numbers.isfinite().all()):
        raise PyroMacroError(f"{who}: {which} is {given}. Expected finite numbers.")
    return numbers


def _weights(who: str, given: Numbers | None, like: Tensor) -> Tensor:
    """The weights of the aggregate, shape ``(N,)``."""
    size = like.shape[-1]
    if given is None:
        return like.new_ones(size)
    weights = _numbers(who, "weights", given)
    if weights.shape != (size,) or not bool(weights.any()):
        raise PyroMacroError(
            f"{who}: weights are {given}. Expected {size} numbers, one for each "
            "element of the micro state, that are not all zero."
        )
    return weights
