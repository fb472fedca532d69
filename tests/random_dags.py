# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Random graphs, programs that have them, and d-separation by its definition."""

import itertools

import networkx as nx
import pyro
import pyro.distributions as dist


def random_dag(rng, names, density=0.45):
    graph = nx.DiGraph()
    graph.add_nodes_from(names)
    for parent, child in itertools.combinations(names, 2):
        if rng.random() < density:
            graph.add_edge(parent, child)
    return graph


def program_of(graph, deterministic=()):
    """A program with this graph: each site is the sum of its parents, and noise."""

    def model():
        values = {}
        for name in nx.topological_sort(graph):
            total = sum(values[parent] for parent in graph.predecessors(name))
            if name in deterministic and graph.in_degree(name):
                values[name] = pyro.deterministic(name, total)
            else:
                values[name] = pyro.sample(name, dist.Normal(total, 1.0))

    return model


def paths(graph, start, end):
    """All undirected paths without repeated nodes."""
    return nx.all_simple_paths(graph.to_undirected(as_view=True), start, end)


def is_blocked(graph, path, given):
    """Pearl's rule: by a non-collider in ``given``, or a collider not above it."""
    for before, node, after in zip(path, path[1:], path[2:], strict=False):
        if graph.has_edge(before, node) and graph.has_edge(after, node):
            if not given & (nx.descendants(graph, node) | {node}):
                return True
        elif node in given:
            return True
    return False


def separated(graph, start, end, given):
    return all(is_blocked(graph, path, given) for path in paths(graph, start, end))


def subsets(items):
    items = sorted(items)
    for size in range(len(items) + 1):
        yield from map(frozenset, itertools.combinations(items, size))
