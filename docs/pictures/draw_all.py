# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Draws the pictures of the documentation, or those that are named.

Each of the others here has a function ``draw``, and is drawn into a file of its name.
"""

import importlib
import sys
from pathlib import Path

import matplotlib
import pyro

HERE = Path(__file__).resolve().parent
NAMES = (
    "one_total",
    "fibre_2d",
    "fibre_3d",
    "dose_response",
    "confounding",
    "graphs",
    "consolidation",
)


def figure(name):
    """The picture of one script."""
    pyro.set_rng_seed(0)
    pyro.clear_param_store()
    return importlib.import_module(name).draw()


def main(names):
    matplotlib.use("Agg")
    for name in names or NAMES:
        figure(name).savefig(
            HERE / f"{name}.png",
            dpi=110,
            bbox_inches="tight",
            metadata={"Software": None},
        )


if __name__ == "__main__":
    main(sys.argv[1:])
