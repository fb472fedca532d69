# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""From which sites does a value come?

Pyro's own provenance tracking wraps every tensor in a subclass, which models that
copy tensors, call ``.item()`` or branch on a value defeat. Here the tensors stay
what they are: a :class:`torch.overrides.TorchFunctionMode` watches the operations
and notes the names of the sites on their results.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, ValuesView
from typing import Any

import torch
from torch.distributions import Distribution, Transform
from torch.overrides import TorchFunctionMode

NOTHING: frozenset[str] = frozenset()

# Operations that turn the content of a tensor into a Python or NumPy object.
# Whatever runs afterwards may depend on it, so it is held to depend on it.
ESCAPES = frozenset(
    {
        "item",
        "tolist",
        "numpy",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__array__",
        "is_nonzero",
        "equal",
        "allclose",
    }
)

# Continuous operations that are affine on pieces: their derivative does not show, and
# no finite number of probes is sure to meet, that they have kinks. (What turns floats
# into integers or truth values is found by the dtype of its result.) A sum over the
# ranks of a sharded plate is linear, but one rank alone cannot take its derivative.
_KINKED = """
    abs absolute __abs__ celu clamp clamp_max clamp_min clip elu floor
    floor_divide fmax fmin fmod frac ceil hardshrink hardsigmoid hardswish
    hardtanh huber_loss kthvalue l1_loss leaky_relu max max_pool1d max_pool2d
    max_pool3d maximum median min minimum amax amin aminmax cummax cummin msort
    nanmedian nanquantile prelu quantile relu relu6 remainder __mod__ __rmod__
    round rrelu selu sgn sign smooth_l1_loss softshrink sort threshold topk
    trunc fix __floordiv__ shard_sum
"""
_KINKS = frozenset(_KINKED.split())
# Operations that, without a dimension, are on all elements at once: those of several
# worlds, if these are side by side in the tensor.
_REDUCTIONS = """
    sum mean prod max min all any std var median norm argmax argmin nansum nanmean
    count_nonzero
"""
_WHOLE = frozenset(_REDUCTIONS.split())
# What holds no tensors, and is met in every call
_ATOMS = frozenset(
    {type(None), bool, int, float, str, torch.Size, torch.dtype, torch.device, slice}
)
MARK = "\0"  # what no name of a site begins with
NOISE = MARK + "noise"
_serial = itertools.count()


def site_names(sources: frozenset[str]) -> frozenset[str]:
    """The names of sites among the sources."""
    return frozenset(name for name in sources if not name.startswith(MARK))


def kinks(sources: frozenset[str]) -> frozenset[str]:
    """The operations with kinks, on values that carry noise, among the sources."""
    found = (name for name in sources if name.startswith(MARK))
    return frozenset(name[1:] for name in found if name != NOISE)


class Tracker(TorchFunctionMode):
    """Notes, while it is active, which sites each tensor is computed from.

    Sources are the names of sites, and behind a :data:`MARK`: :data:`NOISE` where a
    value carries noise, and operations with kinks that were applied to such values.

    >>> with Tracker() as tracker:
    ...     a = tracker.mark(torch.tensor(1.0), {"a"})
    ...     b = tracker.mark(torch.tensor(2.0), {"b"})
    ...     c = (a + 1) * torch.ones(3)
    >>> sorted(tracker.sources(c)), sorted(tracker.sources([b, c]))
    (['a'], ['a', 'b'])
    """

    def __init__(self) -> None:
        super().__init__()
        # An attribute of its own, so that nested trackers do not disturb each other
        self._key = f"_pyro_macro_sources_{next(_serial)}"
        self.escaped: frozenset[str] = NOTHING
        # What was met by an operation on all dimensions of a tensor
        self.whole: frozenset[str] = NOTHING

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        sources = self._collect(args)
        if kwargs:
            sources |= self._collect(kwargs.values())
        result = func(*args, **kwargs)
        if sources:
            name = getattr(func, "__name__", "")
            if NOISE in sources and (name in ESCAPES or has_kinks(name, result)):
                sources |= {MARK + name.strip("_")}
            if name in ESCAPES:
                self.escaped |= sources
                return result
            if name in _WHOLE and _is_on_all(args, kwargs):
                self.whole |= site_names(sources)
            if name == "broadcast_tensors":
                # What a tensor is broadcast with does not change what it is; and where
                # nothing is to be done, it is the very same object
                for part, tensor in zip(result, tensors_in(args), strict=True):
                    self._note(part, self._collect((tensor,)))
                return result
            self._note(result, sources)
            in_place = name == "__setitem__" or (
                name.endswith("_") and not name.endswith("__")
            )
            if in_place and args:
                self._note(args[0], sources)
                if isinstance(args[0], torch.Tensor) and args[0]._base is not None:
                    self._note(args[0]._base, sources)
        return result

    def mark(self, value: Any, names: Iterable[str]) -> Any:
        """The same value, as a new tensor object, with ``names`` as all its sources."""
        if not isinstance(value, torch.Tensor):
            return value
        alias = value.view_as(value)
        setattr(alias, self._key, frozenset(names))
        return alias

    def sources(self, thing: Any) -> frozenset[str]:
        """The sites that a tensor, a distribution or a container is computed from."""
        return self._collect((thing,))

    def _note(self, result: Any, sources: frozenset[str]) -> None:
        if isinstance(result, torch.Tensor):
            if sources:  # it may be a tensor of the user's, which is none of ours
                its = getattr(result, self._key, NOTHING)
                setattr(result, self._key, its | sources)
        elif isinstance(result, (tuple, list)):
            for part in result:
                self._note(part, sources)

    def _collect(self, things: Iterable[Any]) -> frozenset[str]:
        found, key = NOTHING, self._key
        tensors: list[torch.Tensor] = []
        _gather(things, tensors, None)
        for tensor in tensors:
            its = getattr(tensor, key, NOTHING)
            if its and its is not found:
                found = found | its if found else its
        return found


def tensors_in(thing: Any) -> list[torch.Tensor]:
    """The tensors that a distribution, a container or a tensor is made of."""
    found: list[torch.Tensor] = []
    _gather((thing,), found, None)
    return found


def _gather(
    things: Iterable[Any], found: list[torch.Tensor], seen: set[int] | None
) -> None:
    """:param seen: what was visited: a transform and its inverse hold each other."""
    for thing in things:
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif type(thing) in _ATOMS:
            continue
        elif isinstance(thing, (tuple, list, set, frozenset, ValuesView)):
            _gather(thing, found, seen)
        elif isinstance(thing, dict):
            _gather(thing.values(), found, seen)
        elif isinstance(thing, (Distribution, Transform)):
            seen = set() if seen is None else seen
            if id(thing) not in seen:
                seen.add(id(thing))
                _gather(vars(thing).values(), found, seen)


def _is_on_all(args: Any, kwargs: Any) -> bool:
    """Whether a reduction goes over all dimensions, of a tensor that has some."""
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].dim():
        return False
    if kwargs.get("dim") is not None or kwargs.get("axis") is not None:
        return False
    return len(args) == 1


def has_kinks(name: str, result: Any) -> bool:
    """Whether an operation, by its name and result, is affine on pieces at most."""
    return name.rstrip("_") in _KINKS or name in _KINKS or _is_discrete(result)


def _is_discrete(result: Any) -> bool:
    return isinstance(result, torch.Tensor) and not (
        result.is_floating_point() or result.is_complex()
    )
