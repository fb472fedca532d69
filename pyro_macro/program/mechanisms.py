# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The mechanism view: each site's distribution as a function of its parents' values.

A program is run twice, with all operations noted (:mod:`pyro_macro.program.tape`):
each site's value is a leaf, so that what a site is computed from ends at its parents.
The second run checks, at other values, that the functions of the first are the
program's.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx
import pyro
import torch
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_macro.program.inner import (
    InnerRun,
    Site,
    is_known,
    preserved_params,
    preserved_random_state,
    unwrapped,
)
from pyro_macro.program.parts import Parts, parts
from pyro_macro.program.side_by_side import side_by_side
from pyro_macro.program.tape import (
    ARGUMENT,
    INDICES,
    INPUT,
    PARAM,
    Expression,
    Leaf,
    Node,
    Tape,
)

_CHANGED = (
    "in a second run it was not the function of its parents it was before: hidden "
    "randomness, or operations that cannot be followed"
)


@dataclass(frozen=True, eq=False)
class Mechanism:
    """How one site comes about.

    :ivar site: the site, as a run met it.
    :ivar expression: the tensors of its distribution, its value if it is deterministic,
        as a function of its parents.
    :ivar rest: its value if it is observed, and its mask and scale where these are
        tensors.
    :ivar parts: how its distribution is made of the tensors; ``None`` for one that is
        deterministic.
    :ivar infer: what the program says to inference about it.
    :ivar counts: whether its log density counts, once.
    :ivar trouble: why it cannot be evaluated apart from the program, if it cannot.
    """

    site: Site
    expression: Expression
    rest: Expression
    parts: Parts | None
    infer: dict[str, Any]
    counts: bool
    trouble: str | None = None

    @property
    def name(self) -> str:
        return self.site.name

    @property
    def parents(self) -> list[str]:
        found = (*self.expression.parents, *self.rest.parents)
        return list(dict.fromkeys(found))


@dataclass(frozen=True, eq=False)
class Mechanisms:
    """What a program consists of.

    :ivar of: the mechanisms by name of the site, in program order; factors among them.
    :ivar factors: the names of factors.
    :ivar params: statements of parameters by name: what they were asked with.
    :ivar trained: what the parameter store had for them: what modules hold themselves
        is put there by these, and not by the statements.
    :ivar subsampled: plates that draw indices, by name: size and number drawn.
    :ivar values: the value of each leaf in the run.
    :ivar output: what the model returned, ``None`` if it holds no tensors, and its
        leaves as an expression.
    :ivar by_value: whether it is another program for arguments of other values: it
        turns them into Python numbers, or branches on them.
    :ivar trouble: why the whole cannot be evaluated apart, if it cannot.
    """

    of: dict[str, Mechanism]
    factors: frozenset[str]
    params: dict[str, Message]
    trained: dict[str, tuple[Any, Any]]
    subsampled: dict[str, tuple[int, int, int | None]]
    values: dict[Leaf, Tensor]
    output: tuple[Any, Expression] | None
    by_value: bool
    trouble: str | None

    def graph(self) -> nx.DiGraph:
        """An edge from each parent to its child."""
        graph = nx.DiGraph()
        graph.add_nodes_from(self.of)
        for name, mechanism in self.of.items():
            graph.add_edges_from((parent, name) for parent in mechanism.parents)
        return graph


@dataclass
class _Noted:
    tensors: list[Tensor]
    weights: list[Tensor]
    outputs: list[Node | Tensor]
    rest: list[Node | Tensor]
    parts: Parts | None
    infer: dict[str, Any]
    counts: bool


class _MechanismRun(InnerRun):
    takes_apart = True

    def __init__(
        self, seed: int, noting: bool, other: Mapping[Leaf, Tensor] | None = None
    ) -> None:
        super().__init__()
        self.other = other or {}  # what sites of few values must not have again
        self.tracker: Tape = Tape(noting)
        self.seed = seed
        self.noted: dict[str, _Noted] = {}
        self.made: dict[str, Site] = {}
        self.values: dict[Leaf, Tensor] = {}
        self.statements: dict[str, Message] = {}
        self.subsampled: dict[str, tuple[int, int, int | None]] = {}
        self.escaped_before: dict[str, bool] = {}
        self.trained: dict[str, tuple[Any, Any]] = {}
        self.held: set[str] = set()
        self.output: Any = None

    def go(self, model: Callable[..., Any], args: tuple, kwargs: dict) -> None:
        def noted(*args: Any, **kwargs: Any) -> None:
            self.output = model(*args, **kwargs)

        marked = {}
        for leaf, value in arguments(args, kwargs):
            marked[leaf] = self.tracker.leaf(value, leaf)
            self.values[leaf] = value
        args, kwargs = put_back(args, kwargs, marked)
        with preserved_random_state():
            torch.manual_seed(self.seed)
            self.run(noted, args, kwargs)

    def choose(self, msg: Message, site: Site) -> Any:
        given = msg["value"]
        if given is None and site.deterministic:
            given = unwrapped(site.fn).v
        made = None if site.deterministic else parts(site.fn)
        tensors = [] if made is None else list(made.tensors)
        rest: list[Tensor] = []
        value = given
        if not site.deterministic and (given is None or isinstance(given, Tensor)):
            # Data may have dimensions of plates outside, which are none of the program
            with torch.no_grad():
                value = site.fn.sample()
            if isinstance(self.other.get(("site", site.name)), Tensor):
                value = _another(site, value, self.other["site", site.name])
        if site.deterministic and isinstance(given, Tensor):
            tensors = [given]
        elif given is not None and not site.observed:
            self.held.add(site.name)
        elif isinstance(given, Tensor):
            rest = [given]
        self._note(msg, site.name, tensors, rest, made)
        return value

    def _note(
        self,
        msg: Message,
        name: str,
        tensors: list[Tensor],
        rest: list[Tensor],
        made: Parts | None,
    ) -> None:
        infer = {k: v for k, v in (msg["infer"] or {}).items() if k[:1] != "_"}
        weights = (msg["mask"], msg["scale"])
        rest = [*rest, *(t for t in weights if isinstance(t, Tensor))]
        self.noted[name] = _Noted(
            tensors,
            rest,
            [self.tracker.node(tensor) for tensor in tensors],
            [self.tracker.node(tensor) for tensor in rest],
            made,
            infer,
            is_known(msg),
        )
        self.escaped_before[name] = bool(self.tracker.escaped - {INPUT})

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if site_is_factor(msg) and not site_is_subsample(msg):
            made = parts(msg["fn"])
            tensors = [] if made is None else made.tensors
            value: Any = msg["value"]
            self._note(msg, name, tensors, [value], made)
            self.made[name] = Site.of(msg)
        super()._pyro_sample(msg)

    def _pyro_param(self, msg: Message) -> None:
        self.statements.setdefault(str(msg["name"]), msg.copy())
        super()._pyro_param(msg)

    def _postprocess_message(self, msg: Message) -> None:
        name = str(msg["name"])
        super()._postprocess_message(msg)
        leaf: Leaf
        if msg["type"] == "param":
            leaf = (PARAM, name)
            store = pyro.get_param_store()
            if name in store:
                self.trained[name] = store._params[name], store._constraints[name]
        elif msg["type"] == "sample" and site_is_subsample(msg):
            fn: Any = msg["fn"]
            if fn.subsample_size is None or fn.subsample_size >= fn.size:
                return
            self.subsampled[name] = (fn.size, fn.subsample_size, None)
            leaf = (INDICES, name)
        elif name in self.sites and name not in self.made:
            self.made[name] = self.sites[name]
            self.values[("site", name)] = self.sites[name].value
            return
        else:
            return
        self.values[leaf] = msg["value"]  # type: ignore[assignment]
        msg["value"] = self.tracker.leaf(msg["value"], leaf)


def arguments(
    args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[Leaf, Tensor]]:
    """The tensors among the arguments of a model, and where they are."""

    def inside(thing: Any, path: tuple[Any, ...]) -> Iterator[tuple[Leaf, Tensor]]:
        if isinstance(thing, Tensor):
            yield (ARGUMENT, path), thing
        elif isinstance(thing, (tuple, list)):
            for i, part in enumerate(thing):
                yield from inside(part, (*path, i))
        elif isinstance(thing, dict):
            for key, part in thing.items():
                yield from inside(part, (*path, key))

    yield from inside(args, (0,))
    yield from inside(dict(kwargs), (1,))


def put_back(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], tensors: Mapping[Leaf, Tensor]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments with other tensors."""

    def inside(thing: Any, path: tuple[Any, ...]) -> Any:
        if isinstance(thing, Tensor):
            return tensors[ARGUMENT, path]
        if isinstance(thing, (tuple, list)):
            made = [inside(part, (*path, i)) for i, part in enumerate(thing)]
            if isinstance(thing, list):
                return made
            return type(thing)(*made) if hasattr(thing, "_fields") else tuple(made)
        if isinstance(thing, dict):
            return {key: inside(part, (*path, key)) for key, part in thing.items()}
        return thing

    return inside(args, (0,)), inside(dict(kwargs), (1,))


def read_mechanisms(
    model: Callable[..., Any],
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> Mechanisms:
    """Reads a program as a structural causal model: its mechanisms, one by one.

    The parameter store, the random state and the buffers of modules are left as they
    were. A mechanism that cannot be evaluated apart from its program is in trouble,
    and says so: computed after a branch on values, with random numbers of its own,
    with operations on parts of tensors in place, or a distribution of unknown parts.

    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     y = pyro.sample("y", dist.Normal(2 * z, 1.0))
    >>> y = read_mechanisms(model).of["y"]
    >>> y.parents, y.expression({("site", "z"): torch.tensor(10.0)})
    (['z'], [tensor(20.), tensor(1.)])
    """
    model_kwargs = model_kwargs or {}
    runs: list[_MechanismRun] = []
    before = _python_states()
    for seed, noting in ((1, True), (2, False)):
        run = _MechanismRun(seed, noting, runs[0].values if runs else None)
        with pyro.poutine.block(), preserved_params():
            run.go(model, model_args, model_kwargs)
        runs.append(run)
    first, second = runs
    of: dict[str, Mechanism] = {}
    for name, noted in first.noted.items():
        expression, rest = Expression(noted.outputs), Expression(noted.rest)
        site = first.made[name]
        trouble = expression.trouble or rest.trouble
        if noted.parts is None and not site.deterministic:
            trouble = f"a {type(unwrapped(site.fn)).__name__}, of unknown parts"
        elif name in first.held:
            trouble = "a handler inside holds it at a value, as poutine.replay does"
        elif not isinstance(site.value, Tensor):
            trouble = f"its value is no tensor, but {type(site.value).__name__}"
        elif first.escaped_before[name]:
            trouble = (
                "before it the program turns a tensor into a Python number or truth "
                "value, or branches on it"
            )
        of[name] = Mechanism(
            site, expression, rest, noted.parts, noted.infer, noted.counts, trouble
        )
    trouble = None
    if _python_states() != before:
        trouble = (
            "it draws random numbers of Python or NumPy, which are no sample sites"
        )
    elif list(first.noted) != list(second.noted):
        trouble = "its sites are not the same in each run"
    else:
        for name in _changed(of, second):
            of[name] = replace(of[name], trouble=_CHANGED)
    output = None
    tensors = [t for _, t in arguments((first.output,), {})]
    if tensors:
        nodes = [first.tracker.node(tensor) for tensor in tensors]
        output = (first.output, Expression(nodes))
    return Mechanisms(
        of,
        frozenset(first.factors),
        first.statements,
        first.trained,
        first.subsampled,
        first.values,
        output,
        INPUT in first.tracker.escaped,
        trouble,
    )


def _another(site: Site, value: Tensor, first: Tensor) -> Tensor:
    """Of a finite site a value that it did not have: what depends on it shows."""
    base = unwrapped(site.fn)
    if not base.has_enumerate_support or base.event_shape or value.shape != first.shape:
        return value
    try:
        support = base.enumerate_support(expand=False).flatten()
    except NotImplementedError:  # inhomogeneous counts
        return value
    if len(support) < 2:
        return value
    index = (first.unsqueeze(-1) == support).to(torch.uint8).argmax(-1)
    return support[(index + 1) % len(support)].to(value.dtype)


def _python_states() -> tuple[Any, ...]:
    """The random states of Python and NumPy."""
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return (random.getstate(),)
    kind, keys, *rest = numpy.random.get_state()
    return (random.getstate(), kind, keys.tobytes(), *rest)


def _changed(of: Mapping[str, Mechanism], second: _MechanismRun) -> list[str]:
    """Sites that another run computes in another way."""
    sound = [name for name, m in of.items() if m.trouble is None]
    found = set()
    for part in ("expression", "rest"):
        expressions = {name: getattr(of[name], part) for name in sound}
        for group in side_by_side(expressions, second.values):
            try:
                outputs = group.outputs(second.values)
            except Exception:  # whatever it is: it cannot be evaluated again
                found.update(group.names)
                continue
            for i, name in enumerate(group.names):
                there = second.noted[name]
                expected = there.tensors if part == "expression" else there.weights
                if len(expected) != len(outputs) or not all(
                    _same(output[i], tensor)
                    for output, tensor in zip(outputs, expected, strict=True)
                ):
                    found.add(name)
    return sorted(found)


def _same(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    if not one.is_floating_point():
        return torch.equal(one, other)
    tolerance = 100 * torch.finfo(one.dtype).eps ** 0.75
    return torch.allclose(one, other, tolerance, tolerance, equal_nan=True)
