# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does the natural realization of do(sum of K independent Gaussians) cost?

1000 draws of K sales and their revenues, given the total: a whole ``macro_do`` run
beside the same without an intervention, the draw written by hand, and dense sampling
from the conditional covariance. All answers are compared before any time is taken.

    python benchmarks/natural.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

import pyro_macro as pm

DRAWS, REPEATS = 1000, 7
DENSE_UP_TO = 1000  # beyond, one dense draw takes minutes
SALES = pm.MacroVariable("sales", micro="x", over="products")


def problem(size: int) -> tuple[Tensor, Tensor, Tensor, float]:
    """Prices, means and scales of ``size`` products, and a total."""
    generator = torch.Generator().manual_seed(0)
    alpha, mu, sigma = (
        1 + torch.rand(size, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    return alpha, mu, sigma, 1.01 * mu.sum().item()


def contenders(size: int) -> dict[str, Callable[[], Tensor]]:
    """Each returns revenues, shape ``(DRAWS,)``."""
    alpha, mu, sigma, total = problem(size)

    def model() -> Tensor:
        with pyro.plate("products", size):
            x = pyro.sample("x", dist.Normal(mu, sigma))
            return pyro.sample("y", dist.Normal(alpha * x, 1.0))

    intervened = pm.macro_do(model, {SALES: pm.Natural(total)})

    def run(program: Callable[[], Tensor]) -> Tensor:
        with pyro.plate("draws", DRAWS, dim=-2):
            return program().sum(-1)

    def by_hand() -> Tensor:
        x = mu + sigma * torch.randn(DRAWS, size, dtype=torch.float64)
        gain = sigma**2 / (sigma**2).sum()
        x = x + gain * (total - x.sum(-1, keepdim=True))
        return (alpha * x + torch.randn(DRAWS, size, dtype=torch.float64)).sum(-1)

    def dense() -> Tensor:
        variance = sigma**2
        gain = variance / variance.sum()
        mean = mu + gain * (total - mu.sum())
        within = torch.diag(variance) - torch.outer(gain, variance)
        values, vectors = torch.linalg.eigh(within)  # singular: no Cholesky factor
        noise = torch.randn(DRAWS, size, dtype=torch.float64)
        x = mean + (noise * values.clamp(min=0).sqrt()) @ vectors.mT
        return (alpha * x + torch.randn(DRAWS, size, dtype=torch.float64)).sum(-1)

    found = {
        "macro_do": lambda: run(intervened),
        "no intervention": lambda: run(model),
        "by hand": by_hand,
    }
    return found | ({"dense, eigh": dense} if size <= DENSE_UP_TO else {})


def check(size: int, ways: dict[str, Callable[[], Tensor]]) -> None:
    """All but the run without intervention follow the same law: 5 standard errors."""
    alpha, mu, sigma, total = problem(size)
    variance = sigma**2
    mean = alpha @ (mu + variance / variance.sum() * (total - mu.sum()))
    spread = (alpha**2 * variance).sum() - (
        alpha * variance
    ).sum() ** 2 / variance.sum()
    spread = spread + size
    for name, way in ways.items():
        if name == "no intervention":
            continue
        revenue = way()
        assert abs(revenue.mean() - mean) < 5 * (spread / DRAWS).sqrt(), name
        assert abs(revenue.var() / spread - 1) < 5 * (2 / DRAWS) ** 0.5, name


def measure(ways: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Median milliseconds of CPU time, in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            start = time.process_time()
            way()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def begin(what: str) -> None:
    """The same conditions for all, and a line that says which."""
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(0)
    print(
        f"{what}, float64, one thread, median of {REPEATS}, torch "
        f"{torch.__version__}, pyro {pyro.__version__}"
    )


def main() -> None:
    begin(f"{DRAWS} draws")
    print(f"{'K':>6}  {'way':<16}{'CPU ms':>10}{'macro_do is':>16}")
    for size in (100, 1000, 5000):
        ways = contenders(size)
        check(size, ways)
        times = measure(ways)
        for name, value in times.items():
            ratio = times["macro_do"] / value
            print(f"{size:>6}  {name:<16}{value:>10.1f}{ratio:>13.2f} x")


if __name__ == "__main__":
    main()
