# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The back-door criterion on the graph of the macro-variables."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from math import comb

import networkx as nx

from pyro_macro.errors import PyroMacroError, UnknownSite
from pyro_macro.graphs import listed
from pyro_macro.macro import MacroVariable

MAX_SETS = 2**13


def is_macro_backdoor(
    graph: nx.DiGraph,
    cause: MacroVariable | str,
    effect: MacroVariable | str,
    adjustment: MacroVariable | str | Iterable[MacroVariable | str] = (),
) -> bool:
    """Whether a set satisfies the back-door criterion (Definition 12).

    It does if (i) none of its nodes is a descendant of the cause and (ii) it blocks
    every path between cause and effect that has an arrow into the cause. On the graph
    of the macro-variables, and with condition (15), Theorem 4.1 then gives
    ``P(effect | do(cause), b) = P(effect | cause, b)`` for the realization
    ``Natural(value, given=adjustment)``.

    :param graph: any directed acyclic graph, such as that of
        :func:`~pyro_macro.macro_graph`. Aggregation ties count as arrows from the
        micro sites to the macro value, which is right as long as nobody intervenes on
        it: the cause itself must not be tied.
    :param cause: a node, or the macro-variable of that name.
    :param effect: another one.
    :param adjustment: the set, possibly empty.
    :raises UnknownSite: if one of these is not in the graph.
    :raises PyroMacroError: if one is latent, if the cause is tied to its micro sites,
        if cause, effect and adjustment overlap, or if the graph has a cycle.

    >>> import networkx as nx, pyro_macro as pm
    >>> graph = nx.DiGraph([("zb", "xb"), ("zb", "yb"), ("xb", "yb")])
    >>> pm.is_macro_backdoor(graph, "xb", "yb", {"zb"})
    True
    >>> pm.is_macro_backdoor(graph, "xb", "yb", set())
    False
    """
    cause, effect = _query(graph, cause, effect)
    given = {_node(graph, "adjustment", item) for item in listed(adjustment)}
    for role, node in (("cause", cause), ("effect", effect)):
        if node in given:
            raise PyroMacroError(
                f"adjustment: it contains {node!r}, which is the {role}. Expected "
                "other nodes: leave it out."
            )
    if given & nx.descendants(graph, cause):
        return False
    return nx.is_d_separator(_without_effects(graph, cause), cause, effect, given)


def macro_backdoor_sets(
    graph: nx.DiGraph,
    cause: MacroVariable | str,
    effect: MacroVariable | str,
    max_size: int | None = None,
) -> list[frozenset[str]]:
    """All sets that satisfy the back-door criterion (Definition 12).

    Minimal sets come first, those of which no proper subset will do; then smaller
    ones, then in alphabetical order. Latent nodes are in none of them. An empty list
    says that there is none.

    :param graph: as for :func:`is_macro_backdoor`.
    :param cause: a node, or the macro-variable of that name.
    :param effect: another one.
    :param max_size: the size of the largest sets that are looked for.
    :raises UnknownSite: if cause or effect is not in the graph.
    :raises PyroMacroError: as for :func:`is_macro_backdoor`, and if there are more
        than 8192 sets to look at.

    >>> import networkx as nx, pyro_macro as pm
    >>> graph = nx.DiGraph([("a", "xb"), ("a", "b"), ("b", "yb"), ("xb", "yb")])
    >>> [sorted(nodes) for nodes in pm.macro_backdoor_sets(graph, "xb", "yb")]
    [['a'], ['b'], ['a', 'b']]
    """
    cause, effect = _query(graph, cause, effect)
    excluded = {cause, effect} | nx.descendants(graph, cause)
    excluded |= {n for n, kind in graph.nodes.data("kind") if kind == "latent"}
    candidates = sorted(graph.nodes - excluded, key=str)
    largest = len(candidates) if max_size is None else min(max_size, len(candidates))
    count = sum(comb(len(candidates), size) for size in range(largest + 1))
    if count > MAX_SETS:
        raise PyroMacroError(
            f"macro_backdoor_sets: {len(candidates)} nodes may be adjusted for, which "
            f"makes {count} sets. Expected at most {MAX_SETS}: give a "
            f"smaller max_size, such as max_size=2."
        )
    left = _without_effects(graph, cause)
    minimal: list[frozenset[str]] = []
    others: list[frozenset[str]] = []
    for size in range(largest + 1):
        for nodes in map(frozenset, combinations(candidates, size)):
            if nx.is_d_separator(left, cause, effect, nodes):
                smaller = any(found < nodes for found in minimal)
                (others if smaller else minimal).append(nodes)
    return minimal + others


def _without_effects(graph: nx.DiGraph, cause: str) -> nx.DiGraph:
    """The graph in which only paths with an arrow into the cause are left."""
    left = nx.DiGraph(graph.edges)
    left.add_nodes_from(graph)
    left.remove_edges_from(list(left.out_edges(cause)))
    return left


def _query(
    graph: nx.DiGraph, cause: MacroVariable | str, effect: MacroVariable | str
) -> tuple[str, str]:
    """The names of cause and effect, once the question makes sense."""
    names = _node(graph, "cause", cause), _node(graph, "effect", effect)
    if names[0] == names[1]:
        raise PyroMacroError(
            f"cause and effect are both {names[0]!r}. Expected two different nodes."
        )
    if not nx.is_directed_acyclic_graph(graph):
        cycle = " -> ".join(repr(a) for a, _ in nx.find_cycle(graph))
        raise PyroMacroError(
            f"graph: it has a cycle through {cycle}. Expected an acyclic graph: "
            "the back-door criterion is not defined otherwise."
        )
    for site, _, kind in graph.in_edges(names[0], data="kind"):
        if kind == "aggregation":
            raise PyroMacroError(
                f"cause: macro-variable {names[0]!r} is tied to its micro site "
                f"{site!r} in this graph, so that it is no cause of anything. Expected "
                "a graph in which macro-variables have arrows: use that of macro_graph."
            )
    return names


def _node(graph: nx.DiGraph, role: str, item: MacroVariable | str) -> str:
    name = item.name if isinstance(item, MacroVariable) else item
    if name not in graph:
        raise UnknownSite.named(role, str(name), map(str, graph))
    if graph.nodes[name].get("kind") == "latent":
        raise PyroMacroError(
            f"{role}: {name!r} is a latent common cause in this graph. Expected a node "
            f"that was kept: give macro_graph {name!r}, or a macro-variable of it, in "
            "`macros`."
        )
    return name
