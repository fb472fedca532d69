# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of quantities from programs, many at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_macro.errors import Infeasible, UnsupportedLaw
from pyro_macro.laws.cut import Cut, Model
from pyro_macro.laws.quantity import Quantity
from pyro_macro.program.inner import is_deterministic, preserved_params, unwrapped
from pyro_macro.program.substitution import apart

POOLS = 200  # of proposals, at most
TRIALS = 3  # whether draws act on one another


class Sampler:
    """Draws quantities from a program and from its interventions.

    :param model: the program, with its arguments.
    :param cut: the same, as it was read.
    :param count: the number of draws.
    :param seed: the user's random state is not touched.
    :param progress: whether a bar is shown where draws are made one by one.
    """

    def __init__(
        self, model: Model, cut: Cut, count: int, seed: int, progress: bool = True
    ) -> None:
        self.model, self.cut, self.count, self.seed = model, cut, count, seed
        self.progress, self.depth = progress, cut.depth
        self._known: dict[int, tuple[bool, Any]] = {}  # by id, and what has it
        self._calls = 0

    def draw(
        self,
        fn: Callable[..., Any],
        quantities: Sequence[Quantity],
        grid: int | None = None,
        count: int | None = None,
    ) -> list[Tensor]:
        """Draws from ``fn``, the program or an intervention on it.

        All at once where the program is vectorized, one by one otherwise.

        :param grid: the length of a grid of macro values along the leftmost dimension;
            only of vectorized programs.
        :returns: for each quantity, shape ``(grid, count, size)``, without the first
            where there is no grid.
        """
        count = self.count if count is None else count
        lead = (count,) if grid is None else (grid, count)
        vectorized = self.is_vectorized(fn, grid)
        with self.unseen():
            if vectorized:
                values = self._values(self._within(fn, lead))
                return [q.of(values, lead, self.depth) for q in quantities]
            rows = []
            for _ in tqdm(range(count), disable=not self.progress, desc="Drawing"):
                values = self._values(self._within(fn, ()))
                rows.append([q.of(values) for q in quantities])
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def before_and_after(
        self, fn: Callable[..., Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Micro states, natural and as an intervention has made them."""
        cause = self.cut.cause
        if not self.is_vectorized(fn, None):
            raise self._refused(f"the noise of {cause.name!r}")
        with self.unseen():
            values = self._values(self._within(fn, (self.count,)))
        micro = values[f"{cause.name}__micro"]
        before = cause.layout.unstack(micro)
        return before, {name: values[name] for name in cause.sites}

    def _refused(self, what: str) -> UnsupportedLaw:
        return UnsupportedLaw(
            f"{self.cut.cause.what}: the program cannot be drawn from many times at "
            "once (it adds up, or branches on, all dimensions of a tensor), which "
            f"{what} needs here. Write it so that it runs inside a plate to the left "
            "of its own."
        )

    def unseen(self) -> ExitStack:
        stack = ExitStack()
        stack.enter_context(preserved_params())
        # Other numbers each time: a two-sample test needs independent samples
        stack.enter_context(apart(self.seed + self._calls, torch.device("cpu")))
        self._calls += 1
        stack.enter_context(torch.no_grad())
        return stack

    def _within(
        self, fn: Callable[..., Any], lead: Sequence[int]
    ) -> Callable[[], poutine.Trace]:
        args, kwargs = self.model[1:]

        def run() -> poutine.Trace:
            with ExitStack() as stack:
                for i, size in enumerate(reversed(lead)):
                    dim = -self.depth - 1 - i
                    stack.enter_context(pyro.plate(f"_lead_{i}", size, dim=dim))
                return poutine.trace(fn).get_trace(*args, **kwargs)

        return run

    @staticmethod
    def _values(run: Callable[[], poutine.Trace]) -> Mapping[str, Any]:
        return {n: node["value"] for n, node in run().nodes.items() if "value" in node}

    def is_vectorized(self, fn: Callable[..., Any], grid: int | None) -> bool:
        """Whether draws side by side do not act on one another.

        A model that adds up *all* dimensions of a tensor adds up its particles, too.
        All draws but the last are changed; the last must not notice.
        """
        if id(fn) not in self._known:
            try:
                with self.unseen():
                    known = all(self._last_is_apart(fn, grid) for _ in range(TRIALS))
            except Exception:  # whatever it is, a single run will tell
                known = False
            self._known[id(fn)] = known, fn
        return self._known[id(fn)][0]

    def _last_is_apart(self, fn: Callable[..., Any], grid: int | None) -> bool:
        count, dim = 6, -self.depth - 1
        lead = (count,) if grid is None else (grid, count)
        one: Any
        other: Any
        again: Any
        one, other = (self._within(fn, lead)() for _ in range(2))
        random = {
            name: node
            for name, node in one.nodes.items()
            if node["type"] == "sample" and not site_is_subsample(node)
        }
        mixed = {}
        for name, node in random.items():
            event = len(node["fn"].event_shape)
            value, fresh = node["value"], other.nodes[name]["value"]
            if node["is_observed"] or not _has(value, dim - event, count):
                continue
            mixed[name] = torch.cat(
                [
                    fresh.narrow(dim - event, 0, count - 1),
                    value.narrow(dim - event, count - 1, 1),
                ],
                dim - event,
            )
        again = self._within(poutine.condition(fn, data=mixed), lead)()
        for trace in (one, again):
            trace.compute_log_prob()

        def same(mine: Tensor, yours: Tensor, event: int) -> bool:
            if mine.shape != yours.shape:
                return False
            if _has(mine, dim - event, count):
                mine, yours = (t.select(dim - event, -1) for t in (mine, yours))
            return torch.allclose(mine.double(), yours.double(), 1e-4, 1e-6)

        for name, node in random.items():
            match = again.nodes[name]
            if not same(node["log_prob"], match["log_prob"], 0):
                return False
            if is_deterministic(node):
                # Its event dimensions may be said to be all of them
                frames = node["cond_indep_stack"]
                depth = max((-(f.dim or 0) for f in frames), default=0)
                event = max(0, node["value"].dim() - depth)
                if not same(node["value"], match["value"], event):
                    return False
        return True

    def given_total(
        self,
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
        kept: list[list[Tensor]] = [[] for _ in quantities]
        marks: list[Tensor] = []
        total = self.cut.cause if total is None else total
        pinned = _Pinned(self.cut, total, at)
        if not self.is_vectorized(self.model[0], None):
            raise self._refused("P(effect | cause)")
        have = torch.zeros(len(at), dtype=torch.long)
        best = torch.full((len(at), 1), -torch.inf, dtype=torch.float64)
        size = 4 * self.count
        with self.unseen():
            lead = (len(at), size)
            run = self._within(pinned(Split(split or {})(self.model[0])), lead)
            bar = tqdm(disable=not self.progress, total=self.count, desc="Conditioning")
            for _ in range(POOLS):
                values = self._values(run)
                weight = pinned.log_weight.reshape(len(at), -1)[:, :size]
                best = torch.maximum(best, weight.amax(-1, keepdim=True))
                marks.append(weight - torch.rand(weight.shape).double().log())
                for part, q in zip(kept, quantities, strict=True):
                    part.append(q.of(values, lead, self.depth))
                # Of all proposals so far, against the largest weight so far
                have = (torch.cat(marks, -1) > best).sum(-1)
                bar.update(min(int(have.min()), self.count) - bar.n)
                if int(have.min()) >= self.count:
                    break
            bar.close()
        if not bool(best.isfinite().all()):
            bad = at[~best.squeeze(-1).isfinite()][0].item()
            raise Infeasible(
                f"{total.what}: the macro value {bad:g} cannot be reached, or "
                "hardly ever is. Choose one that the sites can have."
            )
        if int(have.min()) < self.count:
            return None
        order = (torch.cat(marks, -1) > best).byte().argsort(-1, descending=True)
        order = order[:, : self.count]
        return [
            torch.cat(part, 1).gather(1, order.unsqueeze(-1).expand(-1, -1, q.size))
            for part, q in zip(kept, quantities, strict=True)
        ]


def _has(tensor: Tensor, dim: int, size: int) -> bool:
    """Whether a tensor has some size along a dimension, counted from the right."""
    return tensor.dim() >= -dim and tensor.shape[dim] == size


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
        thing, layout = total.thing, total.layout
        rows: Tensor | None = torch.ones(1, layout.size, dtype=torch.float64)
        if not isinstance(thing, str):
            rows = thing.aggregation.within(layout).weights(
                torch.zeros(layout.size, dtype=torch.float64)
            )
        if rows is None or total.size != 1:
            raise UnsupportedLaw(
                f"{total.what}: its sites have causes in common with the effect, "
                "and P(effect | cause) is then known by draws for a single weighted "
                "sum. Expected Sum, Mean or Linear over all plates; or hold the "
                "common causes with `poutine.condition`."
            )
        self.row = rows[0]
        moved = [
            n
            for n in cut.sites
            if n in layout.names
            and bool(
                (self.row[layout.place(n).start : layout.place(n).stop] != 0).any()
            )
        ]
        self.last = moved[-1]

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
                f"{type(base).__name__}, no element of which makes up the rest of a "
                "macro value by itself. Expected independent elements."
            )
        state = layout.stack(self.values).double()
        own = layout.place(self.last)
        weights = self.row[own.start : own.stop]
        spread = self._spread(base, msg["value"], weights)
        place = own.start + int(spread.argmax())
        value = self.at.reshape((-1,) + (1,) * (state.dim() - 2))
        rest = value - state @ self.row + state[..., place] * self.row[place]
        state = state.clone()
        state[..., place] = rest / self.row[place]
        unstacked = layout.unstack(state)[self.last]
        unstacked = unstacked.reshape(msg["value"].shape).to(msg["value"].dtype)
        msg["value"] = unstacked
        inside = base.support.check(unstacked)
        safe = torch.where(inside, unstacked, base.sample())
        log_probs = torch.where(inside, base.log_prob(safe).double(), -torch.inf)
        stacked = layout.stack(
            {n: log_probs if n == self.last else v for n, v in self.values.items()}
        )
        self.log_weight = stacked[..., place].double()

    def _spread(self, base: Any, value: Tensor, weights: Tensor) -> Tensor:
        """How far each element of the last site usually is from its mean."""
        layout = self.quantity.layout
        try:
            variance = base.variance.expand(value.shape)
        except NotImplementedError:
            variance = torch.ones_like(value)
        values = {n: v for n, v in self.values.items()} | {self.last: variance}
        own = layout.place(self.last)
        spread = layout.stack(values)[..., own.start : own.stop].double()
        spread = spread.nan_to_num(posinf=0).flatten(0, -2).mean(0)
        return spread * weights.square()
