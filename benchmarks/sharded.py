# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does the natural realization of a total over millions of products cost?

Each rank has its part of the products; all of them share a shock. A draw of all sales
given their total, and of the revenue that follows: a whole ``macro_do`` run, beside
the same model without an intervention, and the draw written by hand for this model.
The answer is compared with the closed form before any time is taken.

    torchrun --nproc_per_node=4 benchmarks/sharded.py            # 4 million products
    torchrun --nproc_per_node=2 benchmarks/sharded.py 10000 1000000
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
from torch import Tensor

import pyro_macro as pm

SIZES, REPEATS, DRAWS = [4_000_000], 7, 50
SALES = pm.MacroVariable("sales", micro="x", over="products")
SPREAD = 0.05  # of the shock


class Problem:
    """Prices, means, scales and loads of this rank's products, and a total."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.own = torch.Generator().manual_seed(distributed.get_rank())
        slots = self.plate().slots
        phase = torch.arange(slots.start, slots.stop, dtype=torch.float64) / size
        self.price = 1 + phase
        self.mean = 2 + (7 * phase).sin()
        self.scale = 1 + 0.5 * (5 * phase).cos()
        self.load = 1 + (3 * phase).sin()
        self.total = 1.001 * float(sums(self.mean.sum()))

    def plate(self) -> pm.sharded_plate:
        return pm.sharded_plate("products", self.size)

    def model(self) -> Tensor:
        shock = pyro.sample("shock", dist.Normal(torch.zeros(()), SPREAD))
        products = self.plate()
        with products:
            loc = self.mean + shock * self.load
            x = pyro.sample("x", dist.Normal(loc, self.scale))
        return products.sum(self.price * x)

    def by_hand(self) -> Tensor:
        """The same draw, by who knows the formulas; each rank draws its own noise."""
        noise = torch.randn(self.mean.shape, generator=self.own)
        shock = SPREAD * torch.randn((), generator=self.own)
        distributed.broadcast(shock, 0)
        x = self.mean + shock * self.load + self.scale * noise
        variance = self.scale**2
        found = sums(torch.stack([x.sum(), variance.sum(), self.load.sum()]))
        pull = SPREAD**2 * found[2]
        gain = (variance + pull * self.load) / (found[1] + pull * found[2])
        x = x + gain * (self.total - found[0])
        return sums((self.price * x).sum())

    def closed_form(self) -> tuple[float, float]:
        """Mean and variance of the revenue, given the total."""
        p, v, m, f = self.price, self.scale**2, self.mean, self.load
        parts = (p * m, m, p * p * v, p * v, v, p * f, f)
        pm_, m_, ppv, pv, v_, pf, f_ = sums(torch.stack([t.sum() for t in parts]))
        own = ppv + SPREAD**2 * pf**2
        both = pv + SPREAD**2 * pf * f_
        all_ = v_ + SPREAD**2 * f_**2
        mean = pm_ + both / all_ * (self.total - m_)
        return mean.item(), (own - both**2 / all_).item()


def sums(tensor: Tensor) -> Tensor:
    distributed.all_reduce(tensor)
    return tensor


class Traffic:
    """Messages and bytes that this rank gives to all-reduce inside."""

    def __enter__(self) -> Traffic:
        self.messages, self.bytes, self.send = 0, 0, distributed.all_reduce

        def send(tensor: Tensor, **kwargs: object) -> object:
            self.messages += 1
            self.bytes += tensor.numel() * tensor.element_size()
            return self.send(tensor, **kwargs)

        distributed.all_reduce = send
        return self

    def __exit__(self, *exc: object) -> None:
        distributed.all_reduce = self.send


def check(problem: Problem, intervened: Callable[[], Tensor]) -> None:
    """The total is met, and the revenue follows its law: 5 standard errors."""
    trace = pyro.poutine.trace(pm.aggregate(intervened, [])).get_trace()
    total = float(sums(trace.nodes["x"]["value"].sum()))
    assert abs(total - problem.total) < 1e-11 * problem.total, total
    mean, variance = problem.closed_form()
    law = trace.nodes["sales__micro"]["fn"]
    expected = float(sums((problem.price * law.mean).sum()))
    assert abs(expected - mean) < 1e-10 * abs(mean), (expected, mean)
    for way in (intervened, problem.by_hand):
        count = DRAWS if problem.size <= max(SIZES) else DRAWS // 4
        draws = torch.stack([way() for _ in range(count)])
        assert abs(draws.mean() - mean) < 5 * (variance / count) ** 0.5
        assert abs(draws.var() / variance - 1) < 5 * (2 / count) ** 0.5


def measure(ways: dict[str, Callable[[], Tensor]]) -> dict[str, tuple[float, float]]:
    """Median milliseconds, of CPU time of this rank and of wall time.

    In turn, all ranks beginning together.
    """
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            distributed.barrier()
            start = time.process_time(), time.perf_counter()
            way()
            stop = time.process_time(), time.perf_counter()
            times[name].append((stop[0] - start[0], stop[1] - start[1]))
    return {
        name: (
            1e3 * statistics.median(cpu for cpu, _ in pairs),
            1e3 * statistics.median(wall for _, wall in pairs),
        )
        for name, pairs in times.items()
    }


def memory() -> float:
    """The most that this rank has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    distributed.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    if rank == 0:
        print(
            f"{ranks} ranks, float64, one thread each, median of {REPEATS}, torch "
            f"{torch.__version__}, pyro {pyro.__version__}\n\n"
            "| products | ranks | `macro_do`: CPU ms | wall | a plain run | wall | by "
            "hand | wall | messages | bytes | peak MB |\n" + 11 * "|---:" + "|"
        )
    for size in [int(given) for given in sys.argv[1:]] or SIZES:
        pyro.set_rng_seed(0)
        problem = Problem(size)
        intervened = pm.macro_do(problem.model, {SALES: pm.Natural(problem.total)})
        check(problem, intervened)
        with Traffic() as traffic:
            intervened()
        ways = {
            "macro_do": intervened,
            "plain": problem.model,
            "by hand": problem.by_hand,
        }
        took = measure(ways)
        if rank == 0:
            print(
                f"| {size} | {ranks} | "
                + " | ".join(f"{t:.1f}" for pair in took.values() for t in pair)
                + f" | {traffic.messages} | {traffic.bytes} | {memory():.0f} |",
                flush=True,
            )
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
