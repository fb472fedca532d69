# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Micro states of finite support, given their macro value: exact."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.laws.base import ENUMERABLE, EnumerableLaw, MicroFibre
from pyro_macro.laws.finite.sums import (
    NEVER,
    SumTree,
    choose,
    cumulative,
    log_sum,
    scatter_codes,
    states_on,
)


@dataclass(frozen=True, eq=False)
class Tables:
    """Independent parts, given configurations of what is upstream of them.

    Configurations come in three grades: ``G`` that all slots of a plate share, ``S``
    that each slot has for itself, and ``C`` of each group of parts in it. Shapes:

    :ivar parts: log probabilities of the values, ``(B, G, Bs, S, O, C, E, V)``: for
        ``B`` independent micro states, of ``Bs`` slots with ``O`` groups of ``E``
        parts with ``V`` values.
    :ivar values: the values themselves, ``(O, E, V, w)``: a part has ``w`` elements.
    :ivar places: where these are in the micro state, ``(Bs, O, E, w)``.
    :ivar codes: what a value counts in a sum, ``(B, Bs, O, E, V)``; negative if no
        state on the fibre has it.
    :ivar allowed: the sums of the states on the fibre, ``(B, Bs, R)``.
    :ivar together: log weights of the configurations, ``(B, G)``.
    :ivar slots: the same, ``(B, G, Bs, S)``.
    :ivar groups: the same, ``(B, G, Bs, S, O, C)``.
    :ivar batch: the shape of which ``B`` is the size.
    """

    parts: Tensor
    values: Tensor
    places: Tensor
    codes: Tensor
    allowed: Tensor
    together: Tensor
    slots: Tensor
    groups: Tensor
    batch: Size


class FiniteLaw(EnumerableLaw):
    """``P(X | pi(X) = value)`` for sites of finite support, ancestors summed out.

    The macro value is a condition on a sum over parts (each element for itself, or
    the whole micro state as one part), so that a tree over the parts answers: log
    probabilities going up, draws going down.

    :param tables: the parts and the configurations.
    :param fibre: the micro states with the macro value.
    :param dtype: of the draws.
    :param method: how the law is known, in words.
    """

    def __init__(
        self, tables: Tables, fibre: MicroFibre, dtype: torch.dtype, method: str
    ) -> None:
        self.tables, self._fibre, self.dtype = tables, fibre, dtype
        self.method = method
        super().__init__(tables.batch, Size([tables.places.numel()]))

    @constraints.dependent_property(is_discrete=True, event_dim=1)
    def support(self) -> MicroFibre:  # type: ignore[override]
        return self._fibre

    @property
    def cost(self) -> str:
        sums = self.tables.allowed.shape[-1]
        return (
            f"tables of {self.tables.parts.numel():,} entries and sums to {sums - 1:,} "
            f"once a run, {self.event_shape[0]:,} random numbers a draw"
        )

    @cached_property
    def _inner(self) -> SumTree:
        """The sums within the groups, a row for each ``(B, G, Bs, S, O, C)``."""
        t, most = self.tables, self.tables.allowed.shape[-1] - 1
        codes = t.codes[:, None, :, None, :, None]
        size = min(int(t.codes.max()), most) + 1
        parts = scatter_codes(t.parts, codes, max(size, 1))
        return SumTree(parts.flatten(0, 5), most)

    @cached_property
    def _weighted_groups(self) -> Tensor:
        """With the configuration: ``(B, G, Bs, S, O, C, R)``."""
        t = self.tables
        inner = self._inner.total.unflatten(0, t.groups.shape)
        return inner + t.groups.unsqueeze(-1)

    @cached_property
    def _outer(self) -> SumTree:
        """The sums over the groups, a row for each ``(B, G, Bs, S)``."""
        groups = log_sum(self._weighted_groups, -2)
        return SumTree(groups.flatten(0, 3), self.tables.allowed.shape[-1] - 1)

    @cached_property
    def _sums(self) -> Tensor:
        """Log probabilities of the allowed sums: ``(B, G, Bs, S, R)``."""
        t = self.tables
        total = self._outer.total.unflatten(0, t.slots.shape)
        allowed = t.allowed[:, None, :, None, : total.shape[-1]]
        return torch.where(allowed, total, NEVER)

    @cached_property
    def _slots(self) -> Tensor:
        return log_sum(self._sums) + self.tables.slots  # (B, G, Bs, S)

    @cached_property
    def _together(self) -> Tensor:
        return log_sum(self._slots).sum(-1) + self.tables.together  # (B, G)

    @cached_property
    def _log_total(self) -> Tensor:
        return log_sum(self._together)  # (B,)

    @property
    def log_total(self) -> Tensor:
        """The log probability of the macro value, shape ``batch``."""
        return self._log_total.reshape(self.tables.batch)

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            rows = self._rows(self.tables.batch, shape, self.tables.parts)
            step = max(1, (1 << 23) // self.tables.parts[0, 0, :, 0, :, 0].numel())
            vector = torch.cat([self._draw(b) for b in rows.split(step)])
        return vector.reshape(shape + self.event_shape)

    def _draw(self, b: Tensor) -> Tensor:
        """One draw for each of some rows ``0..B-1``, shape ``(T, K)``."""
        t = self.tables
        _, n_g, n_bs, n_s, n_o, n_c, n_e, _ = t.parts.shape
        device = b.device

        def pick(logits: Tensor, rows: Tensor) -> Tensor:
            if logits.shape[-1] == 1:
                return torch.zeros_like(rows)
            return choose(cumulative(logits).flatten(0, -2), rows)

        # Rows of ever finer tables: (T,), (T, Bs), (T, Bs, O)
        row = b * n_g + pick(self._together, b)
        row = row.unsqueeze(-1) * n_bs + torch.arange(n_bs, device=device)
        row = row * n_s + pick(self._slots, row)
        sums = pick(self._sums, row)
        shared = self._outer.split(row.flatten(), sums.flatten())
        shared = shared.unflatten(0, row.shape)  # (T, Bs, O)
        group = row.unsqueeze(-1) * n_o + torch.arange(n_o, device=device)
        if n_c > 1:
            given = self._weighted_groups.flatten(0, 4).mT  # (rows, R, C)
            size = given.shape[1]
            group = group * n_c + pick(given, group * size + shared)
        codes = self._inner.split(group.flatten(), shared.flatten())
        codes = codes.unflatten(0, group.shape)  # (T, Bs, O, E)

        part = group.unsqueeze(-1) * n_e + torch.arange(n_e, device=device)
        index = self._values_of(codes, b, part)
        index = index[..., None, None].expand(index.shape + (1, t.values.shape[-1]))
        values = t.values.expand(index.shape[:2] + t.values.shape)
        values = values.gather(-2, index).squeeze(-2)  # (T, Bs, O, E, w)
        vector = torch.empty(len(b), t.places.numel(), device=device, dtype=self.dtype)
        vector[:, t.places.flatten()] = values.flatten(1).to(self.dtype)
        return vector

    @cached_property
    def _value_of(self) -> Tensor | None:
        """The value that has each code, if there is only one: ``(B, Bs, O, E, R)``."""
        codes = self.tables.codes
        size = int(codes.max()) + 1
        one_hot = scatter_codes(
            torch.zeros_like(codes, dtype=torch.float64), codes, size
        )
        if (one_hot > 0.5).any():  # the logarithm of two values or more
            return None
        index = torch.arange(codes.shape[-1], device=codes.device).expand(codes.shape)
        inverse = codes.new_zeros(codes.shape[:-1] + (size + 1,))
        inverse.scatter_(-1, torch.where(codes < 0, size, codes), index)
        return inverse[..., :size]

    def _values_of(self, codes: Tensor, b: Tensor, part: Tensor) -> Tensor:
        """Draws of the parts' values given their codes, all ``(T, Bs, O, E)``.

        :param part: the row of each part's table.
        """
        if self._value_of is not None:
            known = _chosen(self._value_of, b)
            return known.gather(-1, codes.unsqueeze(-1)).squeeze(-1)
        own, logits = _chosen(self.tables.codes, b), self.tables.parts.flatten(0, -2)
        logits = torch.where(own == codes.unsqueeze(-1), logits[part], NEVER)
        rows = torch.arange(part.numel(), device=part.device).reshape(part.shape)
        return choose(cumulative(logits).flatten(0, -2), rows)

    def _indices(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """The values that the parts of states have, and whether they have any.

        :param vector: shape ``(T, K)``.
        :returns: two of shape ``(T, Bs, O, E)``.
        """
        parts = vector[:, self.tables.places.flatten()]
        parts = parts.reshape((len(vector),) + self.tables.places.shape)
        values = self.tables.values.to(vector.dtype)
        same = (parts.unsqueeze(-2) == values).all(-1)  # (T, Bs, O, E, V)
        return same.byte().argmax(-1), same.any(-1)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.expand(shape + self.event_shape)
        b = self._rows(self.tables.batch, shape, value)
        joint = self._log_joint(b, value.reshape(-1, self.event_shape[0]))
        result = joint - self._log_total[b]
        result = torch.where(joint > NEVER / 2, result, -torch.inf)
        return result.reshape(shape).to(value.dtype)

    def _log_joint(self, b: Tensor, vector: Tensor) -> Tensor:
        """Log probabilities of states, and of being on the fibre: shape ``(T,)``."""
        t = self.tables
        index, known = self._indices(vector)
        codes = _chosen(t.codes, b).gather(-1, index.unsqueeze(-1)).squeeze(-1)
        sums = codes.sum((-1, -2))  # (T, Bs)
        size = t.allowed.shape[-1]
        met = (known & (codes >= 0)).all(-1).all(-1) & (sums < size)
        at = sums.clamp(0, size - 1).unsqueeze(-1)
        met = (met & t.allowed[b].gather(-1, at).squeeze(-1)).all(-1)

        parts = _chosen(t.parts, b)
        index = index[:, None, :, None, :, None, :, None]
        index = index.expand(parts.shape[:-1] + (1,))
        own = parts.gather(-1, index).squeeze(-1).sum(-1)  # (T, G, Bs, S, O, C)
        groups = log_sum(own + t.groups[b]).sum(-1)
        slots = log_sum(groups + t.slots[b]).sum(-1)
        joint = log_sum(slots + t.together[b])
        return torch.where(met, joint, NEVER)

    @cached_property
    def _states(self) -> Tensor | None:  # type: ignore[override]
        """All states of the fibre; ``None`` if there are many, or they differ."""
        t = self.tables
        codes = t.codes.flatten(1)
        if (codes != codes[:1]).any() or (t.allowed != t.allowed[:1]).any():
            return None
        n_bs, n_o, n_e, _ = t.places.shape
        own, allowed = t.codes[0].flatten(1, 2), t.allowed[0]
        states = own.new_zeros(1, 0)
        for slot in range(n_bs):  # few: the states of their product are few
            more = states_on(own[slot], allowed[slot], ENUMERABLE)
            if more is None or len(states) * len(more) > ENUMERABLE:
                return None
            left = states.repeat_interleave(len(more), 0)
            states = torch.cat([left, more.repeat(len(states), 1)], -1)
        index = states.reshape(len(states), n_bs, n_o, n_e, 1, 1)
        index = index.expand(index.shape[:-1] + t.values.shape[-1:])
        values = t.values.expand((len(states), n_bs) + t.values.shape)
        values = values.gather(-2, index).flatten(1)
        vector = torch.empty_like(values, dtype=self.dtype)
        vector[:, t.places.flatten()] = values.to(self.dtype)
        return vector

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        if self._states is None:
            raise NotImplementedError("the mean of a large fibre: draw from the law")
        states = self.enumerate_support()
        return (self.log_prob(states).exp().unsqueeze(-1) * states).sum(0)


def _chosen(table: Tensor, b: Tensor) -> Tensor:
    """Some rows of a table; a single one is not copied."""
    return table.expand(len(b), *table.shape[1:]) if len(table) == 1 else table[b]
