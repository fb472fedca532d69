# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A component of affine-Gaussian sites, its chains contracted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_macro.consolidation.affine import AffineGroup, AffineSite, linear_leaves
from pyro_macro.consolidation.compose import Affine, product, stacked, suffixes, taken
from pyro_macro.consolidation.frame import Frame, Worlds
from pyro_macro.consolidation.gaussian import GaussianLaw, GaussianState
from pyro_macro.consolidation.known import Known
from pyro_macro.consolidation.laws import gaussian
from pyro_macro.consolidation.structure import Component, Structure
from pyro_macro.program.tape import Leaf

PLANS = 256  # of interventions, that are remembered


@dataclass(eq=False)
class Chain:
    """Sites each of which is all that the next one has of the component.

    :ivar head: what the first link starts from, a site that is known or live.
    :ivar sites: those in between, and then the end.
    :ivar links: the mechanism of each site, if these are numbers.
    """

    head: str
    sites: list[str]
    links: Affine | None = None
    suffixes: Affine | None = field(default=None, init=False)

    @property
    def end(self) -> str:
        return self.sites[-1]

    def after(self, start: int) -> Affine:
        """From before the site at a place to the end, as one mechanism."""
        if self.suffixes is None:
            assert self.links is not None
            self.suffixes = suffixes(self.links)
        return taken(self.suffixes, start)


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is done under an intervention on some sites.

    :ivar stages: for each child the sites that are met first because of it.
    :ivar starts: for the end of each chain, from which of its sites on it matters, and
        after what.
    :ivar laws: the laws of the children, if they are numbers.
    """

    stages: dict[str, list[str]]
    starts: dict[str, tuple[int, str]]
    groups: dict[str, list[AffineGroup]]
    laws: dict[str, GaussianLaw] | None

    @cached_property
    def leaves(self) -> frozenset[Leaf]:
        """What the coefficients depend on."""
        groups = [group for stage in self.groups.values() for group in stage]
        return frozenset(
            leaf for group in groups for some in group.others for leaf in some
        )


class AffineComponent:
    """Affine-Gaussian sites that are eliminated together.

    Coefficients that are numbers are found once; others, which depend on the values of
    sites that stay, on parameters or on arguments, in each run.
    """

    def __init__(self, component: Component, structure: Structure) -> None:
        self.component, self.structure = component, structure
        self.frame = Frame(structure.sites.values(), component.plates)
        self._flags = {
            name: linear_leaves(structure.of[name], component.linear[name])
            for name in component.sites
        }
        self.is_static = all(all(flags) for flags in self._flags.values())
        self._static: dict[str, AffineSite] = {}
        for group in self._groups(n for n in component.sites if all(self._flags[n])):
            found = group.coefficients(structure.mechanisms.values, self.frame)
            each = _Found([(group, found, None)])
            self._static.update({n: _detached(each.site(n)) for n in group.names})
        self.chains = self._find_chains()
        between = {n for chain in self.chains for n in chain.sites[:-1]}
        self._place = {
            name: (chain, i)
            for chain in self.chains
            for i, name in enumerate(chain.sites)
        }
        self._reduced = [n for n in component.sites if n not in between]
        self._plans: dict[frozenset[str], _Plan] = {}

    @property
    def method(self) -> str:
        return "exact: affine-Gaussian"

    def start(self, interventions: frozenset[str], known: Known) -> AffineRun:
        """The elimination in one run, under an intervention on some sites."""
        mine = interventions.intersection(self.component.linear)
        plan = self._plans.get(mine)
        if plan is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            plan = self._plans[mine] = self._planned(mine)
        return AffineRun(self, plan, mine, known)

    def site(self, name: str, plan: _Plan, found: _Found) -> AffineSite:
        """A site as a function of what is left of its parents."""
        if name not in plan.starts:
            return self._static[name] if name in self._static else found.site(name)
        chain = self._place[name][0]
        start, head = plan.starts[name]
        if chain.links is not None:
            link = chain.after(start)
        else:
            link = product(found.links(chain.sites[start:], self._static))
        return AffineSite({head: link.matrix}, link.offset, link.covariance)

    def _groups(self, names: Iterable[str]) -> list[AffineGroup]:
        structure = self.structure
        groups: dict[Any, list[Any]] = {}
        for name in names:
            mechanism = structure.of[name]
            shapes = tuple(structure.sites[p].shape for p in mechanism.parents)
            key = (mechanism.expression.key, shapes, self._flags[name])
            groups.setdefault(key, []).append(mechanism)
        return [
            AffineGroup(members, key[2], structure.sites)
            for key, members in groups.items()
        ]

    # Chains

    def _find_chains(self) -> list[Chain]:
        component, graph = self.component, self.structure.graph
        dropped = set(self.structure.dropped)
        size = {n: self.frame.size(self.structure.sites[n]) for n in component.sites}
        follows: dict[str, str] = {}
        for name in component.eliminated:
            children = [c for c in graph.successors(name) if c not in dropped]
            if len(children) != 1 or len(component.linear[name]) != 1:
                continue
            (child,), (head,) = children, component.linear[name]
            if component.linear.get(child) != (name,):
                continue
            width = self.frame.size(self.structure.sites[head])
            if size[name] == size[child] == width:
                follows[name] = child
        chains = []
        firsts = [n for n in follows if component.linear[n][0] not in follows]
        for first in firsts:
            sites = [first]
            while sites[-1] in follows:
                sites.append(follows[sites[-1]])
            chain = Chain(component.linear[first][0], sites)
            if all(n in self._static for n in sites):
                chain.links = _links([self._static[n] for n in sites])
            chains.append(chain)
        return chains

    # Plans

    def _planned(self, interventions: frozenset[str]) -> _Plan:
        component = self.component
        starts: dict[str, tuple[int, str]] = {}
        for chain in self.chains:
            starts[chain.end] = (0, chain.head)
        for name in interventions:
            if name in self._place:
                chain, i = self._place[name]
                if name != chain.end and i + 1 > starts[chain.end][0]:
                    starts[chain.end] = (i + 1, name)
        parents = {
            name: (starts[name][1],) if name in starts else component.linear[name]
            for name in self._reduced
        }
        eliminated = set(component.eliminated)
        stages: dict[str, list[str]] = {}
        met: set[str] = set(interventions)
        for child in component.children:
            stage: set[str] = set()
            stack = [child]
            while stack:
                name = stack.pop()
                if name in met:
                    continue
                met.add(name)
                stage.add(name)
                stack.extend(p for p in parents[name] if p in eliminated)
            order = self.structure.order
            stages[child] = sorted(stage, key=order.__getitem__)
        plan = _Plan(stages, starts, {}, None)
        for child, together in stages.items():
            needed = [n for name in together for n in self._behind(name, plan)]
            plan.groups[child] = self._groups(
                n for n in needed if n not in self._static
            )
        if any(plan.groups.values()):
            return plan
        state, laws = GaussianState(), {}
        for child in component.children:
            if child in interventions:
                continue
            for name in stages[child]:
                state.extend(name, self.site(name, plan, _Found([])))
            laws[child] = state.law(child)
            state.condition(child)
            self.forget(state, child, plan)
        return _Plan(stages, starts, {}, laws)

    def _behind(self, name: str, plan: _Plan) -> list[str]:
        """The sites whose mechanisms make up that of a site."""
        if name not in plan.starts:
            return [name]
        return self._place[name][0].sites[plan.starts[name][0] :]

    def forget(self, state: GaussianState, child: str, plan: _Plan) -> None:
        """Drops from the state what no later child depends on."""
        rest = list(plan.stages)[list(plan.stages).index(child) + 1 :]
        wanted: set[str] = set()
        for later in rest:
            for name in plan.stages[later]:
                start = plan.starts.get(name)
                wanted.update(
                    self.component.linear[name] if start is None else (start[1],)
                )
        state.forget([n for n in state.forms if n not in wanted])


class AffineRun:
    """The elimination of a component in one run of the fused program."""

    def __init__(
        self,
        owner: AffineComponent,
        plan: _Plan,
        interventions: frozenset[str],
        known: Known,
    ) -> None:
        self.owner, self.plan, self.known = owner, plan, known
        self.interventions = interventions
        self.state = GaussianState()

    def law(self, name: str) -> Any:
        """The distribution of a site given what is known; a tensor if it is certain."""
        site = self.owner.structure.sites[name]
        frame = self.owner.frame
        if self.plan.laws is not None:
            law = self.plan.laws[name]
            terms = {n: self.known.elements(n, frame) for n in law.mean.terms}
            return gaussian(law.mean.at(terms), law.covariance, site)
        worlds = self.known.worlds(x for x in self.plan.leaves if self.known.has(x))
        evaluated = []
        for group in self.plan.groups[name]:
            values, wide = self.known.values(group.others, worlds)
            size = worlds.size if wide else None
            coefficients = group.coefficients(values, frame, wide, size)
            evaluated.append((group, coefficients, worlds if wide else None))
        found = _Found(evaluated)
        for n in self.plan.stages[name]:
            self.state.extend(n, self.owner.site(n, self.plan, found))
        law = self.state.law(name)
        terms = {n: self.known.elements(n, frame) for n in law.mean.terms}
        return gaussian(law.mean.at(terms), law.covariance, site)

    def observe(self, name: str) -> None:
        """Takes note that a site is known: it tells of those eliminated."""
        if self.plan.laws is None:
            self.state.condition(name)
            self.owner.forget(self.state, name, self.plan)


Coefficients = tuple[list[Tensor], Tensor, Tensor]


class _Found:
    """The coefficients of sites, as groups of them were evaluated."""

    def __init__(
        self, groups: Sequence[tuple[AffineGroup, Coefficients, Worlds | None]]
    ) -> None:
        self.groups = groups
        self.places = {
            name: (g, i)
            for g, (group, _, _) in enumerate(groups)
            for i, name in enumerate(group.names)
        }

    def site(self, name: str) -> AffineSite:
        g, i = self.places[name]
        group, (matrices, offset, covariance), worlds = self.groups[g]

        def member(tensor: Tensor, right: int) -> Tensor:
            at = 0 if worlds is None else 1
            found = tensor.select(at, i if tensor.shape[at] > 1 else 0)
            return found if worlds is None else worlds.behind(found, right)

        coefficients = {}
        for slot, matrix in zip(group.slots, matrices, strict=True):
            parent = str(group.group.leaves[slot][i][1])
            coefficients[parent] = member(matrix, 2)
        return AffineSite(coefficients, member(offset, 1), member(covariance, 2))

    def links(self, names: Sequence[str], static: Mapping[str, AffineSite]) -> Affine:
        """The mechanisms of a chain, stacked."""
        groups = {self.places[n][0] for n in names if n in self.places}
        if len(groups) > 1 or any(n not in self.places for n in names):
            return _links([static[n] if n in static else self.site(n) for n in names])
        (g,) = groups
        group, (matrices, offset, covariance), worlds = self.groups[g]
        index = torch.tensor([self.places[n][1] for n in names], device=offset.device)

        def chosen(tensor: Tensor, right: int) -> Tensor:
            at = 0 if worlds is None else 1
            if tensor.shape[at] == 1:
                tensor = tensor.expand(
                    (*tensor.shape[:at], len(group.names), *tensor.shape[at + 1 :])
                )
            tensor = tensor.index_select(at, index)
            if worlds is None:
                return tensor
            return worlds.behind(tensor.movedim(at, -1), right + 1).movedim(-1, 0)

        return Affine(chosen(matrices[0], 2), chosen(offset, 1), chosen(covariance, 2))


def _detached(site: AffineSite) -> AffineSite:
    return AffineSite(
        {p: m.detach() for p, m in site.coefficients.items()},
        site.offset.detach(),
        site.covariance.detach(),
    )


def _links(sites: list[AffineSite]) -> Affine:
    """The mechanisms of a chain, stacked."""
    return stacked(
        [
            Affine(next(iter(s.coefficients.values())), s.offset, s.covariance)
            for s in sites
        ]
    )
