# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Tables of finite sites: how they are computed, multiplied and summed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import opt_einsum
import torch
from torch import Tensor

from pyro_macro.laws.finite.sums import NEVER
from pyro_macro.program.mechanisms import Mechanism
from pyro_macro.program.side_by_side import SideBySide
from pyro_macro.program.tape import Leaf

_LOGARITHMS = "pyro.ops.einsum.torch_log"


@dataclass(frozen=True, eq=False)
class Factor:
    """Logarithms of a table, with named axes behind worlds and plates.

    :ivar axes: names of sites.
    :ivar table: shape ``worlds + plates + (number of values of each)``.
    """

    axes: tuple[str, ...]
    table: Tensor


class FiniteGroup:
    """Finite sites whose tables are computed in the same way."""

    def __init__(
        self,
        mechanisms: Sequence[Mechanism],
        flags: tuple[bool, ...],
        supports: Sequence[Sequence[Tensor]],
    ) -> None:
        self.mechanisms, self.flags, self.supports = mechanisms, flags, supports
        self.group = SideBySide({m.name: m.expression for m in mechanisms})
        self.slots = [i for i, is_axis in enumerate(flags) if is_axis]
        self.sizes = tuple(len(s) for s in supports[0])
        self.count = math.prod(self.sizes)
        pairs = zip(self.group.leaves, flags, strict=True)
        others = [tuple(leaves) for leaves, axis in pairs if not axis]
        self.others: tuple[tuple[Leaf, ...], ...] = tuple(others)

    @property
    def names(self) -> list[str]:
        return self.group.names

    def outputs(
        self,
        values: Mapping[Leaf, Tensor],
        worlds: frozenset[Leaf],
        size: int | None,
        shapes: Sequence[torch.Size],
    ) -> list[Tensor]:
        """What the members compute under all values of their axes.

        :param shapes: of the parents that are axes.
        :returns: shape ``(W * C, G)`` and then that of the output.
        """
        grid = torch.arange(self.count)
        repeat = 1 if size is None else size
        instead: dict[int, Tensor] = {}
        step = self.count
        for place, (slot, shape) in enumerate(zip(self.slots, shapes, strict=True)):
            step //= self.sizes[place]
            digits = grid // step % self.sizes[place]
            columns = [support[place][digits] for support in self.supports]
            column = torch.stack(columns, 1)  # (C, G)
            column = column.repeat(repeat, 1)
            column = column.reshape(column.shape + (1,) * len(shape))
            instead[slot] = column.expand((*column.shape[:2], *shape))
        wide = {leaf: values[leaf] for leaf in values}
        for leaf in worlds:
            wide[leaf] = values[leaf].repeat_interleave(self.count, 0)
        marked = worlds or frozenset({("", "")})  # there is a dimension in front
        given = self.group.values(wide, worlds, instead)
        if not instead and not worlds:
            outputs = self.group.outputs(wide, frozenset(), given)
            return [o.unsqueeze(0) for o in outputs]
        return self.group.outputs(wide, marked, given, frozenset(instead))


def contracted(factors: Sequence[Factor], axes: Sequence[str], depth: int) -> Tensor:
    """The product of factors, summed over all axes but some.

    :param axes: those that are left.
    :param depth: how many dimensions of plates there are; those to the left of them
        are worlds.
    :returns: logarithms, shape ``worlds + plates`` and then the axes.
    """
    lead = max([depth, *(f.table.dim() - len(f.axes) for f in factors)])
    numbers: dict[Any, int] = {}
    sizes = [1] * lead
    arguments: list[Any] = []
    for factor in factors:
        own = factor.table.dim() - len(factor.axes)
        labels, shape = [], []
        for i, size in enumerate(factor.table.shape):
            label: Any = i - own if i < own else factor.axes[i - own]
            if i < own and size == 1:
                continue
            if i < own:
                sizes[i - own] = size
            labels.append(numbers.setdefault(label, len(numbers)))
            shape.append(size)
        arguments += [factor.table.reshape(shape), labels]
    batch = [dim for dim in range(-lead, 0) if sizes[dim] > 1]
    out = [numbers[dim] for dim in batch] + [numbers[name] for name in axes]
    joint = opt_einsum.contract(*arguments, out, optimize="auto", backend=_LOGARITHMS)
    # What is impossible stays finite: laws after it are laws all the same
    joint = joint.clamp(min=NEVER)
    return joint.reshape((*sizes, *joint.shape[len(batch) :]))


def certain(index: Tensor, count: int) -> Tensor:
    """Logarithms of a distribution on one of some values."""
    hot = torch.nn.functional.one_hot(index, count).bool()
    return (~hot).double() * NEVER
