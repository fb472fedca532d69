# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The law of a continuous micro state for a range of macro values, fitted once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro.distributions.transforms as transforms
import torch
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.transforms import Transform
from tqdm.auto import trange

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.laws.base import MicroFibre, MicroLaw
from pyro_macro.laws.finite.tables import Fibre
from pyro_macro.laws.sampled.chains import OnFibre
from pyro_macro.program.substitution import apart


@dataclass(frozen=True)
class Flow:
    """An amortized law, for :class:`~pyro_macro.Natural` where none is exact.

    A conditional normalizing flow on the coordinates of the fibre, fitted by maximum
    likelihood to draws of the program itself, whose macro values lie in a range. It
    has a density, so that SVI and NUTS can use it, and says how far off it is.

    :param low: the least macro value that it is for.
    :param high: the largest.
    :param num_draws: of the program, with a macro value in the range.
    :param steps: of the optimizer.
    :param progress: whether to show a progress bar.
    """

    low: float
    high: float
    num_draws: int = 20_000
    steps: int = 1500
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.low < self.high:
            raise PyroMacroError(
                f"Flow: low={self.low}, high={self.high}. Expected a range of macro "
                "values, low below high."
            )


class FlowLaw(MicroLaw):
    """A fitted flow at some macro values.

    :param fitted: the flow.
    :param fibre: the fibre of these values, whose coordinates it is on.
    """

    has_rsample = True

    def __init__(
        self, fitted: FittedFlow, fibre: MicroFibre, dtype: torch.dtype
    ) -> None:
        self.fitted, self._fibre, self.dtype = fitted, fibre, dtype
        super().__init__(fibre.value.shape, Size([fitted.size]))

    @property
    def method(self) -> str:  # type: ignore[override]
        return self.fitted.method

    @property
    def cost(self) -> str:
        return f"fitted once; a network and {self.fitted.size} random numbers a draw"

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> MicroFibre:  # type: ignore[override]
        return self._fibre

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        noise = torch.randn(
            shape + Size([self.fitted.free]),
            dtype=torch.float64,
            device=self._fibre.value.device,
        )
        coordinates: Any = self._fibre.coordinates
        z = self.fitted.forward(noise, self._fibre.value.double().expand(shape))
        return coordinates(z).to(self.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        x = value.double().expand(shape + self.event_shape)
        coordinates: Any = self._fibre.coordinates
        z = coordinates.inv(x)
        density = self.fitted.log_prob(z, self._fibre.value.double().expand(shape))
        density = density - coordinates.log_abs_det_jacobian(z, x)
        return density.to(value.dtype)


class FittedFlow:
    """A conditional flow of free coordinates, given the macro value.

    :ivar off: how far off it is: the largest Kolmogorov-Smirnov distance between what
        held-out draws become and standard normal noise, over coordinates and random
        directions.
    """

    def __init__(self, z: Tensor, value: Tensor, options: Flow, what: str) -> None:
        self.options, self.free = options, z.shape[-1]
        self.size = self.free + 1
        self.centre, self.spread = z.mean(0), z.std(0)
        self._middle = (options.low + options.high) / 2
        self._half = (options.high - options.low) / 2
        dim = self.free
        layers: list[Any] = []
        for _ in range(2):
            if dim > 1:
                layers.append(
                    transforms.conditional_affine_autoregressive(dim, 1, [32, 32])
                )
                layers.append(
                    transforms.conditional_spline_autoregressive(
                        dim, 1, [32, 32], count_bins=8, bound=4.0
                    )
                )
                order = torch.randperm(dim).to(z.device)
                layers.append(transforms.permute(dim, order))
            else:
                layers.append(
                    transforms.conditional_spline(
                        1, 1, [32, 32], count_bins=16, bound=5.0
                    )
                )
        self.layers = layers
        train = torch.arange(len(z), device=z.device) % 5 != 0
        self._fit(z[train], value[train], what)
        with torch.no_grad():
            noise = self._backward(z[~train], value[~train])[0]
        self.off, self.held_out = _distance(noise), len(noise)

    @property
    def method(self) -> str:
        return (
            f"Monte Carlo: amortized flow for values from {self.options.low:g} to "
            f"{self.options.high:g}, off by {self.off:.3f} (largest "
            f"Kolmogorov-Smirnov distance over directions, {self.held_out} held-out "
            "draws)"
        )

    def _context(self, value: Tensor) -> Tensor:
        return ((value - self._middle) / self._half).unsqueeze(-1)

    def _fit(self, z: Tensor, value: Tensor, what: str) -> None:
        modules = [m for m in self.layers if isinstance(m, torch.nn.Module)]
        parameters = [p for m in modules for p in m.parameters()]
        for module in modules:
            module.to(device=z.device, dtype=torch.float64)
        steps = self.options.steps
        optimizer = torch.optim.Adam(parameters, lr=5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        bar = trange(steps, desc=f"flow for {what}", disable=not self.options.progress)
        for _ in bar:
            batch = torch.randint(len(z), (512,), device=z.device)
            loss = -self.log_prob(z[batch], value[batch]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        for parameter in parameters:
            parameter.requires_grad_(False)

    def _conditioned(self, value: Tensor) -> list[Transform]:
        context = self._context(value)
        return [
            layer.condition(context) if hasattr(layer, "condition") else layer
            for layer in self.layers
        ]

    def forward(self, noise: Tensor, value: Tensor) -> Tensor:
        """Free coordinates from noise, both of shape ``(..., free)``."""
        z = noise
        for layer in self._conditioned(value):
            z = layer(z)
        return self.centre + self.spread * z

    def _backward(self, z: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Noise, and the log volume of the way from it."""
        z = (z - self.centre) / self.spread
        volume = self.spread.log().sum() + torch.zeros_like(value)
        for layer in reversed(self._conditioned(value)):
            before = layer.inv(z)
            own = layer.log_abs_det_jacobian(before, z)
            volume = volume + (own.sum(-1) if own.dim() > volume.dim() else own)
            z = before
        return z, volume

    def log_prob(self, z: Tensor, value: Tensor) -> Tensor:
        """The log density of free coordinates given the macro value."""
        noise, volume = self._backward(z, value)
        normal = torch.distributions.Normal(torch.zeros_like(noise), 1.0)
        return normal.log_prob(noise).sum(-1) - volume


def _distance(noise: Tensor) -> float:
    """The largest Kolmogorov-Smirnov distance from the normal, over directions."""
    dim, noise = noise.shape[-1], noise.cpu()
    directions = torch.randn(50, dim, dtype=noise.dtype)
    directions = directions / directions.norm(dim=-1, keepdim=True)
    directions = torch.cat([torch.eye(dim, dtype=noise.dtype), directions])
    along = (noise @ directions.mT).sort(0).values  # (n, directions)
    uniform = torch.special.ndtr(along)
    steps = torch.arange(1, len(noise) + 1, dtype=noise.dtype).unsqueeze(-1)
    above = (steps / len(noise) - uniform).amax()
    below = (uniform - (steps - 1) / len(noise)).amax()
    return float(torch.maximum(above, below))


def fitted_flow(on_fibre: OnFibre, options: Flow) -> FittedFlow:
    """Draws from the program, and fits a flow to what they are given their totals.

    :raises UnsupportedLaw: if plates stay, or too few draws lie in the range.
    """
    fibre = on_fibre.fibre
    what = fibre.what
    outside = any(s.outside for s in on_fibre.upstream.shared.values())
    if fibre.layout.batch or outside or on_fibre.known:
        raise UnsupportedLaw(
            f"{what}: an amortized law is for one micro state at a time, and here "
            "plates stay around it, or sites are held that tell of its ancestors. Use "
            "Natural(value, sampler=Chains(...))."
        )
    with apart(torch.initial_seed() % (1 << 62)):
        on_fibre.refuse_chance()
        state = _draws(on_fibre, options)
        total = fibre.aggregation(state)
        each = Fibre(fibre.layout, fibre.aggregation, total, what)
        coordinates: Any = OnFibre(on_fibre.upstream, each, ()).coordinates()
        return FittedFlow(coordinates.inv(state).detach(), total, options, what)


def _draws(on_fibre: OnFibre, options: Flow) -> Tensor:
    """Micro states of the program with macro values in the range, ``(n, K)``."""
    fibre = on_fibre.fibre
    depth = max((-f.dim for f in _frames(on_fibre)), default=0)
    found: list[Tensor] = []
    count = tried = 0
    while count < options.num_draws:
        if tried >= 50 * options.num_draws:
            raise UnsupportedLaw(
                f"{fibre.what}: only {count} of {tried} draws of the program have a "
                f"macro value from {options.low:g} to {options.high:g}. Choose a range "
                "where it is found."
            )
        with torch.no_grad():
            drawn = on_fibre.run(on_fibre.held, {-1 - depth: options.num_draws})
        values = {n: drawn[n].double() for n in fibre.layout.names}
        state = fibre.layout.stack(values)
        state = state.reshape(-1, fibre.layout.size)
        total = fibre.aggregation(state)
        inside = (total >= options.low) & (total <= options.high)
        found.append(state[inside])
        count += int(inside.sum())
        tried += options.num_draws
    return torch.cat(found)[: options.num_draws]


def _frames(on_fibre: OnFibre) -> list[Any]:
    sites = on_fibre.reference.values()
    return [f for site in sites for f in site.frames if f.vectorized]
