# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Is a program still the one that was read?

A Python function may depend on anything. A :class:`Snapshot` holds all that a model is
*seen* to depend on: its code and that of what it calls, the content of what these close
over, of globals and of arguments, and the settings of torch and Pyro. Whatever cannot
be seen through (an iterator, a file, an object of an unknown kind) makes the answer "it
cannot be told", and the program is read again: only a whitelist is trusted.
"""

from __future__ import annotations

import builtins
import dis
import enum
import functools
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.poutine import runtime
from pyro.poutine.util import is_validation_enabled
from torch import Tensor

# Modules whose content does not change while a program runs
_TRUSTED = """
    torch pyro pyro_macro numpy scipy opt_einsum math cmath functools operator itertools
    collections typing typing_extensions dataclasses abc numbers contextlib warnings
    builtins types copy string enum networkx
"""
_LIBRARIES = frozenset(_TRUSTED.split())
# Functions in them whose answer may: stores, files, numbers drawn apart
_IMPURE = """
    get_param_store settings load fromfile memmap loadtxt genfromtxt random Generator
    default_generator seed initial_seed
"""
_CHANGING = frozenset(_IMPURE.split())
_BUILTINS = """
    abs all any bool bytes callable complex dict divmod enumerate filter float format
    frozenset getattr hasattr hash int isinstance issubclass len list map max min object
    pow print property range repr reversed round set setattr slice sorted staticmethod
    classmethod str sum super tuple type zip __build_class__
"""
_PURE = frozenset(_BUILTINS.split())
_ROOTS = tuple(
    str(Path(module.__file__).parent) + "/"
    for module in (torch, pyro, sys.modules["pyro_macro"])
    if module.__file__
)
_PLAIN = (
    type(None),
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    range,
    torch.Size,
    torch.dtype,
    torch.device,
    type(Ellipsis),
)
# What remembers more than its attributes tell
_STATEFUL = (pyro.nn.PyroModule, functools._lru_cache_wrapper)
LARGEST = 2**28  # bytes that a snapshot may copy


class _Unknown(Exception):
    """Something that cannot be seen through."""


class Snapshot:
    """All that some things depend on, as it is now.

    >>> mean = torch.zeros(3)
    >>> def model():
    ...     return mean + 1
    >>> before = Snapshot.of(model).copied()
    >>> before.is_of_now(Snapshot.of(model))
    True
    >>> _ = mean.add_(1)
    >>> before.is_of_now(Snapshot.of(model))
    False
    >>> Snapshot.of(iter([model])) is None  # cannot be told
    True
    """

    def __init__(self, words: tuple[Any, ...], arrays: list[Any]) -> None:
        self.words, self.arrays = words, arrays

    @classmethod
    def of(cls, *things: Any) -> Snapshot | None:
        """What ``things`` depend on; ``None`` if that cannot be told."""
        if _is_watched():
            return None
        walk = _Walk()
        try:
            for thing in things:
                walk.see(thing)
        except (_Unknown, RecursionError):
            return None
        return cls((*_settings(), *walk.words), walk.arrays)

    def copied(self) -> Snapshot | None:
        """With copies of all numbers, so that later changes show."""
        if sum(array.nbytes for array in self.arrays) > LARGEST:
            return None
        copies = [
            a.detach().clone() if isinstance(a, Tensor) else a.copy()
            for a in self.arrays
        ]
        return Snapshot(self.words, copies)

    def is_of_now(self, now: Snapshot) -> bool:
        """Whether ``now``, taken later, is the same."""
        return (
            self.words == now.words
            and len(self.arrays) == len(now.arrays)
            and all(map(_same_numbers, self.arrays, now.arrays))
        )


def _same_numbers(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    return one.tobytes() == other.tobytes()


def _is_watched() -> bool:
    """Whether somebody notes the operations, or transforms them.

    What is read once then has no sources when it is used for the second time.
    """
    return bool(
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
    )


def _settings() -> tuple[Any, ...]:
    """What the run of a program depends on besides the program."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        is_validation_enabled(),
        torch.is_autocast_enabled(),
        # Where plates without a dimension go
        tuple(runtime._DIM_ALLOCATOR._stack),
    )


@contextmanager
def outside_draws(found: list[str]) -> Iterator[None]:
    """Notes which generators of random numbers are not what they were before."""
    before = {name: state() for name, state in _GENERATORS.items()}
    yield
    for name, state in _GENERATORS.items():
        if not _same_state(before[name], state()):
            found.append(name)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()[1:3]


def _cuda_state() -> Any:
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    return torch.cuda.get_rng_state()


_GENERATORS: dict[str, Callable[[], Any]] = {
    "torch": torch.get_rng_state,
    "torch.cuda": _cuda_state,
    "numpy": _numpy_state,
    "random": random.getstate,
}


def _same_state(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == 2:
        return (one[0] == other[0]).all() and one[1] == other[1]  # of numpy
    return one is other or one == other


class _Walk:
    """Visits everything that can be reached, each once."""

    def __init__(self) -> None:
        self.words: list[Any] = []
        self.arrays: list[Any] = []
        self._seen: dict[int, tuple[int, Any]] = {}

    def see(self, thing: Any) -> None:
        kind = type(thing)
        if kind in _PLAIN:
            # 0.0 == -0.0, and NaN is not itself
            self.words.append((kind, thing.hex() if kind is float else thing))
            return
        if id(thing) in self._seen:  # which one is part of the structure
            self.words.append(("again", self._seen[id(thing)][0]))
            return
        self._seen[id(thing)] = (len(self._seen), thing)
        self.words.append(kind)
        if kind is Tensor or kind is torch.nn.Parameter:
            self._numbers(thing)
        elif kind in (list, tuple, set, frozenset):
            self._members(thing)
        elif isinstance(thing, dict) and kind.__module__ in ("builtins", "collections"):
            self.words.append(len(thing))
            for key, value in thing.items():
                self.see(key)
                self.see(value)
        elif isinstance(thing, types.FunctionType):
            self._function(thing)
        elif isinstance(thing, types.MethodType):
            self.see(thing.__func__)
            self.see(thing.__self__)
        elif isinstance(thing, functools.partial):
            for part in (thing.func, thing.args, thing.keywords):
                self.see(part)
        elif isinstance(thing, (types.BuiltinFunctionType, type)):
            self._named(thing)
        elif isinstance(thing, enum.Enum):
            self.words.append(thing)
        elif kind.__module__ == "numpy" and hasattr(thing, "tobytes"):
            self._array(thing)
        else:
            self._instance(thing)

    def _members(self, things: Any) -> None:
        self.words.append(len(things))
        if isinstance(things, (set, frozenset)):
            if not all(type(thing) in _PLAIN for thing in things):
                raise _Unknown
            self.words.append(frozenset(things))
            return
        for thing in things:
            self.see(thing)

    def _numbers(self, tensor: Tensor) -> None:
        if tensor.layout is not torch.strided or tensor.is_meta:
            raise _Unknown
        if tensor.requires_grad and torch.is_grad_enabled():
            raise _Unknown  # a graph can be used once only
        self.words.append((tensor.shape, tensor.dtype, tensor.device))
        self.arrays.append(tensor)

    def _array(self, array: Any) -> None:
        if array.dtype.hasobject:
            raise _Unknown
        self.words.append((array.shape, str(array.dtype)))
        self.arrays.append(array)

    def _named(self, thing: Any) -> None:
        """A class, or a function without Python code."""
        module = getattr(thing, "__module__", None)
        if module is None:  # methods of builtin things
            owner = getattr(thing, "__self__", None)
            if owner is None or isinstance(owner, types.ModuleType):
                raise _Unknown
            self.words.append(thing.__name__)
            self.see(owner)
            return
        error = isinstance(thing, type) and issubclass(thing, Exception)
        if module == "builtins" and thing.__name__ not in _PURE and not error:
            raise _Unknown
        if _is_library(thing, module):
            self.words.append(thing)
        elif isinstance(thing, type):
            self._class(thing)
        else:
            raise _Unknown

    def _class(self, kind: type) -> None:
        self.words.append(kind)
        for base in kind.__bases__:
            self.see(base)
        for key, value in vars(kind).items():
            if key in ("__dict__", "__weakref__", "__module__", "__doc__"):
                continue
            if isinstance(value, (staticmethod, classmethod)):
                value = value.__func__
            if isinstance(value, property):
                value = (value.fget, value.fset, value.fdel)
            if key.startswith(
                ("__dataclass", "_abc_", "__annot", "__static", "__first")
            ):
                continue
            self.see(value)

    def _instance(self, thing: Any) -> None:
        if hasattr(thing, "depends_on"):  # of this library: it knows by itself
            self.see(thing.depends_on())
            return
        kind = type(thing)
        if isinstance(thing, _STATEFUL) or not all(map(_is_python, kind.__mro__)):
            raise _Unknown
        if not hasattr(thing, "__dict__") or any(
            vars(base).get("__slots__") for base in kind.__mro__
        ):
            raise _Unknown
        self.see(kind)
        for key, value in vars(thing).items():
            if isinstance(value, weakref.ref):
                raise _Unknown
            self.words.append(key)
            self.see(value)

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        self.words.append(code)
        self.see(function.__defaults__)
        self.see(function.__kwdefaults__)
        if vars(function):
            self.see(vars(function))
        names = _names_in(code)
        if names is None:
            raise _Unknown
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        from_library = code.co_filename.startswith(_ROOTS)
        for root, chain in names:
            if root in cells:
                try:
                    self._chain(cells[root].cell_contents, chain)
                except ValueError:  # an empty cell
                    self.words.append((root, "empty"))
            elif from_library:
                continue
            elif root in function.__globals__:
                self._chain(function.__globals__[root], chain)
            elif hasattr(builtins, root):
                self.see(getattr(builtins, root))
            else:
                self.words.append((root, "nowhere"))

    def _chain(self, thing: Any, chain: tuple[str, ...]) -> None:
        """What ``thing.one.two`` is, as far as ``thing`` is a module."""
        for name in chain:
            if not isinstance(thing, types.ModuleType):
                break
            root = thing.__name__.split(".")[0]
            if root in _LIBRARIES:
                if name in _CHANGING:
                    raise _Unknown
                self.words.append((thing.__name__, name))
                if not isinstance(vars(thing).get(name), types.ModuleType):
                    return
            thing = getattr(thing, name, None)
        if isinstance(thing, types.ModuleType):
            raise _Unknown
        self.see(thing)


def _is_python(kind: type) -> bool:
    """Whether a class is written in Python, so that its attributes are all it has."""
    if kind is object or _is_library(kind, kind.__module__):
        return True
    module = sys.modules.get(kind.__module__)
    file = getattr(module, "__file__", None) or ".py"
    return kind.__module__ != "builtins" and file.endswith((".py", ".ipynb"))


def _is_library(thing: Any, module: str) -> bool:
    """Whether a class or function is what a library holds under its name."""
    if module.split(".")[0].lstrip("_") not in _LIBRARIES:
        return False
    if getattr(thing, "__name__", "") in _CHANGING:
        return False
    if not isinstance(thing, type):
        return True
    found: Any = sys.modules.get(module)
    for name in thing.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is thing


_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_CLASSDEREF")
_CODES: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _names_in(code: types.CodeType) -> tuple[tuple[str, tuple[str, ...]], ...] | None:
    """The names that a function looks up outside of itself, with their attributes.

    :returns: ``None`` if it imports, or assigns to what is not its own.
    """
    if code not in _CODES:
        _CODES[code] = _found_names(code)
    return _CODES[code]


def _found_names(code: types.CodeType) -> Any:
    found: dict[tuple[str, tuple[str, ...]], None] = {}
    root, chain = "", []
    for step in dis.get_instructions(code):
        name = step.opname
        if name.startswith(("IMPORT", "STORE_GLOBAL", "DELETE_GLOBAL")):
            return None
        if name == "STORE_DEREF" and step.argval in code.co_freevars:
            return None  # a counter, say
        if root and name.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            chain.append(step.argval)
            continue
        if root:
            found[root, tuple(chain)] = None
            root, chain = "", []
        if (
            name.startswith(_LOADS)
            and (
                name.startswith(("LOAD_GLOBAL", "LOAD_NAME"))
                or step.argval in code.co_freevars
            )
            or name.startswith("LOAD_FROM_DICT_OR")
        ):
            root = step.argval
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names_in(constant)
            if inner is None:
                return None
            local = set(code.co_cellvars)
            found |= {(r, c): None for r, c in inner if r not in local}
    return tuple(found)
