# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Elimination of finite sites: contraction of their tables.

A site that stays may be of any kind: given finite ones that are eliminated its law is a
mixture.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_macro.consolidation.compose import Table, product, stacked
from pyro_macro.consolidation.elimination import Eliminating, Elimination, Plan
from pyro_macro.consolidation.known import Known, plain
from pyro_macro.consolidation.laws import finite, trimmed, within
from pyro_macro.consolidation.structure import CELLS
from pyro_macro.consolidation.tables import Factor, FiniteGroup, certain, contracted
from pyro_macro.errors import (
    InterventionNotAllowed,
    PyroMacroError,
    UnsupportedLaw,
)
from pyro_macro.laws.finite.configurations import finite_values, log_table
from pyro_macro.laws.finite.sums import NEVER
from pyro_macro.program.mechanisms import Mechanism
from pyro_macro.program.shapes import broadcast_shapes
from pyro_macro.program.tape import Leaf

STATIC = 1 << 16  # cells of a table of a law that is kept, at most


class FiniteElimination(Elimination[FiniteGroup]):
    """Finite sites that are eliminated together."""

    method = "exact: finite"

    def read(self) -> None:
        self.supports: dict[str, Tensor] = {}
        self._memo: dict[Any, tuple[Tensor, Tensor]] = {}
        self._alone: dict[str, FiniteGroup] = {}
        self._find_supports()
        self.general = {n for n in self.component.children if n not in self.supports}
        fixed = [n for n in self.supports if n in self.flags and all(self.flags[n])]
        for group in self.groups(n for n in fixed if n not in self.static):
            self.static.update(self.tables(group, {}, frozenset(), None))

    def width(self, name: str) -> int | None:
        return None if name not in self.supports else len(self.supports[name])

    def links(self, names: Sequence[str]) -> Table:
        return stacked([Table(self.static[n].table.exp()) for n in names])

    def begin(self, plan: Plan[FiniteGroup], known: Known) -> FiniteRun:
        return FiniteRun(self, plan, known)

    def factor(
        self, name: str, plan: Plan[FiniteGroup], found: Mapping[str, Factor]
    ) -> Factor:
        """A site's table given what is left of its parents."""
        if name not in plan.starts:
            factor = self.static[name] if name in self.static else found[name]
        else:
            chain, (start, head) = self.chain_of(name), plan.starts[name]
            if chain.links is not None:
                link = chain.after(start)
            else:
                sites = chain.sites[start:]
                tables = [(self.static.get(n) or found[n]).table for n in sites]
                link = product(stacked([Table(t.exp()) for t in tables]))
            factor = Factor((head, name), link.probs.log().clamp(min=NEVER))
        if name not in plan.stages:
            return factor
        return Factor((*factor.axes[:-1], plan.key(name)), factor.table)

    def group_of(self, name: str) -> FiniteGroup:
        """A child of another kind, as a group of its own."""
        if name not in self._alone:
            (self._alone[name],) = self.groups([name])
        return self._alone[name]

    def covers(self, interventions: frozenset[str], known: Known) -> bool:
        if not set(self.component.eliminated) <= self.structure.computed:
            return True  # others cannot be computed in another way
        return all(
            bool((known[n].unsqueeze(-1) == self.supports[n]).any(-1).all())
            for n in interventions
            if n in self.component.eliminated
        )

    def support(self, axis: str) -> Tensor:
        """The values that an axis stands for."""
        return self.supports[plain(axis)]

    def prepare(self, plan: Plan[FiniteGroup]) -> None:
        """The laws as tables over what they depend on, where these are small."""
        if any(plan.groups.values()) or self.general:
            return
        laws: dict[str, Factor] = {}
        known: set[str] = set(plan.interventions)
        factors: list[Factor] = []
        for child in self.component.children:
            factors += [self.factor(n, plan, {}) for n in plan.stages[child]]
            key = plan.key(child)
            axes = {a for f in factors for a in f.axes} - {key}
            linear = self.component.linear
            outside = [a for a in axes if a in known or plain(a) not in linear]
            cells = math.prod(len(self.support(a)) for a in (*outside, key))
            if cells * self.frame.plates.numel() > STATIC:
                return
            ordered = sorted(outside, key=lambda a: self.structure.order[plain(a)])
            joint = contracted(factors, (*ordered, key), self.frame.depth)
            laws[child] = _simplest(Factor((*ordered, key), joint))
            if child not in plan.unseen:
                known.add(key)
        plan.laws.update(laws)

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
            flags = self.flags.get(name)
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
            str(self.structure.explicit.get(name)),
        )
        if key not in self._memo:
            self._memo[key] = self._evaluated(mechanism, supports)
        values, table = self._memo[key]
        self.supports[name] = values
        self.static[name] = Factor((*parents, name), table)

    def _evaluated(
        self, mechanism: Mechanism, supports: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        flags = (True,) * len(supports)
        group = FiniteGroup([mechanism], flags, [supports])
        shapes = [
            self.structure.sites[p].value.shape for p in mechanism.expression.parents
        ]
        (found,) = group.outputs({}, frozenset(), None, shapes)
        found = found[:, 0]  # (C,) and then the site
        found = found.expand((group.count, *found.shape[1:]))
        set_to = self.structure.explicit.get(mechanism.name, [])
        reached = [found.flatten(), *(v.flatten().to(found) for v in set_to)]
        values = torch.cat(reached).unique()
        hit = found.unsqueeze(-1) == values  # (C, plates, V)
        hit = (~hit).double() * NEVER
        missing = self.frame.depth - (hit.dim() - 2)
        hit = hit.reshape((group.count,) + (1,) * missing + hit.shape[1:])
        table = hit.movedim(0, -2)
        return values, table.reshape((*table.shape[:-2], *group.sizes, len(values)))

    def groups(self, names: Iterable[str]) -> list[FiniteGroup]:
        structure = self.structure
        groups: dict[Any, list[Mechanism]] = {}
        for name in names:
            mechanism = structure.of[name]
            axes = self.axes(name)
            key = (
                mechanism.expression.key,
                self.flags[name],
                tuple(len(self.supports[p]) for p in axes),
                tuple(structure.sites[p].value.shape for p in mechanism.parents),
                None if mechanism.parts is None else mechanism.parts.kind,
                tuple(self.supports[name].tolist()) if name in self.supports else (),
            )
            groups.setdefault(key, []).append(mechanism)
        return [
            FiniteGroup(
                members,
                key[1],
                [[self.supports[p] for p in self.axes(m.name)] for m in members],
            )
            for key, members in groups.items()
        ]

    def axes(self, name: str) -> list[str]:
        """The finite parents, in the order of the leaves."""
        pairs = zip(
            self.structure.of[name].expression.leaves, self.flags[name], strict=True
        )
        return [str(leaf[1]) for leaf, is_axis in pairs if is_axis]

    def tables(
        self,
        group: FiniteGroup,
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
        table = logs.reshape((len(support), lead, group.count, logs.shape[2], *plates))
        # (G, W) + plates + (C, V)
        table = table.movedim((3, 1), (0, 1)).movedim(2, -1).movedim(2, -2)
        table = table.reshape((*table.shape[:-2], *group.sizes, len(support)))
        found = {}
        for i, name in enumerate(group.names):
            own = table[i if table.shape[0] > 1 else 0]
            own = own if size is not None else own[0]
            found[name] = Factor((*self.axes(name), name), own)
        return found

    def _built(
        self,
        group: FiniteGroup,
        values: Mapping[Leaf, Tensor],
        worlds: frozenset[Leaf],
        size: int | None,
    ) -> Any:
        """The distributions of the members, batch shape ``(W * C, G) + plates``."""
        parents = self.axes(group.names[0])
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


def _simplest(joint: Factor) -> Factor:
    """The law of the last axis given the others, those left out that say nothing.

    Rows that are impossible may say anything.
    """
    axes, table = list(joint.axes), joint.table
    for axis in joint.axes[:-1]:
        at = table.dim() - len(axes) + axes.index(axis)
        possible = table.logsumexp(-1, keepdim=True) > NEVER / 2
        without = table.logsumexp(at, keepdim=True)
        near = (table.softmax(-1) - without.softmax(-1)).abs() <= 1e-12
        if bool((near | ~possible).all()):
            table = without.squeeze(at).clamp(min=NEVER)
            axes.remove(axis)
    return Factor(tuple(axes), table.log_softmax(-1))


class FiniteRun(Eliminating):
    """The elimination in one run."""

    def __init__(
        self, owner: FiniteElimination, plan: Plan[FiniteGroup], known: Known
    ) -> None:
        self.owner, self.plan, self.known = owner, plan, known
        self.factors: list[Factor] = []  # of the sites met so far
        self._mixed: tuple[tuple[str, ...], Any] = ((), None)

    def law(self, name: str) -> Any:
        owner, plan, depth = self.owner, self.plan, self.owner.frame.depth
        site = owner.structure.sites[name]
        if name in plan.laws:
            logits = self._looked_up(plan.laws[name])
            return finite(logits, owner.supports[name], site)
        worlds = self.known.worlds(x for x in plan.leaves if self.known.has(x))
        found: dict[str, Factor] = {}
        for group in plan.groups[name]:
            values, wide = self.known.values(group.others, worlds)
            size = worlds.size if wide else None
            for n, f in owner.tables(group, values, wide, size).items():
                at = f.table if size is None else worlds.behind(f.table, len(f.axes))
                found[n] = Factor(f.axes, at)
        new = [n for n in plan.stages[name] if n not in owner.general]
        self.factors += [owner.factor(n, plan, found) for n in new]
        if name in owner.general:
            return self._mixture(name)
        joint = contracted(self._all(), (plan.key(name),), depth)
        return finite(joint.log_softmax(-1), owner.supports[name], site)

    def observe(self, name: str) -> None:
        owner, plan = self.owner, self.plan
        if name in plan.laws:
            return
        if name in owner.general and name not in plan.unseen:
            self.factors.append(self._likelihood(name))
        # What is known is put in, what nothing depends on any more is summed out
        wanted = owner.wanted(name, plan)
        factors = self._all()
        axes = dict.fromkeys(a for f in factors for a in f.axes)
        left = tuple(a for a in axes if a in wanted and a not in self.known.sites)
        joint = contracted(factors, left, owner.frame.depth)
        # Only ratios matter: the largest is one
        dims = tuple(range(joint.dim() - len(left), joint.dim()))
        top = joint.detach().amax(dims, keepdim=True) if dims else joint
        self.factors = [Factor(left, joint - top)]

    def _all(self, more: Iterable[str] = ()) -> list[Factor]:
        """The factors, and where known sites are."""
        axes = dict.fromkeys([*(a for f in self.factors for a in f.axes), *more])
        found = list(self.factors)
        met = {a for f in self.factors for a in f.axes}
        for axis in axes:
            if axis in self.known.sites:
                count = len(self.owner.support(axis))
                found.append(Factor((axis,), certain(self._index(axis), count)))
            elif axis not in met:  # nothing is said about it
                support = self.owner.support(axis)
                shape = (1,) * self.owner.frame.depth + (len(support),)
                ones = support.new_zeros(shape, dtype=torch.float64)
                found.append(Factor((axis,), ones))
        return found

    def _looked_up(self, factor: Factor) -> Tensor:
        """A row of a table, by the values of known sites."""
        depth = self.owner.frame.depth
        names, table = factor.axes[:-1], factor.table
        if not names:
            return table
        if table.shape[:depth].numel() == 1:
            table = table.reshape(table.shape[depth:])
            return table[tuple(self._index(n) for n in names)]
        found = [factor]
        for n in names:
            at = certain(self._index(n), len(self.owner.support(n)))
            found.append(Factor((n,), at))
        return contracted(found, factor.axes[-1:], depth)

    def _index(self, name: str) -> Tensor:
        """Which of its values a known site has."""
        support = self.owner.support(name)
        value = self.known[name]
        hit = value.unsqueeze(-1) == support.to(value.device)
        if not bool(hit.any(-1).all()):
            kind = PyroMacroError
            if name in self.plan.interventions:
                kind = InterventionNotAllowed
            raise kind(
                f"site {plain(name)!r}: found {value.flatten()[:5].tolist()}, which is "
                f"not among its values {support.tolist()[:20]}. Set it to one of these."
            )
        return hit.to(torch.uint8).argmax(-1)

    def _mixture(self, name: str) -> Any:
        """The law of a site of any kind, given finite ones."""
        owner = self.owner
        site = owner.structure.sites[name]
        group = owner.group_of(name)
        worlds = self.known.worlds(
            x for some in group.others for x in some if self.known.has(x)
        )
        values, wide = self.known.values(group.others, worlds)
        size = worlds.size if wide else None
        parents = tuple(owner.axes(name))
        weights = contracted(self._all(parents), parents, owner.frame.depth)
        weights = trimmed(weights.flatten(-len(parents)).log_softmax(-1), 1, site)
        shapes = [owner.structure.sites[p].value.shape for p in parents]
        outputs = group.outputs(values, wide, size, shapes)
        made = group.mechanisms[0].parts
        assert made is not None
        tensors = []
        for tensor, event in zip(outputs, made.event_dims, strict=True):
            # (W * C, 1) + plates + event -> worlds + plates + (C,) + event
            rest = tensor.shape[2:]
            missing = owner.frame.depth + event - len(rest)
            tensor = tensor[:, 0].expand(((size or 1) * group.count, *rest))
            tensor = tensor.reshape((size or 1, group.count, *(1,) * missing, *rest))
            tensor = tensor.movedim(1, 1 + owner.frame.depth)
            tensor = tensor[0] if size is None else worlds.behind(tensor, 1 + event)
            tensors.append(trimmed(tensor, 1 + event, site))
        components = made.build(tensors)
        shape = broadcast_shapes(weights.shape, components.batch_shape)
        components = components.expand(shape)
        self._mixed = parents, components
        floats = [t.dtype for t in tensors if t.is_floating_point()]
        dtype = floats[0] if floats else torch.get_default_dtype()
        logits = within(weights.expand(shape), dtype)
        index = dist.Categorical(logits=logits, validate_args=False)
        return dist.MixtureSameFamily(index, components, validate_args=False)

    def _likelihood(self, name: str) -> Factor:
        """What a site of any kind tells of its finite parents."""
        parents, components = self._mixed
        event = len(self.owner.structure.sites[name].event_shape)
        value = self.known.seen(name)
        value = value.unsqueeze(value.dim() - event)
        table = components.log_prob(value).double().clamp(min=NEVER)
        missing = self.owner.frame.depth - (table.dim() - 1)
        table = table.reshape((1,) * max(missing, 0) + table.shape)
        sizes = [len(self.owner.supports[p]) for p in parents]
        return Factor(parents, table.reshape((*table.shape[:-1], *sizes)))
