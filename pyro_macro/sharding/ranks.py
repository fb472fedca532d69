# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The processes that work on one model, and sums over them."""

from __future__ import annotations

import weakref
import zlib
from typing import Any

import torch
import torch.distributed as distributed
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from pyro_macro.errors import PyroMacroError

ROOM = 32  # numbers that travel together with the check that ranks are in step


class Ranks:
    """The processes of a group, each of which runs the same program.

    Ranks are *in step*: they run the same statements on the same random state, so that
    what is no part of a sharded plate is the same everywhere. That it is so is checked
    in every sum, at no extra message.

    :ivar rank: which of them this process is.
    :ivar count: how many there are; 1 without ``torch.distributed``.
    :ivar last: the last number that was drawn for all of them.
    """

    def __init__(self, group: Any = None) -> None:
        # Weakly: the group is the user's, who destroys it in the end
        self._group = None if group is None else weakref.ref(group)
        self.last, self.rank, self.count = 0, 0, 1
        if group is not None:
            self.rank = distributed.get_rank(group)
            self.count = distributed.get_world_size(group)
        if self.rank < 0:
            raise PyroMacroError(
                "sharded_plate: this process is no member of the process group. Run "
                "the model on the group's members only, or give another group."
            )

    @staticmethod
    def of(group: Any = None) -> Ranks:
        """The ranks of a process group, by default of all processes.

        One object for each group, for it remembers what was drawn.
        """
        if distributed.is_available() and distributed.is_initialized():
            group = distributed.group.WORLD if group is None else group
        elif group is not None:
            raise PyroMacroError(
                f"sharded_plate: group is {group!r}, and torch.distributed is not "
                "initialized. Call torch.distributed.init_process_group first."
            )
        if group is None:
            return _ALONE
        if group not in _KNOWN:
            _KNOWN[group] = Ranks(group)
        return _KNOWN[group]

    def seed(self) -> int:
        """A number from the global random state, the same on all ranks in step."""
        if torch._C._get_tracing_state():
            raise PyroMacroError(
                "sharded_plate: torch.jit cannot trace draws in it, it would record "
                "one of them for good. Run without jit (jit_compile=False, Trace_ELBO)."
            )
        self.last = int(torch.randint(2**62, ()))
        return self.last

    def sum(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over ranks, element by element; gradients are summed likewise.

        With the loss of all ranks added up, each rank's gradient is that with respect
        to its own copy of a parameter: averaged over ranks, as by
        ``DistributedDataParallel``, it is that of the average loss.

        :param what: whose sum it is, for messages.
        """
        return shard_sum(tensor, self, what)

    def reduce(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over ranks, without gradients: one message, two if it is long."""
        numbers = tensor.detach().to(torch.float64, copy=True).flatten()
        count = numbers.numel()
        # Two unequal numbers cannot have both the sum and the sum of squares of equal
        # ones; below 2^20 all of these are exact.
        mark = zlib.crc32(f"{what} {count} {self.last}".encode()) % 2**20
        head = numbers.new_zeros(ROOM + 2)
        if count <= ROOM:
            head[:count] = numbers
        head[-2], head[-1] = mark, mark * mark
        self._all_reduce(head, what)
        if head[-2:].tolist() != [self.count * mark, self.count * mark * mark]:
            raise PyroMacroError(
                f"{what}: the ranks are out of step (this is rank {self.rank} of "
                f"{self.count}, with {count} numbers to be summed). Expected the same "
                "program on all of them: equal sizes of plates and numbers of draws, "
                "pyro.set_rng_seed with one seed on all ranks, and no draws on some "
                "ranks only."
            )
        if count > ROOM:
            self._all_reduce(numbers, what)
        else:
            numbers = head[:count]
        return numbers.to(tensor.dtype).reshape(tensor.shape)

    def _all_reduce(self, numbers: Tensor, what: str) -> None:
        try:
            group = None if self._group is None else self._group()
            distributed.all_reduce(numbers, group=group)
        except RuntimeError as error:
            raise PyroMacroError(
                f"{what}: rank {self.rank} of {self.count} could not reach the others, "
                f"one of which has probably ended: {error}"
            ) from error


_ALONE = Ranks()
_KNOWN: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()


def shard_sum(tensor: Tensor, ranks: Ranks, what: str) -> Tensor:
    """See :meth:`Ranks.sum`. Whoever watches operations on tensors sees it as one."""
    if has_torch_function_unary(tensor):
        return handle_torch_function(shard_sum, (tensor,), tensor, ranks, what)
    if ranks.count == 1:
        return tensor.view_as(tensor)
    return _Summed.apply(tensor, ranks, what)


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks, what: str) -> Tensor:
        ctx.ranks, ctx.what = ranks, what
        return ranks.reduce(tensor, what)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _Summed.apply(gradient, ctx.ranks, ctx.what), None, None
