# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Counterfactuals of finite programs: both worlds of a unit under all joint values.

The probabilities of a random site do not say what noise it has. Where an intervention
changes its distribution from ``p`` to ``q``, its two values are coupled as stated:

* ``"independent"``: its responses to different distributions are independent (response
  functions; Pearl, *Causality*, section 8.2.2). It keeps its value where ``q = p``, and
  is drawn anew otherwise.
* ``"monotone"``: it is the quantile of one uniform number under both, in the order of
  its values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import Infeasible, PyroMacroError, UnsupportedLaw
from pyro_macro.laws.finite.configurations import (
    Ancestor,
    Grade,
    finite_values,
    log_prob_of,
    log_table,
)
from pyro_macro.laws.finite.sums import NEVER
from pyro_macro.laws.product import StackedSites
from pyro_macro.laws.quantity import Quantity
from pyro_macro.laws.twin import (
    WHO,
    OtherWorld,
    Unit,
    refuse_off_fibre,
    refuse_off_support,
)
from pyro_macro.laws.upstream import Evidence
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import Site, ValuedRun, unwrapped
from pyro_macro.program.layout import Layout

CELLS = 1 << 20  # joint values of both worlds, at most
SINGLE = 1 << 13  # that are run one by one, at most
PROBES = 4
COUPLINGS = ("independent", "monotone")

Values = dict[str, Tensor]


class _Listed(ValuedRun):
    """A run in which all sites that matter have values."""

    def __init__(
        self,
        unit: Unit,
        until: Collection[str],
        values: Mapping[str, Tensor],
        before: Mapping[str, Site],
    ) -> None:
        super().__init__(until, dict(unit.shared), values)
        self.before = before

    def otherwise(self, site: Site) -> Tensor:
        return self.before[site.name].value


class _Numbered:
    """Sites with finitely many values, their joint values numbered."""

    def __init__(self, sites: Sequence[Site], supports: Values, depth: int) -> None:
        self.ancestors: list[Ancestor] = []
        self.count, self.depth = 1, depth
        for site in sites:
            values = supports[site.name]
            self.ancestors.append(
                Ancestor(site, Grade.TOGETHER, values, site.shape, self.count)
            )
            self.count *= self.ancestors[-1].count
            refuse_many(self.count, site.name)

    def at(self, index: Tensor, wide: bool) -> Values:
        """The values of the sites, left of all plates if they are wide."""
        return {a.site.name: self.placed(a, a.at(index), wide) for a in self.ancestors}

    def placed(self, of: Ancestor, values: Tensor, wide: bool) -> Tensor:
        if not wide:
            return values[0]
        own = len(of.shape) - len(of.site.event_shape)
        between = (1,) * (self.depth - own)
        return values.reshape((len(values), *between, *of.shape))


def refuse_many(count: int, last: str) -> None:
    if count > CELLS:
        raise UnsupportedLaw(
            f"{WHO}: there are more than {CELLS:,} joint values of what is not known "
            f"of the unit and of what it would have been, up to {last!r} alone. "
            "Observe more sites, or ask of fewer."
        )


class FiniteTwin:
    """A unit of a finite program, and what its sites would have been.

    :param relevant: the sites that matter.
    :param kept: what was seen that tells of them.
    :param coupled: the random sites that an intervention acts on.
    :param natural: the micro sites whose own values it acts on.
    :param effects: what is asked about.
    :param noise: how the two values of a random site are coupled.
    :raises Infeasible: if what was seen cannot be.
    :raises UnsupportedLaw: if there are too many joint values.
    """

    def __init__(
        self,
        unit: Unit,
        relevant: Collection[str],
        kept: Sequence[Evidence],
        coupled: Collection[str],
        natural: Collection[str],
        effects: Sequence[Quantity],
        noise: str,
    ) -> None:
        self.unit, self.kept, self.noise = unit, kept, noise
        self.effects, self.coupled, self.natural = effects, list(coupled), natural
        sites = unit.sites
        random = [n for n in sites if n in relevant and not sites[n].deterministic]
        unknown = [n for n in random if not unit.is_fixed(n)]
        self.supports = {n: support_of(sites[n]) for n in {*unknown, *coupled}}
        self.unknown = _Numbered([sites[n] for n in unknown], self.supports, unit.depth)
        told = {e.name for e in kept if e.macro is None}
        self._weighed = [n for n in random if n in told or n in unknown]
        self.held = {n: v for n, v in unit.held.items() if not sites[n].deterministic}
        self._abduct()

    def _abduct(self) -> None:
        """The posterior of all that is not known of the unit."""
        tables = listed(self.unknown.count, self._as_it_was)
        logs = tables.pop("")
        for e in self.kept:
            found = tables.pop(e.name, None)
            if found is not None:
                near = torch.isclose(found, _row(e).cpu(), rtol=1e-6, atol=1e-9)
                logs = torch.where(near.all(-1), logs, NEVER)
        weights = (logs - logs.max()).exp()
        if float(logs.max()) < NEVER / 2:
            raise Infeasible(
                f"{WHO}: what was seen ({[e.name for e in self.kept]}) has probability "
                "zero under the program. Look at the values."
            )
        self.possible = (weights > 0).nonzero().squeeze(-1)
        self.posterior = weights[self.possible] / weights.sum()
        self.tables = {k: t[self.possible] for k, t in tables.items()}

    def _as_it_was(self, index: Tensor, wide: bool) -> tuple[Any, Values]:
        unit = self.unit
        values = {**self.held, **self.unknown.at(index, wide)}
        run = _Listed(unit, unit.until, values, unit.sites)
        run.run(*unit.model)
        values = {n: s.value for n, s in run.sites.items()} | values
        count = len(index)
        found: Values = {"": torch.zeros(count, dtype=torch.float64, device="cpu")}
        for name in self._weighed:
            if name not in self.supports:
                log = log_prob_of(run.sites[name].fn, values[name], run.sites[name])
                plates = self._full(name, count, wide)
                plates = plates[: len(plates) - len(run.sites[name].event_shape)]
                log = log.expand(plates).reshape(count, -1)
            else:
                table = self.table(run.sites[name].fn, name, count, wide)
                self._refuse_missing(table, name)
                at = self.places(values[name], name, count, wide)
                log = table.gather(-1, at)[..., 0]
            found[""] = found[""] + log.sum(-1).cpu()
        for name in self.coupled:
            table = self.table(run.sites[name].fn, name, count, wide)
            found[f"{name} table"] = table.cpu()
            found[f"{name} place"] = self.places(values[name], name, count, wide).cpu()
        for name in self.natural:
            full = self._full(name, count, True)
            found[f"{name} was"] = values[name].expand(full)
        for e in self.kept:
            site = self.unit.sites.get(e.name)
            if e.macro is not None or (site is not None and site.deterministic):
                thing = e.macro if e.macro is not None else e.name
                quantity = Quantity(thing, self.unit.sites, "observed")
                found[e.name] = self._rows(quantity, values, count, wide)
        for i, quantity in enumerate(self.effects):
            found[f"effect {i}"] = self._rows(quantity, values, count, wide)
        return run, found

    def _rows(self, quantity: Quantity, values: Values, count: int, wide: bool) -> Any:
        if wide:
            return quantity.of(values, (count,), self.unit.depth).cpu()
        return quantity.of(values).unsqueeze(0).cpu()

    def _full(self, name: str, count: int, wide: bool) -> tuple[int, ...]:
        site = self.unit.sites[name]
        own = len(site.shape) - len(site.event_shape)
        lead = (count, *(1,) * (self.unit.depth - own)) if wide else ()
        return (*lead, *site.shape)

    def table(self, fn: Any, name: str, count: int, wide: bool) -> Tensor:
        """Log probabilities of a site's elements, ``(count, elements, values)``."""
        table = log_table(fn, self.supports[name]).movedim(0, -1)
        full = (*self._full(name, count, wide), table.shape[-1])
        table = table.reshape((1,) * (len(full) - table.dim()) + table.shape)
        return table.expand(full).reshape(count, -1, full[-1])

    def places(self, value: Tensor, name: str, count: int, wide: bool) -> Tensor:
        """Which of its values a site's elements have, ``(count, elements, 1)``."""
        hit = value.unsqueeze(-1) == self.supports[name].to(value)
        if not bool(hit.any(-1).all()):
            raise Infeasible(
                f"{WHO}: site {name!r} was seen to be {value.tolist()}. Expected some "
                f"of its values, {self.supports[name].tolist()}."
            )
        full = self._full(name, count, wide)
        return hit.byte().argmax(-1).expand(full).reshape(count, -1, 1)

    def _refuse_missing(self, table: Tensor, name: str) -> None:
        if bool((table.exp().sum(-1) - 1).abs().max() > 1e-4):
            raise UnsupportedLaw(
                f"{WHO}: site {name!r} has other values in some configurations of its "
                "parents. Expected the same ones, of probability zero where it cannot "
                "have them."
            )

    def as_it_was(self) -> tuple[Tensor, Tensor]:
        """The values of the effect in the unit, ``(worlds, m)``, and weights."""
        rows = [self.tables[f"effect {i}"] for i in range(len(self.effects))]
        return torch.cat(rows, -1), self.posterior

    def under(
        self,
        model: Callable[[int | None], tuple[Callable[..., Any], tuple, dict]],
        world: OtherWorld,
        until: Collection[str],
        layouts: Mapping[str, Layout],
        macros: Collection[MacroVariable],
    ) -> tuple[Tensor, Tensor]:
        """The values that the effect would have had, and weights.

        :param model: the program after the intervention; from a number, as many of it
            side by side, in a plate.
        :param world: the same, as it was read.
        :param layouts: of the micro states that are drawn anew, by name of the site.
        :param macros: what is intervened on.
        """
        return _Other(self, model, world, until, layouts, macros).law()


class _Other:
    """A finite program after an intervention, in a unit."""

    def __init__(
        self,
        twin: FiniteTwin,
        model: Callable[[int | None], tuple[Callable[..., Any], tuple, dict]],
        world: OtherWorld,
        until: Collection[str],
        layouts: Mapping[str, Layout],
        macros: Collection[MacroVariable],
    ) -> None:
        self.macros = macros
        self.twin, self.unit, self.model = twin, twin.unit, model
        self.world, self.until = world, until
        sites, depth = self.unit.sites, self.unit.depth
        self.layouts = {n: lay for n, lay in layouts.items() if n in world.sites}
        laws = {n: unwrapped(s.fn) for n, s in world.sites.items() if n not in sites}
        self.natural = {
            n: law.layout for n, law in laws.items() if isinstance(law, StackedSites)
        }
        self.micro = [n for lay in self.layouts.values() for n in lay.names]
        supports = {n: support_of(sites[n]) for n in self.micro}
        self.states = _Numbered([sites[n] for n in self.micro], supports, depth)
        self.after = _Numbered([sites[n] for n in twin.coupled], twin.supports, depth)
        micro = [n for macro in macros for n in macro.micro]
        things: list[Any] = [*macros, *dict.fromkeys(micro)]
        self.set_to = [Quantity(t, sites, "micro site") for t in things]
        self.sizes = len(twin.possible), self.states.count, self.after.count
        self.count = math.prod(self.sizes)
        refuse_many(self.count, str(next(iter(twin.coupled), "the micro state")))

    def law(self) -> tuple[Tensor, Tensor]:
        tables = listed(self.count, self._as_it_would_be)
        was, _, _ = self._digits(torch.arange(self.count, device="cpu"))
        weights = self.twin.posterior[was] * tables[""].exp()
        if abs(float(weights.sum()) - 1) > 1e-4:
            raise UnsupportedLaw(
                f"{WHO}: the probabilities of what the sites would have been add up to "
                f"{float(weights.sum()):g}. Expected 1: a realization on the values "
                "that the micro sites have."
            )
        possible = weights > 0
        for macro in self.macros:
            self._refuse_off(macro, tables, possible)
        rows = [tables[f"effect {i}"] for i in range(len(self.twin.effects))]
        return torch.cat(rows, -1)[possible], weights[possible]

    def _refuse_off(
        self, macro: MacroVariable, tables: Values, possible: Tensor
    ) -> None:
        """An error if micro states are not what the intervention says."""
        names = [*macro.micro, macro.name]
        if not all(f"{n} set" in tables for n in names):
            return
        values = {n: tables[f"{n} set"] for n in names}
        refuse_off_fibre(self.unit, macro, values, (self.count,), possible)
        for name in macro.micro:
            refuse_off_support(self.unit.sites[name], values[name][possible])

    def _digits(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, states, after = self.sizes
        return index // (states * after), index // after % states, index % after

    def _as_it_would_be(self, index: Tensor, wide: bool) -> tuple[Any, Values]:
        twin, unit, count = self.twin, self.unit, len(index)
        was, state, after = self._digits(index)
        before = {**twin.held, **twin.unknown.at(twin.possible[was], wide)}
        values = {n: v for n, v in before.items() if n not in self.world.set_to}
        values |= self.after.at(after, wide)
        drawn = self.states.at(state, wide)
        for name, layout in self.layouts.items():
            values[name] = layout.stack(drawn)
        for name, layout in self.natural.items():
            own = {n: twin.tables[f"{n} was"][was] for n in layout.names}
            values[name] = layout.stack(
                own if wide else {n: v[0] for n, v in own.items()}
            )
        run = _Listed(unit, self.until, values, self.world.sites)
        run.run(*self.model(count if wide else None))
        found: Values = {"": torch.zeros(count, dtype=torch.float64, device="cpu")}
        for name in self.layouts:
            log = _log_prob(run.sites[name].fn, values[name], name)
            found[""] = found[""] + log.reshape(count, -1).sum(-1).cpu()
        for name in twin.coupled:
            q = twin.table(run.sites[name].fn, name, count, wide).cpu()
            at = twin.places(values[name], name, count, wide).cpu()
            p = twin.tables[f"{name} table"][was]
            place = twin.tables[f"{name} place"][was]
            log = coupled(p, q, place, at, twin.noise)
            found[""] = found[""] + log.reshape(count, -1).sum(-1)
        everything = {n: s.value for n, s in run.sites.items()} | values
        for quantity in self.set_to:
            if quantity.name in everything:
                between = (1,) * (unit.depth - len(quantity.layout.batch_shape))
                full = (count, *between, *quantity.shape)
                value = everything[quantity.name].expand(full).cpu()
                found[f"{quantity.name} set"] = value
        for i, quantity in enumerate(twin.effects):
            found[f"effect {i}"] = twin._rows(quantity, everything, count, wide)
        return run, found


def support_of(site: Site) -> Tensor:
    """The values of a finite site, ascending."""
    values = finite_values(site.fn)
    assert values is not None
    return values.sort().values


def coupled(p: Tensor, q: Tensor, was: Tensor, would: Tensor, noise: str) -> Tensor:
    """Log probabilities of what elements would be, given what they were.

    :param p: log probabilities as they were, shape ``(..., values)``.
    :param q: log probabilities as they would be.
    :param was: which value it was, shape ``(..., 1)``.
    :param would: which value it would be.
    """
    p, q = torch.broadcast_tensors(p.exp(), q.exp())
    if noise == "independent":
        same = ((p - q).abs() <= 1e-6).all(-1, keepdim=True)
        found = torch.where(same, (was == would).double(), q.gather(-1, would))
    else:
        # The overlap of the intervals of the uniform number that lead to the values
        ends = [(t.cumsum(-1), at) for t, at in ((p, was), (q, would))]
        high = [end.gather(-1, at) for end, at in ends]
        width = p.gather(-1, was), q.gather(-1, would)
        low = [end - own for end, own in zip(high, width, strict=True)]
        both = torch.minimum(*high) - torch.maximum(*low)
        found = both.clamp(min=0) / width[0].clamp(min=1e-300)
        found = torch.where(found < 1e-12, 0.0, found)  # but for rounding
    return found.log().clamp(min=NEVER).squeeze(-1)


def _log_prob(law: Any, vector: Tensor, name: str) -> Tensor:
    """Of micro states, many of which a law cannot have."""
    if not getattr(law.support, "is_discrete", False):
        raise UnsupportedLaw(
            f"{WHO}: {name!r} is {type(unwrapped(law)).__name__}, which is not "
            "discrete. Expected a realization on the values that the micro sites have."
        )
    vector = vector.to(getattr(law, "dtype", vector.dtype))
    inside = law.support.check(vector)
    safe = torch.where(inside.unsqueeze(-1), vector, law.sample().to(vector))
    return torch.where(inside, law.log_prob(safe).double(), NEVER).clamp(min=NEVER)


def _row(known: Evidence) -> Tensor:
    return known.value.double().reshape(1, -1)


def listed(count: int, tables: Callable[[Tensor, bool], tuple[Any, Values]]) -> Values:
    """What a program says under each of some joint values.

    Side by side, if single runs say the same, and one by one otherwise.

    :param tables: from their numbers, and whether they are side by side, to the run
        and tables with their dimension in front.
    """
    index = torch.arange(count, device="cpu")
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(
        count, (min(PROBES, count),), generator=generator, device="cpu"
    ).tolist()
    try:
        run, found = tables(index, True)
        together = run.tracker.escaped or run.tracker.whole
        if not together and all(
            _agree(found, i, tables(index[i : i + 1], False)[1]) for i in some
        ):
            return found
    except Exception:  # whatever it is, a single run will tell
        pass
    if count > SINGLE:
        raise UnsupportedLaw(
            f"{WHO}: the program says something else when it is run under many joint "
            "values at once (it adds up, or branches on, all dimensions of a tensor), "
            f"and {count:,} are too many to run one by one."
        )
    alone = [_alone(tables, index[i : i + 1]) for i in range(count)]
    found = {name: torch.cat([one[name] for one in alone]) for name in alone[0]}
    if not all(_agree(found, i, _alone(tables, index[i : i + 1])) for i in some):
        raise UnsupportedLaw(
            f"{WHO}: the program differs between two runs at the same values of all "
            "sites: it draws numbers that are no sample sites, or hides sites. Make "
            "them visible sample sites."
        )
    return found


def _alone(
    tables: Callable[[Tensor, bool], tuple[Any, Values]], index: Tensor
) -> Values:
    try:
        return tables(index, False)[1]
    except PyroMacroError:
        raise
    except Exception as error:
        raise UnsupportedLaw(
            f"{WHO}: the program fails under some joint values of its sites "
            f"({type(error).__name__}: {error}). Expected one whose sites are the "
            "same under all."
        ) from error


def _agree(found: Values, i: int, one: Values) -> bool:
    return found.keys() == one.keys() and all(
        torch.allclose(found[name][i].double(), one[name][0].double(), 1e-4, 1e-6)
        for name in found
    )
