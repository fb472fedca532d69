# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Free coordinates of a fibre whose elements have supports of their own.

Each is a transform from ``K - m`` unbounded coordinates to the micro state; volumes
are with respect to the elements but the ones that are solved for.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform

from pyro_macro.errors import Infeasible, UnsupportedLaw
from pyro_macro.laws.elements import Elements
from pyro_macro.laws.gaussian.fibre import choose_pivots
from pyro_macro.laws.sampled.simplex import SimplexTransform


class _FibreTransform(Transform):
    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True
    solved = 1

    def __eq__(self, other: object) -> bool:
        return self is other

    def forward_shape(self, shape: Size) -> Size:
        return Size(shape[:-1]) + Size([shape[-1] + self.solved])

    def inverse_shape(self, shape: Size) -> Size:
        return Size(shape[:-1]) + Size([shape[-1] - self.solved])

    def log_coarea(self, x: Tensor) -> Tensor:
        """The log of the density of the macro value within a unit of coordinates.

        That is ``-log |d pi / d pivots|``: the co-area formula in the coordinates
        without the pivots.
        """
        raise NotImplementedError


def _finite(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which ends are finite, and numbers in place of those that are not.

    Infinite numbers must not enter a branch that is not taken: their gradients are
    NaN.
    """
    has_low, has_high = low.isfinite(), high.isfinite()
    least = torch.where(has_low, low, torch.where(has_high, high - 1.0, 0.0))
    most = torch.where(has_high, high, least + 1.0)
    return has_low, has_high, least, most


def into(z: Tensor, low: Tensor, high: Tensor, shift: float = 0.0) -> Tensor:
    """From an unbounded number to an interval, either end of which may be infinite."""
    has_low, has_high, least, most = _finite(low, high)
    both, either = has_low & has_high, has_low | has_high
    bounded = least + (most - least) * torch.sigmoid(z + shift)
    far = torch.where(either & ~both, torch.where(has_low, z, -z), 0.0).exp()
    one_sided = torch.where(has_low, least + far, most - far)
    return torch.where(both, bounded, torch.where(either, one_sided, z))


def slope(z: Tensor, low: Tensor, high: Tensor, shift: float = 0.0) -> Tensor:
    """The log derivative of :func:`into`."""
    has_low, has_high, least, most = _finite(low, high)
    log = torch.nn.functional.logsigmoid
    bounded = (most - least).log() + log(z + shift) + log(-z - shift)
    one_sided = torch.where(has_low, z, torch.where(has_high, -z, 0.0))
    return torch.where(has_low & has_high, bounded, one_sided)


def out_of(x: Tensor, low: Tensor, high: Tensor, shift: float = 0.0) -> Tensor:
    """The inverse of :func:`into`."""
    has_low, has_high, least, most = _finite(low, high)
    bounded = torch.logit((x - least) / (most - least)) - shift
    one_sided = torch.where(has_low, (x - least).log(), -(most - x).log())
    either = torch.where(has_low | has_high, one_sided, x)
    return torch.where(has_low & has_high, bounded, either)


class PivotTransform(_FibreTransform):
    """All elements but the pivots are free in their supports; those are solved for.

    :param elements: of the micro state.
    :param pivots: the indices of the elements that are solved for.
    :param solve: from all elements (those at the pivots are ignored) to the pivots.
    :param log_slope: from a micro state to ``log |d pi / d pivots|``.
    """

    def __init__(
        self,
        elements: Elements,
        pivots: Tensor,
        solve: Callable[[Tensor], Tensor],
        log_slope: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        size, device = elements.low.shape[-1], elements.low.device
        keep = torch.ones(size, dtype=torch.bool, device=device)
        keep[pivots] = False
        self.free = keep.nonzero().squeeze(-1)
        self.order = torch.cat([self.free, pivots]).argsort()
        self.pivots, self.solve, self.log_slope = pivots, solve, log_slope
        own = elements.at(self.free)
        self.low, self.high = own.low, own.high
        inside = out_of(own.centre, own.low, own.high)
        self.origin = torch.where(inside.isfinite(), inside, 0.0)
        # Where an element is bounded its own scale is near one
        real = own.low.isinf() & own.high.isinf()
        self.scale = torch.where(real, own.spread, torch.ones_like(own.spread))
        self.solved = len(pivots)

    def _call(self, x: Tensor) -> Tensor:
        free = into(self.origin + self.scale * x, self.low, self.high)
        shape = free.shape[:-1] + (self.solved,)
        padded = torch.cat([free, free.new_zeros(shape)], -1)[..., self.order]
        return torch.cat([free, self.solve(padded)], -1)[..., self.order]

    def _inverse(self, y: Tensor) -> Tensor:
        z = out_of(y[..., self.free], self.low, self.high)
        return (z - self.origin) / self.scale

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        z = self.origin + self.scale * x
        return (slope(z, self.low, self.high) + self.scale.log()).sum(-1)

    def log_coarea(self, x: Tensor) -> Tensor:
        return -self.log_slope(x)


class PositiveTransform(SimplexTransform):
    """Positive elements with positive weights and a given sum."""

    def log_coarea(self, x: Tensor) -> Tensor:
        return -self.scale[-1].log() + torch.zeros_like(x[..., 0])


class IntervalTransform(_FibreTransform):
    """Elements with supports of any kind and a given weighted sum, one by one.

    Each element takes what it can of what is left, so that the others can still take
    the rest. Its bounds follow from those before it, so that this is a loop.

    :param elements: of the micro state.
    :param weights: shape ``(K,)``, none zero.
    :param value: shape ``batch``.
    """

    def __init__(self, elements: Elements, weights: Tensor, value: Tensor) -> None:
        super().__init__()
        ends = torch.stack([elements.low * weights, elements.high * weights])
        self.low, self.high = ends.amin(0), ends.amax(0)
        self.weights, self.value = weights, value
        # What the elements behind each can take together
        self.least = self.low.flip(-1).cumsum(-1).flip(-1)
        self.most = self.high.flip(-1).cumsum(-1).flip(-1)

    def _interval(self, k: int, left: Tensor) -> tuple[Tensor, Tensor]:
        low = torch.maximum(self.low[..., k], left - self.most[..., k + 1])
        high = torch.minimum(self.high[..., k], left - self.least[..., k + 1])
        return low, high

    def _shift(self, k: int) -> float:
        return -math.log(self.weights.shape[-1] - 1 - k)

    def _walk(
        self, terms: Tensor | None, z: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """Terms from coordinates, or coordinates from terms; and the log volume."""
        source: Tensor = terms if z is None else z  # type: ignore[assignment]
        shape = torch.broadcast_shapes(
            self.value.shape, self.low.shape[:-1], source.shape[:-1]
        )
        left, volume = self.value.expand(shape), source.new_zeros(shape)
        found = []
        for k in range(self.weights.shape[-1] - 1):
            low, high = self._interval(k, left)
            if z is None:
                assert terms is not None
                own = terms[..., k]
                coordinate = out_of(own, low, high, self._shift(k))
                found.append(coordinate)
            else:
                coordinate = z[..., k]
                own = into(coordinate, low, high, self._shift(k))
                found.append(own)
            volume = volume + slope(coordinate, low, high, self._shift(k))
            left = left - own
        if z is not None:
            found.append(left)
        return found, volume

    def _call(self, x: Tensor) -> Tensor:
        terms, _ = self._walk(None, x)
        shape = torch.broadcast_shapes(*(t.shape for t in terms))
        return torch.stack([t.expand(shape) for t in terms], -1) / self.weights

    def _inverse(self, y: Tensor) -> Tensor:
        found, _ = self._walk(y * self.weights, None)
        return torch.stack(found, -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        _, volume = self._walk(None, x)
        return volume - self.weights[:-1].abs().log().sum()

    def log_coarea(self, x: Tensor) -> Tensor:
        return -self.weights[-1].abs().log() + torch.zeros_like(x[..., 0])


def linear_coordinates(
    elements: Elements, rows: Tensor, value: Tensor, what: str
) -> Transform:
    """Coordinates of ``{x in the supports: rows @ x = value}``.

    :param rows: shape ``(m, K)``.
    :param value: shape ``batch + (m,)``.
    :raises Infeasible: if no such state exists.
    :raises UnsupportedLaw: if the supports leave no way to solve for pivots.
    """
    real = elements.low.isinf() & elements.high.isinf()
    while real.dim() > 1:
        real = real.all(0)
    usable = torch.where(real, rows, torch.zeros_like(rows))
    if int(torch.linalg.matrix_rank(usable)) == len(rows):
        pivots = choose_pivots(usable)
        inverse = torch.linalg.inv(rows[:, pivots])
        log_slope = torch.linalg.det(rows[:, pivots]).abs().log()

        def solve(x: Tensor) -> Tensor:
            return (value - x @ rows.mT) @ inverse.mT

        return PivotTransform(elements, pivots, solve, lambda x: log_slope)
    if len(rows) > 1:
        raise UnsupportedLaw(
            f"{what}: a vector of macro values of elements that are all bounded has no "
            "coordinates here. Set one macro-variable, or use Explicit."
        )
    weights, value = rows[0], value[..., 0]
    if bool((weights == 0).any()):
        place = int((weights == 0).nonzero()[0, 0])
        raise UnsupportedLaw(
            f"{what}: element {place} has weight zero. Expected weights that count, "
            "for elements of bounded support: leave its site out of the macro-variable."
        )
    ends = torch.stack([elements.low * weights, elements.high * weights])
    low, high = ends.amin(0).sum(-1), ends.amax(0).sum(-1)
    inside = (value > low) & (value < high)
    if not bool(inside.all()):
        shape = inside.shape
        raise Infeasible(
            f"{what}: the macro value {value.expand(shape)[~inside][0].item():g} "
            "cannot be reached. Expected a number between "
            f"{low.expand(shape)[~inside][0].item():g} and "
            f"{high.expand(shape)[~inside][0].item():g}, the sums of the ends of the "
            "supports."
        )
    positive = (elements.low == 0) & elements.high.isinf()
    if bool(positive.all() & (weights > 0).all()):
        shares = elements.centre * weights
        shares = shares / shares.sum(-1, keepdim=True)
        return PositiveTransform(value, weights, shares)
    return IntervalTransform(elements, weights, value)


def smooth_coordinates(
    elements: Elements,
    total: Callable[[Tensor], Tensor],
    value: Tensor,
    states: Tensor,
    what: str,
) -> PivotTransform:
    """Coordinates of a fibre of a smooth map that is monotone in some element.

    :param total: the map, from ``(..., K)`` to ``(...)``.
    :param states: likely micro states, shape ``(n, ..., K)``, to choose the element.
    :raises UnsupportedLaw: if the map is monotone in none.
    """

    def slopes(x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            value = total(x).sum()
            if not value.requires_grad:
                raise UnsupportedLaw(
                    f"{what}: {total!r} has no derivative (it counts, rounds or "
                    "compares), and the sites are continuous, so that its fibre has no "
                    "coordinates. Use it for sites of finite support, or Explicit."
                )
            (result,) = torch.autograd.grad(value, x)
        return result

    size = states.shape[-1]
    real = (elements.low.isinf() & elements.high.isinf()).reshape(-1, size)[0]
    wide = torch.where(real, states + 5 * (states - states.flip(0)), states)
    found = slopes(torch.cat([states, wide])).flatten(0, -2)
    usable = ((found > 0).all(0) | (found < 0).all(0)).nonzero().flatten()
    if not len(usable):
        raise UnsupportedLaw(
            f"{what}: the map is monotone in no element of the micro state, so that "
            "its fibre cannot be written as a function of the others. Expected a map "
            "that rises or falls in one of them throughout its support. Use Explicit."
        )
    # The element on which the value depends most, for its own spread
    weight = found.abs().mean(0) * elements.spread.reshape(-1, size)[0]
    pivot = int(usable[weight[usable].argmax()])
    rising = bool(found[0, pivot] > 0)
    low, high = elements.low[..., pivot], elements.high[..., pivot]
    centre, spread = elements.centre[..., pivot], elements.spread[..., pivot]

    def put(x: Tensor, own: Tensor) -> Tensor:
        parts = [x[..., :pivot], own.unsqueeze(-1), x[..., pivot + 1 :]]
        return torch.cat(parts, -1)

    unbounded = low.isinf() & high.isinf()

    def at(z: Tensor) -> Tensor:
        return torch.where(unbounded, centre + spread * z, into(z, low, high))

    def solve(x: Tensor) -> Tensor:
        """Newton steps where they stay in a bracket that shrinks, and else halves."""
        z = torch.zeros_like(x[..., 0])
        left = torch.where(unbounded, -1e6, -60.0) + z
        right = -left
        for _ in range(100):
            with torch.enable_grad():
                z = z.detach().requires_grad_()
                miss = total(put(x.detach(), at(z))) - value.detach()
                (steepness,) = torch.autograd.grad(miss.sum(), z)
            above = (miss > 0) == rising
            left = torch.where(above, left, z.detach())
            right = torch.where(above, z.detach(), right)
            newton = z.detach() - miss.detach() / steepness
            inside = (newton > left) & (newton < right)
            moved = torch.where(inside, newton, (left + right) / 2)
            done = (moved - z).abs() <= 1e-9 * (1 + z.abs())
            z = moved
            if bool(done.all()):
                break
        # One more step, which carries the gradient
        own = at(z.detach())
        steepness = slopes(put(x, own))[..., pivot]
        own = own - (total(put(x, own)) - value) / steepness
        return own.unsqueeze(-1)

    def log_slope(x: Tensor) -> Tensor:
        with torch.enable_grad():
            own = x[..., pivot]
            moved = own if own.requires_grad else own.detach().requires_grad_()
            result = torch.autograd.grad(
                total(put(x, moved)).sum(), moved, create_graph=True
            )[0]
        # Nothing solves where the value is out of reach
        miss = (total(x) - value).abs() > 1e-6 * (1 + value.abs())
        wrong = (result > 0) != rising
        return torch.where(miss | wrong, torch.inf, result.abs().log())

    return PivotTransform(
        elements, torch.tensor([pivot], device=value.device), solve, log_slope
    )
