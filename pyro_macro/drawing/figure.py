# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Causal graphs in matplotlib."""

from __future__ import annotations

from collections.abc import Hashable
from io import BytesIO
from math import dist, hypot
from typing import Any

import networkx as nx
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse, FancyArrowPatch, FancyBboxPatch
from matplotlib.path import Path

from pyro_macro.drawing.layers import Layout, Point, layout
from pyro_macro.drawing.looks import BLUE, GREY, INK, Look

MARGIN, RING, RADIUS, POINTS, LARGEST = 0.3, 0.04, 0.7, 11.0, 50.0


class GraphFigure(Figure):
    """A figure that shows itself in a notebook, with or without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.savefig(buffer, format="png")
        return buffer.getvalue()


def draw(graph: nx.DiGraph, title: str | None, ax: Any) -> Any:
    """A figure with the graph, or the figure of ``ax``, drawn into."""
    places = layout(graph)
    left, bottom, right, top = places.extent() if graph else (0.0, 0.0, 1.0, 1.0)
    width, height = right - left + 2 * MARGIN, top - bottom + 2 * MARGIN
    if ax is None:
        shrink = min(1.0, LARGEST / max(width, height))
        head = 0.0 if title is None else 0.35
        figure = GraphFigure(figsize=(width * shrink, height * shrink + head))
        share = height * shrink / (height * shrink + head)
        ax = figure.add_axes((0.0, 0.0, 1.0, share))
    figure = ax.get_figure()
    box = ax.get_window_extent()
    scale = min(box.width / width, box.height / height) / figure.dpi
    ax.set_xlim(left - MARGIN, right + MARGIN)
    ax.set_ylim(bottom - MARGIN, top + MARGIN)
    ax.set_aspect("equal")
    ax.set_axis_off()
    if title is not None:
        ax.set_title(title, parse_math=False)
    _Canvas(graph, places, ax, scale).draw()
    return figure


class _Canvas:
    """Draws in inches; ``scale`` is what becomes of an inch."""

    def __init__(
        self, graph: nx.DiGraph, places: Layout, ax: Any, scale: float
    ) -> None:
        self.graph, self.places, self.ax, self.scale = graph, places, ax, scale

    def draw(self) -> None:
        for left, bottom, right, top, name in self.places.boxes:
            self._box(left, bottom, right, top, name)
        for parent, child, kind in self.graph.edges.data("kind"):
            self._edge(parent, child, kind == "aggregation")
        for node, data in self.graph.nodes.items():
            self._node(node, Look.of(data))

    def _text(
        self, x: float, y: float, text: object, size: float, **style: Any
    ) -> None:
        shown = str(text).replace("\n", "\\n")
        style = {"ha": "center", "va": "center", **style}
        size *= self.scale
        self.ax.text(
            x, y, shown, fontsize=size, parse_math=False, clip_on=False, **style
        )

    def _box(
        self, left: float, bottom: float, right: float, top: float, name: str
    ) -> None:
        self.ax.add_patch(
            FancyBboxPatch(
                (left, bottom),
                right - left,
                top - bottom,
                boxstyle="round,pad=0,rounding_size=0.12",
                facecolor="#00000008",
                edgecolor=GREY,
                linewidth=self.scale,
                zorder=0,
            )
        )
        style = {"color": GREY, "ha": "right", "va": "bottom"}
        self._text(right - 0.08, bottom + 0.05, name, POINTS - 2, **style)

    def _node(self, node: Hashable, look: Look) -> None:
        x, y = self.places.centre[node]
        width, height = self.places.size[node]
        style: dict[str, Any] = {
            "edgecolor": look.border,
            "linestyle": (0, (4, 2)) if look.dashed else "solid",
            "linewidth": 1.2 * self.scale,
        }
        fills = [look.fill, look.fill] if look.macro else [look.fill]
        for k, fill in enumerate(fills):
            size = width - 2 * k * RING, height - 2 * k * RING
            self.ax.add_patch(Ellipse((x, y), *size, facecolor=fill, zorder=3, **style))
        noted = self.places.noted.get(node, [])
        weight = "bold" if look.macro else "normal"
        lift = 0.06 if noted else 0.0
        label = {"color": look.ink, "weight": weight, "zorder": 4}
        self._text(x, y + lift, node, POINTS, **label)
        if noted:
            plates = ", ".join(noted)
            self._text(x, y - 0.11, plates, POINTS - 3.5, color=GREY, zorder=4)

    def _edge(self, parent: Hashable, child: Hashable, tie: bool) -> None:
        latent = Look.of(self.graph.nodes[parent]).latent
        points = self._points(parent, child)
        if (parent, child) in self.places.pulls:
            curve = Path.CURVE3 if len(points) == 3 else Path.CURVE4
            codes = [Path.MOVETO] + [curve] * (len(points) - 1)
        else:
            points, codes = _rounded(points)
        self.ax.add_patch(
            FancyArrowPatch(
                path=Path(points, codes),
                arrowstyle="<|-|>" if tie else "-|>",
                mutation_scale=12 * self.scale,
                linestyle=(0, (1, 2)) if tie else (0, (4, 2)) if latent else "solid",
                linewidth=1.2 * self.scale,
                color=BLUE if tie else GREY if latent else INK,
                zorder=2 if tie else 1,
            )
        )

    def _points(self, parent: Hashable, child: Hashable) -> list[Point]:
        """From the border of one node to that of the other."""
        between = self.places.pulls.get((parent, child))
        if between is None:
            between = self.places.bends.get((parent, child), [])
        centres = [self.places.centre[parent], *between, self.places.centre[child]]
        start = self._border(parent, centres[1])
        return [start, *between, self._border(child, centres[-2])]

    def _border(self, node: Hashable, towards: Point) -> Point:
        (x, y), (width, height) = self.places.centre[node], self.places.size[node]
        dx, dy = towards[0] - x, towards[1] - y
        reach = hypot(2 * dx / width, 2 * dy / height)
        reach = max(reach, 1e-9) * (1 - 2 * RING)  # a little outside of it
        return x + dx / reach, y + dy / reach


def _rounded(points: list[Point]) -> tuple[list[Point], list[Any]]:
    """A line with round corners, as vertices and codes of a path."""
    vertices, codes = [points[0]], [Path.MOVETO]
    for before, corner, after in zip(points, points[1:], points[2:], strict=False):
        radius = min(dist(before, corner) / 2, dist(corner, after) / 2, RADIUS)
        start, end = _towards(corner, before, radius), _towards(corner, after, radius)
        vertices += [start, corner, end]
        codes += [Path.LINETO, Path.CURVE3, Path.CURVE3]
    return [*vertices, points[-1]], [*codes, Path.LINETO]


def _towards(start: Point, end: Point, length: float) -> Point:
    share = length / max(dist(start, end), 1e-9)
    return start[0] + share * (end[0] - start[0]), start[1] + share * (
        end[1] - start[1]
    )
