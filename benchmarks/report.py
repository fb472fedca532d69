# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Writes tables and plots of the last results into ``README.md``.

python benchmarks/report.py
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
from harness import RESULTS, exponent

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

HERE = Path(__file__).parent
README = HERE / "README.md"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
ORDER = (
    "natural",
    "total",
    "memory",
    "verdict",
    "chain",
    "finite_chain",
    "posterior",
    "overhead",
    "grid",
    "finite",
)
# Okabe and Ito's colours, told apart by all; beyond them, markers and dashes
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX*<>hp"

Result = dict[str, Any]


def load() -> dict[str, Result]:
    paths = [RESULTS / f"{name}.json" for name in ORDER]
    return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}


def shown(number: Any) -> str:
    """Three digits, without exponents where numbers are usual."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return str(number)
    if isinstance(number, int) or number == 0:
        return (
            f"{number:,}" if isinstance(number, int) and number < 1e5 else f"{number:g}"
        )
    if 1e-3 <= abs(number) < 1e5:
        digits = max(0, 2 - int(f"{number:e}".split("e")[1]))
        return f"{number:,.{digits}f}"
    return f"{number:.2e}"


def markdown(heads: list[str], rows: Iterable[list[str]], numbers: range) -> str:
    """A table.

    :param numbers: which columns are aligned right.
    """
    lines = ["| " + " | ".join(heads) + " |"]
    marks = ["---:" if i in numbers else ":---" for i in range(len(heads))]
    lines.append("|" + "|".join(marks) + "|")
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines)


def _ours(found: dict[str, Any]) -> str:
    """The way of this library, where the others are compared with it."""
    return found["ours"] if found["columns"].get("ratio", "x ours") == "x ours" else ""


def table(found: dict[str, Any]) -> str:
    """One table of a question."""
    cases, columns = found["cases"], found["columns"]
    notes = any("note" in row for row in found["rows"])
    heads = [*cases, "way", *columns.values()] + ["remark"] * notes
    rows = []
    for row in found["rows"]:
        way = f"**{row['way']}**" if row["way"] == _ours(found) else row["way"]
        cells = [shown(row[case]) for case in cases] + [way]
        cells += [shown(row[key]) if key in row else "" for key in columns]
        rows.append(cells + [row.get("note", "")] * notes)
    first = len(cases) + 1
    body = markdown(heads, rows, range(first, first + len(columns)))
    return f"<details>\n<summary>{found['title']}</summary>\n\n{body}\n\n</details>"


def plot(name: str, result: Result) -> str:
    """Cost against size for each table that has one, on double logarithmic axes."""
    tables = [found for found in result["tables"] if found["axis"]]
    if not tables:
        return ""
    size = (8.5, 4.2 * len(tables))
    figure, axes = pyplot.subplots(
        len(tables), 1, figsize=size, squeeze=False, layout="constrained"
    )
    for found, panel in zip(tables, axes[:, 0], strict=True):
        axis, rows = found["axis"], found["rows"]
        ways = list(dict.fromkeys(row["way"] for row in rows if "cpu" in row))
        for i, way in enumerate(ways):
            points = [r for r in rows if r["way"] == way and "cpu" in r]
            sizes = [row[axis] for row in points]
            slope = exponent(rows, way, axis, max(sizes) / 100)
            grows = "" if slope is None else f" ({slope:.2f})"
            panel.plot(
                sizes,
                [row["cpu"] for row in points],
                color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)],
                linestyle="-" if i < len(COLOURS) else "--",
                linewidth=2.5 if way == _ours(found) else 1.2,
                label=f"{way}{grows}",
            )
        panel.set(xscale="log", yscale="log", xlabel=axis, ylabel="CPU time (ms)")
        panel.set_title(found["title"], fontsize=10)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    path = RESULTS / f"{name}.svg"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    pyplot.close(figure)
    legend = "In brackets: the exponent, fitted to the last two decades of each curve."
    return f"![Cost against size]({path.relative_to(HERE)})\n\n{legend}"


def targets(results: dict[str, Result]) -> str:
    """What should be reached, and what was."""
    rows = []
    for name, result in results.items():
        for target in result["targets"]:
            found = (
                "not measured" if target["found"] is None else shown(target["found"])
            )
            met = "yes" if target["met"] else "**no**"
            script = f"`{name}.py`"
            rows.append([script, target["what"], found, target["wanted"], met])
    heads = ["script", "what", "found", "wanted", "met"]
    return markdown(heads, rows, range(2, 4))


def report(results: dict[str, Result]) -> str:
    machines = dict.fromkeys(result["machine"] for result in results.values())
    versions: dict[str, str] = {}
    for result in results.values():
        versions |= result["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [
        BEGIN,
        f"Last run: {'; '.join(machines)}. {told}.",
        "## What is to be reached, and what is",
        targets(results),
    ]
    for name, result in results.items():
        parts += [f"## `{name}.py`: {result['title']}", plot(name, result)]
        parts += [table(found) for found in result["tables"]]
    return "\n\n".join(part for part in [*parts, END] if part)


def main() -> None:
    pyplot.rcParams["svg.fonttype"] = "none"
    pyplot.rcParams["svg.hashsalt"] = "pyro_macro"
    before, _, rest = README.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    README.write_text(before + report(load()) + after)


if __name__ == "__main__":
    main()
