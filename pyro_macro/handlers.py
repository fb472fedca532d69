# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Effect handlers: macro values in the trace, and interventions on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, overload

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.ops.provenance import detach_provenance
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.runtime import Message, apply_stack
from pyro.poutine.util import is_validation_enabled, site_is_subsample
from torch import Tensor

from pyro_macro.errors import (
    OffFibre,
    PyroMacroError,
    UnknownSite,
    UnsupportedLaw,
)
from pyro_macro.laws.fibre import tolerance
from pyro_macro.laws.gaussian import Evidence, GaussianProgram
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import (
    InnerRun,
    Shared,
    Site,
    refuse_fixed,
    replay,
)
from pyro_macro.program.layout import Layout
from pyro_macro.program.reading import draw
from pyro_macro.realizations import MicroState, Natural, Realization, Realized
from pyro_macro.realizations.base import as_given, refuse_injective

F = TypeVar("F", bound=Callable[..., Any])


@overload
def aggregate(fn: F, macros: MacroVariable | Iterable[MacroVariable]) -> F: ...


@overload
def aggregate(
    fn: None = None, macros: MacroVariable | Iterable[MacroVariable] = ()
) -> Aggregate: ...


def aggregate(
    fn: Any = None, macros: MacroVariable | Iterable[MacroVariable] = ()
) -> Any:
    """Adds macro values to the trace, as deterministic sites.

    Works as a wrapper, a decorator and a context manager. Nothing else changes: under
    ``aggregate`` the program

        >>> def shop():
        ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))

    is equivalent to the same with one line more,
    ``pyro.deterministic("sales", x1 + x2)``.

    :param fn: a model. Without one, the handler itself is returned.
    :param macros: macro-variables, whose micro sites may be deterministic.
    :raises UnknownSite: at the end of a run that did not meet a micro site.
    :raises NotAMicroState: if micro sites share no common shape.

        >>> import pyro, pyro.distributions as dist, pyro_macro as pm
        >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
        >>> nodes = pyro.poutine.trace(pm.aggregate(shop, [sales])).get_trace().nodes
        >>> bool(nodes["sales"]["value"] == nodes["x1"]["value"] + nodes["x2"]["value"])
        True
    """
    handler = Aggregate(macros)
    return handler if fn is None else handler(fn)


@overload
def macro_do(fn: F, interventions: Mapping[MacroVariable, Realization]) -> F: ...


@overload
def macro_do(
    fn: None = None, interventions: Mapping[MacroVariable, Realization] = ...
) -> MacroDo: ...


def macro_do(fn: Any = None, interventions: Any = None) -> Any:
    """Intervenes on macro-variables, each with a stated micro-realization.

    Definitions 4 and 5 of *Meaningful Causal Aggregation and Paradoxical Confounding*:
    the micro sites are drawn jointly from the realization's distribution, cut off from
    their former parents, and what is downstream is computed from them. The program

        >>> def shop():
        ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        ...     pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))

    under ``macro_do(shop, {sales: R(33.0)})`` is equivalent to::

        def shop():
            sales = pyro.deterministic("sales", torch.tensor(33.0))
            x = pyro.sample("sales__micro", <the distribution of R>)
            x1 = pyro.deterministic("x1", x[0])
            x2 = pyro.deterministic("x2", x[1])
            pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))

    Works as a wrapper, a decorator and a context manager. As a context manager it does
    not see the program before it runs: micro sites that come before the last one of
    their macro-variable must not be used until that is drawn, and :class:`Natural` and
    :class:`Residual` need all random sites before them in ``given``. Wrap the model
    where that is too little.

    :param fn: a model. Without one, the handler itself is returned.
    :param interventions: a realization, which carries the macro value, for each
        macro-variable. Their micro sites must be disjoint.
    :raises UnknownSite: if the program lacks a micro site, or one named in ``given``.
    :raises NotAMicroState: if sites do not form a micro state.
    :raises UnsupportedLaw: if a realization needs a law that is not known exactly.
    :raises OffFibre: if a micro state has another macro value than was set.

        >>> import pyro, pyro.distributions as dist, pyro_macro as pm
        >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
        >>> natural = pm.macro_do(shop, {sales: pm.Natural(33.0)})
        >>> nodes = pyro.poutine.trace(natural).get_trace().nodes
        >>> nodes["sales"]["value"], nodes["sales__micro"]["fn"].mean
        (tensor(33.), tensor([12.4000, 20.6000]))
    """
    handler = MacroDo(interventions)
    return handler if fn is None else handler(fn)


class _Handler(Messenger):
    """What both handlers share: wrapping, and adding sites from inside a run."""

    def __call__(self, fn: Any) -> Any:
        if not callable(fn):
            raise PyroMacroError(
                f"{type(self).__name__}: {fn!r} is not callable. Expected a model; "
                "macro-variables go in by keyword: aggregate(macros=[...]), "
                "macro_do(interventions={...})."
            )
        if isinstance(fn, torch.nn.Module):
            return _WrappedModule(self, fn)

        @functools.wraps(fn)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            return self._run(fn, args, kwargs)

        return wrapped

    def _run(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        raise NotImplementedError

    def _emit(
        self,
        like: Message,
        name: str,
        fn: Any,
        frames: tuple[Any, ...],
        value: Tensor | None = None,
    ) -> Message:
        """A new site at the place of this handler.

        Handlers between the model and this one do not see it; their plates, scale and
        mask are those of the message ``like``.
        """
        msg = Message(
            type="sample",
            name=name,
            fn=fn,
            is_observed=value is not None,
            args=(),
            kwargs={},
            value=value,
            infer={} if value is None else {"_deterministic": True},
            scale=like["scale"],
            mask=like["mask"],
            cond_indep_stack=frames,
            done=False,
            stop=False,
            continuation=None,
        )
        inside = False

        def is_inside(messenger: Messenger) -> bool:
            nonlocal inside
            was, inside = inside, inside or messenger is self
            return was

        with block_messengers(is_inside):
            apply_stack(msg)
        return msg


class _WrappedModule(torch.nn.Module):
    """A module under a handler, with its parameters."""

    def __init__(self, handler: _Handler, model: torch.nn.Module) -> None:
        super().__init__()
        self.handler = handler
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler._run(self.model, args, kwargs)


def _deterministic(value: Tensor, event_dim: int) -> Any:
    return dist.Delta(value, event_dim=event_dim).mask(False)


class Aggregate(_Handler):
    """The handler behind :func:`aggregate`."""

    def __init__(self, macros: MacroVariable | Iterable[MacroVariable] = ()) -> None:
        super().__init__()
        single = isinstance(macros, MacroVariable)
        self.macros: tuple[MacroVariable, ...] = (macros,) if single else tuple(macros)  # type: ignore[assignment, arg-type]
        for macro in self.macros:
            if not isinstance(macro, MacroVariable):
                raise PyroMacroError(
                    f"aggregate: {macro!r} is no MacroVariable. Expected "
                    "aggregate(model, [MacroVariable(...), ...])."
                )
        _refuse_repeated("aggregate", self.macros)
        self._micro = {name for macro in self.macros for name in macro.micro}
        self._sites: dict[str, Site] = {}
        self._names: dict[int, str] = {}
        self._met: set[str] = set()

    def _run(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        with Aggregate(self.macros):
            return fn(*args, **kwargs)

    def __enter__(self) -> Aggregate:
        self._sites, self._names, self._met = {}, {}, set()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[0] is None:
            for macro in self.macros:
                for name in macro.micro:
                    if name not in self._sites:
                        raise UnknownSite.named(
                            f"macro-variable {macro.name!r}", name, self._met
                        )

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if site_is_subsample(msg):
            return
        self._met.add(name)
        if name not in self._micro:
            return
        if msg.get("_intervener_id") is not None:
            if name in self._names.values():
                return  # the copy that `poutine.do` outside leaves behind
            raise PyroMacroError(
                f"aggregate: micro site {name!r} is set by a `poutine.do` inside, so "
                "that the value which propagates cannot be seen. Turn the two round: "
                "poutine.do(aggregate(model, ...), data=...)."
            )
        self._names[id(msg)] = name
        self._sites[name] = Site.of(msg)

    def _pyro_post_sample(self, msg: Message) -> None:
        name = self._names.pop(id(msg), None)
        if name is None:
            return
        self._sites[name] = self._sites[name].with_value(msg)
        for macro in self.macros:
            if name in macro.micro and all(n in self._sites for n in macro.micro):
                self._add(macro, msg)

    def _add(self, macro: MacroVariable, msg: Message) -> None:
        what = f"macro-variable {macro.name!r}"
        layout = Layout([self._sites[n] for n in macro.micro], macro.over, what)
        state = layout.stack({n: self._sites[n].value for n in macro.micro})
        refuse_injective(what, macro, state)
        value = macro.aggregation(state)
        fn = _deterministic(value, macro.aggregation.event_dim)
        self._emit(msg, macro.name, fn, layout.frames, value)


class MacroDo(_Handler):
    """The handler behind :func:`macro_do`."""

    def __init__(
        self, interventions: Mapping[MacroVariable, Realization] | None
    ) -> None:
        super().__init__()
        self.interventions = _checked(interventions)
        self._targets: dict[str, _Target] = {}
        self._shared: dict[str, Shared] = {}
        self._expected: dict[int, tuple[str, Tensor]] = {}

    def _run(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        # A handler of its own for each run: runs may nest
        handler = MacroDo(self.interventions)
        ahead = _Ahead(self.interventions, (fn, args, kwargs))
        handler._targets = ahead.targets()
        handler._shared = ahead.shared
        with handler:
            return fn(*args, **kwargs)

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[0] is None:
            for name, target in self._targets.items():
                if name not in target.met:
                    raise UnknownSite(
                        f"{target.what}: micro site {name!r} was met when the program "
                        "was read, but not in the run itself. Expected a program "
                        "whose sites do not depend on chance."
                    )

    def _pyro_param(self, msg: Message) -> None:
        if msg["name"] in self._shared:
            replay(msg, self._shared[str(msg["name"])])

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if name in self._shared:
            replay(msg, self._shared[name])
            return
        target = self._targets.get(name)
        if target is None:
            return
        if msg.get("_intervener_id") is not None:
            outside = any(name == known for known, _ in self._expected.values())
            raise PyroMacroError(
                f"{target.what}: micro site {name!r} is also set by a `poutine.do` "
                f"{'outside' if outside else 'inside'}. Both cannot hold: drop one of "
                "the two interventions."
            )
        if target.values is None:
            self._realize(target, msg)
        assert target.values is not None
        target.met.add(name)
        value = target.values[name]
        msg["fn"] = _fixed(value, len(target.state.sites[name].event_shape))
        msg["value"] = value
        msg["is_observed"] = True
        msg["infer"] = {**(msg["infer"] or {}), "_deterministic": True}
        self._expected[id(msg)] = (name, value)

    def _pyro_post_sample(self, msg: Message) -> None:
        name, value = self._expected.pop(id(msg), ("", None))
        if value is not None:
            _refuse_changed(
                self._targets[name].what, f"micro site {name!r}", value, msg
            )

    def _realize(self, target: _Target, msg: Message) -> None:
        """Draws the micro state, at the place of its first site."""
        state, realized, macro = target.state, target.realized, target.state.macro
        _refuse_mask(target, msg)
        if isinstance(_base(realized.law), dist.Delta):
            draw = _base(realized.law).v
        else:
            draw = self._latent(target, msg)
        vector = realized.push(draw)
        target.values = values = realized.layout.unstack(vector)
        micro = state.layout.stack(values)
        event_dim = macro.aggregation.event_dim
        set_to = target.value
        value = state.total(micro) if set_to is None else set_to
        batch = value.shape[: value.dim() - event_dim]
        batch = torch.broadcast_shapes(batch, state.layout.batch_shape)
        value = value.expand(batch + value.shape[value.dim() - event_dim :])
        site = self._emit(
            msg,
            macro.name,
            _deterministic(value, event_dim),
            state.layout.frames,
            value,
        )
        _refuse_changed(target.what, f"the macro value {macro.name!r}", value, site)
        if set_to is not None:
            _refuse_unexplained(target.what, set_to, event_dim, site)
            if is_validation_enabled():
                _refuse_off_fibre(target.what, state, micro, set_to)

    def _latent(self, target: _Target, msg: Message) -> Tensor:
        name = f"{target.state.macro.name}__micro"
        law, layout = target.realized.law, target.realized.layout
        batch = torch.broadcast_shapes(law.batch_shape, layout.batch_shape)
        if batch != law.batch_shape:
            law = law.expand(batch)
        try:
            site = self._emit(msg, name, law, layout.frames)
        except ValueError as error:
            if "Shape mismatch inside plate" not in str(error):
                raise
            raise PyroMacroError(f"{target.what}: {error}. {_GRID}") from error
        return site["value"]  # type: ignore[return-value]


_GRID = (
    "A grid of macro values needs a plate of its own: run the intervened model inside "
    "`with pyro.plate('grid', n, dim=d):`, with d left of all plates of the model, and "
    "give the values the shape (n, 1, ..., 1) that puts them there."
)


class _Target:
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


class _Ahead:
    """Reads a program ahead of its real run, as far as its interventions need."""

    def __init__(
        self,
        interventions: Mapping[MacroVariable, Realization],
        model: tuple[Callable[..., Any], tuple, dict],
    ) -> None:
        self.interventions, self.model = interventions, model
        self.shared: dict[str, Shared] = {}
        self.micro = {n: macro for macro in interventions for n in macro.micro}

    def targets(self) -> dict[str, _Target]:
        """The target of each micro site."""
        natural = self._look()
        found: dict[str, _Target] = {}
        laws: list[tuple[MacroVariable, Realization, GaussianProgram]] = []
        for macro, realization in self.interventions.items():
            held, evidence, sites = self._given(macro, realization)
            program = GaussianProgram(
                self.model, macro.micro, [*macro.micro, *sites], self.shared, held
            )
            for name in macro.micro:
                self._refuse(macro, name, program.sites)
            own = natural if realization.acts_on_natural else program.sites
            sites_now = {name: own[name] for name in macro.micro}
            state = MicroState(macro, program, evidence, self.shared, sites_now)
            target = _Target(state, realization)
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
            value = torch.as_tensor(number).to(sites[0].value)
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

    def _refuse(self, macro: MacroVariable, name: str, sites: dict[str, Site]) -> None:
        what = f"macro-variable {macro.name!r}"
        if name not in sites:
            raise UnknownSite.named(what, name, sites)
        site = sites[name]
        if isinstance(_base(site.fn), _Fixed):
            raise PyroMacroError(
                f"{what}: micro site {name!r} is already set by a macro_do inside. Two "
                "interventions need disjoint micro sites: drop one, or state a single "
                "realization for both."
            )
        if site.observed:
            raise PyroMacroError(
                f"{what}: micro site {name!r} is observed, and cannot be both observed "
                "and set. Run the model without that observation "
                "(`poutine.uncondition`, or no `obs=`)."
            )


def _refuse_dependent(
    laws: list[tuple[MacroVariable, Realization, GaussianProgram]],
) -> None:
    """Two natural realizations in one handler are drawn apart: they must be apart."""
    for i, (macro, realization, program) in enumerate(laws):
        for other, other_realization, other_program in laws[:i]:
            if not isinstance(realization, Natural):
                continue
            if not isinstance(other_realization, Natural):
                continue
            if other in as_given(realization.given):
                continue
            if macro in as_given(other_realization.given):
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


def _checked(
    interventions: Mapping[MacroVariable, Realization] | None,
) -> dict[MacroVariable, Realization]:
    if not isinstance(interventions, Mapping) or not interventions:
        raise PyroMacroError(
            f"macro_do: interventions are {interventions!r}. Expected a dictionary "
            "from MacroVariable to realization, such as {sales: Natural(33.0)}."
        )
    for macro, realization in interventions.items():
        if not isinstance(macro, MacroVariable):
            raise PyroMacroError(
                f"macro_do: {macro!r} is no MacroVariable. To set a single site, use "
                "`pyro.poutine.do`."
            )
        if not isinstance(realization, Realization):
            raise PyroMacroError(
                f"macro_do: {macro.name!r} is set to {realization!r}. Expected a "
                "micro-realization: setting a total does not say what happens to its "
                "parts. Say Natural(value), Allocate(value, shares), "
                "Residual(value, absorb), Proportional(value), Shift(delta) or "
                "Explicit(value, fn)."
            )
    _refuse_repeated("macro_do", interventions)
    seen: dict[str, str] = {}
    for macro in interventions:
        for name in macro.micro:
            if name in seen:
                raise PyroMacroError(
                    f"macro_do: micro site {name!r} belongs to both {seen[name]!r} and "
                    f"{macro.name!r}. Expected disjoint micro sites."
                )
            seen[name] = macro.name
    return dict(interventions)


def _refuse_repeated(who: str, macros: Iterable[MacroVariable]) -> None:
    names = [macro.name for macro in macros]
    for name in names:
        if names.count(name) > 1:
            raise PyroMacroError(
                f"{who}: two macro-variables have the name {name!r}. Expected "
                "different names: they name sites of the trace."
            )


def _refuse_mask(target: _Target, msg: Message) -> None:
    mask = msg["mask"]
    if not isinstance(mask, Tensor):
        return
    kept = target.realized.layout.batch
    for dim in range(-mask.dim(), 0):
        if mask.shape[dim] > 1 and dim not in kept:
            raise PyroMacroError(
                f"{target.what}: a mask of shape {tuple(mask.shape)} inside covers "
                "some elements of the micro state and not others, which has no meaning "
                "for their total. Mask whole micro states, or outside of macro_do."
            )


def _refuse_changed(what: str, which: str, value: Tensor, msg: Message) -> None:
    found: Any = msg["value"]
    if detach_provenance(found) is not detach_provenance(value):
        raise PyroMacroError(
            f"{what}: {which} is set by macro_do, and a handler outside (condition, do "
            "or the like) gave it another value. Condition the latent site "
            "'<macro-variable>__micro' instead, or turn the two handlers round."
        )


def _refuse_unexplained(
    what: str, value: Tensor, event_dim: int, site: Message
) -> None:
    """Each dimension of a macro value has to be that of a plate."""
    batch = value.shape[: value.dim() - event_dim]
    plates = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    for dim in range(-len(batch), 0):
        if batch[dim] > 1 and plates.get(dim) != batch[dim]:
            found = f"the plates there are {plates}" if plates else "there is no plate"
            raise PyroMacroError(
                f"{what}: the value has shape {tuple(value.shape)}, and no plate of "
                f"size {batch[dim]} at dim {dim} ({found}). {_GRID}"
            )


def _refuse_off_fibre(
    what: str, state: MicroState, micro: Tensor, value: Tensor
) -> None:
    total = state.total(micro)
    rows = state.weights
    if rows is None:
        size = total.abs() + value.abs()
    else:
        size = micro.abs() @ rows.abs().mT
        size = (
            size if value.dim() and state.macro.aggregation.event_dim else size[..., 0]
        )
        size = size + value.abs()
    miss = (total - value).abs()
    if not bool((miss <= tolerance(micro) * size).all()):
        worst = miss.nan_to_num(nan=float("inf")).flatten().argmax()
        found = total.flatten()[worst].item()
        raise OffFibre(
            f"{what}: the micro state has macro value {found}. Expected "
            f"{value.expand(miss.shape).flatten()[worst].item()}, the value that was "
            "set, in every draw. Look at the distribution of the realization, or at "
            "what a handler outside does to the latent site."
        )


class _NoParameters(PyroMacroError, AttributeError):
    """So that ``hasattr`` answers, and whoever asks further is told why."""


class _Fixed(dist.Delta):
    """The distribution of a micro site that an intervention has set."""


class _MaskedFixed(MaskedDistribution):
    """The same, outside of the log density, as in ``pyro.deterministic``."""

    @property
    def loc(self) -> Tensor:
        raise _NoParameters(
            "a micro site that macro_do has set cannot be reparametrized: it is no "
            "longer random. Drop it from the configuration, or put reparam inside: "
            "macro_do(poutine.reparam(model, config), interventions)."
        )


def _fixed(value: Tensor, event_dim: int) -> Any:
    return _MaskedFixed(_Fixed(value, event_dim=event_dim), False)


def _base(fn: Any) -> Any:
    while isinstance(fn, (MaskedDistribution, torch.distributions.Independent)):
        fn = fn.base_dist
    return fn
