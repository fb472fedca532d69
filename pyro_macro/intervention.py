# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""From interventions on macro-variables to micro states, for one run of a program."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.ops.provenance import (
    ProvenanceTensor,
    detach_provenance,
    extract_provenance,
)
from pyro.poutine.runtime import Message, apply_stack
from torch import Tensor

from pyro_macro.errors import PyroMacroError, UnknownSite, UnsupportedLaw
from pyro_macro.laws.gaussian import Evidence, GaussianLaw, GaussianProgram
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import InnerRun, Shared, Site, refuse_fixed, unwrapped
from pyro_macro.program.layout import Layout
from pyro_macro.program.reading import draw
from pyro_macro.realizations import MicroState, Realization, Realized

Interventions = Mapping[MacroVariable, Realization]


class Target:
    """One intervention in one run."""

    def __init__(self, state: MicroState, realization: Realization) -> None:
        self.state = state
        self.what = state.what
        self.value = realization.macro_value(state)
        self.realized: Realized = realization.realize(state)
        self.values: dict[str, Tensor] | None = None
        self.met: set[str] = set()


class _Lookahead(InnerRun):
    """Executes, ahead of the real run, what no intervention changes.

    Sites that are no micro sites, and not downstream of one, are executed visibly: the
    real run finds them done. The others get private draws.
    """

    def __init__(self, until: Iterable[str], micro: Iterable[str]) -> None:
        super().__init__(set(until))
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
    ) -> None:
        self.interventions, self.model = interventions, model
        self.shared: dict[str, Shared] = {}
        self.micro = {n: macro for macro in interventions for n in macro.micro}

    def targets(self) -> dict[str, Target]:
        """The target of each micro site."""
        natural = self._look()
        found: dict[str, Target] = {}
        laws: list[tuple[MacroVariable, Realization, GaussianProgram]] = []
        for macro, realization in self.interventions.items():
            held, evidence, sites = self._given(macro, realization)
            program = GaussianProgram(
                self.model,
                macro.micro,
                [*macro.micro, *sites, *held],
                self.shared,
                held,
            )
            for name in macro.micro:
                if name not in program.sites:
                    raise UnknownSite.named(
                        f"macro-variable {macro.name!r}", name, program.sites
                    )
                refuse_unfit(macro, program.sites[name])
            what = f"macro-variable {macro.name!r}"
            if macro.name in program.sites:
                raise PyroMacroError(
                    f"{what}: the program has a site of that name already. Give the "
                    "macro-variable another one."
                )
            program.refuse_paths(macro.micro, what)
            own = natural if realization.acts_on_natural else program.sites
            sites_now = {name: own[name] for name in macro.micro}
            state = MicroState(macro, program, evidence, self.shared, sites_now)
            target = Target(state, realization)
            found |= {name: target for name in macro.micro}
            laws.append((macro, realization, program))
        _refuse_dependent(laws)
        return found

    def _look(self) -> dict[str, Site]:
        """Executes what is given, and what a natural value depends on."""
        until: set[str] = set()
        for macro, realization in self.interventions.items():
            for thing in realization.given:
                until |= {thing} if isinstance(thing, str) else set(thing.micro)
            if realization.acts_on_natural:
                until |= set(macro.micro)
        if not until:
            return {}
        run = _Lookahead(until, self.micro)
        run.run(*self.model)
        self.shared = run.shared
        self.changed, self.sites, self.params = run.changed, run.sites, run.params
        return run.sites

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
        event_dim = macro.aggregation.event_dim
        if intervened is None:
            state = layout.stack({n: self.shared[n].value for n in macro.micro})
            value = macro.aggregation(state)
        else:
            number = getattr(intervened, "value", None)
            if number is None:
                raise PyroMacroError(
                    f"{what}: {macro.name!r} is shifted, not set to a value, in the "
                    "same macro_do. Nest two macro_do instead."
                )
            like = detach_provenance(sites[0].value)
            value = torch.as_tensor(number).to(like)
        return Evidence(
            name=macro.name,
            of=lambda run: macro.aggregation(
                layout.stack({n: run.sites[n].value for n in macro.micro})
            ),
            value=value,
            sites=macro.micro,
            frames=layout.frames,
            event_shape=value.shape[value.dim() - event_dim :],
        )


def refuse_unfit(macro: MacroVariable, site: Site) -> None:
    """An error if a site is not there to be set."""
    what = f"macro-variable {macro.name!r}"
    if _is_fixed(site.fn):
        raise PyroMacroError(
            f"{what}: micro site {site.name!r} is already set by a macro_do inside. "
            "Two interventions need disjoint micro sites: drop one, or state a single "
            "realization for both."
        )
    if site.observed:
        raise PyroMacroError(
            f"{what}: micro site {site.name!r} is observed, and cannot be both "
            "observed and set. Run the model without that observation "
            "(`poutine.uncondition`, or no `obs=`)."
        )


def _refuse_dependent(
    laws: list[tuple[MacroVariable, Realization, GaussianProgram]],
) -> None:
    """Two micro states in one handler are drawn apart: their laws must be apart."""
    for i, (macro, realization, program) in enumerate(laws):
        for other, other_realization, other_program in laws[:i]:
            if not (realization.draws_own_law and other_realization.draws_own_law):
                continue
            if other in realization.given:
                continue
            if macro in other_realization.given:
                continue
            mine = program.latent_sources(macro.micro)
            common = mine & other_program.latent_sources(other.micro)
            if common:
                raise UnsupportedLaw(
                    f"macro-variables {other.name!r} and {macro.name!r} are dependent, "
                    f"through {sorted(common)}, and it is not stated how they are "
                    f"realized together. Say Natural(..., given=[{other.name}]) for "
                    f"{macro.name!r}, hold the common sites, or nest two macro_do."
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
    return _Fixed(dist.Delta(value, event_dim=event_dim), False)


def _is_fixed(fn: Any) -> bool:
    while hasattr(fn, "base_dist") and not isinstance(fn, _Fixed):
        fn = fn.base_dist
    return isinstance(fn, _Fixed)


class OnTheFly:
    """Collects the micro sites of one intervention while the program runs.

    Without the program at hand, nothing is known of a site before it is met. All but
    the last micro site are :class:`Pending` until then.
    """

    def __init__(self, macro: MacroVariable, realization: Realization) -> None:
        self.macro, self.realization = macro, realization
        self.sites: dict[str, Site] = {}
        self.pending: dict[str, Pending] = {}

    def meet(self, site: Site) -> bool:
        """Takes note of a micro site; whether it was the last."""
        refuse_unfit(self.macro, site)
        self.sites[site.name] = site
        return len(self.sites) == len(self.macro.micro)

    def target(
        self,
        known: Mapping[str, Tensor],
        latent: Iterable[str],
        shared: dict[str, Shared],
    ) -> Target:
        """The target, once all micro sites are met.

        :param known: the values of the sites met so far, by name.
        :param latent: the names of those among them that are random.
        :param shared: the parameters and subsamples so far.
        """
        what = f"macro-variable {self.macro.name!r}: given"
        given = self.realization.given
        for thing in given:
            if thing in shared:
                continue  # parameters are held anyway
            if isinstance(thing, MacroVariable) or thing not in known:
                name = thing.name if isinstance(thing, MacroVariable) else thing
                raise UnknownSite.named(f"{what} (so far in the run)", name, known)
        unheld = sorted(set(latent) - set(given))
        program = _MetSites(self.macro, self.sites, unheld)
        sites = {
            name: replace(self.sites[name], value=program.sites[name].value)
            for name in self.macro.micro
        }
        return Target(
            MicroState(self.macro, program, [], shared, sites),
            self.realization,
        )

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Gives the pending values their content."""
        for name, pending in self.pending.items():
            pending.fill(values[name])


class _MetSites(GaussianProgram):
    """The program that consists of some micro sites, as they were met."""

    def __init__(
        self, macro: MacroVariable, sites: dict[str, Site], unheld: list[str]
    ) -> None:
        self.unheld = unheld

        def program() -> None:
            for site in sites.values():
                apply_stack(
                    Message(
                        type="sample",
                        name=site.name,
                        fn=site.fn,
                        is_observed=False,
                        args=(),
                        kwargs={},
                        value=None,
                        infer={},
                        scale=1.0,
                        mask=None,
                        cond_indep_stack=site.frames,
                        done=False,
                        stop=False,
                        continuation=None,
                    )
                )

        super().__init__((program, (), {}), macro.micro, macro.micro, {}, {})

    def law(self, names: Any, over: Any, what: str, given: Any = ()) -> GaussianLaw:
        if self.unheld:
            raise UnsupportedLaw(
                f"{what}: used as a context manager, macro_do does not see the program "
                f"ahead, and cannot tell how the micro state depends on {self.unheld}. "
                "Wrap the model, macro_do(model, interventions), or hold them with "
                f"given={self.unheld}."
            )
        return super().law(names, over, what, given)


class Pending(Tensor):
    """A value that is not known yet; using it says so.

    As an uninitialized parameter of torch, it becomes an ordinary tensor in the end.
    """

    message: str
    law: Any
    tracked: bool = False  # whether a handler outside wraps it with a provenance

    @staticmethod
    def of(name: str, what: str, law: Any) -> Pending:
        """A pending value of site ``name``.

        :param law: the site's distribution, at an unknown point, to be filled too.
        """
        pending = Tensor._make_subclass(Pending, unwrapped(law).v.clone())
        pending.law = law
        pending.message = (
            f"{what}: the value of micro site {name!r} is used before the last micro "
            "site is drawn. Used as a context manager, macro_do does not see the "
            "program ahead. Wrap the model: macro_do(model, interventions)."
        )
        return pending

    def fill(self, value: Tensor) -> None:
        """Makes it an ordinary tensor with this content, gradients included."""
        plain: Any
        plain, provenance = extract_provenance(value)
        with torch._C.DisableTorchFunctionSubclass():
            if plain.shape == self.shape:
                unwrapped(self.law).v = value
            # Of another shape where there are plates outside
            self.data = torch.empty_like(plain)
            self.__class__ = Tensor  # type: ignore[assignment]
            self.copy_(plain)
            if provenance and not self.tracked:
                self.__class__ = ProvenanceTensor  # type: ignore[assignment]
                self._t, self._provenance = plain, provenance  # type: ignore[attr-defined]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Handlers outside may ask for its shape, nobody for its content
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        message = next((a.message for a in args if isinstance(a, Pending)), "")
        raise PyroMacroError(message or "a pending micro value is used")


_SHAPES = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
}
