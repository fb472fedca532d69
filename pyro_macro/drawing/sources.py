# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Causal graphs in the languages of Graphviz and Mermaid."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

import networkx as nx

from pyro_macro.drawing.looks import BLUE, GREY, Look


@dataclass
class _Box:
    """What is inside a plate: nodes, and further plates."""

    nodes: list[Hashable] = field(default_factory=list)
    inside: dict[str, _Box] = field(default_factory=lambda: defaultdict(_Box))

    @classmethod
    def of(cls, graph: nx.DiGraph) -> _Box:
        whole = cls()
        for node, data in graph.nodes.items():
            box = whole
            for plate in data.get("plates", ()):
                box = box.inside[plate]
            box.nodes.append(node)
        return whole


# What means something in a quoted string: entities, escapes, its end, an anonymous node
DOT_ESCAPES = str.maketrans(
    {"&": "&amp;", "\\": "\\\\", '"': '\\"', "%": "&#37;", "\n": "\\n"}
)


def _quoted(text: object) -> str:
    """A name as a quoted string of the DOT language."""
    return f'"{str(text).translate(DOT_ESCAPES)}"'


def dot(graph: nx.DiGraph, title: str | None) -> Iterator[str]:
    """The statements of a graph in the DOT language."""
    yield "  rankdir=LR"
    yield '  node [shape=ellipse style=filled fontname="Helvetica" fontsize=12]'
    yield "  edge [arrowsize=0.8]"
    if title is not None:
        yield f'  label={_quoted(title)} labelloc=t fontname="Helvetica"'
    yield from _dot_box(graph, _Box.of(graph), "cluster", "  ")
    for parent, child, kind in graph.edges.data("kind"):
        look = " [weight=4]"
        if kind == "aggregation":
            look = f' [dir=both style=dotted penwidth=1.5 color="{BLUE}"]'
        elif Look.of(graph.nodes[parent]).latent:
            look = f' [style=dashed color="{GREY}" weight=4]'
        yield f"  {_quoted(parent)} -> {_quoted(child)}{look}"


def _dot_box(graph: nx.DiGraph, box: _Box, name: str, indent: str) -> Iterator[str]:
    for node in box.nodes:
        look = Look.of(graph.nodes[node])
        parts = [f"label={_quoted(node)}"]
        parts.append(f'fillcolor="{look.fill}" color="{look.border}"')
        parts.append(f'fontcolor="{look.ink}"')
        if look.macro:
            parts.append('peripheries=2 fontname="Helvetica-Bold"')
        if look.dashed:
            parts.append('style="filled,dashed"')
        yield f"{indent}{_quoted(node)} [{' '.join(parts)}]"
    for k, (plate, inner) in enumerate(box.inside.items()):
        yield f"{indent}subgraph {name}_{k} {{"
        yield f"{indent}  label={_quoted(plate)} labelloc=b labeljust=r"
        yield f'{indent}  style=rounded color="{GREY}" fontname="Helvetica" fontsize=10'
        yield from _dot_box(graph, inner, f"{name}_{k}", indent + "  ")
        yield f"{indent}}}"


def _encoded(text: object) -> str:
    """A name as a Mermaid label, with all that could mean something as a number."""
    safe = " _-.,:/()[]"
    return "".join(c if c.isalnum() or c in safe else f"#{ord(c)};" for c in str(text))


def mermaid(graph: nx.DiGraph, title: str | None) -> Iterator[str]:
    """The lines of a Mermaid flowchart."""
    if title is not None:
        quoted = title.replace("\\", "\\\\").replace('"', '\\"')
        yield from ["---", f'title: "{quoted}"', "---"]
    yield "flowchart LR"
    ids = {node: f"n{k}" for k, node in enumerate(graph)}
    yield from _mermaid_box(graph, _Box.of(graph), ids, "p", "  ")
    dashed: list[str] = []
    for k, (parent, child, kind) in enumerate(graph.edges.data("kind")):
        arrow = "<-.->" if kind == "aggregation" else "-->"
        yield f"  {ids[parent]} {arrow} {ids[child]}"
        if Look.of(graph.nodes[parent]).latent:
            dashed.append(str(k))
    for node, data in graph.nodes.items():
        look = Look.of(data)
        style = f"fill:{look.fill},stroke:{look.border},color:{look.ink}"
        style += ",stroke-dasharray:4 3" if look.dashed else ""
        style += ",font-weight:bold" if look.macro else ""
        yield f"  style {ids[node]} {style}"
    if dashed:
        yield f"  linkStyle {','.join(dashed)} stroke:{GREY},stroke-dasharray:4 3"


def _mermaid_box(
    graph: nx.DiGraph, box: _Box, ids: dict[Hashable, str], name: str, indent: str
) -> Iterator[str]:
    for node in box.nodes:
        left, right = ("[[", "]]") if Look.of(graph.nodes[node]).macro else ("([", "])")
        yield f'{indent}{ids[node]}{left}"{_encoded(node)}"{right}'
    for k, (plate, inner) in enumerate(box.inside.items()):
        yield f'{indent}subgraph {name}_{k} ["{_encoded(plate)}"]'
        yield from _mermaid_box(graph, inner, ids, f"{name}_{k}", indent + "  ")
        yield f"{indent}end"
