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

import dataclasses
import dis
import functools
import random
import sys
import types
import weakref
from abc import ABC, ABCMeta, get_cache_token
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Generic

import pyro
import torch
from pyro.infer.reparam.reparam import Reparam
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger, _bound_partial
from pyro.poutine.util import is_validation_enabled
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from pyro_macro.program.inner import OWN

# Modules whose content does not change while a program runs
_TRUSTED = """
    torch pyro pyro_macro numpy scipy opt_einsum math cmath functools operator itertools
    collections typing typing_extensions dataclasses abc numbers contextlib warnings
    builtins types copy string enum networkx
"""
_LIBRARIES = frozenset(_TRUSTED.split())
# What is in them and may: stores, files, settings, numbers drawn apart
_IMPURE = """
    get_param_store settings load from_file fromfile fromregex memmap loadtxt genfromtxt
    loadmat random Generator default_generator seed initial_seed get_rng_state
    set_rng_state datetime64 ops classes hub io backends lru_cache cache param module
    random_module ParamStoreDict get_plates subsample am_i_wrapped from_blob
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
# Whose instances are what their attributes are, whatever of them is derived
_OPEN = (
    object,
    ABC,
    Generic,
    torch.nn.Module,
    Distribution,
    Transform,
    Messenger,
    Reparam,
)
_METAS = (type, ABCMeta, type(pyro.distributions.Normal))
# Methods that a dataclass is given
_MADE = """
    __repr__ __eq__ __hash__ __lt__ __le__ __gt__ __ge__ __setattr__
    __delattr__ __replace__
"""
_GENERATED = frozenset(_MADE.split())
# Nothing that a program looks at
_ASIDE = """
    __dict__ __weakref__ __module__ __doc__ __qualname__ __annotations__ __annotate__
    __annotate_func__ __annotations_cache__ __static_attributes__ __firstlineno__
    __abstractmethods__ __parameters__ __orig_bases__ __match_args__ __slots__
    __dataclass_params__ __dataclass_fields__ _abc_impl
"""
_SKIPPED = frozenset(_ASIDE.split())
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
        except Exception:  # whatever it is that the user's things do when looked at
            return None
        return cls((*_settings(), *walk.words), walk.arrays)

    def copied(self) -> Copied | None:
        """With copies of all numbers, so that later changes show."""
        if sum(array.nbytes for array in self.arrays) > LARGEST:
            return None
        return Copied(self)


class Copied:
    """A snapshot that is kept, to be compared with later ones."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.words = snapshot.words
        # What was read may hold the tensors themselves: they have to be the same, and
        # to have the content that they had
        self._arrays = [weakref.ref(array) for array in snapshot.arrays]
        self._copies = [
            a.detach().clone() if isinstance(a, Tensor) else a.copy()
            for a in snapshot.arrays
        ]

    def is_of_now(self, now: Snapshot) -> bool:
        """Whether ``now``, taken later, is the same."""
        return (
            self.words == now.words
            and len(self._arrays) == len(now.arrays)
            and all(a() is b for a, b in zip(self._arrays, now.arrays, strict=True))
            and _all_same(self._copies, now.arrays)
        )


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _all_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether all bits are: zeros have signs, and NaN is not equal to itself.

    A GPU is asked once, whatever the number of its tensors, and after the CPU.
    """
    found: dict[torch.device, list[Tensor]] = {}
    for one, other in zip(some, others, strict=True):
        if not isinstance(one, Tensor):
            if one.tobytes() != other.tobytes():
                return False
            continue
        one, other = _bits(one), _bits(other)
        if one.device.type != "cpu":
            found.setdefault(one.device, []).append((one == other).all())
        elif not torch.equal(one, other):
            return False
    return all(bool(torch.stack(same).all()) for same in found.values())


def _bits(tensor: Tensor) -> Tensor:
    plain = tensor.detach()
    plain = torch.view_as_real(plain) if plain.is_complex() else plain
    return plain.view(_BITS[plain.element_size()])


def _is_watched() -> bool:
    """Whether somebody notes the operations, or transforms them.

    What is read once then has no sources when it is used for the second time.
    """
    return bool(
        torch._C._len_torch_function_stack()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._functorch.maybe_current_level() is not None
        or torch._C._get_tracing_state() is not None
        or _global_forward_hooks
        or any(not hasattr(h, OWN) for h in _global_forward_pre_hooks.values())
    )


def _settings() -> tuple[Any, ...]:
    """What the run of a program depends on besides the program."""
    return (
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        is_validation_enabled(),
        torch.is_autocast_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.get_autocast_dtype("cuda"),
        torch.get_float32_matmul_precision(),
        get_cache_token(),  # of classes registered with an abstract one
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
    return None if numpy is None else numpy.random.get_state()[1:]


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
    if isinstance(one, tuple) and isinstance(other, tuple) and len(one) == 4:
        return bool((one[0] == other[0]).all()) and one[1:] == other[1:]  # of numpy
    return one is other or one == other


class _Same:
    """As a word equal to itself alone; kept alive, so that no other takes its id."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)


class _Walk:
    """Visits everything that can be reached, each once.

    Things are asked for their type alone, never for attributes that they may invent.
    """

    def __init__(self) -> None:
        self.words: list[Any] = []
        self.arrays: list[Any] = []
        self._seen: dict[int, tuple[int, Any]] = {}

    def see(self, thing: Any) -> None:
        kind = type(thing)
        if kind in _PLAIN:
            signed = kind in (float, complex)  # zeros have signs
            self.words.append((kind, repr(thing) if signed else thing))
            return
        if id(thing) in self._seen:  # which one is part of the structure
            self.words.append(("again", self._seen[id(thing)][0]))
            return
        self._seen[id(thing)] = (len(self._seen), thing)
        self.words.append(kind)
        if kind is Tensor or kind is torch.nn.Parameter:
            self._numbers(thing)
        elif kind in (list, tuple):
            self._all(thing)
        elif kind in (set, frozenset):
            if not all(type(each) in _PLAIN for each in thing):
                raise _Unknown
            self._all(thing)  # in the order that a loop would take
        elif kind in (dict, OrderedDict, defaultdict):
            if kind is defaultdict:
                self.see(thing.default_factory)
            self._all([part for pair in thing.items() for part in pair])
        elif kind is types.FunctionType:
            self._function(thing)
        elif kind is types.MethodType:
            self._all([thing.__func__, thing.__self__])
        elif kind in (staticmethod, classmethod):
            self.see(thing.__func__)
        elif kind is property:
            self._all([thing.fget, thing.fset, thing.fdel])
        elif kind is functools.partial or kind is _bound_partial:
            self._all([thing.func, thing.args, thing.keywords, vars(thing)])
        elif kind is types.BuiltinFunctionType:
            self._builtin(thing)
        elif issubclass(kind, type):
            self._class(thing)
        elif kind.__module__ == "numpy" and kind.__name__ == "ndarray":
            self._array(thing)
        elif kind.__module__ == "numpy" and _is_scalar(kind):
            self.words.append((str(thing.dtype), thing.tobytes()))  # a scalar
        elif kind is types.SimpleNamespace:
            self.see(vars(thing))
        else:
            self._instance(thing, kind)

    def _all(self, things: Any) -> None:
        self.words.append(len(things))
        for thing in things:
            self.see(thing)

    def _numbers(self, tensor: Tensor) -> None:
        odd = (
            tensor.is_meta or tensor.is_quantized or tensor.is_conj() or tensor.is_neg()
        )
        if odd or tensor.layout is not torch.strided:
            raise _Unknown
        if tensor.requires_grad and torch.is_grad_enabled():
            raise _Unknown  # a graph can be used once only
        if vars(tensor) or (tensor.is_leaf and tensor.grad is not None):
            raise _Unknown
        self.words.append((tensor.shape, tensor.dtype, tensor.requires_grad))
        self.words.append((tensor.device, tensor.data_ptr()))
        self.arrays.append(tensor)
        self.see(tensor._base)

    def _array(self, array: Any) -> None:
        if array.dtype.hasobject:
            raise _Unknown
        self.words.append((array.shape, str(array.dtype)))
        self.arrays.append(array)
        self.see(array.base)

    def _builtin(self, function: Any) -> None:
        """A function without Python code."""
        module, owner = function.__module__, function.__self__
        if module is None:  # a method of something
            if owner is None or type(owner) is types.ModuleType:
                raise _Unknown
            self.words.append(function.__name__)
            self.see(owner)
            return
        if module == "builtins" and function.__name__ not in _PURE:
            raise _Unknown
        if _root(module) not in _LIBRARIES or function.__name__ in _CHANGING:
            raise _Unknown
        self.words.append(_Same(function))

    def _class(self, kind: type) -> None:
        self.words.append(_Same(kind))
        if _is_library(kind):
            return
        if type(kind) not in _METAS:
            raise _Unknown
        self._all(kind.__bases__)
        generated = _GENERATED if "__dataclass_fields__" in vars(kind) else ()
        for key, value in vars(kind).items():
            if key in _SKIPPED or (key in generated and _is_generated(value)):
                continue
            self.words.append(key)
            self.see(value)

    def _instance(self, thing: Any, kind: type) -> None:
        if _is_library(kind) and hasattr(kind, "depends_on"):
            self.see(thing.depends_on())
            return
        if kind is object:
            self.words.append(_Same(thing))
            return
        if not _is_open(kind) or issubclass(kind, pyro.nn.PyroModule):
            raise _Unknown
        self._class(kind)
        attributes = vars(thing)
        self.words.append(len(attributes))
        for key, value in attributes.items():
            self.words.append(key)
            self.see(value)

    def _function(self, function: types.FunctionType) -> None:
        code = function.__code__
        self.words.append((code, function.__name__, function.__qualname__))
        own: dict[str, Any] = function.__builtins__  # type: ignore[attr-defined]
        from_library = code.co_filename.startswith(_ROOTS)
        if _root(function.__module__ or "") in _LIBRARIES and (
            function.__name__ in _CHANGING
        ):
            raise _Unknown
        names = _names_in(code)
        if names is None:
            raise _Unknown
        self._all([function.__defaults__, function.__kwdefaults__, vars(function)])
        cells = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
        for free, root, chain in names:
            if free:
                try:
                    self._chain(cells[root].cell_contents, chain)
                except ValueError:  # an empty cell
                    self.words.append((root, "empty"))
            elif from_library:
                continue
            elif root in function.__globals__:
                self._chain(function.__globals__[root], chain)
            elif root in own:
                self._chain(own[root], ())
            else:
                self.words.append((root, "nowhere"))

    def _chain(self, thing: Any, chain: tuple[str, ...]) -> None:
        """What ``thing.one.two`` is, as far as ``thing`` is a module."""
        for name in chain:
            if type(thing) is not types.ModuleType:
                break
            found = vars(thing).get(name)
            if found is None:
                raise _Unknown  # made on demand, or missing
            if _root(thing.__name__) in _LIBRARIES:
                if name.startswith("_") or not _CHANGING.isdisjoint(chain):
                    raise _Unknown
                if type(found) is not types.ModuleType:
                    self.words.append((thing.__name__, name, _Same(found)))
                    return
            thing = found
        if type(thing) is types.ModuleType:
            raise _Unknown
        builtin = isinstance(thing, type) and thing.__module__ == "builtins"
        error = builtin and issubclass(thing, Exception)
        if builtin and thing.__name__ not in _PURE and not error:
            raise _Unknown
        self.see(thing)


def _is_scalar(kind: type) -> bool:
    """Whether it is a kind of number of NumPy."""
    return any(base.__name__ == "generic" for base in kind.__mro__)


def tensors_held(thing: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors that something of this library, or a distribution, consists of."""
    if isinstance(thing, Tensor):
        yield thing
        return
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    own = _root(type(thing).__module__) == "pyro_macro"
    if own or isinstance(thing, (Distribution, Transform)):
        thing = getattr(thing, "__dict__", {})
    if isinstance(thing, dict):
        thing = list(thing.values())
    if isinstance(thing, (list, tuple)):
        for part in thing:
            yield from tensors_held(part, seen)


def _root(module: str) -> str:
    return module.split(".")[0].lstrip("_")


def _is_library(kind: type) -> bool:
    """Whether a class is what a library holds under its name."""
    if _root(kind.__module__) not in _LIBRARIES or kind.__name__ in _CHANGING:
        return False
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


_KINDS: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_open(kind: type) -> bool:
    """Whether the instances of a class are what their attributes are."""
    if kind not in _KINDS:
        _KINDS[kind] = _found_open(kind)
    return _KINDS[kind]


def _found_open(kind: type) -> bool:
    if "__getattr__" in dir(kind) and not issubclass(kind, torch.nn.Module):
        return False  # attributes without end, or of elsewhere
    for base in kind.__mro__:
        if base in _OPEN or (_root(base.__module__) == "pyro_macro"):
            continue
        if _is_library(base):
            if not issubclass(base, _OPEN[3:]):
                return False
        elif vars(base).get("__slots__") or "__dict__" not in dir(base):
            return False
    return True


def _is_generated(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and (
        code.co_filename == "<string>" or code.co_filename == dataclasses.__file__
    )


# Ways around everything that is looked at here
_HIDDEN = "__globals__ __subclasses__ __code__ __closure__ __builtins__ f_back"
_INSIDE = frozenset(_HIDDEN.split())
# Of a name: whether it is a free variable, itself, and the attributes that follow
_Name = tuple[bool, str, tuple[str, ...]]
_CODES: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def _names_in(code: types.CodeType) -> tuple[_Name, ...] | None:
    """The names that a function looks up outside of itself, with their attributes.

    :returns: ``None`` if it imports, or assigns to what is not its own.
    """
    if code not in _CODES:
        _CODES[code] = _found_names(code)
    return _CODES[code]


def _found_names(code: types.CodeType) -> tuple[_Name, ...] | None:
    found: dict[_Name, None] = {}
    current: tuple[bool, str] | None = None
    chain: list[str] = []
    for step in dis.get_instructions(code):
        name = step.opname
        if name.startswith(("IMPORT", "STORE_GLOBAL", "DELETE_GLOBAL")):
            return None
        if name.startswith(("LOAD_ATTR", "LOAD_METHOD")) and step.argval in _INSIDE:
            return None
        free = "DEREF" in name or "CLASSDEREF" in name
        if free and step.argval not in code.co_freevars:
            free, name = False, ""  # a variable of its own
        if free and name.startswith(("STORE", "DELETE")):
            return None  # a counter, say
        if current and name.startswith(("LOAD_ATTR", "LOAD_METHOD")):
            chain.append(step.argval)
            continue
        if current:
            found[current[0], current[1], tuple(chain)] = None
            current, chain = None, []
        if free or name.startswith(("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT")):
            current = (free, step.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            inner = _names_in(constant)
            if inner is None:
                return None
            own = set(code.co_cellvars)
            found |= {n: None for n in inner if not (n[0] and n[1] in own)}
    return tuple(found)
