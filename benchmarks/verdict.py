# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does an exact verdict cost, and a dose-response curve?

K products with a confounder each: are total sales and total revenue confounded? A whole
``confounding`` call, reading the program included, beside one run of the program, the
closed form written by hand for this very model, and dense linear algebra with K x K
matrices. Then the same answer by draws: interventional and observational means with
1000 draws each. All answers are compared before any time is taken.

    python benchmarks/verdict.py
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from natural import begin, measure
from torch import Tensor

import pyro_macro as pm

DENSE_UP_TO = 1000
DRAWS = 1000
SALES = pm.MacroVariable("sales", micro="x", over="products")
REVENUE = pm.MacroVariable("revenue", micro="y", over="products")

Answer = tuple[Tensor, Tensor, Tensor, Tensor]  # means and variances, seen and set


def problem(size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prices, effects of the confounders, scales, and a grid of totals."""
    generator = torch.Generator().manual_seed(0)
    alpha, gamma, sigma = (
        1 + torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return alpha, gamma, sigma, torch.linspace(-1, 1, 16).double() * size**0.5


def contenders(size: int) -> dict[str, Callable[[], Answer | Tensor]]:
    alpha, gamma, sigma, at = problem(size)

    def model() -> Tensor:
        with pyro.plate("products", size):
            z = pyro.sample("z", dist.Normal(torch.zeros(size).double(), 1.0))
            x = pyro.sample("x", dist.Normal(z, sigma))
            return pyro.sample("y", dist.Normal(alpha * x + gamma * z, 1.0))

    def verdict() -> Answer:
        report = pm.confounding(model, SALES, REVENUE, at=at)
        assert report.verdict == "inducing"
        return (
            report.observational_mean,
            report.observational_variance,
            report.interventional_mean,
            report.interventional_variance,
        )

    def by_hand() -> Answer:
        variance = 1 + sigma**2  # of each x, whose covariance with its z is 1
        total = variance.sum()
        through = (alpha * variance).sum()  # Cov(alpha.x, sum of x)
        noise = (gamma**2).sum() + size
        seen = through + gamma.sum()
        whole = (alpha**2 * variance + 2 * alpha * gamma).sum() + noise
        done = (alpha**2 * variance).sum() - through**2 / total + noise
        each = torch.ones_like(at)
        return (
            seen / total * at,
            (whole - seen**2 / total) * each,
            through / total * at,
            done * each,
        )

    def dense() -> Answer:
        one, eye = torch.ones(size).double(), torch.eye(size).double()
        x = torch.diag(1 + sigma**2)
        y = torch.diag(alpha) @ x @ torch.diag(alpha)
        y = y + torch.diag(2 * alpha * gamma + gamma**2) + eye
        crossed = torch.diag(alpha) @ x + torch.diag(gamma)  # Cov(y, x)
        total = one @ x @ one
        seen = one @ crossed @ one
        gain = x @ one / total
        within = x - torch.outer(gain, x @ one)
        done = alpha @ within @ alpha + (gamma**2).sum() + size
        each = torch.ones_like(at)
        return (
            seen / total * at,
            (one @ y @ one - seen**2 / total) * each,
            alpha @ gain * at,
            done * each,
        )

    def draws() -> Tensor:
        grid = at.reshape(-1, 1, 1)
        with pyro.plate("grid", len(at), dim=-3), pyro.plate("draws", DRAWS, dim=-2):
            return pm.macro_do(model, {SALES: pm.Natural(grid)})().sum(-1)

    found: dict[str, Callable[[], Answer | Tensor]] = {
        "confounding": verdict,
        "one run of the model": model,
        "by hand": by_hand,
    }
    if size <= DENSE_UP_TO:
        found |= {"dense": dense, "do by draws alone": draws}
    return found


def check(size: int, ways: dict[str, Callable[[], Answer | Tensor]]) -> None:
    expected = ways["by hand"]()
    for name in ("confounding", "dense"):
        for one, other in zip(
            ways[name]() if name in ways else (), expected, strict=False
        ):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    if "do by draws alone" in ways:
        drawn = ways["do by draws alone"]()
        error = (drawn.mean(-1) - expected[2]).abs()
        assert (error < 5 * (expected[3] / DRAWS).sqrt()).all()


def main() -> None:
    begin("16 totals")
    print(f"{'K':>7}  {'way':<22}{'CPU ms':>10}{'confounding is':>17}")
    for size in (100, 1000, 10_000, 100_000):
        ways = contenders(size)
        check(size, ways)
        times = measure(ways)
        for name, value in times.items():
            ratio = times["confounding"] / value
            print(f"{size:>7}  {name:<22}{value:>10.2f}{ratio:>15.2f} x")


if __name__ == "__main__":
    main()
