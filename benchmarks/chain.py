# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does a query of a chain cost once the chain is consolidated?

An affine-Gaussian chain of T sites, with an intervention in the middle: 10,000 draws
of the last site, from the consolidated model and from the model itself under
``poutine.do``, and by hand from the closed form. A finite chain of five states: the
exact distribution of the last site under an intervention, from the consolidated model,
and by one product of vectors and matrices after the other. Before any time is taken
the answers are compared with the closed form and with matrix powers. Building the
consolidated model is timed in runs of the plain one.

    python benchmarks/chain.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from natural import REPEATS, begin
from torch import Tensor

import pyro_macro as pm

DRAWS = 10_000
RATE, NOISE = 0.99, 0.1


def measure(ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median milliseconds of CPU time, in turn, each as often as fits in 20 ms."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            count, start = 0, time.process_time()
            while count == 0 or time.process_time() - start < 0.02:
                way()
                count += 1
            times[name].append(1e3 * (time.process_time() - start) / count)
    return {name: statistics.median(values) for name, values in times.items()}


def affine(length: int) -> Callable[[], Tensor]:
    def model() -> Tensor:
        s = pyro.sample("s0", dist.Normal(1.0, 1.0))
        for t in range(1, length + 1):
            s = pyro.sample(f"s{t}", dist.Normal(RATE * s, NOISE))
        return s

    return model


def finite(length: int) -> tuple[Callable[[], Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.rand(5, 5, generator=generator, dtype=torch.float64)
    table = table / table.sum(-1, keepdim=True)

    def model() -> Tensor:
        x = pyro.sample("x0", dist.Categorical(torch.full((5,), 0.2)))
        for t in range(1, length + 1):
            x = pyro.sample(f"x{t}", dist.Categorical(table[x]))
        return x

    return model, table


def law(model: Any, name: str) -> Any:
    return pyro.poutine.trace(model).get_trace().nodes[name]["fn"]


def affine_ways(length: int) -> tuple[dict[str, Callable[[], Any]], float]:
    model, middle, end = affine(length), length // 2, f"s{length}"
    start = time.process_time()
    fused = pm.consolidate(model, keep=[end], allow=[f"s{t}" for t in range(length)])
    built = 1e3 * (time.process_time() - start)
    left = length - middle
    mean = RATE**left * 2.0
    scale = NOISE * ((1 - RATE ** (2 * left)) / (1 - RATE**2)) ** 0.5
    set_to = {f"s{middle}": 2.0}
    found = law(pyro.poutine.do(fused, set_to), end)
    assert abs(float(found.mean) - mean) < 1e-9 * (1 + mean)
    assert abs(float(found.stddev) - scale) < 1e-9 * scale

    def run(program: Any) -> Any:
        with pyro.plate("draws", DRAWS, dim=-1):
            return pyro.poutine.do(program, set_to)()

    ways: dict[str, Callable[[], Any]] = {
        "consolidated": lambda: run(fused),
        "plain Pyro": lambda: run(model),
        "by hand": lambda: mean + scale * torch.randn(DRAWS),
        "one plain run": model,
    }
    return ways, built


def finite_ways(length: int) -> tuple[dict[str, Callable[[], Any]], float]:
    (model, table), middle, end = finite(length), length // 2, f"x{length}"
    start = time.process_time()
    fused = pm.consolidate(model, keep=[end], allow=[f"x{t}" for t in range(length)])
    built = 1e3 * (time.process_time() - start)
    set_to = {f"x{middle}": torch.tensor(3)}
    exact = torch.linalg.matrix_power(table, length - middle)[3]
    found = law(pyro.poutine.do(fused, set_to), end).probs
    assert torch.allclose(found, exact, 1e-10, 1e-12)

    def step_by_step() -> Tensor:
        row = torch.eye(5)[3]
        for _ in range(length - middle):
            row = row @ table
        return row

    ways: dict[str, Callable[[], Any]] = {
        "consolidated": lambda: law(pyro.poutine.do(fused, set_to), end).probs,
        "step by step": step_by_step,
        "one plain run": model,
    }
    return ways, built


def main() -> None:
    begin(f"{DRAWS} draws")
    print(f"{'chain':<8}{'T':>7}  {'way':<16}{'CPU ms':>10}{'consolidated is':>18}")
    for kind, build, lengths in (
        ("affine", affine_ways, (10, 100, 1000)),
        ("finite", finite_ways, (10, 1000, 10_000)),
    ):
        for length in lengths:
            ways, built = build(length)
            for way in ways.values():
                way()  # warm up
            times = measure(ways)
            for name, value in times.items():
                ratio = times["consolidated"] / value
                print(f"{kind:<8}{length:>7}  {name:<16}{value:>10.3f}{ratio:>16.4f} x")
            runs = built / times["one plain run"]
            build_line = f"{'building':<16}{built:>10.0f}{runs:>12.1f} runs"
            print(f"{kind:<8}{length:>7}  {build_line}")


if __name__ == "__main__":
    main()
