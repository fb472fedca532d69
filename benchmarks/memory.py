# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""How much memory does a run with a million micro variables take?

100 draws of K = 10^6 and of an effect, each way in a process of its own: the peak of
its resident memory during one run, beyond what it was before, over the size of the
draws.

    python benchmarks/memory.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import torch
from harness import Contender, Question, calm
from natural import HAND, OURS, Problem, by_hand, chirho, macro_do, no_intervention

SIZE, DRAWS = 10**6, 100
IN_PLACE = "ChiRho do, in place"
DTYPES = {"float32": torch.float32, "float64": torch.float64}


def contenders(problem: Problem) -> dict[str, Contender]:
    return {
        OURS: partial(macro_do, problem),
        "ChiRho do, hand-derived callable": partial(chirho, problem, False),
        IN_PLACE: partial(chirho, problem, True),
        HAND: partial(by_hand, problem),
        "no intervention": partial(no_intervention, problem),
    }


def peak() -> int:
    """The largest resident memory of this process so far, in bytes.

    A process that is started takes over the peak of the one that starts it, but for
    what Linux says of the memory that it has now.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM"):
                return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(way: str, dtype: str) -> None:
    """Prints the peak of one run beyond what was there before, in sizes of draws."""
    calm()
    problem = Problem.of(SIZE, 1, DTYPES[dtype])
    run = contenders(problem)[way]()
    run()  # one draw: what is loaded, compiled and remembered
    problem.draws = DRAWS
    before = peak()
    problem.check(way, run()) if way != "no intervention" else run()
    size = SIZE * DRAWS * torch.finfo(problem.mu.dtype).bits / 8
    print((peak() - before) / size)


def main() -> None:
    question = Question("memory", "Memory of a million micro variables", ("chirho",))
    columns = {"peak": "peak, in sizes of the draws"}
    table = question.table(f"K = 10^6, {DRAWS} draws", OURS, columns=columns)
    found: dict[str, float] = {}
    for dtype in DTYPES:
        for way in contenders(Problem.of(1, 1, torch.float64)):
            command = [sys.executable, __file__, way, dtype]
            done = subprocess.run(command, capture_output=True, text=True)
            row = {"dtype": dtype, "way": way}
            if done.returncode:
                table.add(row | {"note": done.stderr.strip().splitlines()[-1]})
                continue
            row["peak"] = float(done.stdout.splitlines()[-1])
            table.add(row)
            if way == OURS:
                found[dtype] = row["peak"]
    for dtype in DTYPES:
        what = f"peak memory over the size of the draws, {dtype}"
        question.target(what, found.get(dtype), at_most=1.5)
    question.write()


if __name__ == "__main__":
    child(*sys.argv[1:]) if len(sys.argv) > 1 else main()
