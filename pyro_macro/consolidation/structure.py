# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Which sites can be eliminated, together with which others, and by what means."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import networkx as nx
from torch import Tensor

from pyro_macro.consolidation.affine import AffineGroup, is_gaussian, linear_leaves
from pyro_macro.consolidation.frame import Frame
from pyro_macro.laws.finite.configurations import finite_values
from pyro_macro.program.inner import Site, unwrapped
from pyro_macro.program.mechanisms import Mechanisms
from pyro_macro.program.tape import SITE

AFFINE, FINITE = "affine-Gaussian", "finite"
ELEMENTS = 4000  # of all sites of an affine component, at most
CELLS = 1 << 20  # of one table, at most


@dataclass(frozen=True, eq=False)
class Component:
    """Sites that are eliminated together, and their children that stay.

    Given what they are computed from, they are independent of all others.

    :ivar kind: the family of their mechanisms.
    :ivar eliminated: in program order.
    :ivar children: sites that stay and have parents among them, in program order.
    :ivar linear: for each of these sites, the parents that its mechanism is a function
        of within the family; all others are values that it depends on in any way.
    :ivar plates: the plates that all of them are in.
    """

    kind: str
    eliminated: tuple[str, ...]
    children: tuple[str, ...]
    linear: dict[str, tuple[str, ...]]
    plates: tuple[str, ...]

    @property
    def sites(self) -> tuple[str, ...]:
        return (*self.eliminated, *self.children)


class Structure:
    """What stays, what is eliminated, and what is computed on the way.

    :param mechanisms: the program.
    :param kept: sites that stay.
    :param why: for some of them why they do, in words, if nobody asked for it.
    :param explicit: values that explicit interventions set sites to.
    :ivar retained: sites that stay though nobody asked for it, and why.
    :ivar components: what is eliminated.
    :ivar computed: deterministic sites that are functions of values at hand.
    :ivar dropped: sites that nothing which stays depends on.
    """

    def __init__(
        self,
        mechanisms: Mechanisms,
        kept: Collection[str],
        why: Mapping[str, str],
        explicit: Mapping[str, list[Tensor]] | None = None,
    ) -> None:
        self.mechanisms = mechanisms
        self.of = mechanisms.of
        self.sites = {name: m.site for name, m in self.of.items()}
        self.graph = mechanisms.graph()
        self.order = {name: i for i, name in enumerate(self.of)}
        self.kept = set(kept)
        self.retained = dict(why)
        self.explicit = explicit or {}
        self.frame = Frame(self.sites.values())
        self._affine: dict[object, bool] = {}
        self._from: dict[str, frozenset[str]] = {}
        while self._settle():
            pass

    @property
    def stays(self) -> list[str]:
        """Names of sites of the fused program, in program order."""
        return self._ordered(self.kept | set(self.retained))

    def _ordered(self, names: Iterable[str]) -> list[str]:
        return sorted(names, key=self.order.__getitem__)

    def _settle(self) -> bool:
        """Tries to eliminate all others; whether more have to stay."""
        stays = self.kept | set(self.retained)
        needed = set(stays)
        for name in reversed(list(self.of)):
            if name in needed:
                needed.update(self.graph.predecessors(name))
        self.dropped = [n for n in self.of if n not in needed]
        self.eliminated = [n for n in self.of if n in needed and n not in stays]
        self.computed: set[str] = set()
        for name in self.eliminated:
            parents = self.of[name].parents
            known = all(p in stays or p in self.computed for p in parents)
            if self.sites[name].deterministic and known:
                self.computed.add(name)
        self.uncertain = [n for n in self.eliminated if n not in self.computed]
        self._find_linear(stays)
        self._finite: dict[str, bool] = {}
        for name in self.uncertain:
            self._finite[name] = self.is_finite(name)
        self.components = []
        more: dict[str, str] = {}
        for members in self._connected():
            component, blamed = self._resolve(members, stays)
            if component is None:
                more.update(blamed)
            else:
                self.components.append(component)
        if not more:
            self.components += self._tables_of_computed(stays)
            self.components += self._chains_of_computed(stays)
        self.retained.update(more)
        return bool(more)

    def computed_from(self, name: str) -> frozenset[str]:
        """The sites that stay of which a site that is computed is a function."""
        if name not in self._from:
            found = nx.ancestors(self.graph, name).intersection(self.stays)
            self._from[name] = frozenset(found)
        return self._from[name]

    # Which parents a site is affine in

    def _find_linear(self, stays: Collection[str]) -> None:
        """For Gaussian sites that are eliminated or have such parents."""
        self.linear: dict[str, tuple[str, ...]] = {}
        uncertain = set(self.uncertain)
        groups: dict[object, list[str]] = {}
        ranks: dict[str, list[list[str]]] = {}
        for name, mechanism in self.of.items():
            parents = mechanism.expression.parents
            mine = name in self.eliminated or any(p in self.eliminated for p in parents)
            if not mine or name in self.dropped or not is_gaussian(mechanism):
                continue
            latest = sorted(parents, key=self.order.__getitem__, reverse=True)
            floats = [p for p in latest if is_float(self.sites[p])]
            must = [p for p in latest if p in uncertain]
            if any(not is_gaussian(self.of[p]) for p in must):
                continue
            may = [p for p in floats if p in self.computed]
            known = [p for p in floats if p in stays]
            tries = [must] if must else []
            tries += [[p] for p in (*may, *known)]
            ranks[name] = tries
            place = {p: i for i, p in enumerate(parents)}
            places = tuple(tuple(place[p] for p in t) for t in tries)
            plates = tuple(f.name for f in self._plates(name, must or parents))
            shapes = tuple(self.sites[p].shape for p in parents)
            key = (mechanism.expression.key, shapes, places, bool(must), plates)
            groups.setdefault(key, []).append(name)
        for names in groups.values():
            tries = ranks[names[0]]
            chosen: list[int] = []
            for i in range(len(tries)):
                if self._is_affine(names, ranks, [*chosen, i]):
                    chosen.append(i)
                elif i == 0 and tries[0] and tries[0][0] in uncertain:
                    break
            else:
                for name in names:
                    found = [p for i in chosen for p in ranks[name][i]]
                    self.linear[name] = tuple(found)

    def _is_affine(
        self, names: list[str], ranks: Mapping[str, list[list[str]]], chosen: list[int]
    ) -> bool:
        parents = {n: {p for i in chosen for p in ranks[n][i]} for n in names}
        key = tuple((n, tuple(sorted(parents[n]))) for n in names)
        if key not in self._affine:
            mechanisms = [self.of[n] for n in names]
            linear = linear_leaves(mechanisms[0], parents[names[0]])
            plates = [f.name for f in self._plates(names[0], parents[names[0]])]
            group = AffineGroup(mechanisms, linear, self.sites)
            values = self.mechanisms.values
            found = any(
                group.is_affine(values, Frame(self.sites.values(), common))
                for common in ([plates, []] if plates else [[]])
            )
            self._affine[key] = found
        return self._affine[key]

    def _plates(self, name: str, others: Iterable[str]) -> list:
        frames = [f for f in self.sites[name].frames if f.vectorized]
        return [f for f in frames if all(f in self.sites[o].frames for o in others)]

    # Components

    def _connected(self) -> list[set[str]]:
        """Uncertain sites that are eliminated together."""
        graph = nx.Graph()
        graph.add_nodes_from(self.uncertain)
        uncertain = set(self.uncertain)
        for name, mechanism in self.of.items():
            if name in self.dropped:
                continue
            together = [p for p in mechanism.parents if p in uncertain]
            if name in uncertain and self._finite[name]:
                plates = {f for f in self.sites[name].frames if f.vectorized}
                for p in mechanism.parents:
                    if p not in uncertain and self._is_told(p, plates):
                        together += [q for q in self.of[p].parents if q in uncertain]
            if name in uncertain:
                together.append(name)
            graph.add_edges_from(zip(together, together[1:], strict=False))
        return [set(members) for members in nx.connected_components(graph)]

    def _resolve(
        self, members: set[str], stays: Collection[str]
    ) -> tuple[Component | None, dict[str, str]]:
        """How some sites can be eliminated, or which of them cannot and why."""
        children = [n for n in stays if any(p in members for p in self.of[n].parents)]
        children, eliminated = self._ordered(children), self._ordered(members)
        blamed = self._not_laws(eliminated, children) or self.random(
            self._crossing(eliminated, children)
        )
        if blamed:
            return None, blamed
        gaussian = [n for n in eliminated if is_gaussian(self.of[n])]
        if all(n in self.linear for n in (*eliminated, *children)) and len(
            gaussian
        ) == len(eliminated):
            return self._affine_component(eliminated, children)
        if all(self._finite[n] for n in eliminated):
            return self._finite_component(eliminated, children)
        return None, self._unlike(eliminated, children)

    def _unlike(self, eliminated: list[str], children: list[str]) -> dict[str, str]:
        """Whom to blame where sites are of no one kind."""
        members = set(eliminated)
        blamed: dict[str, str] = {}
        for name in eliminated:
            site = self.sites[name]
            if site.deterministic:
                if name not in self.linear and not self._finite[name]:
                    for p in self.of[name].parents:
                        if p in members and not self.sites[p].deterministic:
                            blamed[p] = f"{name!r} is not affine in it"
            elif not is_gaussian(self.of[name]) and not self._finite[name]:
                kind = type(unwrapped(site.fn)).__name__
                blamed[name] = f"a {kind} is neither Gaussian nor finite"
            elif is_gaussian(self.of[name]) and name not in self.linear:
                for p in self.of[name].parents:
                    if p in members:
                        blamed.setdefault(p, f"{name!r} is not affine in it")
        if blamed:
            return self.random(blamed)
        finite = [n for n in eliminated if not is_gaussian(self.of[n])]
        if finite:
            return dict.fromkeys(finite, "finite among Gaussian sites")
        for name in children:
            if name not in self.linear:
                for p in self.of[name].parents:
                    if p in members:
                        blamed[p] = f"{name!r} is not affine in it"
        return self.random(blamed)

    def random(self, blamed: Mapping[str, str]) -> dict[str, str]:
        """The same of random sites: deterministic ones are known once these are."""
        found: dict[str, str] = {}
        uncertain = set(self.uncertain)
        for name, why in blamed.items():
            stack = [name]
            while stack:
                at = stack.pop()
                if not self.sites[at].deterministic:
                    found.setdefault(at, why)
                else:
                    stack.extend(p for p in self.of[at].parents if p in uncertain)
        return found

    def _not_laws(self, eliminated: list[str], children: list[str]) -> dict[str, str]:
        """Sites whose density counts otherwise than once."""
        found: dict[str, str] = {}
        members = set(eliminated)
        for name in (*eliminated, *children):
            for p in self.of[name].rest.parents:
                if p in members:
                    found[p] = f"what is observed of {name!r} depends on it"
        for name in eliminated:
            if not self.of[name].counts and not self.sites[name].deterministic:
                found[name] = "it is masked or weighted"
        for name in children:
            if name in self.mechanisms.factors or (
                not self.of[name].counts and not self.sites[name].deterministic
            ):
                what = (
                    "a factor"
                    if name in self.mechanisms.factors
                    else "masked or weighted"
                )
                for p in self.of[name].parents:
                    if p in members:
                        found[p] = f"{name!r} is {what}"
        return self.random(found)

    def _crossing(self, eliminated: list[str], children: list[str]) -> dict[str, str]:
        """Sites that act across the border of a plate that children are in."""
        found: dict[str, str] = {}
        names = {*eliminated, *children}
        inside = {f for c in children for f in self.sites[c].frames if f.vectorized}
        for plate in inside:
            for name in eliminated:
                is_in = plate in self.sites[name].frames
                for child in self.graph.successors(name):
                    if child not in names:
                        continue
                    if is_in != (plate in self.sites[child].frames):
                        where = "inside" if is_in else "outside"
                        found[name] = (
                            f"it is {where} of plate {plate.name!r}, {child!r} is not"
                        )
        return found

    def _common(self, names: Iterable[str]) -> tuple[str, ...]:
        names = list(names)
        return tuple(f.name for f in self._plates(names[0], names))

    def _affine_component(
        self, eliminated: list[str], children: list[str]
    ) -> tuple[Component | None, dict[str, str]]:
        names = [*eliminated, *children]
        linear = {n: self.linear[n] for n in names}
        common = self._common(names)
        frame = Frame(self.sites.values(), common)
        if sum(frame.size(self.sites[n]) for n in names if n in children) > ELEMENTS:
            return None, dict.fromkeys(
                self.random(dict.fromkeys(eliminated, "")),
                f"more than {ELEMENTS:,} elements would be eliminated together",
            )
        if common and not self._is_local(names, frame):
            if any(self._plates(n, [n]) for n in children):
                return None, dict.fromkeys(
                    self.random(dict.fromkeys(eliminated, "")),
                    "the slots of a plate act on one another",
                )
            common = ()
        return Component(AFFINE, tuple(eliminated), tuple(children), linear, common), {}

    def _is_local(self, names: list[str], frame: Frame) -> bool:
        for name in names:
            parents = self.linear[name]
            mechanism = self.of[name]
            group = AffineGroup(
                [mechanism], linear_leaves(mechanism, parents), self.sites
            )
            if not group.is_affine(self.mechanisms.values, frame):
                return False
        return True

    def _chains_of_computed(self, stays: Collection[str]) -> list[Component]:
        """Deterministic sites that are affine in one another: these fuse, too."""
        graph = nx.Graph()
        # Not what depends in other ways on its parents: it is as well computed at once
        fits = {
            n
            for n in self.computed
            if n in self.linear and (self.linear[n] or not self.of[n].expression.leaves)
        }
        taken = {n for c in self.components for n in c.sites}
        for name in self.of:
            if name in taken or name in self.dropped:
                continue
            if name in fits:
                graph.add_node(name)
            if name in fits or (name in stays and name in self.linear):
                within = [p for p in self.linear[name] if p in fits]
                graph.add_edges_from((name, p) for p in within)
        found = []
        for members in nx.connected_components(graph):
            children = self._ordered(n for n in members if n in stays)
            eliminated = self._ordered(n for n in members if n in fits)
            if len(eliminated) == 1:
                # Worth it only if it is done once and for all
                leaves = [self.of[n].expression.leaves for n in members]
                linear = [self.linear[n] for n in members]
                if any(len(a) != len(b) for a, b in zip(leaves, linear, strict=True)):
                    continue
            if self._crossing(eliminated, children):
                continue
            component, _ = self._affine_component(eliminated, children)
            if component is not None:
                found.append(component)
        return found

    # Finite sites

    def _tables_of_computed(self, stays: Collection[str]) -> list[Component]:
        """Deterministic sites that are functions of finite ones: their tables fuse."""
        taken = {n for c in self.components for n in c.sites}
        listed: set[str] = set()
        graph = nx.Graph()
        for name in self.of:
            site = self.sites[name]
            if name in taken or name in self.dropped or not site.deterministic:
                continue
            plates = {f for f in site.frames if f.vectorized}
            leaves = self.of[name].expression.leaves
            parents = [str(p) for kind, p in leaves if kind == SITE]
            if len(parents) < len(leaves) or not parents or len(site.event_shape):
                continue
            if not all(p in listed or self._is_axis(p, plates) for p in parents):
                continue
            if name in self.computed:
                listed.add(name)
            within = [p for p in parents if p in listed]
            if name in self.computed or (name in stays and within):
                graph.add_node(name)
                graph.add_edges_from((name, p) for p in within)
        found = []
        for members in nx.connected_components(graph):
            children = self._ordered(n for n in members if n in stays)
            eliminated = self._ordered(n for n in members if n not in stays)
            alike = len({self.sites[n].frames for n in members}) == 1
            outside = (
                {c for n in eliminated for c in self.graph.successors(n)}
                - members
                - set(self.dropped)
            )
            if not children or not eliminated or not alike or outside:
                continue
            if not any(self.of[n].expression.lookups for n in members):
                continue  # no tables: formulas say it shorter
            component, _ = self._finite_component(eliminated, children)
            if component is not None:
                found.append(component)
        return found

    def is_finite(self, name: str) -> bool:
        """Whether a site has finitely many values, one a slot."""
        site = self.sites[name]
        if site.event_shape.numel() != 1 or len(site.event_shape):
            return False
        if not site.deterministic:
            return finite_values(site.fn) is not None
        plates = {f for f in site.frames if f.vectorized}
        return all(kind == SITE for kind, _ in self.of[name].expression.leaves) and all(
            self._finite[p]
            if p in self._finite
            else self._is_axis(p, plates) or self._is_told(p, plates)
            for p in self.of[name].parents
        )

    def _is_told(self, name: str, plates: set) -> bool:
        """Whether a deterministic site that stays tells of finite ones that do not."""
        site, expression = self.sites[name], self.of[name].expression
        if not site.deterministic or site.observed or len(site.event_shape):
            return False
        if {f for f in site.frames if f.vectorized} != plates:
            return False
        hidden = [p for p in expression.parents if p in self._finite]
        return (
            bool(hidden)
            and all(kind == SITE for kind, _ in expression.leaves)
            and all(
                self._finite[p] if p in self._finite else self._is_axis(p, plates)
                for p in expression.parents
            )
        )

    def _finite_component(
        self, eliminated: list[str], children: list[str]
    ) -> tuple[Component | None, dict[str, str]]:
        names = [*eliminated, *children]
        members = set(eliminated)
        plates = {n: {f for f in self.sites[n].frames if f.vectorized} for n in names}
        first = plates[children[0]]
        extra = [n for n in eliminated if plates[n] != first]
        if extra:
            return None, self.random(
                dict.fromkeys(
                    extra, "finite, and in plates that its children are not in"
                )
            )
        linear: dict[str, tuple[str, ...]] = {}
        for name in sorted(names, key=self.order.__getitem__):
            parents = self.of[name].expression.parents
            linear[name] = tuple(
                p
                for p in parents
                if p in members
                or self._is_axis(p, first)
                or (p in children and self._is_listed(p, linear))
            )
        blamed = {}
        for name in children:
            if self.sites[name].deterministic and not self._is_listed(name, linear):
                for p in self.of[name].parents:
                    if p in members:
                        blamed[p] = f"the values of {name!r} cannot be listed"
        if blamed:
            return None, self.random(blamed)
        common = tuple(f.name for f in first)
        return Component(FINITE, tuple(eliminated), tuple(children), linear, common), {}

    def _is_listed(self, name: str, linear: Mapping[str, tuple[str, ...]]) -> bool:
        """Whether a deterministic site is a function of finite ones alone."""
        site = self.sites[name]
        if not site.deterministic or site.observed or len(site.event_shape):
            return False
        leaves = self.of[name].expression.leaves
        return all(kind == SITE and p in linear[name] for kind, p in leaves)

    def _is_axis(self, name: str, plates: set) -> bool:
        """Whether a site that stays is one whose values can be listed."""
        site = self.sites[name]
        if site.deterministic or name in self.mechanisms.factors:
            return False
        if {f for f in site.frames if f.vectorized} != plates:
            return False
        return name not in self.eliminated and self.is_finite(name)


def is_float(site: Site) -> bool:
    return isinstance(site.value, Tensor) and site.value.is_floating_point()
