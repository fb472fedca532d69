# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What a snapshot of a function sees: each way in which its answer can change."""

import abc
import builtins
import cmath
import collections
import copy
import dataclasses
import datetime
import decimal
import enum
import functools
import gc
import importlib
import inspect
import io
import itertools
import math
import operator
import os
import pathlib
import random
import sys
import time
import types
import typing
import warnings
import weakref
from unittest import mock

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.io
import scipy.stats
import torch
from numpy import load as load_array
from numpy.random import randn
from pyro import get_param_store, poutine
from pyro.poutine.runtime import get_plates
from torch import load as load_tensor
from torch.random import fork_rng, initial_seed

from pyro_macro.program import unchanged
from pyro_macro.program.unchanged import Snapshot, outside_draws

BEFORE, AFTER = 10.0, 15.0


@pytest.fixture(autouse=True)
def _settings():
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)


def taken(*things):
    """A snapshot that later changes do not reach, if there can be one."""
    snapshot = Snapshot.of(*things)
    return None if snapshot is None else snapshot.copied()


def is_same(before, *things):
    now = Snapshot.of(*things)
    return before is not None and now is not None and before.is_of_now(now)


# Each case returns a function whose answer is BEFORE, and what makes it AFTER.
# Ordinary ones have to be told, so that they are the same as long as nothing changes;
# strange ones need not be told, as long as no change is missed.
ORDINARY, STRANGE = {}, {}


def ordinary(case):
    ORDINARY[case.__name__] = case
    return case


def strange(case):
    STRANGE[case.__name__] = case
    return case


def run(case, patch, path):
    offered = {"patch": patch, "path": path}
    return case(*(offered[name] for name in inspect.signature(case).parameters))


def _written(make, answer, write):
    """A function of one thing, which is written to."""

    def case():
        thing = make()
        return lambda: answer(thing), lambda: write(thing)

    return case


def _replaced(make, answer):
    """A function of one thing, in whose place comes another one."""

    def case():
        thing = make(BEFORE)

        def change():
            nonlocal thing
            thing = make(AFTER)

        return lambda: answer(thing), change

    return case


def _attribute(name, value=AFTER):
    return lambda thing: setattr(thing, name, value)


def _item(key, value=AFTER):
    return lambda thing: operator.setitem(thing, key, value)


def _mean(thing):
    return thing.mean


def _first(thing):
    return float(thing[0])


# Names

NUMBER, TABLE = BEFORE, {"mean": BEFORE}
TENSOR, ARRAY = torch.tensor([1.0, BEFORE]), np.array([1.0, BEFORE])


def _helper():
    return TABLE["mean"]


def _helper_of_helper():
    return _helper()


@ordinary
def a_global(patch):
    return lambda: NUMBER, lambda: patch.setitem(globals(), "NUMBER", AFTER)


@ordinary
def a_global_container(patch):
    return lambda: TABLE["mean"], lambda: patch.setitem(TABLE, "mean", AFTER)


@ordinary
def a_global_tensor(patch):
    patch.setitem(globals(), "TENSOR", TENSOR.clone())
    return lambda: TENSOR[1].item(), lambda: TENSOR[1].add_(5)


@ordinary
def a_global_array(patch):
    patch.setitem(globals(), "ARRAY", ARRAY.copy())
    return lambda: float(ARRAY[1]), lambda: ARRAY.__setitem__(1, AFTER)


@ordinary
def a_closure():
    number = BEFORE

    def change():
        nonlocal number
        number = AFTER

    return lambda: number, change


@ordinary
def a_nested_closure():
    number = BEFORE

    def outer():
        def inner():
            return [number for _ in range(2)][0]

        return inner()

    def change():
        nonlocal number
        number = AFTER

    return outer, change


@ordinary
def a_class_body_in_a_function():
    number = BEFORE

    def fn():
        class Local:
            mean = number

        return Local.mean

    def change():
        nonlocal number
        number = AFTER

    return fn, change


@ordinary
def a_default_argument():
    def fn(mean=BEFORE):
        return mean

    return fn, lambda: setattr(fn, "__defaults__", (AFTER,))


@ordinary
def a_keyword_default():
    def fn(*, mean=BEFORE):
        return mean

    return fn, lambda: setattr(fn, "__kwdefaults__", {"mean": AFTER})


@ordinary
def a_mutable_default():
    def fn(values=[BEFORE]):  # noqa: B006
        return values[0]

    return fn, lambda: fn.__defaults__[0].__setitem__(0, AFTER)


@ordinary
def an_attribute_of_a_function():
    def fn():
        return fn.mean

    fn.mean = BEFORE
    return fn, lambda: setattr(fn, "mean", AFTER)


@ordinary
def a_code_that_is_replaced():
    def fn():
        return BEFORE

    return fn, lambda: setattr(fn, "__code__", (lambda: AFTER).__code__)


@ordinary
def a_function_that_a_function_calls(patch):
    return lambda: _helper_of_helper(), lambda: patch.setitem(TABLE, "mean", AFTER)


@ordinary
def a_function_that_is_patched(patch):
    change = functools.partial(patch.setitem, globals(), "_helper", lambda: AFTER)
    return lambda: _helper_of_helper(), change


@ordinary
def a_recursion():
    values = [BEFORE]

    def fn(depth=3):
        return fn(depth - 1) if depth else values[0]

    return fn, lambda: values.__setitem__(0, AFTER)


@ordinary
def a_decorated_function():
    factor = {"of": 1.0}

    def scaled(fn):
        @functools.wraps(fn)
        def wrapper():
            return factor["of"] * fn()

        return wrapper

    return scaled(lambda: BEFORE), lambda: factor.update(of=1.5)


@ordinary
def a_name_that_is_free_and_global():
    space = {}
    exec(
        "scale = 10.0\n"
        "def make():\n"
        "    scale = 1.0\n"
        "    def fn():\n"
        "        def inner():\n"
        "            global scale\n"
        "            return scale\n"
        "        return scale * inner()\n"
        "    return fn\n",
        space,
    )
    return space["make"](), lambda: space.update(scale=AFTER)


@ordinary
def a_name_that_is_local_and_global():
    space = {}
    exec(
        "scale = 10.0\n"
        "def fn():\n"
        "    scale = 1.0\n"
        "    def local():\n"
        "        return scale\n"
        "    def inner():\n"
        "        global scale\n"
        "        return scale\n"
        "    return local() * inner()\n",
        space,
    )
    return space["fn"], lambda: space.update(scale=AFTER)


@ordinary
def a_name_that_appears(patch):
    def fn():
        try:
            return late_number  # noqa: F821
        except NameError:
            return BEFORE

    return fn, lambda: patch.setitem(fn.__globals__, "late_number", AFTER)


@strange
def a_builtin_of_the_user(patch):
    patch.setattr(builtins, "user_number", BEFORE, raising=False)
    change = functools.partial(patch.setattr, builtins, "user_number", AFTER)
    return lambda: user_number, change  # noqa: F821


@strange
def a_builtin_that_is_shadowed(patch):
    change = functools.partial(patch.setitem, globals(), "max", lambda *_: AFTER)
    return lambda: max(BEFORE, 1.0), change


@strange
def builtins_of_its_own():
    names = {"min": lambda *_: BEFORE}
    space = {"__builtins__": names}
    exec("def fn():\n    return min(3.0, 4.0)\n", space)
    return space["fn"], functools.partial(names.update, min=lambda *_: AFTER)


@strange
def a_name_by_name(patch):
    change = functools.partial(patch.setitem, globals(), "NUMBER", AFTER)
    return lambda: globals()["NUMBER"], change


@strange
def an_expression(patch):
    change = functools.partial(patch.setitem, globals(), "NUMBER", AFTER)
    return lambda: eval("NUMBER"), change


@strange
def globals_of_a_function(patch):
    change = functools.partial(patch.setitem, globals(), "NUMBER", AFTER)
    return lambda: _helper.__globals__["NUMBER"], change


@strange
def an_import(patch):
    patch.setitem(sys.modules, "a_users_module", _module())

    def fn():
        import a_users_module

        return a_users_module.mean

    return fn, lambda: setattr(sys.modules["a_users_module"], "mean", AFTER)


@strange
def a_counter():
    count = BEFORE - 6

    def fn():
        nonlocal count
        count += 5
        return count + 1

    return fn, lambda: None


# Containers


class List(list):
    pass


class Dict(dict):
    pass


class Readable(dict):
    __getattr__ = dict.__getitem__


class Set(set):
    pass


class Float(float):
    pass


class String(str):
    pass


class Deque(collections.deque):
    pass


class Array(np.ndarray):
    pass


class SubTensor(torch.Tensor):
    pass


class Pair(collections.namedtuple("Pair", "mean scale")):
    """As the documentation of the standard library has it, without slots."""


class Typed(typing.NamedTuple):
    mean: float


class Time(datetime.timedelta):
    pass


class Decimal(decimal.Decimal):
    pass


class Partial(functools.partial):
    pass


def _refilled(*values):
    def write(things):
        things.clear()
        for value in values:
            things.add(value)

    return write


def _order(*values):
    """A set whose elements share a place: in the order of arrival."""
    found = set()
    for value in values:
        found.add(value)
    return found


def _renamed(things):
    things["high"] = things.pop("low")


_shared = [1.0]
CONTAINERS = {
    "nested": (
        lambda: {"a": [({"b": BEFORE},)]},
        lambda v: v["a"][0][0]["b"],
        lambda v: v["a"][0][0].update(b=AFTER),
    ),
    "of functions": (
        lambda: {"mean": lambda: BEFORE},
        lambda v: v["mean"](),
        _item("mean", lambda: AFTER),
    ),
    "key": (
        lambda: {"low": 1.0},
        lambda v: AFTER if "high" in v else BEFORE,
        _renamed,
    ),
    "order of keys": (
        lambda: {"a": BEFORE, "b": AFTER},
        lambda v: list(v.values())[0],
        lambda v: v.update(a=v.pop("a")),
    ),
    "set": (lambda: {BEFORE}, sum, _refilled(AFTER)),
    "order of a set": (
        lambda: _order(8, 0),
        lambda v: BEFORE if list(v)[0] == 8 else AFTER,
        _refilled(0, 8),
    ),
    "type in a set": (
        lambda: {True},
        lambda v: BEFORE if isinstance(list(v)[0], bool) else AFTER,
        _refilled(1),
    ),
    "type of a number": (
        lambda: [1],
        lambda v: AFTER if isinstance(v[0], float) else BEFORE,
        _item(0, 1.0),
    ),
    "sign of zero": (
        lambda: [0.0],
        lambda v: 12.5 - math.copysign(2.5, v[0]),
        _item(0, -0.0),
    ),
    "sign of complex zero": (
        lambda: [complex(-1.0, 0.0)],
        lambda v: 12.5 - 2.5 * cmath.phase(v[0]) / cmath.pi,
        _item(0, complex(-1.0, -0.0)),
    ),
    "identity": (
        lambda: [_shared, _shared],
        lambda v: BEFORE if v[0] is v[1] else AFTER,
        _item(1, [1.0]),
    ),
    "sentinel": (
        lambda: [NOTHING],
        lambda v: BEFORE if v[0] is NOTHING else AFTER,
        _item(0, object()),
    ),
}
NOTHING = object()
ORDINARY |= {f"container: {name}": _written(*c) for name, c in CONTAINERS.items()}


def _with_mean(thing):
    thing.mean = BEFORE
    return thing


SUBCLASSES = {
    "list": (lambda: List([BEFORE]), _first, _item(0)),
    "dict": (lambda: Dict(a=BEFORE), lambda v: v["a"], _item("a")),
    "dict, attributes": (lambda: Readable(mean=BEFORE), _mean, _item("mean")),
    "set": (lambda: Set([BEFORE]), sum, _refilled(AFTER)),
    "deque": (lambda: collections.deque([BEFORE]), _first, _item(0)),
    "deque of a subclass": (lambda: Deque([BEFORE]), _first, _item(0)),
    "counter": (
        lambda: collections.Counter(a=10),
        lambda v: float(v["a"]),
        lambda v: v.update(a=5),
    ),
    "chain of maps": (
        lambda: collections.ChainMap({}, {"a": BEFORE}),
        lambda v: v["a"],
        lambda v: v.maps[1].update(a=AFTER),
    ),
    "default factory": (
        lambda: collections.defaultdict(lambda: BEFORE),
        lambda v: v.default_factory(),
        _attribute("default_factory", lambda: AFTER),
    ),
    "attribute of a partial": (
        lambda: _with_mean(functools.partial(float, 1)),
        _mean,
        _attribute("mean"),
    ),
    "exception": (
        lambda: ValueError(BEFORE),
        lambda e: e.args[0],
        _attribute("args", (AFTER,)),
    ),
    "tensor": (
        lambda: torch.tensor([BEFORE]).as_subclass(SubTensor),
        _first,
        lambda t: t.add_(5),
    ),
    "array": (lambda: np.array([BEFORE]).view(Array), _first, _item(0)),
    "masked array": (
        lambda: np.ma.array([BEFORE, 1.0], mask=[False, True]),
        lambda a: float(a.sum()),
        _item(0),
    ),
    "mask": (
        lambda: np.ma.array([BEFORE, 5.0], mask=[False, True]),
        lambda a: float(a.sum()),
        _attribute("mask", False),
    ),
    "record array": (
        lambda: np.rec.array([(BEFORE,)], dtype=[("number", float)]),
        lambda a: float(a.number[0]),
        lambda a: a["number"].fill(AFTER),
    ),
    "array of objects": (
        lambda: np.array([[BEFORE]], dtype=object),
        lambda a: a[0, 0],
        _item((0, 0)),
    ),
    "sparse tensor": (
        lambda: torch.tensor([BEFORE]).to_sparse(),
        lambda t: t.to_dense()[0].item(),
        lambda t: t.mul_(1.5),
    ),
}
STRANGE |= {f"contents: {name}": _written(*c) for name, c in SUBCLASSES.items()}


class Holder:
    scale = 1.0

    def __init__(self, mean):
        self.mean = mean

    def get(self):
        return self.mean


def _called(fn):
    return float(fn())


def _named(name):
    def fn():
        pass

    fn.__name__ = name
    return fn


REPLACED = {
    "tuple": (lambda x: (x, 1.0), _first),
    "named tuple": (Typed, _mean),
    "named tuple of a subclass": (lambda x: Pair(x, 1.0), _mean),
    "float of a subclass": (Float, lambda x: x + 0.0),
    "string": (str, float),
    "string of a subclass": (String, float),
    "decimal": (decimal.Decimal, float),
    "decimal of a subclass": (Decimal, float),
    "time of a subclass": (lambda x: Time(seconds=x), lambda t: t.total_seconds()),
    "complex": (complex, lambda x: x.real),
    "number of many digits": (lambda x: 10**5000 + int(x), lambda x: float(x % 100)),
    "range": (lambda x: range(int(x)), lambda r: float(len(r))),
    "slice": (lambda x: slice(int(x)), lambda s: float(s.stop)),
    "bytes": (lambda x: str(x).encode(), float),
    "bytearray": (lambda x: bytearray(str(x).encode()), float),
    "number of numpy": (np.float32, float),
    "unit of numpy": (
        lambda x: np.timedelta64(1, "s" if x == BEFORE else "m"),
        lambda t: BEFORE if t < np.timedelta64(2, "s") else AFTER,
    ),
    "frozen set": (lambda x: frozenset([x]), sum),
    "size": (lambda x: torch.Size([int(x)]), _first),
    "function": (lambda x: lambda: x, _called),
    "name of a function": (lambda x: _named(str(x)), lambda f: float(f.__name__)),
    "method": (lambda x: Holder(x).get, _called),
    "method of a dict": (lambda x: {"m": x}.get, lambda get: get("m")),
    "method of a tensor": (lambda x: torch.tensor(x).item, _called),
    "partial": (lambda x: functools.partial(max, x, 1.0), _called),
    "partial of a subclass": (lambda x: Partial(max, x, 1.0), _called),
    "getter": (
        lambda x: operator.itemgetter("ab"[x == AFTER]),
        lambda get: get({"a": BEFORE, "b": AFTER}),
    ),
    "distribution": (lambda x: dist.Normal(x, 1.0), lambda d: d.loc.item()),
    "exception": (ValueError, lambda e: e.args[0]),
    "static method": (lambda x: staticmethod(lambda: x), _called),
    "cached function": (lambda x: functools.lru_cache(lambda: x), _called),
    "function of numpy": (lambda x: np.vectorize(lambda _: x), lambda f: float(f(0))),
    "polynomial": (lambda x: np.poly1d([x]), lambda p: float(p(0.0))),
    "mapping proxy": (lambda x: types.MappingProxyType({"m": x}), lambda m: m["m"]),
    "view of a dict": (lambda x: {"m": x}.values(), sum),
    "generic alias": (lambda x: list[x], lambda t: t.__args__[0]),
}
STRANGE |= {f"another {name}": _replaced(*c) for name, c in REPLACED.items()}


# Instances and classes


class Node:
    pass


@dataclasses.dataclass
class Settings:
    mean: float = BEFORE


@dataclasses.dataclass(slots=True)
class Slotted:
    mean: float = BEFORE


class Slot:
    __slots__ = ("mean",)


class SlotAndDict(Slot):
    pass


class Infinite:
    """What is asked of it, it has."""

    mean = BEFORE

    def __getattr__(self, name):
        return 0.0


class Record:
    def __init__(self):
        self.data = {"mean": BEFORE}

    def __getattr__(self, name):
        return self.__dict__["data"][name]  # a KeyError for others


class Task(Holder):
    def depends_on(self):
        return "another task"


class Unready(Holder):
    @property
    def depends_on(self):
        raise RuntimeError("not yet")


class Callable(Holder):
    def __call__(self):
        return self.mean


class Super(Holder):
    def get(self):
        return super().get()


def _task_list():
    holder = Holder(BEFORE)
    holder.depends_on = ["data"]
    return holder


def _fresh(**attributes):
    """A class of its own, that may be written to."""
    return type("Local", (Holder,), {"mean": BEFORE, **attributes})


INSTANCES = {
    "attribute": (lambda: Holder(BEFORE), _mean, _attribute("mean")),
    "attribute by its name": (
        lambda: Holder(BEFORE),
        lambda h: getattr(h, "me" + "an"),
        _attribute("mean"),
    ),
    "name of an attribute": (
        lambda: [types.SimpleNamespace(a=BEFORE, b=AFTER), "a"],
        lambda v: getattr(v[0], v[1]),
        _item(1, "b"),
    ),
    "method": (lambda: Holder(BEFORE), lambda h: h.get(), _attribute("mean")),
    "method of the class above": (
        lambda: Super(BEFORE),
        lambda h: h.get(),
        _attribute("mean"),
    ),
    "call": (lambda: Callable(BEFORE), _called, _attribute("mean")),
    "dataclass": (Settings, _mean, _attribute("mean")),
    "attribute depends_on": (_task_list, _mean, _attribute("mean")),
    "method depends_on": (lambda: Task(BEFORE), _mean, _attribute("mean")),
    "attribute of a class": (
        lambda: _fresh()(1.0),
        lambda h: h.scale * BEFORE,
        lambda h: setattr(type(h), "scale", 1.5),
    ),
    "attribute of a base": (
        lambda: type("Derived", (_fresh(),), {}),
        _mean,
        lambda kind: setattr(kind.__mro__[1], "mean", AFTER),
    ),
    "bases of a class": (
        lambda: type("Derived", (_fresh(),), {}),
        _mean,
        lambda kind: setattr(kind, "__bases__", (_fresh(mean=AFTER),)),
    ),
    "class of an instance": (
        lambda: object.__new__(_fresh()),
        _mean,
        lambda thing: setattr(thing, "__class__", _fresh(mean=AFTER)),
    ),
    "method that is patched": (
        lambda: _fresh()(BEFORE),
        lambda h: h.get(),
        lambda h: setattr(type(h), "get", lambda self: AFTER),
    ),
}
ORDINARY |= {f"instance: {name}": _written(*c) for name, c in INSTANCES.items()}
ODD = {
    "module that is no string": (
        lambda: _fresh(__module__=None)(BEFORE),
        _mean,
        _attribute("mean"),
    ),
    "attributes without end": (Infinite, _mean, _attribute("mean")),
    "attributes of a table": (Record, _mean, lambda r: r.data.update(mean=AFTER)),
    "property that fails": (lambda: Unready(BEFORE), _mean, _attribute("mean")),
    "slots of a dataclass": (Slotted, _mean, _attribute("mean")),
    "slots": (lambda: _with_mean(Slot()), _mean, _attribute("mean")),
    "slots and a dict": (lambda: _with_mean(SlotAndDict()), _mean, _attribute("mean")),
    "mock": (
        lambda: mock.Mock(return_value=BEFORE),
        _called,
        _attribute("return_value"),
    ),
    "mock of a function": (
        lambda: mock.Mock(spec=_helper, return_value=BEFORE),
        _called,
        _attribute("return_value"),
    ),
    "mock of anything": (
        lambda: mock.MagicMock(return_value=BEFORE),
        _called,
        _attribute("return_value"),
    ),
}
STRANGE |= {f"instance: {name}": _written(*c) for name, c in ODD.items()}


@ordinary
def an_attribute_that_moves():
    outer, inner = Node(), Node()
    outer.child, outer.shift = inner, 5.0

    def change():
        del outer.shift
        inner.shift = 5.0

    return lambda: BEFORE + getattr(outer.child, "shift", 0.0), change


@ordinary
def a_name_of_an_attribute_of_a_class():
    class Local:
        low = 5.0

    def change():
        del Local.low
        Local.high = 5.0

    return lambda: BEFORE + getattr(Local, "high", 0.0), change


@ordinary
def a_property():
    values = {"mean": BEFORE}

    class Local:
        @property
        def mean(self):
            return values["mean"]

    thing = Local()
    return lambda: thing.mean, lambda: values.update(mean=AFTER)


@ordinary
def static_and_class_methods():
    values = {"a": 5.0, "b": 5.0}

    class Local:
        @staticmethod
        def one():
            return values["a"]

        @classmethod
        def other(cls):
            return values["b"]

    return lambda: Local.one() + Local().other(), lambda: values.update(b=10.0)


@ordinary
def a_descriptor():
    class Descriptor:
        held = BEFORE

        def __get__(self, instance, owner):
            return self.held

    descriptor = Descriptor()

    class Local:
        mean = descriptor

    return lambda: Local().mean, lambda: setattr(descriptor, "held", AFTER)


@strange
def attributes_made_on_demand():
    values = {"mean": BEFORE}

    class Local:
        def __getattr__(self, name):
            if name in values:
                return values[name]
            raise AttributeError(name)

    thing = Local()
    return lambda: thing.mean, lambda: values.update(mean=AFTER)


@strange
def a_default_of_a_dataclass():
    values = [BEFORE]

    @dataclasses.dataclass
    class Local:
        mean: float = dataclasses.field(default_factory=lambda: values[0])

    return lambda: Local().mean, lambda: values.__setitem__(0, AFTER)


@strange
def a_cached_property():
    values = [BEFORE]

    class Local:
        @functools.cached_property
        def mean(self):
            return values[0]

    thing = Local()

    def change():
        values[0] = AFTER
        vars(thing).clear()

    return lambda: thing.mean, change


@strange
def a_property_of_a_metaclass():
    values = {"mean": BEFORE}

    class Meta(type):
        @property
        def mean(cls):
            return values["mean"]

    class Local(metaclass=Meta):
        pass

    return lambda: Local.mean, lambda: values.update(mean=AFTER)


@strange
def an_attribute_of_a_metaclass():
    class Meta(type):
        mean = BEFORE

    class Local(metaclass=Meta):
        pass

    return lambda: Local.mean, lambda: setattr(Meta, "mean", AFTER)


@strange
def a_class_that_is_registered():
    class Base(metaclass=abc.ABCMeta):  # noqa: B024
        pass

    thing = Node()
    change = functools.partial(Base.register, Node)
    return lambda: AFTER if isinstance(thing, Base) else BEFORE, change


@strange
def subclasses_of_a_class():
    class Base:
        mean = 0.0

    class One(Base):
        mean = BEFORE

    def change():
        One.other = type("Two", (Base,), {"mean": 5.0})  # somewhere, for it to live

    return lambda: sum(kind.mean for kind in Base.__subclasses__()), change


class Mode(enum.Enum):
    PLAIN = 1
    OTHER = 2

    def mean(self):
        return TABLE["mean"]


@strange
def an_enum():
    mode = Mode.PLAIN

    def change():
        nonlocal mode
        mode = Mode.OTHER

    return lambda: BEFORE if mode is Mode.PLAIN else AFTER, change


@strange
def a_value_of_an_enum():
    mode = enum.Enum("Local", {"LIST": [BEFORE]}).LIST
    return lambda: mode.value[0], lambda: mode.value.__setitem__(0, AFTER)


@strange
def a_method_of_an_enum(patch):
    mode = Mode.PLAIN
    return lambda: mode.mean(), lambda: patch.setitem(TABLE, "mean", AFTER)


@strange
def an_attribute_of_an_enum(patch):
    mode = Mode.PLAIN
    patch.setattr(mode, "extra", BEFORE, raising=False)
    return lambda: mode.extra, lambda: patch.setattr(mode, "extra", AFTER)


@strange
def an_enum_by_its_class(patch):
    return lambda: Mode.PLAIN.mean(), lambda: patch.setitem(TABLE, "mean", AFTER)


@strange
def a_weak_reference():
    holder = Holder(BEFORE)
    weak = weakref.ref(holder)
    return lambda: weak().mean, lambda: setattr(holder, "mean", AFTER)


@strange
def a_weak_proxy():
    holder = Holder(BEFORE)
    weak = weakref.proxy(holder)
    return lambda: weak.mean, lambda: setattr(holder, "mean", AFTER)


@strange
def a_weak_proxy_of_the_dead():
    holder = Holder(BEFORE)
    holder.weak = weakref.proxy(Holder(1.0))
    return lambda: holder.mean, lambda: setattr(holder, "mean", AFTER)


@strange
def a_generic_function():
    @functools.singledispatch
    def mean(thing):
        return BEFORE

    return lambda: mean(1), lambda: mean.register(int, lambda thing: AFTER)


@strange
def a_cached_function_that_forgets():
    values = [BEFORE]

    @functools.lru_cache
    def mean():
        return values[0]

    def change():
        values[0] = AFTER
        mean.cache_clear()

    return lambda: mean(), change


# Modules


def _module(name="a_users_module"):
    return _with_mean(types.ModuleType(name))


@ordinary
def an_attribute_of_a_module():
    module = _module()
    return lambda: module.mean, lambda: setattr(module, "mean", AFTER)


@ordinary
def a_submodule():
    module = _module()
    module.sub = _module("a_users_module.sub")
    return lambda: module.sub.mean, lambda: setattr(module.sub, "mean", AFTER)


@ordinary
def a_module_from_a_file(path, patch):
    (path / "a_module_from_a_file.py").write_text(
        "VALUES = {'mean': 10.0}\n\ndef mean():\n    return VALUES['mean']\n"
    )
    patch.syspath_prepend(str(path))
    module = importlib.import_module("a_module_from_a_file")
    patch.delitem(sys.modules, "a_module_from_a_file")
    return lambda: module.mean(), lambda: module.VALUES.update(mean=AFTER)


@strange
def a_module_that_is_reloaded(path, patch):
    file = path / "a_module_that_is_reloaded.py"
    file.write_text("mean = 10.0\n")
    patch.syspath_prepend(str(path))
    module = importlib.import_module("a_module_that_is_reloaded")

    def change():
        file.write_text("mean = 15.0  # of another length\n")
        importlib.reload(module)

    return lambda: module.mean, change


@strange
def a_module_by_a_local_name():
    module = _module()

    def fn():
        local = module
        return local.mean

    return fn, lambda: setattr(module, "mean", AFTER)


@strange
def a_module_with_attributes_on_demand():
    module, values = types.ModuleType("a_users_module"), {"mean": BEFORE}
    module.__getattr__ = values.__getitem__
    return lambda: module.mean, lambda: values.update(mean=AFTER)


@strange
def a_module_of_a_subclass():
    values = {"mean": BEFORE}

    class Module(types.ModuleType):
        @property
        def mean(self):
            return values["mean"]

    holder = Holder(Module("a_users_module"))
    return lambda: holder.mean.mean, lambda: values.update(mean=AFTER)


MODULES = {
    "getattr": (_module, lambda m: getattr(m, "me" + "an"), _attribute("mean")),
    "getter": (_module, operator.attrgetter("mean"), _attribute("mean")),
    "instance": (
        lambda: Holder(_module()),
        lambda h: h.mean.mean,
        lambda h: setattr(h.mean, "mean", AFTER),
    ),
}
STRANGE |= {f"module by {name}": _written(*c) for name, c in MODULES.items()}


@strange
def all_modules(patch):
    patch.setitem(sys.modules, "a_users_module", _module())
    change = functools.partial(setattr, sys.modules["a_users_module"], "mean", AFTER)
    return lambda: sys.modules["a_users_module"].mean, change


@strange
def an_environment(patch):
    patch.setenv("A_MEAN", "10")
    return lambda: float(os.environ["A_MEAN"]), lambda: patch.setenv("A_MEAN", "15")


@strange
def an_environment_by_a_function(patch):
    patch.setenv("A_MEAN", "10")
    return lambda: float(os.getenv("A_MEAN")), lambda: patch.setenv("A_MEAN", "15")


@strange
def a_function_of_a_library_that_is_patched(patch):
    patch.setattr(torch, "sgn", lambda x: BEFORE)
    change = functools.partial(patch.setattr, torch, "sgn", lambda x: AFTER)
    return lambda: torch.sgn(1.0), change


@strange
def a_constant_of_a_library_that_is_patched(patch):
    patch.setattr(math, "tau", BEFORE)
    return lambda: math.tau, lambda: patch.setattr(math, "tau", AFTER)


@strange
def a_class_of_a_library_that_is_patched(patch):
    change = functools.partial(patch.setattr, dist, "Gumbel", dist.Cauchy)
    return lambda: AFTER if dist.Gumbel is dist.Cauchy else BEFORE, change


# Tensors and arrays


def _by_resizing(tensor):
    tensor.resize_(3)
    tensor.copy_(torch.tensor([1.0, AFTER, 0.0]))


def _pair():
    return torch.tensor([1.0, BEFORE])


IN_PLACE = {
    "in place": lambda t: t[1].add_(5),
    "by data": lambda t: operator.setitem(t.data, 1, AFTER),
    "by data as a whole": _attribute("data", torch.tensor([1.0, AFTER])),
    "by numpy": lambda t: operator.setitem(t.numpy(), 1, AFTER),
    "by a view": lambda t: t.view(2, 1)[1].fill_(AFTER),
    "by detach": lambda t: t.detach()[1].fill_(AFTER),
    "by its storage": lambda t: t.set_(torch.tensor([1.0, AFTER])),
    "by resizing": _by_resizing,
    "by out": lambda t: torch.add(torch.tensor([0.0, 5.0]), t, out=t),
    "by dlpack": lambda t: torch.from_dlpack(t)[1].fill_(AFTER),
}
ORDINARY |= {
    f"tensor: {name}": _written(_pair, lambda t: t[1].item(), change)
    for name, change in IN_PLACE.items()
}
NUMBERS = {
    "array below a tensor": (
        lambda: [array := np.array([1.0, BEFORE]), torch.from_numpy(array)],
        lambda v: v[1][1].item(),
        lambda v: operator.setitem(v[0], 1, AFTER),
    ),
    "dtype": (
        lambda: [torch.tensor(1.0)],
        lambda v: BEFORE if v[0].is_floating_point() else AFTER,
        _item(0, torch.tensor(1)),
    ),
    "shape": (
        lambda: [torch.zeros(10)],
        lambda v: float(len(v[0])),
        _item(0, torch.zeros(15)),
    ),
    "zeros of both signs": (
        lambda: torch.tensor(0.0),
        lambda t: 12.5 - math.copysign(2.5, t),
        lambda t: t.neg_(),
    ),
    "zeros of both signs, array": (
        lambda: np.array(0.0),
        lambda a: 12.5 - math.copysign(2.5, a),
        lambda a: a.fill(-0.0),
    ),
    "conjugate": (
        lambda: torch.tensor([BEFORE + 1j]).conj(),
        lambda t: t[0].real.item(),
        lambda t: t.mul_(1.5),
    ),
    "negative view": (
        lambda: torch.tensor([1 - BEFORE * 1j]).conj().imag,
        _first,
        lambda t: t.mul_(1.5),
    ),
    "bits of other sizes": (
        lambda: [torch.tensor([True]), torch.tensor(BEFORE, dtype=torch.bfloat16)],
        lambda v: v[1].item(),
        lambda v: v[1].mul_(1.5),
    ),
    "not a number": (
        lambda: [torch.tensor([math.nan, BEFORE])],
        lambda v: v[0][1].item(),
        lambda v: v[0][1].fill_(AFTER),
    ),
}
ORDINARY |= {f"numbers: {name}": _written(*c) for name, c in NUMBERS.items()}
STRANGE |= {
    f"numbers: {n}": _written(*NUMBERS[n]) for n in ("conjugate", "negative view")
}
for _name in ("conjugate", "negative view"):
    del ORDINARY[f"numbers: {_name}"]
HIDDEN = {
    "attribute": (
        lambda: _with_attribute(torch.tensor(1.0)),
        lambda t: t.extra,
        _attribute("extra"),
    ),
    "gradient": (
        lambda: _with_gradient(torch.tensor(1.0)),
        lambda t: t.grad.item(),
        lambda t: t.grad.fill_(AFTER),
    ),
    "flag": (
        lambda: torch.tensor(1.0),
        lambda t: AFTER if t.requires_grad else BEFORE,
        lambda t: t.requires_grad_(True),
    ),
    "base": (
        lambda: _pair()[:1],
        lambda t: t._base[1].item(),
        lambda t: t._base[1].fill_(AFTER),
    ),
    "base of an array": (
        lambda: np.array([1.0, BEFORE])[:1],
        lambda a: float(a.base[1]),
        lambda a: operator.setitem(a.base, 1, AFTER),
    ),
    "nested tensor": (
        lambda: torch.nested.nested_tensor([torch.tensor([BEFORE])]),
        lambda t: t[0].item(),
        lambda t: t[0].fill_(AFTER),
    ),
    "storage": (
        lambda: torch.tensor([BEFORE]).untyped_storage(),
        lambda s: torch.tensor([]).set_(s)[0].item(),
        lambda s: torch.tensor([]).set_(s).fill_(AFTER),
    ),
}
STRANGE |= {f"hidden: {name}": _written(*c) for name, c in HIDDEN.items()}


def _with_attribute(tensor):
    tensor.extra = BEFORE
    return tensor


def _with_gradient(tensor):
    tensor.grad = torch.tensor(BEFORE)
    return tensor


@strange
def a_typed_storage():
    tensor = torch.tensor([BEFORE])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        storage = tensor.storage()
    return lambda: float(storage.tolist()[0]), lambda: tensor.fill_(AFTER)


# Modules of torch


def _layer():
    layer = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
    layer.weight.fill_(BEFORE)
    layer.register_buffer("shift", torch.tensor(0.0))
    return layer


def _answer(layer):
    return layer(torch.ones(1)).item()


LAYERS = {
    "weight": (_layer, _answer, lambda m: m.weight.fill_(AFTER)),
    "buffer": (_layer, lambda m: BEFORE + m.shift.item(), lambda m: m.shift.add_(5)),
    "mode": (
        lambda: torch.nn.Sequential(_layer()),
        lambda m: BEFORE if m[0].training else AFTER,
        lambda m: m.eval(),
    ),
    "forward": (_layer, _answer, _attribute("forward", lambda x: 1.5 * x * BEFORE)),
    "hook": (
        _layer,
        _answer,
        lambda m: m.register_forward_hook(lambda module, args, out: 1.5 * out),
    ),
}
ORDINARY |= {f"layer: {name}": _written(*c) for name, c in LAYERS.items()}


@strange
def a_hook_of_all_modules(patch):
    layer, hooks = _layer(), torch.nn.modules.module._global_forward_hooks
    change = functools.partial(
        patch.setitem, hooks, -1, lambda module, args, out: 1.5 * out
    )
    return lambda: layer(torch.ones(1)).item(), change


def _scripted(make):
    def case():
        layer = _layer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = make(layer)
        return lambda: made(torch.ones(1)).item(), lambda: layer.weight.fill_(AFTER)

    return case


STRANGE["a_script"] = _scripted(torch.jit.script)
STRANGE["a_traced_module"] = _scripted(lambda m: torch.jit.trace(m, torch.ones(1)))


@strange
def a_function_of_autograd():
    values = {"mean": BEFORE}

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * values["mean"]

    change = functools.partial(values.update, mean=AFTER)
    return lambda: Scaled.apply(torch.ones(())).item(), change


# Settings


@strange
def a_default_dtype():
    return (
        lambda: BEFORE if torch.zeros(1).dtype is torch.float64 else AFTER,
        lambda: torch.set_default_dtype(torch.float32),
    )


@strange
def a_setting_of_a_library(patch):
    flags = torch.backends.mkldnn
    patch.setattr(flags, "a_users_flag", BEFORE, raising=False)
    change = functools.partial(patch.setattr, flags, "a_users_flag", AFTER)
    return lambda: torch.backends.mkldnn.a_users_flag, change


# What has no answer of its own: never told


def _file(path):
    (path / "mean").write_text("10")
    return path / "mean"


class Countdown(random.Random):
    pass


UNTOLD = {
    "an iterator": lambda path: iter([BEFORE]).__next__,
    "a generator": lambda path: (x for x in [BEFORE]).__next__,
    "a cycle": lambda path: itertools.cycle([BEFORE]),
    "a count": lambda path: functools.partial(next, itertools.count()),
    "an iterator as default": lambda path: lambda it=iter([BEFORE]): next(it),
    "a text in memory": lambda path: io.StringIO("10").read,
    "an open file": lambda path: _file(path).open().read,
    "a file by its name": lambda path: lambda: open(str(path / "mean")),  # noqa: SIM115
    "a file by its path": lambda path: _file(path).read_text,
    "a path": lambda path: lambda: path.stat(),
    "whether a file is there": lambda path: lambda: os.path.exists(path),
    "pathlib": lambda path: lambda: pathlib.Path(".").stat(),
    "a tensor from a file": lambda path: lambda: torch.load("a"),
    "a tensor from a file, load": lambda path: lambda: load_tensor("a"),
    "an array from a file": lambda path: lambda: np.load("a"),
    "an array from a file, load": lambda path: lambda: load_array("a"),
    "an array from text": lambda path: lambda: np.fromregex("a", "1", float),
    "an array from matlab": lambda path: lambda: scipy.io.loadmat("a"),
    "a tensor on a file": lambda path: lambda: torch.from_file("a"),
    "a storage on a file": lambda path: lambda: torch.UntypedStorage.from_file("a"),
    "the plates around": lambda path: lambda: get_plates(),
    "a subsample of the plates around": lambda path: (
        lambda: pyro.subsample(TENSOR, event_dim=0)
    ),
    "the time": lambda path: lambda: time.time(),
    "the time, of the function": lambda path: time.perf_counter,
    "the time, by numpy": lambda path: lambda: np.datetime64("now"),
    "the date": lambda path: lambda: datetime.datetime.now(),
    "random numbers": lambda path: lambda: random.random(),
    "a random generator": lambda path: random.Random(1).random,
    "a random generator of a subclass": lambda path: Countdown(1).random,
    "random numbers of numpy": lambda path: lambda: np.random.rand(),
    "random numbers of numpy, randn": lambda path: lambda: randn(),
    "a generator of numpy": lambda path: np.random.default_rng(1).normal,
    "an old generator of numpy": lambda path: np.random.RandomState(1).normal,
    "a generator of torch": lambda path: functools.partial(
        torch.rand, (), generator=torch.Generator()
    ),
    "the generator of torch": lambda path: lambda: torch.default_generator,
    "the random state of torch": lambda path: lambda: torch.get_rng_state(),
    "the random state of pyro": lambda path: lambda: pyro.util.get_rng_state(),
    "the random state of numpy": lambda path: lambda: np.random.get_state(),
    "the seed of torch": lambda path: lambda: torch.initial_seed(),
    "the seed of torch, initial_seed": lambda path: lambda: initial_seed(),
    "random numbers aside": lambda path: lambda: fork_rng(),
    "the store of pyro": lambda path: lambda: pyro.get_param_store(),
    "the store of pyro, get_param_store": lambda path: lambda: get_param_store(),
    "the store of pyro, by its module": lambda path: (
        lambda: poutine.runtime._PYRO_PARAM_STORE["loc"]
    ),
    "the frames": lambda path: lambda: sys._getframe(1).f_locals,
    "an identity": lambda path: lambda: id(TABLE) % 7,
    "a linked list that is very long": lambda path: functools.reduce(
        lambda rest, x: [rest, x], range(100_000)
    ),
    "a parameter with a gradient": lambda path: torch.nn.Linear(1, 1),
    "a module of pyro": lambda path: pyro.nn.PyroModule(),
    "a custom operation": lambda path: lambda: torch.ops.a_users.mean(1),
}


# The tests


@pytest.mark.parametrize("name", [*ORDINARY, *STRANGE])
def test_each_change_is_seen(name, monkeypatch, tmp_path):
    fn, change = run({**ORDINARY, **STRANGE}[name], monkeypatch, tmp_path)
    with torch.no_grad():  # where graphs make no difference
        before = taken(fn)
        found = fn()
        before_again = taken(fn)
        change()
        assert not is_same(before, fn)
        assert not is_same(before_again, fn)
        assert (found, fn()) == (BEFORE, AFTER), "the case itself"


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_functions_that_are_unchanged_are_the_same(
    name, monkeypatch, tmp_path
):
    fn, change = run(ORDINARY[name], monkeypatch, tmp_path)
    before = taken(fn)
    fn()
    assert is_same(before, fn)
    change()
    after = taken(fn)
    fn()
    assert is_same(after, fn)


@pytest.mark.parametrize("name", UNTOLD)
def test_what_has_no_answer_of_its_own_is_not_told(name, tmp_path):
    thing = UNTOLD[name](tmp_path)
    assert Snapshot.of(thing) is None
    assert Snapshot.of([1, {"inside": thing}]) is None


# Arguments


def test_arguments_are_told_by_their_content():
    one, zero = torch.ones(2), np.zeros(3)
    before = taken(one, {"a": (1, 2.0)}, zero)
    assert is_same(before, one, {"a": (1, 2.0)}, zero)
    for other in [
        (one, {"a": (1, 2)}, zero),
        (one, {"a": [1, 2.0]}, zero),
        (one, {"b": (1, 2.0)}, zero),
        (one, {"a": (1, 2.0), "b": 1}, zero),
        (one, {"a": (1, 2.0)}),
        (one, {"a": (1, 2.0)}, zero, None),
        (one, {"a": (1, 2.0)}, one),
        (zero, {"a": (1, 2.0)}, one),
        (torch.nn.Parameter(one, False), {"a": (1, 2.0)}, zero),
    ]:
        assert not is_same(before, *other)
    one.add_(1.0)
    assert not is_same(before, one, {"a": (1, 2.0)}, zero)


def test_equal_tensors_are_told_apart():
    """What was read with one of them may hold it, and it may be written to."""
    one, zero = torch.ones(2), np.zeros(3)
    before = taken(one, zero)
    assert not is_same(before, one.clone(), zero)
    assert not is_same(before, one, zero.copy())
    old = one.detach()
    one.data = torch.ones(2)
    assert not is_same(before, one, zero)
    assert old.data_ptr() != one.data_ptr()


def test_a_snapshot_asks_things_for_nothing():
    class Lazy:
        asked = 0

        @property
        def mean(self):
            type(self).asked += 1
            return 1.0

        def __len__(self):
            raise RuntimeError("not to be asked")

        __iter__ = __bool__ = __eq__ = __repr__ = __len__
        __hash__ = object.__hash__

    lazy = Lazy()
    before = taken(lambda: lazy.mean)
    assert is_same(before, lambda: lazy.mean) in (True, False)
    assert Lazy.asked == 0


def test_a_snapshot_knows_what_things_were():
    tensor, array = torch.zeros(3), np.zeros(3)
    snapshot = taken(tensor, array)
    for thing, number in ((tensor, tensor), (array, array)):
        thing[1] = 1.0
        assert not is_same(snapshot, tensor, array)
        number[1] = 0.0
        assert is_same(snapshot, tensor, array)


def test_a_snapshot_lets_things_go():
    tensor, array = torch.zeros(3), np.zeros(3)
    alive = [weakref.ref(tensor), weakref.ref(array)]
    snapshot = taken(tensor, array)
    del tensor, array
    gc.collect()
    assert snapshot is not None
    assert [ref() for ref in alive] == [None, None]


def test_a_graph_cannot_be_told():
    leaf = torch.ones(2, requires_grad=True)
    for thing in (leaf, 2 * leaf, torch.nn.Linear(1, 1)):
        assert Snapshot.of(thing) is None, "a graph can be gone through once"
        with torch.no_grad():
            assert is_same(taken(thing), thing)


def test_large_arrays_are_not_copied(monkeypatch):
    monkeypatch.setattr(unchanged, "LARGEST", 100)
    assert taken(torch.zeros(10)) is not None
    assert taken(torch.zeros(100)) is None
    assert taken(torch.zeros(1).expand(10**12)) is None
    assert taken(*(np.zeros(10) for _ in range(5))) is None


def test_copies_of_things_are_the_same():
    holder = copy.deepcopy(Holder(["a", {"a": 1}, (2.0, None)]))
    assert is_same(taken(holder), copy.deepcopy(holder))


# The settings that a run depends on


CONTEXTS = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "validation": lambda: pyro.validation_enabled(False),
    "plate": lambda: pyro.plate("p", 2),
    "plate, dim": lambda: pyro.plate("p", 2, dim=-3),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "device": lambda: torch.device("cpu"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_settings_are_a_part_of_it(name):
    with pyro.validation_enabled(True):
        before = taken(_helper)
        with CONTEXTS[name]():
            assert not is_same(before, _helper)
        assert is_same(before, _helper)


def test_other_autocasts_are_others():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = taken(_helper)
    with torch.autocast("cpu", dtype=torch.float16):
        assert not is_same(before, _helper)


def test_nothing_is_told_where_operations_are_watched():
    found = []

    def look(x):
        found.append(Snapshot.of(_helper))
        return x

    torch.vmap(look)(torch.ones(2))
    torch.func.grad(look)(torch.tensor(1.0))
    torch.jit.trace(look, torch.ones(2), check_trace=False)
    with torch.overrides.BaseTorchFunctionMode():
        look(0)
    with torch.utils._python_dispatch.TorchDispatchMode():
        look(0)
    assert found == [None] * 5


# Random numbers that are drawn apart


DRAWS = {
    "torch": lambda: torch.rand(()),
    "torch, normal": lambda: torch.randn(()),
    "numpy": lambda: np.random.rand(),
    "numpy, normal": lambda: np.random.randn(),
    "scipy": lambda: scipy.stats.norm.rvs(),
    "random": lambda: random.random(),
    "random, gauss": lambda: random.gauss(0.0, 1.0),
    "pyro": lambda: pyro.sample("x", dist.Normal(0.0, 1.0)),
}


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_noticed(name, before):
    """Some draw two Gaussian numbers at once, so that the second is waiting."""
    pyro.set_rng_seed(0)
    for _ in range(before):
        DRAWS[name]()
    found = []
    with outside_draws(found):
        DRAWS[name]()
    assert found != []
    found = []
    with outside_draws(found), torch.random.fork_rng():
        torch.rand(2)
    assert found == []
