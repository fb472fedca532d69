# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A program before and after consolidation, as in Figure 1 of the paper."""

from __future__ import annotations

from typing import Any

import networkx as nx

from pyro_macro.consolidation.graph import fused_graph
from pyro_macro.consolidation.prepared import Prepared
from pyro_macro.drawing import render

LARGEST = 24  # nodes that are drawn one by one
SEPARATE = 6  # allowed interventions that are


def draw(prepared: Prepared, ax: Any = None) -> Any:
    """Both graphs, one above the other."""
    import matplotlib.pyplot as plt

    before, after = original_graph(prepared), _gathered(fused_graph(prepared))
    if ax is None:
        width = min(16.0, 1.6 + 1.3 * nx.dag_longest_path_length(before))
        _, ax = plt.subplots(2, 1, figsize=(max(width, 5.0), 6.0))
    cost = prepared.cost()
    for axes, graph, what, count in (
        (ax[0], before, "before", cost.before.equations),
        (ax[1], after, "after", cost.after.equations),
    ):
        s = "" if count == 1 else "s"
        render(graph, "matplotlib", title=f"{what}: {count} equation{s}", ax=axes)
    figure = ax[0].get_figure()
    plt.close(figure)
    return figure


def original_graph(prepared: Prepared) -> nx.DiGraph:
    """The original graph; in a long one, rows of sites that are fused are one node."""
    graph = nx.DiGraph(kind="micro")
    for name, mechanism in prepared.of.items():
        site = mechanism.site
        graph.add_node(
            name,
            kind="micro",
            observed=site.observed,
            deterministic=site.deterministic,
            intervened=name in prepared.allowed.sites,
            plates=tuple(f.name for f in site.frames if f.vectorized),
        )
    graph.add_edges_from(prepared.mechanisms.graph().edges, kind="causal")
    if len(graph) <= LARGEST:
        return graph
    stays = set(prepared.stays)
    if len(prepared.allowed.sites) <= SEPARATE:
        stays |= prepared.allowed.sites

    def is_link(name: str) -> bool:
        return (
            name not in stays and graph.in_degree(name) == graph.out_degree(name) == 1
        )

    for name in list(graph):
        if name not in graph or not is_link(name):
            continue
        row = [name]
        while is_link(after := next(iter(graph.successors(row[-1])))):
            row.append(after)
        while is_link(before := next(iter(graph.predecessors(row[0])))):
            row.insert(0, before)
        if len(row) < 3:
            continue
        first = next(iter(graph.predecessors(row[0])))
        last = next(iter(graph.successors(row[-1])))
        label = f"{row[0]} ... {row[-1]}"
        look: dict[str, Any] = {"kind": "latent"}
        if set(row) <= prepared.allowed.sites:
            look = {"kind": "micro", "intervened": True}
        graph.remove_nodes_from(row)
        graph.add_node(label, **look, plates=())
        graph.add_edge(first, label, kind="causal")
        graph.add_edge(label, last, kind="causal")
    return graph


def _gathered(graph: nx.DiGraph) -> nx.DiGraph:
    """Many allowed interventions that act on the same sites as one node."""
    alike: dict[frozenset[str], list[str]] = {}
    for name, data in graph.nodes.items():
        if data.get("intervened"):
            alike.setdefault(frozenset(graph.successors(name)), []).append(name)
    for children, names in alike.items():
        if len(names) <= SEPARATE:
            continue
        label = f"{names[0]} ... {names[-1]}"
        graph.add_node(label, **graph.nodes[names[0]])
        graph.add_edges_from(((label, child) for child in children), kind="causal")
        graph.remove_nodes_from(names)
    return graph
