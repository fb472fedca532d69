# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The elements of a micro state: their supports, and where they are likely to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.program.inner import Site, unwrapped
from pyro_macro.program.layout import Layout


@dataclass(frozen=True, eq=False)
class Elements:
    """What is known of each element of a micro state: shapes ``(..., K)``.

    :ivar low: the least value in its support.
    :ivar high: the largest.
    :ivar centre: where it is likely to be.
    :ivar spread: how far from there.
    """

    low: Tensor
    high: Tensor
    centre: Tensor
    spread: Tensor

    def at(self, index: Tensor) -> Elements:
        return Elements(
            *(t[..., index] for t in (self.low, self.high, self.centre, self.spread))
        )


def bounds(part: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest value of a continuous support."""
    if type(part).__name__ == "TransformedDistribution":  # no family with a name
        # Its own support may say no more than that numbers are real
        own = bounds(unwrapped(part.base_dist), like)
        ends = torch.stack(torch.broadcast_tensors(*own))
        if all(t.bijective and t.domain.event_dim == 0 for t in part.transforms):
            for transform in part.transforms:
                ends = transform(ends)
            if not bool(ends.isnan().any()):
                return ends.amin(0), ends.amax(0)
    low = getattr(part.support, "lower_bound", -torch.inf)
    high = getattr(part.support, "upper_bound", torch.inf)
    return _end(low, like), _end(high, like)


def _end(end: Any, like: Tensor) -> Tensor:
    return end.to(like) if isinstance(end, Tensor) else like.new_full((), end)


def elements_of(sites: Mapping[str, Site], layout: Layout, what: str) -> Elements:
    """The elements of a micro state.

    :param sites: its sites, with their distributions.
    :raises UnsupportedLaw: if a site has a constraint between its elements.
    """
    parts: dict[str, list[Tensor]] = {}
    for name in layout.names:
        own, like = unwrapped(sites[name].fn), sites[name].value.double()
        if own.event_shape and own.support is not constraints.real_vector:
            raise UnsupportedLaw(
                f"{what}: micro site {name!r} has support {own.support}. Expected one "
                "without constraints between its elements."
            )
        found = (*bounds(own, like), centre_of(own, like), spread_of(own, like))
        parts[name] = [t + torch.zeros_like(like) for t in found]
    return Elements(
        *(layout.stack({n: own[i] for n, own in parts.items()}) for i in range(4))
    )


def centre_of(own: Any, like: Tensor) -> Tensor:
    """The mean of a distribution; ``like`` where it has none."""
    try:
        mean = own.mean + torch.zeros_like(like)
    except NotImplementedError:
        return like
    return torch.where(mean.isfinite(), mean, like)


def spread_of(own: Any, like: Tensor) -> Tensor:
    """The standard deviation of a distribution; one where it has none."""
    try:
        spread = own.stddev + torch.zeros_like(like)
    except NotImplementedError:
        return torch.ones_like(like)
    usable = spread.isfinite() & (spread > 0)
    return torch.where(usable, spread, torch.ones_like(like))


def variance_of(own: Any) -> Tensor:
    """The variance; torch does not know that of numbered categories."""
    if isinstance(own, torch.distributions.Categorical):
        values = torch.arange(own.probs.shape[-1]).to(own.probs)
        mean = (own.probs * values).sum(-1)
        return (own.probs * values.square()).sum(-1) - mean.square()
    return own.variance
