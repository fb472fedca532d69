# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Where nodes and edges go: columns in causal order, macro-variables above."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import networkx as nx

from pyro_macro.errors import PyroMacroError

Point = tuple[float, float]
Side = tuple[float, float, float, float]  # left, bottom, right, top
Cell = Hashable  # a node, or a bend of an edge

# Inches
HEIGHT, ROW, GAP, CHARACTER, STEEP = 0.5, 0.85, 0.8, 0.1, 0.8
PAD, FOOT = 0.14, 0.22  # inside of a box
LANE = 0.7  # between lanes, in rows
SWEEPS, MAX_BENDS = 8, 5000


@dataclass(frozen=True)
class _Bend:
    """Where an edge passes a column between those of its ends."""

    parent: Hashable
    child: Hashable
    column: int


@dataclass
class Layout:
    """Places in inches.

    :ivar centre: of each node.
    :ivar size: width and height of each node.
    :ivar bends: of an edge: the corners of its line.
    :ivar pulls: of an edge: the control points of a Bezier curve.
    :ivar boxes: plates that a box fits around: left, bottom, right, top, and the name.
    :ivar noted: plates that are named under the label of a node instead.
    """

    centre: dict[Hashable, Point] = field(default_factory=dict)
    size: dict[Hashable, Point] = field(default_factory=dict)
    bends: dict[tuple[Hashable, Hashable], list[Point]] = field(default_factory=dict)
    pulls: dict[tuple[Hashable, Hashable], list[Point]] = field(default_factory=dict)
    boxes: list[tuple[float, float, float, float, str]] = field(default_factory=list)
    noted: dict[Hashable, list[str]] = field(default_factory=dict)

    def extent(self) -> Side:
        """Left, bottom, right and top of all of it."""
        sides = [box[:4] for box in self.boxes]
        for points in (*self.bends.values(), *self.pulls.values()):
            sides.extend((x, y, x, y) for x, y in points)
        sides.extend(map(self.around, self.centre))
        return _hull(sides)

    def around(self, node: Hashable) -> Side:
        (x, y), (width, height) = self.centre[node], self.size[node]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def layout(graph: nx.DiGraph) -> Layout:
    """Columns by the longest path, plates in lanes, tied macro-variables above.

    :raises PyroMacroError: if the graph has a cycle.
    """
    if not nx.is_directed_acyclic_graph(graph):
        raise PyroMacroError(
            "render: matplotlib draws in causal order, and the graph has a cycle. "
            "Use backend='graphviz', 'dot' or 'mermaid'."
        )
    result = Layout()
    for node in graph:
        width = max(0.6, CHARACTER * len(str(node)) + 0.35)
        result.size[node] = width, HEIGHT
    above = [node for node in graph if _is_above(graph, node)]
    apart = set(above)
    tied = {site for node in above for site in graph.nodes[node]["micro"]}
    below = nx.DiGraph()
    for node in sorted(graph, key=lambda node: node not in tied):  # on top if tied
        if node not in apart:
            below.add_node(node, **graph.nodes[node])
    below.add_edges_from(e for e in graph.edges if apart.isdisjoint(e))
    columns = _columns(below)
    grid = _Grid(below, columns)
    wide = [0.0] * (1 + max(columns.values(), default=0))
    for node, k in columns.items():
        wide[k] = max(wide[k], result.size[node][0])
    for node in above:  # one of them may stand right above the column of its sites
        k = max(columns[site] for site in graph.nodes[node]["micro"])
        wide[k] = max(wide[k], result.size[node][0])
    middle = [sum(wide[:k]) + k * GAP + wide[k] / 2 for k in range(len(wide))]
    for cell, row in grid.row.items():
        if isinstance(cell, _Bend):
            point = middle[cell.column], -ROW * row
            result.bends.setdefault((cell.parent, cell.child), []).append(point)
        else:
            result.centre[cell] = middle[columns[cell]], -ROW * row
    for parent, child in below.edges:
        (start, high), (end, low) = result.centre[parent], result.centre[child]
        k = columns[child] - 1
        across = max(wide[k], wide[k + 1]) / (end - start) / 2
        hits = abs(high - low) * across > STEEP * ROW
        if hits and (parent, child) not in result.bends:
            turn = middle[k] + (wide[k] + GAP) / 2  # past what is in the columns
            result.pulls[parent, child] = [(turn, high), (turn, low)]
    _place_boxes(result, below)
    gaps = [x + (width + GAP) / 2 for x, width in zip(middle, wide, strict=True)]
    tops = {min(cells, key=grid.row.__getitem__) for cells in grid.cells.values()}
    _place_above(result, graph, above, columns, (middle, gaps), tops)
    for node in above:
        if graph.nodes[node].get("plates"):
            result.noted[node] = list(graph.nodes[node]["plates"])
    return result


def _is_above(graph: nx.DiGraph, node: Hashable) -> bool:
    """Whether a macro-variable stands above micro sites that are in the graph."""
    sites = graph.nodes[node].get("micro", ())
    return bool(sites) and all(site in graph for site in sites)


def _columns(graph: nx.DiGraph) -> dict[Hashable, int]:
    """As far left as parents allow; roots right before the first of their children."""
    column: dict[Hashable, int] = {}
    for k, generation in enumerate(nx.topological_generations(graph)):
        column.update(dict.fromkeys(generation, k))
    for node in graph:
        if not graph.in_degree(node) and graph.out_degree(node):
            column[node] = min(column[child] for child in graph.successors(node)) - 1
    return column


class _Grid:
    """The row of each node and bend, found by sweeps of barycentres.

    Nodes of the same plates share a lane, so that boxes fit around them.
    """

    def __init__(self, graph: nx.DiGraph, columns: dict[Hashable, int]) -> None:
        plates = {node: tuple(graph.nodes[node].get("plates", ())) for node in graph}
        met: dict[tuple[str, ...], int] = {}  # plates within plates, in program order
        for names in plates.values():
            for k in range(len(names) + 1):
                met.setdefault(names[:k], len(met))
        lanes = sorted(
            set(plates.values()),
            key=lambda names: [met[names[: k + 1]] for k in range(len(names))],
        )
        number = {names: k for k, names in enumerate(lanes)}
        self.lane: dict[Cell, int] = {node: number[plates[node]] for node in graph}
        self.near: dict[bool, dict[Cell, list[Cell]]] = {
            True: defaultdict(list),
            False: defaultdict(list),
        }
        self.cells: dict[int, list[Cell]] = defaultdict(list)
        for node in graph:
            self.cells[columns[node]].append(node)
        spans = {(u, v): range(columns[u] + 1, columns[v]) for u, v in graph.edges}
        bent = sum(map(len, spans.values())) <= MAX_BENDS
        for (parent, child), span in spans.items():
            bends = [_Bend(parent, child, k) for k in span if bent]
            for bend in bends:
                self.cells[bend.column].append(bend)
                self.lane[bend] = self.lane[child]
            for one, other in pairwise([parent, *bends, child]):
                self.near[True][other].append(one)
                self.near[False][one].append(other)
        high = [0] * len(number)
        for cells in self.cells.values():
            for lane in range(len(number)):
                count = sum(self.lane[cell] == lane for cell in cells)
                high[lane] = max(high[lane], count)
        self.high = high
        self.row: dict[Cell, float] = {}
        order = sorted(self.cells)
        for k in order:
            self._settle(k)
        for sweep in range(SWEEPS):
            forward = sweep % 2 == 0
            for k in order if forward else reversed(order):
                wish = {cell: self._wish(cell, forward) for cell in self.cells[k]}
                self.cells[k].sort(key=wish.__getitem__)
                self._settle(k)

    def _wish(self, cell: Cell, forward: bool) -> float:
        near = self.near[forward][cell] or [cell]
        return sum(self.row[other] for other in near) / len(near)

    def _settle(self, k: int) -> None:
        """Cells of a column take their places, in the middle of their lanes."""
        base = 0.0
        for lane, high in enumerate(self.high):
            cells = [cell for cell in self.cells[k] if self.lane[cell] == lane]
            for place, cell in enumerate(cells):
                self.row[cell] = base + (high - len(cells)) / 2 + place
            base += high + LANE


def _place_above(
    result: Layout,
    graph: nx.DiGraph,
    above: list[Hashable],
    columns: dict[Hashable, int],
    across: tuple[list[float], list[float]],
    tops: set[Cell],
) -> None:
    """Macro-variables in a row on top, and their edges beside the columns.

    A single site that is on top of its column has its macro-variable right above;
    others have theirs after the last of their columns, or before the first of them
    when it is intervened on and its edges come from there.
    """
    if not above:
        return
    middle, gaps = across
    ceiling = result.extent()[3] + 2 * PAD
    wish, beside = {}, {}
    for node in above:
        sites = graph.nodes[node]["micro"]
        back = 1 if graph.nodes[node].get("intervened") else 0
        beside[node] = [([-GAP / 2, *gaps])[columns[s] + 1 - back] for s in sites]
        wish[node] = min(beside[node]) if back else max(beside[node])
        if len(sites) == 1 and sites[0] in tops:
            wish[node] = middle[columns[sites[0]]]
    end = min(wish.values()) - GAP - max(result.size[node][0] for node in above)
    for node in sorted(above, key=wish.__getitem__):
        width = result.size[node][0]
        x = max(wish[node], end + PAD + width / 2)
        end = x + width / 2
        result.centre[node] = x, ceiling + ROW - HEIGHT / 2
        for site, gap in zip(graph.nodes[node]["micro"], beside[node], strict=True):
            level = result.centre[site][1] + HEIGHT / 2
            if gap == x:
                result.pulls[site, node] = result.pulls[node, site] = [(gap, level)]
            elif x != result.centre[site][0] or site not in tops:
                points = [(gap, level + HEIGHT / 2), (gap, ceiling), (x, ceiling)]
                points = points[points[0][1] >= ceiling :]
                result.bends[site, node] = points
                result.bends[node, site] = points[::-1]


def _place_boxes(result: Layout, graph: nx.DiGraph) -> None:
    """A box around each plate, where there is nothing else inside."""
    members: dict[str, dict[Hashable, tuple[str, ...]]] = defaultdict(dict)
    for node, data in graph.nodes.items():
        for plate in data.get("plates", ()):
            members[plate][node] = data["plates"]
    for plate, nodes in members.items():
        inside = max(len(p) - p.index(plate) - 1 for p in nodes.values())
        left, bottom, right, top = _hull(map(result.around, nodes))
        pad = PAD * (inside + 1)
        box = left - pad, bottom - pad - FOOT * (inside + 1), right + pad, top + pad
        if any(_meet(box, result.around(node)) for node in graph if node not in nodes):
            for node in nodes:
                result.noted.setdefault(node, []).append(plate)
        else:
            result.boxes.append((*box, plate))


def _hull(sides: Iterable[Side]) -> Side:
    left, bottom, right, top = zip(*sides, strict=True)
    return min(left), min(bottom), max(right), max(top)


def _meet(box: Side, other: Side) -> bool:
    return (
        box[0] < other[2]
        and other[0] < box[2]
        and box[1] < other[3]
        and other[1] < box[3]
    )
