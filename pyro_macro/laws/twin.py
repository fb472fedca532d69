# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""One unit in two worlds: as it was seen, and after an intervention.

Both have the same noise (Pearl, *Causality*, chapter 7: a twin network). The noise of
a Gaussian site is that of its location-scale form (:mod:`pyro_macro.program.noise`),
which its value tells once its parents are known.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from pyro.distributions.constraints import real, real_vector
from pyro.poutine.runtime import Message
from torch import Size, Tensor

from pyro_macro.errors import Infeasible, OffFibre, UnsupportedLaw
from pyro_macro.laws.finite.configurations import log_prob_of
from pyro_macro.laws.finite.sums import NEVER
from pyro_macro.laws.product import StackedSites
from pyro_macro.laws.quantity import Quantity
from pyro_macro.laws.upstream import Evidence, Upstream
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import Site, unwrapped
from pyro_macro.program.layout import Layout
from pyro_macro.program.noise import NoiseRun, noise_form
from pyro_macro.program.reading import dependence, draw

WHO = "counterfactual"
ROUNDING = 1e-6  # how far what is seen may be from what it has to be


class Unit(Upstream):
    """A program as it was in one unit.

    :param model: the program, with its arguments.
    :param seen: values of sites.
    :param totals: macro-variables that were seen, with their values.
    :param until: what else to look at.
    :param stated: the sites that count as seen whatever the program weighs them with.
    :raises Infeasible: if what was seen contradicts itself.
    """

    def __init__(
        self,
        model: tuple[Any, tuple, dict],
        seen: Mapping[str, Tensor],
        totals: Sequence[tuple[MacroVariable, Tensor]],
        until: Collection[str],
        stated: Collection[str],
    ) -> None:
        micro = [n for macro, _ in totals for n in macro.micro]
        super().__init__(model, (), [*until, *seen, *micro], {}, seen)
        self.stated = frozenset(stated)
        self._told: dict[str, Tensor | None] = {}
        self.totals = [self._total(macro, value) for macro, value in totals]
        self._refuse_contradictions()

    def _total(self, macro: MacroVariable, value: Tensor) -> Evidence:
        what = f"{WHO}: macro-variable {macro.name!r}"
        layout = Layout([self.sites[n] for n in macro.micro], macro.over, what)
        return Evidence.of_macro(macro, layout, value)

    def _held_evidence(self, name: str) -> Evidence:
        # The value of a deterministic site may lack the plates around it
        site, found = self.sites[name], super()._held_evidence(name)
        return replace(
            found,
            of=lambda run: site.expanded(run.expressions[name]),
            value=site.expanded(found.value),
        )

    def behind(self, names: Sequence[str]) -> set[str]:
        """The random sites above, or among, some sites that were not seen."""
        above = self.unfixed({*names, *self.ancestors(names)})
        return {n for n in above if not self.sites[n].deterministic}

    def _refuse_contradictions(self) -> None:
        """An error if what follows from what was seen was seen to be otherwise."""
        seen = [n for n in self.held if n in self.sites]
        for name in seen:
            site = self.sites[name]
            if name not in self.zero.opaque or self.behind([name]):
                continue
            support = getattr(unwrapped(site.fn), "support", None)
            inside = support is None or bool(site.fn.support.check(site.value).all())
            log = log_prob_of(site.fn, site.value, site) if inside else None
            if log is None or bool((log <= NEVER / 2).any()):
                raise Infeasible(
                    f"{WHO}: site {name!r} was seen to be {site.value.tolist()}, which "
                    f"a {type(unwrapped(site.fn)).__name__} cannot be beside the other "
                    "values. Look at the values."
                )
        certain = [n for n in seen if self.sites[n].deterministic]
        for known in [*self.totals, *map(self._held_evidence, certain)]:
            if self.behind(known.sites):
                continue
            found = known.of(self.zero).detach()
            refuse_contradiction(known.name, known.value - found, known.value, found)

    def evidence(self, name: str) -> Evidence:
        """That a site was seen."""
        return self._held_evidence(name)

    @cached_property
    def depth(self) -> int:
        """The number of dimensions to the left of which new ones may stand."""
        sites = self.sites.values()
        return max(
            [s.value.dim() - len(s.event_shape) for s in sites]
            + [-(f.dim or 0) for s in sites for f in s.frames]
        )

    def told(self, name: str) -> Tensor | None:
        """The noise of a site's elements, if its value and its parents tell it."""
        if name not in self._told:
            self._told[name] = self._told_by_value(name)
        return self._told[name]

    def _told_by_value(self, name: str) -> Tensor | None:
        form = self.zero.forms.get(name)
        if name not in self.held or form is None or form.scale is None:
            return None
        if form.shape is not None or self.behind([name]):
            return None
        found = (self.sites[name].value - self.zero.expressions[name]) / form.scale
        return found.detach()

    def _refuse_weighted(self, known: Evidence, what: str) -> None:
        site = self.sites.get(known.name)
        if site is None or site.known or known.name in self.stated:
            return
        raise UnsupportedLaw(
            f"{what}: {known.name!r} is observed, but masked out or weighted, so that "
            "it is open what it tells of this unit. State it in observed={...}, or "
            "leave the observation out."
        )

    def refuse_factors(self, relevant: Collection[str], what: str) -> None:
        """An error if factors weigh the noise: they are no observations of a site."""
        for name, parents in self.zero.factors.items():
            hit = self.behind(sorted(parents & set(self.sites))) & set(relevant)
            if hit:
                raise UnsupportedLaw(
                    f"{what}: factor {name!r} depends on {sorted(hit)}, and what it "
                    "tells of this unit is no value of a site. Leave the factor out."
                )


def refuse_contradiction(name: str, miss: Tensor, value: Tensor, found: Tensor) -> None:
    """An error if something cannot be as it was seen.

    :param miss: by how much.
    :param value: as it was seen.
    :param found: as it has to be, or what it is the sum of.
    """
    scale = value.abs() + found.abs()
    if bool((miss.abs() > ROUNDING * scale).any()):
        raise Infeasible(
            f"{WHO}: {name!r} was seen to be {value.tolist()}, which cannot be beside "
            f"the other values: it misses by {float(miss.abs().max()):g}. Leave out "
            "one of those that follow from the others, or give them with all digits."
        )


class OtherWorld(NoiseRun):
    """A run of the program after an intervention, under the noise of a unit.

    Sites that the intervention does not act on are as they were. The noise of a seen
    site is what the unit tells; where it does not tell all, and for all other sites, it
    is varied as in any run under noise. A micro state that is drawn anew has noise of
    its own.

    :param micro: the micro sites of the intervention.
    :ivar changed: the sites that it acts on.
    :ivar moved: micro sites that are moved from where another intervention takes them.
    """

    def __init__(
        self,
        unit: Unit,
        until: Collection[str],
        micro: Collection[str],
        probe: int = 0,
        before: Mapping[str, Site] | None = None,
    ) -> None:
        super().__init__(until, dict(unit.shared), {}, (), probe, before)
        self.unit, self.set_to = unit, frozenset(micro)
        self.changed, self.moved = set(micro), set[str]()
        # Whether a value carries noise; where it is not said, if its parents do
        self._noisy_values: dict[str, bool] = {}

    def choose(self, msg: Message, site: Site) -> Any:
        name, unit = site.name, self.unit
        moved = bool(site.parents & self.changed)
        if moved or name not in unit.sites:
            self.changed.add(name)
        if site.deterministic:
            if name in unit.held and name not in self.changed:
                self._noisy_values[name] = False
                return unit.held[name]
            return unwrapped(site.fn).v if msg["value"] is None else msg["value"]
        law = unwrapped(site.fn)
        parts = {name: site}
        if isinstance(law, StackedSites) and name not in unit.sites:
            parts = {n: replace(site, name=n, fn=fn) for n, fn in law.parts.items()}
            self.moved |= set(parts) if moved else set()
        if all(n in unit.held for n in parts) and not moved:
            self._noisy_values[name] = False
        elif any(unit.told(n) is None for n in parts):
            self._noisy_values[name] = True
        values = {n: self._as_in_unit(part, moved) for n, part in parts.items()}
        return values[name] if name in values else law.layout.stack(values)

    def _as_in_unit(self, site: Site, moved: bool) -> Tensor:
        """What a site is under its own noise, or under noise that is drawn anew.

        :param moved: whether its parents may have other values than in the unit.
        """
        name, unit = site.name, self.unit
        if name in unit.held and not moved:
            return unit.held[name]
        form = noise_form(site.fn)
        if form is not None:
            self.forms[name] = form
            return self._value(site, form)
        self.opaque[name] = site.fn
        if name in unit.sites:
            return unit.sites[name].value
        return draw(site.fn) if name not in self.before else self.before[name].value

    def is_noisy(self, site: Site, from_parents: bool) -> bool:
        return self._noisy_values.get(site.name, from_parents)

    def _noise(self, site: Site, kind: str, shape: Size, like: Tensor) -> Tensor:
        told = self.unit.told(site.name)
        if told is None:
            return super()._noise(site, kind, shape, like)
        return told.to(like).expand(torch.broadcast_shapes(told.shape, shape))

    def is_outside(self, site: Site, dim: int, size: int) -> bool:
        return False

    @cached_property
    def graph(self) -> nx.DiGraph:
        return dependence(self.sites)

    def above(self, names: Collection[str]) -> set[str]:
        """The sites that some depend on, themselves among them."""
        return set(names).union(*(nx.ancestors(self.graph, n) for n in names))

    def matters(self, names: Collection[str]) -> list[str]:
        """The sites of the unit whose noise some sites depend on here.

        Not of a micro state that is moved from where it was: what it depends on is
        upstream of these sites in the unit, too.
        """
        above = self.above(names) & set(self.unit.sites) - self.set_to
        kept = {n for n in above if n in self.changed or n not in self.unit.held}
        return sorted(kept | self.moved)

    def refuse_off(
        self, macros: Collection[MacroVariable], lead: Sequence[int] = ()
    ) -> None:
        """An error if micro states are not what the intervention says."""
        values = {n: s.value.detach() for n, s in self.sites.items()}
        for macro in macros:
            if macro.name in values and set(macro.micro) <= set(values):
                refuse_off_fibre(self.unit, macro, values, lead)
                for name in macro.micro:
                    refuse_off_support(self.unit.sites[name], values[name])


def refuse_off_fibre(
    unit: Unit,
    macro: MacroVariable,
    values: Mapping[str, Tensor],
    lead: Sequence[int] = (),
    some: Tensor | None = None,
) -> None:
    """An error if micro states do not have the macro value that is set.

    :param values: of the micro sites, and of the macro-variable.
    :param lead: sizes of the dimensions to the left of all plates.
    :param some: which of these are possible.
    """
    quantity = Quantity(macro, unit.sites, "macro-variable")
    found = quantity.of(values, lead, unit.depth)
    wanted = values[macro.name].double().reshape(-1)
    wanted = wanted.reshape((*lead, -1)) if len(wanted) > quantity.size else wanted
    state = quantity.layout.stack(values)
    dtype = state.dtype if state.is_floating_point() else torch.get_default_dtype()
    slack = 1e-3 * torch.finfo(dtype).eps ** 0.5
    size = state.abs().max().double() * quantity.layout.size + wanted.abs()
    off = (found - wanted).abs() > slack * size
    off = off if some is None else off & some.unsqueeze(-1)
    if bool(off.any()):
        raise OffFibre(
            f"{WHO}: macro-variable {macro.name!r}: a draw of its micro state has the "
            f"macro value {found[off][0].item():g}. Expected "
            f"{wanted.expand(off.shape)[off][0].item():g} (Definition 4)."
        )


def refuse_off_support(site: Site, value: Tensor) -> None:
    """An error if a micro site gets a value that it could not have."""
    own = unwrapped(site.fn)
    support = getattr(own, "support", None)
    if support in (None, real, real_vector) or own.event_shape or site.deterministic:
        return
    value = value.to(site.value.device)
    inside = support.check(value)
    if not bool(inside.all()):
        raise OffFibre(
            f"{WHO}: micro site {site.name!r} would get the value "
            f"{value.expand(inside.shape)[~inside][0].item():g}, off its support "
            f"{support}. Choose a macro value, or a realization, that its distribution "
            "can follow."
        )
