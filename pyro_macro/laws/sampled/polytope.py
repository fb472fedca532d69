# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The uniform law on a box that is cut by a hyperplane."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.laws.base import MicroFibre, MicroLaw
from pyro_macro.laws.elements import Elements
from pyro_macro.laws.sampled.coordinates import IntervalTransform


class UniformOnPolytope(MicroLaw):
    """Uniform on ``{low <= x <= high, weights @ x = value}``, by hit and run.

    Each draw is the end of a walk of its own: from the centre, along random directions
    within the hyperplane, to a uniform point of the chord (Smith 1984). The density is
    exact, with respect to the elements without the last one.

    :param elements: of the micro state.
    :param weights: shape ``(K,)``, none zero.
    :param value: shape ``batch``, strictly between the sums of the ends.
    :param dtype: of the draws.
    :param steps: of each walk; by default ``20 K``, at least 100.
    """

    def __init__(
        self,
        elements: Elements,
        weights: Tensor,
        value: Tensor,
        dtype: torch.dtype,
        steps: int | None = None,
    ) -> None:
        self.weights, self.value, self.dtype = weights, value, dtype
        self.elements = elements
        ends = torch.stack([elements.low * weights, elements.high * weights])
        low, high = ends.amin(0), ends.amax(0)
        # An end that is infinite is as far as the others leave room
        if bool(low.isfinite().all()):
            others = low.sum(-1, keepdim=True) - low
            high = torch.minimum(high, value.unsqueeze(-1) - others)
        else:
            others = high.sum(-1, keepdim=True) - high
            low = torch.maximum(low, value.unsqueeze(-1) - others)
        self.low, self.range = low, (high - low)  # of the terms of the sum
        count = weights.shape[-1]
        self.steps = max(100, 20 * count) if steps is None else steps
        shape = torch.broadcast_shapes(low.shape[:-1], value.shape)
        super().__init__(shape, Size([count]))

    @property
    def method(self) -> str:  # type: ignore[override]
        return f"Monte Carlo: uniform, hit and run of {self.steps} steps a draw"

    @property
    def cost(self) -> str:
        return f"{self.steps} steps of {self.event_shape[0]} random numbers a draw"

    @property
    def _left(self) -> Tensor:
        return self.value - self.low.sum(-1)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        with torch.no_grad():
            width = self.range
            share = (self._left / width.sum(-1)).unsqueeze(-1)
            now = (width * share).expand(shape)
            for _ in range(self.steps):
                step = torch.randn_like(now) * width
                # Within the hyperplane; wide elements take up what is left
                step = step - width * (
                    step.sum(-1, keepdim=True) / width.sum(-1, keepdim=True)
                )
                ahead, back = (width - now) / step, -now / step
                most = torch.where(step > 0, ahead, back).amin(-1, keepdim=True)
                least = torch.where(step > 0, back, ahead).amax(-1, keepdim=True)
                at = least + (most - least) * torch.rand_like(most)
                now = (now + at * step).clamp(min=0).minimum(width)
            miss = self._left.unsqueeze(-1) - now.sum(-1, keepdim=True)
            now = now + miss * (width / width.sum(-1, keepdim=True))
            return ((self.low + now) / self.weights).to(self.dtype)

    @property
    def log_volume(self) -> Tensor:
        """The log volume of the coordinates without the last one, shape ``batch``."""
        count = self.event_shape[0]
        density = log_sum_density(self._left, self.range)
        lengths = (self.range / self.weights.abs()).log().sum(-1)
        return density + lengths + self.weights[..., -1].abs().log() * (count > 0)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        inside = self.support.check(value)
        result = torch.where(inside, -self.log_volume, -torch.inf)
        return result.to(value.dtype).expand(
            torch.broadcast_shapes(result.shape, self.batch_shape)
        )

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> MicroFibre:  # type: ignore[override]
        low, high = self.elements.low, self.elements.high
        slack = 1e3 * torch.finfo(self.dtype).eps
        return MicroFibre(
            lambda x: (
                (x >= low - slack * (1 + x.abs())) & (x <= high + slack * (1 + x.abs()))
            ),
            lambda x: x @ self.weights.to(x),
            self.value,
            IntervalTransform(self.elements, self.weights, self.value),
        )


def log_sum_density(at: Tensor, width: Tensor) -> Tensor:
    """The log density of a sum of independent uniforms on ``[0, width]``.

    :param at: shape ``batch``.
    :param width: shape ``batch + (K,)``.
    """
    at = torch.minimum(at, width.sum(-1) - at)  # the nearer end cancels less
    series = _by_series(at, width)
    if width.shape[-1] > 12:
        return series
    sums, rounding = _by_corners(at, width)
    exact = (sums > 0) & (rounding < 1e-9 * sums)
    return torch.where(exact, sums.clamp(min=1e-300).log(), series)


def _by_corners(at: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
    """Inclusion and exclusion over the corners of the box, and its rounding."""
    count = width.shape[-1]
    corners = torch.cartesian_prod(*[torch.arange(2.0)] * count)
    corners = corners.reshape(-1, count).to(width)
    sign = 1 - 2 * (corners.sum(-1) % 2)
    beyond = (at.unsqueeze(-1) - width @ corners.mT).clamp(min=0)
    powers = beyond.pow(count - 1) * (beyond > 0)
    unit = width.prod(-1) * math.factorial(count - 1)
    rounding = torch.finfo(width.dtype).eps * powers.sum(-1)
    return (sign * powers).sum(-1) / unit, rounding / unit


def _by_series(at: Tensor, width: Tensor) -> Tensor:
    """The Fourier series of the density, tilted so that ``at`` is its mean.

    A density on an interval is its Fourier series there; tilting keeps the terms from
    cancelling far out.
    """
    theta = _tilt(at, width)
    tilted = theta.unsqueeze(-1) * width  # not positive
    # log of the integral of exp(theta x) over [0, width], divided by width
    safe = torch.where(tilted < -1e-6, tilted, -1.0)
    scale = torch.where(tilted < -1e-6, (torch.expm1(safe) / safe).log(), tilted / 2)
    period = 1.01 * width.sum(-1)
    n = torch.arange(1, 1 << 14, device=width.device).to(width)
    wave = n * (2 * math.pi / period).unsqueeze(-1)  # (..., n)
    exponent = torch.complex(
        tilted.unsqueeze(-2), wave.unsqueeze(-1) * width.unsqueeze(-2)
    )
    terms = (exponent.exp() - 1) / exponent / scale.exp().unsqueeze(-2)
    phase = torch.polar(torch.ones_like(wave), -wave * at.unsqueeze(-1))
    series = (terms.prod(-1) * phase).real.sum(-1)
    density = ((1 + 2 * series) / period).clamp(min=1e-300)
    return density.log() + scale.sum(-1) - theta * at


def _tilt(at: Tensor, width: Tensor) -> Tensor:
    """The ``theta`` under which the sum has mean ``at``, by bisection."""
    low = -2 * width.shape[-1] / at
    high = torch.zeros_like(at)
    for _ in range(60):
        theta = (low + high) / 2
        tilted = theta.unsqueeze(-1) * width
        safe = torch.where(tilted < -1e-4, tilted, -1.0)
        exact = width * (1 / (1 - (-safe).exp()) - 1 / safe)
        near = width * (0.5 + tilted / 12)
        mean = torch.where(tilted < -1e-4, exact, near).sum(-1)
        low = torch.where(mean < at, theta, low)
        high = torch.where(mean < at, high, theta)
    return theta
