# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""An effect as a function of a micro state, in a jointly affine-Gaussian program.

``Yb = alpha.X + N`` is found in the program, not declared: the micro sites are cut
from what is behind them, and the derivatives of the effect with respect to their
values are ``alpha``. What else moves it is ``N``, which may well depend on the same
noise as the micro state.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import NotAffine
from pyro_macro.laws.cut import Cut, over_grid
from pyro_macro.laws.gaussian.derivatives import agree
from pyro_macro.laws.moments import Moments, inverse
from pyro_macro.laws.quantity import Quantity
from pyro_macro.program.layout import Layout
from pyro_macro.program.noise import Key, Noise, NoiseRun, NoiseView, noise_form


class AffineEffect:
    """``Yb = alpha.X + N``, equation (7), with all joint moments.

    Quantities are vectors: of length ``b`` for the cause, ``e`` for the effect. They
    are in float64 on the CPU, wherever the program is.

    :param cut: the program; its group of quantities ``"effect"`` is the effect.
    :param differentiable: whether gradients are to flow to the program's parameters.
    :raises NotAffine: if the program is not jointly affine-Gaussian, saying why.
    :ivar alpha: by micro site, shape ``(e,)`` and then that of the site.
    :ivar noise_mean: ``E[N]``, shape ``(e,)``.
    """

    def __init__(self, cut: Cut, differentiable: bool = False) -> None:
        self.cut, self.cause = cut, cut.cause
        self._differentiable = differentiable
        (self.effect,) = cut.others["effect"]
        self._refuse()
        zero = cut.zero
        self._noises = list(zero.noises.values())
        with torch.enable_grad():
            self._read(zero)

    def _refuse(self) -> None:
        cut, what = self.cut, self.cause.what
        relevant = cut.relevant_sites
        for name in sorted(relevant & set(cut.zero.opaque)):
            raise NotAffine(
                f"{what}: site {name!r} is not Gaussian, so that the program is not "
                "jointly affine-Gaussian."
            )
        for name in sorted(relevant):
            if cut.sites[name].kinks:
                raise NotAffine(
                    f"{what}: {name!r} is computed with {sorted(cut.sites[name].kinks)}"
                    ", so that the program is not jointly affine-Gaussian."
                )

    def _quantities(self) -> list[Quantity]:
        return [q for group in self.cut.others.values() for q in group]

    def _read(self, zero: NoiseRun) -> None:
        cut = self.cut
        natural = {n: zero.expressions[n] for n in self.cause.sites}
        leaves = [
            Noise((n, "set"), leaf, cut.sites[n].frames, len(cut.sites[n].event_shape))
            for n, leaf in zero.leaves.items()
        ]
        values = {n: s.value for n, s in zero.sites.items()}
        state = torch.cat([natural[n].reshape(-1) for n in self.cause.sites])
        rows = [self.cause.of(natural)] + [q.of(values) for q in self._quantities()]
        keep = self._differentiable
        self._state = NoiseView(state, self._noises, keep)
        self.loc = self._plain(state)  # E[X], site by site
        self._coefficients: list[Tensor] = []  # (size, noises) of each quantity
        self.loadings: list[Tensor] = []  # (size, elements of the micro state)
        means = [self._plain(rows[0])]
        self._coefficients.append(self._matrix(NoiseView(rows[0], self._noises, keep)))
        self.own: list[Tensor] = []  # the noise's share: what is not through X
        for row in rows[1:]:
            view = NoiseView(row, [*self._noises, *leaves], keep)
            found = view.backward(_identity(row)) if view.noises else {}
            loading = torch.cat(
                [
                    found[leaf.key].reshape(len(row), -1)
                    if leaf.key in found
                    else leaf.leaf.new_zeros(len(row), leaf.leaf.numel())
                    for name in self.cause.sites
                    for leaf in leaves
                    if leaf.key[0] == name
                ],
                -1,
            )
            own = self._flat(found, len(row))
            through = self._flat(self._state.backward(loading.to(state)), len(row))
            self.loadings.append(self._plain(loading))
            self.own.append(own)
            self._coefficients.append(own + through)
            # The micro state that was set is a leaf; derivatives go on behind it
            onward = self.loadings[-1] @ (self.loc - self.loc.detach())
            means.append(self._plain(row) + onward)
        self._means = means
        self._check(state, rows[1:])

    def _plain(self, tensor: Tensor) -> Tensor:
        return (tensor if self._differentiable else tensor.detach()).cpu().double()

    def _matrix(self, view: NoiseView) -> Tensor:
        rows = len(view.output)
        return self._flat(view.backward(_identity(view.output)), rows)

    def _flat(self, gradients: Mapping[Key, Tensor], rows: int) -> Tensor:
        parts = [
            gradients[n.key].reshape(rows, -1).cpu().double()
            if n.key in gradients
            else torch.zeros(rows, n.leaf.numel(), dtype=torch.float64, device="cpu")
            for n in self._noises
        ]
        if not parts:
            return torch.zeros(rows, 0, dtype=torch.float64, device="cpu")
        return self._plain(torch.cat(parts, -1))

    def _check(self, state: Tensor, rows: list[Tensor]) -> None:
        """The derivatives have to predict two runs under large noise."""
        zero, names = self.cut.zero, self.cause.sites
        floating = [s.value for s in zero.sites.values() if s.value.is_floating_point()]
        eps = max(torch.finfo(value.dtype).eps for value in floating)
        for probe in self.cut.probes:
            if any(n.key not in probe.drawn for n in self._noises):
                self._refuse_bent("the sites that are met")
            noise = [_flat(probe.drawn[n.key]) for n in self._noises]
            drawn = torch.cat(
                [*noise, torch.zeros(0, dtype=torch.float64, device="cpu")]
            )
            known = {n.key: probe.drawn[n.key].unsqueeze(0) for n in self._state.noises}
            found = torch.cat([probe.expressions[n].reshape(-1) for n in names])
            if not agree(state, [self._state.forward(known)[0]], found, eps):
                self._refuse_bent("the micro state")
            moves = [probe.leaves[n] - zero.leaves[n] for n in names]
            moved = torch.cat([_flat(move) for move in moves])
            values = {n: s.value for n, s in probe.sites.items()}
            for i, quantity in enumerate(self._quantities()):
                parts = [self.own[i] @ drawn, self.loadings[i] @ moved]
                start, found = _flat(rows[i]), _flat(quantity.of(values))
                if not agree(start, parts, found, eps):
                    self._refuse_bent(quantity.what)

    def _refuse_bent(self, what: str) -> None:
        raise NotAffine(
            f"{self.cause.what}: the program is not jointly affine-Gaussian: with "
            f"larger noise, {what} is not where its derivative says."
        )

    @property
    def alpha(self) -> Tensor:
        """Shape ``(e, K)``: elements site by site, each site in its own order."""
        return self.loadings[0]

    @property
    def noise_mean(self) -> Tensor:
        """``E[N]``: the effect's mean without what goes through the micro state."""
        return self._means[1] - self.alpha @ self.loc

    @property
    def noise_covariance(self) -> Tensor:
        """``Cov(N)``, shape ``(e, e)``."""
        return self.own[0] @ self.own[0].mT

    @cached_property
    def crossed(self) -> Tensor:
        """``Cov(X, N)``, shape ``(K, e)``."""
        return self.covariance_with_state(self.own[0])

    def covariance_with_state(self, coefficients: Tensor) -> Tensor:
        """``Cov(X, S)`` for ``S`` with some coefficients, shape ``(K, rows)``."""
        if not self._noises or not self._state.noises:
            return torch.zeros(
                len(self.loc), len(coefficients), dtype=torch.float64, device="cpu"
            )
        sizes = [n.leaf.numel() for n in self._noises]
        parts = coefficients.split(sizes, -1)
        directions = {
            n.key: part.reshape((-1, *n.leaf.shape)).to(n.leaf)
            for n, part in zip(self._noises, parts, strict=True)
            if any(n.key == known.key for known in self._state.noises)
        }
        return self._plain(self._state.forward(directions).mT)

    @property
    def natural_coefficient(self) -> Tensor:
        """``alpha . Cov(X, Xb) / Var(Xb)``, shape ``(e,)``: for a cause that is one."""
        through = self._coefficients[1] - self.own[0]
        (row,) = self._coefficients[0]
        return through @ row / (row @ row)

    def through(self) -> Moments:
        """Of ``Xb`` and ``alpha.X``, the effect's part that goes through ``X``."""
        through = self._coefficients[1] - self.own[0]
        rows = torch.cat([self._coefficients[0], through])
        means = torch.cat([self._means[0], self._means[1] - self.noise_mean])
        return Moments(means, rows @ rows.mT)

    def by_site(self, vector: Tensor) -> Tensor:
        """A vector in the order of the cause's layout, site by site."""
        values = self.cause.layout.unstack(vector)
        return torch.cat([values[name].reshape(-1) for name in self.cause.sites])

    def crossed_given_others(self) -> tuple[Tensor, Tensor]:
        """``Cov(X, N | b)`` given the other quantities, and its scale: ``(K, e)``."""
        crossed, own = self.crossed, self.own[0]
        scale = crossed.abs()
        if len(self._coefficients) > 2:
            rows = torch.cat(self._coefficients[2:])
            known = inverse(rows @ rows.mT) @ (rows @ own.mT)
            explained = self.covariance_with_state(known.mT @ rows)
            scale = scale + explained.abs()
            crossed = crossed - explained
        # What no correlation would be: that of a typical element with the noise
        spread = self._coefficients[0].square().sum(-1).mean().sqrt()
        usual = own.square().sum(-1).sqrt() * spread / len(self.loc) ** 0.5
        return crossed, scale + usual

    def joint(self, groups: Sequence[int] | None = None) -> Moments:
        """Of the cause and the other quantities, in the order in which they stand.

        :param groups: 0 for the cause, 1 for the effect, and so on; all by default.
        """
        chosen = range(len(self._means)) if groups is None else groups
        rows = torch.cat([self._coefficients[i] for i in chosen])
        return Moments(torch.cat([self._means[i] for i in chosen]), rows @ rows.mT)

    def effect_given(self, value: Tensor) -> Moments:
        """``P(Yb | xb)``, for values of shape ``(n, b)``."""
        b = self.cause.size
        return self.joint([0, 1]).given(slice(0, b), value)

    def effect_adjusted(self, value: Tensor) -> Moments:
        """``P(Yb | do(xb))`` under ``P(X | xb, b)``, ``b`` being as it is in each case.

        Theorem 4.1; without other quantities, of the natural micro-realization.

        :param value: shape ``(n, b)``.
        """
        e, known = self.effect.size, [0, *range(2, len(self._means))]
        rows = torch.cat([self._coefficients[i] for i in known])
        means = torch.cat([self._means[i] for i in known])
        b = self.cause.size
        through = self._coefficients[1] - self.own[0]  # that of alpha.X
        solved = through @ rows.mT @ inverse(rows @ rows.mT)  # (e, b + others)
        rest = through - solved @ rows
        moved = solved[:, b:] @ rows[b:] + self.own[0]
        covariance = rest @ rest.mT + moved @ moved.mT
        mean = self._means[1] + (value - means[:b]) @ solved[:, :b].mT
        return Moments(mean, covariance.expand(len(value), e, e))

    def effect_under(self, law: Any, layout: Layout, push: Any) -> Moments | None:
        """``P(Yb | do(xb))`` for a law of the micro state, one for each macro value.

        :param law: a distribution, batch shape ``(n, ...)``.
        :param layout: of its vector.
        :param push: from its draws to the micro state.
        :returns: ``None`` if the law is not a Gaussian.
        """
        law = over_grid(law, layout, self.cut.depth)
        form = noise_form(law)
        if form is None:
            return None
        with torch.enable_grad():
            shared = own = None
            if form.shape is not None:
                shared = form.like.new_zeros(form.shape)
                shared.requires_grad_()
            state = form.affine(shared)
            if form.scale is not None:
                own = torch.zeros_like(form.scale)
                own.requires_grad_()
                state = state + form.scale * own
            values = layout.unstack(push(state))
            n = len(state)
            parts = [values[name].reshape(n, -1) for name in self.cause.sites]
            through = torch.cat(parts, -1).cpu().double() @ self.alpha.mT  # (n, e)
            leaves = [leaf for leaf in (shared, own) if leaf is not None]
            covariance = self.noise_covariance.expand(n, -1, -1)
            if leaves and through.requires_grad:
                e = through.shape[-1]
                which = torch.eye(e).to(through).unsqueeze(1).expand(e, n, e)
                gradients = torch.autograd.grad(
                    through, leaves, which, is_grads_batched=True
                )
                flat = [g.reshape(e, n, -1).cpu().double() for g in gradients]
                rows = torch.cat(flat, -1)
                rows = rows.transpose(0, 1)  # (n, e, noises)
                covariance = covariance + rows @ rows.mT
        return Moments((through + self.noise_mean).detach(), covariance.detach())


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).cpu().double()


def _identity(row: Tensor) -> Tensor:
    return torch.eye(len(row), dtype=row.dtype, device=row.device)
