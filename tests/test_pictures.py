# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The scripts of the documentation's pictures draw, and their pictures are there."""

import re
import sys
from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

DOCS = Path(__file__).resolve().parent.parent / "docs"
PICTURES = DOCS / "pictures"
LARGEST = 250_000  # bytes
sys.path.append(str(PICTURES))

import draw_all  # noqa: E402


@pytest.mark.parametrize("name", draw_all.NAMES)
def test_a_picture_is_drawn(name):
    torch.set_default_dtype(torch.float32)  # as a reader has it
    try:
        figure = draw_all.figure(name)
        figure.canvas.draw()
        words = {text.get_text() for text in figure.findobj(matplotlib.text.Text)}
        assert figure.axes and words - {""}
    finally:
        plt.close("all")
    assert 0 < (PICTURES / f"{name}.png").stat().st_size < LARGEST


def test_each_picture_is_shown_and_each_script_is_drawn():
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    shown = re.findall(r"pictures/(\w+)\.png", "".join(p.read_text() for p in pages))
    scripts = {path.stem for path in PICTURES.glob("*.py")} - {"pictured", "draw_all"}
    assert set(draw_all.NAMES) == scripts == set(shown)
