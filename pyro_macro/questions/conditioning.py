# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of a program given that a weighted sum of its sites has a value."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from torch import Tensor
from tqdm.auto import tqdm

from pyro_macro.errors import Infeasible, UnsupportedLaw
from pyro_macro.laws.cut import Cut
from pyro_macro.laws.elements import bounds
from pyro_macro.laws.quantity import Quantity
from pyro_macro.program.inner import is_deterministic, unwrapped
from pyro_macro.questions.sampling import Sampler

CELLS = 1 << 23  # numbers in a pool, about
POOLS = 200  # of proposals, at most
SINGLE_POOLS = 50  # where proposals are made one by one
TRIED = 10  # pools, after which it shows whether that will do
POLE = 0.1  # a log density that rises by more towards an end is one without bound


def given_total(
    sampler: Sampler,
    at: Tensor,
    quantities: Sequence[Quantity],
    total: Quantity | None = None,
    split: Mapping[str, Tensor] | None = None,
) -> list[Tensor] | None:
    """Draws given that a weighted sum of micro sites has a value.

    All elements but one are drawn as they are, that one makes up the rest, and the
    draw is kept with a probability that is proportional to its density there.

    :param at: macro values, shape ``(n,)``.
    :param total: what has these values; the cause by default.
    :param split: values that some sites have for what follows from them, while
        their own values are the ones that are returned.
    :returns: for each quantity, shape ``(n, count, size)``; ``None`` where hardly
        any are kept.
    :raises UnsupportedLaw: if no element can make up the rest.
    :raises Infeasible: if the macro value is out of reach.
    """
    total = sampler.cut.cause if total is None else total
    pinned = _Pinned(sampler.cut, total, at)
    fn = Split(split or {})(sampler.model[0])
    marks: list[Tensor] = []
    kept: list[list[Tensor]] = [[] for _ in quantities]
    best = torch.full((len(at), 1), -torch.inf, dtype=torch.float64, device="cpu")
    vectorized = sampler.is_vectorized(sampler.model[0], None)
    propose = _side_by_side if vectorized else _one_by_one
    with sampler.unseen():
        bar = tqdm(
            disable=not sampler.progress, total=sampler.count, desc="Conditioning"
        )
        most = POOLS if vectorized else SINGLE_POOLS
        for _ in range(most):
            weight, drawn = propose(sampler, fn, pinned, quantities)
            best = torch.maximum(best, weight.amax(-1, keepdim=True))
            marks.append(weight - torch.rand(weight.shape, device="cpu").double().log())
            for part, own in zip(kept, drawn, strict=True):
                part.append(own)
            # Of all proposals so far, against the largest weight so far
            have = int((torch.cat(marks, -1) > best).sum(-1).min())
            bar.update(min(have, sampler.count) - bar.n)
            if have >= sampler.count:
                break
            if len(marks) == TRIED and have * most < sampler.count * TRIED:
                break  # there is no hope
        bar.close()
    if not bool(best.isfinite().all()):
        bad = at[~best.squeeze(-1).isfinite()][0].item()
        raise Infeasible(
            f"{total.what}: the macro value {bad:g} cannot be reached, or "
            "hardly ever is. Choose one that the sites can have."
        )
    if have < sampler.count:
        return None
    order = (torch.cat(marks, -1) > best).byte().argsort(-1, descending=True)
    order = order[:, : sampler.count]
    return [
        torch.cat(part, 1).gather(1, order.unsqueeze(-1).expand(-1, -1, q.size))
        for part, q in zip(kept, quantities, strict=True)
    ]


def _side_by_side(
    sampler: Sampler,
    fn: Callable[..., Any],
    pinned: _Pinned,
    quantities: Sequence[Quantity],
) -> tuple[Tensor, list[Tensor]]:
    """A pool of proposals: log weights ``(n, N)``, and what is asked for."""
    width = sum(s.value.numel() for s in sampler.cut.sites.values())
    room = max(64, CELLS // (width * len(pinned.at)))
    lead = (len(pinned.at), min(4 * sampler.count, room))
    with pinned.along(sampler.depth + 1):
        values = sampler.values(sampler.within(fn, lead))
    weight = pinned.log_weight.reshape(lead[0], -1)[:, : lead[1]].cpu()
    return weight, [q.of(values, lead, sampler.depth).cpu() for q in quantities]


def _one_by_one(
    sampler: Sampler,
    fn: Callable[..., Any],
    pinned: _Pinned,
    quantities: Sequence[Quantity],
) -> tuple[Tensor, list[Tensor]]:
    weights: list[Tensor] = []
    drawn: list[list[Tensor]] = [[] for _ in quantities]
    for value in pinned.at:
        for _ in range(sampler.count):
            with pinned.alone(value):
                values = sampler.values(sampler.within(fn, ()))
            weights.append(pinned.log_weight.reshape(()).cpu())
            for part, q in zip(drawn, quantities, strict=True):
                part.append(q.of(values).cpu())
    shape = (len(pinned.at), sampler.count)
    parts = [torch.stack(part).reshape(*shape, -1) for part in drawn]
    return torch.stack(weights).reshape(shape), parts


class Split(Messenger):
    """Gives what follows from some sites other values than these sites have.

    A trace around it sees the sites' own values (a single-world intervention).
    """

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    # After a handler outside, such as trace, has seen the site
    def _pyro_post_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if name in self.values:
            own: Any = msg["value"]
            msg["value"] = self.values[name].to(own).expand(own.shape)


class _Pinned(Messenger):
    """Lets one element of the last micro site make up the rest of the macro value."""

    def __init__(self, cut: Cut, total: Quantity, at: Tensor) -> None:
        super().__init__()
        self.cut, self.quantity, self.at = cut, total, at
        self.place: int | None = None  # of the element that makes up the rest
        thing, layout = total.thing, total.layout
        rows: Tensor | None = torch.ones(
            1, layout.size, dtype=torch.float64, device="cpu"
        )
        if not isinstance(thing, str):
            rows = thing.aggregation.within(layout).weights(
                torch.zeros(layout.size, dtype=torch.float64, device="cpu")
            )
        if rows is None or total.size != 1:
            raise UnsupportedLaw(
                f"{total.what}: its sites have causes in common with the effect, "
                "and P(effect | cause) is then known by draws for a single weighted "
                "sum. Expected Sum, Mean or Linear over all plates; or hold the "
                "common causes with `poutine.condition`."
            )
        self.row = rows[0]
        weights = dict(zip(layout.names, self.row.split(layout.sizes), strict=True))
        self.last = [n for n in cut.sites if n in weights and weights[n].any()][-1]

    def along(self, depth: int) -> _Pinned:
        """With the macro values in a dimension left of ``depth`` others."""
        self._value = self.at.reshape((-1,) + (1,) * depth)
        return self

    def alone(self, value: Tensor) -> _Pinned:
        self._value = value
        return self

    def __enter__(self) -> Any:
        # What comes later has no weight
        sites = [self.cut.sites[n] for n in self.quantity.sites]
        self.values = {s.name: torch.zeros_like(s.expanded(s.value)) for s in sites}
        return super().__enter__()

    def _pyro_post_sample(self, msg: Message) -> None:
        name = msg["name"]
        if name not in self.quantity.sites:
            return
        value: Any = msg["value"]
        self.values[name] = value
        if name == self.last:
            self._pin(msg)

    def _pin(self, msg: Any) -> None:
        layout = self.quantity.layout
        base = unwrapped(msg["fn"])
        if base.event_shape or is_deterministic(msg):
            raise UnsupportedLaw(
                f"{self.quantity.what}: micro site {self.last!r} is "
                f"{type(base).__name__} (deterministic, reparametrized, or a vector "
                "whose elements depend on one another), so that no element makes up "
                "the rest of a macro value by itself. Expected independent elements: "
                "pass the model without `reparam`, or name another site last."
            )
        state = layout.stack(self.values).double()  # (..., K)
        own, row = layout.place(self.last), self.row.to(state.device)
        if self.place is None:
            weights = row[own.start : own.stop]
            spread = self._spread(base, msg["value"], weights)
            spread = torch.where(self._has_pole(base, msg["value"]), 0.0, spread)
            if not bool(spread.any()):
                raise UnsupportedLaw(
                    f"{self.quantity.what}: the density of micro site {self.last!r} is "
                    "unbounded at an end of its support, so that no draw given the "
                    "macro value can be accepted. Name a site with a bounded density "
                    "last."
                )
            self.place = own.start + int(spread.argmax())
        place = self.place
        # The macro values stand left of all dimensions that plates may take
        value = self._value.to(state.device)
        while value.dim() > max(state.dim() - 1, 0) and value.shape[-1] == 1:
            value = value.squeeze(-1)
        rest = value - state @ row + state[..., place] * row[place]
        state = state.expand(rest.shape + state.shape[-1:]).clone()
        state[..., place] = rest / row[place]
        drawn = msg["value"]
        pinned = layout.unstack(state)[self.last]
        pinned = pinned.reshape(drawn.shape).to(drawn.dtype)
        inside = base.support.check(pinned)
        # What is off the support is not accepted, and must not stop the run
        safe = torch.where(inside, pinned, drawn)
        self.values[self.last] = msg["value"] = safe
        log_probs = torch.where(inside, base.log_prob(safe).double(), -torch.inf)
        stacked = layout.stack({**self.values, self.last: log_probs})
        self.log_weight = stacked[..., place].double()

    def _has_pole(self, base: Any, value: Tensor) -> Tensor:
        """Which elements of the last site have a density without bound."""
        found = torch.zeros_like(value, dtype=torch.bool)
        if getattr(base.support, "is_discrete", False):
            return self._elements(found.double()).bool().any(0)
        for end, near, far in zip(
            bounds(base, value), (1e-30, -1e-16), (1e-20, -1e-10), strict=True
        ):
            if bool(end.isfinite().all()):
                ends = [(end + step).expand(value.shape) for step in (near, far)]
                rise = base.log_prob(ends[0]) - base.log_prob(ends[1])
                found = found | (rise > POLE)
        return self._elements(found.double()).bool().any(0)

    def _elements(self, found: Tensor) -> Tensor:
        """What belongs to the elements of the last site, in order, ``(draws, l)``."""
        layout = self.quantity.layout
        own = layout.place(self.last)
        stacked = layout.stack({**self.values, self.last: found})
        return stacked[..., own.start : own.stop].reshape(-1, len(own)).double()

    def _spread(self, base: Any, value: Tensor, weights: Tensor) -> Tensor:
        """How far each element of the last site usually is from its mean."""
        try:
            variance = base.variance.expand(value.shape)
        except NotImplementedError:
            variance = torch.ones_like(value)
        spread = self._elements(variance).nan_to_num(posinf=0).mean(0)
        return spread * weights.square()
