# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_macro.errors import (
    Infeasible,
    NotAffine,
    PyroMacroError,
    UnknownSite,
    UnsupportedLaw,
)
from pyro_macro.laws.base import MicroLaw
from pyro_macro.laws.cut import Cut
from pyro_macro.laws.finite.effect import FiniteEffect
from pyro_macro.laws.finite.joint import TooMany
from pyro_macro.laws.finite.listed import ListedLaw
from pyro_macro.laws.gaussian.effect import AffineEffect
from pyro_macro.laws.gaussian.fibre import NaturalNormal
from pyro_macro.laws.gaussian.inhibiting import (
    LeverNormal,
    Stretch,
    StretchedNormal,
    lever_direction,
    times,
)
from pyro_macro.laws.quantity import Thing, name_of
from pyro_macro.macro import MacroVariable
from pyro_macro.program.layout import Layout
from pyro_macro.realizations.base import MicroState, Realization, Realized

NARROW = ". Prices (alpha) further apart would make room."


@dataclass(frozen=True, eq=False)
class Inhibiting(Realization):
    """A micro-realization that makes ``P(effect | do(value)) = P(effect | value)``.

    Section 3.2.1: in a jointly affine-Gaussian program ``Yb = alpha.X + N``, with
    ``N`` correlated with ``X`` but not its descendant, there is such a Gaussian if and
    only if ``Var(Yb | xb) >= Var(N)`` (9) and ``alpha`` is no multiple of the weights
    of the sum. ``alpha`` and ``N`` are found in the program. Of all such Gaussians this
    is the least intrusive: the closest to the natural micro-realization, in
    Wasserstein-2 distance with the Euclidean distance of micro states, in their units.

    In a program of finite sites it is a mixture of micro states, found by a linear
    program for each macro value: of all, the closest to the natural one in total
    variation. Its weights are constants: no gradients flow through them.

    Observations of what follows from the micro state are no part of
    ``P(effect | value)``, as they are none of the natural realization: data of the
    effect may be there when parameters are learned.

    :param value: the macro value.
    :param effect: a macro-variable, or the name of a site: one number.
    :param levers: the sites (or indices of elements) that are moved; the others follow
        their own law, as under :class:`~pyro_macro.Residual`. All by default. Only in
        affine-Gaussian programs.
    :raises Infeasible: if there is none, with both sides of (9).

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    ...     z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
    ...     x1, x2 = pyro.deterministic("x1", z1), pyro.deterministic("x2", z2)
    ...     pyro.deterministic("revenue", x1 + 3 * x2 + (z1 + z2) / 2)
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> inhibited = pm.macro_do(shop, {sales: pm.Inhibiting(2.0, "revenue")})
    >>> pyro.poutine.trace(inhibited).get_trace().nodes["sales__micro"]["fn"].mean
    tensor([0.5000, 1.5000])
    """

    value: float | Tensor
    effect: Thing
    levers: Sequence[str | int] | None = None
    looks_downstream = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.effect, (str, MacroVariable)):
            raise PyroMacroError(
                f"Inhibiting: effect is {self.effect!r}. Expected a MacroVariable, or "
                "the name of a site."
            )

    def realize(self, state: MicroState) -> Realized:
        value = state.tensor(self.value, "value")
        program = state.program
        groups: dict[str, Sequence[Thing]] = {"effect": (self.effect,)}
        cut = Cut(program.model, state.macro, groups, program.shared, forget=True)
        cut.refuse_observed()
        cut.refuse_overlap()
        self._refuse_vectors(cut)
        try:
            effect = AffineEffect(cut, cut.is_differentiable())
        except NotAffine as error:
            return self._finite(state, cut, value, error)
        return self._affine(state, effect, value)

    def _refuse_vectors(self, cut: Cut) -> None:
        effect = cut.others["effect"][0]
        if effect.size != 1 or cut.cause.layout.batch_shape.numel() != 1:
            raise UnsupportedLaw(
                f"{cut.cause.what}: it has shape {tuple(cut.cause.shape)}, the effect "
                f"{effect.name!r} {tuple(effect.shape)}. Expected one macro-variable "
                "and one number as its effect: aggregate over their plates."
            )

    def _affine(
        self, state: MicroState, effect: AffineEffect, value: Tensor
    ) -> Realized:
        law = state.gaussian()
        rows, values, pivots = state.fibre(law, value)
        levers = self._levers(state)
        base: NaturalNormal
        if levers is None:
            base = NaturalNormal(law.loc, law.covariance, rows, values, pivots)
        else:
            self._refuse_stuck(state, rows, levers)
            base = LeverNormal(
                law.loc, law.covariance, rows, values, pivots, levers=levers
            )
        alpha = _stacked(effect.alpha[0], effect.cut, law.layout).to(law.loc.device)
        direction = lever_direction(rows, alpha, levers)
        centre = base._onto(base.loc)
        seen = effect.effect_given(values.to(effect.loc))
        wanted = (seen.mean[..., 0] - effect.noise_mean[0]).to(alpha) - centre @ alpha
        variance = seen.variance[..., 0] - effect.noise_covariance[0, 0]
        variance = variance.to(alpha)
        own = times(base, alpha) @ alpha
        micro = self._moved(
            state, effect, base, alpha, direction, (wanted, variance, own)
        )
        if isinstance(micro, MicroLaw):
            micro.method = law.method
        return Realized(micro, law.layout)

    def _moved(
        self,
        state: MicroState,
        effect: AffineEffect,
        base: NaturalNormal,
        alpha: Tensor,
        direction: Tensor,
        moments: tuple[Tensor, Tensor, Tensor],
    ) -> Any:
        """The law that is moved least, from three moments of ``alpha.X``.

        :param moments: how far its mean has to move, what its variance has to be, and
            what it is before.
        """
        wanted, variance, own = moments
        eps = torch.finfo(state.like.dtype).eps
        left = variance + effect.noise_covariance[0, 0]
        rounding = 100 * eps * (left + effect.noise_covariance[0, 0])
        short = variance < -rounding
        spread = (left + effect.noise_covariance[0, 0]).sqrt()
        if bool((direction == 0).all()):
            off = wanted.abs() > 100 * eps**0.5 * spread
            off = off | ((variance - own).abs() > 100 * eps**0.5 * spread.square())
            if bool(off.any()):
                self._refuse(effect, left, _no_lever(self.levers))
            return base.to(state.like.dtype)
        if bool(short.any()):
            self._refuse(effect, left, "")
        if bool((variance > rounding).all()):
            factor = (variance / own).sqrt()
            stretch = Stretch(alpha, direction, factor, wanted)
            return StretchedNormal(base, stretch).to(state.like.dtype)
        return self._without_spread(state, base, alpha, wanted)

    def _without_spread(
        self, state: MicroState, base: NaturalNormal, alpha: Tensor, wanted: Tensor
    ) -> Any:
        """Both sides of (9) are equal: ``alpha.X`` is a constant, too."""
        if self.levers is not None:
            raise UnsupportedLaw(
                f"{state.what}: Var({name_of(self.effect)} | value) equals the "
                "variance of the noise, so that alpha.X has to be constant, which is "
                "done with all elements only. Leave out levers."
            )
        goal = base._onto(base.loc) @ alpha + wanted
        rows = torch.cat([base.rows, alpha.unsqueeze(0)])
        batch = torch.broadcast_shapes(goal.shape, base.value.shape[:-1])
        parts = [base.value, goal.unsqueeze(-1)]
        value = torch.cat([p.expand(batch + p.shape[-1:]) for p in parts], -1)
        dtype = state.like.dtype
        if rows.shape[0] == rows.shape[1]:
            point = value @ torch.linalg.inv(rows).mT
            return dist.Delta(point.to(dtype), event_dim=1)
        return NaturalNormal(base.loc, base.covariance, rows, value).to(dtype)

    def _refuse(self, effect: AffineEffect, left: Tensor, more: str) -> None:
        noise = float(effect.noise_covariance[0, 0])
        seen = float(left.reshape(-1)[0])
        both = f"Var(effect | value) = {seen:g}", f"Var(N) = {noise:g}"
        if seen < noise:
            said = (
                f"{both[0]} < {both[1]} for the part N that does not go through the "
                "micro state, and (9) asks for at least that"
            )
        else:
            said = f"(9) holds, {both[0]} >= {both[1]}, but"
        raise Infeasible(
            f"{effect.cause.what}: no Gaussian micro-realization inhibits the "
            f"confounding with {effect.effect.name!r}: {said}"
            + (more if seen >= noise else NARROW)
        )

    def _levers(self, state: MicroState) -> Tensor | None:
        if self.levers is None:
            return None
        if isinstance(self.levers, (str, int)) or not len(self.levers):
            raise PyroMacroError(
                f"{state.what}: levers={self.levers!r}. Expected a list of micro sites "
                "or indices of elements."
            )
        layout = state.layout
        found: list[int] = []
        for lever in self.levers:
            if isinstance(lever, str):
                if lever not in layout.names:
                    raise UnknownSite.named(
                        f"{state.what}: levers", lever, layout.names
                    )
                found.extend(layout.place(lever))
            elif not isinstance(lever, int) or not 0 <= lever < layout.size:
                raise PyroMacroError(
                    f"{state.what}: lever {lever!r} is no element of a micro state of "
                    f"{layout.size}. Expected 0 to {layout.size - 1}."
                )
            else:
                found.append(lever)
        return torch.tensor(sorted(set(found)), device=state.like.device)

    def _refuse_stuck(self, state: MicroState, rows: Tensor, levers: Tensor) -> None:
        if int(torch.linalg.matrix_rank(rows[:, levers])) < len(rows):
            raise PyroMacroError(
                f"{state.what}: levers={self.levers!r} cannot set the macro value: "
                "their weights in it are zero, or too few. Name elements that count."
            )

    def _finite(
        self, state: MicroState, cut: Cut, value: Tensor, why: Exception
    ) -> Realized:
        if not FiniteEffect.is_finite(cut):
            raise UnsupportedLaw(
                f"{why} Inhibiting realizations are known for affine-Gaussian and for "
                "finite programs."
            ) from why
        if self.levers is not None:
            raise UnsupportedLaw(
                f"{state.what}: levers are for affine-Gaussian programs. Leave them "
                "out."
            )
        try:
            effect = FiniteEffect(cut)
        except TooMany as error:
            raise UnsupportedLaw(
                f"{state.what}: {error}, so that its tables cannot be had."
            ) from error
        event_dim = state.macro.aggregation.event_dim
        batch = value.shape[: value.dim() - event_dim]
        index = effect.find(value.reshape(-1, max(1, cut.cause.size)).cpu())
        if bool((index < 0).any()):
            raise Infeasible(
                f"{state.what}: the macro value {value.tolist()} cannot be reached."
            )
        weights = torch.stack([self._mixed(state, effect, int(i)) for i in index])
        states = state.layout.stack(effect.micro_values())
        states = states.reshape(len(effect.states), -1)
        law = ListedLaw(
            states,
            weights.reshape(*batch, -1).to(states.device),
            state.like.dtype,
            "exact: finite, a linear program",
        )
        return Realized(law, state.layout)

    def _mixed(self, state: MicroState, effect: FiniteEffect, index: int) -> Tensor:
        inside, found = effect.inhibited(index)
        if found.gap:
            raise Infeasible(
                f"{state.what}: no micro-realization of "
                f"{effect.causes[index].tolist()} inhibits the confounding with "
                f"{effect.effect.name!r}: the mixture of micro states that comes "
                "closest to P(effect | value) is a total "
                f"variation distance of {found.gap:.3g} away."
            )
        weights = effect.states.new_zeros(len(effect.states))
        weights[inside] = found.weights
        return weights / weights.sum()


def _no_lever(levers: Any) -> str:
    if levers is None:
        return (
            " the effect moves with the macro value alone (alpha is a multiple of its "
            "weights), so that all micro-realizations have the same effect."
        )
    return f" the levers {list(levers)} cannot move the effect without the sum."


def _stacked(flat: Tensor, cut: Cut, layout: Layout) -> Tensor:
    """Coefficients of the micro state, site by site, in the order of a layout."""
    names = cut.cause.sites
    shapes = [cut.sites[name].shape for name in names]
    parts = flat.split([shape.numel() for shape in shapes])
    values = {
        name: part.reshape(shape)
        for name, part, shape in zip(names, parts, shapes, strict=True)
    }
    return layout.stack(values).reshape(-1)
