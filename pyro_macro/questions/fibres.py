# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Where a micro-realization puts its micro states on a fibre, for pictures of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.handlers import macro_do
from pyro_macro.laws.cut import Cut, Model
from pyro_macro.laws.elements import bounds
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import (
    preserved_params,
    preserved_random_state,
    unwrapped,
)
from pyro_macro.program.reading import structural
from pyro_macro.program.substitution import detached
from pyro_macro.questions.sampling import Sampler
from pyro_macro.realizations import Realization

FEW = 200  # states that have a probability each
KERNELS = 4000  # draws that a density is estimated from

Density = Callable[[Tensor], Tensor]  # of points (n, K), up to a factor: (n,)


@dataclass(frozen=True, eq=False)
class OnFibre:
    """A micro-realization on its fibre.

    :ivar value: the macro value.
    :ivar draws: micro states, shape ``(n, K)``.
    :ivar states: those that have a probability each, shape ``(s, K)``, if all have.
    :ivar probabilities: of these, shape ``(s,)``.
    :ivar density: of points on the fibre, if no state has a probability.
    :ivar exact: whether the probabilities, or the density, are known, not estimated.
    """

    value: float
    draws: Tensor
    states: Tensor | None
    probabilities: Tensor | None
    density: Density | None
    exact: bool

    def labelled(self, name: str) -> str:
        """Its name, and whether it is estimated."""
        return name if self.exact else f"{name} (from draws)"

    @property
    def highest(self) -> float:
        """What counts as the largest density: it may be without bound at an end."""
        assert self.density is not None
        usual, high = self.density(self.draws[:1000]).quantile(_levels(0.5, 0.98))
        return min(float(high), 3 * float(usual))


class FibreProgram:
    """A model whose micro states are drawn, as they are and as they are set.

    :param model: the model, with its arguments.
    :param count: the number of draws.
    :param seed: of them; the random state is left as it was.
    :raises UnsupportedLaw: if the macro-variable is no weighted sum of the elements of
        one micro state.
    :ivar weights: of the elements in the macro value, shape ``(K,)``.
    """

    def __init__(
        self, model: Model, macro: MacroVariable, count: int, seed: int
    ) -> None:
        model = (structural(model[0]), *model[1:])
        self.model, self.macro = model, macro
        unseen = preserved_random_state()
        with torch.no_grad(), preserved_params(), detached(), unseen:
            self._cut = Cut(model, macro, {"effect": _random_sites(model)})
        self._sampler = Sampler(model, self._cut, count, seed)
        self._layout, self.what = self._cut.cause.layout, self._cut.cause.what
        if self._layout.batch_shape.numel() != 1:
            raise UnsupportedLaw(
                f"{self.what} stays in plates of shape "
                f"{tuple(self._layout.batch_shape)}, and has a fibre in each of their "
                "slots. Expected one: aggregate over the plates, or run the model with "
                "plates of size one."
            )
        flat = torch.zeros(self._layout.size, dtype=torch.float64)
        rows = macro.aggregation.within(self._layout).weights(flat)
        if rows is None or len(rows) != 1 or bool((rows == 0).any()):
            raise UnsupportedLaw(
                f"{self.what} is {macro.aggregation!r}. Expected a weighted sum of all "
                "elements, whose fibres are straight: Sum, Mean or Linear."
            )
        self.weights = rows[0].double().cpu()

    @property
    def elements(self) -> list[str]:
        """The names of the elements."""
        names: list[str] = []
        for name, size in zip(self._layout.names, self._layout.sizes, strict=True):
            names += [name] if size == 1 else [f"{name}[{i}]" for i in range(size)]
        return names

    def natural(self) -> Tensor:
        """Micro states of the model as it is, shape ``(n, K)``."""
        return self._drawn(self.model[0])[0]

    def limits(self) -> tuple[Tensor, Tensor]:
        """The ends of the supports of the elements, shapes ``(K,)``."""
        ends: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name in self._layout.names:
            site = self._cut.sites[name]
            like = site.value.double()
            for end, found in zip(ends, bounds(unwrapped(site.fn), like), strict=True):
                end[name] = found + torch.zeros_like(like)
        low, high = (self._layout.stack(end).reshape(-1).cpu() for end in ends)
        return low, high

    def under(self, way: Realization) -> OnFibre:
        """Where a realization puts the micro states.

        :raises UnsupportedLaw: if the macro value is not the same in all draws.
        """
        fn = macro_do(self.model[0], {self.macro: way})
        draws, totals = self._drawn(fn)
        value = float(totals[0])
        if bool((totals - value).abs().max() > 1e-3 * (1 + abs(value))):
            raise UnsupportedLaw(
                f"{self.what} differs between draws of {type(way).__name__}, so that "
                "there is no one fibre. Expected a realization with one value, such as "
                "Natural(value); Shift moves micro states from one fibre to another."
            )
        found = None if way.given or way.acts_on_natural else self._law(fn, draws)
        states, counts = draws.unique(dim=0, return_counts=True)
        if len(states) <= min(FEW, len(draws) // 4):
            if found is None:
                exact, chances = len(states) == 1, counts / counts.sum()
                return OnFibre(value, draws, states, chances, None, exact)
            listed = found.listed()
            states = states if listed is None else listed
            return OnFibre(value, draws, states, found(states), None, True)
        density = self._estimated(draws) if found is None else found
        return OnFibre(value, draws, None, None, density, found is not None)

    def _drawn(self, fn: Callable[..., Any]) -> tuple[Tensor, Tensor]:
        """Micro states, and their macro values."""
        quantities = [*self._cut.micro_sites, self._cut.cause]
        *parts, totals = self._sampler.draw(fn, quantities)
        states = self._layout.stack(self._cut.as_values(parts)).double().cpu()
        return states.reshape(len(totals), -1), totals.flatten().cpu()

    def _law(self, fn: Callable[..., Any], draws: Tensor) -> _Law | None:
        """That of the latent site, if it has a density, the same in each run."""
        first, second = self._latent(fn), self._latent(fn)
        if first is None or second is None:
            return None
        same = torch.allclose(first(draws[:50]), second(draws[:50]), rtol=1e-4)
        return first if same else None

    def _latent(self, fn: Callable[..., Any]) -> _Law | None:
        # Points of a picture lie off the support, too, where there is no density
        with self._sampler.unseen(), pyro.validation_enabled(False):
            nodes = poutine.trace(fn).get_trace(*self.model[1], **self.model[2]).nodes
        node: Any = nodes.get(f"{self.macro.name}__micro")
        if node is None:
            return None
        law = _Law(node["fn"], node["value"].detach())
        try:
            law(law.like.reshape(1, -1))
        except (NotImplementedError, PyroMacroError):  # it is known by draws
            return None
        return law

    def _estimated(self, draws: Tensor) -> Density:
        """A density on a fibre, in all elements but the last, by Gaussian kernels."""
        free = draws[:KERNELS, :-1]
        n, d = free.shape
        covariance = 1.5 * torch.cov(free.T).reshape(d, d) * n ** (-2 / (d + 4))
        whiten = torch.linalg.inv(torch.linalg.cholesky(covariance)).mT
        centres = free @ whiten
        factor = float(torch.linalg.det(whiten).abs()) / (n * (2 * pi) ** (d / 2))
        low, high = self.limits()

        def density(points: Tensor) -> Tensor:
            distance = torch.cdist(points[:, :-1] @ whiten, centres)
            inside = ((points >= low) & (points <= high)).all(-1)
            return (-0.5 * distance.square()).exp().sum(-1) * factor * inside

        return density


class _Law:
    """The density of a latent site, zero off its support."""

    def __init__(self, law: Any, like: Tensor) -> None:
        self.law, self.like = law, like

    def __call__(self, points: Tensor) -> Tensor:
        lead = points.shape[:1] + (1,) * len(self.law.batch_shape)
        whole = points.reshape(lead + points.shape[-1:]).to(self.like)
        with torch.no_grad(), pyro.validation_enabled(False):
            inside = self.law.support.check(whole)
            density = self.law.log_prob(whole).double().exp()
        # A support that a user has put together may say less than the density does
        known = torch.where(inside & ~density.isnan(), density, 0.0)
        return known.reshape(-1).cpu()

    def listed(self) -> Tensor | None:
        """All states that have a probability, where the law can list them."""
        if not self.law.has_enumerate_support:
            return None
        states = self.law.enumerate_support().double().cpu()
        return states.reshape(-1, states.shape[-1])


def extent(draws: Tensor, ends: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Where nearly all draws are, up to the ends of the supports that are near."""
    low, high = draws.quantile(_levels(0.0005, 0.9995), 0)
    gap = (high - low).clamp(min=1e-6)
    near = (low - ends[0] < 0.3 * gap, ends[1] - high < 0.3 * gap)
    return (
        torch.where(near[0], ends[0], low - 0.08 * gap),
        torch.where(near[1], ends[1], high + 0.08 * gap),
    )


def _levels(*levels: float) -> Tensor:
    return torch.tensor(levels, dtype=torch.float64)


def _random_sites(model: Model) -> list[str]:
    """The sites of a model: a picture has to draw all of it."""
    with poutine.block():
        nodes = poutine.trace(model[0]).get_trace(*model[1], **model[2]).nodes
    return [
        name
        for name, node in nodes.items()
        if node["type"] == "sample"
        and not site_is_subsample(node)
        and not site_is_factor(node)
    ]
