# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Executes the notebooks in tutorials/ afresh, without writing to them.

Run as ``python tests/run_notebooks.py``. The kernel is this very interpreter.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import nbformat
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

TUTORIALS = Path(__file__).resolve().parent.parent / "tutorials"
TIMEOUT = 600  # seconds, for each cell


class ThisInterpreter(AsyncKernelManager):
    """Starts kernels of this interpreter, whichever others are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR"]
        return KernelSpec(
            argv=[*command, "-f", "{connection_file}"],
            display_name="Python 3",
            language="python",
        )


def execute(path: Path) -> str | None:
    """Executes one notebook, and returns what went wrong."""
    notebook = nbformat.read(path, as_version=4)
    current = None

    def started(cell: object, cell_index: int) -> None:
        nonlocal current
        current = cell_index

    client = NotebookClient(
        notebook,
        kernel_manager_class=ThisInterpreter,
        kernel_name="python3",
        timeout=TIMEOUT,
        resources={"metadata": {"path": str(path.parent)}},
        on_cell_start=started,
    )
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        return f"cell {current} of {path.name}:\n{error}"
    return None


def main() -> int:
    """Executes all notebooks, one line each; 1 if any of them failed."""
    paths = sorted(TUTORIALS.glob("*.ipynb"))
    if not paths:
        print(f"no notebooks in {TUTORIALS}")
        return 1
    failures = []
    for path in paths:
        start = time.monotonic()
        failure = execute(path)
        verdict = "ok" if failure is None else "FAILED"
        seconds = time.monotonic() - start
        print(f"{path.name}: {verdict}, {seconds:.1f} s", flush=True)
        if failure is not None:
            failures.append(failure)
    for failure in failures:
        print(f"\n{failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
