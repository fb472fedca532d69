# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Is the total met?

The largest distance of a draw's sum from the value that was set, over 1000 draws of K
independent Gaussians: of ``macro_do``, of the same map by hand without its second step,
and of Pyro's ``MultivariateNormal``, whose Cholesky factor needs a jitter. Sums are
taken in float64. One rounding of the sum is ``eps`` of the dtype.

    python benchmarks/total.py
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from harness import Question
from natural import SALES, Problem, drawn_by_hand
from natural_dense import jittered
from torch import Tensor

import pyro_macro as pm

DRAWS = 1000
OURS = "macro_do"


def macro_do(problem: Problem) -> Tensor:
    intervened = pm.macro_do(problem.model, {SALES: pm.Natural(problem.total)})
    with pyro.plate("draws", problem.draws, dim=-1):
        trace = pyro.poutine.trace(intervened).get_trace()
    return trace.nodes["x"]["value"]


def with_jitter(problem: Problem) -> Tensor:
    law = pyro.distributions.MultivariateNormal(*jittered(problem))
    return law.sample((problem.draws,))


def main() -> None:
    question = Question("total", "Is the total met?")
    columns = {"miss": "largest miss", "relative": "in roundings of the sum"}
    table = question.table(f"{DRAWS} draws", OURS, columns=columns)
    ways: dict[str, Callable[[Problem], Tensor]] = {
        OURS: macro_do,
        "by hand, one step": drawn_by_hand,
        "MultivariateNormal, jitter": with_jitter,
    }
    worst: dict[torch.dtype, float] = {}
    for dtype in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        for size in (10, 1000, 5000):
            problem = Problem.of(size, DRAWS, dtype)
            problem.total = float(torch.tensor(problem.total, dtype=dtype))
            for way, draw in ways.items():
                row = {"K": size, "dtype": name, "way": way}
                if size > 1000 and draw is with_jitter:
                    table.add(row | {"note": "left out: takes minutes"})
                    continue
                miss = float(
                    (draw(problem).double().sum(-1) - problem.total).abs().max()
                )
                relative = miss / (problem.total * torch.finfo(dtype).eps)
                table.add(row | {"miss": miss, "relative": relative})
                if way == OURS:
                    worst[dtype] = max(worst.get(dtype, 0.0), relative)
    for dtype, relative in worst.items():
        name = str(dtype).removeprefix("torch.")
        what = f"largest miss in roundings of the sum, {name}"
        question.target(what, relative, at_most=4.0)
    miss = max(
        row["miss"]
        for row in table.rows
        if row["way"] == OURS and row["dtype"] == "float64"
    )
    question.target("largest miss, float64", miss, at_most=1e-11)
    question.write()


if __name__ == "__main__":
    main()
