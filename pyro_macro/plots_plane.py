# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of fibres of three elements: planes, and triangles."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.plots import SEEN, axes_of
from pyro_macro.questions.fibres import FibreProgram, OnFibre, extent

GREY = "#999999"
PARTS = 30  # steps across a plane, from its middle to a side


def deep_axes(ax: Any) -> Any:
    if ax is not None:
        if not hasattr(ax, "set_zlabel"):
            raise PyroMacroError(
                "plot_fibre: ax has two dimensions, and the micro state three elements."
                ' Expected axes made with subplot_kw={"projection": "3d"}.'
            )
        return ax
    flat = axes_of(None)  # says what is missing
    figure = flat.get_figure()
    flat.remove()
    return figure.add_subplot(projection="3d")


def draw_plane(program: FibreProgram, name: str, way: OnFibre, ax: Any) -> None:
    """A fibre of micro states of three elements, as far as the draws reach."""
    from matplotlib.cm import ScalarMappable
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    ends = program.limits()
    low, high = extent(way.draws, ends)
    if way.states is not None:
        low, high = extent(torch.cat([way.states] * 2), ends)
    if bool((low == ends[0]).all() & (program.weights > 0).all()):
        # A triangle, whole
        share = (way.value - program.weights @ low) / program.weights
        high = torch.minimum(low + share, ends[1])
    corners = _corners(program, way.value, low, high)
    outline = Poly3DCollection([corners.numpy()], edgecolor=GREY, linewidth=0.8)
    outline.set_facecolor("#99999922" if way.density is None else "none")
    if way.density is None:
        assert way.states is not None and way.probabilities is not None
        areas = (20 + 400 * way.probabilities).numpy()
        states = way.states.T.numpy()
        ax.scatter(*states, s=areas, color=SEEN, lw=0, depthshade=False)
    else:
        triangles = _triangles(corners)
        height = way.density(triangles.mean(1)) / way.highest
        scale = ScalarMappable(cmap="YlGnBu")
        scale.set_clim(0.0, 1.0)
        colors = scale.to_rgba(height.numpy())
        ax.add_collection3d(
            Poly3DCollection(
                triangles.numpy(), facecolors=colors, edgecolors=colors, linewidths=0.3
            )
        )
        bar = ax.get_figure().colorbar(scale, ax=ax, shrink=0.6, pad=0.02)
        bar.set_label("density, relative to the highest")
    ax.add_collection3d(outline)
    for i, axis in enumerate("xyz"):
        getattr(ax, f"set_{axis}lim")(float(low[i]), float(high[i]))
    ax.set_title(f"{way.labelled(name)}: {program.macro.name} = {way.value:g}")
    ax.view_init(elev=28, azim=40)
    ax.set_box_aspect(None, zoom=0.82)  # room for what is written at the axes


def _corners(program: FibreProgram, value: float, low: Tensor, high: Tensor) -> Tensor:
    """Where a plane meets the edges of a box, around the middle: shape ``(c, 3)``."""
    w, ends, near = program.weights, torch.stack([low, high]), 1e-9 * (high - low)
    found: list[Tensor] = []
    for axis in range(3):
        others = [i for i in range(3) if i != axis]
        for picks in product(range(2), repeat=2):
            point = torch.empty(3, dtype=torch.float64)
            point[others] = ends[picks, others]
            point[axis] = (value - w[others] @ point[others]) / w[axis]
            inside = low[axis] - near[axis] <= point[axis] <= high[axis] + near[axis]
            # At a corner of the box three edges meet
            known = any(bool(((p - point).abs() <= 2 * near).all()) for p in found)
            if inside and not known:
                found.append(point)
    corners = torch.stack(found)
    inside = corners - corners.mean(0)
    basis = torch.linalg.svd(inside, full_matrices=False).Vh[:2]
    flat = inside @ basis.mT
    return corners[torch.atan2(flat[:, 1], flat[:, 0]).argsort()]


def _triangles(corners: Tensor) -> Tensor:
    """A polygon in small triangles: shape ``(t, 3, 3)``."""
    middle, parts = corners.mean(0), []
    for a, b in zip(corners, corners.roll(-1, 0), strict=True):
        u, v = (a - middle) / PARTS, (b - middle) / PARTS
        for i, j in product(range(PARTS), repeat=2):
            at = middle + i * u + j * v
            if i + j < PARTS:
                parts.append(torch.stack([at, at + u, at + v]))
            if i + j < PARTS - 1:
                parts.append(torch.stack([at + u, at + u + v, at + v]))
    return torch.stack(parts)
