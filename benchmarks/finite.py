# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does the natural realization of do(number of successes) cost, exactly?

10,000 draws of K Bernoulli sites of different probabilities, given their sum: a whole
``macro_do`` run beside a run of the model without an intervention, the textbook
algorithm by hand (a table of the sums of the first k, and draws from the last to the
first), all states of K sites in a list, and rejection, whose cost follows from the
probability of the sum. The marginal probabilities are compared with those of an
independent computation.

    python benchmarks/finite.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import Contender, Question, Run
from torch import Tensor

import pyro_macro as pm

DRAWS = 10_000
COUNT = pm.MacroVariable("count", micro="x", over="trials")
OURS, PLAIN, TABLE = "macro_do", "no intervention", "a table K x (K + 1), by hand"


@dataclass
class Problem:
    """K trials, and a number of successes somewhat above the mean."""

    size: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.p = torch.rand(self.size, generator=generator, dtype=torch.float64)
        self.total = int(self.p.sum().round()) + round(self.size**0.5 / 2)

    @cached_property
    def model(self) -> Callable[[], Tensor]:
        size, p = self.size, self.p

        def model() -> Tensor:
            with pyro.plate("trials", size, dim=-1):
                return pyro.sample("x", dist.Bernoulli(p))

        return model

    def chance(self) -> tuple[Tensor, Tensor]:
        """P(sum = total), and P(x_i = 1 | sum = total), by a derivative.

        d log P(sum = total) / d logit p_i is E[x_i | sum] - p_i.
        """
        p = self.p.clone().requires_grad_()
        law = torch.zeros(self.total + 2, dtype=torch.float64)
        law[0] = 1.0
        for q in p:
            law = law * (1 - q) + torch.cat([law.new_zeros(1), law[:-1]]) * q
        probability = law[self.total]
        (gradient,) = torch.autograd.grad(probability.log(), p)
        return probability.detach(), (gradient * p * (1 - p) + p).detach()

    def check(self, name: str, drawn: Any) -> None:
        if name in (PLAIN, TABLE):
            return
        assert drawn.shape == (DRAWS, self.size), (name, drawn.shape)
        assert (drawn.sum(-1) == self.total).all(), name
        error = (drawn.mean(0) - self.chance()[1]).abs() / (0.25 / DRAWS) ** 0.5
        assert error.max() < 5, (name, error.max())


def plain(problem: Problem, program: Any) -> Run:
    def run() -> Tensor:
        with pyro.plate("draws", DRAWS, dim=-2):
            return program()

    return run


def macro_do(problem: Problem) -> Run:
    total = pm.Natural(float(problem.total))
    return plain(problem, pm.macro_do(problem.model, {COUNT: total}))


def sums(problem: Problem) -> Tensor:
    """The probability that the first k have a sum of s, shape ``(K + 1, K + 1)``."""
    table = torch.zeros(problem.size + 1, problem.size + 1)
    table[0, 0] = 1.0
    for k, q in enumerate(problem.p):
        table[k + 1] = table[k] * (1 - q)
        table[k + 1, 1:] += table[k, :-1] * q
    return table


def by_hand(problem: Problem) -> Run:
    def run() -> Tensor:
        table = sums(problem)
        drawn = torch.empty(DRAWS, problem.size)
        left = torch.full((DRAWS,), problem.total)
        for k in range(problem.size, 0, -1):
            before = table[k - 1].roll(1) * problem.p[k - 1]
            before[0] = 0.0
            x = torch.rand(DRAWS) < (before / table[k])[left]
            drawn[:, k - 1] = x
            left = left - x.long()
        return drawn

    return run


def listed(problem: Problem) -> Run:
    """All 2^K states, those with the sum, and draws among them."""

    def run() -> Tensor:
        bits = torch.arange(2**problem.size).unsqueeze(-1) >> torch.arange(problem.size)
        states = (bits & 1).double()
        states = states[states.sum(-1) == problem.total]
        logits = states @ problem.p.logit()
        return states[dist.Categorical(logits=logits).sample((DRAWS,))]

    return run


def main() -> None:
    question = Question("finite", "Given the sum of K Bernoullis")
    torch.set_default_dtype(torch.float64)
    table = question.table("10,000 draws, float64", OURS)
    for size in (20, 100, 1000):
        problem = Problem(size)
        contenders: dict[str, Contender] = {
            OURS: partial(macro_do, problem),
            PLAIN: partial(plain, problem, problem.model),
            "by hand": partial(by_hand, problem),
            TABLE: lambda problem=problem: partial(sums, problem),
        }
        left_out = {}
        if size <= 20:
            contenders["all states"] = partial(listed, problem)
        else:
            left_out["all states"] = f"left out: 2^{size} states"
        table.compare({"K": size}, contenders, problem.check, left_out)
        run = table.cpu(PLAIN, K=size)
        assert run is not None
        rejection = run / problem.chance()[0].item()
        ours = table.cpu(OURS, K=size)
        ratio = {"ratio": rejection / ours} if ours else {}
        row = {"K": size, "way": "rejection", "cpu": rejection, "note": "in theory"}
        table.add(row | ratio)
    ours, run, one = (table.cpu(way, K=1000) for way in (OURS, PLAIN, TABLE))
    question.target(
        "plain draws that it costs beside one table, K = 1000",
        (ours - one) / run if ours and run and one else None,
        at_most=20,
    )
    question.write()


if __name__ == "__main__":
    main()
