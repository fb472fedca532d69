# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What the elimination of sites has in common, whatever their family.

Chains are contracted first, so that under each intervention only sites remain where
paths meet or part. These are met in program order, as far as the sites that stay depend
on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

from pyro_macro.consolidation.affine import linear_leaves
from pyro_macro.consolidation.compose import suffixes, taken
from pyro_macro.consolidation.frame import Frame
from pyro_macro.consolidation.known import NATURAL, Known
from pyro_macro.consolidation.structure import Component, Structure
from pyro_macro.program.tape import Leaf

PLANS = 256  # of interventions, that are remembered

G = TypeVar("G", bound="Group")


class Group(Protocol):
    """Sites whose mechanisms are computed in the same way, at once."""

    @property
    def names(self) -> list[str]:
        """The sites."""

    @property
    def others(self) -> tuple[tuple[Leaf, ...], ...]:
        """The leaves that are values, whatever they are."""


@dataclass(eq=False)
class Chain:
    """Sites each of which is all that the next one has of the component.

    :ivar head: what the first link starts from, a site that is known or live.
    :ivar sites: those in between, and then the end.
    :ivar links: the mechanisms of all sites, stacked, if these are numbers.
    """

    head: str
    sites: list[str]
    links: Any = None
    _suffixes: Any = field(default=None, init=False)

    @property
    def end(self) -> str:
        return self.sites[-1]

    def after(self, start: int) -> Any:
        """From before the site at a place to the end, as one mechanism."""
        if self._suffixes is None:
            self._suffixes = suffixes(self.links)
        return taken(self._suffixes, start)


@dataclass(frozen=True, eq=False)
class Plan(Generic[G]):
    """What is done under an intervention on some sites.

    :ivar stages: for each child, in program order, the sites that are met because of
        it, itself the last.
    :ivar starts: for the end of each chain, from which of its sites on it matters, and
        after what.
    :ivar groups: for each child, the sites of its stage whose mechanisms depend on
        values, and are evaluated in each run.
    :ivar leaves: these values.
    :ivar interventions: the sites that are set.
    :ivar unseen: those of them whose natural values will not be known.
    :ivar laws: the laws of children that are known beforehand.
    """

    stages: dict[str, list[str]]
    starts: dict[str, tuple[int, str]]
    groups: dict[str, list[G]]
    leaves: frozenset[Leaf]
    interventions: frozenset[str]
    unseen: frozenset[str]
    laws: dict[str, Any] = field(default_factory=dict)

    def key(self, child: str) -> str:
        """What the value of a child that tells of its causes is called."""
        return NATURAL + child if child in self.interventions else child

    def later(self, child: str) -> list[str]:
        """The sites that are met after a child."""
        children = list(self.stages)
        rest = children[children.index(child) + 1 :]
        return [name for c in rest for name in self.stages[c]]


class Elimination(ABC, Generic[G]):
    """Sites that are eliminated together.

    A new family owes :meth:`width`, :meth:`groups`, :meth:`links`, :meth:`prepare` and
    :meth:`begin`.

    :param component: the sites.
    :param structure: the program that they are part of.
    """

    method: str

    def __init__(self, component: Component, structure: Structure) -> None:
        self.component, self.structure = component, structure
        self.frame = Frame(structure.sites.values(), component.plates)
        self.flags = {
            name: linear_leaves(structure.of[name], component.linear[name])
            for name in component.sites
        }
        self.static: dict[str, Any] = {}  # mechanisms that are numbers
        self.general: set[str] = set()  # children of no family
        self.read()
        self.chains = self._find_chains()
        between = {n for chain in self.chains for n in chain.sites[:-1]}
        self._place = {
            n: (chain, i) for chain in self.chains for i, n in enumerate(chain.sites)
        }
        self._reduced = [n for n in component.sites if n not in between]
        self._plans: dict[Any, Plan[G]] = {}
        self.check()

    def check(self) -> None:
        """Refuses what would fail in each run.

        :raises UnsupportedLaw: if a child's law is of no kind that Pyro has.
        """

    @abstractmethod
    def read(self) -> None:
        """Finds the mechanisms that are numbers."""

    @abstractmethod
    def width(self, name: str) -> int | None:
        """The size of a site as input and output of links, ``None`` if it is none."""

    @abstractmethod
    def groups(self, names: Iterable[str]) -> list[G]:
        """Sites in groups that are evaluated at once."""

    @abstractmethod
    def links(self, names: Sequence[str]) -> Any:
        """The mechanisms of a chain that are numbers, stacked."""

    @abstractmethod
    def prepare(self, plan: Plan[G]) -> None:
        """Adds to a plan the laws that are known beforehand."""

    @abstractmethod
    def begin(self, plan: Plan[G], known: Known) -> Eliminating:
        """The elimination in one run."""

    @property
    def is_static(self) -> bool:
        """Whether all mechanisms are numbers."""
        sites = self.component.sites
        return all(name in self.static or name in self.general for name in sites)

    def start(
        self, interventions: frozenset[str], unseen: frozenset[str], known: Known
    ) -> Eliminating:
        """The elimination in one run, under an intervention on some sites.

        :param unseen: those whose natural values will not be known.
        """
        mine = frozenset(n for n in interventions if n in self.component.linear)
        key = (mine, unseen & mine)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            plan = self._plans[key] = self.plan(*key)
        return self.begin(plan, known)

    def covers(self, interventions: frozenset[str], known: Known) -> bool:
        """Whether it can tell the law under the values that sites are set to."""
        return True

    def chain_of(self, end: str) -> Chain:
        return self._place[end][0]

    def behind(self, name: str, plan: Plan[G]) -> list[str]:
        """The sites whose mechanisms make up that of a site."""
        if name not in plan.starts:
            return [name]
        return self.chain_of(name).sites[plan.starts[name][0] :]

    def parents(self, name: str, plan: Plan[G]) -> tuple[str, ...]:
        """What is left of a site's parents within the family."""
        if name in plan.starts:
            return (plan.starts[name][1],)
        return self.component.linear[name]

    def wanted(self, child: str, plan: Plan[G]) -> set[str]:
        """The sites that are parents of those met after a child."""
        return {p for n in plan.later(child) for p in self.parents(n, plan)}

    def plan(
        self, interventions: frozenset[str], unseen: frozenset[str] = frozenset()
    ) -> Plan[G]:
        """What is done under an intervention.

        A child that is intervened on has a natural value all the same, and that tells
        of causes it has in common with others.
        """
        starts = {chain.end: (0, chain.head) for chain in self.chains}
        for name in interventions:
            if name in self._place:
                chain, i = self._place[name]
                if name != chain.end and i + 1 > starts[chain.end][0]:
                    starts[chain.end] = (i + 1, name)  # the last one wins
        plan: Plan[G] = Plan({}, starts, {}, frozenset(), interventions, unseen)
        eliminated = set(self.component.eliminated)
        met = set(interventions.difference(self.component.children))
        for child in self.component.children:
            stage: set[str] = set()
            stack = [child]
            while stack:
                name = stack.pop()
                if name in met:
                    continue
                met.add(name)
                stage.add(name)
                stack.extend(p for p in self.parents(name, plan) if p in eliminated)
            order = self.structure.order
            plan.stages[child] = sorted(stage, key=order.__getitem__)
        leaves: set[Leaf] = set()
        for child, together in plan.stages.items():
            needed = [n for name in together for n in self.behind(name, plan)]
            rest = [n for n in needed if n not in self.static and n not in self.general]
            groups = self.groups(rest)
            plan.groups[child] = groups
            leaves.update(x for g in groups for some in g.others for x in some)
        plan = replace(plan, leaves=frozenset(leaves))
        self.prepare(plan)
        return plan

    def _find_chains(self) -> list[Chain]:
        linear, graph = self.component.linear, self.structure.graph
        dropped = set(self.structure.dropped)
        follows: dict[str, str] = {}
        for name in self.component.eliminated:
            children = [c for c in graph.successors(name) if c not in dropped]
            if len(children) != 1 or len(linear[name]) != 1:
                continue
            (child,), (head,) = children, linear[name]
            if linear.get(child) != (name,):
                continue
            widths = {self.width(n) for n in (head, name, child)}
            if len(widths) == 1 and None not in widths:
                follows[name] = child
        chains = []
        ends = set(follows.values())
        for first in [n for n in follows if n not in ends]:
            sites = [first]
            while sites[-1] in follows:
                sites.append(follows[sites[-1]])
            chain = Chain(linear[first][0], sites)
            if all(n in self.static for n in sites):
                chain.links = self.links(sites)
            chains.append(chain)
        return chains


class Eliminating(ABC):
    """The elimination of a component in one run of the fused program."""

    @abstractmethod
    def law(self, name: str) -> Any:
        """The distribution of a site given what is known; a tensor if it is certain."""

    @abstractmethod
    def observe(self, name: str) -> None:
        """Takes note that a site is known: it tells of those eliminated."""
