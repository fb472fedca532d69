# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Running a program without anyone noticing.

An inner run is a run of a model beside its real one. Handlers outside do not see
its sites, the random state is restored after each of its private draws, and buffers
of modules (running means and the like) get their old values back.

What is no random variable of the program (parameters, the indices of a subsampled
plate) is *shared*: it is executed once, visibly, and the real run takes the same
value.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import pyro
import torch
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message, apply_stack
from pyro.poutine.util import (
    is_validation_enabled,
    site_is_factor,
    site_is_subsample,
)
from torch.distributions import Transform
from torch.nn.modules.module import register_module_forward_pre_hook

from pyro_macro.errors import PyroMacroError
from pyro_macro.program.shapes import broadcast_shapes
from pyro_macro.program.tracking import NOISE, Tracker, kinks, site_names

OWN = "_of_pyro_macro"  # marks hooks of this library, which change nothing


@dataclass(frozen=True, eq=False)
class Site:
    """One sample site of a program, as a run met it.

    :ivar name: the site's name.
    :ivar fn: its distribution, expanded by the plates around it.
    :ivar value: the value that propagated.
    :ivar frames: the plates around it, outermost first, those of handlers outside
        of the run excluded.
    :ivar parents: the sites that its distribution (for a deterministic or observed
        site also its value) is computed from.
    :ivar kinks: the operations with kinks through which noise reached it, if the run
        was under noise.
    :ivar known: whether an observation tells of its parents: not where it is masked
        out or weighted.
    :ivar weight: the mask and the scale of its log density.
    :ivar event_shape: the shape of its value within the plates.
    :ivar observed: whether its value was given from outside, as by ``obs=``.
    :ivar deterministic: whether it is a function of its parents.
    """

    name: str
    fn: Any
    value: torch.Tensor
    frames: tuple[Any, ...]
    parents: frozenset[str]
    kinks: frozenset[str]
    known: bool
    weight: tuple[Any, Any]
    event_shape: torch.Size
    observed: bool
    deterministic: bool

    @classmethod
    def of(
        cls, msg: Message, sources: frozenset[str] = frozenset(), known: bool = True
    ) -> Site:
        """The site behind a message that is on its way out."""
        deterministic = is_deterministic(msg)
        return cls(
            name=str(msg["name"]),
            fn=msg["fn"],
            value=msg["value"],  # type: ignore[arg-type]
            frames=msg["cond_indep_stack"],
            parents=site_names(sources) - {str(msg["name"])},
            kinks=kinks(sources),
            known=known,
            weight=(msg["mask"], msg["scale"]),
            event_shape=torch.Size(getattr(msg["fn"], "event_shape", ())),
            observed=bool(msg["is_observed"]) and not deterministic,
            deterministic=deterministic,
        )

    def with_value(self, msg: Message) -> Site:
        """The same site, once the message has come back with a value."""
        value: Any = msg["value"]
        shape = self._event_shape(value, msg["cond_indep_stack"])
        return replace(self, value=value, event_shape=shape)

    def _event_shape(self, value: Any, frames: Iterable[Any]) -> torch.Size:
        shape = self.event_shape
        if self.deterministic and isinstance(value, torch.Tensor):
            # `pyro.deterministic` by default counts all dimensions of a value as event
            # dimensions, those of plates among them.
            depth = max((-(f.dim or 0) for f in frames), default=0)
            if len(shape) + depth > value.dim():
                shape = value.shape[min(depth, value.dim()) :]
        return shape

    @functools.cached_property
    def shape(self) -> torch.Size:
        """Of its value, of the size of the plates around it."""
        return self.expanded(self.value).shape

    def expanded(self, value: torch.Tensor) -> torch.Tensor:
        """A value of this site, of the size of the plates around it."""
        event = self._event_shape(value, self.frames)
        sizes = {f.dim: f.size for f in self.frames if f.vectorized}
        depth = max((-dim for dim in sizes), default=0)
        plates = tuple(sizes.get(dim, 1) for dim in range(-depth, 0))
        batch = value.shape[: value.dim() - len(event)]
        return value.expand(broadcast_shapes(batch, plates) + event)


@dataclass(frozen=True, eq=False)
class Shared:
    """A statement that was executed ahead of the real run, and its outcome.

    :ivar outside: sizes, by dimension, that its value has from outside of the model:
        from plates around it, as of posterior samples, or from enumeration.
    :ivar again: executes it once more, where that needs no program: of a plate that
        is not subsampled.
    """

    value: Any
    is_observed: bool = False
    outside: dict[int, int] = field(default_factory=dict)
    again: Callable[[], Shared] | None = None


class Halt(BaseException):
    """Unwinds an inner run that has seen enough; no model should catch it."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.run = run


def is_deterministic(msg: Message) -> bool:
    """Whether a message is a deterministic site, ``pyro.deterministic`` or ``Delta``.

    Reparametrized sites are such: Pyro turns them into an observed ``Delta``.
    """
    fn: Any = msg["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return type(fn).__name__ == "Delta" or isinstance(fn, pyro.distributions.Delta)


def unwrapped(fn: Any) -> Any:
    """A distribution without what masks it, expands it or groups its dimensions."""
    while isinstance(
        fn, (torch.distributions.Independent, MaskedDistribution, ExpandedDistribution)
    ):
        fn = fn.base_dist
    return fn


def refuse_grid(name: str, fn: Any) -> None:
    """An error if a site shares its noise with others, in a grid inside."""
    if getattr(fn, "shares_noise", False):
        raise PyroMacroError(
            f"site {name!r} is inside of a pm.grid that is inside of the model. A grid "
            "is for macro values, and goes outside: "
            "`with pm.grid(...): intervened_model()`."
        )


def refuse_fixed(msg: Message, who: str) -> None:
    """An error if ``poutine.do``, applied inside, has already fixed this site."""
    if msg.get("_intervener_id") is not None:
        raise PyroMacroError(
            f"{who}: the micro site {msg['name']!r} is already fixed by a "
            "`poutine.do` inside. Its value could not be realized again: drop one of "
            "the two interventions."
        )


@contextmanager
def preserved_params() -> Iterator[None]:
    """Parameters that are made inside are not left in the store."""
    store = pyro.get_param_store()
    known = set(store.keys())
    yield
    for name in set(store.keys()) - known:
        del store[name]


@contextmanager
def preserved_random_state() -> Iterator[None]:
    """Draws inside leave no trace in the random state of the CPU and of GPUs in use."""
    awake = torch.cuda.is_available() and torch.cuda.is_initialized()
    with torch.random.fork_rng(range(torch.cuda.device_count()) if awake else []):
        yield


def _pyro_modules(things: Any, seen: set[int]) -> Iterator[PyroModule]:
    """The modules that a model, or its arguments, are seen to hold."""
    for thing in things:
        if id(thing) in seen or isinstance(thing, torch.Tensor):
            continue
        seen.add(id(thing))
        if isinstance(thing, PyroModule):
            yield thing
        inside: list[Any] = []
        if isinstance(thing, (list, tuple)):
            inside.extend(thing)
        elif isinstance(thing, dict):
            inside.extend(thing.values())
        elif isinstance(thing, torch.nn.Module):
            inside.extend(thing.children())
        elif isinstance(thing, functools.partial):
            inside.extend([thing.func, *thing.args])
        else:
            inside.append(getattr(thing, "__self__", None))
            for cell in getattr(thing, "__closure__", None) or ():
                with suppress(ValueError):  # an empty cell
                    inside.append(cell.cell_contents)
        yield from _pyro_modules(inside, seen)


@contextmanager
def _fresh_caches(things: Any) -> Iterator[None]:
    """What is sampled inside stays out of the caches of modules that are running.

    A :class:`~pyro.nn.PyroModule` keeps the values of its random attributes while its
    call lasts, and would hand those of an inner run to the real one.
    """
    contexts = {
        id(module._pyro_context): module._pyro_context
        for module in _pyro_modules(things, set())
    }
    before = {key: context.cache for key, context in contexts.items()}
    for context in contexts.values():
        context.cache = {}
    try:
        yield
    finally:
        for key, context in contexts.items():
            context.cache = before[key]


@contextmanager
def preserved_buffers() -> Iterator[None]:
    """Gives the buffers of every module that is called inside their old values."""
    before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(module: torch.nn.Module, args: Any) -> None:
        for buffer in module.buffers(recurse=False):
            if id(buffer) not in before:
                before[id(buffer)] = (buffer, buffer.detach().clone())

    setattr(keep, OWN, True)
    handle = register_module_forward_pre_hook(keep)
    try:
        yield
    finally:
        handle.remove()
        with torch.no_grad():
            for buffer, old in before.values():
                buffer.copy_(old)


def shards_of(frame: Any) -> Any:
    """How a plate is split over processes; ``None`` if it is not."""
    return getattr(frame, "shards", None)


def is_known(msg: Message) -> bool:
    """Whether the log density of a site counts, once and for all of its elements."""
    fn: Any = msg["fn"]
    while hasattr(fn, "base_dist"):
        if isinstance(fn, MaskedDistribution) and fn._mask is not True:
            return False
        fn = fn.base_dist
    if msg["mask"] is not None and msg["mask"] is not True:
        return False
    weight = 1.0
    for frame in msg["cond_indep_stack"]:
        shards = shards_of(frame)
        subsampled = (frame.full_size or frame.size) / frame.size
        weight *= subsampled if shards is None else shards.ranks.count
    scale = msg["scale"]
    if isinstance(scale, torch.Tensor):
        return bool((scale == weight).all())
    return scale == weight


class InnerRun(Messenger):
    """One inner run. Subclasses decide what each site's value is.

    :param until: names of sites; the run stops when it has seen them all. Without
        names it goes to the end.
    :param shared: statements executed already, by name; those that this run executes
        are added.
    """

    def __init__(
        self,
        until: Collection[str] | None = None,
        shared: dict[str, Shared] | None = None,
    ) -> None:
        super().__init__()
        self.missing = None if until is None else set(until)
        self.shared = {} if shared is None else shared
        self.sites: dict[str, Site] = {}
        self.params: set[str] = set()
        self.factors: dict[str, frozenset[str]] = {}  # and what they are computed from
        self.tracker = Tracker()
        # What was known of a message on its way out, by the identity of the message:
        # handlers outside may rename it, split it or change its type.
        self._visible: dict[int, str] = {}
        self._sites: dict[int, Site] = {}
        self._noisy: dict[int, bool] = {}
        self._private: set[str] = set()
        self._plates: dict[int, Callable[[], Shared] | None] = {}

    @property
    def sets(self) -> Collection[str]:
        """The sites whose mechanisms are replaced, as by an intervention."""
        return ()

    def choose(self, msg: Message, site: Site) -> Any:
        """The value of a site, ``None`` to execute it visibly for the real run too."""
        raise NotImplementedError

    def is_noisy(self, site: Site, from_parents: bool) -> bool:
        """Whether a site's value carries noise that is varied in this run."""
        return False

    def run(self, model: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        """Runs ``model(*args, **kwargs)`` up to the last site that is asked for."""
        self._validate = is_validation_enabled()
        modules = _fresh_caches([model, args, kwargs])
        with preserved_buffers(), modules, pyro.validation_enabled(False), self:
            try:
                with self.tracker:
                    model(*args, **kwargs)
            except Halt as halt:
                if halt.run is not self:  # that of a run around this one
                    raise

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if site_is_subsample(msg):
            if name in self.shared:
                replay(msg, self.shared[name])
            else:
                self._plates[id(msg)] = _whole_plate(name, msg)
                self._show(msg, name)
            return
        if site_is_factor(msg):
            self.factors[name] = site_names(self.tracker.sources(msg["fn"]))
            msg["stop"] = True
            return
        refuse_grid(name, msg["fn"])
        if msg.get("_intervener_id") is not None and name in self._visible.values():
            return  # the copy that `poutine.do` outside leaves behind
        sources = self.tracker.sources(msg["fn"]) | self.tracker.escaped
        if is_deterministic(msg) or msg["is_observed"]:
            sources |= self.tracker.sources(msg["value"])
        site = Site.of(msg, sources, not msg["is_observed"] or is_known(msg))
        self._sites[id(msg)] = site
        self._noisy[id(msg)] = NOISE in sources
        value = self.choose(msg, site)
        if value is None:
            self._show(msg, name)
        else:
            self._private.add(name)
            msg["value"] = value
            msg["done"] = True
            msg["stop"] = True

    def _pyro_param(self, msg: Message) -> None:
        name = str(msg["name"])
        self.params.add(name)
        if name in self.shared:
            replay(msg, self.shared[name])
        else:
            self._show(msg, name)

    def _show(self, msg: Message, name: str) -> None:
        """Lets handlers outside see a statement, validating as they do."""
        self._visible[id(msg)] = name
        pyro.enable_validation(self._validate)
        infer: Any = msg.get("infer") or {}
        if "_markov_scope" in infer:  # of a `pyro.markov` inside: what it cannot see
            scope = infer["_markov_scope"]
            seen = {n: count for n, count in scope.items() if n not in self._private}
            infer["_markov_scope"] = type(scope)(seen)

    def _postprocess_message(self, msg: Message) -> None:
        name = self._visible.pop(id(msg), None)
        if name is not None:
            pyro.enable_validation(False)
        site = self._sites.pop(id(msg), None)
        if name is not None:
            observed = bool(msg.get("is_observed"))
            again, outside = self._plates.pop(id(msg), None), _outside(msg, site)
            self.shared[name] = Shared(msg["value"], observed, outside, again)
        if site is None:
            return
        self.sites[site.name] = site.with_value(msg)
        names = {site.name}
        if self.is_noisy(site, self._noisy.pop(id(msg))):
            names.add(NOISE)
        msg["value"] = self.tracker.mark(msg["value"], names)
        if self.missing is not None:
            self.missing.discard(site.name)
            if not self.missing:
                raise Halt(self)


class ValuedRun(InnerRun):
    """An inner run in which some sites have values, and observed ones their own.

    :param values: values by name of the site.
    """

    def __init__(
        self,
        until: Collection[str],
        shared: dict[str, Shared],
        values: Mapping[str, torch.Tensor],
    ) -> None:
        super().__init__(until, shared)
        self.values = values

    def choose(self, msg: Message, site: Site) -> Any:
        if site.name in self.values:
            return self.values[site.name]
        if site.deterministic:
            return unwrapped(site.fn).v if msg["value"] is None else msg["value"]
        return msg["value"] if site.observed else self.otherwise(site)

    def otherwise(self, site: Site) -> torch.Tensor:
        """The value of a random site that is not given one."""
        raise NotImplementedError


def _whole_plate(name: str, msg: Message) -> Callable[[], Shared] | None:
    """Executes the statement of a plate again, if it is not subsampled."""
    fn: Any = msg["fn"]
    if fn.subsample_size not in (None, fn.size) or msg["value"] is not None:
        return None

    def execute() -> Shared:
        plate = pyro.plate(name, fn.size, fn.subsample_size, device=fn.device)
        return Shared(plate._indices, again=execute)

    return execute


def _outside(msg: Message, site: Site | None) -> dict[int, int]:
    value = msg["value"]
    if msg["type"] == "param" or site_is_subsample(msg):
        return {}
    if site is None:  # a parameter that `poutine.lift` made random
        return {f.dim: f.size for f in msg["cond_indep_stack"] if f.dim is not None}
    if not isinstance(value, torch.Tensor):
        return {}
    batch = value.shape[: value.dim() - len(site.event_shape)]
    own = getattr(site.fn, "batch_shape", ())
    return {
        dim: batch[dim]
        for dim in range(-len(batch), 0)
        if batch[dim] > 1 and (-dim > len(own) or own[dim] == 1)
    }


def replay(msg: Message, shared: Shared) -> None:
    """Gives a statement the outcome it had, and hides it from handlers outside."""
    msg["value"] = shared.value
    msg["is_observed"] = shared.is_observed
    msg["done"] = True
    msg["stop"] = True


def same_parameters(one: Any, other: Any, seen: Collection[int] = ()) -> bool:
    """Whether two distributions, of one site in two runs, have the same parameters.

    :param seen: what was visited already.
    """
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, (torch.distributions.Distribution, Transform)):
        if id(one) in seen:
            return True
        seen, yours = {*seen, id(one)}, vars(other)
        for key, mine in vars(one).items():
            its = yours.get(key, mine)
            # Not what is made on demand: caches, a transform's link to its inverse
            if mine is its or key.startswith("_cached"):
                continue
            if isinstance(mine, weakref.ref) or isinstance(its, weakref.ref):
                continue
            if key == "_inv" and (mine is None or its is None):
                continue
            if not same_parameters(mine, its, seen):
                return False
        return True
    if isinstance(one, (list, tuple)):
        pairs = zip(one, other, strict=False)
        return len(one) == len(other) and all(
            same_parameters(a, b, seen) for a, b in pairs
        )
    return True


def as_program(sites: Iterable[Site]) -> Callable[[], None]:
    """The program that consists of some sites, as they were met."""

    def program() -> None:
        for site in sites:
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

    return program
