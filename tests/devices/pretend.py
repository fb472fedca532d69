# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A device that is not there.

On a machine without a GPU, a :class:`Pretend` device stands for one: its tensors say
that they are elsewhere, must not be mixed with those of the CPU, and have random
numbers of their own. Their numbers are on the CPU, hidden.

torch has a guard for the device type ``lazy`` in every build, so that autograd and
``vmap`` work on its tensors; nothing else of it is used.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakIdKeyDictionary

# What makes the host wait for the device, by the name of the operation
_WAITING = """
    _local_scalar_dense equal nonzero nonzero_numpy argwhere masked_select unique_dim
    unique_consecutive unique_dim_consecutive _unique _unique2 bincount is_nonzero
    _linalg_check_errors _linalg_eigh _linalg_eigvals linalg_eig linalg_eigvals
    _linalg_svd linalg_lstsq linalg_lu multinomial
"""
WAITING = frozenset(_WAITING.split())
# Where indices may be on the CPU (which costs a copy)
_INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})


class _Away(Tensor):
    """A tensor of the device, until it says that it is an ordinary one."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{func} on a tensor of a device that is closed")


class Pretend(TorchDispatchMode):
    """A device that exists while this is active.

    :ivar device: what tensors on it say.
    :ivar read: for each time that the host waited for the device: the operation, and
        where in the library that was.
    :ivar written: the same for each copy from the CPU to the device.
    :ivar refused: the same for each operation that mixed devices, whoever took note.

    >>> with Pretend() as pretend:
    ...     a = torch.ones(3, device=pretend.device)
    ...     b = a + 2 * torch.tensor(1.0)
    ...     c = a.sum().item()
    >>> pretend.device, c, [what for what, where in pretend.read]
    (device(type='lazy', index=0), 3.0, ['_local_scalar_dense'])
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would be imported

    def __init__(self) -> None:
        super().__init__()
        self.device = torch.device("lazy:0")
        self.read: list[tuple[str, str]] = []
        self.written: list[tuple[str, str]] = []
        self.refused: list[tuple[str, str]] = []
        self._numbers: Any = WeakIdKeyDictionary()
        self._random = torch.Generator().manual_seed(1).get_state()
        self._patches = ExitStack()

    def __enter__(self) -> Pretend:
        for name, what in (
            ("is_available", lambda: True),
            ("is_initialized", lambda: True),
            ("device_count", lambda: 1),
            ("current_device", lambda: 0),
            ("manual_seed_all", self._seed),
            ("manual_seed", self._seed),
            ("get_rng_state", lambda device=0: self._random.clone()),
            ("set_rng_state", self._set_random),
        ):
            self._patches.enter_context(mock.patch.object(torch.cuda, name, what))
        self._patch_methods()
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        self._patches.callback(torch._C._set_only_lift_cpu_tensors, before)
        return super().__enter__()

    def _patch_methods(self) -> None:
        """What torch does in C++ with the storage of a tensor, or with its object."""
        as_subclass, make = Tensor.as_subclass, Tensor._make_subclass
        text, as_list = torch._tensor_str._str, Tensor.tolist

        def of_kind(tensor: Tensor, kind: type) -> Tensor:
            if not self.holds(tensor):
                return as_subclass(tensor, kind)
            alias = torch.ops.aten.alias(tensor)
            alias.__class__ = kind  # what is behind it has an object already
            return alias

        def made(
            cls: Any, data: Tensor, requires_grad: bool = False, **kwargs: Any
        ) -> Any:
            if not self.holds(data):
                return make(cls, data, requires_grad, **kwargs)
            alias = data.detach().requires_grad_(requires_grad)
            alias.__class__ = cls
            return alias

        def shown(tensor: Tensor, **kwargs: Any) -> str:
            if not self.holds(tensor):
                return text(tensor, **kwargs)
            return f"{text(self._numbers[tensor])[:-1]}, device='{self.device}')"

        def listed(tensor: Tensor) -> Any:
            return as_list(tensor.cpu() if self.holds(tensor) else tensor)

        for owner, name, function in (
            (Tensor, "as_subclass", of_kind),
            (Tensor, "_make_subclass", staticmethod(made)),
            (Tensor, "tolist", listed),
            (torch._tensor_str, "_str", shown),
        ):
            self._patches.enter_context(mock.patch.object(owner, name, function))

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._patches.close()

    def holds(self, thing: Any) -> bool:
        """Whether something is a tensor of this device."""
        return isinstance(thing, Tensor) and thing in self._numbers

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Forgets what has crossed before."""
        self.read.clear()
        self.written.clear()
        yield

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        tensors = list(_tensors((args, kwargs)))
        ours = [t for t in tensors if self.holds(t)]
        wanted = kwargs.get("device")
        here = bool(ours) if wanted is None else self._is_ours(wanted)
        if not ours and not here:
            return func(*args, **kwargs)
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        if name in ("copy_", "copy"):
            here = self.holds(args[0])
        elif ours:
            self._refuse_mixed(func, name, args, tensors)
        if name in ("_to_copy", "copy_", "copy"):
            source = tensors[-1] if name != "_to_copy" else tensors[0]
            if self.holds(source) != here:
                self._note(self.written if here else self.read, name)
        elif ours and self._waits(name, args, kwargs):
            self._note(self.read, name)
        if name == "copy_" and here and args[0].shape != self._numbers[args[0]].shape:
            # Its `data` was replaced
            self._numbers[args[0]] = torch.empty(args[0].shape, dtype=args[0].dtype)
        given = {id(self._numbers[t]): t for t in ours}
        call = [self._inside(thing) for thing in (args, kwargs)]
        with self._drawing(func, name, kwargs):
            result = func(*call[0], **call[1])

        if torch.Tag.inplace_view in func.tags:  # the shape that it says it has
            with torch._C._DisableTorchDispatch():
                args[0].data = self._away(result)
            return args[0]

        def outside(thing: Any) -> Any:
            if not isinstance(thing, Tensor):
                return thing
            return given[id(thing)] if id(thing) in given else self._away(thing)

        return tree_map(outside, result) if here else result

    def _is_ours(self, device: Any) -> bool:
        return torch.device(device).type == self.device.type

    def _inside(self, thing: Any) -> Any:
        def inside(part: Any) -> Any:
            return self._numbers[part] if self.holds(part) else part

        return tree_map(inside, thing)

    def _away(self, numbers: Tensor) -> Tensor:
        tensor = Tensor._make_wrapper_subclass(
            _Away,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=self.device,
        )
        tensor.__class__ = Tensor  # the library asks for the type of some
        self._numbers[tensor] = numbers
        return tensor

    def _refuse_mixed(
        self, func: Any, name: str, args: Any, tensors: list[Tensor]
    ) -> None:
        others = [t for t in tensors if not self.holds(t)]
        if torch.Tag.pointwise in func.tags or name in ("fill_", "where"):
            others = [t for t in others if t.dim()]
        if name in _INDEXING and self.holds(args[0]):
            kept = {id(t) for t in _tensors(args[1])}
            if any(id(t) in kept for t in others):
                self._note(self.written, name)
            others = [t for t in others if id(t) not in kept and t.dim()]
        if others:
            self._note(self.refused, name)
            raise RuntimeError(
                f"{name}: expected all tensors to be on the same device, but found "
                f"{self.device} and cpu, the latter of shape {tuple(others[0].shape)}"
            )

    def _waits(self, name: str, args: Any, kwargs: Any) -> bool:
        if name in _INDEXING and isinstance(args[1], (tuple, list)):
            masks = any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1]))
            fills = name != "index" and not args[2].dim()
            return masks and not fills
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        if name == "normal":
            return isinstance(args[1] if len(args) > 1 else None, Tensor)
        return name in WAITING

    def _note(self, found: list[tuple[str, str]], name: str) -> None:
        inside = [
            f"{frame.filename.rsplit('pyro_macro/', 1)[1]}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if "pyro_macro/" in frame.filename and "tests/" not in frame.filename
        ]
        found.append((name, " < ".join(inside[:-4:-1])))

    @contextmanager
    def _drawing(self, func: Any, name: str, kwargs: dict) -> Iterator[None]:
        """Random numbers of the device come from a generator of its own."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            yield
            return
        if kwargs.get("generator") is not None:
            self._note(self.refused, name)
            raise RuntimeError(
                f"{name}: expected a {self.device.type!r} device type for generator "
                "but found 'cpu'"
            )
        before = torch.get_rng_state()
        torch.set_rng_state(self._random)
        try:
            yield
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(before)

    def _seed(self, seed: int) -> None:
        self._random = torch.Generator().manual_seed(int(seed) + 1).get_state()

    def _set_random(self, state: Tensor, device: Any = 0) -> None:
        self._random = state.clone()


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, (tuple, list)):
        for part in thing:
            yield from _tensors(part)
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))
