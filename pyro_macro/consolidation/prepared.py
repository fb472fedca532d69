# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Algorithm 1, CONSOLIDATE: a program taken apart, and what becomes of its clusters."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import networkx as nx
import torch

from pyro_macro.consolidation.affine_elimination import AffineElimination
from pyro_macro.consolidation.allowed import Allow, Allowed
from pyro_macro.consolidation.cost import Cost, CostReport, nonzero
from pyro_macro.consolidation.elimination import Elimination
from pyro_macro.consolidation.finite_elimination import FiniteElimination
from pyro_macro.consolidation.gaussian import GaussianLaw
from pyro_macro.consolidation.partition import Cluster, boundary, clusters
from pyro_macro.consolidation.rules import Rule, rules
from pyro_macro.consolidation.structure import AFFINE, Component, Structure
from pyro_macro.consolidation.symbolic import size
from pyro_macro.consolidation.tables import Factor
from pyro_macro.errors import UnknownSite, UnsupportedLaw
from pyro_macro.program.mechanisms import Mechanism, arguments, read_mechanisms
from pyro_macro.program.reading import refuse_sharded

if TYPE_CHECKING:
    from pyro_macro.consolidation.relaxed import Relaxed


@dataclass(frozen=True)
class Approximation:
    """How to approximate what cannot be fused.

    :param epsilon: the largest distance of Kolmogorov and Smirnov that is accepted,
        between 0 and 1.
    :param draws: of the original model, to fit and as many to check.
    :param steps: of the optimizer.
    :param components: of the mixtures.
    :param width: of the two hidden layers.
    :param seed: of everything.
    """

    epsilon: float
    draws: int = 20_000
    steps: int = 2_000
    components: int = 8
    width: int = 64
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """What was asked for: see :func:`consolidate`."""

    keep: tuple[str, ...]
    allow: Allow
    partition: tuple[frozenset[str], ...] | None
    approximate: Approximation | None = None


class _Stay(Exception):
    """Sites that have to stay after all, and why."""

    def __init__(self, why: dict[str, str]) -> None:
        super().__init__()
        self.why = why


class Prepared:
    """A program, consolidated for arguments of some shape.

    :ivar mechanisms: the program as it was read.
    :ivar allowed: the interventions it is prepared for.
    :ivar clusters: those of the user, in order; ``None`` if they are found.
    :ivar structure: what stays and what is eliminated; ``None`` if the program could
        not be taken apart, and is run as it is.
    :ivar trouble: why not.
    :ivar eliminations: what eliminates the parents of a site, by its name.
    :ivar rules: simplified formulas of deterministic sites.
    :ivar wanted: sites that are kept on purpose, and observed ones.
    :ivar names: what the arguments of the model are called, by how leaves are.
    """

    def __init__(
        self, model: Callable[..., Any], request: Request, args: tuple, kwargs: dict
    ) -> None:
        self.mechanisms = read_mechanisms(model, args, kwargs)
        self.of = self.mechanisms.of
        refuse_sharded((m.site for m in self.of.values()), "what can be fused")
        for name in request.keep:
            if name not in self.of:
                raise UnknownSite.named("consolidate, keep", name, self.of)
        self.allowed = Allowed(request.allow, self.of)
        self.names = _argument_names(model)
        kept = {*request.keep, *self.mechanisms.factors}
        kept |= {name for name, m in self.of.items() if m.site.observed}
        self.model, self.arguments, self.wanted = model, (args, kwargs), frozenset(kept)
        why: dict[str, str] = {}
        graph = self.mechanisms.graph()
        needed = kept.union(*(nx.ancestors(graph, name) for name in kept))
        self.clusters: tuple[Cluster, ...] | None = None
        self.border: frozenset[str] = frozenset()
        if request.partition is not None:
            self.clusters = clusters(graph, request.partition)
            border = boundary(graph.subgraph(needed), self.clusters)
            self.border = frozenset(border)
            why = {n: "another cluster needs it" for n in border if n not in kept}
        self.structure: Structure | None = None
        self.eliminations: dict[str, Elimination[Any]] = {}
        self.unfused: list[Component] = []
        self.rules: dict[str, Rule] = {}
        self.relaxed: Relaxed | None = None
        self.trouble = self.mechanisms.trouble or self._trouble(needed)
        if self.trouble is None:
            self._take_apart(kept, why)

    def _trouble(self, needed: Collection[str]) -> str | None:
        for name, mechanism in self.of.items():
            if name in needed and mechanism.trouble is not None:
                return f"site {name!r}: {mechanism.trouble}"
        return None

    def _take_apart(self, kept: set[str], why: dict[str, str]) -> None:
        while True:
            explicit = self.allowed.values(self.of)
            structure = Structure(self.mechanisms, kept, why, explicit)
            try:
                self._eliminate(structure)
                break
            except _Stay as error:
                why.update(error.why)
        self.structure = structure
        self.rules = rules(structure, self.eliminations, self.names)

    def _eliminate(self, structure: Structure) -> None:
        """Finds what eliminates the parents of each child."""
        self.eliminations, self.unfused = {}, []
        for component in structure.components:
            kind: Any = FiniteElimination
            if component.kind == AFFINE:
                kind = AffineElimination
            try:
                made = kind(component, structure)
            except UnsupportedLaw as error:
                blamed = dict.fromkeys(component.eliminated, str(error))
                raise _Stay(structure.random(blamed)) from None
            if not set(component.eliminated) & set(structure.uncertain):
                # Nothing is random: worth it only if it costs less
                before = sum((cost_of(self.of[n]) for n in component.sites), Cost())
                if _fused_cost(made).exceeds(before):
                    self.unfused.append(component)
                    continue
            for name in component.children:
                self.eliminations[name] = made

    def has_rest(self) -> bool:
        """Whether there is something that could not be fused."""
        return self.structure is None or bool(
            set(self.structure.retained) - self.wanted - self.border
        )

    def is_for(self, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether the program is the same for the values of other arguments."""
        if not self.mechanisms.by_value and self.relaxed is None:
            return True
        values = self.mechanisms.values
        given = arguments(args, kwargs)
        return all(torch.equal(values[leaf], tensor) for leaf, tensor in given)

    @property
    def stays(self) -> list[str]:
        """The sites that are left, in program order."""
        stays = list(self.of) if self.structure is None else self.structure.stays
        if self.relaxed is None:
            return stays
        return [n for n in stays if n not in self.relaxed.gone]

    def cost(self) -> CostReport:
        """Before and after, in the declared measure."""
        before = sum((cost_of(m) for m in self.of.values()), Cost())
        if self.structure is None:
            return CostReport(before, before)
        after = Cost()
        for elimination in set(self.eliminations.values()):
            after += _fused_cost(elimination)
        for name in self.stays:
            if name in self.rules:
                each = size(self.rules[name].value)
                after += Cost(1, 0, each * self.of[name].site.shape.numel(), 0)
            elif name not in self.eliminations:
                after += cost_of(self.of[name])
        for name in self._evaluated():
            after += cost_of(self.of[name])
        return CostReport(before, after)

    def _evaluated(self) -> set[str]:
        """Deterministic sites that are computed on the way, without an intervention."""
        assert self.structure is not None
        wanted: set[str] = set()
        stack: list[str] = []
        for name in self.stays:
            if name not in self.eliminations and name not in self.rules:
                stack.extend(self.of[name].parents)
        for elimination in set(self.eliminations.values()):
            leaves = elimination.plan(frozenset()).leaves
            stack.extend(str(which) for kind, which in leaves if kind == "site")
        while stack:
            name = stack.pop()
            if name in self.structure.computed and name not in wanted:
                wanted.add(name)
                stack.extend(self.of[name].parents)
        return wanted

    def method(self) -> dict[str, str]:
        """How each cluster was dealt with, by its sites."""
        found: dict[str, str] = {}
        if self.relaxed is not None:
            achieved = (
                f"learned: Kolmogorov-Smirnov distance {self.relaxed.epsilon:.3g}"
            )
            found[_listed(list(self.relaxed.laws))] = achieved
        if self.structure is None:
            return found or {", ".join(self.of): f"unfused: {self.trouble}"}

        def note(names: Iterable[str], what: str) -> None:
            found[_listed(list(names))] = what

        for elimination in dict.fromkeys(self.eliminations.values()):
            values = "" if elimination.is_static else ", given the sites it depends on"
            note(elimination.component.sites, elimination.method + values)
        for component in self.unfused:
            note(component.sites, "kept as factors: fused it would cost more")
        for name, rule in self.rules.items():
            note([*sorted(rule.requires), name], "exact: simplified formula")
        gone = {n for e in self.eliminations.values() for n in e.component.eliminated}
        gone |= {n for r in self.rules.values() for n in r.requires}
        rest = self._evaluated() - gone
        if rest:
            note(sorted(rest), "computed on the way")
        gone_too = frozenset() if self.relaxed is None else self.relaxed.gone
        for name, why in self.structure.retained.items():
            if name in gone_too:
                continue
            note([name], f"stays: {why}")
        if self.structure.dropped:
            note(self.structure.dropped, "dropped: nothing that stays depends on it")
        return found


def _met(name: str, elimination: Elimination[Any], plan: Any) -> Cost:
    """What a site costs that is evaluated in each run, a chain as what is left."""
    if name in plan.starts and elimination.chain_of(name).links is not None:
        link = elimination.chain_of(name).after(plan.starts[name][0])
        numbers = sum(nonzero(part) for part in vars(link).values())
        return Cost(0, 0, numbers, numbers)
    sites = elimination.behind(name, plan)
    return sum((cost_of(elimination.structure.of[s]) for s in sites), Cost())


def cost_of(mechanism: Mechanism) -> Cost:
    """What a site costs as the program has it."""
    site = mechanism.site
    size = site.shape.numel()
    draws = 0 if site.deterministic or site.observed else size
    constants = [
        c for c in mechanism.expression.constants if isinstance(c, torch.Tensor)
    ]
    numbers = sum(nonzero(c) for c in constants)
    numbers += len(mechanism.expression.constants) - len(constants)
    if mechanism.expression.multiplies:
        operations = sum(nonzero(c) for c in constants if c.dim() > 1)
    else:
        operations = mechanism.expression.arithmetic * size
        operations += mechanism.expression.lookups * size
    return Cost(1, draws, operations, numbers)


def _work(terms: list[torch.Tensor], const: torch.Tensor) -> int:
    """Operations of an affine form; a factor of one is no multiplication."""
    if any(t.numel() > 1 for t in terms):
        return sum(map(nonzero, terms))
    factors = [float(t) for t in terms if float(t)]
    added = len(factors) + bool(const.any()) - 1
    return sum(f != 1 for f in factors) + max(added, 0)


def _fused_cost(elimination: Elimination[Any]) -> Cost:
    """What the children of a component cost once their parents are eliminated."""
    total = Cost()
    plan = elimination.plan(frozenset())
    sites = elimination.structure.sites
    # Deterministic children that become random share the randomness of their parents
    shared = sum(
        sites[n].shape.numel()
        for n in elimination.component.eliminated
        if not sites[n].deterministic
    )
    for name in elimination.component.children:
        site = sites[name]
        draws = 0 if site.observed else site.shape.numel()
        if site.deterministic:
            draws = min(draws, shared)
            shared -= draws
        law = plan.laws.get(name)
        if isinstance(law, GaussianLaw):
            terms = law.mean.terms.values()
            noise = nonzero(law.covariance)
            stored = [t for t in terms if t.numel() > 1 or float(t) != 1]
            numbers = sum(map(nonzero, stored)) + nonzero(law.mean.const) + noise
            work = _work(list(terms), law.mean.const)
            total += Cost(1, draws if noise else 0, work, numbers)
        elif isinstance(law, Factor):
            probs = law.table.exp()
            certain = bool(((probs == 0) | (probs == 1)).all())
            draws = 0 if certain and site.deterministic else draws
            one = probs.shape[: elimination.frame.depth].numel() == 1
            copied = (
                one
                and len(law.axes) == 2
                and torch.equal(
                    probs.reshape(probs.shape[-2:]),
                    torch.eye(*probs.shape[-2:]).to(probs),
                )
            )
            looked_up = (0, 0) if copied else (len(law.axes) - 1, nonzero(probs))
            total += Cost(1, draws, *looked_up)
        else:
            parts = sum((_met(n, elimination, plan) for n in plan.stages[name]), Cost())
            total += Cost(1, draws, parts.operations, parts.numbers)
    return total


def _listed(names: list[str]) -> str:
    if len(names) <= 8:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, ... {len(names) - 4} more ..., {names[-1]}"


def _argument_names(model: Callable[..., Any]) -> Mapping[str, str]:
    """What the arguments of a model are called, by position."""
    try:
        names = list(inspect.signature(model).parameters)
    except (TypeError, ValueError):
        return {}
    return {f"arg{i}": name for i, name in enumerate(names)}
