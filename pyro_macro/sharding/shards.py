# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""How the slots of a plate are split over ranks, and noise that does not depend on it.

The plate is cut into blocks, of bounds that follow from its size alone. Each rank has
some whole blocks, one after the other, and the random numbers of a block come from a
seed of its own: who draws it, and beside which others, makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Size, Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.sharding.ranks import Ranks

BLOCKS = 128  # at least, where there are as many slots
LARGEST = 2**14  # slots of a block, about, where there are more blocks


class Shards:
    """A plate that is split over ranks.

    :param name: of the plate.
    :param size: the number of its slots, on all ranks together.
    :param ranks: over which it is split.
    :ivar start: the first slot of this rank.
    :ivar stop: the one behind its last.
    :ivar blocks: the numbers of its blocks.
    :ivar sizes: how many slots each of them has.
    """

    def __init__(self, name: str, size: int, ranks: Ranks) -> None:
        self.name, self.size, self.ranks = name, size, ranks
        count = min(size, max(BLOCKS, -(-size // LARGEST)))
        if count < ranks.count:
            raise PyroMacroError(
                f"sharded_plate {name!r}: {size} slots cannot be split over "
                f"{ranks.count} ranks. Expected at most {count} ranks, each of which "
                "gets some; use a plain plate for so few."
            )
        first, last = (r * count // ranks.count for r in (ranks.rank, ranks.rank + 1))
        bounds = [b * size // count for b in range(first, last + 1)]
        self.blocks = range(first, last)
        self.sizes = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
        self.start, self.stop = bounds[0], bounds[-1]

    @property
    def here(self) -> int:
        """The number of slots of this rank."""
        return self.stop - self.start

    def __repr__(self) -> str:
        return (
            f"plate {self.name!r} (slots {self.start} to {self.stop - 1} of "
            f"{self.size})"
        )

    def indices(self, device: str | torch.device | None = None) -> Tensor:
        """The slots of this rank, as indices."""
        return _indices(self.start, self.stop, str(device or torch.empty(0).device))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of what each has, element by element; differentiable."""
        return self.ranks.sum(tensor, f"plate {self.name!r} of {self.size} slots")

    def sums(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums over ranks of several tensors of one dtype, in one message."""
        flat = self.sum(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = flat.split([tensor.numel() for tensor in tensors])
        return [p.reshape(t.shape) for p, t in zip(parts, tensors, strict=True)]

    def seeds(self) -> Iterator[int]:
        """A seed for each block of this rank, of one draw.

        They come from one number of the global random state, the same on all ranks.
        """
        if torch._C._get_tracing_state():
            raise PyroMacroError(
                f"sharded_plate {self.name!r}: torch.jit cannot trace draws in it, it "
                "would record one of them for good. Run without jit "
                "(jit_compile=False, Trace_ELBO)."
            )
        base = int(torch.randint(2**62, ()))
        for block in self.blocks:
            yield _mixed(base, block)

    def normal(self, shape: Size, axis: int, like: Tensor) -> Tensor:
        """Standard normal numbers, for each slot the same however these are split.

        :param shape: of the whole; :attr:`here` along ``axis``.
        :param like: a tensor with the dtype and device of the numbers.
        """
        noise = torch.empty(shape, dtype=like.dtype, device=like.device)
        generator = torch.Generator(noise.device)
        parts = noise.split(self.sizes, axis)
        for seed, part in zip(self.seeds(), parts, strict=True):
            generator.manual_seed(seed)
            if part.is_contiguous():
                part.normal_(generator=generator)
            else:
                part.copy_(torch.empty_like(part).normal_(generator=generator))
        return noise


@lru_cache(maxsize=8)
def _indices(start: int, stop: int, device: str) -> Tensor:
    return torch.arange(start, stop, device=device)


def _mixed(base: int, block: int) -> int:
    """A seed for a block.

    The generator of the CPU takes the low 32 bits of a seed. Each step is a bijection
    on these, so that the blocks of one draw differ: the finalizer of MurmurHash3.
    """
    low = (base + block) % 2**32
    low = ((low ^ (low >> 16)) * 0x85EBCA6B) % 2**32
    low = ((low ^ (low >> 13)) * 0xC2B2AE35) % 2**32
    low ^= low >> 16
    return (base >> 32) << 32 | low
