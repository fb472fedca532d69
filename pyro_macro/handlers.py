# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Effect handlers: macro values in the trace, and interventions on them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, ParamSpec, Protocol, TypeVar, overload

import pyro.distributions as dist
import torch
from pyro.ops.provenance import get_provenance, track_provenance
from pyro.poutine.indep_messenger import IndepMessenger
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.runtime import Message, apply_stack
from pyro.poutine.util import (
    is_validation_enabled,
    site_is_factor,
    site_is_subsample,
)
from torch import Tensor

from pyro_macro.checks import (
    GRID,
    checked,
    refuse_changed,
    refuse_mask,
    refuse_moved,
    refuse_off_fibre,
    refuse_off_support,
    refuse_overwritten,
    refuse_repeated,
    refuse_unexplained,
)
from pyro_macro.errors import PyroMacroError, UnknownSite
from pyro_macro.intervention import Ahead, Target, fixed, point
from pyro_macro.laws.base import MicroLaw
from pyro_macro.macro import MacroVariable
from pyro_macro.on_the_fly import OnTheFly, Pending
from pyro_macro.program.inner import (
    Shared,
    Site,
    is_deterministic,
    preserved_params,
    preserved_random_state,
    replay,
    shards_of,
    unwrapped,
)
from pyro_macro.program.layout import Layout
from pyro_macro.program.shapes import broadcast_shapes
from pyro_macro.program.substitution import detached
from pyro_macro.program.tracking import tensors_in
from pyro_macro.realizations import MicroState, Realization
from pyro_macro.realizations.base import (
    common,
    refuse_injective,
    refuse_subsampled,
)
from pyro_macro.remembered import Remembered
from pyro_macro.reports import Descriptions
from pyro_macro.sharding.across import fitted
from pyro_macro.sharding.draws import by_shards
from pyro_macro.units import units

F = TypeVar("F", bound=Callable[..., Any])
P = ParamSpec("P")
R = TypeVar("R", covariant=True)


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


class Intervened(Protocol[P, R]):
    """A model under :func:`macro_do`: the same, and what describes it."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def describe(self, *args: P.args, **kwargs: P.kwargs) -> Descriptions: ...


@overload
def macro_do(
    fn: torch.nn.Module, interventions: Mapping[MacroVariable, Realization]
) -> Any: ...


@overload
def macro_do(
    fn: Callable[P, R], interventions: Mapping[MacroVariable, Realization]
) -> Intervened[P, R]: ...


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
    :class:`Residual` need all random sites before them in ``given``. Sites that were
    drawn before the context, or are hidden by ``poutine.block``, count as constants, as
    what a wrapped model closes over does. Wrap the model where that is too little, and
    for inference, whose guides read the model behind the handler's back.

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
    """What both handlers share: wrapping, and adding sites from inside a run.

    :ivar wrapped: whether this is a run of a wrapped model, or a context.
    """

    wrapped = False

    def __init__(self) -> None:
        super().__init__()
        # Micro sites of this run that handlers inside may still have changed, each with
        # the value that it had here
        self._passed: list[tuple[str, Tensor, Message]] = []

    def _settle(self) -> None:
        """At the end of a run: micro sites went on with the values they had here."""
        passed, self._passed = self._passed, []
        for what, value, msg in passed:
            refuse_overwritten(what, value, msg, type(self) is Aggregate)

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

        self._equip(wrapped, fn)
        return wrapped

    def _equip(self, wrapped: Any, fn: Callable[..., Any]) -> None:
        """What a wrapped model offers besides being called."""

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
        """A new site, of the plates ``frames`` inside and all plates outside.

        Around a wrapped model, the site stands at the place of this handler: handlers
        of the model itself do not see it, and their scale and mask are those of the
        message ``like``. In a context, handlers entered later are the user's, such as
        ``trace``, and do see it.
        """
        infer: Any = like["infer"] or {}
        # Which enumerated sites a dimension may stand for, inside of `pyro.markov`
        scope: Any = {
            k: infer[k] for k in ("_markov_depth", "_markov_scope") if k in infer
        }
        if value is not None:
            scope["_deterministic"] = True
        msg = Message(
            type="sample",
            name=name,
            fn=fn,
            is_observed=value is not None,
            args=(),
            kwargs={},
            value=value,
            infer=scope,
            scale=_scale(like, frames),
            mask=like["mask"],
            cond_indep_stack=frames,
            done=False,
            stop=False,
            continuation=None,
        )
        inside, kept = False, {frame.name for frame in frames}

        def is_hidden(messenger: Messenger) -> bool:
            nonlocal inside
            was, inside = inside, inside or messenger is self
            if self.wrapped:
                return was
            return (
                was
                and isinstance(messenger, IndepMessenger)
                and (messenger.name not in kept)
            )

        if not self.wrapped:
            msg["scale"], msg["mask"], msg["cond_indep_stack"] = 1.0, None, ()
        with block_messengers(is_hidden):
            apply_stack(msg)
        return msg


class _WrappedModule(torch.nn.Module):
    """A module under a handler, with its parameters."""

    def __init__(self, handler: _Handler, model: torch.nn.Module) -> None:
        super().__init__()
        self.handler = handler
        self.model = model
        handler._equip(self, model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler._run(self.model, args, kwargs)


def _as_drawn(value: Tensor, state: MicroState, name: str) -> Tensor:
    """A micro value in the dtype of its site: whole numbers index tables."""
    dtype = state.sites[name].value.dtype
    return value if dtype.is_floating_point else value.to(dtype)


def _scale(like: Message, frames: tuple[Any, ...]) -> Any:
    """The scale of a site in the plates ``frames`` only, from that of a micro site.

    A sharded plate scales by the number of ranks what each has a part of; a macro value
    and the density of a micro state are the same on all of them.
    """
    scale, kept = like["scale"], {frame.name for frame in frames}
    for frame in like["cond_indep_stack"]:
        if frame.name not in kept and shards_of(frame) is not None:
            scale = scale / frame.shards.ranks.count  # type: ignore[attr-defined]
    return scale


def _deterministic(value: Tensor, event_dim: int) -> Any:
    return point(value, event_dim).mask(False)


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
        refuse_repeated("aggregate", self.macros)
        self._micro = {name for macro in self.macros for name in macro.micro}
        self._sites: dict[str, Site] = {}
        self._names: dict[int, str] = {}
        self._met: set[str] = set()

    def depends_on(self) -> Any:
        """What a model under this handler depends on, besides the model."""
        return self.macros

    def _run(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        handler = Aggregate(self.macros)  # of its own for each run: runs may nest
        handler.wrapped = True
        with handler:
            return fn(*args, **kwargs)

    def __enter__(self) -> Aggregate:
        self._sites, self._names, self._met = {}, {}, set()
        self._passed = []
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[0] is None:
            self._settle()
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
        if name in self._met and msg.get("_intervener_id") is None:
            self._settle()
            self._sites, self._met = {}, set()  # another run has begun
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
        site = self._sites[name] = self._sites[name].with_value(msg)
        self._passed.append((f"aggregate: micro site {name!r}", site.value, msg))
        for macro in self.macros:
            if name in macro.micro and all(n in self._sites for n in macro.micro):
                self._add(macro, msg)

    def _add(self, macro: MacroVariable, msg: Message) -> None:
        what = f"macro-variable {macro.name!r}"
        micro = [self._sites[n] for n in macro.micro]
        refuse_subsampled(what, macro, micro)
        layout = Layout(micro, macro.over, what)
        values = {n: self._sites[n].value for n in macro.micro}
        state = layout.stack(values).to(common(list(values.values())))
        aggregation = fitted(macro.aggregation, layout, what)
        refuse_injective(what, aggregation, state, layout)
        value = aggregation(state)
        fn = _deterministic(value, aggregation.event_dim)
        site = self._emit(msg, macro.name, fn, layout.frames, value)
        refuse_changed(
            what, f"the macro value {macro.name!r}", value, site, "aggregate"
        )


class _Setting(_Handler):
    """Replaces micro sites by what their realization makes of them."""

    def __init__(self) -> None:
        super().__init__()
        self._targets: dict[str, Target] = {}
        # The value of each micro site on its way out, by the identity of its message
        self._expected: dict[int, tuple[str, Tensor]] = {}

    @property
    def sets(self) -> Collection[str]:
        """The sites whose mechanisms are replaced: the micro sites."""
        return self._targets.keys()

    def _refuse_do(self, macro: MacroVariable, name: str, msg: Message) -> None:
        if msg.get("_intervener_id") is not None:
            outside = any(name == known for known, _ in self._expected.values())
            raise PyroMacroError(
                f"macro-variable {macro.name!r}: micro site {name!r} is also set by a "
                f"`poutine.do` {'outside' if outside else 'inside'}. Both cannot hold: "
                "drop one of the two interventions."
            )

    def _set(self, target: Target, name: str, msg: Message) -> None:
        """Makes a micro site deterministic, drawing the micro state if need be."""
        drawn: dict[str, Tensor] = {}
        for other in target.group if target.values is None else ():
            other.follow(drawn)
            other.values = self._realize(other, msg)
            drawn |= other.values
        assert target.values is not None
        value = target.values[name]
        target.met.add(name)
        msg["fn"] = fixed(value, len(target.state.sites[name].event_shape))
        msg["value"] = value
        msg["is_observed"] = True
        msg["infer"] = {**(msg["infer"] or {}), "_deterministic": True}
        self._expected[id(msg)] = (name, value)

    def _pyro_post_sample(self, msg: Message) -> None:
        name, value = self._expected.pop(id(msg), ("", None))
        if isinstance(value, Pending):
            value.tracked = msg["value"] is not value
        if value is not None:
            what = f"macro-variable {self._macro_of(name).name!r}"
            refuse_changed(what, f"micro site {name!r}", value, msg)
            self._passed.append((f"{what}: micro site {name!r}", value, msg))

    def _macro_of(self, name: str) -> MacroVariable:
        return self._targets[name].state.macro

    def _realize(self, target: Target, msg: Message) -> dict[str, Tensor]:
        """Adds the latent site and the macro value; the values of the micro sites."""
        state, realized = target.state, target.realized
        refuse_mask(target, msg)
        # What renders programs finds the edge from the macro value to the micro state
        causes: frozenset[Any] = frozenset()
        for macro, value in target.macro_values():
            causes |= get_provenance(self._macro_value(target, macro, msg, value))
        if isinstance(unwrapped(realized.law), dist.Delta):
            # A copy, for the trace holds it, and may be written to
            draw = track_provenance(unwrapped(realized.law).v.clone(), causes)
        else:
            draw = self._latent(target, msg, causes)
        micro = realized.push(draw)
        values = realized.layout.unstack(micro)
        if realized.layout.over != state.layout.over:  # plates in the law's vector
            micro = state.layout.stack(values)
        if target.value is None:
            self._macro_value(target, state.macro, msg, state.total(micro))
        if is_validation_enabled():
            refuse_off_support(target, values)
            if target.value is not None and not realized.met(draw):
                refuse_off_fibre(target.what, state, micro, target.value)
        return {name: _as_drawn(value, state, name) for name, value in values.items()}

    def _macro_value(
        self, target: Target, macro: MacroVariable, msg: Message, value: Tensor
    ) -> Tensor:
        state = target.state
        event_dim = macro.aggregation.event_dim
        split = value.dim() - event_dim
        batch = broadcast_shapes(value.shape[:split], state.layout.batch_shape)
        whole = value.expand(batch + value.shape[split:])
        fn = _deterministic(whole, event_dim)
        site = self._emit(msg, macro.name, fn, state.layout.frames, whole)
        refuse_changed(target.what, f"the macro value {macro.name!r}", whole, site)
        refuse_unexplained(target.what, value, event_dim, site)
        return site["value"]  # type: ignore[return-value]

    def _latent(self, target: Target, msg: Message, causes: frozenset[Any]) -> Tensor:
        name = f"{target.state.macro.name}__micro"
        law, layout = target.realized.law, target.realized.layout
        batch = broadcast_shapes(law.batch_shape, layout.batch_shape)
        if batch != law.batch_shape:
            law = law.expand(batch)
        for frame in layout.frames:
            if shards_of(frame) is not None:
                law = by_shards(law, frame.shards, frame.dim, name)
        if causes and isinstance(law, MicroLaw):
            law = law.caused_by(causes)
        try:
            site = self._emit(msg, name, law, layout.frames)
        except ValueError as error:
            if "Shape mismatch inside plate" not in str(error):
                raise
            raise PyroMacroError(f"{target.what}: {error}. {GRID}") from error
        draw: Tensor = site["value"]  # type: ignore[assignment]
        if causes and not isinstance(law, MicroLaw):
            draw = track_provenance(draw, causes)
        return draw


class _Prepared(_Setting):
    """One run of a wrapped model, which was read ahead."""

    wrapped = True

    def __init__(self, targets: dict[str, Target], shared: dict[str, Shared]) -> None:
        super().__init__()
        self._targets, self._shared = targets, shared

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._expected = {}
        for target in self._targets.values():
            target.values = None  # draws are large, and targets refer to each other
        if exc[0] is not None:
            return
        self._settle()
        for name, target in self._targets.items():
            if name not in target.met:
                raise UnknownSite(
                    f"{target.what}: micro site {name!r} was met when the program was "
                    "read, but not in the run itself. Expected a program whose sites "
                    "do not depend on chance."
                )

    def _pyro_param(self, msg: Message) -> None:
        if msg["name"] in self._shared:
            replay(msg, self._shared[str(msg["name"])])

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if name in self._shared:
            replay(msg, self._shared[name])
        elif name in self._targets:
            target = self._targets[name]
            self._refuse_do(target.state.macro, name, msg)
            if is_validation_enabled():
                refuse_moved(target, name, msg)
            self._set(target, name, msg)


class MacroDo(_Setting):
    """The handler behind :func:`macro_do`.

    As a context manager it takes the program as it comes; wrapped models are read
    ahead by :class:`_Prepared`.
    """

    def __init__(
        self, interventions: Mapping[MacroVariable, Realization] | None
    ) -> None:
        super().__init__()
        self.interventions = checked(interventions)
        self._units = units(self.interventions)
        self._remembered = Remembered()
        self._begin()

    def depends_on(self) -> Any:
        """What a model under this handler depends on, besides the model."""
        return self.interventions

    def _begin(self) -> None:
        self._targets, self._expected = {}, {}
        self._collected: dict[str, OnTheFly] = {}
        for unit in self._units:
            collector = OnTheFly(unit)
            self._collected |= dict.fromkeys(unit.macro.micro, collector)
        self._known: dict[str, Tensor] = {}  # the sites so far, by name
        self._latent_sites: set[str] = set()  # those among them that are random
        self._passing: dict[int, tuple[str, bool]] = {}
        self._shared: dict[str, Shared] = {}  # parameters and subsamples
        self._met: set[str] = set()
        self._own = {macro.name for macro in self.interventions}
        self._own |= {f"{name}__micro" for name in self._own}

    @property
    def sets(self) -> Collection[str]:
        return self._collected.keys()

    def _macro_of(self, name: str) -> MacroVariable:
        return self._collected[name].macro

    def _equip(self, wrapped: Any, fn: Callable[..., Any]) -> None:
        def describe(*args: Any, **kwargs: Any) -> Descriptions:
            return self._describe(fn, args, kwargs)

        describe.__doc__ = MacroDo._describe.__doc__
        wrapped.describe = describe

    def _describe(
        self, fn: Callable[..., Any], args: tuple, kwargs: dict
    ) -> Descriptions:
        """How each intervention is realized in this model, with these arguments.

        The model is run once, unseen. Where a law is sampled its chains are run, which
        the next run then finds.

        >>> import pyro, pyro.distributions as dist, pyro_macro as pm
        >>> def shop():
        ...     x1 = pyro.sample("x1", dist.Poisson(2.0))
        ...     x2 = pyro.sample("x2", dist.Poisson(3.0))
        >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
        >>> pm.macro_do(shop, {sales: pm.Natural(4.0)}).describe()
              macro  sales
        realization  Natural
                law  Multinomial
              exact  True
             method  exact: Poisson given the sum is multinomial
           elements  2
               free  0
               cost  2 random numbers a draw
        """
        with detached(), preserved_params(), preserved_random_state():
            ahead = Ahead(self.interventions, (fn, args, kwargs))
            prepared = _Prepared(ahead.targets(), ahead.shared)
            with prepared:
                fn(*args, **kwargs)
        targets = dict.fromkeys(prepared._targets.values())
        return Descriptions([target.described() for target in targets])

    def _run(self, fn: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
        found = self._remembered.targets(self.interventions, (fn, args, kwargs))
        with _Prepared(*found):
            return fn(*args, **kwargs)

    def __enter__(self) -> MacroDo:
        self._begin()
        self._passed = []
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        if exc[0] is not None:
            return
        self._settle()
        for name, collector in self._collected.items():
            if name not in collector.sites:
                what = f"macro-variable {collector.macro.name!r}"
                met = {*self._known, *collector.sites}
                raise UnknownSite.named(what, name, met)

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if name in self._own:
            self._passing[id(msg)] = (name, name.endswith("__micro"))
            return
        if name in self._met and msg.get("_intervener_id") is None:
            self._settle()
            self._begin()  # a site for the second time: another run has begun
        if not site_is_subsample(msg):
            self._met.add(name)
        collector = self._collected.get(name)
        if collector is None:
            # Random unless it is fixed inside: a condition outside does not tell
            fixed_inside = msg["is_observed"] or is_deterministic(msg)
            self._passing[id(msg)] = (name, not fixed_inside)
            return
        self._refuse_do(collector.macro, name, msg)
        what = f"macro-variable {collector.macro.name!r}"
        if not collector.meet(Site.of(msg)):
            law: Any = msg["fn"]
            like = common(tensors_in(law) or [torch.empty(())])
            shape = law.batch_shape + law.event_shape
            unknown = like.new_full(shape, float("nan"))
            msg["fn"] = fixed(unknown, len(law.event_shape))
            msg["value"] = pending = Pending.of(name, what, msg["fn"])
            msg["is_observed"] = True
            msg["infer"] = {**(msg["infer"] or {}), "_deterministic": True}
            collector.pending[name] = pending
            self._expected[id(msg)] = (name, pending)
            return
        target = collector.target(self._known, self._latent_sites, self._shared)
        self._targets |= {name: target for name in collector.macro.micro}
        self._set(target, name, msg)
        assert target.values is not None
        collector.fill(target.values)

    def _pyro_post_sample(self, msg: Message) -> None:
        super()._pyro_post_sample(msg)
        name, random = self._passing.pop(id(msg), (None, False))
        if name is None or site_is_factor(msg):
            return
        if site_is_subsample(msg):
            self._shared[name] = Shared(msg["value"])
            return
        self._known[name] = msg["value"]  # type: ignore[assignment]
        if random and not is_deterministic(msg):  # as after a macro_do outside
            self._latent_sites.add(name)

    def _pyro_param(self, msg: Message) -> None:
        # On its way out: `poutine.lift` outside makes it a random site
        self._shared[str(msg["name"])] = Shared(None)
