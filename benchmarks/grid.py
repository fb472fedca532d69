# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does a curve over 16 macro values cost?

The natural realization of a total of K = 1000 at 16 values, 1000 draws each, for an
effect that is affine in the parts and for one that is not: in one run, in a loop, and
in the ways in which others run many worlds at once. All means are compared with
integrals.

    python benchmarks/grid.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from harness import Contender, Question, Run
from torch import Tensor

import pyro_macro as pm

SIZE, DRAWS, VALUES = 1000, 1000, 16
SALES = pm.MacroVariable("sales", micro="x")


@dataclass
class Problem:
    """``x_i ~ N(mu_i, sigma_i)``, ``y ~ N(a.f(x), 1)``, and totals to set."""

    affine: bool

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a, self.mu, self.sigma = (
            1 + torch.rand(SIZE, generator=generator) for _ in range(3)
        )
        self.at = self.mu.sum() + torch.linspace(-2, 2, VALUES) * SIZE**0.5
        self.gain = self.sigma**2 / (self.sigma**2).sum()

    @cached_property
    def effect(self) -> Callable[[Tensor], Tensor]:
        a = self.a
        return (lambda x: x @ a) if self.affine else (lambda x: x.tanh() @ a)

    @cached_property
    def model(self) -> Callable[[], Tensor]:
        mu, sigma, effect = self.mu, self.sigma, self.effect

        def model() -> Tensor:
            x = pyro.sample("x", dist.Normal(mu, sigma).to_event(1))
            return pyro.sample("y", dist.Normal(effect(x), 1.0))

        return model

    def drawn(self) -> Tensor:
        """Micro states as they are in nature, shape ``(DRAWS, SIZE)``."""
        return torch.randn(DRAWS, SIZE).mul_(self.sigma).add_(self.mu)

    def moved(self, x: Tensor, value: Tensor) -> Tensor:
        """The same micro states with another total."""
        return x + self.gain * (value - x.sum(-1, keepdim=True))

    @property
    def means(self) -> Tensor:
        """Of the effect at each value, by Gauss-Hermite quadrature."""
        nodes, weights = np.polynomial.hermite_e.hermegauss(64)
        weights = torch.as_tensor(weights / weights.sum())
        missing = self.at - self.mu.sum()
        mean = self.mu + self.gain * missing.unsqueeze(-1)
        scale = self.sigma * (1 - self.gain).sqrt()
        x = mean.unsqueeze(-1) + scale.unsqueeze(-1) * torch.as_tensor(nodes)
        x = x if self.affine else x.tanh()
        return (x @ weights) @ self.a

    def check(self, name: str, y: Any) -> None:
        """Means exactly, or those of draws within 5 standard errors."""
        if isinstance(y, pm.reports.DoseResponse):
            y = y.curves[0].mean if self.affine else y.curves[0].outcomes.draws
        if y.dim() == 1:
            torch.testing.assert_close(y, self.means, msg=name)
            return
        assert y.shape == (VALUES, DRAWS), (name, y.shape)
        off = (y.mean(-1) - self.means).abs() / (y.std(-1) / DRAWS**0.5)
        assert off.max() < 5, (name, off)


def grid(problem: Problem) -> Run:
    """The values along a grid, on which the random numbers are common."""
    at = problem.at.unsqueeze(-1)
    intervened = pm.macro_do(problem.model, {SALES: pm.Natural(at)})

    def run() -> Tensor:
        with pm.grid("at", VALUES, dim=-2), pyro.plate("draws", DRAWS, dim=-1):
            return intervened()

    return run


def bend(problem: Problem) -> float:
    """The largest second difference of the mean of an affine effect."""
    y = grid(problem)()
    error = float(y.std(-1).max()) / DRAWS**0.5
    return float(y.mean(-1).diff(n=2).abs().max()) / error


def plate(problem: Problem) -> Run:
    """The values along a plate, with random numbers for each."""
    at = problem.at.unsqueeze(-1)
    intervened = pm.macro_do(problem.model, {SALES: pm.Natural(at)})

    def run() -> Tensor:
        with pyro.plate("at", VALUES, dim=-2), pyro.plate("draws", DRAWS, dim=-1):
            return intervened()

    return run


def curve(problem: Problem) -> Run:
    return lambda: pm.dose_response(
        problem.model, SALES, "y", at=problem.at, num_samples=DRAWS, progress=False
    )


def loop(problem: Problem, run: Callable[[Tensor], Tensor]) -> Run:
    """One value after the other."""

    def each() -> Tensor:
        with pyro.plate("draws", DRAWS, dim=-1):
            return torch.stack([run(value) for value in problem.at])

    return each


def by_macro_do(problem: Problem, value: Tensor) -> Tensor:
    return pm.macro_do(problem.model, {SALES: pm.Natural(value)})()


def by_pyro_do(problem: Problem, value: Tensor) -> Tensor:
    x = problem.moved(problem.drawn(), value)
    return pyro.poutine.do(problem.model, {"x": x})()


def broadcast(problem: Problem) -> Run:
    """Pyro's ``do`` of all micro states at once, which were drawn by hand."""

    def run() -> Tensor:
        x = problem.moved(problem.drawn(), problem.at.reshape(-1, 1, 1))
        with pyro.plate("at", VALUES, dim=-2), pyro.plate("draws", DRAWS, dim=-1):
            return pyro.poutine.do(problem.model, {"x": x})()

    return run


def many_worlds(problem: Problem) -> Run:
    """ChiRho, whose worlds are moved from the same draws; the first is as it is."""
    from chirho.counterfactual.handlers import MultiWorldCounterfactual
    from chirho.interventional.handlers import do

    def worlds(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(problem.moved(x, value) for value in problem.at)

    def run() -> Tensor:
        with MultiWorldCounterfactual(-2), do(actions={"x": worlds}):
            with pyro.plate("draws", DRAWS, dim=-1):
                return problem.model()[1:]

    return run


def by_hand(problem: Problem) -> Run:
    """The noise once, and of an affine effect what moves it."""

    def run() -> Tensor:
        x, noise = problem.drawn(), torch.randn(DRAWS)
        if problem.affine:
            missing = problem.at.unsqueeze(-1) - x.sum(-1)  # (VALUES, DRAWS)
            return problem.effect(x) + problem.effect(problem.gain) * missing + noise
        moved = [problem.effect(problem.moved(x, value)) for value in problem.at]
        return torch.stack(moved) + noise

    return run


OURS, CHIRHO = "pm.grid", "ChiRho, many worlds"
CURVE, HAND = "pm.dose_response", "by hand, noise once"


def main() -> None:
    question = Question("grid", f"A curve over {VALUES} macro values", ("chirho",))
    torch.set_default_dtype(torch.float64)
    title = f"K = {SIZE}, {VALUES} values, {DRAWS} draws each, float64"
    table = question.table(title, OURS)
    for affine in (True, False):
        problem = Problem(affine)
        contenders: dict[str, Contender] = {
            OURS: partial(grid, problem),
            CURVE: partial(curve, problem),
            "macro_do in a plate": partial(plate, problem),
            "macro_do in a loop": partial(loop, problem, partial(by_macro_do, problem)),
            CHIRHO: partial(many_worlds, problem),
            "Pyro do in a loop": partial(loop, problem, partial(by_pyro_do, problem)),
            "Pyro do, broadcast": partial(broadcast, problem),
            HAND: partial(by_hand, problem),
        }
        case = {"effect": "affine" if affine else "not affine"}
        table.compare(case, contenders, problem.check)
    for effect in ("affine", "not affine"):
        what = f"times as fast as ChiRho's worlds, pm.grid, {effect} effect"
        question.target(what, table.ratio(CHIRHO, OURS, effect=effect), at_least=2)
    ratio = table.ratio(CHIRHO, CURVE, effect="affine")
    what = "times as fast as ChiRho's worlds, dose_response, affine effect"
    question.target(what, ratio, at_least=20)
    what = "bend of pm.grid's mean curve where it is straight, in standard errors"
    question.target(what, bend(Problem(True)), at_most=1e-6)
    question.write()


if __name__ == "__main__":
    main()
