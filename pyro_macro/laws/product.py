# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Sites that are independent given their parents, as one distribution."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.laws.base import MicroLaw
from pyro_macro.program.layout import Layout
from pyro_macro.program.shapes import broadcast_shapes
from pyro_macro.sharding.across import Apart


class StackedSites(MicroLaw):
    """The own distributions of several sites, stacked into one micro state.

    :param parts: the distribution of each site, by name, expanded by its plates.
    :param layout: the order of the elements.
    """

    method = "exact: the sites' own laws"

    def __init__(self, parts: dict[str, Any], layout: Layout) -> None:
        self.parts, self.layout = parts, layout
        self._over = {
            name: [dim for dim, _ in over]
            for name, over in zip(layout.names, layout.over_plates, strict=True)
        }
        shapes = [
            Size(
                1 if d - len(part.batch_shape) in self._over[name] else size
                for d, size in enumerate(part.batch_shape)
            )
            for name, part in parts.items()
        ]
        own = broadcast_shapes(*shapes)
        dims = {dim for over in self._over.values() for dim in over}
        while own and own[0] == 1 and -len(own) in dims:
            own = own[1:]
        super().__init__(own, Size([layout.size]))
        _ = self.support  # refuses sites that cannot be stacked

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return all(part.has_rsample for part in self.parts.values())

    def _draws(self, sample_shape: Any, method: str) -> Tensor:
        ahead = len(sample_shape)
        missing = _missing(self.layout, ahead, len(self.batch_shape))
        shape = Size(sample_shape) + Size([1] * missing) + self.batch_shape
        values = {}
        for name, part in self.parts.items():
            full = broadcast_shapes(shape, part.batch_shape)
            values[name] = getattr(part.expand(full), method)()
        return _closed(self.layout.stack(values), ahead, missing)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        with torch.no_grad():
            return self._draws(sample_shape, "sample")

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        return self._draws(sample_shape, "rsample")

    def log_prob(self, value: Tensor) -> Tensor:
        total: Any = 0.0
        ahead = value.dim() - 1 - len(self.batch_shape)
        missing = _missing(self.layout, ahead, len(self.batch_shape))
        value = _opened(value, ahead, missing)
        for name, state in self.layout.unstack(value).items():
            part = self.parts[name].log_prob(state)
            dims = [d for d in self._over[name] if -d <= part.dim()]
            total = total + (part.sum(dims, keepdim=True) if dims else part)
        if self.layout.shards is not None:
            total = self.layout.shards.sum(total)
        if missing:
            return _closed(total, ahead, missing)
        shape = broadcast_shapes(total.shape, self.batch_shape)
        while total.dim() > len(shape):
            total = total.squeeze(0)
        return total.expand(shape)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        here = self._support()
        return here if self.layout.shards is None else Apart(here)

    def _support(self) -> constraints.Constraint:
        supports = []
        for name, part in self.parts.items():
            support = part.support
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            if support.event_dim and support is not constraints.real_vector:
                raise UnsupportedLaw(
                    f"site {name!r} has support {support}. Expected one without "
                    "constraints between its elements."
                )
            supports.append(support)
        if all(s in (constraints.real, constraints.real_vector) for s in supports):
            return constraints.real_vector
        first = supports[0]
        if all(s is first for s in supports):
            return constraints.independent(first, 1)
        return constraints.independent(
            constraints.cat(supports, dim=-1, lengths=self.layout.sizes), 1
        )


def _missing(layout: Layout, ahead: int, batch_dims: int) -> int:
    """How many dimensions of plates in the vector lie left of the batch.

    They have to stand between the batch and dimensions of samples, if there are any.
    """
    dims = [dim for over in layout.over_plates for dim, _ in over] + list(layout.batch)
    depth = max((-dim for dim in dims), default=0)
    return max(0, depth - batch_dims) if ahead > 0 else 0


def _opened(tensor: Tensor, ahead: int, missing: int) -> Tensor:
    """With ``missing`` dimensions of size one behind the first ``ahead``."""
    if not missing:
        return tensor
    return tensor.reshape(tensor.shape[:ahead] + (1,) * missing + tensor.shape[ahead:])


def _closed(tensor: Tensor, ahead: int, missing: int) -> Tensor:
    """The inverse of :func:`_opened`."""
    if not missing:
        return tensor
    return tensor.reshape(tensor.shape[:ahead] + tensor.shape[ahead + missing :])


def elementwise(
    layout: Layout,
    parts: Mapping[str, Any],
    of: Callable[[Any, Tensor], Tensor],
    vector: Tensor,
    batch_dims: int,
) -> Tensor:
    """A function of each element's distribution and value, stacked.

    :param parts: distributions of single elements, by site.
    :param of: from a distribution and values to numbers, of the same shape.
    :param vector: micro states, of any sample shape.
    :param batch_dims: how many of the dimensions belong to the batch.
    """
    ahead = vector.dim() - 1 - batch_dims
    missing = _missing(layout, ahead, batch_dims)
    states = layout.unstack(_opened(vector, ahead, missing))
    stacked = layout.stack({name: of(parts[name], states[name]) for name in parts})
    return _closed(stacked, ahead, missing)
