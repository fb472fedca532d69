# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Independent sites, one element of which takes up what a total leaves."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.laws.base import MicroFibre, MicroLaw
from pyro_macro.laws.elements import Elements
from pyro_macro.laws.product import StackedSites, elementwise
from pyro_macro.laws.sampled.coordinates import PivotTransform
from pyro_macro.program.inner import unwrapped
from pyro_macro.program.layout import Layout


class ResidualSites(MicroLaw):
    """All elements but one follow their own laws; that one takes up the rest.

    The log density is with respect to the elements without that one, whose own
    support does not count: a rest that lies off it is for the run to refuse.

    :param parts: the distribution of each site, by name.
    :param layout: the order of the elements.
    :param elements: their supports.
    :param weights: shape ``(K,)``.
    :param value: shape ``batch``.
    :param absorb: the element that takes up the rest.
    """

    method = "exact: product of sites, one takes up the rest"

    def __init__(
        self,
        parts: dict[str, Any],
        layout: Layout,
        elements: Elements,
        weights: Tensor,
        value: Tensor,
        absorb: int,
    ) -> None:
        self.parts, self.layout, self.elements = parts, layout, elements
        self.weights, self.value, self.absorb = weights, value, absorb
        self.own = StackedSites(parts, layout)
        batch = torch.broadcast_shapes(self.own.batch_shape, value.shape)
        super().__init__(batch, self.own.event_shape)

    @property
    def has_rsample(self) -> bool:  # type: ignore[override]
        return self.own.has_rsample

    def _onto(self, x: Tensor) -> Tensor:
        weights = self.weights.to(x)
        others = weights.clone()
        others[self.absorb] = 0.0
        rest = (self.value - x @ others) / weights[self.absorb]
        parts = [x[..., : self.absorb], rest.unsqueeze(-1), x[..., self.absorb + 1 :]]
        return torch.cat(parts, -1)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        own = self.own.expand(self.batch_shape)
        draw = own.rsample if self.has_rsample else own.sample
        drawn = draw(sample_shape)
        return self._onto(drawn.to(self.value.dtype))

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        parts = {name: unwrapped(fn) for name, fn in self.parts.items()}
        depth = len(self.batch_shape)
        stacked = elementwise(self.layout, parts, _log_prob, value, depth)
        others = torch.cat(
            [stacked[..., : self.absorb], stacked[..., self.absorb + 1 :]], -1
        )
        result = others.sum(-1)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    @constraints.dependent_property(event_dim=1)
    def support(self) -> MicroFibre:  # type: ignore[override]
        keep = torch.ones_like(self.elements.low, dtype=torch.bool)
        keep[..., self.absorb] = False
        low, high = self.elements.low, self.elements.high
        own = self.own.support
        discrete = bool(own.is_discrete)
        reason: Any = "a micro state with counts has no continuous coordinates"
        if not discrete:
            reason = PivotTransform(
                self.elements,
                torch.tensor([self.absorb], device=self.value.device),
                lambda x: self._onto(x)[..., self.absorb].unsqueeze(-1),
                lambda x: torch.zeros_like(x[..., 0]),
            )
        return MicroFibre(
            lambda x: ((x >= low) & (x <= high)) | ~keep,
            lambda x: x @ self.weights.to(x),
            self.value,
            reason,
            is_discrete=discrete,
        )


def _log_prob(part: Any, value: Tensor) -> Tensor:
    return part.log_prob(value)
