# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A question about one unit: what was seen of it, what is done, what is asked about."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_macro.checks import GRID, checked
from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.handlers import macro_do
from pyro_macro.intervention import Ahead
from pyro_macro.laws.finite.configurations import finite_values
from pyro_macro.laws.quantity import Quantity, Thing, name_of, names_of
from pyro_macro.laws.twin import WHO, OtherWorld, Unit
from pyro_macro.laws.upstream import Evidence
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import (
    Site,
    is_deterministic,
    preserved_params,
    preserved_random_state,
    unwrapped,
)
from pyro_macro.program.layout import Layout
from pyro_macro.program.reading import read, structural
from pyro_macro.program.substitution import detached
from pyro_macro.questions.question import describe
from pyro_macro.realizations import Realization, Shift
from pyro_macro.realizations.base import refuse_subsampled
from pyro_macro.reports import CounterfactualReport

HOW = "{sales: Natural}, at=[30.0, 33.0]"
WORLDS = "counterfactual__worlds"  # the plate of a grid


class Asked:
    """The question: a unit, what is done to it, and what is asked about."""

    def __init__(
        self,
        model: Any,
        interventions: Any,
        observed: Any,
        effect: Any,
        at: Any,
        model_args: Any,
        model_kwargs: Any,
    ) -> None:
        if not callable(model):
            raise PyroMacroError(f"{model!r} is not callable. Expected a Pyro model.")
        self.done = Done(interventions, at)
        self.things: list[Thing] = as_things(effect)
        run = (structural(model), tuple(model_args), dict(model_kwargs or {}))
        with self.unseen():
            sites = read(*run).sites
            seen, totals, stated = seen_in(sites, observed)
            self.effects = [Quantity(t, sites, "effect") for t in self.things]
            for macro in self.done.fixed:
                Quantity(macro, sites, "macro-variable")
            for thing in (*self.things, *(macro for macro, _ in totals)):
                if isinstance(thing, MacroVariable):
                    parts = [sites[n] for n in thing.micro]
                    refuse_subsampled(f"{WHO}: {thing.name!r}", thing, parts)
            until = [*self.until, *self.done.micro]
            self.unit = Unit(run, seen, totals, until, stated)
            # Sites as they are in the unit
            sites = self.unit.sites
            self.effects = [Quantity(t, sites, "effect") for t in self.things]
            self._refuse_sampled()
        self.model = run

    @property
    def until(self) -> list[str]:
        return list(dict.fromkeys(n for t in self.things for n in names_of(t)))

    @staticmethod
    def unseen() -> ExitStack:
        """Inside, nothing of the user's changes, and no handler of his sees it."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(False))  # derivatives are needed
        stack.enter_context(torch.enable_grad())
        stack.enter_context(preserved_params())
        stack.enter_context(detached())
        stack.enter_context(preserved_random_state())
        return stack

    def intervened(
        self, value: Tensor | None, count: int | None = None
    ) -> tuple[Any, tuple, dict]:
        """The program after the intervention, for one value or a grid of some.

        :param count: of worlds side by side; as many as there are values by default.
        """
        fn, args, kwargs = self.model
        n, depth = 1 if value is None else len(value), self.unit.depth
        bare = Unobserved(self.done.micro)(fn)
        size = n if count is None and n > 1 else count

        def worlds(*args: Any, **kwargs: Any) -> None:
            with pyro.plate(WORLDS, size, dim=-depth - 1):
                bare(*args, **kwargs)

        if value is not None:
            wide = value.reshape((n,) + (1,) * depth + tuple(value.shape[1:]))
            value = value[0] if n == 1 else wide
        return self.done.on(bare if size is None else worlds, value), args, kwargs

    def world(
        self, value: Tensor | None, probe: int = 0, before: Any = None
    ) -> OtherWorld:
        """A run of it, under the noise of the unit."""
        world = OtherWorld(self.unit, self.until, self.done.micro, probe, before)
        with torch.set_grad_enabled(probe == 0):
            try:
                world.run(*self.intervened(value))
            except PyroMacroError as error:
                if GRID not in str(error):
                    raise
                said = str(error).removesuffix(f" {GRID}")
                raise type(error)(f"{said} Give a grid as at=[...]: {HOW}.") from error
        return world

    @cached_property
    def first(self) -> OtherWorld:
        value = self.done.values
        return self.world(None if value is None else value[:1])

    @cached_property
    def _known(self) -> tuple[set[str], list[Evidence]]:
        unit = self.unit
        given = [t for r in self.done.some().values() for t in r.given]
        held = {n for t in given for n in names_of(t)} - set(self.done.micro)
        held &= set(unit.sites)  # parameters may be given, too
        names = {*self.first.matters(self.until), *self.until, *held}
        relevant, kept = unit.relevant(sorted(names), unit.totals, WHO)
        told = {e.name for e in kept}
        # Not the sites of an observed total that were seen themselves
        relevant = {n for n in relevant if n in names | told or n not in unit.held}
        for name in sorted(relevant & set(unit.held) - told):
            form = unit.zero.forms.get(name)
            if form is not None and form.shape is not None:
                kept.append(unit.evidence(name))  # its noises are several
        unit.refuse_factors(relevant, WHO)
        return relevant, kept

    @property
    def relevant(self) -> set[str]:
        """The sites of the unit whose noise matters."""
        return self._known[0]

    @property
    def kept(self) -> list[Evidence]:
        """What was seen that tells of it."""
        return self._known[1]

    @cached_property
    def trouble(self) -> str | None:
        """Why this is no question about affine functions of Gaussian noise."""
        unit, first = self.unit, self.first
        above = first.above(self.until)
        for run, names in ((unit.zero, self.relevant), (first, above)):
            for name in sorted(names & set(run.opaque)):
                law = type(unwrapped(run.opaque[name])).__name__
                if run is unit.zero or name not in unit.sites:
                    return f"site {name!r} is {law}, which is not Gaussian"
        for run, names in ((unit.zero, self.relevant), (first, above)):
            for name in sorted(names & set(run.sites)):
                if run.sites[name].kinks:
                    by = sorted(run.sites[name].kinks)
                    return f"{name!r} is computed with {by} from what is not known"
        return None

    @cached_property
    def coupled(self) -> list[str]:
        """The random sites on the way from the intervention to the effect."""
        first, sites = self.first, self.unit.sites
        above = (first.above(self.until) - first.set_to) & first.changed
        return [n for n in sites if n in above and not sites[n].deterministic]

    @property
    def natural(self) -> list[str]:
        """The micro sites whose values in the unit are acted on."""
        done = self.done.some().items()
        return [n for macro, how in done if how.acts_on_natural for n in macro.micro]

    def is_finite(self) -> bool:
        """Whether all that is not known has finitely many values."""
        sites = self.unit.sites
        wanted = {n for n in self.relevant if not self.unit.is_fixed(n)}
        wanted |= set(self.done.micro) - set(self.natural)
        wanted = {*self.coupled, *(n for n in wanted if not sites[n].deterministic)}
        return all(finite_values(sites[n].fn) is not None for n in wanted)

    def layouts(self, value: Tensor | None) -> dict[str, Layout]:
        """Of the micro states that are drawn anew, by name of their site."""
        fn, args, kwargs = self.model
        done = self.done.at(None if value is None else value[0])
        done = {m: r for m, r in done.items() if not r.acts_on_natural}
        bare = Unobserved(self.done.micro)(fn)
        found = {}
        for target in Ahead(done, (bare, args, kwargs)).targets().values():
            realized = getattr(target, "realized", target.state)
            found[f"{target.state.macro.name}__micro"] = realized.layout
        return found

    def _refuse_sampled(self) -> None:
        """An error before chains are run for a law that is not exact."""
        unit = self.unit
        for macro, realization in self.done.some().items():
            if not realization.draws_own_law:
                continue
            given = {n for t in realization.given for n in names_of(t)}
            above = unit.ancestors(macro.micro, through_held=True) - given
            why = [
                f"it depends on {n!r}, which is {type(unwrapped(fn)).__name__}"
                for n, fn in unit.zero.opaque.items()
                if n in {*macro.micro, *above} and finite_values(fn) is None
            ]
            layout = Layout([unit.sites[n] for n in macro.micro], macro.over)
            rows = macro.aggregation.within(layout).weights(
                torch.zeros(layout.size, device="cpu")
            )
            if rows is None and set(macro.micro) & set(unit.zero.forms):
                why.append(f"{macro.aggregation!r} is no weighted sum")
            if why:
                raise UnsupportedLaw(
                    f"{WHO}: under {describe(realization)} the law of the micro state "
                    f"of {macro.name!r} is no Gaussian: {why[0]}. Expected weighted "
                    "sums of Gaussian sites, or finite sites; Allocate and Shift need "
                    "no such law."
                )

    def refuse(self, trouble: str) -> UnsupportedLaw:
        """An error that says why it is not known exactly, and what would help."""
        held = self.unit.held
        for macro, realization in self.done.some().items():
            kind, names = describe(realization), []
            if realization.acts_on_natural and not isinstance(realization, Shift):
                names, what = list(macro.micro), f"the micro state of {macro.name!r}"
            if realization.given:
                names = [n for t in realization.given for n in names_of(t)]
                what = "what is given"
            unseen = [n for n in names if n not in held and n in self.unit.sites]
            if unseen:
                return UnsupportedLaw(
                    f"{WHO}: {kind} is known exactly where {what} is known, and the "
                    f"rest is affine-Gaussian or finite. Observe {unseen}."
                )
        return UnsupportedLaw(
            f"{WHO}: {trouble}. Expected a program that is jointly affine-Gaussian in "
            "what was not seen, or one of finite sites."
        )

    def report(self, **found: Any) -> CounterfactualReport:
        """A report, of numbers as vectors."""
        # The one that is a function comes first
        done = self.done.some()
        first = dict.fromkeys([*self.done.varied, *done])
        n = len(self.at)
        shape = torch.Size([sum(q.size for q in self.effects)])
        if len(self.effects) == 1:
            shape = self.effects[0].shape
        for name in ("factual_mean", "factual_variance"):
            found[name] = found[name].reshape(shape)
        for name in ("mean", "variance"):
            found[name] = found[name].reshape((n, *shape))
        return CounterfactualReport(
            cause=", ".join(macro.name for macro in first),
            effect=", ".join(name_of(thing) for thing in self.things),
            realization=", ".join(describe(done[macro]) for macro in first),
            at=self.at,
            elements=tuple(name for q in self.effects for name in elements_of(q)),
            **found,
        )

    @cached_property
    def at(self) -> Tensor:
        """What the cause is set to, or shifted by."""
        if self.done.values is not None:
            return self.done.values
        first = next(iter(self.done.some().values()))
        number = getattr(first, "value", getattr(first, "delta", float("nan")))
        number = torch.as_tensor(number).detach().cpu().double()
        return number.reshape(1) if number.numel() == 1 else number.unsqueeze(0)


class Done:
    """Interventions, one of which may be a function of the macro value."""

    def __init__(self, interventions: Any, at: Any) -> None:
        if not isinstance(interventions, Mapping):
            checked(interventions)
        self.fixed: dict[MacroVariable, Any] = dict(interventions)
        self.varied = [
            macro
            for macro, how in self.fixed.items()
            if callable(how) and not isinstance(how, Realization)
        ]
        self.values: Tensor | None = None
        if len(self.varied) > 1 or bool(self.varied) != (at is not None):
            names = [getattr(m, "name", m) for m in self.varied]
            raise PyroMacroError(
                f"{WHO}: at is {at!r}, and the realizations of {names} are functions "
                "of the macro value. Expected at=[...] and one such function, as "
                "Natural is, or neither: Natural(33.0)."
            )
        if self.varied:
            self.values = self._numbers(at)
        checked(self.some())
        self.micro = list(dict.fromkeys(n for m in self.fixed for n in m.micro))

    def _numbers(self, at: Any) -> Tensor:
        macro = self.varied[0]
        event = macro.aggregation.event_dim if isinstance(macro, MacroVariable) else 0
        try:
            values = torch.as_tensor(at, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise PyroMacroError(
                f"{WHO}: at is {at!r}. Expected macro values, as numbers."
            ) from error
        values = values.reshape(1) if values.dim() == 0 and not event else values
        if values.dim() != 1 + event or not values.numel():
            raise PyroMacroError(
                f"{WHO}: at has shape {tuple(values.shape)}. Expected "
                f"{'(n, m)' if event else '(n,)'}, one macro value a row."
            )
        if not bool(values.isfinite().all()):
            raise PyroMacroError(f"{WHO}: at is {at}. Expected finite numbers.")
        return values.detach()

    def at(self, value: Tensor | None) -> dict[MacroVariable, Realization]:
        """The interventions, for some value of the one that is a function."""
        done = dict(self.fixed)
        for macro in self.varied:
            how = done[macro]
            try:
                done[macro] = how(value)
            except TypeError as error:
                name = getattr(how, "__name__", repr(how))
                raise PyroMacroError(
                    f"{WHO}: {name} cannot be made from the macro value alone "
                    f"({error}). Say the rest: lambda value: {name}(value, ...)."
                ) from error
        return done

    def on(self, model: Callable[..., Any], value: Tensor | None) -> Any:
        """The model after the interventions.

        Those that act on the natural micro state come last: on what it is after the
        others.
        """
        done = self.at(value)
        drawn = {m: r for m, r in done.items() if not r.acts_on_natural}
        model = macro_do(model, drawn) if drawn else model
        for macro, realization in done.items():
            if realization.acts_on_natural:
                model = macro_do(model, {macro: realization})
        return model

    def some(self) -> dict[MacroVariable, Realization]:
        """The interventions, for the first value."""
        return self.at(None if self.values is None else self.values[0])


class Unobserved(Messenger):
    """Micro sites are set, whatever was observed of them."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Message) -> None:
        if msg["name"] in self.names and not is_deterministic(msg):
            msg["is_observed"], msg["value"] = False, None


def as_things(effect: Any) -> list[Thing]:
    single = isinstance(effect, (str, MacroVariable))
    things = [effect] if single else effect
    if (
        not isinstance(things, (list, tuple))
        or not things
        or not all(isinstance(t, (str, MacroVariable)) for t in things)
    ):
        raise PyroMacroError(
            f"{WHO}: effect is {effect!r}. Expected a MacroVariable, the name of a "
            "site, or a list of these."
        )
    return list(things)


def elements_of(quantity: Quantity) -> list[str]:
    """What the numbers of a quantity are called."""
    if not quantity.shape:
        return [quantity.name]
    places = torch.cartesian_prod(
        *(torch.arange(n, device="cpu") for n in quantity.shape)
    )
    places = places.reshape(-1, len(quantity.shape))
    return [f"{quantity.name}[{', '.join(map(str, p))}]" for p in places.tolist()]


def seen_in(
    sites: Mapping[str, Site], observed: Any
) -> tuple[dict[str, Tensor], list[tuple[MacroVariable, Tensor]], list[str]]:
    """What was seen of sites, of macro-variables, and which sites were stated."""
    if not isinstance(observed, Mapping):
        raise PyroMacroError(
            f"{WHO}: observed is {observed!r}. Expected a dictionary from names of "
            "sites, or macro-variables, to the values that were seen."
        )
    seen = {n: s.expanded(s.value) for n, s in sites.items() if s.observed}
    totals: list[tuple[MacroVariable, Tensor]] = []
    stated = []
    for thing, value in observed.items():
        if isinstance(thing, MacroVariable):
            quantity = Quantity(thing, sites, "observed")
            first = sites[thing.micro[0]].value
            own, like = quantity.shape, first.new_zeros((), dtype=torch.float64)
        elif isinstance(thing, str):
            quantity = Quantity(thing, sites, "observed")
            own, like = sites[thing].shape, sites[thing].value
        else:
            raise PyroMacroError(
                f"{WHO}: observed has {thing!r}. Expected names of sites, or "
                "macro-variables."
            )
        number = _value(quantity.name, value, own, like)
        if isinstance(thing, MacroVariable):
            totals.append((thing, number))
            continue
        if thing in seen and not torch.equal(seen[thing], number):
            raise PyroMacroError(
                f"{WHO}: site {thing!r} is observed to be {seen[thing].tolist()} in "
                f"the program, and {number.tolist()} in observed={{...}}. Expected one "
                "value: leave one out."
            )
        seen[thing] = number
        stated.append(thing)
    return seen, totals, stated


def _value(name: str, value: Any, shape: torch.Size, like: Tensor) -> Tensor:
    """A value that was seen, of the shape of a site."""
    try:
        number = torch.as_tensor(value).detach().expand(shape)
    except (TypeError, ValueError, RuntimeError) as error:
        found = repr(value) if not isinstance(value, Tensor) else tuple(value.shape)
        raise PyroMacroError(
            f"{WHO}: {name!r} was seen to be {found}. Expected numbers of shape "
            f"{tuple(shape)}."
        ) from error
    kept = number.to(like).clone()
    whole = like.is_floating_point() or torch.equal(
        kept.cpu().double(), number.cpu().double()
    )
    if not whole or not bool(kept.isfinite().all()):
        raise PyroMacroError(
            f"{WHO}: {name!r} was seen to be {value}. Expected finite numbers that its "
            f"dtype, {like.dtype}, can hold; leave out what was not seen."
        )
    return kept
