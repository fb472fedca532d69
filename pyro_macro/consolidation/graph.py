# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The graph of a fused program."""

from __future__ import annotations

from typing import Any

import networkx as nx

from pyro_macro.consolidation.prepared import Prepared


def fused_graph(prepared: Prepared) -> nx.DiGraph:
    """What stays, what acts on it, and which interventions do."""
    stays = list(prepared.stays)
    original = prepared.mechanisms.graph()
    gone = [n for n in original if n not in stays]
    allowed = [
        n for n in gone if n in prepared.allowed.sites and _acts(original, n, stays)
    ]
    graph = nx.DiGraph(kind="fused")
    for name in original:
        if name in stays or name in allowed:
            graph.add_node(name, **_look(prepared, name, name in allowed))
    targets = set(stays)
    hidden = [n for n in gone if n not in allowed]
    for name in graph:
        for child in _reached(original, name, targets):
            graph.add_edge(name, child, kind="causal")
    for rule_name, rule in prepared.rules.items():
        sources = {str(which) for kind, which in rule.leaves.values() if kind == "site"}
        for parent in list(graph.predecessors(rule_name)):
            # What the formula goes through acts on it, once it is intervened on
            known = {*sources, *allowed, *rule.requires}
            if parent not in known:
                graph.remove_edge(parent, rule_name)
        graph.add_edges_from(((s, rule_name) for s in sources), kind="causal")
    if prepared.structure is not None:
        _add_latent(graph, prepared, original, hidden, allowed)
    return graph


def _look(prepared: Prepared, name: str, allowed: bool) -> dict[str, Any]:
    site = prepared.of[name].site
    return {
        "kind": "micro",
        "observed": site.observed,
        "deterministic": site.deterministic,
        "intervened": allowed,
        "plates": tuple(frame.name for frame in site.frames if frame.vectorized),
    }


def _acts(graph: nx.DiGraph, name: str, stays: list[str]) -> bool:
    return not nx.descendants(graph, name).isdisjoint(stays)


def _reached(graph: nx.DiGraph, name: str, targets: set[str]) -> list[str]:
    """The first of some nodes on each path from a node."""
    found, seen, stack = [], {name}, list(graph.successors(name))
    while stack:
        at = stack.pop()
        if at in seen:
            continue
        seen.add(at)
        if at in targets:
            found.append(at)
        else:
            stack.extend(graph.successors(at))
    return found


def _add_latent(
    graph: nx.DiGraph,
    prepared: Prepared,
    original: nx.DiGraph,
    hidden: list[str],
    allowed: list[str],
) -> None:
    """A latent cause for sites that an eliminated random site acts on together.

    Appendix C: what they have in common is one exogenous variable, drawn once.
    """
    stays = set(prepared.stays)
    groups: dict[frozenset[str], list[str]] = {}
    for name in (*hidden, *allowed):
        if prepared.of[name].site.deterministic:
            continue
        reached = frozenset(_reached(original, name, stays))
        if len(reached) > 1:
            groups.setdefault(reached, []).append(name)
    largest = [g for g in groups if not any(g < other for other in groups)]
    order = list(original)
    for i, group in enumerate(largest):
        name = f"R{i + 1}" if len(largest) > 1 else "R"
        while name in graph:
            name += "'"
        graph.add_node(name, kind="latent", plates=())
        for child in sorted(group, key=order.index):
            graph.add_edge(name, child, kind="causal")
