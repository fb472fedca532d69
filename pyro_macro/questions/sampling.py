# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of quantities from programs, many at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from tqdm.auto import tqdm

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.grid import grid as grid_plate
from pyro_macro.laws.cut import Cut, Model
from pyro_macro.laws.quantity import Quantity
from pyro_macro.program.inner import (
    is_deterministic,
    preserved_buffers,
    preserved_params,
)
from pyro_macro.program.substitution import apart

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
        if not isinstance(seed, int):
            raise PyroMacroError(f"seed={seed!r}. Expected a whole number.")
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
        common: bool = False,
    ) -> list[Tensor]:
        """Draws from ``fn``, the program or an intervention on it.

        All at once where the program is vectorized, one by one otherwise.

        :param grid: the length of a grid of macro values along the leftmost dimension;
            only of vectorized programs.
        :returns: for each quantity, shape ``(grid, count, size)``, without the first
            where there is no grid; on the CPU, wherever the program is.
        """
        count = self.count if count is None else count
        lead = (count,) if grid is None else (grid, count)
        vectorized = self.is_vectorized(fn, grid)
        with self.unseen():
            if vectorized:
                values = self.values(self.within(fn, lead, common))
                return [q.of(values, lead, self.depth).cpu() for q in quantities]
            return self._apart((fn for _ in range(count)), count, quantities)

    def _apart(
        self,
        fns: Iterable[Callable[..., Any]],
        count: int,
        quantities: Sequence[Quantity],
    ) -> list[Tensor]:
        """One draw from each of some programs, one after the other."""
        quiet = not self.progress
        rows = []
        for fn in tqdm(fns, total=count, disable=quiet, desc="Drawing", leave=False):
            values = self.values(self.within(fn, ()))
            rows.append([q.of(values).cpu() for q in quantities])
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    def under(
        self, states: Sequence[Mapping[str, Tensor]], quantity: Quantity, n: int
    ) -> Tensor:
        """Draws of a quantity, one under each of some micro states that are set.

        :param states: for each of ``n`` macro values the micro sites' values, with the
            draws as their leftmost dimension.
        :returns: shape ``(n, draws, size)``.
        """
        model, parts = self.model[0], []
        vectorized = self.is_vectorized(model, None)
        with self.unseen():
            for given in states:
                values = {n: self._near(n, v) for n, v in given.items()}
                count = len(next(iter(values.values())))
                if vectorized:
                    whole: Any = {
                        name: self._widened(name, v) for name, v in values.items()
                    }
                    fn = poutine.do(model, data=whole)
                    drawn = self.values(self.within(fn, (count,)))
                    parts.append(quantity.of(drawn, (count,), self.depth).cpu())
                    continue
                each: Iterable[Any] = (
                    poutine.do(model, data={name: v[i] for name, v in values.items()})
                    for i in range(count)
                )
                parts += self._apart(each, count, [quantity])
        return torch.stack(parts)

    def _near(self, name: str, value: Tensor) -> Tensor:
        """On the device of its site."""
        return value.to(self.cut.sites[name].value.device)

    def _widened(self, name: str, value: Tensor) -> Tensor:
        """With its draws left of all plates."""
        event = len(self.cut.sites[name].event_shape)
        between = self.depth - (value.dim() - 1 - event)
        return value.reshape(value.shape[:1] + (1,) * between + value.shape[1:])

    def before_and_after(
        self, fn: Callable[..., Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Micro states, natural and as an intervention has made them."""
        cause = self.cut.cause
        if not self.is_vectorized(fn, None):
            raise self._refused(f"the noise of {cause.name!r}")
        with self.unseen():
            values = self.values(self.within(fn, (self.count,)))
        micro = values[f"{cause.name}__micro"].cpu()
        before = cause.layout.unstack(micro)
        return before, {name: values[name].cpu() for name in cause.sites}

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
        stack.enter_context(preserved_buffers())
        # Other numbers each time: a two-sample test needs independent samples
        seed = (1_000_003 * self.seed + 7919 * self._calls) % (1 << 62)
        stack.enter_context(apart(seed))
        self._calls += 1
        stack.enter_context(torch.no_grad())
        return stack

    def within(
        self, fn: Callable[..., Any], lead: Sequence[int], common: bool = False
    ) -> Callable[[], poutine.Trace]:
        args, kwargs = self.model[1:]
        outermost = len(lead) - 1

        def run() -> poutine.Trace:
            with ExitStack() as stack:
                for i, size in enumerate(reversed(lead)):
                    dim = -self.depth - 1 - i
                    plate = grid_plate if common and i == outermost else pyro.plate
                    stack.enter_context(plate(f"_lead_{i}", size, dim=dim))
                return poutine.trace(fn).get_trace(*args, **kwargs)

        return run

    @staticmethod
    def values(run: Callable[[], poutine.Trace]) -> Mapping[str, Any]:
        return {n: node["value"] for n, node in run().nodes.items() if "value" in node}

    def is_vectorized(self, fn: Callable[..., Any], grid: int | None) -> bool:
        """Whether draws side by side do not act on one another.

        A model that adds up *all* dimensions of a tensor adds up its particles, too.
        All draws but the last are changed; the last must not notice.
        """
        if self.cut.zero.tracker.escaped:
            return False  # it branches on values
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
        one, other = (self.within(fn, lead)() for _ in range(2))
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
        again = self.within(poutine.condition(fn, data=mixed), lead)()
        own = f"{self.cut.cause.name}__micro"  # may have no density
        for trace in (one, again):
            trace.compute_log_prob(lambda name, site: name != own)

        def same(mine: Tensor, yours: Tensor, event: int) -> bool:
            if mine.shape != yours.shape:
                return False
            if _has(mine, dim - event, count):
                mine, yours = (t.select(dim - event, -1) for t in (mine, yours))
            return torch.allclose(mine.double(), yours.double(), 1e-4, 1e-6)

        for name, node in random.items():
            match = again.nodes[name]
            if name == own:
                continue
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


def _has(tensor: Tensor, dim: int, size: int) -> bool:
    """Whether a tensor has some size along a dimension, counted from the right."""
    return tensor.dim() >= -dim and tensor.shape[dim] == size
