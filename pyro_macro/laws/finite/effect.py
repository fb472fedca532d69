# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""An effect as a function of a micro state, in a program of finite sites.

One run under all joint values of three blocks, each with a dimension of its own: the
sites that the micro state does not act on, the micro state, and what follows from it.
The product of all factors is the observational law; without those of the micro sites
it is the law under an intervention (the truncated factorization).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from torch import Size, Tensor

from pyro_macro.errors import Infeasible
from pyro_macro.laws.cut import Cut, over_grid
from pyro_macro.laws.finite.configurations import finite_values
from pyro_macro.laws.finite.joint import (
    AFTER,
    BEFORE,
    CELLS,
    STATE,
    JointValues,
    TooMany,
)
from pyro_macro.laws.finite.mixing import Mixing, closest_mixture
from pyro_macro.laws.finite.sums import NEVER
from pyro_macro.laws.moments import Moments
from pyro_macro.program.inner import unwrapped


class FiniteEffect:
    """The tables of a cause, an effect and other quantities.

    ``U`` joint values of what the micro state does not act on, ``X`` micro states, and
    ``D`` joint values of what follows.

    :param cut: the program.
    :raises TooMany: if these are more than can be enumerated.
    :ivar states: the micro states, site by site, shape ``(X, K)``.
    :ivar causes: the macro values that there are, ``(B, b)``, and in ``cause_of`` that
        of each micro state, ``(X,)``.
    :ivar effects: the values of the effect, ``(Y, e)``.
    :ivar joint: ``P(x, yb)``, shape ``(X, Y)``.
    :ivar kernel: ``P(yb | do(x))``, shape ``(X, Y)``.
    """

    def __init__(self, cut: Cut) -> None:
        self.cut, self.cause = cut, cut.cause
        (self.effect,) = cut.others["effect"]
        self.others = [q for r, g in cut.others.items() if r != "effect" for q in g]
        quantities = [self.cause, self.effect, *self.others]
        self.read = JointValues(cut, quantities)
        self._tabulate()

    @classmethod
    def is_finite(cls, cut: Cut) -> bool:
        """Whether all random sites that matter have finitely many values."""
        return all(
            cut.sites[n].deterministic or finite_values(cut.sites[n].fn) is not None
            for n in cut.relevant_sites
        )

    def _tabulate(self) -> None:
        size, weights = Size(self.read.size), self.read.weights
        cause, effect = self.read.quantities[:2]
        self.before = weights[BEFORE][:, 0, 0].expand(size[0])  # log P(u)
        self.state = weights[STATE][..., 0].expand(size[:2])  # log P(x | u)
        named = self.micro_values()
        flat = [named[n].reshape(size[1], -1).cpu() for n in self.cause.sites]
        self.states = torch.cat(flat, -1).double()
        self.causes, self.cause_of = distinct(cause[0, :, 0])
        self.effects, index = distinct(effect.flatten(0, 2))
        index = index.reshape(effect.shape[:3]).expand(size)
        after = weights[AFTER]
        self._after = after.expand(size)
        self._effect_of = index
        whole = float((self.before[:, None] + self.state).exp().sum())
        if abs(whole - 1) > 1e-4 or bool((after.exp().sum(-1) - 1).abs().max() > 1e-4):
            raise TooMany("the probabilities of its joint values do not add up to one")
        given = self.before[:, None] + self.state  # log P(u, x)
        self.joint = self.summed(given)
        self.kernel = self.summed(self.before[:, None].expand(size[:2]))

    def summed(self, weight: Tensor) -> Tensor:
        """``sum_u weight(u, x) P(yb | u, do(x))``, shape ``(X, Y)``."""
        size = self._after.shape
        cells = (weight.unsqueeze(-1) + self._after).exp()
        at = (
            torch.arange(size[1], device="cpu")[None, :, None] * len(self.effects)
            + self._effect_of
        )
        table = torch.zeros(
            size[1] * len(self.effects), dtype=torch.float64, device="cpu"
        )
        table.index_add_(0, at.flatten(), cells.flatten())
        return table.reshape(size[1], len(self.effects))

    @cached_property
    def by_context(self) -> Tensor:
        """``P(yb | u, do(x))``, shape ``(U, X, Y)``."""
        size = self._after.shape
        if size[0] * size[1] * len(self.effects) > CELLS:
            raise TooMany("the table of effects by what is upstream is too large")
        table = torch.zeros(
            (*size[:2], len(self.effects)), dtype=torch.float64, device="cpu"
        )
        return table.scatter_add_(-1, self._effect_of, self._after.exp())

    @cached_property
    def p_causes(self) -> Tensor:
        """``P(xb)``, shape ``(B,)``."""
        return self.macro(self.joint).sum(-1)

    @cached_property
    def macro_joint(self) -> Tensor:
        """``P(xb, yb)``, shape ``(B, Y)``."""
        return self.macro(self.joint)

    def macro(self, table: Tensor) -> Tensor:
        """A table over micro states, ``(X, ...)``, summed to macro values."""
        result = torch.zeros(
            (len(self.causes), *table.shape[1:]), dtype=torch.float64, device="cpu"
        )
        return result.index_add_(0, self.cause_of, table)

    def find(self, at: Tensor) -> Tensor:
        """The index of each macro value, shape ``(n, b)``; -1 if it cannot be."""
        same = torch.isclose(
            self.causes[None], at[:, None].double(), rtol=1e-6, atol=1e-9
        ).all(-1)
        same = same & (self.p_causes > 0)
        return torch.where(same.any(-1), same.byte().argmax(-1), -1)

    def effect_given(self, index: Tensor) -> Tensor:
        """``P(yb | xb)`` for the macro values of some indices, shape ``(n, Y)``."""
        rows = self.macro_joint[index]
        return rows / rows.sum(-1, keepdim=True)

    def effect_under(self, weights: Tensor) -> Tensor:
        """``P(yb | do(xb))`` for micro-realizations of shape ``(n, X)``."""
        return weights @ self.kernel

    def effect_adjusted(self, index: Tensor) -> Tensor:
        """The same under ``P(X | xb, b)``, ``b`` being as it is in each case.

        Theorem 4.1: ``sum_b P(b) sum_x P(x | xb, b) P(yb | do(x), b)``, shape
        ``(n, Y)``.

        :raises Infeasible: if some ``b`` excludes a macro value.
        """
        _, context_of = self.contexts
        count = int(context_of.max()) + 1
        members = torch.nn.functional.one_hot(context_of, count).double()  # (U, C)
        before = self.before.exp()
        seen = torch.einsum("uc,u,ux->cx", members, before, self.state.exp())
        p_context = before @ members
        result = torch.zeros(
            len(index), len(self.effects), dtype=torch.float64, device="cpu"
        )
        inside = (self.cause_of == index[:, None]).double()  # (n, X)
        for c in range(count):
            natural = seen[c] * inside
            total = natural.sum(-1, keepdim=True)
            if p_context[c] > 0 and bool((total <= 0).any()):
                raise Infeasible(
                    f"{self.cause.what}: some macro values cannot be reached where "
                    f"{[q.name for q in self.others]} is "
                    f"{self.contexts[0][c].tolist()}, so that there is no "
                    "P(X | value, given) there."
                )
            weight = (self.before + members[:, c].log())[:, None]
            effect = self.summed(weight.expand(self.state.shape))  # P(c, yb | do(x))
            result += natural / total.clamp(min=1e-300) @ effect
        return result

    def moments(self, weights: Tensor) -> Moments:
        """Of the effect under some laws, shape ``(n, Y)``."""
        mean = weights @ self.effects
        away = self.effects - mean.unsqueeze(1)  # (n, Y, e)
        return Moments(mean, (weights.unsqueeze(-1) * away).mT @ away)

    def reachable(self, index: int) -> Tensor:
        """The micro states with a macro value that their sites can have: ``(X,)``."""
        likely = self.state.amax(0) > NEVER / 2
        return (self.cause_of == index) & likely

    def inhibited(self, index: int) -> tuple[Tensor, Mixing]:
        """The mixture of micro states that comes closest to ``P(yb | xb)``.

        Of several, the closest to the natural one.

        :returns: which micro states it is of, shape ``(X,)``, and the mixture.
        """
        inside, which = self.reachable(index), torch.tensor([index], device="cpu")
        wanted, natural = self.effect_given(which)[0], self.natural(which)[0]
        return inside, closest_mixture(self.kernel[inside], wanted, natural[inside])

    def micro_values(self) -> dict[str, Tensor]:
        """The value of each micro site in each of ``X`` micro states."""
        return self.read.micro_values()

    def natural(self, index: Tensor) -> Tensor:
        """``P(x | xb)`` for the macro values of some indices, shape ``(n, X)``."""
        p = torch.where(self.cause_of == index[:, None], self.joint.sum(-1), 0.0)
        return p / p.sum(-1, keepdim=True)

    @cached_property
    def contexts(self) -> tuple[Tensor, Tensor]:
        """The values of the other quantities, and which each of ``U`` has.

        :returns: shapes ``(C, size)`` and ``(U,)``.
        """
        parts = self.read.quantities[2:]
        u = len(self.before)
        if not parts:
            return torch.zeros(1, 0, dtype=torch.float64, device="cpu"), torch.zeros(
                u, device="cpu"
            ).long()
        rows = [part[:, 0, 0].expand(u, -1) for part in parts]
        return distinct(torch.cat(rows, -1))

    def weights_of(self, law: Any, layout: Any, push: Any) -> Tensor | None:
        """What a law of the micro state gives each of them, shape ``(n, X)``.

        :param law: a distribution, batch shape ``(n, ...)``.
        :returns: ``None`` if it puts weight elsewhere.
        """
        law = over_grid(law, layout, self.read.depth)
        batch, n = law.batch_shape, law.batch_shape[0]
        stacked = {}
        for name, value in self.micro_values().items():
            # Dimensions: the states, then those of the batch, then its own
            own = value.dim() - 1 - len(self.cut.sites[name].event_shape)
            between = (1,) * (len(batch) - own)
            stacked[name] = value.reshape(value.shape[:1] + between + value.shape[1:])
        vectors = layout.stack(stacked)  # (X, ..., K)
        base = unwrapped(law)
        if isinstance(base, dist.Delta):
            point = push(base.v).double().expand(batch + law.event_shape)
            close = torch.isclose(point, vectors.double(), rtol=1e-6, atol=1e-9)
            log_probs = torch.where(close.all(-1), 0.0, NEVER).double()
        else:
            if not getattr(law.support, "is_discrete", False):
                return None
            vectors = vectors.to(getattr(law, "dtype", vectors.dtype))
            vectors = vectors.expand((len(self.states), *batch, vectors.shape[-1]))
            inside = law.support.check(vectors)
            safe = torch.where(inside.unsqueeze(-1), vectors, law.sample())
            log_probs = torch.where(inside, law.log_prob(safe).double(), NEVER)
        log_probs = log_probs.clamp(min=NEVER).reshape(len(self.states), n, -1)
        log_probs = log_probs.sum(-1).cpu()
        weights = log_probs.exp().mT
        if not torch.allclose(weights.sum(-1), weights.new_ones(n), atol=1e-6):
            return None
        return weights


def distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The different rows but for rounding, ascending, and which each one is."""
    scale = rows.abs().amax(0).clamp(min=1e-300)
    rounded = (rows / scale * 1e9).round()
    keys, index = rounded.unique(dim=0, return_inverse=True)
    first = torch.full((len(keys),), len(rows), dtype=torch.long, device="cpu")
    order = torch.arange(len(rows), device="cpu")
    first.scatter_reduce_(0, index, order, "amin")
    return rows[first], index
