# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Where the elements of sites lie: worlds, plates, and what is within."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable

from torch import Size, Tensor

from pyro_macro.program.inner import Site
from pyro_macro.program.shapes import broadcast_shapes


class Frame:
    """The plates of a program, and which of them a group of sites has in common.

    Values come as ``worlds + plates + elements``: worlds are dimensions that are no
    plates of the program (particles, posterior samples, a grid, enumeration), plates
    those that are in common, each at its own place with ones in between, and elements
    all the rest as one dimension.

    :param sites: all sites of the program.
    :param common: the names of plates that stay dimensions.
    """

    def __init__(self, sites: Iterable[Site], common: Collection[str] = ()) -> None:
        sites = list(sites)
        frames = {f.name: f for s in sites for f in s.frames if f.vectorized}
        self.dims = {f.dim for f in frames.values()}
        self.depth = max((-dim for dim in self.dims), default=0)
        self.common = {frames[name].dim: frames[name].size for name in common}

    @property
    def plates(self) -> Size:
        """The shape of the plates in common, of the depth of the program."""
        return Size(self.common.get(dim, 1) for dim in self.places)

    @property
    def places(self) -> range:
        """The dimensions of the plates of the program, from left to right."""
        return range(-self.depth, 0)

    def over(self, site: Site) -> list[int]:
        """The dimensions of a site's plates that are among its elements."""
        dims = [f.dim for f in site.frames if f.vectorized]
        return sorted(dim for dim in dims if dim not in self.common)

    def size(self, site: Site) -> int:
        """The number of elements of a site."""
        sizes = {f.dim: f.size for f in site.frames if f.vectorized}
        return (
            math.prod(sizes[dim] for dim in self.over(site))
            * Size(site.event_shape).numel()
        )

    def elements(self, value: Tensor, site: Site) -> Tensor:
        """A value of a site, its elements as one dimension.

        :param value: shape ``batch + event``; what is left of the plates are worlds.
        :returns: shape ``batch + (n,)``, of at least the depth of the program.
        """
        event = len(site.event_shape)
        batch = value.shape[: value.dim() - event]
        missing = self.depth - len(batch)
        if missing > 0:
            value = value.reshape((1,) * missing + value.shape)
        batch = value.shape[: value.dim() - event]
        over = self.over(site)
        if not over:
            return value.reshape((*batch, -1))
        sizes = {f.dim: f.size for f in site.frames if f.vectorized}
        full = list(batch)
        for dim in over:
            full[dim] = sizes[dim]
        value = value.expand((*full, *site.event_shape))
        axes = [len(full) + dim for dim in over]
        rest = [1 if i in axes else n for i, n in enumerate(full)]
        kept = [i for i in range(len(full)) if i not in axes]
        events = list(range(len(full), value.dim()))
        return value.permute(kept + axes + events).reshape((*rest, -1))

    def back(self, elements: Tensor, site: Site) -> Tensor:
        """The inverse of :meth:`elements`."""
        event = tuple(site.event_shape)
        batch = elements.shape[:-1]
        over = self.over(site)
        if not over:
            return elements.reshape((*batch, *event))
        sizes = {f.dim: f.size for f in site.frames if f.vectorized}
        axes = [len(batch) + dim for dim in over]
        kept = [i for i in range(len(batch)) if i not in axes]
        lengths = [batch[i] for i in kept] + [sizes[dim] for dim in over]
        value = elements.reshape((*lengths, *event))
        order = kept + axes  # which axis of the result each one is
        inverse = [order.index(i) for i in range(len(batch))]
        events = list(range(len(batch), value.dim()))
        return value.permute(inverse + events)


class Worlds:
    """The dimensions of some values that are no plates of the program.

    :param values: the values with their numbers of event dimensions.
    :param frame: the plates of the program.
    """

    def __init__(self, values: Iterable[tuple[Tensor, int]], frame: Frame) -> None:
        shapes = []
        for value, event in values:
            batch = list(value.shape[: value.dim() - event])
            for dim in frame.dims:
                if -dim <= len(batch):
                    batch[dim] = 1
            shapes.append(batch)
        self.shape = Size(broadcast_shapes(*shapes))
        self.dims = [d for d in range(-len(self.shape), 0) if self.shape[d] > 1]
        self.size = math.prod(self.shape[d] for d in self.dims)
        self.depth = frame.depth

    def __bool__(self) -> bool:
        return bool(self.dims)

    def has(self, value: Tensor, event: int) -> bool:
        """Whether a value differs between worlds."""
        batch = value.shape[: value.dim() - event]
        return any(-d <= len(batch) and batch[d] > 1 for d in self.dims)

    def front(self, value: Tensor, event: int, shape: Size) -> Tensor:
        """Worlds as the first dimension: ``(W,) + shape`` of a value in one world."""
        batch = value.shape[: value.dim() - event]
        depth = max(len(batch), len(self.shape))
        value = value.reshape((1,) * (depth - len(batch)) + value.shape)
        full = list(value.shape)
        for d in self.dims:
            full[depth + d] = self.shape[d]
        value = value.expand(full)
        axes = [depth + d for d in self.dims]
        rest = [i for i in range(value.dim()) if i not in axes]
        return value.permute(axes + rest).reshape((self.size, *shape))

    def behind(self, value: Tensor, right: int) -> Tensor:
        """The inverse: ``(W,) + plates + rest`` with worlds at their places.

        :param right: how many dimensions the rest has.
        """
        if value.shape[0] == 1 and self.size > 1:
            value = value.expand((self.size, *value.shape[1:]))
        plates = value.dim() - 1 - right
        value = value.reshape(
            [self.shape[d] for d in self.dims] + list(value.shape[1:])
        )
        depth = max(len(self.shape), plates)
        sizes = list(value.shape)
        count = len(self.dims)
        shape, order = [], []
        for d in range(-depth, 0):
            if d in self.dims:
                order.append(self.dims.index(d))
                shape.append(self.shape[d])
            elif -d <= plates:
                order.append(count + plates + d)
                shape.append(sizes[count + plates + d])
            else:
                shape.append(1)
        # Where a world has the place of a dimension of size one, that is dropped
        dropped = [i for i in range(value.dim() - right) if i not in order]
        order += list(range(value.dim() - right, value.dim()))
        value = value.permute(order + dropped)
        return value.reshape(shape + sizes[value.dim() - right :])
