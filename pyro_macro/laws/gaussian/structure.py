# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The structure of a covariance, found from the derivatives of a noise view."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.laws.gaussian.covariance import (
    Blocks,
    Covariance,
    Dense,
    Diagonal,
    Shared,
)
from pyro_macro.laws.gaussian.derivatives import (
    agree,
    all_directions,
    batch_axes,
    unit_directions,
)
from pyro_macro.program.layout import Layout
from pyro_macro.program.noise import Noise, NoiseView


class Structure:
    """Finds the structure of a covariance, and its cheapest form.

    The vector is a grid: sites times the shape that the sites have in common (its
    *grain*: plates, then event dimensions). A group of noises is *local* to a depth if
    noise at one place of the first dimensions of the grain acts only there. That is
    supposed from the shapes, and checked with a random direction.

    :cvar coarsest: the depth down to which elements are independent whatever the
        noises.
    """

    coarsest = 0

    def __init__(self, layout: Layout, view: NoiseView, variance: Tensor) -> None:
        self.layout, self.view, self.variance = layout, view, variance
        grain = layout.grain
        self.outer = len(layout.names) if grain is not None else layout.size
        self.grain = tuple(grain) if grain is not None else ()
        self.plates = [] if grain is None else layout.over_dims

    def covariance(self, what: str) -> Covariance:
        groups, shared = self._groups()
        if shared:
            groups.append((0, self._columns(shared)))
        return self._of(groups, what)

    def _groups(self) -> tuple[list[tuple[int, Tensor]], list[Noise]]:
        """The noises that are local, by depth, and those that all elements share."""
        groups: list[tuple[int, Tensor]] = []
        shared: list[Noise] = []
        for noise in self.view.noises:
            depth, columns = self._local(noise)
            if columns is None:
                shared.append(noise)
            else:
                groups.append((depth, columns))
        return groups, shared

    def _columns(self, shared: list[Noise]) -> Tensor:
        directions = all_directions(shared, self.layout)
        return self.view.forward(directions).movedim(0, -1).double()

    def _of(self, groups: list[tuple[int, Tensor]], what: str) -> Covariance:
        if self._has_gaps():
            return self._without_own_noise(groups, what)
        return self._nest(groups)

    def _has_gaps(self) -> bool:
        return bool((self.variance.detach() == 0).any())

    def _nest(self, groups: list[tuple[int, Tensor]]) -> Covariance:
        """From the finest level to the coarsest, each adding the noises it shares."""
        depths = sorted({depth for depth, _ in groups} | {0, self.coarsest})
        covariance: Covariance | None = None
        for i in reversed(range(len(depths))):
            levels = depths[: i + 1]
            if covariance is None:
                variance = self._at(self.variance.unsqueeze(-1), levels).squeeze(-1)
                covariance = Diagonal(variance)
            columns = [self._at(c, levels) for d, c in groups if d == depths[i]]
            if columns:
                covariance = _add(covariance, torch.cat(_aligned(columns), -1))
            if i:
                start, stop = depths[i - 1], depths[i]
                covariance = Blocks(
                    covariance,
                    outer=self.outer,
                    slots=math.prod(self.grain[start:stop]),
                    inner=math.prod(self.grain[stop:]),
                )
        assert covariance is not None
        return covariance

    def _without_own_noise(
        self, groups: list[tuple[int, Tensor]], what: str
    ) -> Covariance:
        """Elements without noise of their own: dense blocks, as small as can be."""
        depths = sorted({depth for depth, _ in groups if depth})
        for depth in depths[:1] if self.coarsest else reversed([0, *depths]):
            inside = [
                self._spread(c, depth, d)
                for d, c in groups
                if d >= depth and (d or not depth)
            ]
            outside = [(d, c) for d, c in groups if d < depth]
            if not inside:
                continue
            levels = [0, depth] if depth else [0]
            factor = torch.cat(_aligned([self._at(c, levels) for c in inside]), -1)
            variance = self._at(self.variance.unsqueeze(-1), levels).squeeze(-1)
            matrix = torch.diag_embed(variance) + factor @ factor.mT
            cholesky, info = torch.linalg.cholesky_ex(matrix)
            thin = cholesky.diagonal(dim1=-2, dim2=-1)
            scale = matrix.diagonal(dim1=-2, dim2=-1).sqrt()
            limit = 10 * torch.finfo(thin.dtype).eps ** 0.5
            if info.any() or (thin <= limit * scale).any():
                continue
            covariance: Covariance = Dense(cholesky)
            if depth:
                covariance = Blocks(
                    covariance,
                    outer=self.outer,
                    slots=math.prod(self.grain[:depth]),
                    inner=math.prod(self.grain[depth:]),
                )
            rest = [self._spread(c, 0, d) if d else c for d, c in outside]
            return (
                _add(covariance, torch.cat(_aligned(rest), -1)) if rest else covariance
            )
        raise UnsupportedLaw(
            f"{what}: the law of the micro state is degenerate: some of its elements "
            f"are determined by the others (sites {self.layout.names}). Leave out the "
            "sites that follow from the others, or use Allocate or Explicit."
        )

    def _at(self, array: Tensor, levels: list[int]) -> Tensor:
        """``(..., K, c)`` as ``(..., slots of each level, elements of a slot, c)``."""
        batch, c = array.shape[:-2], array.shape[-1]
        slots = tuple(
            math.prod(self.grain[a:b]) for a, b in zip(levels, levels[1:], strict=False)
        )
        inner = math.prod(self.grain[levels[-1] :])
        grid = array.reshape(batch + (self.outer, *slots, inner, c))
        grid = grid.movedim(len(batch), len(batch) + len(slots))
        return grid.reshape(batch + slots + (self.outer * inner, c))

    def _spread(self, columns: Tensor, depth: int, own: int) -> Tensor:
        """Columns local to depth ``own``, one set for each place below ``depth``."""
        if own == depth:
            return columns
        slots = math.prod(self.grain[depth:own])
        before, after = math.prod(self.grain[:depth]), math.prod(self.grain[own:])
        batch, c = columns.shape[:-2], columns.shape[-1]
        grid = columns.reshape(batch + (self.outer, before, slots, after, 1, c))
        identity = torch.eye(slots, dtype=columns.dtype, device=columns.device)
        grid = grid * identity.reshape(slots, 1, slots, 1)
        return grid.reshape(batch + (columns.shape[-2], slots * c))

    def _local(self, noise: Noise) -> tuple[int, Tensor | None]:
        """The depth to which a group is local, and its columns there."""
        for depth in self._candidates(noise):
            axes = self._axes(noise, depth)
            count = math.prod(noise.leaf.shape[a] for a in axes["rest"])
            if count > 4 * self.layout.size:
                continue
            columns = self.view.forward(
                {noise.key: unit_directions(noise.leaf, axes["rest"])}
            )
            columns = columns.movedim(0, -1)  # (..., K, count)
            if self._confirmed(noise, depth, axes, columns):
                return depth, columns.double()
        return 0, None

    def _candidates(self, noise: Noise) -> list[int]:
        """Depths to try, deepest first; 0 is left to the shared groups."""
        dims = {f.dim for f in noise.frames if f.vectorized}
        depth = 0
        for dim in self.plates:
            if dim not in dims:
                break
            depth += 1
        if depth < len(self.plates):
            return [depth] if depth else []
        event = self.grain[len(self.plates) :]
        shape = tuple(noise.leaf.shape[noise.leaf.dim() - noise.event_dim :])
        candidates = [depth]
        if event and shape == event:
            candidates.insert(0, depth + len(event))
        return [d for d in candidates if d]

    def _axes(self, noise: Noise, depth: int) -> dict[str, list[int]]:
        """Which dimensions of a group are batch, which the grain, which the rest."""
        total = noise.leaf.dim()
        plates = [total - noise.event_dim + dim for dim in self.plates[:depth]]
        events = list(range(total - noise.event_dim, total))
        grain = plates + events[: max(0, depth - len(self.plates))]
        batch = batch_axes(noise, self.layout)
        rest = [a for a in range(total) if a not in grain and a not in batch]
        return {"batch": batch, "grain": grain, "rest": rest}

    def _confirmed(
        self, noise: Noise, depth: int, axes: dict[str, list[int]], columns: Tensor
    ) -> bool:
        generator = torch.Generator().manual_seed(0)
        trial = torch.randn(
            noise.leaf.shape, generator=generator, dtype=torch.float64, device="cpu"
        )
        trial = trial.to(noise.leaf)
        with torch.no_grad():
            actual = self.view.forward({noise.key: trial.unsqueeze(0)})[0].detach()
            order = axes["batch"] + axes["grain"] + axes["rest"]
            moved = trial.permute(order)
            batch = self._batch_shape(noise, axes)
            count = columns.shape[-1]
            slots = math.prod(self.grain[:depth])
            moved = moved.reshape(batch + (1, slots, 1, count))
            inner = math.prod(self.grain[depth:])
            moved = moved.expand(batch + (self.outer, slots, inner, count))
            moved = moved.reshape(batch + (self.outer * slots * inner, count))
            predicted = (columns.detach() * moved).sum(-1)
        zero = torch.zeros_like(actual)
        return agree(zero, [predicted], actual, torch.finfo(actual.dtype).eps)

    def _batch_shape(self, noise: Noise, axes: dict[str, list[int]]) -> tuple[int, ...]:
        """The shape of a group's batch dimensions, each at its own place."""
        total = noise.leaf.dim()
        sizes = {
            a - (total - noise.event_dim): noise.leaf.shape[a] for a in axes["batch"]
        }
        deepest = max([-d for d in sizes], default=0)
        return tuple(sizes.get(d, 1) for d in range(-deepest, 0))


def _aligned(columns: list[Tensor]) -> list[Tensor]:
    batch = torch.broadcast_shapes(*(c.shape[:-1] for c in columns))
    return [c.expand(batch + c.shape[-1:]) for c in columns]


def _add(base: Covariance, factor: Tensor) -> Covariance:
    """``C + F F'``, dense where the factor is as wide as it is high."""
    size, width = factor.shape[-2:]
    if width < size:
        return Shared(base, factor)
    return Dense(torch.linalg.cholesky(base.dense(factor) + factor @ factor.mT))
