# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What all benchmarks share: one thread, answers before times, turns, a file.

A *contender* is a function without arguments that imports its library, builds the
problem, and returns the function that is timed. One whose library is not installed is
said to be missing in the table.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pyro
import torch

# Read by the pools of OpenMP, the linear algebra libraries, numba and XLA
ONE_THREAD = {
    f"{name}_NUM_THREADS": "1"
    for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR", "NUMBA", "VECLIB_MAXIMUM")
} | {"NPROC": "1"}
RESULTS = Path(__file__).parent / "results"
REPEATS = 7
SHORTEST = 0.02  # seconds: what is faster is repeated until it has taken that long
PATIENCE = 8.0  # seconds of CPU time, after which a way has no further repeat

Row = dict[str, Any]
Run = Callable[[], Any]
Contender = Callable[[], Run]
Check = Callable[[str, Any], None]


class Missing(Exception):
    """A contender that cannot take part, and why."""


def calm() -> None:
    """The same conditions for all parties, in this process.

    Pools look at the environment when they start, which the import of numpy does: where
    it is another one, the script begins again.
    """
    if any(os.environ.get(name) != value for name, value in ONE_THREAD.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | ONE_THREAD)
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)


class Clock:
    """CPU and wall time of this process, all its threads included."""

    def __init__(self) -> None:
        self.cpu, self.wall = time.process_time(), time.perf_counter()

    def seconds(self) -> tuple[float, float]:
        return time.process_time() - self.cpu, time.perf_counter() - self.wall


def measure(ways: Mapping[str, Run]) -> dict[str, dict[str, float]]:
    """Median milliseconds of CPU and wall time and the number of repeats, by name.

    The ways take turns, so that a disturbance of the machine hits all of them. What the
    others have built is kept from the garbage collector, which would visit it again and
    again on the account of whoever makes objects.
    """
    gc.collect()
    gc.freeze()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    spent = dict.fromkeys(ways, 0.0)
    for _ in range(REPEATS):
        for name, way in ways.items():
            if spent[name] > PATIENCE:
                continue
            count, clock = 0, Clock()
            while count == 0 or clock.seconds()[1] < SHORTEST:
                way()
                count += 1
            cpu, wall = clock.seconds()
            spent[name] += cpu
            times[name].append((1e3 * cpu / count, 1e3 * wall / count))
    return {
        name: {
            "cpu": statistics.median(cpu for cpu, _ in found),
            "wall": statistics.median(wall for _, wall in found),
            "repeats": len(found),
        }
        for name, found in times.items()
    }


TIMES = {
    "cpu": "CPU ms",
    "wall": "wall ms",
    "ratio": "x ours",
    "repeats": "repeats",
    "first": "first CPU s",  # building it and running it once, with what it compiles
}
IN_RUNS = TIMES | {"ratio": "runs of the model"}


class Table:
    """What was measured of several contenders on several problems.

    :param ours: the contender that the others are compared with.
    :param axis: the size that a curve is drawn against, where there is to be one.
    :param columns: what is measured, and the heads of these columns.
    """

    def __init__(
        self,
        title: str,
        ours: str = "",
        axis: str | None = None,
        columns: Mapping[str, str] = TIMES,
    ) -> None:
        self.title, self.ours, self.axis = title, ours, axis
        self.columns = dict(columns)
        self.rows: list[Row] = []
        heads = "".join(f"{head:>14}" for head in self.columns.values())
        print(f"\n{title}\n{'':<60}{heads}", flush=True)

    def compare(
        self,
        case: Mapping[str, Any],
        contenders: Mapping[str, Contender],
        check: Check = lambda name, answer: None,
        left_out: Mapping[str, str] | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Builds all contenders, checks their answers, and then takes their times.

        :param check: raises an error if the answer of a contender is wrong.
        :param left_out: why contenders are not run on this problem.
        :param notes: what to say beside a contender.
        """
        notes = {} if notes is None else notes
        ways: dict[str, Run] = {}
        rows: dict[str, Row] = {}
        for name, contender in contenders.items():
            rows[name] = {**case, "way": name}
            if name in notes:
                rows[name]["note"] = notes[name]
            start = Clock()
            try:
                run = contender()
                answer = run()
            except (ImportError, Missing) as error:
                reason = (
                    f"{error.name} is not installed"
                    if isinstance(error, ImportError)
                    else str(error)
                )
                rows[name]["note"] = reason
                continue
            ways[name], rows[name]["first"] = run, start.seconds()[0]
            check(name, answer)
        for name, times in measure(ways).items():
            rows[name] |= times
        for name, reason in (left_out or {}).items():
            rows[name] = {**case, "way": name, "note": reason}
        ours = rows.get(self.ours, {}).get("cpu")
        for row in rows.values():
            if ours and "cpu" in row:
                row["ratio"] = row["cpu"] / ours
            self.add(row)

    def add(self, row: Row) -> None:
        """Adds a row and prints it."""
        self.rows.append(row)
        case = " ".join(f"{key}={row[key]}" for key in self.cases)
        found = "".join(
            f"{row[key]:>14.4g}" if key in row else f"{'':>14}" for key in self.columns
        )
        note = row.get("note", "")
        print(f"{case:<24} {row['way']:<34} {found}  {note}", flush=True)

    @property
    def cases(self) -> list[str]:
        """What tells one problem from another."""
        own = {"way", "note", *self.columns}
        return [key for key in self.rows[0] if key not in own]

    def cpu(self, way: str, **case: Any) -> float | None:
        """The median CPU time of a way in a case, ``None`` where it did not run."""
        for row in self.rows:
            if row["way"] == way and all(row[key] == case[key] for key in case):
                return row.get("cpu")
        raise KeyError(f"{way} {case}")

    def ratio(self, way: str, other: str, **case: Any) -> float | None:
        """How many times as long one way takes as another."""
        one, two = self.cpu(way, **case), self.cpu(other, **case)
        return None if one is None or two is None else one / two

    def exponent(self, way: str, axis: str, start: float = 0.0) -> float | None:
        """The exponent of the CPU time in a size, from size ``start`` on."""
        return exponent(self.rows, way, axis, start)

    def json(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "ours": self.ours,
            "axis": self.axis,
            "cases": self.cases,
            "columns": self.columns,
            "rows": self.rows,
        }


def exponent(
    rows: Iterable[Row], way: str, axis: str, start: float = 0.0
) -> float | None:
    """The slope of the logarithm of the CPU time in that of a size.

    :param start: the least size that counts: small ones cost the same.
    """
    points = [
        (math.log(row[axis]), math.log(row["cpu"]))
        for row in rows
        if row["way"] == way and "cpu" in row and row[axis] >= start
    ]
    if len(points) < 2:
        return None
    return statistics.linear_regression(*zip(*points, strict=True)).slope


class Question:
    """One question: its tables, what they should show, and the file they go to.

    :param name: of the file.
    :param title: the question.
    :param packages: the libraries whose versions are told.
    """

    def __init__(self, name: str, title: str, packages: tuple[str, ...] = ()) -> None:
        calm()
        self.name, self.title = name, title
        self.versions = {
            package: _version(package) for package in ("torch", "pyro-ppl", *packages)
        }
        self.tables: list[Table] = []
        self.targets: list[dict[str, Any]] = []
        print(f"{title}\n{self.versions}")

    def table(self, *args: Any, **kwargs: Any) -> Table:
        """A new :class:`Table` of this question."""
        self.tables.append(Table(*args, **kwargs))
        return self.tables[-1]

    def target(
        self,
        what: str,
        found: float | None,
        at_least: float | None = None,
        at_most: float | None = None,
    ) -> None:
        """Notes a number that should be reached, and whether it is."""
        wanted = f"at least {at_least:g}" if at_most is None else f"at most {at_most:g}"
        met = found is not None and (
            found >= at_least if at_least is not None else found <= at_most
        )
        self.targets.append(
            {"what": what, "found": found, "wanted": wanted, "met": met}
        )
        shown = "not measured" if found is None else f"{found:.3g}"
        print(f"{'met' if met else 'NOT MET':<8} {what}: {shown}, wanted {wanted}")

    def write(self) -> None:
        RESULTS.mkdir(exist_ok=True)
        found = {
            "title": self.title,
            "machine": machine(),
            "versions": self.versions,
            "targets": self.targets,
            "tables": [table.json() for table in self.tables],
        }
        path = RESULTS / f"{self.name}.json"
        path.write_text(json.dumps(rounded(found), indent=1) + "\n")


def rounded(thing: Any) -> Any:
    """Numbers to four digits: more would only be noise in the files."""
    if isinstance(thing, float):
        return float(f"{thing:.4g}")
    if isinstance(thing, dict):
        return {key: rounded(value) for key, value in thing.items()}
    return [rounded(part) for part in thing] if isinstance(thing, list) else thing


def machine() -> str:
    """The processor, its cores, and Python."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [
            line.split(":")[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        name = models[0] if models else name
    return (
        f"{name}, {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}"
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
