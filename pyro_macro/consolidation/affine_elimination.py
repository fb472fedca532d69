# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Elimination of affine-Gaussian sites.

Coefficients that are numbers are found once; others, which depend on the values of
sites that stay, on parameters or on arguments, in each run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_macro.consolidation.affine import AffineGroup, AffineSite
from pyro_macro.consolidation.compose import Affine, product, stacked
from pyro_macro.consolidation.elimination import Eliminating, Elimination, Plan
from pyro_macro.consolidation.frame import Worlds
from pyro_macro.consolidation.gaussian import GaussianState
from pyro_macro.consolidation.known import Known
from pyro_macro.consolidation.laws import gaussian


class AffineElimination(Elimination[AffineGroup]):
    """Affine-Gaussian sites that are eliminated together."""

    method = "exact: affine-Gaussian"

    def read(self) -> None:
        fixed = [n for n in self.component.sites if all(self.flags[n])]
        for group in self.groups(fixed):
            found = group.coefficients(self.structure.mechanisms.values, self.frame)
            sites = Coefficients([(group, found, None)])
            self.static.update({n: _detached(sites.site(n)) for n in group.names})

    def check(self) -> None:
        for name, law in self.plan(frozenset()).laws.items():
            site = self.structure.sites[name]
            gaussian(law.mean.const, law.covariance, site)

    def width(self, name: str) -> int | None:
        return self.frame.size(self.structure.sites[name])

    def groups(self, names: Iterable[str]) -> list[AffineGroup]:
        structure = self.structure
        groups: dict[Any, list[Any]] = {}
        for name in names:
            mechanism = structure.of[name]
            shapes = tuple(structure.sites[p].shape for p in mechanism.parents)
            key = (mechanism.expression.key, shapes, self.flags[name])
            groups.setdefault(key, []).append(mechanism)
        return [
            AffineGroup(members, key[2], structure.sites)
            for key, members in groups.items()
        ]

    def links(self, names: Sequence[str]) -> Affine:
        return _links([self.static[n] for n in names])

    def prepare(self, plan: Plan[AffineGroup]) -> None:
        if any(plan.groups.values()):
            return
        state = GaussianState()
        for child in self.component.children:
            for name in plan.stages[child]:
                state.extend(name, self.site(name, plan, Coefficients([])))
            plan.laws[child] = state.law(child)
            self.learn(state, child, plan)

    def learn(self, state: GaussianState, child: str, plan: Plan[AffineGroup]) -> None:
        """Conditions on a child, and drops what nothing depends on any more."""
        if child not in plan.unseen:
            state.condition(child, plan.key(child))
        # As a parent it is known, whatever it would have been
        wanted = self.wanted(child, plan) - {child}
        state.forget(set(state.forms) - wanted)

    def begin(self, plan: Plan[AffineGroup], known: Known) -> AffineRun:
        return AffineRun(self, plan, known)

    def site(
        self, name: str, plan: Plan[AffineGroup], found: Coefficients
    ) -> AffineSite:
        """A site as a function of what is left of its parents."""
        if name not in plan.starts:
            return self.static[name] if name in self.static else found.site(name)
        chain, (start, head) = self.chain_of(name), plan.starts[name]
        if chain.links is not None:
            link = chain.after(start)
        else:
            link = product(found.links(chain.sites[start:], self.static))
        return AffineSite({head: link.matrix}, link.offset, link.covariance)


class AffineRun(Eliminating):
    """The elimination in one run."""

    def __init__(
        self, owner: AffineElimination, plan: Plan[AffineGroup], known: Known
    ) -> None:
        self.owner, self.plan, self.known = owner, plan, known
        self.state = GaussianState()

    def law(self, name: str) -> Any:
        law = self.plan.laws.get(name)
        if law is None:
            found = self._evaluated(name)
            for n in self.plan.stages[name]:
                self.state.extend(n, self.owner.site(n, self.plan, found))
            law = self.state.law(name)
        frame = self.owner.frame
        terms = {n: self.known.elements(n, frame) for n in law.mean.terms}
        site = self.owner.structure.sites[name]
        return gaussian(law.mean.at(terms), law.covariance, site)

    def observe(self, name: str) -> None:
        if name not in self.plan.laws:
            self.owner.learn(self.state, name, self.plan)

    def _evaluated(self, name: str) -> Coefficients:
        """The coefficients of the sites that are met because of a child."""
        worlds = self.known.worlds(x for x in self.plan.leaves if self.known.has(x))
        found = []
        for group in self.plan.groups[name]:
            values, wide = self.known.values(group.others, worlds)
            size = worlds.size if wide else None
            coefficients = group.coefficients(values, self.owner.frame, wide, size)
            found.append((group, coefficients, worlds if wide else None))
        return Coefficients(found)


_Found = tuple[list[Tensor], Tensor, Tensor]


class Coefficients:
    """The coefficients of sites, as groups of them were evaluated."""

    def __init__(
        self, groups: Sequence[tuple[AffineGroup, _Found, Worlds | None]]
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
