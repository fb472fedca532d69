# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A component of finite sites: contraction of their tables.

A site that stays may be of any kind: given finite ones that are eliminated its law is a
mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import opt_einsum
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_macro.consolidation.affine import linear_leaves
from pyro_macro.consolidation.compose import Table, product, stacked, suffixes, taken
from pyro_macro.consolidation.frame import Frame, Worlds
from pyro_macro.consolidation.known import Known
from pyro_macro.consolidation.laws import finite, trimmed
from pyro_macro.consolidation.structure import CELLS, Component, Structure
from pyro_macro.errors import InterventionNotAllowed, UnsupportedLaw
from pyro_macro.laws.finite.configurations import finite_values, log_table
from pyro_macro.program.mechanisms import Mechanism
from pyro_macro.program.side_by_side import SideBySide
from pyro_macro.program.tape import Leaf

PLANS = 256
STATIC = 1 << 16  # cells of a table of a law that is kept, at most


@dataclass(frozen=True, eq=False)
class Factor:
    """A table with named axes behind worlds and plates.

    :ivar axes: names of sites.
    :ivar table: shape ``worlds + plates + (number of values of each)``.
    """

    axes: tuple[str, ...]
    table: Tensor


@dataclass(eq=False)
class Chain:
    """Sites each of which is all that the next one has of the component."""

    head: str
    sites: list[str]
    links: Table | None = None
    suffixes: Table | None = field(default=None, init=False)

    @property
    def end(self) -> str:
        return self.sites[-1]

    def after(self, start: int) -> Table:
        if self.suffixes is None:
            assert self.links is not None
            self.suffixes = suffixes(self.links)
        return taken(self.suffixes, start)


@dataclass(frozen=True, eq=False)
class _Plan:
    stages: dict[str, list[str]]
    starts: dict[str, tuple[int, str]]
    dynamic: dict[str, list[_Group]]
    laws: dict[str, Factor | None]


class _Group:
    """Finite sites whose tables are computed in the same way."""

    def __init__(
        self,
        mechanisms: Sequence[Mechanism],
        flags: tuple[bool, ...],
        supports: Sequence[Sequence[Tensor]],
    ) -> None:
        self.mechanisms, self.flags, self.supports = mechanisms, flags, supports
        self.group = SideBySide({m.name: m.expression for m in mechanisms})
        self.slots = [i for i, is_axis in enumerate(flags) if is_axis]
        self.sizes = tuple(len(s) for s in supports[0])
        self.count = math.prod(self.sizes)
        pairs = zip(self.group.leaves, flags, strict=True)
        self.others = tuple(tuple(leaves) for leaves, axis in pairs if not axis)

    @property
    def names(self) -> list[str]:
        return self.group.names

    def outputs(
        self,
        values: Mapping[Leaf, Tensor],
        worlds: frozenset[Leaf],
        size: int | None,
        shapes: Sequence[torch.Size],
    ) -> list[Tensor]:
        """What the members compute under all values of their axes.

        :param shapes: of the parents that are axes.
        :returns: shape ``(W * C, G)`` and then that of the output.
        """
        grid = torch.arange(self.count)
        repeat = 1 if size is None else size
        instead: dict[int, Tensor] = {}
        step = self.count
        for place, (slot, shape) in enumerate(zip(self.slots, shapes, strict=True)):
            step //= self.sizes[place]
            digits = grid // step % self.sizes[place]
            columns = [support[place][digits] for support in self.supports]
            column = torch.stack(columns, 1)  # (C, G)
            column = column.repeat(repeat, 1)
            column = column.reshape(column.shape + (1,) * len(shape))
            instead[slot] = column.expand((*column.shape[:2], *shape))
        wide = {leaf: values[leaf] for leaf in values}
        for leaf in worlds:
            wide[leaf] = values[leaf].repeat_interleave(self.count, 0)
        marked = worlds or frozenset({("", "")})  # there is a dimension in front
        given = self.group.values(wide, worlds, instead)
        if not instead and not worlds:
            outputs = self.group.outputs(wide, frozenset(), given)
            return [o.unsqueeze(0) for o in outputs]
        return self.group.outputs(wide, marked, given, frozenset(instead))


class FiniteComponent:
    """Finite sites that are eliminated together."""

    def __init__(self, component: Component, structure: Structure) -> None:
        self.component, self.structure = component, structure
        self.frame = Frame(structure.sites.values(), component.plates)
        self._flags = {
            name: linear_leaves(structure.of[name], component.linear[name])
            for name in component.sites
        }
        self.supports: dict[str, Tensor] = {}
        self.reachable: dict[str, int] = {}
        self._static: dict[str, Factor] = {}
        self._memo: dict[Any, tuple[Tensor, Tensor]] = {}
        self._find_supports()
        self.general = {n for n in component.children if n not in self.supports}
        fixed = [n for n in self.supports if n in self._flags and all(self._flags[n])]
        for group in self._groups(n for n in fixed if n not in self._static):
            self._static.update(self._tables(group, {}, frozenset(), None))
        self.is_static = all(
            n in self._static for n in component.sites if n not in self.general
        )
        self.chains = self._find_chains()
        between = {n for chain in self.chains for n in chain.sites[:-1]}
        self._place = {
            n: (chain, i) for chain in self.chains for i, n in enumerate(chain.sites)
        }
        self._reduced = [n for n in component.sites if n not in between]
        self._plans: dict[frozenset[str], _Plan] = {}

    @property
    def method(self) -> str:
        return "exact: finite"

    def start(self, interventions: frozenset[str], known: Known) -> FiniteRun:
        """The elimination in one run, under an intervention on some sites."""
        mine = interventions.intersection(self.component.linear)
        plan = self._plans.get(mine)
        if plan is None:
            if len(self._plans) >= PLANS:
                self._plans.clear()
            plan = self._plans[mine] = self._planned(mine)
        return FiniteRun(self, plan, mine, known)

    # Values and tables

    def _find_supports(self) -> None:
        """The values of each site, of deterministic ones those that can be reached."""
        structure = self.structure
        wanted = {p for parents in self.component.linear.values() for p in parents}
        for name in structure.of:
            site = structure.sites[name]
            if name not in self.component.linear and name not in wanted:
                continue
            if not site.deterministic:
                values = None
                if not site.event_shape and name not in structure.mechanisms.factors:
                    values = finite_values(site.fn)
                if values is not None:
                    self.supports[name] = values
                continue
            flags = self._flags.get(name)
            if flags is None or not all(flags) or site.event_shape:
                continue
            self._tabulate(name)

    def _tabulate(self, name: str) -> None:
        """The table of a deterministic site whose parents are all finite."""
        mechanism = self.structure.of[name]
        parents = mechanism.expression.parents
        supports = [self.supports[p] for p in parents]
        if math.prod(len(s) for s in supports) > CELLS:
            raise UnsupportedLaw(
                f"site {name!r}: more than {CELLS:,} joint values of its parents"
            )
        constants = tuple(
            (c.dtype, tuple(c.shape), tuple(c.flatten().tolist()))
            if isinstance(c, Tensor)
            else c
            for c in mechanism.expression.constants
        )
        key = (
            mechanism.expression.key,
            constants,
            tuple((s.dtype, tuple(s.tolist())) for s in supports),
            tuple(self.structure.sites[p].value.shape for p in parents),
        )
        if key not in self._memo:
            self._memo[key] = self._evaluated(mechanism, supports)
        values, table = self._memo[key]
        self.supports[name] = values
        self._static[name] = Factor((*parents, name), table)

    def _evaluated(
        self, mechanism: Mechanism, supports: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        flags = (True,) * len(supports)
        group = _Group([mechanism], flags, [supports])
        shapes = [
            self.structure.sites[p].value.shape for p in mechanism.expression.parents
        ]
        (found,) = group.outputs({}, frozenset(), None, shapes)
        found = found[:, 0]  # (C,) and then the site
        found = found.expand((group.count, *found.shape[1:]))
        values = found.unique()
        hit = (found.unsqueeze(-1) == values).double()  # (C, plates, V)
        missing = self.frame.depth - (hit.dim() - 2)
        hit = hit.reshape((group.count,) + (1,) * missing + hit.shape[1:])
        table = hit.movedim(0, -2)
        return values, table.reshape((*table.shape[:-2], *group.sizes, len(values)))

    def _groups(self, names: Iterable[str]) -> list[_Group]:
        structure = self.structure
        groups: dict[Any, list[Mechanism]] = {}
        for name in names:
            mechanism = structure.of[name]
            axes = self._axes(name)
            key = (
                mechanism.expression.key,
                self._flags[name],
                tuple(len(self.supports[p]) for p in axes),
                tuple(structure.sites[p].value.shape for p in mechanism.parents),
                type(mechanism.site.fn),
            )
            groups.setdefault(key, []).append(mechanism)
        return [
            _Group(
                members,
                key[1],
                [[self.supports[p] for p in self._axes(m.name)] for m in members],
            )
            for key, members in groups.items()
        ]

    def _axes(self, name: str) -> list[str]:
        """The finite parents, in the order of the leaves."""
        pairs = zip(
            self.structure.of[name].expression.leaves, self._flags[name], strict=True
        )
        return [str(leaf[1]) for leaf, is_axis in pairs if is_axis]

    def _tables(
        self,
        group: _Group,
        values: Mapping[Leaf, Tensor],
        worlds: frozenset[Leaf],
        size: int | None,
    ) -> dict[str, Factor]:
        """The tables of random sites, ``(W,) + plates`` in front."""
        fn = self._built(group, values, worlds, size)
        first = group.mechanisms[0]
        support = self.supports[first.name]
        logs = log_table(fn, support)  # (V, W * C, G) + plates
        lead = size or 1
        plates = torch.Size(logs.shape[3:])
        logs = logs.expand((len(support), lead * group.count, *logs.shape[2:]))
        table = logs.exp().reshape(
            (len(support), lead, group.count, logs.shape[2], *plates)
        )
        # (G, W) + plates + (C, V)
        table = table.movedim((3, 1), (0, 1)).movedim(2, -1).movedim(2, -2)
        table = table.reshape((*table.shape[:-2], *group.sizes, len(support)))
        found = {}
        for i, name in enumerate(group.names):
            own = table[i if table.shape[0] > 1 else 0]
            own = own if size is not None else own[0]
            found[name] = Factor((*self._axes(name), name), own)
        return found

    def _built(
        self,
        group: _Group,
        values: Mapping[Leaf, Tensor],
        worlds: frozenset[Leaf],
        size: int | None,
    ) -> Any:
        """The distributions of the members, batch shape ``(W * C, G) + plates``."""
        parents = self._axes(group.names[0])
        shapes = [self.structure.sites[p].value.shape for p in parents]
        outputs = group.outputs(values, worlds, size, shapes)
        made = group.mechanisms[0].parts
        assert made is not None
        tensors = []
        for tensor, event in zip(outputs, made.event_dims, strict=False):
            lead, rest = tensor.shape[:2], tensor.shape[2:]
            missing = self.frame.depth + event - len(rest)
            tensors.append(tensor.reshape((*lead, *(1,) * missing, *rest)))
        return made.build(tensors)

    # Chains

    def _find_chains(self) -> list[Chain]:
        component, graph = self.component, self.structure.graph
        dropped = set(self.structure.dropped)
        follows: dict[str, str] = {}
        for name in component.eliminated:
            children = [c for c in graph.successors(name) if c not in dropped]
            axes = component.linear[name]
            if len(children) != 1 or len(axes) != 1:
                continue
            child = children[0]
            if component.linear.get(child) != (name,) or child in self.general:
                continue
            sizes = {len(self.supports[n]) for n in (name, child, axes[0])}
            if len(sizes) == 1:
                follows[name] = child
        chains = []
        for first in [n for n in follows if component.linear[n][0] not in follows]:
            sites = [first]
            while sites[-1] in follows:
                sites.append(follows[sites[-1]])
            chain = Chain(component.linear[first][0], sites)
            if all(n in self._static for n in sites):
                chain.links = stacked([Table(self._static[n].table) for n in sites])
            chains.append(chain)
        return chains

    # Plans

    def _planned(self, interventions: frozenset[str]) -> _Plan:
        component = self.component
        starts = {chain.end: (0, chain.head) for chain in self.chains}
        for name in interventions:
            if name in self._place:
                chain, i = self._place[name]
                if name != chain.end and i + 1 > starts[chain.end][0]:
                    starts[chain.end] = (i + 1, name)
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
                parents = (
                    (starts[name][1],) if name in starts else component.linear[name]
                )
                stack.extend(p for p in parents if p in eliminated)
            order = self.structure.order
            stages[child] = sorted(stage, key=order.__getitem__)
        dynamic = {}
        for child, together in stages.items():
            needed = [
                n
                for name in together
                for n in (
                    self._place[name][0].sites[starts[name][0] :]
                    if name in starts
                    else [name]
                )
            ]
            dynamic[child] = self._groups(
                n for n in needed if n not in self._static and n not in self.general
            )
        plan = _Plan(stages, starts, dynamic, {})
        if not any(dynamic.values()):
            self._tabulate_laws(plan, interventions)
        return plan

    def factor(self, name: str, plan: _Plan, found: Mapping[str, Factor]) -> Factor:
        """A site's table given what is left of its parents."""
        if name not in plan.starts:
            return self._static[name] if name in self._static else found[name]
        chain = self._place[name][0]
        start, head = plan.starts[name]
        if chain.links is not None:
            link = chain.after(start)
        else:
            tables = [
                (self._static[n] if n in self._static else found[n]).table
                for n in chain.sites[start:]
            ]
            link = product(stacked([Table(t) for t in tables]))
        return Factor((head, name), link.probs)

    def _tabulate_laws(self, plan: _Plan, interventions: frozenset[str]) -> None:
        """The laws as tables over what they depend on, where these are small."""
        known = set(interventions)
        factors: list[Factor] = []
        for child in self.component.children:
            if child in interventions:
                continue
            if child in self.general or plan.laws.get(child, True) is None:
                return
            factors += [self.factor(n, plan, {}) for n in plan.stages[child]]
            axes = {a for f in factors for a in f.axes}
            outside = {a for a in axes if self._is_known(a, known)}
            cells = math.prod(len(self.supports[a]) for a in (*outside, child))
            if cells * self.frame.plates.numel() > STATIC:
                return
            ordered = sorted(outside, key=self.structure.order.__getitem__)
            joint = contracted(factors, (*ordered, child), self.frame.depth)
            total = joint.sum(-1, keepdim=True)
            table = joint / torch.where(total > 0, total, 1.0)
            plan.laws[child] = Factor((*ordered, child), table)
            known.add(child)

    def _is_known(self, name: str, known: set[str]) -> bool:
        return name in known or name not in self.component.linear


class FiniteRun:
    """The elimination of a component in one run of the fused program."""

    def __init__(
        self,
        owner: FiniteComponent,
        plan: _Plan,
        interventions: frozenset[str],
        known: Known,
    ) -> None:
        self.owner, self.plan, self.known = owner, plan, known
        self.interventions = interventions
        self.factors: list[Factor] = []  # of the sites met so far, contracted

    def law(self, name: str) -> Any:
        """The distribution of a site given what is known; a tensor if it is certain."""
        owner, plan = self.owner, self.plan
        site = owner.structure.sites[name]
        if plan.laws.get(name) is not None:
            factor = plan.laws[name]
            assert factor is not None
            probs = self._looked_up(factor)
            return finite(probs, owner.supports[name], site)
        worlds = self._common_worlds()
        self._settle()
        found = {}
        for group in plan.dynamic[name]:
            values, wide = self.known.values(group.others, worlds)
            size = worlds.size if wide else None
            for n, f in owner._tables(group, values, wide, size).items():
                table = f.table
                if size is not None:
                    table = worlds.behind(table, len(f.axes))
                found[n] = Factor(f.axes, table)
        new = [n for n in plan.stages[name] if n not in owner.general]
        self.factors += [owner.factor(n, plan, found) for n in new]
        if name in owner.general:
            return self._mixture(name, worlds)
        known = self._given(self._live())
        joint = contracted([*self.factors, *known], (name,), owner.frame.depth)
        probs = joint / joint.sum(-1, keepdim=True)
        return finite(probs, owner.supports[name], site)

    def _live(self) -> list[str]:
        return [a for f in self.factors for a in f.axes]

    def _looked_up(self, factor: Factor) -> Tensor:
        """A row of a table, by the values of known sites."""
        owner = self.owner
        names = factor.axes[:-1]
        depth = owner.frame.depth
        table = factor.table
        indices = [self._index(n) for n in names]
        if not names:
            return table
        if all(size == 1 for size in table.shape[:depth]):
            table = table.reshape(table.shape[depth:])
            return table[tuple(indices)]
        factors = [factor]
        hots = []
        shape = torch.broadcast_shapes(*(i.shape for i in indices), table.shape[:depth])
        for n, index in zip(names, indices, strict=True):
            hot = torch.nn.functional.one_hot(index, len(owner.supports[n])).double()
            hots.append(Factor((n,), hot.expand((*shape, hot.shape[-1]))))
        return contracted([*factors, *hots], (factor.axes[-1],), len(shape))

    def _index(self, name: str) -> Tensor:
        """Which of its values a known site has."""
        support = self.owner.supports[name]
        value = self.known[name]
        hit = value.unsqueeze(-1) == support.to(value.device)
        if not bool(hit.any(-1).all()):
            raise InterventionNotAllowed(
                f"site {name!r}: the value {value.flatten()[:5].tolist()} is none of "
                f"{support.tolist()[:20]}. Set it to one of these."
            )
        return hit.to(torch.uint8).argmax(-1)

    def _common_worlds(self) -> Worlds:
        """The worlds of all that is known, wherever the component depends on it."""
        owner = self.owner
        leaves = {
            leaf
            for groups in self.plan.dynamic.values()
            for group in groups
            for leaves in group.others
            for leaf in leaves
        }
        leaves |= {
            ("site", p) for parents in owner.component.linear.values() for p in parents
        }
        leaves |= {("site", n) for n in owner.component.children}
        for name in owner.general:
            leaves |= set(owner.structure.of[name].expression.leaves)
        return self.known.worlds(x for x in leaves if self.known.has(x))

    def _given(self, names: Iterable[str]) -> list[Factor]:
        """Known sites as factors that are one at their values."""
        owner = self.owner
        found = []
        for name in dict.fromkeys(names):
            if name not in self.known.sites:
                continue
            if name in owner.component.eliminated and name not in self.interventions:
                continue
            hot = torch.nn.functional.one_hot(
                self._index(name), len(owner.supports[name])
            ).double()
            found.append(Factor((name,), hot))
        return found

    def _settle(self) -> None:
        """Conditions on the last site, and sums out what is not needed any more."""
        if not self.factors:
            return
        owner, plan = self.owner, self.plan
        order = list(plan.stages)
        rest = [n for c in order if c not in self.known.sites for n in plan.stages[c]]
        wanted = {
            p
            for n in rest
            for p in (
                (plan.starts[n][1],) if n in plan.starts else owner.component.linear[n]
            )
        }
        axes = list(dict.fromkeys(a for f in self.factors for a in f.axes))
        known = self._given(axes)
        given = {f.axes[0] for f in known}
        kept = tuple(a for a in axes if a in wanted and a not in given)
        joint = contracted([*self.factors, *known], kept, owner.frame.depth)
        dims = tuple(range(joint.dim() - len(kept), joint.dim()))
        total = joint.sum(dims, keepdim=True) if dims else joint
        self.factors = [Factor(kept, joint / torch.where(total > 0, total, 1.0))]

    def _mixture(self, name: str, worlds: Worlds) -> Any:
        """The law of a site of any kind, given finite ones: a mixture."""
        owner = self.owner
        site = owner.structure.sites[name]
        group = owner._groups([name])[0]
        values, wide = self.known.values(group.others, worlds)
        size = worlds.size if wide else None
        parents = owner._axes(name)
        known = self._given([*self._live(), *parents])
        weights = contracted(
            [*self.factors, *known], tuple(parents), owner.frame.depth, owner.supports
        )
        weights = weights.flatten(-len(parents))
        weights = weights / weights.sum(-1, keepdim=True)
        weights = trimmed(weights, 1, site)
        shapes = [owner.structure.sites[p].value.shape for p in parents]
        outputs = group.outputs(values, wide, size, shapes)
        made = group.mechanisms[0].parts
        assert made is not None
        tensors = []
        for tensor, event in zip(outputs, made.event_dims, strict=False):
            # (W * C, 1) + plates + event -> worlds + plates + (C,) + event
            tensor = tensor[:, 0]
            rest = tensor.shape[1:]
            missing = owner.frame.depth + event - len(rest)
            tensor = tensor.expand(((size or 1) * group.count, *rest))
            tensor = tensor.reshape((size or 1, group.count, *(1,) * missing, *rest))
            tensor = tensor.movedim(1, 1 + owner.frame.depth)
            tensor = tensor[0] if size is None else worlds.behind(tensor, 1 + event)
            tensors.append(trimmed(tensor, 1 + event, site))
        components = made.build(tensors)
        shape = torch.broadcast_shapes(weights.shape, components.batch_shape)
        components = components.expand(shape)
        weights = weights.expand(shape)
        fn = dist.MixtureSameFamily(
            dist.Categorical(probs=weights.to(_dtype(tensors))), components
        )
        self._pending = (parents, components)
        return fn

    def observe(self, name: str) -> None:
        """Takes note of the value of a site: it tells of those eliminated."""
        if name not in self.owner.general or name in self.interventions:
            return
        parents, components = self._pending
        site = self.owner.structure.sites[name]
        value = self.known[name]
        event = len(site.event_shape)
        place = value.dim() - event
        logs = components.log_prob(value.unsqueeze(place)).double()
        logs = logs - logs.max(-1, keepdim=True).values
        likely = logs.exp()
        sizes = [len(self.owner.supports[p]) for p in parents]
        self._settle()
        table = likely.reshape((*likely.shape[:-1], *sizes))
        self.factors.append(Factor(tuple(parents), table))


def _dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    for tensor in tensors:
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.get_default_dtype()


def contracted(
    factors: Sequence[Factor],
    axes: Sequence[str],
    depth: int,
    supports: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """The product of factors, summed over all axes but some.

    :param depth: how many dimensions of plates there are; those to the left of them
        are worlds.
    :returns: shape ``worlds + plates`` and then the axes.
    """
    lead = max(depth, *(f.table.dim() - len(f.axes) for f in factors), 0)
    numbers: dict[Any, int] = {}
    sizes = [1] * lead
    arguments: list[Any] = []
    met = {a for f in factors for a in f.axes}
    factors = list(factors)
    for name in axes:
        if name not in met:  # nothing is said about it
            assert supports is not None
            ones = torch.ones(len(supports[name]), dtype=torch.float64)
            factors.append(Factor((name,), ones.reshape((1,) * depth + ones.shape)))
    for factor in factors:
        own = factor.table.dim() - len(factor.axes)
        labels, shape = [], []
        for i, size in enumerate(factor.table.shape):
            if i < own:
                dim = i - own
                if size > 1:
                    sizes[dim] = size
                    labels.append(numbers.setdefault(dim, len(numbers)))
                    shape.append(size)
            else:
                name = factor.axes[i - own]
                labels.append(numbers.setdefault(name, len(numbers)))
                shape.append(size)
        arguments += [factor.table.reshape(shape), labels]
    batch = [dim for dim in range(-lead, 0) if sizes[dim] > 1]
    out = [numbers[dim] for dim in batch] + [numbers[name] for name in axes]
    joint = opt_einsum.contract(*arguments, out, optimize="auto")
    tail = joint.shape[len(batch) :]
    return joint.reshape((*sizes, *tail))
