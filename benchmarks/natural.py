# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does the natural realization of do(sum of K independent Gaussians) cost?

10,000 draws of K sales and of a revenue that depends on all of them, given the total: a
whole ``macro_do`` run, the reading of the program included, beside the same
intervention in other languages, for which the draw was derived by hand, and beside
dense sampling from the conditional covariance. Then 100 draws, of up to a million.

    python benchmarks/natural.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import Contender, Question, Run, Table
from torch import Tensor

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro="x")


@dataclass
class Problem:
    """``x_i ~ N(mu_i, sigma_i)``, ``y ~ N(a.x, 1)``, and what is asked of them.

    :ivar total: what the ``x_i`` are to add up to.
    :ivar draws: how many are asked for.
    """

    a: Tensor
    mu: Tensor
    sigma: Tensor
    total: float
    draws: int

    @staticmethod
    def of(size: int, draws: int, dtype: torch.dtype) -> Problem:
        generator = torch.Generator().manual_seed(0)
        a, mu, sigma = (
            1 + torch.rand(size, generator=generator, dtype=torch.float64)
            for _ in range(3)
        )
        total = 1.01 * mu.sum().item()
        return Problem(a.to(dtype), mu.to(dtype), sigma.to(dtype), total, draws)

    @property
    def gain(self) -> Tensor:
        """How much of a change of the total each element takes."""
        return self.sigma**2 / (self.sigma**2).sum()

    @cached_property
    def model(self) -> Callable[[], Tensor]:
        a, mu, sigma = self.a, self.mu, self.sigma

        def model() -> Tensor:
            x = pyro.sample("x", dist.Normal(mu, sigma).to_event(1))
            return pyro.sample("y", dist.Normal(x @ a, 1.0))

        return model

    def run(self, program: Callable[[], Tensor]) -> Tensor:
        with pyro.plate("draws", self.draws, dim=-1):
            return program()

    def check(self, name: str, y: Any) -> None:
        """Mean and variance of ``y`` within 5 standard errors of the closed form."""
        a, mu, variance = self.a.double(), self.mu.double(), self.sigma.double() ** 2
        gain = variance / variance.sum()
        mean = a @ (mu + gain * (self.total - mu.sum()))
        spread = (a**2) @ variance - (a @ variance) ** 2 / variance.sum() + 1
        y = torch.as_tensor(y).double()
        assert y.shape == (self.draws,), (name, y.shape)
        off = (y.mean() - mean).abs() / (spread / self.draws).sqrt()
        assert off < 5, (name, off)
        assert (y.var() / spread - 1).abs() < 5 * (2 / self.draws) ** 0.5, name


def macro_do(problem: Problem) -> Run:
    intervened = pm.macro_do(problem.model, {SALES: pm.Natural(problem.total)})
    return lambda: problem.run(intervened)


def no_intervention(problem: Problem) -> Run:
    return lambda: problem.run(problem.model)


def random_numbers(problem: Problem) -> Run:
    shape, dtype = (problem.draws, len(problem.mu)), problem.mu.dtype
    return lambda: torch.randn(shape, dtype=dtype)


def drawn_by_hand(problem: Problem) -> Tensor:
    """The draw in O(K) that whoever derived the weights can write, in place."""
    shape, dtype = (problem.draws, len(problem.mu)), problem.mu.dtype
    x = torch.randn(shape, dtype=dtype).mul_(problem.sigma).add_(problem.mu)
    return x.addcmul_(problem.gain, problem.total - x.sum(-1, keepdim=True))


def by_hand(problem: Problem) -> Run:
    """Without any language."""
    noise = partial(torch.randn, problem.draws, dtype=problem.mu.dtype)
    return lambda: drawn_by_hand(problem) @ problem.a + noise()


def pyro_do(problem: Problem) -> Run:
    """Pyro's own ``do``, of the draw by hand."""

    def run() -> Tensor:
        x = drawn_by_hand(problem)
        return problem.run(pyro.poutine.do(problem.model, {"x": x}))

    return run


def chirho(problem: Problem, in_place: bool) -> Run:
    """A hand-derived callable that moves what the model has drawn."""
    from chirho.interventional.handlers import do

    total, gain = problem.total, problem.gain

    def move(x: Tensor) -> Tensor:
        return x + gain * (total - x.sum(-1, keepdim=True))

    def move_in_place(x: Tensor) -> Tensor:
        return x.addcmul_(gain, total - x.sum(-1, keepdim=True))

    def run() -> Tensor:
        with do(actions={"x": move_in_place if in_place else move}):
            return problem.run(problem.model)

    return run


OURS, IN_PLACE, HAND = "macro_do", "ChiRho do, in place", "by hand, no language"


def in_torch(problem: Problem) -> dict[str, Contender]:
    return {
        OURS: partial(macro_do, problem),
        "ChiRho do, hand-derived callable": partial(chirho, problem, False),
        IN_PLACE: partial(chirho, problem, True),
        "Pyro do of a draw by hand": partial(pyro_do, problem),
        HAND: partial(by_hand, problem),
        "no intervention": partial(no_intervention, problem),
    }


def to_effect(question: Question, dtype: torch.dtype) -> Table:
    from natural_elsewhere import elsewhere

    name = str(dtype).removeprefix("torch.")
    table = question.table(f"To the effect, 10,000 draws, {name}", OURS)
    for size in (100, 1000, 5000):
        problem = Problem.of(size, 10_000, dtype)

        def check(name: str, y: Any, problem: Problem = problem) -> None:
            if name != "no intervention":
                problem.check(name, y)

        ways, left_out = elsewhere(problem)
        table.compare({"K": size}, in_torch(problem) | ways, check, left_out)
        numbers = {"random numbers alone": partial(random_numbers, problem)}
        table.compare({"K": size}, numbers)
    return table


def against_dense(question: Question) -> Table:
    from natural_dense import dense

    title = "Against dense ways, which draw the micro state alone, 10,000 draws"
    table = question.table(title, OURS)
    for size in (100, 1000, 5000):
        for dtype in (torch.float32, torch.float64):
            problem = Problem.of(size, 10_000, dtype)

            def check(name: str, drawn: Any, problem: Problem = problem) -> None:
                drawn = torch.as_tensor(drawn)
                if drawn.dim() == 2:
                    drawn = drawn @ problem.a.to(drawn) + torch.randn(len(drawn))
                problem.check(name, drawn)

            case = {"K": size, "dtype": str(dtype).removeprefix("torch.")}
            ways, left_out = dense(problem)
            ours = {OURS: partial(macro_do, problem)}
            table.compare(case, ours | ways, check, left_out)
    return table


def curve(question: Question) -> Table:
    table = question.table("Cost against K, 100 draws, float64", OURS, axis="K")
    from natural_dense import torch_cholesky

    for exponent in range(1, 7):
        problem = Problem.of(10**exponent, 100, torch.float64)
        ways = {
            OURS: partial(macro_do, problem),
            "ChiRho do, hand-derived callable": partial(chirho, problem, False),
            HAND: partial(by_hand, problem),
        }
        left_out = {}
        if exponent <= 3:
            ways["torch, Cholesky"] = partial(torch_cholesky, problem, True)
        else:
            left_out["torch, Cholesky"] = "a K x K matrix"
        table.compare({"K": 10**exponent}, ways, problem.check, left_out)
    return table


def main() -> None:
    question = Question(
        "natural",
        "Natural realization of a total of K independent Gaussians",
        ("chirho", "pymc", "numpyro", "jax", "dowhy", "pgmpy", "numpy"),
    )
    for dtype in (torch.float32, torch.float64):
        table, name = to_effect(question, dtype), str(dtype).removeprefix("torch.")
        for size in (100, 1000, 5000):
            question.target(
                f"faster than ChiRho in place, K = {size}, {name}",
                table.ratio(IN_PLACE, OURS, K=size),
                at_least=1.0,
            )
        for size in (1000, 5000):
            question.target(
                f"time over the draw by hand, K = {size}, {name}",
                table.ratio(OURS, HAND, K=size),
                at_most=1.3,
            )
    table = against_dense(question)
    for dtype in ("float32", "float64"):
        times = [
            row["cpu"]
            for row in table.rows
            if (row["K"], row["dtype"]) == (5000, dtype)
            and "cpu" in row
            and row["way"] != OURS
        ]
        ours = table.cpu(OURS, K=5000, dtype=dtype)
        question.target(
            f"times as fast as the best dense way, K = 5000, {dtype}",
            min(times) / ours if times and ours else None,
            at_least=30,
        )
    numpy, ours = (
        table.cpu(way, K=5000, dtype=dtype)
        for way, dtype in (("numpy, Cholesky", "float64"), (OURS, "float32"))
    )
    question.target(
        "float32 draws, times as fast as numpy's Cholesky (float64 only), K = 5000",
        numpy / ours if numpy and ours else None,
        at_least=30,
    )
    table = curve(question)
    question.target(
        "exponent of the cost from K = 10^4 to 10^6",
        table.exponent(OURS, "K", 10**4),
        at_most=1.1,
    )
    question.write()


if __name__ == "__main__":
    main()
