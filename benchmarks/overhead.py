# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does ``macro_do`` add to a program of 1000 scalar sites?

The total of the 1000 sites is set, beside a plain run, a run with a trace and Pyro's
``do`` of one site, and ChiRho's run of two worlds.

    python benchmarks/overhead.py
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import Contender, Question, Run

import pyro_macro as pm

SITES, TOTAL = 1000, 3.0
NAMES = [f"x{i}" for i in range(SITES)]
OURS, THEIRS = "trace, macro_do Natural", "trace, Pyro do"


def model() -> torch.Tensor:
    total = torch.zeros(())
    for name in NAMES:
        total = total + pyro.sample(name, dist.Normal(0.0, 1.0))
    return total


def set_total(realization: pm.Realization, micro: list[str] = NAMES) -> Any:
    return pm.macro_do(model, {pm.MacroVariable("total", micro): realization})


def natural() -> Run:
    return set_total(pm.Natural(TOTAL))


def allocate() -> Run:
    return set_total(pm.Allocate(TOTAL, shares=torch.full((SITES,), 1 / SITES)))


def of_two() -> Run:
    return set_total(pm.Natural(TOTAL), NAMES[:2])


def traced(program: Any) -> Run:
    return lambda: pyro.poutine.trace(program).get_trace()


def pyro_do() -> Run:
    return traced(pyro.poutine.do(model, {"x500": torch.tensor(0.0)}))


def two_worlds() -> Run:
    from chirho.counterfactual.handlers import MultiWorldCounterfactual
    from chirho.interventional.handlers import do

    def run() -> torch.Tensor:
        actions = {"x500": torch.tensor(0.0)}
        with MultiWorldCounterfactual(), do(actions=actions):
            return model()

    return run


def check(name: str, answer: Any) -> None:
    if name.startswith("trace, macro_do"):
        micro = NAMES[:2] if name.endswith("of two") else NAMES
        found = sum(answer.nodes[site]["value"] for site in micro)
        assert abs(float(found) - TOTAL) < 1e-9, (name, found)
        assert len(set(NAMES) - set(answer.nodes)) == 0
    elif name == THEIRS:
        assert float(answer.nodes["x501"]["value"]) != 0
    elif name == "ChiRho, two worlds":
        assert answer.numel() == 2  # as it is, and with the site set


def main() -> None:
    question = Question("overhead", "1000 scalar sites", ("chirho",))
    torch.set_default_dtype(torch.float64)
    table = question.table("One run of a program of 1000 scalar sites, float64", OURS)
    contenders: dict[str, Contender] = {
        OURS: lambda: traced(natural()),
        "trace, macro_do Allocate": lambda: traced(allocate()),
        "trace, macro_do Natural of two": lambda: traced(of_two()),
        "macro_do Natural": natural,
        THEIRS: pyro_do,
        "trace": lambda: traced(model),
        "plain": lambda: model,
        "ChiRho, two worlds": two_worlds,
    }
    table.compare({"sites": SITES}, contenders, check)
    what = "time over trace and do, Natural over all 1000 sites"
    question.target(what, table.ratio(OURS, THEIRS), at_most=2.0)
    what = "time over trace and do, Allocate over all 1000 sites"
    allocated = table.ratio("trace, macro_do Allocate", THEIRS)
    question.target(what, allocated, at_most=2.0)
    question.write()


if __name__ == "__main__":
    main()
