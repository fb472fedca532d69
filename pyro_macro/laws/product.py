# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Sites that are independent given their parents, as one distribution."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.program.layout import Layout


class StackedSites(TorchDistribution):
    """The own distributions of several sites, stacked into one micro state.

    :param parts: the distribution of each site, by name, expanded by its plates.
    :param layout: the order of the elements.
    """

    arg_constraints: dict[str, Any] = {}

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
        own = torch.broadcast_shapes(*shapes)
        dims = {dim for over in self._over.values() for dim in over}
        while own and own[0] == 1 and -len(own) in dims:
            own = own[1:]
        super().__init__(own, Size([layout.size]))
        _ = self.support  # refuses sites that cannot be stacked

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return all(part.has_rsample for part in self.parts.values())

    def expand(self, batch_shape: Any, _instance: Any = None) -> StackedSites:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._batch_shape = Size(batch_shape)
        return new

    def _draws(self, sample_shape: Any, method: str) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        values = {}
        for name, part in self.parts.items():
            full = torch.broadcast_shapes(shape, part.batch_shape)
            values[name] = getattr(part.expand(full), method)()
        return self.layout.stack(values)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        with torch.no_grad():
            return self._draws(sample_shape, "sample")

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        return self._draws(sample_shape, "rsample")

    def log_prob(self, value: Tensor) -> Tensor:
        total: Any = 0.0
        for name, state in self.layout.unstack(value).items():
            part = self.parts[name].log_prob(state)
            dims = [d for d in self._over[name] if -d <= part.dim()]
            total = total + (part.sum(dims, keepdim=True) if dims else part)
        shape = torch.broadcast_shapes(total.shape, self.batch_shape)
        while total.dim() > len(shape):
            total = total.squeeze(0)
        return total.expand(shape)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:  # type: ignore[override]
        supports = []
        for name, part in self.parts.items():
            support = part.support
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            if (
                support.is_discrete
                or support.event_dim > 1
                or (support.event_dim and support is not constraints.real_vector)
            ):
                raise UnsupportedLaw(
                    f"site {name!r} has support {support}. Expected a continuous one "
                    "without constraints between its elements."
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
