# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""From a program of finite sites to the tables of a :class:`FiniteLaw`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.aggregation import Aggregation
from pyro_macro.errors import Infeasible, NotAMicroState, UnsupportedLaw
from pyro_macro.laws.base import MicroFibre
from pyro_macro.laws.finite.configurations import (
    Configurations,
    Grade,
    finite_values,
    is_count,
    log_table,
)
from pyro_macro.laws.finite.lattice import LONGEST, Codes, codes_of, is_lattice
from pyro_macro.laws.finite.law import FiniteLaw, Tables
from pyro_macro.laws.finite.sums import NEVER, SumTree, log_sum, scatter_codes
from pyro_macro.laws.upstream import Evidence, Upstream, refuse_parts
from pyro_macro.program.layout import Layout

CELLS = 1 << 27  # of a table, at most
STATES = 1 << 20  # that are enumerated, at most


@dataclass(frozen=True, eq=False)
class Fibre:
    """What a micro state is asked to meet.

    :ivar layout: the micro state.
    :ivar aggregation: the map.
    :ivar value: its value, which broadcasts against the plates that stay.
    :ivar what: how to call the macro-variable in messages.
    """

    layout: Layout
    aggregation: Aggregation
    value: Tensor
    what: str


def finite_law(
    upstream: Upstream,
    fibre: Fibre,
    given: Sequence[Evidence],
    dtype: torch.dtype,
    uniform: bool = False,
) -> tuple[FiniteLaw, Layout] | None:
    """The law of a micro state of finite support given its macro value.

    :param given: what is known besides.
    :param dtype: of the draws.
    :param uniform: whether all micro states count the same.
    :returns: the law, and the layout of its vector; ``None`` if a site that it
        involves has infinitely many values.
    :raises Infeasible: if the macro value cannot be reached.
    :raises UnsupportedLaw: if there are too many states to enumerate.
    """
    layout, what = fibre.layout, fibre.what
    supports = supports_of(upstream, fibre)
    if supports is None:
        return None
    known = [] if uniform else upstream.relevant(layout.names, given, what)[1]
    causes = upstream.causes(layout.names, known)
    infinite = causes is None or any(
        finite_values(upstream.sites[name].fn) is None for name in causes
    )
    if uniform and infinite:
        causes = []  # which values are possible is seen where they happen to be
    elif infinite:
        return None
    assert causes is not None
    values = element_values(layout, supports)
    sums = fibre.aggregation.as_sums(values, fibre.value.double())
    is_sum = sums is not None and is_lattice(sums) is not None

    def read(apart: bool) -> Configurations:
        return Configurations(
            upstream,
            layout,
            causes,
            known,
            what,
            grouped=is_sum,
            apart=apart,
            depth=fibre.value.dim() - fibre.aggregation.event_dim,
        )

    configurations = read(apart=True)
    if configurations.ancestors and configurations.is_coupled(supports):
        configurations = read(apart=False)
    reader = _Reader(upstream, fibre, configurations, supports, uniform)
    tables = reader.tables(is_sum)
    law = FiniteLaw(tables, reader.constraint(), dtype, reader.method(is_sum))
    reader.refuse_unreachable(law)
    return law, reader.whole


def supports_of(upstream: Upstream, fibre: Fibre) -> dict[str, Tensor] | None:
    """The values of each micro site that a state on the fibre may have."""
    most = fibre.aggregation.largest(fibre.layout.size, fibre.value)
    supports = {}
    for name in fibre.layout.names:
        own = finite_values(upstream.sites[name].fn, most)
        if own is None:
            return None
        supports[name] = own
    return supports


def element_values(layout: Layout, supports: dict[str, Tensor]) -> Tensor:
    """The values of each element, the last one repeated: shape ``(K, V)``."""
    widest = max(len(own) for own in supports.values())
    return torch.cat(
        [
            _padded(supports[name].double(), widest).expand(size, -1)
            for name, size in zip(layout.names, layout.sizes, strict=True)
        ]
    )


def _padded(values: Tensor, size: int) -> Tensor:
    return torch.cat([values, values[-1:].expand(size - len(values))])


class _Reader:
    """Arranges what a run under all configurations says."""

    def __init__(
        self,
        upstream: Upstream,
        fibre: Fibre,
        read: Configurations,
        supports: dict[str, Tensor],
        uniform: bool,
    ) -> None:
        self.upstream, self.fibre, self.read = upstream, fibre, read
        self.supports, self.uniform = supports, uniform
        self.layout = fibre.layout
        self.values = element_values(self.layout, supports)
        self.grouped = read.counts[Grade.GROUP] > 1
        self.what = fibre.what
        refuse_parts(read.joint, self.what)
        sites = [upstream.sites[name] for name in self.layout.names]
        joint = [f.name for f in read.joint]
        self.whole = Layout(sites, [*self.layout.over, *joint], self.what)
        self._event_dim = fibre.aggregation.event_dim
        self._raw = {name: self._table(name) for name in self.layout.names}
        self.batch = self._batch()

    def _table(self, name: str) -> Tensor:
        """Log probabilities of a site's values: ``(V, G, S, C, depth, event)``."""
        site = self.read.sites[name]
        table = log_table(site.fn, self.supports[name])
        table = self.read.padded(table, len(site.event_shape), 1)
        if self.uniform:
            for other, grade in self.read.grades.items():
                # Values under ancestors that cannot be do not count
                weight = self.read.weight(other, self.read.kept_by(grade)).unsqueeze(0)
                weight = weight.reshape(weight.shape + (1,) * len(site.event_shape))
                table = torch.where(weight > NEVER / 2, table, NEVER)
            possible = table.amax((1, 2, 3), True) > NEVER
            table = torch.zeros_like(possible, dtype=table.dtype)
            table = table.masked_fill(~possible, NEVER)
        return table

    def _over(self, name: str) -> list[Any]:
        frames = self.upstream.sites[name].frames
        return [f for f in frames if f.vectorized and f.name in self.layout.over]

    def _batch(self) -> Size:
        """The sizes of the dimensions that are neither slots nor in the vector."""
        read, depth = self.read, self.read.depth
        value = self.fibre.value
        shapes = [value.shape[: value.dim() - self._event_dim]]
        for name, table in self._raw.items():
            own = {f.dim for f in self._over(name)}
            batch = table.shape[4 : 4 + depth]
            self._refuse_unplated(name, batch)
            shapes.append(
                Size(1 if d - depth in own else n for d, n in enumerate(batch))
            )
        single = [n for e in read.known if e.macro is None for n in e.sites]
        for name in [*read.grades, *single]:
            frames = {f.dim for f in read.sites[name].frames}
            kept = {f.dim for f in self.layout.frames}
            shape = read.weight(name, []).shape[3:]
            shapes.append(
                Size(
                    1 if d - depth in frames - kept else n for d, n in enumerate(shape)
                )
            )
        joint = {f.dim for f in read.joint}
        full = torch.broadcast_shapes(
            Size([1] * depth), *shapes, self.layout.batch_shape
        )
        return Size(1 if d - len(full) in joint else n for d, n in enumerate(full))

    def _refuse_unplated(self, name: str, batch: Size) -> None:
        plates = {f.dim: f.size for f in self.upstream.sites[name].frames}
        for dim in range(-len(batch), 0):
            size = batch[dim]
            known = plates.get(dim) == size or self.upstream.is_outside(dim, size)
            if size > 1 and not known:
                raise NotAMicroState(
                    f"{self.what}: site {name!r} has a dimension of size {size} at dim "
                    f"{dim}, and no plate there. Put it into `pyro.plate`, or make the "
                    "dimension an event dimension with `.to_event`."
                )

    def _arranged(
        self, table: Tensor, into: Sequence[Any] = (), ahead: int = 0, event: int = 0
    ) -> Tensor:
        return self.read.arrange(table, self.batch, into, ahead, event)

    def _elements(self, name: str) -> Tensor:
        """The tables of a site's elements: ``(B, G, Bs, S, O, C, E, V)``."""
        event, raw = len(self.upstream.sites[name].event_shape), self._raw[name]
        over = self.read.over if self.grouped else self._over(name)
        table = self._arranged(raw, over, ahead=1, event=event)
        table = table.flatten(7) if event else table.unsqueeze(-1)
        if not self.grouped:  # one group: the places along `over` are its elements
            table = table.transpose(5, 6).flatten(6, 7).unsqueeze(5)
        table = table.movedim(0, -1)
        g, s, c = self.read.counts.values()
        widest = self.values.shape[-1]
        table = torch.nn.functional.pad(table, (0, widest - len(raw)), value=NEVER)
        b, _, n_bs, _, o, _, e, v = table.shape
        return table.expand(b, g, n_bs, s, o, c, e, v)

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """For ``(O, E)`` the element, for ``(Bs, O, E)`` the place in the vector."""
        layout = self.layout
        if self.grouped:
            groups = self.read.over
            count = Size(f.size for f in groups).numel()
            own = [
                torch.arange(count).unsqueeze(-1) * (size // count)
                + torch.arange(size // count)
                + layout.place(name)[0]
                for name, size in zip(layout.names, layout.sizes, strict=True)
            ]
            element = torch.cat(own, -1)
        else:
            element = torch.arange(layout.size).unsqueeze(0)
        finer, slots = layout.places(self.whole)
        place = (slots * layout.size + finer).argsort().reshape(-1, layout.size)
        device = self.values.device
        return element.to(device), place[:, element].to(device)

    def _is_padding(self) -> Tensor:
        """Where values are repeated, for elements with fewer of them: ``(K, V)``."""
        layout, widest = self.layout, self.values.shape[-1]
        device = self.values.device
        count = torch.cat(
            [
                torch.full((size,), len(self.supports[name]), device=device)
                for name, size in zip(layout.names, layout.sizes, strict=True)
            ]
        )
        return torch.arange(widest, device=device) >= count.unsqueeze(-1)

    @cached_property
    def _value(self) -> Tensor:
        """The macro value of each slot: ``(B, Bs)``, and ``(m,)`` for a vector."""
        value = self.read.padded(self.fibre.value.double(), self._event_dim)
        return self._arranged(value, event=self._event_dim)[:, 0, :, 0, 0, 0]

    def tables(self, is_sum: bool) -> Tables:
        parts = torch.cat([self._elements(name) for name in self.layout.names], 6)
        if parts.numel() > CELLS:
            raise UnsupportedLaw(
                f"{self.what}: its table has {parts.numel():,} entries, for "
                f"{self.layout.size} elements with {parts.shape[-1]} values and "
                f"{parts.shape[1] * parts.shape[3] * parts.shape[5]} configurations "
                f"of {self.read.latent}. Hold some of these with given=[...]."
            )
        element, places = self._places
        weights = self._weights()
        if is_sum:
            sums = self.fibre.aggregation.as_sums(self.values, self._value)
            assert sums is not None
            codes = codes_of(sums)
            values = self.values[element].unsqueeze(-1)
            places = places.unsqueeze(-1)
            own = torch.where(self._is_padding(), -1, codes.codes)
            own = own.expand(self._value.shape[:2] + self.values.shape)
            own = own[:, :, element]
            self._refuse_injective(own)
        else:
            parts, values, places, codes = self._enumerated(parts, places)
            own = codes.codes[:, :, None, None]
        size = parts.shape
        own = own.expand((size[0], size[2], size[4], size[6], size[7]))
        allowed = codes.allowed.expand(size[0], size[2], -1)
        return Tables(
            parts, values, places, own, allowed, *weights, batch=self._batch_shape()
        )

    def _refuse_injective(self, codes: Tensor) -> None:
        """An error if no two micro states have the same macro value."""
        codes = codes[0, 0].flatten(0, 1)  # (O E, V), negative where there is no value
        states = (codes >= 0).sum(-1).double().prod()
        is_linear = self.fibre.aggregation.weights(self.values[:, 0]) is not None
        fns = (self.upstream.sites[name].fn for name in self.layout.names)
        if not is_linear or states > LONGEST or any(map(is_count, fns)):
            return
        longest = codes.amax(-1).sum()
        counts = scatter_codes(
            torch.zeros_like(codes, dtype=torch.float64), codes, int(codes.max()) + 1
        )
        most = SumTree(counts.unsqueeze(0), int(longest)).total.max()
        if states > 1 and most < 0.5:  # the logarithm of two states
            raise NotAMicroState(
                f"{self.what}: {self.fibre.aggregation!r} is injective on its "
                f"{int(states)} micro states, so that nothing is aggregated "
                "(Definition 2)."
            )

    def _enumerated(
        self, parts: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Codes]:
        """The whole micro state as one part, with all its joint values."""
        possible = (parts > NEVER).flatten(0, -3).any(0)  # (K, V)
        choices = [row.nonzero().squeeze(-1) for row in possible]
        count = 1
        for choice in choices:
            count *= len(choice)
        cells = count * len(choices) * parts[..., 0, 0].numel()
        if count > STATES or cells > CELLS:
            raise UnsupportedLaw(
                f"{self.what}: {self.fibre.aggregation!r} has to be enumerated, and "
                f"there are {count:,} micro states. Expected at most {STATES:,} (less "
                "with many configurations upstream). Use a sum, Count, Max or Min, "
                "which need no enumeration, or aggregate fewer elements."
            )
        index = torch.cartesian_prod(*choices).reshape(-1, len(choices))
        states = self.values.gather(-1, index.mT).mT  # (states, K)
        element = torch.arange(len(choices), device=index.device)
        joint = parts[..., element, index].sum(-1).unsqueeze(-2)
        macro, value = self.fibre.aggregation(states), self._value
        fns = (self.upstream.sites[name].fn for name in self.layout.names)
        whole = not any(map(is_count, fns))  # of counts, these are not all states
        if whole and len(macro) > 1 and len(macro.unique(dim=0)) == len(macro):
            raise NotAMicroState(
                f"{self.what}: {self.fibre.aggregation!r} is injective on its "
                f"{len(macro)} micro states, so that nothing is aggregated "
                "(Definition 2)."
            )
        met = torch.isclose(macro.double(), value.unsqueeze(2), rtol=1e-6, atol=1e-9)
        met = met.all(-1) if self._event_dim else met  # (B, Bs, states)
        codes = torch.where(met, 1, -1)
        allowed = torch.arange(2, device=met.device).bool()
        allowed = allowed.expand(met.shape[:2] + (2,))
        places = places.flatten(1)[:, None, None]
        return joint, states[None, None], places, Codes(codes, allowed)

    def _weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights of configurations: shared, of slots and of groups."""
        read = self.read
        g, s, c = read.counts.values()
        over = read.over if self.grouped else []
        b = self.batch.numel()
        n_bs = Size(f.size for f in read.joint).numel()
        n_o = Size(f.size for f in over).numel()
        zero = self.values.new_zeros(())
        together, slots = zero.expand(b, g), zero.expand(b, g, n_bs, s)
        groups = zero.expand(b, g, n_bs, s, n_o, c)
        if self.uniform:
            return together, slots, groups
        graded = [(n, grade) for n, grade in read.grades.items()]
        for e in read.known:
            if e.macro is None:
                graded += [(n, read.grade_of(e)) for n in e.sites]
                continue
            weight = self._known_total(e)
            if read.grade_of(e) == Grade.TOGETHER:
                together = together + weight[:, :, 0, 0]
            else:
                slots = slots + weight
        for name, grade in graded:
            if not self.grouped:  # no configurations of groups: slots know it all
                grade = min(grade, Grade.SLOT)
            weight = read.weight(name, read.kept_by(grade))
            weight = self._arranged(weight, over if grade == Grade.GROUP else ())
            if grade == Grade.TOGETHER:
                together = together + weight[:, :, 0, 0, 0, 0]
            elif grade == Grade.SLOT:
                slots = slots + weight[..., 0, 0]
            else:
                groups = groups + weight
        return together, slots, groups

    def _known_total(self, e: Evidence) -> Tensor:
        """The log probability of a given macro value: ``(B, G, Bs, S)``."""
        assert e.macro is not None
        sites = [self.upstream.sites[n] for n in e.sites]
        layout = Layout(sites, e.macro.over, f"macro-variable {e.name!r}")
        fibre = Fibre(layout, e.macro.aggregation, e.value, f"given {e.name!r}")
        supports = supports_of(self.upstream, fibre)
        kept = {f.name for f in self.layout.frames}
        own = {f.name for f in layout.frames}
        if supports is None or own not in (kept, set()):
            raise UnsupportedLaw(
                f"{self.what}: what is given, {e.name!r}, has infinitely many states, "
                "or other plates around it. Expected finite sites within the same "
                "plates. Hold its sites instead."
            )
        inner = _Reader(self.upstream, fibre, self.read, supports, False)
        inner.batch, inner.grouped = self.batch, False
        parts = torch.cat([inner._elements(name) for name in layout.names], 6)
        sums = fibre.aggregation.as_sums(inner.values, inner._value)
        if sums is None or not is_lattice(sums):
            raise UnsupportedLaw(
                f"{self.what}: what is given, {e.name!r}, is {fibre.aggregation!r}. "
                "Expected a sum, Count, Max or Min. Hold its sites instead."
            )
        codes = codes_of(sums)
        most = codes.allowed.shape[-1] - 1
        parts = parts[:, :, :, :, 0, 0]  # (B, G, Bs, S, E, V)
        own_codes = (
            codes.codes[:, None, :, None] if codes.codes.dim() > 2 else codes.codes
        )
        total = SumTree(scatter_codes(parts, own_codes, most + 1).flatten(0, 3), most)
        table = total.total.unflatten(0, parts.shape[:4])
        allowed = codes.allowed[:, None, :, None, : table.shape[-1]]
        return log_sum(torch.where(allowed, table, NEVER))

    def _batch_shape(self) -> Size:
        batch, least = self.batch, len(self.whole.batch_shape)
        while len(batch) > least and batch[0] == 1:
            batch = batch[1:]
        return batch

    def constraint(self) -> MicroFibre:
        aggregation, event_dim = self.fibre.aggregation, self._event_dim
        element, places = self._places
        order = places.flatten(1)
        order = torch.empty_like(order).index_copy_(1, element.flatten(), order)
        by_place = self.values.new_empty((order.numel(), self.values.shape[-1]))
        by_place[order.flatten()] = self.values.repeat(len(order), 1)
        value = self._value
        shape = self._batch_shape() + value.shape[1:]
        value = value.reshape(shape)
        if len(order) == 1:
            value = value.squeeze(-1 - event_dim)

        def total(state: Tensor) -> Tensor:
            result = aggregation(state[..., order])
            return result if len(order) > 1 else result.squeeze(-1 - event_dim)

        return MicroFibre(
            lambda state: (state.unsqueeze(-1) == by_place.to(state)).any(-1),
            total,
            value,
            "a micro state of finite support has no continuous coordinates",
            is_discrete=True,
            event_dim=event_dim + (len(order) > 1),
        )

    def method(self, is_sum: bool) -> str:
        if self.uniform:
            return "exact: finite, uniform"
        how = "dynamic programming on the sum" if is_sum else "enumeration"
        count = self.read.latent
        ancestors = f", {len(count)} ancestor(s) summed out" if count else ""
        return f"exact: finite, {how}{ancestors}"

    def refuse_unreachable(self, law: FiniteLaw) -> None:
        """An error if some macro value has probability zero."""
        if bool((law.log_total > NEVER / 2).all()):
            return
        tables = law.tables
        bad = (law.log_total.reshape(-1) <= NEVER / 2).nonzero()[0, 0]
        value = self._value
        value = value.expand(tables.parts.shape[:1] + value.shape[1:])[bad]
        shown = value.squeeze().tolist()
        rows = self.fibre.aggregation.weights(self.values[:, 0])
        hint = "" if rows is None else self._reachable(tables, rows)
        raise Infeasible(
            f"{self.what}: the macro value {shown} cannot be reached: no "
            f"micro state of positive probability has it.{hint} Choose one that the "
            "sites can have."
        )

    def _reachable(self, tables: Tables, rows: Tensor) -> str:
        """The values of a linear map, in words."""
        steps = is_lattice(
            self.fibre.aggregation.as_sums(self.values, self._value) or ()
        )
        possible = (tables.parts > NEVER).flatten(0, 5).any(0)
        if not steps or possible.shape != self.values.shape:
            return ""
        terms = self.values[:, None] * rows.mT.unsqueeze(-1)  # (K, m, V)
        low = torch.where(possible[:, None], terms, torch.inf).amin(-1).sum(0)
        high = torch.where(possible[:, None], terms, -torch.inf).amax(-1).sum(0)
        fns = (self.upstream.sites[name].fn for name in self.layout.names)
        one = rows.shape[0] == 1
        first, last = (t[0].item() if one else t.tolist() for t in (low, high))
        by = steps[0] if one else steps
        if any(map(is_count, fns)):
            return f" Its values begin at {first}, in steps of {by}."
        return f" Its values lie from {first} to {last}, in steps of {by}."
