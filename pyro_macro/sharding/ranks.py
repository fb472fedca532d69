# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The processes that work on one model, and sums over them."""

from __future__ import annotations

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

    :param group: the process group, by default of all processes; without
        ``torch.distributed`` this process alone.
    :ivar rank: which of them this process is.
    :ivar count: how many there are.
    """

    def __init__(self, group: Any = None) -> None:
        self.group, self.rank, self.count = group, 0, 1
        if distributed.is_available() and distributed.is_initialized():
            self.rank = distributed.get_rank(group)
            self.count = distributed.get_world_size(group)
        elif group is not None:
            raise PyroMacroError(
                f"sharded_plate: group is {group!r}, and torch.distributed is not "
                "initialized. Call torch.distributed.init_process_group first."
            )
        if self.rank < 0:
            raise PyroMacroError(
                "sharded_plate: this process is no member of the process group. Run "
                "the model on the group's members only, or give another group."
            )

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
        mark = zlib.crc32(f"{what} {count}".encode())
        mark = zlib.crc32(torch.get_rng_state().numpy().tobytes(), mark) % 2**20
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
            distributed.all_reduce(numbers, group=self.group)
        except RuntimeError as error:
            raise PyroMacroError(
                f"{what}: rank {self.rank} of {self.count} could not reach the others, "
                f"one of which has probably ended: {error}"
            ) from error


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
