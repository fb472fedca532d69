# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Counterfactuals of affine-Gaussian programs: what is left of the noise of a unit.

What was seen are linear equations ``G e = h`` for the standard normal noise ``e``, and
then ``e`` is normal, with a mean of least length and the orthogonal projection on the
null space of ``G`` for a covariance. No covariance of the noise is written out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import NotAffine, UnsupportedLaw
from pyro_macro.laws.gaussian.covariance import Covariance
from pyro_macro.laws.gaussian.derivatives import agree
from pyro_macro.laws.gaussian.structure import Structure
from pyro_macro.laws.quantity import Quantity
from pyro_macro.laws.twin import WHO, Unit, refuse_contradiction
from pyro_macro.laws.upstream import Evidence
from pyro_macro.program.layout import Layout
from pyro_macro.program.noise import Key, NoiseRun, NoiseView

DENSE = 256  # equations that are solved as they come, without looking for structure
MOST = 1000  # numbers whose covariances are written out
CELLS = 1 << 26  # coefficients that are written out, at most


@dataclass(frozen=True, eq=False)
class NormalLaw:
    """Of ``m`` numbers, in each of ``n`` worlds.

    :ivar mean: shape ``(n, m)``.
    :ivar variance: the same.
    :ivar covariance: shape ``(n, m, m)``; ``None`` for more than :data:`MOST` numbers.
    """

    mean: Tensor
    variance: Tensor
    covariance: Tensor | None


class Abduction:
    """What a unit tells of its noise.

    :param relevant: the sites whose noise matters.
    :param kept: what was seen that tells of it.
    :raises NotAffine: if what was seen is no affine function of Gaussian noise.
    :raises Infeasible: if what was seen cannot be.
    :ivar noises: the groups of noises that matter.
    :ivar mean: of the noise, all groups as one vector, on the CPU.
    """

    def __init__(
        self, unit: Unit, relevant: Collection[str], kept: Sequence[Evidence]
    ) -> None:
        self.unit = unit
        zero = unit.zero
        self.noises = [n for n in zero.noises.values() if n.key[0] in relevant]
        self.sizes = [n.leaf.numel() for n in self.noises]
        floating = [unit.sites[n].value.dtype for n in relevant]
        self.eps = max((torch.finfo(d).eps for d in floating), default=2.3e-16)
        self.mean = torch.zeros(sum(self.sizes), dtype=torch.float64, device="cpu")
        self._steps: list[Callable[[Tensor], Tensor]] = []
        large = self._large(kept)
        rest = [e for e in kept if e not in large]
        if large:
            self._learn_structured(large)
        if rest:
            self._learn(rest)

    def left(self, rows: Tensor) -> Tensor:
        """Coefficients ``(m, N)`` of the noise, without what is known of it."""
        for step in self._steps:
            rows = step(rows)
        return rows

    def as_rows(self, gradients: Mapping[Key, Tensor], count: int) -> Tensor:
        """Coefficients by group as a matrix, ``(count, N)``."""
        parts = [
            gradients[n.key].reshape(count, -1).cpu().double()
            if n.key in gradients
            else torch.zeros(count, n.leaf.numel(), dtype=torch.float64, device="cpu")
            for n in self.noises
        ]
        return (
            torch.cat(parts, -1)
            if parts
            else torch.zeros(count, 0, device="cpu").double()
        )

    def _directions(self, rows: Tensor) -> dict[Key, Tensor]:
        parts = rows.split(self.sizes, -1)
        return {
            n.key: part.reshape((-1, *n.leaf.shape)).to(n.leaf)
            for n, part in zip(self.noises, parts, strict=True)
        }

    def _large(self, kept: Sequence[Evidence]) -> list[Evidence]:
        """Sites of one shape whose values are the most of what was seen."""
        groups: dict[tuple, list[Evidence]] = {}
        if sum(e.of(self.unit.zero).numel() for e in kept) <= DENSE:
            return []
        for e in kept:
            form = self.unit.zero.forms.get(e.name)
            if e.macro is None and form is not None and form.scale is not None:
                site = self.unit.sites[e.name]
                frames = frozenset(f.name for f in site.frames if f.vectorized)
                groups.setdefault((frames, site.event_shape), []).append(e)
        sizes = {key: sum(e.value.numel() for e in es) for key, es in groups.items()}
        return groups[max(sizes, key=lambda key: sizes[key])] if groups else []

    def _learn_structured(self, evidence: Sequence[Evidence]) -> None:
        """Many equations, each with noise of its own: by a covariance with structure.

        ``G' (G G')^-1``, with ``G G'`` the covariance of what was seen.
        """
        zero, names = self.unit.zero, [e.name for e in evidence]
        sites = [self.unit.sites[n] for n in names]
        over = {f.name for f in sites[0].frames if f.vectorized}
        layout = Layout(sites, sorted(over), WHO)
        stacked = layout.stack({e.name: e.of(zero) for e in evidence})
        whole = NoiseView(stacked, self.noises, False)
        own = {(n, "own") for n in names}
        shared = [n for n in self.noises if n.key not in own]
        scales: dict[str, Any] = {n: zero.forms[n].scale for n in names}
        scale = layout.stack(scales)
        variance = scale.detach().double().square()
        view = NoiseView(stacked, shared, False)
        covariance = Structure(layout, view, variance).covariance(WHO)
        self._check(whole, evidence, layout)
        values = layout.stack({e.name: e.value for e in evidence})
        surprise = (values - stacked.detach()).double()

        def back(solved: Tensor) -> Tensor:
            found = whole.backward(solved.to(stacked))
            return self.as_rows(found, len(solved))

        def step(rows: Tensor) -> Tensor:
            return rows - back(_solved(covariance, self._seen_as(whole, rows)))

        self.mean = back(_solved(covariance, surprise.unsqueeze(0)))[0]
        self._steps.append(step)

    def _seen_as(self, view: NoiseView, rows: Tensor) -> Tensor:
        """The covariances of what was seen with rows, ``(m, r)``."""
        directions = self._directions(rows)
        known = {n.key: directions[n.key] for n in view.noises}
        return view.forward(known).double()

    def _learn(self, evidence: Sequence[Evidence]) -> None:
        """Few equations: an orthonormal basis of their rows."""
        zero = self.unit.zero
        found = torch.cat([_flat(e.of(zero)) for e in evidence])
        count = len(found)
        if count * len(self.mean) > CELLS:
            raise UnsupportedLaw(
                f"{WHO}: {[e.name for e in evidence]} are {count:,} numbers that "
                f"depend on {len(self.mean):,} noises, and not alike. Expected fewer: "
                "observe more of their parents, or aggregates of them."
            )
        view = NoiseView(found, self.noises, False)
        for e in evidence:
            if e.macro is not None:
                refuse_bend(Quantity(e.macro, self.unit.sites, "observed"))
        self._check(view, evidence)
        rows = self.as_rows(view.backward(torch.eye(count).to(found)), count)
        values = torch.cat([_values(e, zero) for e in evidence]).cpu().double()
        found = found.detach().cpu().double()
        surprise = values - found - rows @ self.mean
        # In standard deviations, where these are more than the rounding of a value
        scale = rows.norm(dim=-1)
        moved = scale > 100 * self.eps * (values.abs() + found.abs())
        scale = torch.where(moved, scale, 1.0)
        known = torch.where(moved.unsqueeze(-1), self.left(rows), 0.0)
        u, s, v = torch.linalg.svd(known / scale.unsqueeze(-1), full_matrices=False)
        new = s > max(1e-10, 100 * self.eps) * count**0.5
        u, s, basis = u[:, new], s[new], v[new]
        along = (u.mT @ (surprise / scale)) / s
        miss = surprise - scale * (u * s @ along)
        sizes = [e.of(zero).numel() for e in evidence]
        parts = [t.split(sizes) for t in (miss, values, found.abs() + scale)]
        for e, *own in zip(evidence, *parts, strict=True):
            refuse_contradiction(e.name, *own)
        self.mean = self.mean + along @ basis
        self._steps.append(lambda rows: rows - (rows @ basis.mT) @ basis)

    def _check(
        self,
        view: NoiseView,
        evidence: Sequence[Evidence],
        layout: Layout | None = None,
    ) -> None:
        """The derivatives have to predict two runs under large noise."""
        for probe in self.unit.probes:
            if any(n.key not in probe.drawn for n in view.noises):
                raise bent("the sites that are met")
            drawn = {n.key: probe.drawn[n.key].unsqueeze(0) for n in view.noises}
            if layout is None:
                found = torch.cat([_flat(e.of(probe)) for e in evidence])
            else:
                found = layout.stack({e.name: e.of(probe) for e in evidence})
            if not agree(view.output, [view.forward(drawn)[0]], found, self.eps):
                names = [e.name for e in evidence]
                raise bent(f"what was seen ({names})")


def affine_law(
    abduction: Abduction,
    runs: Sequence[NoiseRun],
    quantities: Sequence[Quantity],
    lead: Sequence[int] = (),
) -> NormalLaw:
    """The law of quantities in a world of the unit, all elements as one vector.

    :param runs: of that world: at noise zero, and two under large noise.
    :param lead: the length of a grid of worlds, to the left of all plates.
    :raises NotAffine: if they are no affine function of Gaussian noise.
    """
    depth = abduction.unit.depth

    def output(run: NoiseRun) -> Tensor:
        values = {n: s.value for n, s in run.sites.items()}
        return torch.cat([q.of(values, lead, depth) for q in quantities], -1)

    zero, *probes = runs
    values = {n: s.value for n, s in zero.sites.items()}
    noises = list(zero.noises.values())
    for quantity in quantities:
        if NoiseView(quantity.of(values, lead, depth), noises, False).noises:
            refuse_bend(quantity)
    start = output(zero)
    view = NoiseView(start, noises, False)
    for probe in probes:
        if any(n.key not in probe.drawn for n in view.noises):
            raise bent("the sites that are met")
        drawn = {n.key: probe.drawn[n.key].unsqueeze(0) for n in view.noises}
        if not agree(start, [view.forward(drawn)[0]], output(probe), abduction.eps):
            raise bent(f"{[q.name for q in quantities]}")
    n, m = (*lead, *start.shape[-1:]) if lead else (1, *start.shape)
    fresh = [g for g in view.noises if g.key[0] not in abduction.unit.sites]
    width = len(abduction.mean) + sum(g.leaf.numel() for g in fresh) // n
    if n * m * width > CELLS:
        raise UnsupportedLaw(
            f"{WHO}: {[q.name for q in quantities]} are {m:,} numbers that depend on "
            f"{width:,} noises that are not known. Expected fewer: ask about "
            "aggregates, such as a MacroVariable over their plates."
        )
    found: dict[Key, Tensor] = {}
    if view.noises:
        which = torch.eye(m).to(start).reshape((m,) + (1,) * len(lead) + (m,))
        found = view.backward(which.expand((m, *lead, m)))
    known = {g.key for g in (*abduction.noises, *fresh)}
    assert not any(bool(g.any()) for key, g in found.items() if key not in known)
    # A noise is given to each world of the grid: (m, n, size) to (n m, size)
    found = {
        key: g.reshape(m, n, -1).transpose(0, 1).flatten(0, 1)
        for key, g in found.items()
    }
    rows = abduction.as_rows(found, n * m)
    start = start.detach().cpu().double().reshape(n, m)
    mean = start + (rows @ abduction.mean).reshape(n, m)
    left = abduction.left(rows)
    nothing = left.norm(dim=-1) <= 100 * abduction.eps * rows.norm(dim=-1)
    left = torch.where(nothing.unsqueeze(-1), 0.0, left)  # but for rounding
    left = torch.cat([left, *(found[g.key].cpu().double() for g in fresh)], -1)
    left = left.reshape(n, m, -1)
    covariance = left @ left.mT if m <= MOST else None
    return NormalLaw(mean, left.square().sum(-1), covariance)


def _solved(covariance: Covariance, rows: Tensor) -> Tensor:
    return covariance.solve(rows.mT).mT


def _flat(value: Tensor) -> Tensor:
    return value.reshape(-1)


def _values(known: Evidence, zero: NoiseRun) -> Tensor:
    like = known.of(zero)
    return known.value.to(like).expand(like.shape).detach().reshape(-1)


def refuse_bend(quantity: Quantity) -> None:
    """An error if something that is not known is no weighted sum of sites.

    That it has kinks may not show in a few runs.
    """
    thing = quantity.thing
    if isinstance(thing, str):
        return
    rows = thing.aggregation.within(quantity.layout)
    if (
        rows.weights(
            torch.zeros(quantity.layout.size, dtype=torch.float64, device="cpu")
        )
        is None
    ):
        raise NotAffine(
            f"{WHO}: {quantity.what}: {thing.aggregation!r} of what was not seen is no "
            "weighted sum."
        )


def bent(what: str) -> NotAffine:
    return NotAffine(
        f"{WHO}: with larger noise, {what} is not where its derivative says (a product "
        "of sites that were not seen, a scale that varies, or numbers that were drawn "
        "outside of Pyro)."
    )
