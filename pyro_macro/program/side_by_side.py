# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Expressions that compute the same of other values, evaluated at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_macro.program.tape import CAPTURED, Expression, Leaf

Values = Mapping[Leaf, Tensor]


class SideBySide:
    """Expressions of the same key, as one.

    :param members: the expressions by name.
    :ivar names: in the order of the first dimension of what is computed.
    :ivar leaves: for each leaf of the expressions, that of each member.
    """

    def __init__(self, members: Mapping[str, Expression]) -> None:
        self.names = list(members)
        self.members = list(members.values())
        self.first = self.members[0]
        self.leaves = list(zip(*(m.leaves for m in self.members), strict=True))
        self._shared = [len(set(leaves)) == 1 for leaves in self.leaves]
        columns = zip(*(m.constants for m in self.members), strict=True)
        pairs = [_together(column) for column in columns]
        self._constants = [value for value, _ in pairs]
        self._constant_dims = [dim for _, dim in pairs]
        self._moved: dict[torch.device, list[Any]] = {}  # the same, by device

    def values(
        self,
        values: Values,
        worlds: frozenset[Leaf],
        instead: Mapping[int, Tensor] | None = None,
    ) -> list[Tensor]:
        """Of all leaves; members are a new dimension, behind that of worlds.

        :param instead: what to take for some leaves, by their place.
        """
        found = []
        instead = instead or {}
        for i, (leaves, shared) in enumerate(
            zip(self.leaves, self._shared, strict=True)
        ):
            if i in instead:
                found.append(instead[i])
                continue
            parts = [self._value(leaf, i, values) for i, leaf in enumerate(leaves)]
            if shared:
                found.append(parts[0])
            else:
                wide = [leaf in worlds for leaf in leaves]
                if any(wide) and not all(wide):
                    size = next(len(p) for p, w in zip(parts, wide, strict=True) if w)
                    parts = [
                        p if w else p.expand((size, *p.shape))
                        for p, w in zip(parts, wide, strict=True)
                    ]
                found.append(torch.stack(parts, 1 if any(wide) else 0))
        return found

    def _constants_near(self, given: Sequence[Any]) -> list[Any]:
        """The constants, those that members have of their own on the leaves' device.

        A number may be on any device, a column of numbers may not.
        """
        things = (*given, *self._constants)
        devices = {t.device for t in things if isinstance(t, Tensor)}
        away = next((d for d in devices if d.type != "cpu"), None)
        if away is None:
            return self._constants
        if away not in self._moved:
            pairs = zip(self._constants, self._constant_dims, strict=True)
            self._moved[away] = [c if dim is None else c.to(away) for c, dim in pairs]
        return self._moved[away]

    def _value(self, leaf: Leaf, member: int, values: Values) -> Tensor:
        if leaf[0] == CAPTURED:
            return self.members[member].captured[leaf]
        return values[leaf]

    def outputs(
        self,
        values: Values,
        worlds: frozenset[Leaf] = frozenset(),
        stacked: Sequence[Tensor] | None = None,
        own: frozenset[int] = frozenset(),
    ) -> list[Tensor]:
        """What the members compute.

        :param values: of all leaves.
        :param worlds: leaves whose values have one dimension more, in front: the same
            for all of them.
        :param stacked: what :meth:`values` returned, if it is known.
        :param own: leaves by place that have all dimensions, whatever the others have.
        :returns: shape ``(G,)`` and then that of the output; ``(W, G)`` where there
            are worlds.
        """
        given = self.values(values, worlds) if stacked is None else list(stacked)
        dims = [
            0 if i in own or not shared else None
            for i, shared in enumerate(self._shared)
        ]
        count = len(self.leaves)

        def one(*all_values: Any) -> tuple[Tensor, ...]:
            leaves, constants = all_values[:count], all_values[count:]
            return tuple(self.first.evaluate(leaves, constants))

        everything = [*given, *self._constants_near(given)]
        every = [*dims, *self._constant_dims]
        inner: Any = one
        if all(dim is None for dim in every):
            size = len(self.names)

            def inner(*all_values: Any) -> tuple[Tensor, ...]:
                return tuple(o.expand((size, *o.shape)) for o in one(*all_values))

        else:
            inner = torch.vmap(one, in_dims=tuple(every))
        if worlds:
            outer = [
                0 if i in own or any(leaf in worlds for leaf in leaves) else None
                for i, leaves in enumerate(self.leaves)
            ]
            in_dims = (*outer, *[None] * len(self._constants))
            if any(dim == 0 for dim in outer):
                return list(torch.vmap(inner, in_dims=in_dims)(*everything))
        return list(inner(*everything))


def _together(column: Sequence[Any]) -> tuple[Any, int | None]:
    """The constants of all members at one place, and their dimension of members."""
    first = column[0]
    if isinstance(first, Tensor):
        if all(c is first for c in column):
            return first, None
        stacked = torch.stack([c.detach() for c in column])
        return (first, None) if bool((stacked == stacked[:1]).all()) else (stacked, 0)
    if all(c == first for c in column):
        return first, None
    dtype = torch.long if isinstance(first, int) else torch.get_default_dtype()
    return torch.tensor(column, dtype=dtype), 0


def side_by_side(
    expressions: Mapping[str, Expression], values: Values
) -> list[SideBySide]:
    """Expressions in groups that can be evaluated at once.

    :param values: of the leaves: only values of the same shape stand side by side.
    """
    groups: dict[Any, dict[str, Expression]] = {}
    for name, expression in expressions.items():
        shapes = tuple(
            None if leaf[0] == CAPTURED else (values[leaf].shape, values[leaf].dtype)
            for leaf in expression.leaves
        )
        groups.setdefault((expression.key, shapes), {})[name] = expression
    return [SideBySide(group) for group in groups.values()]
