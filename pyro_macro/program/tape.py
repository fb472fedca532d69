# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What a run computes, as expressions that can be evaluated again.

While a :class:`Tape` is active, each operation on a value that is not a constant is
noted. What a site's distribution is made of is then an :class:`Expression` in the
values of its parents: one run is enough to evaluate it at as many other values as one
likes, side by side with the expressions of sites that are computed in the same way.
"""

from __future__ import annotations

import itertools
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_macro.program.tracking import ESCAPES, MARK, Tracker, has_kinks

Leaf = tuple[str, Hashable]  # a kind, and which of it
SITE, PARAM, ARGUMENT, INDICES, CAPTURED = (
    "site",
    "param",
    "argument",
    "indices",
    "captured",
)
CHANCE, INPUT = MARK + "chance", MARK + "input"  # sources that are no sites
_serial = itertools.count()
# Operations whose numbers may differ between sites that are otherwise alike
_OPERATORS = """
    add sub mul div true_divide rsub pow __add__ __radd__ __sub__ __rsub__ __mul__
    __rmul__ __truediv__ __rtruediv__ __pow__ __rpow__ __rdiv__ __div__
"""
_ARITHMETIC = frozenset(_OPERATORS.split())
_MOVES = """
    broadcast_tensors part_of expand expand_as reshape view view_as squeeze unsqueeze to
    float double clone detach getitem stack cat transpose permute movedim get contiguous
    broadcast_to long int bool index_select gather take
"""
_ARRANGING = frozenset(_MOVES.split())
_MULTIPLIED = "matmul rmatmul mm mv bmm dot linear einsum addmm"
_PRODUCTS = frozenset(_MULTIPLIED.split(" "))
# Operations that are affine in each of their arguments, the others held. (Products of
# what depends on the same leaves are polynomials, which two probes are sure to find.)
_AFFINE = """
    add radd sub rsub mul rmul div truediv true_divide neg negative positive sum mean
    matmul rmatmul mm bmm mv dot inner outer einsum tensordot linear bilinear baddbmm
    addmm addmv addbmm kron vdot
    broadcast_tensors part_of expand expand_as broadcast_to reshape view view_as flatten
    unflatten squeeze unsqueeze ravel transpose swapaxes swapdims permute movedim
    moveaxis t T mT H mH get stack cat concat concatenate hstack vstack dstack
    column_stack getitem setitem select narrow index_select gather take take_along_dim
    masked_select masked_fill unbind split chunk tensor_split flip fliplr flipud roll
    repeat tile repeat_interleave diag diagonal diag_embed tril triu trace clone detach
    contiguous to type float double half bfloat16 cumsum diff where conv1d conv2d conv3d
    pad avg_pool1d avg_pool2d alias real lerp addcmul addcdiv copy zero fill scatter
    scatter_add index_add index_copy nansum _Changed resolve_conj data requires_grad
    block_diag meshgrid atleast_1d atleast_2d as_tensor tensor type_as new_tensor
"""
_KNOWN_AFFINE = frozenset(name.strip("_") for name in _AFFINE.split())
_DRAWS = """
    rand randn randint randperm rand_like randn_like randint_like bernoulli multinomial
    normal poisson binomial uniform exponential geometric cauchy log_normal random
    dropout alpha_dropout feature_alpha_dropout feature_dropout dropout1d dropout2d
    dropout3d rrelu gumbel_softmax standard_gamma sample_dirichlet standard_normal
"""
_RANDOM = frozenset(_DRAWS.split())
# What does not depend on the values of the tensors it is given
_MADE = """
    zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty
"""
_SHAPED = frozenset(_MADE.split())


class Node:
    """One operation, or a leaf: a value that is put in.

    :ivar leaf: which leaf it is, ``None`` if it is an operation.
    :ivar trouble: why the operation cannot be repeated, in words, if it cannot.
    :ivar kinked: whether its derivative does not tell all about it.
    """

    __slots__ = (
        "args",
        "function",
        "kinked",
        "kwargs",
        "leaf",
        "serial",
        "trouble",
        "value",
    )

    def __init__(
        self,
        function: Callable[..., Any] | None = None,
        args: Any = (),
        kwargs: Any = None,
        leaf: Leaf | None = None,
        value: Tensor | None = None,
        trouble: str | None = None,
        kinked: bool = False,
    ) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs or {}
        self.leaf, self.value, self.trouble = leaf, value, trouble
        self.kinked = kinked
        self.serial = next(_serial)


class Tape(Tracker):
    """Notes, while it is active, how each tensor is computed from the leaves.

    :param noting: whether it does.

    >>> with Tape() as tape:
    ...     a = tape.leaf(torch.tensor(1.0), ("site", "a"))
    ...     b = 2 * a + 1
    >>> double = Expression([tape.node(b)])
    >>> double({("site", "a"): torch.tensor(10.0)})
    [tensor(21.)]
    """

    def __init__(self, noting: bool = True) -> None:
        super().__init__()
        self.noting = noting
        self._node = f"{self._key}_node"
        self._captured: dict[int, Node] = {}

    def leaf(self, value: Any, leaf: Leaf) -> Any:
        """The same value, as a new tensor object that is a leaf."""
        if not isinstance(value, Tensor):
            return value
        alias = value.view_as(value)
        source = INPUT if leaf[0] == ARGUMENT else MARK + leaf[0]
        setattr(alias, self._key, frozenset({source}))
        setattr(alias, self._node, Node(leaf=leaf))
        return alias

    def mark(self, value: Any, names: Iterable[str]) -> Any:
        """A site's value: a leaf of its own, whatever it was computed from."""
        names = list(names)
        alias = super().mark(value, names)
        if isinstance(alias, Tensor):
            setattr(alias, self._node, Node(leaf=(SITE, names[0])))
        return alias

    def node(self, tensor: Tensor) -> Node | Tensor:
        """The operation that a tensor is the result of, itself if it is a constant."""
        node = getattr(tensor, self._node, None)
        if node is None and tensor.requires_grad:
            # Something to be trained that is no Pyro parameter: kept as it is
            if id(tensor) not in self._captured:
                leaf = (CAPTURED, id(tensor))
                self._captured[id(tensor)] = Node(leaf=leaf, value=tensor)
            return self._captured[id(tensor)]
        return tensor if node is None else node

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not self.noting:
            return func(*args, **kwargs)
        noted = any(self._is_noted(t) for t in _tensors((args, kwargs)))
        name = getattr(func, "__name__", "")
        if name.strip("_") in _RANDOM:
            result = super().__torch_function__(func, types, args, kwargs)
            self._note(result, frozenset({CHANCE}))
            drawn = f"random numbers that are no sample site ({name})"
            self._note_node(result, Node(trouble=drawn))
            return result
        in_place = name == "__setitem__" or (
            name.endswith("_") and not name.endswith("__")
        )
        template: tuple[Any, Any] = ((), {})
        if noted:
            template = self._template(args), self._template(kwargs)
            if in_place and args and isinstance(template[0][0], Tensor):
                # It will not be what it is now
                first = template[0][0].detach().clone()
                template = ((first, *template[0][1:]), template[1])
        result = super().__torch_function__(func, types, args, kwargs)
        if name == "__iter__":
            result = list(result)
            self._note(result, self.sources(args))
            self._note_node(result, Node(torch.unbind, *template))
            return iter(result)
        if not noted or name in ESCAPES or name in _SHAPED:
            return result
        if name == "broadcast_tensors":
            for part, tensor in zip(result, _tensors(args), strict=True):
                if part is not tensor and self._is_noted(tensor):
                    given = (self.node(tensor), part.shape)
                    setattr(part, self._node, Node(torch.broadcast_to, given))
            return result
        kinked = has_kinks(name, result)
        if in_place and not args:
            self._note_node(result, Node(trouble=f"{name} works in place"))
            return result
        if in_place:
            trouble = None
            if args[0]._base is not None:
                trouble = f"{name} changes a part of a tensor in place"
                setattr(args[0]._base, self._node, Node(trouble=trouble))
            changed = Node(_Changed(func), *template, None, None, trouble, kinked)
            setattr(args[0], self._node, changed)
            return result
        if name == "__get__" and func.__self__.__name__ == "data":
            func = torch.detach  # which has a value in each world, too
        trouble = "it writes to `out=`" if kwargs.get("out") is not None else None
        node = Node(func, *template, None, None, trouble, kinked)
        self._note_node(result, node)
        return result

    def _is_noted(self, tensor: Tensor) -> bool:
        return tensor.requires_grad or hasattr(tensor, self._node)

    def _note_node(self, result: Any, node: Node) -> None:
        if isinstance(result, Tensor):
            setattr(result, self._node, node)
        elif isinstance(result, (tuple, list)):
            for i, part in enumerate(result):
                self._note_node(part, Node(part_of, (node, i), kinked=node.kinked))

    def _template(self, thing: Any) -> Any:
        if isinstance(thing, Tensor):
            return self.node(thing)
        if isinstance(thing, (tuple, list)):
            parts = [self._template(part) for part in thing]
            return parts if isinstance(thing, list) else tuple(parts)
        if isinstance(thing, dict):
            return {key: self._template(part) for key, part in thing.items()}
        return thing


def part_of(parts: Any, place: int) -> Any:
    return parts[place]


@dataclass(frozen=True)
class _Changed:
    """An operation in place, on a copy."""

    function: Callable[..., Any]

    def __call__(self, first: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        copy = first.clone()
        for other in _tensors((args, kwargs)):
            # Under `vmap` the copy must have whatever dimensions the others have
            never = torch.zeros_like(other, dtype=torch.bool).any()
            copy = torch.where(never, other.sum().to(copy.dtype), copy)
        self.function(copy, *args, **kwargs)
        return copy


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from _tensors(part)
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))


@dataclass(frozen=True)
class _At:
    """A place of an expression's values: its leaves, its constants, its operations."""

    index: int


@dataclass(frozen=True)
class _Slice:
    start: Any
    stop: Any
    step: Any


class Expression:
    """Some tensors as a function of leaves.

    :param outputs: nodes, or tensors that are constants.
    :ivar leaves: what it is a function of, in the order of their first use.
    :ivar key: equal for expressions that compute the same, but for their leaves and
        constants.
    :ivar constants: tensors and numbers, in the order of their first use.
    :ivar trouble: why it cannot be evaluated again, if it cannot.
    """

    def __init__(self, outputs: Sequence[Node | Tensor]) -> None:
        nodes = _needed(outputs)
        self.trouble = next((n.trouble for n in nodes if n.trouble), None)
        self.leaves: list[Leaf] = []
        self.constants: list[Any] = []
        self.captured: dict[Leaf, Tensor] = {}
        self._places: dict[int, int] = {}
        self._holes: list[int] = []
        self._count = 0
        self._steps: list[tuple[Any, Any, Any]] = []
        self._kinked: list[bool] = []
        for node in nodes:
            if node.leaf is not None:
                self._places[id(node)] = self._new()
                self.leaves.append(node.leaf)
                if node.value is not None:
                    self.captured[node.leaf] = node.value
        self._leaf_count = self._count
        for node in nodes:
            if node.leaf is None:
                name = getattr(node.function, "__name__", "")
                free = name in _ARITHMETIC or name == "__getitem__"
                args = self._frozen(node.args, free)
                kwargs = self._frozen(node.kwargs, False)
                self._steps.append((node.function, args, kwargs))
                self._places[id(node)] = self._new()
                self._kinked.append(node.kinked)
        self._outputs = tuple(self._frozen(output, False) for output in outputs)
        kinds = tuple(leaf[0] for leaf in self.leaves)
        shapes = tuple(
            (c.shape, c.dtype) if isinstance(c, Tensor) else type(c)
            for c in self.constants
        )
        self.key = (kinds, tuple(self._steps), self._outputs, shapes)
        self._at = self._step_places()
        del self._places

    def _new(self) -> int:
        self._count += 1
        return self._count - 1

    def _frozen(self, thing: Any, free: bool) -> Any:
        if isinstance(thing, Node):
            return _At(self._places[id(thing)])
        is_number = isinstance(thing, (int, float)) and not isinstance(thing, bool)
        if isinstance(thing, Tensor) or (free and is_number):
            self.constants.append(thing)
            self._holes.append(self._new())
            return _At(self._holes[-1])
        if isinstance(thing, (tuple, list)):
            parts = tuple(self._frozen(part, free) for part in thing)
            return ("list", *parts) if isinstance(thing, list) else ("tuple", *parts)
        if isinstance(thing, dict):
            return ("dict", *((k, self._frozen(v, free)) for k, v in thing.items()))
        if isinstance(thing, slice):
            bounds = (thing.start, thing.stop, thing.step)
            return _Slice(*(self._frozen(bound, False) for bound in bounds))
        try:
            hash(thing)
        except TypeError:
            return _Same(thing)
        return thing if thing is None else (type(thing), thing)

    @property
    def operations(self) -> int:
        """How many operations there are."""
        return len(self._steps)

    @property
    def multiplies(self) -> bool:
        """Whether matrices are multiplied."""
        return any(name in _PRODUCTS for name in self._names())

    @property
    def lookups(self) -> int:
        """How many tables are read at a place that is computed."""
        return sum(
            name in ("getitem", "index_select", "gather", "take")
            and any(place < self._leaf_count or place in self._at for place in places)
            for name, places in zip(self._names(), self._indices(), strict=True)
        )

    def _names(self) -> list[str]:
        return [getattr(f, "__name__", "").strip("_") for f, _, _ in self._steps]

    def _indices(self) -> list[list[int]]:
        return [list(_places_in(args))[1:] for _, args, _ in self._steps]

    @property
    def arithmetic(self) -> int:
        """How many of them compute numbers, and do not only arrange these."""
        return sum(name not in _ARRANGING for name in self._names())

    @property
    def parents(self) -> list[str]:
        """The sites among the leaves."""
        return [str(name) for kind, name in self.leaves if kind == SITE]

    def may_be_affine(self, leaves: Collection[Leaf]) -> bool:
        """Whether all operations on the way from some leaves are known to be affine.

        Not more: their coefficients may be products of what depends on the leaves.
        """
        reached = {i for i, leaf in enumerate(self.leaves) if leaf in leaves}
        for (function, args, kwargs), place, kinked in zip(
            self._steps, self._at, self._kinked, strict=True
        ):
            if reached.isdisjoint(_places_in((args, kwargs))):
                continue
            name = getattr(function, "__name__", type(function).__name__).strip("_")
            if name == "get":  # a property of a tensor
                name = function.__self__.__name__
            if kinked or name not in _KNOWN_AFFINE:
                return False
            reached.add(place)
        return True

    def _step_places(self) -> list[int]:
        holes = set(self._holes)
        return [i for i in range(self._leaf_count, self._count) if i not in holes]

    def __call__(
        self, leaves: Mapping[Leaf, Tensor], constants: Sequence[Any] | None = None
    ) -> list[Tensor]:
        """The outputs.

        :param leaves: a value for each leaf.
        :param constants: others than those that were met.
        """
        found = [
            self.captured[leaf] if leaf in self.captured else leaves[leaf]
            for leaf in self.leaves
        ]
        return self.evaluate(found, self.constants if constants is None else constants)

    def evaluate(
        self,
        leaves: Sequence[Any],
        constants: Sequence[Any],
        apply: Callable[..., Any] | None = None,
    ) -> list[Any]:
        """The outputs, given all leaves and constants in order.

        :param apply: what to do instead of calling a function, given it, its arguments
            and its keyword arguments: values may then be anything.
        """
        values: list[Any] = [None] * self._count
        values[: self._leaf_count] = leaves
        for place, constant in zip(self._holes, constants, strict=True):
            values[place] = constant
        for (function, args, kwargs), place in zip(self._steps, self._at, strict=True):
            given, named = _thawed(args, values), _thawed(kwargs, values)
            if apply is None:
                values[place] = function(*given, **named)
            else:
                values[place] = apply(function, given, named)
        return [_thawed(output, values) for output in self._outputs]


@dataclass(frozen=True, eq=False)
class _Same:
    """Something that is only equal to itself."""

    thing: Any


def _thawed(thing: Any, values: Sequence[Any]) -> Any:
    if isinstance(thing, _At):
        return values[thing.index]
    if isinstance(thing, tuple):
        kind = thing[0]
        if kind == "tuple":
            return tuple(_thawed(part, values) for part in thing[1:])
        if kind == "list":
            return [_thawed(part, values) for part in thing[1:]]
        if kind == "dict":
            return {key: _thawed(part, values) for key, part in thing[1:]}
        return thing[1]
    if isinstance(thing, _Slice):
        return slice(
            *(_thawed(b, values) for b in (thing.start, thing.stop, thing.step))
        )
    return thing.thing if isinstance(thing, _Same) else thing


def _places_in(thing: Any) -> Iterator[int]:
    if isinstance(thing, _At):
        yield thing.index
    elif isinstance(thing, tuple):
        for part in thing:
            yield from _places_in(part)
    elif isinstance(thing, _Slice):
        yield from _places_in((thing.start, thing.stop, thing.step))


def _needed(outputs: Sequence[Node | Tensor]) -> list[Node]:
    """All nodes behind some, in the order in which they were met."""
    found: dict[int, Node] = {}
    stack: list[Any] = list(outputs)
    while stack:
        thing = stack.pop()
        if isinstance(thing, Node):
            if thing.serial not in found:
                found[thing.serial] = thing
                stack.extend((thing.args, thing.kwargs))
        elif isinstance(thing, (tuple, list)):
            stack.extend(thing)
        elif isinstance(thing, dict):
            stack.extend(thing.values())
        elif isinstance(thing, slice):
            stack.extend((thing.start, thing.stop, thing.step))
    return [found[serial] for serial in sorted(found)]
