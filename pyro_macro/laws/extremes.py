# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Independent continuous variables, given the largest or the smallest of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.laws.base import MicroFibre, MicroLaw
from pyro_macro.laws.elements import bounds, centre_of, spread_of
from pyro_macro.laws.product import elementwise
from pyro_macro.program.inner import unwrapped
from pyro_macro.program.layout import Layout
from pyro_macro.program.reading import draw


class GivenExtreme(MicroLaw):
    """``P(X | max X = value)``, or of the minimum, for independent elements.

    One element attains the value, element ``j`` with probability proportional to its
    hazard ``f_j(value) / F_j(value)``; the others follow their own laws, truncated
    there. The law is mixed: its log density is with respect to the Lebesgue measure
    of the elements but the one that attains, summed over which that is.

    :param parts: the distribution of each site, by name.
    :param layout: the order of the elements.
    :param value: the macro value, shape ``batch``.
    :param sign: 1 for the maximum, -1 for the minimum.
    """

    method = "exact: extreme of independent sites"

    def __init__(
        self, parts: dict[str, Any], layout: Layout, value: Tensor, sign: int
    ) -> None:
        self.parts = {name: unwrapped(fn) for name, fn in parts.items()}
        self.layout, self.value, self.sign = layout, value, sign
        self._depth = value.dim()
        hazard = self._log_density(value) - self._log_within(value)
        self.hazard = hazard.nan_to_num(nan=-torch.inf, neginf=-torch.inf)  # (..., K)
        within = self._log_within(value).sum(-1)
        self._log_total = within + torch.logsumexp(self.hazard, -1)
        super().__init__(self._log_total.shape, self.hazard.shape[-1:])
        self._depth = len(self.batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> GivenExtreme:
        new: GivenExtreme = super().expand(batch_shape)
        new._depth = len(new.batch_shape)
        return new

    @property
    def log_total(self) -> Tensor:
        return self._log_total

    def _stack(self, of: Callable[[Any, Tensor], Tensor], vector: Tensor) -> Tensor:
        """A function of each element's distribution and value, stacked."""
        return elementwise(self.layout, self.parts, of, vector, self._depth)

    def _spread(self, value: Tensor) -> Tensor:
        return value.unsqueeze(-1).expand(value.shape + (self.layout.size,))

    def _log_density(self, value: Tensor) -> Tensor:
        return self._stack(_log_density, self._spread(value))

    def _log_within(self, value: Tensor) -> Tensor:
        """The log probability that an element does not lie beyond the value."""
        return self._stack(self._cdf, self._spread(value)).log()

    def _cdf(self, part: Any, value: Tensor) -> Tensor:
        below = part.cdf(_clamped(part, value))
        low, high = bounds(part, value)
        below = torch.where(value <= low, 0.0, torch.where(value >= high, 1.0, below))
        return below if self.sign > 0 else 1 - below

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> MicroFibre:  # type: ignore[override]
        return MicroFibre(
            lambda x: x.isfinite(),
            lambda x: self.sign * (self.sign * x).amax(-1),
            self.value,
            "the law of a micro state given its extreme is mixed: which element "
            "attains the value is discrete, so that it has no coordinates for NUTS, "
            "HMC or an autoguide. Draw from it (Predictive, Importance, a guide of "
            "your own), or use Explicit",
        )

    def fibre_around(self, law: Any) -> MicroFibre:
        """The fibre; it has no coordinates, wherever ``law`` lies."""
        return self.support

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            hazard = self.hazard.expand(shape + self.event_shape)
            first = torch.distributions.Categorical(logits=hazard, validate_args=False)
            attains = torch.nn.functional.one_hot(first.sample(), hazard.shape[-1])
            value = self.value.expand(shape)
            within = self._stack(self._cdf, self._spread(value))
            within = within * torch.rand_like(within)
            others = self._stack(self._quantile, within)
            return torch.where(attains.bool(), value.unsqueeze(-1), others)

    def _quantile(self, part: Any, probability: Tensor) -> Tensor:
        return quantile(part, probability if self.sign > 0 else 1 - probability)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        density = self._stack(_log_density, value)
        attains = value == self.value.unsqueeze(-1)
        beyond = (self.sign * (value - self.value.unsqueeze(-1)) > 0).any(-1)
        # Two at once have probability zero; then the first one counts
        met = attains.any(-1) & ~beyond
        result = density.sum(-1) - self._log_total
        result = torch.where(met, result, -torch.inf)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))


def _log_density(part: Any, value: Tensor) -> Tensor:
    inside = part.support.check(value)
    density = part.log_prob(_clamped(part, value))
    return torch.where(inside, density, -torch.inf)


def _clamped(part: Any, value: Tensor) -> Tensor:
    """The value, moved into the support where it is outside."""
    low, high = bounds(part, value)
    eps = torch.finfo(value.dtype).eps
    low = torch.where(low.isfinite(), low + eps * (1 + low.abs()), low)
    high = torch.where(high.isfinite(), high - eps * (1 + high.abs()), high)
    return value.maximum(low).minimum(high)


def has_cdf(fn: Any) -> bool:
    """Whether a distribution knows its cumulative probabilities."""
    base = unwrapped(fn)
    if base.event_shape or base.support.is_discrete:
        return False
    try:
        return bool(torch.isfinite(base.cdf(draw(base))).all())
    except NotImplementedError:
        return False


def quantile(part: Any, probability: Tensor) -> Tensor:
    """The inverse of the cumulative probabilities, by bisection if need be."""
    tiny = torch.finfo(probability.dtype).tiny
    eps = torch.finfo(probability.dtype).eps
    inside = probability.clamp(tiny, 1 - eps / 2)
    try:
        return part.icdf(inside)
    except NotImplementedError:
        pass
    low, high = bounds(part, inside)
    centre = centre_of(part, torch.zeros_like(inside))
    # An interval around the quantile: doubled until it holds it
    step = spread_of(part, inside)
    left, right = centre - step, centre + step
    for _ in range(60):
        left = torch.where(part.cdf(_clamped(part, left)) > inside, left - step, left)
        right = torch.where(
            part.cdf(_clamped(part, right)) < inside, right + step, right
        )
        step = step * 2
    left, right = left.maximum(low), right.minimum(high)
    for _ in range(100):
        middle = (left + right) / 2
        above = part.cdf(_clamped(part, middle)) > inside
        left = torch.where(above, left, middle)
        right = torch.where(above, middle, right)
    return (left + right) / 2
