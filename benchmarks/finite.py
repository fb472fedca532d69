# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does the natural realization of do(number of successes) cost, exactly?

10,000 draws of K Bernoulli sites of different probabilities, given their sum: a whole
``macro_do`` run beside a run of the model without an intervention, and beside
rejection (draws of the model until one has the sum; its cost is extrapolated from the
probability of the sum). The marginal probabilities are compared with those of an
independent computation before any time is taken.

    python benchmarks/finite.py
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from natural import begin, measure
from torch import Tensor

import pyro_macro as pm

DRAWS = 10_000
COUNT = pm.MacroVariable("count", micro="x", over="trials")


def problem(size: int) -> tuple[Tensor, float]:
    """Probabilities, and a number of successes somewhat above the mean."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(size, generator=generator, dtype=torch.float64)
    return p, float(p.sum().round()) + round(size**0.5 / 2)


def chance(p: Tensor, total: float) -> tuple[Tensor, Tensor]:
    """P(sum = total), and P(x_i = 1 | sum = total), by the sequential recursion."""

    def table(p: Tensor) -> Tensor:
        law = torch.zeros(int(total) + 2, dtype=torch.float64)
        law[0] = 1.0
        for q in p:
            law = law * (1 - q) + torch.cat([law.new_zeros(1), law[:-1]]) * q
        return law

    p = p.clone().requires_grad_()
    probability = table(p)[int(total)]
    # d P(sum = total) / d logit is P(sum) (E[x | sum] - p)
    (gradient,) = torch.autograd.grad(probability.log(), p)
    return probability.detach(), (gradient * p * (1 - p) + p).detach()


def contenders(size: int) -> dict[str, Callable[[], Tensor]]:
    p, total = problem(size)

    def model() -> Tensor:
        with pyro.plate("trials", size, dim=-1):
            return pyro.sample("x", dist.Bernoulli(p))

    intervened = pm.macro_do(model, {COUNT: pm.Natural(total)})

    def run(program: Callable[[], Tensor]) -> Tensor:
        with pyro.plate("draws", DRAWS, dim=-2):
            return program()

    return {"macro_do": lambda: run(intervened), "no intervention": lambda: run(model)}


def main() -> None:
    begin(f"{DRAWS} draws")
    print(f"{'K':>6}  {'way':<22}{'CPU ms':>10}{'plain runs':>12}")
    for size in (100, 1000):
        ways = contenders(size)
        p, total = problem(size)
        probability, marginal = chance(p, total)
        drawn = ways["macro_do"]()
        assert (drawn.sum(-1) == total).all()
        error = (drawn.mean(0) - marginal).abs() / (0.25 / DRAWS) ** 0.5
        assert error.max() < 5, error.max()
        found = measure(ways)
        plain = found["no intervention"]
        found["rejection, in theory"] = plain / probability.item()
        for name, value in found.items():
            print(f"{size:>6}  {name:<22}{value:>10.1f}{value / plain:>12.1f}")


if __name__ == "__main__":
    main()
