# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A program of finite sites under all their joint values.

These come in three blocks, each with a dimension of its own: ``U`` for the sites that
the micro state does not act on, ``X`` for the micro state, ``D`` for what follows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import networkx as nx
import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_macro.laws.cut import Cut
from pyro_macro.laws.finite.configurations import (
    Ancestor,
    EnumeratedRun,
    Grade,
    finite_values,
    log_prob_of,
)
from pyro_macro.laws.finite.sums import NEVER
from pyro_macro.laws.quantity import Quantity
from pyro_macro.program.reading import dependence

CELLS = 1 << 22  # joint values of all sites, at most
SINGLE = 1 << 13  # that are run one by one, at most
PROBES = 6

BLOCKS = (Grade.TOGETHER, Grade.SLOT, Grade.GROUP)
BEFORE, STATE, AFTER = BLOCKS

Values = Mapping[str, Tensor]


class TooMany(Exception):
    """Joint values that cannot be listed, in words."""


class JointValues:
    """All joint values of the random sites that matter, and what a program makes of it.

    The program is run once, under all of them side by side. One that says something
    else then (it adds up, or branches on, whole tensors) is run under each.

    :param cut: the program.
    :param quantities: what is computed from the sites.
    :raises TooMany: if there are too many, or sites come and go with the values.
    :ivar counts: how many joint values each block has.
    :ivar weights: their log probabilities by block, ``(U, X, D)``, with ones where
        they do not vary.
    :ivar quantities: the same with ``(size,)`` behind. All of these are on the CPU.
    """

    def __init__(self, cut: Cut, quantities: Sequence[Quantity]) -> None:
        self.cut = cut
        self._asked = quantities
        self._number()
        if not self._side_by_side():
            self._one_by_one()

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.counts.values())

    def _number(self) -> None:
        cut = self.cut
        micro = cut.cause.sites
        graph = dependence(cut.sites)
        below = set().union(*(nx.descendants(graph, n) for n in micro))
        self.ancestors: list[Ancestor] = []
        self.counts = dict.fromkeys(BLOCKS, 1)
        self.depth = cut.depth
        for name, site in cut.sites.items():
            if name not in cut.relevant_sites:
                continue
            if site.deterministic:
                if name in micro:
                    raise TooMany(f"micro site {name!r} is deterministic")
                continue
            block = STATE if name in micro else AFTER if name in below else BEFORE
            values = finite_values(site.fn)
            assert values is not None
            ancestor = Ancestor(site, block, values, site.shape, self.counts[block])
            self.ancestors.append(ancestor)
            self.counts[block] *= ancestor.count
            if math.prod(self.counts.values()) > CELLS:
                raise TooMany(
                    f"there are more than {CELLS:,} joint values, up to {name!r} alone"
                )

    def micro_values(self) -> dict[str, Tensor]:
        """The value of each micro site in each of ``X`` micro states."""
        index = torch.arange(self.counts[STATE], device="cpu")
        return {a.site.name: a.at(index) for a in self.ancestors if a.grade == STATE}

    def _side_by_side(self) -> bool:
        values = {a.site.name: self._placed(a) for a in self.ancestors}
        try:
            run = self._run(values)
            found = {n: s.value for n, s in run.sites.items()} | values
            self.weights = {b: self._weight(b, run, values) for b in BLOCKS}
            self.quantities = [self._of(q, found).cpu() for q in self._asked]
        except Exception:  # whatever it is, a single run will tell
            return False
        if run.tracker.escaped or run.tracker.whole:
            return False  # it looks at all joint values at once
        return self._agrees()

    def _agrees(self) -> bool:
        """Whether some of the joint values, run alone, say the same."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(PROBES):
            at = [
                int(torch.randint(n, (), generator=generator, device="cpu"))
                for n in self.size
            ]
            weights, quantities = self._alone(at)
            pairs = [(self.weights[b].unsqueeze(-1), weights[b]) for b in BLOCKS]
            pairs += list(zip(self.quantities, quantities, strict=True))
            for table, one in pairs:
                sizes = table.shape[:3]
                index = [i if n > 1 else 0 for i, n in zip(at, sizes, strict=True)]
                many = table[index[0], index[1], index[2]]
                if not torch.allclose(many, one.reshape(many.shape), 1e-4, 1e-6):
                    return False
        return True

    def _alone(self, at: Sequence[int]) -> tuple[dict[Grade, Tensor], list[Tensor]]:
        """What the program says under one of the joint values."""
        place = dict(zip(BLOCKS, at, strict=True))
        values = {
            a.site.name: a.at(torch.tensor(place[a.grade], device="cpu"))
            for a in self.ancestors
        }
        try:
            run = self._run(values)
            weights = {b: self._weight(b, run, values).reshape(()) for b in BLOCKS}
        except Exception as error:
            raise TooMany(f"the program fails under {values} ({error})") from error
        found = {n: s.value for n, s in run.sites.items()} | values
        return weights, [q.of(found).cpu() for q in self._asked]

    def _one_by_one(self) -> None:
        size = self.size
        if math.prod(size) > SINGLE:
            raise TooMany(
                "the program says something else when it is run under many joint "
                "values at once (it adds up, or branches on, all dimensions of a "
                f"tensor), and {math.prod(size):,} are too many to run one by one"
            )
        places = list(itertools.product(*map(range, size)))
        bar = tqdm(places, desc="Enumerating", disable=len(places) < 1000)
        runs = [self._alone(at) for at in bar]
        self.weights = {
            b: torch.stack([weights[b] for weights, _ in runs]).reshape(size)
            for b in BLOCKS
        }
        self.quantities = [
            torch.stack([quantities[i] for _, quantities in runs]).reshape(*size, -1)
            for i in range(len(self._asked))
        ]

    def _run(self, values: Values) -> EnumeratedRun:
        run = EnumeratedRun(self.cut, self.cut.names, values, self.cut.cause.sites)
        run.run(*self.cut.model)
        return run

    def _placed(self, ancestor: Ancestor) -> Tensor:
        """All values of a site, along the dimension of its block."""
        values = ancestor.at(torch.arange(self.counts[ancestor.grade], device="cpu"))
        depth = len(ancestor.shape) - len(ancestor.site.event_shape)
        behind = self.depth - depth + (2 - ancestor.grade)
        return values.reshape(values.shape[:1] + (1,) * behind + ancestor.shape)

    def _weight(self, block: Grade, run: EnumeratedRun, values: Values) -> Tensor:
        """Log probabilities of the values of a block, ``(U, X, D)``."""
        total = torch.zeros(1, 1, 1, dtype=torch.float64, device="cpu")
        for a in self.ancestors:
            if a.grade != block:
                continue
            name = a.site.name
            table = log_prob_of(run.sites[name].fn, values[name], a.site)
            plates = a.shape[: len(a.shape) - len(a.site.event_shape)]
            lead = (1,) * (3 + self.depth - table.dim()) + table.shape
            table = table.reshape(lead)
            whole = lead[: 3 + self.depth - len(plates)] + tuple(plates)
            total = total + table.expand(whole).reshape(*whole[:3], -1).sum(-1).cpu()
        return total.clamp(min=NEVER)

    def _of(self, quantity: Quantity, found: Values) -> Tensor:
        """A quantity, ``(U, X, D, size)``, with ones where it does not vary."""
        parts = {n: found[n] for n in quantity.sites}
        sizes = [1, 1, 1]
        for n, value in parts.items():
            event = len(self.cut.sites[n].event_shape)
            lead = value.shape[: value.dim() - event]
            lead = (1,) * (3 + self.depth - len(lead)) + lead
            sizes = [max(a, b) for a, b in zip(sizes, lead[:3], strict=True)]
        return quantity.of(parts, sizes, self.depth)
