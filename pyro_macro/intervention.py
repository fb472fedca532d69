# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""From interventions on macro-variables to micro states, for one run of a program."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.ops.provenance import (
    detach_provenance,
)
from pyro.poutine.runtime import Message
from torch import Tensor
from torch.distributions import biject_to

from pyro_macro.aggregation.stacked import Stacked
from pyro_macro.errors import PyroMacroError, UnknownSite, UnsupportedLaw
from pyro_macro.laws.base import MicroLaw
from pyro_macro.laws.gaussian.law import GaussianProgram
from pyro_macro.laws.upstream import Evidence
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import (
    InnerRun,
    Shared,
    Site,
    refuse_fixed,
    refuse_grid,
    unwrapped,
)
from pyro_macro.program.layout import Layout
from pyro_macro.program.reading import draw, refuse_fused, structural
from pyro_macro.program.substitution import detached
from pyro_macro.realizations import MicroState, Realization, Realized
from pyro_macro.realizations.base import as_like, common, refuse_apart
from pyro_macro.reports import Description
from pyro_macro.units import Interventions, Unit, groups, units, value_of


class Target:
    """One intervention in one run.

    :ivar values: the value of each micro site, once it is drawn.
    :ivar group: what is drawn together with it, in this order; what comes later
        depends on what was drawn before.
    """

    def __init__(
        self,
        state: MicroState,
        unit: Unit,
        later: Callable[[Mapping[str, Tensor]], MicroState] | None = None,
    ) -> None:
        self.unit, self.later = unit, later
        self.values: dict[str, Tensor] | None = None
        self.met: set[str] = set()
        self._group: list[Target] | None = None
        self._set(state)
        refuse_apart(unit.realization, state)
        if later is None:
            self.realized: Realized = unit.realization.realize(state)

    @property
    def lasts(self) -> bool:
        """Whether it is the same in the next run of the same program.

        Ranks that share a micro state have to decide alike, and do not know of one
        another whether the program has changed.
        """
        return self.later is None and len(self.group) == 1 and not self.state.is_apart

    def again(self) -> Target:
        """The same, for another run."""
        new = copy.copy(self)
        new.values, new.met, new._group = None, set(), None
        if self.value is not None:
            new.value = self.value.clone()  # what a trace holds may be written to
        return new

    def _set(self, state: MicroState) -> None:
        self.state, self.what = state, state.what
        self.value = self.unit.realization.macro_value(state)

    @property
    def group(self) -> list[Target]:
        # No list of itself by default: in a cycle, large tensors would wait for the
        # garbage collector
        return [self] if self._group is None else self._group

    def follow(self, drawn: Mapping[str, Tensor]) -> None:
        """Realizes it, now that the sites before it in its group are drawn."""
        if self.later is not None:
            with detached():
                self._set(self.later(drawn))
                self.realized = self.unit.realization.realize(self.state)

    def described(self) -> Description:
        """What :meth:`macro_do(...).describe` says of it."""
        law, layout = self.realized.law, self.realized.layout
        known = isinstance(law, MicroLaw)
        method = law.method if known else "as stated"
        point = isinstance(unwrapped(law), dist.Delta)
        free = 0
        if not point and not law.support.is_discrete:
            try:
                free = biject_to(law.support).inverse_shape(law.event_shape)[-1]
            except (UnsupportedLaw, NotImplementedError):
                free = layout.full_size - 1
        return Description(
            macro=", ".join(m.name for m in self.unit.members),
            realization=type(self.unit.realization).__name__,
            law=type(unwrapped(law)).__name__,
            exact=point or not known or method.startswith("exact"),
            method="a point" if point else method,
            elements=layout.full_size,
            free=free,
            cost="none" if point else law.cost if known else "that of its own draws",
        )

    def macro_values(self) -> list[tuple[MacroVariable, Tensor]]:
        """The value of each macro-variable that is set."""
        if self.value is None:
            return []
        aggregation = self.state.macro.aggregation
        if not isinstance(aggregation, Stacked):
            return [(self.state.macro, self.value)]
        values = aggregation.split(self.value)
        return list(zip(self.unit.members, values, strict=True))


class _Lookahead(InnerRun):
    """Executes, ahead of the real run, what no intervention changes.

    Sites that are no micro sites, and not downstream of one, are executed visibly: the
    real run finds them done. The others get private draws.
    """

    def __init__(
        self, until: Iterable[str], micro: Iterable[str], shared: dict[str, Shared]
    ) -> None:
        super().__init__(set(until), shared)
        self.changed = set(micro)
        self.micro = frozenset(self.changed)

    def choose(self, msg: Message, site: Site) -> Any:
        if site.name in self.micro:
            refuse_fixed(msg, "macro_do")
        elif not site.parents & self.changed:
            return None
        self.changed.add(site.name)
        return draw(site.fn) if msg["value"] is None else msg["value"]


class Ahead:
    """Reads a program ahead of its real run, as far as its interventions need."""

    def __init__(
        self,
        interventions: Interventions,
        model: tuple[Callable[..., Any], tuple, dict],
        shared: dict[str, Shared] | None = None,
    ) -> None:
        self.interventions, self.run = interventions, model
        # What was consolidated does not tell what acts on what
        self.model = (structural(model[0]), *model[1:])
        self.shared = {} if shared is None else shared  # executed already
        self.micro = {n: macro for macro in interventions for n in macro.micro}

    def targets(self) -> dict[str, Target]:
        """The target of each micro site."""
        self.natural = self._look()
        read = {unit: self._read(unit) for unit in units(self.interventions)}
        self.read_sites = {n: s for _, p in read.values() for n, s in p.sites.items()}
        found: dict[str, Target] = {}
        for group in groups(read):
            targets = []
            for i, unit in enumerate(group):
                state = read[unit][0]
                if len(group) > 1:
                    target = self._in_group(group, i, read)
                else:
                    target = Target(state, unit)
                targets.append(target)
            for unit, target in zip(group, targets, strict=True):
                target._group = targets if len(targets) > 1 else None
                found |= dict.fromkeys(unit.macro.micro, target)
        return found

    def _read(
        self,
        unit: Unit,
        more: Sequence[Evidence] = (),
        drawn: Mapping[str, Tensor] | None = None,
    ) -> tuple[MicroState, GaussianProgram]:
        """The program as far as a unit needs it.

        :param more: what is known besides what is given.
        :param drawn: micro sites of other units, at their values.
        """
        macro, realization = unit.macro, unit.realization
        what = f"macro-variable {macro.name!r}"
        held, evidence, sites = self._given(macro, realization)
        shared = dict(self.shared)
        for name, value in (drawn or {}).items():
            held[name] = value
            shared[name] = Shared(value, outside=self._outside(name, value))
        evidence += more
        needed = [n for e in more for n in e.sites]
        program = GaussianProgram(
            self.model,
            macro.micro,
            [*macro.micro, *sites, *needed, *held],
            self.shared if drawn is None else shared,
            held,
        )
        for name in macro.micro:
            if name not in program.sites:
                raise UnknownSite.named(what, name, program.sites)
            for member in unit.members:
                if name in member.micro:
                    refuse_unfit(member, program.sites[name])
        for member in unit.members:
            if member.name in program.sites:
                raise PyroMacroError(
                    f"macro-variable {member.name!r}: the program has a site of that "
                    "name already. Give the macro-variable another one."
                )
        program.refuse_paths(macro.micro, what)
        own = self.natural if realization.acts_on_natural else program.sites
        sites_now = {name: own[name] for name in macro.micro}
        state = MicroState(macro, program, evidence, program.shared, sites_now)
        return state, program

    def _in_group(
        self,
        group: list[Unit],
        i: int,
        read: Mapping[Unit, tuple[MicroState, GaussianProgram]],
    ) -> Target:
        """One of several units that depend on one another.

        The joint law is taken apart: ``P(X_1 | all values)``, then
        ``P(X_2 | X_1, the values that are left)``, and so on.
        """
        unit = group[i]
        left = [value_of(other, read[other][0]) for other in group[i + 1 :]]

        def given(drawn: Mapping[str, Tensor]) -> MicroState:
            before = {n: drawn[n] for u in group[:i] for n in u.macro.micro}
            return self._read(unit, left, before)[0]

        if i == 0:
            return Target(self._read(unit, left)[0], unit)
        return Target(read[unit][0], unit, later=given)

    def _outside(self, name: str, value: Tensor) -> dict[int, int]:
        """The dimensions of a drawn value that are no plates of the program."""
        site = self.read_sites[name]
        plates = {f.dim for f in site.frames}
        batch = value.shape[: value.dim() - len(site.event_shape)]
        dims = range(-len(batch), 0)
        return {d: batch[d] for d in dims if batch[d] > 1 and d not in plates}

    def _look(self) -> dict[str, Site]:
        """Executes what is given, and what a natural value depends on."""
        until: set[str] = set()
        for macro, realization in self.interventions.items():
            for thing in realization.given:
                until |= {thing} if isinstance(thing, str) else set(thing.micro)
            if realization.acts_on_natural:
                what = f"macro-variable {macro.name!r}: {type(realization).__name__}"
                refuse_fused(self.run[0], macro.micro, f"{what} acts on natural values")
                until |= set(macro.micro)
        if not until:
            return {}
        run = _Lookahead(until, self.micro, self.shared)
        run.run(*self.run)
        self.shared = run.shared
        self.changed, self.sites, self.params = run.changed, run.sites, run.params
        for macro, realization in self.interventions.items():
            if realization.acts_on_natural:
                self._refuse_natural(macro, realization)
        return run.sites

    def _refuse_natural(self, macro: MacroVariable, realization: Realization) -> None:
        """An error if natural values are not known before others are set."""
        for name in macro.micro:
            site = self.sites.get(name)
            others = self.changed - set(macro.micro)  # paths inside are refused later
            above = site.parents & others if site is not None else ()
            if above:
                kind = type(realization).__name__
                raise PyroMacroError(
                    f"macro-variable {macro.name!r}: {kind} acts on natural values, "
                    f"and micro site {name!r} depends on {sorted(above)}, which "
                    "another intervention of the same macro_do changes. Nest two: "
                    f"macro_do(macro_do(model, {{{macro.name}: {kind}(...)}}), others)."
                )

    def _given(
        self, macro: MacroVariable, realization: Realization
    ) -> tuple[dict[str, Tensor], list[Evidence], list[str]]:
        """What is held, what else is known, and the sites that the latter needs."""
        held: dict[str, Tensor] = {}
        evidence: list[Evidence] = []
        needed: list[str] = []
        what = f"macro-variable {macro.name!r}: given"
        for thing in realization.given:
            if isinstance(thing, str):
                if thing in self.params and thing not in self.sites:
                    continue  # parameters are held anyway
                self._refuse_given(what, thing)
                held[thing] = self.shared[thing].value
                continue
            evidence.append(self._known(what, thing))
            needed.extend(thing.micro)
        return held, evidence, needed

    def _refuse_given(self, what: str, name: str, intervened: bool = False) -> None:
        if name not in self.sites:
            raise UnknownSite.named(what, name, {*self.sites, *self.params})
        if name in self.changed and not intervened:
            raise PyroMacroError(
                f"{what}: site {name!r} is a micro site of an intervention, or "
                "downstream of one, so that it has no value to be held at yet. Give "
                "sites that the interventions do not act on, or a macro-variable "
                "that is itself intervened on."
            )

    def _known(self, what: str, macro: MacroVariable) -> Evidence:
        intervened = self.interventions.get(macro)
        for name in macro.micro:
            self._refuse_given(what, name, intervened is not None)
        sites = [self.sites[name] for name in macro.micro]
        layout = Layout(sites, macro.over, f"macro-variable {macro.name!r}")
        like = common([detach_provenance(site.value) for site in sites])
        if intervened is None:
            values = {n: self.shared[n].value for n in macro.micro}
            value = macro.aggregation(layout.stack(values).to(like))
        else:
            number = getattr(intervened, "value", None)
            if number is None:
                raise PyroMacroError(
                    f"{what}: {macro.name!r} is shifted, not set to a value, in the "
                    "same macro_do. Nest two macro_do instead."
                )
            value = as_like(number, like)
        return Evidence.of_macro(macro, layout, value)


def refuse_unfit(macro: MacroVariable, site: Site) -> None:
    """An error if a site is not there to be set."""
    what = f"macro-variable {macro.name!r}"
    if _is_fixed(site.fn):
        raise PyroMacroError(
            f"{what}: micro site {site.name!r} is already set by a macro_do inside. "
            "Two interventions need disjoint micro sites: drop one, or state a single "
            "realization for both."
        )
    refuse_grid(site.name, site.fn)
    if site.observed:
        raise PyroMacroError(
            f"{what}: micro site {site.name!r} is observed, and cannot be both "
            "observed and set. Run the model without that observation "
            "(`poutine.uncondition`, or no `obs=`)."
        )


class _NoParameters(PyroMacroError, AttributeError):
    """So that ``hasattr`` answers, and whoever asks further is told why."""


class _Fixed(MaskedDistribution):
    """The distribution of a micro site that is set, as of ``pyro.deterministic``."""

    @property
    def loc(self) -> Tensor:
        raise _NoParameters(
            "a micro site that macro_do has set cannot be reparametrized: it is no "
            "longer random. Drop it from the configuration, or put reparam inside: "
            "macro_do(poutine.reparam(model, config), interventions)."
        )


def fixed(value: Tensor, event_dim: int) -> Any:
    return _Fixed(point(value, event_dim), False)


def point(value: Tensor, event_dim: int) -> dist.Delta:
    """A ``Delta`` that neither copies nor checks its value: there may be many."""
    batch = value.shape[: value.dim() - event_dim]
    zero = torch.zeros((), dtype=value.dtype, device=value.device).expand(batch)
    return dist.Delta(value, zero, event_dim, validate_args=False)


def _is_fixed(fn: Any) -> bool:
    while hasattr(fn, "base_dist") and not isinstance(fn, _Fixed):
        fn = fn.base_dist
    return isinstance(fn, _Fixed)
