# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Partitions of a program's sites: clusters, their order, what they need."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import networkx as nx

from pyro_macro.errors import CyclicPartition, PyroMacroError, UnknownSite

Cluster = frozenset[str]


def clusters(
    graph: nx.DiGraph, partition: Sequence[Collection[str]]
) -> tuple[Cluster, ...]:
    """The clusters of a partition, in an order in which they can be evaluated.

    Definitions 3 and 4 of *Do Not Marginalize Mechanisms, Rather Consolidate!*: they
    cover the sites without overlap, and the relation that the graph of the program
    induces on them has no circle. Sites that are in no cluster are clusters of
    their own.

    :param graph: the program, an edge from each parent to its child.
    :raises UnknownSite: if a cluster names a site that the program does not have.
    :raises CyclicPartition: if clusters need one another; the message shows the circle.

    >>> chain = nx.DiGraph([("a", "b"), ("b", "c")])
    >>> [sorted(c) for c in clusters(chain, [{"c"}, {"a", "b"}])]
    [['a', 'b'], ['c']]
    """
    of: dict[str, Cluster] = {}
    for part in partition:
        cluster = frozenset(part)
        if not cluster:
            raise PyroMacroError("consolidate, partition: found an empty cluster.")
        for name in cluster:
            if name not in graph:
                raise UnknownSite.named("consolidate, partition", name, graph.nodes)
            if name in of:
                raise PyroMacroError(
                    f"consolidate, partition: site {name!r} is in two clusters, "
                    f"{sorted(of[name])} and {sorted(cluster)}. Clusters must not "
                    "overlap."
                )
            of[name] = cluster
    for name in graph:
        of.setdefault(name, frozenset([name]))
    order = quotient(graph, of)
    try:
        place = {name: i for i, name in enumerate(graph)}
        first = {c: min(place[n] for n in c) for c in order}
        return tuple(nx.lexicographical_topological_sort(order, key=first.__getitem__))
    except nx.NetworkXUnfeasible:
        circle = nx.find_cycle(order)
        shown = []
        for one, other in circle:
            edge = next((a, b) for a, b in graph.edges if a in one and b in other)
            shown.append(
                f"{sorted(one)} needs to come before {sorted(other)} since "
                f"{edge[0]!r} acts on {edge[1]!r}"
            )
        raise CyclicPartition(
            "consolidate, partition: clusters need one another: "
            + "; ".join(shown)
            + ". Join them, or divide them otherwise."
        ) from None


def quotient(graph: nx.DiGraph, of: Mapping[str, Cluster]) -> nx.DiGraph:
    """The graph of clusters: an edge where a site acts on one of another cluster."""
    order = nx.DiGraph()
    order.add_nodes_from(of[name] for name in graph)
    order.add_edges_from((of[a], of[b]) for a, b in graph.edges if of[a] != of[b])
    return order


def boundary(graph: nx.DiGraph, parts: Sequence[Cluster]) -> list[str]:
    """Sites that other clusters need: what ``E'`` adds to ``E`` in Algorithm 1."""
    of = {name: cluster for cluster in parts for name in cluster}
    return [
        name
        for name in graph
        if any(of[child] != of[name] for child in graph.successors(name))
    ]


def restricted(interventions: Mapping[str, Any], cluster: Cluster) -> dict[str, Any]:
    """``psi``: what an intervention does to one cluster."""
    return {name: value for name, value in interventions.items() if name in cluster}
