# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""How the values of several sites become one vector, and back."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import NotAMicroState
from pyro_macro.program.inner import Site, shards_of
from pyro_macro.program.shapes import broadcast_shapes


class Layout:
    """The order of the elements of several sites in one vector.

    Elements come site by site; within a site, first along the plates in ``over``
    (from the leftmost dimension to the rightmost), then along the event dimensions.
    The plates that are left stay batch dimensions, each at its own place: a plate in
    ``over`` leaves a dimension of size one behind, unless it was the leftmost.

    Of a sharded plate in ``over``, the vector has the slots of this rank.

    :param sites: the sites, in the order of the vector.
    :param over: names of plates that become part of the vector.
    :param what: how to call the whole in messages.
    :raises NotAMicroState: if the sites share no common shape.
    :ivar shards: how a plate in ``over`` is split over ranks; ``None`` if none is.
    """

    def __init__(
        self, sites: Sequence[Site], over: Collection[str] = (), what: str = "it"
    ) -> None:
        self.names = [site.name for site in sites]
        self.over = tuple(over)
        framed = [[f for f in s.frames if f.vectorized] for s in sites]
        common = [f for f in sites[0].frames if all(f in s.frames for s in sites)]
        self.frames = tuple(f for f in common if f.name not in self.over)
        for site, frames in zip(sites, framed, strict=True):
            for frame in frames:
                if frame.name not in self.over and frame not in self.frames:
                    others = [s.name for s in sites if frame not in s.frames]
                    raise NotAMicroState(
                        f"{what}: site {site.name!r} is in plate {frame.name!r} "
                        f"(size {frame.size}), site {others[0]!r} is not. Expected "
                        "plates around every micro site, or named in `over`: add "
                        f"over={frame.name!r} to sum over it."
                    )
        seen = {f.name for frames in framed for f in frames}
        for name in self.over:
            if name not in seen:
                listed = ", ".join(map(repr, sorted(seen))) or "none"
                raise NotAMicroState(
                    f"{what}: over={name!r} is no plate of {self.names}. Their plates "
                    f"are: {listed}."
                )
        self.over_plates = [
            sorted((f.dim, f.size) for f in frames if f.name in self.over)
            for frames in framed
        ]
        self._all = [{f.dim: f.size for f in frames} for frames in framed]
        self._events = [Size(s.event_shape) for s in sites]
        # Each site is one number within the plates that stay
        self._scalar = not self.over and not any(self._events)
        self.sizes = [
            math.prod(size for _, size in over) * event.numel()
            for over, event in zip(self.over_plates, self._events, strict=True)
        ]
        self.shards = self._found_shards(framed, what)

    def _found_shards(self, framed: list[list[Any]], what: str) -> Any:
        sharded = {
            frame.name: frame
            for frames in framed
            for frame in frames
            if frame.name in self.over and shards_of(frame) is not None
        }
        if not sharded:
            return None
        frame = next(iter(sharded.values()))
        for name, over in zip(self.names, self.over_plates, strict=True):
            if len(sharded) > 1 or over[:1] != [(frame.dim, frame.size)]:
                raise NotAMicroState(
                    f"{what}: plate {frame.name!r} is split over ranks, and site "
                    f"{name!r} has the plates of {list(self.over)} at dims "
                    f"{[dim for dim, _ in over]}. Expected one sharded plate around "
                    "every micro site, left of the other plates in `over`: give it "
                    "its place with dim=..."
                )
        return frame.shards

    @property
    def size(self) -> int:
        """The number of elements of the vector."""
        return sum(self.sizes)

    @property
    def full_size(self) -> int:
        """The number of elements on all ranks together."""
        if self.shards is None:
            return self.size
        return self.size // self.shards.here * self.shards.size

    def mine(self, vector: Tensor, what: str) -> Tensor:
        """The part of this rank, of a vector that may be that of all ranks.

        :param vector: shape ``(..., full_size)``, or ``(..., size)``: of this rank.
        :param what: how to call it in messages.
        """
        found = vector.shape[-1] if vector.dim() else 0
        if found == self.size:
            return vector
        if self.shards is None or found != self.full_size:
            on_ranks = "" if self.shards is None else f", or {self.full_size} for all"
            raise NotAMicroState(
                f"{what}: shape {tuple(vector.shape)}. Expected {self.size} in the "
                f"rightmost dimension, for {self.describe()}{on_ranks}."
            )
        whole, here = self.shards.size, slice(self.shards.start, self.shards.stop)
        sizes = [size // self.shards.here * whole for size in self.sizes]
        parts = [
            part.unflatten(-1, (whole, -1))[..., here, :].flatten(-2)
            for part in vector.split(sizes, -1)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    @property
    def batch(self) -> dict[int, int]:
        """The sizes of the plates that stay batch dimensions, by dimension."""
        return {f.dim: f.size for f in self.frames if f.vectorized}

    @property
    def batch_shape(self) -> Size:
        """The shape of the plates that stay, ones in between."""
        return _shape(self.batch)

    @property
    def grain(self) -> Size | None:
        """The shape within a site that all sites have in common, or ``None``."""
        shapes = set(zip(map(tuple, self.over_plates), self._events, strict=True))
        if len(shapes) != 1:
            return None
        ((over, event),) = shapes
        return Size(size for _, size in over) + event

    @property
    def over_dims(self) -> list[int]:
        """The dimensions of the plates in the grain, from left to right."""
        return [dim for dim, _ in self.over_plates[0]]

    def stack(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sites' values as one vector.

        :param values: values by name of the site, with any dimensions to the left.
        :returns: shape ``batch + (size,)``.
        """
        parts = []
        if self._scalar and len(self.names) > 1:  # many sites, in few operations
            plates = _shape(self.batch)
            parts = [values[name].unsqueeze(-1) for name in self.names]
            batch = broadcast_shapes(plates, *{p.shape[:-1] for p in parts})
            if any(part.shape[:-1] != batch for part in parts):
                parts = [part.expand(batch + (1,)) for part in parts]
            return torch.cat(parts, -1)
        for name, over, sizes, event in zip(
            self.names, self.over_plates, self._all, self._events, strict=True
        ):
            value = values[name]
            batch = value.shape[: value.dim() - len(event)]
            batch = broadcast_shapes(batch, _shape(sizes))
            value = value.expand(batch + event)
            # (..., 1 where the plates in `over` were, over, event)
            value = value.reshape(batch + (1,) * len(over) + event)
            for i, (dim, _) in enumerate(over):
                value = value.transpose(len(batch) + dim, len(batch) + i)
            depth = len(batch)
            value = (
                value.flatten(start_dim=depth) if over or event else value.unsqueeze(-1)
            )
            while depth and any(dim == -depth for dim, _ in over):
                value, depth = value.squeeze(0), depth - 1
            parts.append(value)
        if len(parts) == 1:
            return parts[0]
        batch = broadcast_shapes(*(part.shape[:-1] for part in parts))
        return torch.cat([part.expand(batch + part.shape[-1:]) for part in parts], -1)

    def unstack(self, vector: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`stack`: each site's value, expanded by its plates."""
        batch = broadcast_shapes(vector.shape[:-1], self.batch_shape)
        if self._scalar:
            elements = vector.expand(batch + vector.shape[-1:]).unbind(-1)
            return dict(zip(self.names, elements, strict=True))
        values: dict[str, Tensor] = {}
        for name, over, event, part in zip(
            self.names,
            self.over_plates,
            self._events,
            vector.split(self.sizes, dim=-1),
            strict=True,
        ):
            depth = max([-dim for dim, _ in over], default=0)
            full = (1,) * max(0, depth - len(batch)) + tuple(batch)
            part = part.expand(batch + part.shape[-1:])
            part = part.reshape(full + tuple(size for _, size in over) + tuple(event))
            for i, (dim, _) in enumerate(over):
                part = part.transpose(len(full) + dim, len(full) + i)
            shape = part.shape[: len(full)] + event
            values[name] = part.reshape(shape)
        return values

    def places(self, finer: Layout) -> tuple[Tensor, Tensor]:
        """Where the elements lie in a layout of more plates.

        :param finer: the same sites, with some plates that stay here as part of the
            vector; the places along these are slots, row by row.
        :returns: for each element of the other vector, which element it is here, and
            of which slot.
        """
        sizes = {f.dim: f.size for f in self.frames if f.name in finer.over}
        shape = Size(sizes.get(dim, 1) for dim in range(-len(self.batch_shape), 0))
        elements = torch.arange(self.size)
        slots = torch.arange(shape.numel()).reshape(shape)
        slots = slots.unsqueeze(-1).expand(shape + (self.size,))

        def moved(vector: Tensor) -> Tensor:
            stacked = finer.stack(self.unstack(vector))
            return stacked.reshape(-1, stacked.shape[-1])[0]

        return moved(elements), moved(slots)

    def describe(self) -> str:
        """The elements in words, for messages."""
        return ", ".join(
            f"{size} of {name!r}"
            for name, size in zip(self.names, self.sizes, strict=True)
        )

    def place(self, name: str) -> range:
        """Where the elements of one site lie."""
        at = self.names.index(name)
        start = sum(self.sizes[:at])
        return range(start, start + self.sizes[at])


def _shape(sizes: Mapping[int, int]) -> Size:
    depth = max((-dim for dim in sizes), default=0)
    return Size(sizes.get(dim, 1) for dim in range(-depth, 0))
