# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What the derivatives of a noise view say: covariances, couplings, agreement."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_macro.program.layout import Layout
from pyro_macro.program.noise import Key, Noise, NoiseView


def covariances_by_rows(view: NoiseView, rows: NoiseView) -> tuple[Tensor, Tensor]:
    """The covariance of the state with what is known, and of the latter.

    Few rows are known: one reverse pass a row gives their coefficients, and forward
    derivatives along these are the covariances.

    :returns: shapes ``(..., K, r)`` and ``(..., r, r)``.
    """
    r = rows.output.shape[-1]
    cotangents = torch.eye(r, dtype=rows.output.dtype, device=rows.output.device)
    cotangents = cotangents.reshape((r,) + (1,) * (rows.output.dim() - 1) + (r,))
    coefficients = rows.backward(cotangents.expand((r,) + rows.output.shape))
    crossed, total = view.forward(coefficients), rows.forward(coefficients)
    return crossed.movedim(0, -1).double(), total.movedim(0, -1).double()


def covariances_by_columns(
    view: NoiseView, rows: NoiseView, layout: Layout
) -> tuple[Tensor, Tensor]:
    """The same where the coefficients differ along dimensions that are no plates.

    Such dimensions come from values that are held, as posterior samples are; the noise
    does not have them, so that a reverse pass would add them up.
    """
    noises = list({n.key: n for n in [*view.noises, *rows.noises]}.values())
    directions = all_directions(noises, layout)
    state = view.forward(directions).movedim(0, -1).double()
    known = rows.forward(directions).movedim(0, -1).double()
    return state @ known.mT, known @ known.mT


def all_directions(noises: Sequence[Noise], layout: Layout) -> dict[Key, Tensor]:
    """Unit directions for all elements of some groups, plates that stay apart."""
    parts = []
    for noise in noises:
        batch = batch_axes(noise, layout)
        rest = [a for a in range(noise.leaf.dim()) if a not in batch]
        parts.append(unit_directions(noise.leaf, rest))
    count = sum(len(part) for part in parts)
    directions: dict[Key, Tensor] = {}
    start = 0
    for noise, part in zip(noises, parts, strict=True):
        whole = part.new_zeros((count,) + noise.leaf.shape)
        whole[start : start + len(part)] = part
        directions[noise.key] = whole
        start += len(part)
    return directions


def batch_axes(noise: Noise, layout: Layout) -> list[int]:
    """The axes of a group that are plates which stay, in ascending order."""
    own = {f.name for f in noise.frames}
    plates = noise.leaf.dim() - noise.event_dim
    return sorted(
        plates + f.dim for f in layout.frames if f.vectorized and f.name in own
    )


def unit_directions(leaf: Tensor, rest: list[int]) -> Tensor:
    """One direction for each place of the ``rest`` axes, the same along the others."""
    shape = [leaf.shape[a] if a in rest else 1 for a in range(leaf.dim())]
    count = math.prod(shape)
    identity = torch.eye(count, dtype=leaf.dtype, device=leaf.device)
    return identity.reshape([count, *shape]).expand((count,) + leaf.shape)


def agree(
    start: Tensor, moves: Sequence[Tensor], found: Tensor, precision: float
) -> bool:
    """Whether ``start + sum(moves) == found`` but for rounding; not so if it is NaN.

    What is compared is the change: it may be small beside the values.
    """
    start, found = start.detach(), found.detach()
    moves = torch.broadcast_tensors(*(move.detach() for move in moves))
    size = sum((move.abs() for move in moves), start=torch.zeros_like(moves[0]))
    limit = precision**0.5 * size + 64 * precision * (start.abs() + found.abs())
    return bool(((found - start - sum(moves)).abs() <= limit).all())


def coupled_plates(view: NoiseView, frames: Sequence[Any], event_dim: int) -> set[str]:
    """The plates along which slots act on one another, through what is outside.

    With one weight for each slot in the cotangent, the gradient at each slot of a noise
    has that slot's weight, unless other slots took part.
    """
    found: set[str] = set()
    if not view.noises:
        return found
    shape = view.output.shape
    generator = torch.Generator().manual_seed(0)
    plain = torch.rand(
        shape[len(shape) - event_dim :], generator=generator, device="cpu"
    )
    plain = (1 + plain).to(view.output).expand(shape)
    for frame in frames:
        if not frame.vectorized or len(shape) - event_dim < -frame.dim:
            continue
        axis = frame.dim - event_dim
        if shape[axis] == 1:
            continue
        weights = 1 + torch.rand(shape[axis], generator=generator, device="cpu").to(
            view.output
        )
        along = weights.reshape([-1] + [1] * (-axis - 1))
        both = view.backward(torch.stack([plain, plain * along]))
        for noise in view.noises:
            if all(f.name != frame.name for f in noise.frames):
                continue
            one, other = both[noise.key].detach()
            place = frame.dim - noise.event_dim
            expected = one * weights.reshape([-1] + [1] * (-place - 1))
            zero = torch.zeros_like(other)
            precision = torch.finfo(other.dtype).eps
            if not agree(zero, [expected], other, precision):
                found.add(frame.name)
    return found
