# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Causal graphs of programs and of macro-variables.

All graphs are :class:`networkx.DiGraph`. Each node has the attribute ``kind``:
``"micro"`` (a sample site), ``"macro"`` (a macro-variable) or ``"latent"`` (a common
cause that was projected out); further ``observed`` and ``plates``, the names of the
vectorized plates around it, outermost first. Micro nodes have ``deterministic``, macro
nodes have ``micro``, the names of their sites, and ``intervened``.

Each edge has the attribute ``kind``. A ``"causal"`` edge is an arrow. An
``"aggregation"`` edge, from a micro site to its macro-variable, is the tie that the
paper writes ``X <-> Xb``: as long as nobody intervenes the macro value is computed
from the micro state, which is the direction stored. :func:`~pyro_macro.render` draws
it with two heads.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import networkx as nx

from pyro_macro.errors import (
    CyclicPartition,
    NotAMicroState,
    PyroMacroError,
    UnknownSite,
)
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import preserved_random_state
from pyro_macro.program.reading import read, structural


def micro_graph(
    model: Callable[..., Any],
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> nx.DiGraph:
    """The causal graph of a program: an edge from each parent to its child.

    Nodes are the sample sites in program order, deterministic ones among them. The
    model is run once, unseen, and may be an intervened one: under ``macro_do`` the
    micro sites have the latent site as their parent. :func:`pyro.poutine.do` splits a
    site in two, and the one in the program is its random half, which keeps its parents
    and has no children.

    :param model: a callable with Pyro primitives.
    :param model_args: its positional arguments.
    :param model_kwargs: its keyword arguments.

    Definition 1 of the paper.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     with pyro.plate("products", 2):
    ...         x = pyro.sample("x", dist.Normal(z, 1.0))
    >>> graph = pm.micro_graph(model)
    >>> list(graph.edges), graph.nodes["x"]["plates"]
    ([('z', 'x')], ('products',))
    """
    with preserved_random_state():  # of subsampled plates too
        sites = read(structural(model), model_args, model_kwargs).sites
    graph = nx.DiGraph(kind="micro")
    for name, site in sites.items():
        graph.add_node(
            name,
            kind="micro",
            observed=site.observed,
            deterministic=site.deterministic,
            plates=tuple(frame.name for frame in site.frames if frame.vectorized),
        )
    order = {name: k for k, name in enumerate(sites)}
    for name, site in sites.items():
        for parent in sorted(site.parents & order.keys(), key=order.__getitem__):
            graph.add_edge(parent, name, kind="causal")
    return graph


def amalgamated_graph(
    model: Callable[..., Any],
    macros: MacroVariable | Iterable[MacroVariable],
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> nx.DiGraph:
    """The micro graph, and each macro-variable tied to its micro sites (Definition 3).

    :param model: a callable with Pyro primitives.
    :param macros: a macro-variable, or several; they may share micro sites.
    :param model_args: positional arguments of the model.
    :param model_kwargs: keyword arguments of the model.
    :raises UnknownSite: if a micro site is not in the program.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     pyro.sample("y", dist.Normal(x1 + 3 * x2, 1.0))
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> graph = pm.amalgamated_graph(shop, sales)
    >>> [edge for *edge, kind in graph.edges.data("kind") if kind == "aggregation"]
    [['x1', 'sales'], ['x2', 'sales']]
    """
    graph = micro_graph(model, model_args=model_args, model_kwargs=model_kwargs)
    micro = graph.copy()
    for macro in _macro_variables(listed(macros), micro):
        _add_macro(graph, macro, micro)
        for name in macro.micro:
            graph.add_edge(name, macro.name, kind="aggregation")
    graph.graph["kind"] = "amalgamated"
    return graph


def intervention_graph(
    model: Callable[..., Any],
    macros: MacroVariable | Iterable[MacroVariable],
    on: MacroVariable | str | Iterable[MacroVariable | str],
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> nx.DiGraph:
    """The amalgamated graph after ``do(xb)`` (Definition 5, Figure 3).

    The edge ``Xb -> X`` appears, all other edges into ``X`` go, and so does the tie
    between ``X`` and ``Xb``. Other macro-variables keep their ties.

    This is the graph of a micro-realization that is a distribution of its own, as
    Definition 4 has it: ``Natural``, ``MaxEntropy``, ``Residual``, ``Allocate``,
    ``Explicit``. Two things are not drawn: what a realization holds (``given=``), and
    that ``Shift`` and ``Proportional``, which act on the natural micro state, leave
    it dependent on its parents.

    :param model: a callable with Pyro primitives.
    :param macros: a macro-variable, or several.
    :param on: those of them, or their names, that are intervened on.
    :param model_args: positional arguments of the model.
    :param model_kwargs: keyword arguments of the model.
    :raises UnknownSite: if a micro site is not in the program, or a name in ``on`` is
        none of the macro-variables.
    :raises NotAMicroState: if a directed path joins two micro sites of a
        macro-variable in ``on`` (Assumption 1).

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     x = pyro.sample("x", dist.Normal(z, 1.0).to_event(1))
    ...     pyro.sample("y", dist.Normal(x + z, 1.0).to_event(1))
    >>> total = pm.MacroVariable("xb", micro="x")
    >>> sorted(pm.intervention_graph(model, total, on="xb").edges)
    [('x', 'y'), ('xb', 'x'), ('z', 'y')]
    """
    macros = listed(macros)
    graph = amalgamated_graph(
        model, macros, model_args=model_args, model_kwargs=model_kwargs
    )
    chosen = {macro.name: macro for macro in macros}
    targets = {}
    for item in listed(on):
        name = item.name if isinstance(item, MacroVariable) else item
        if name not in chosen or item not in (name, chosen[name]):
            raise UnknownSite(
                f"on: {item!r} is none of the macro-variables in `macros`. Expected "
                f"one of {list(chosen)}: put it into `macros` too."
            )
        targets[name] = chosen[name]
    causal = _causal(graph)
    for macro in targets.values():
        _refuse_paths(causal, macro)
    for macro in targets.values():
        cut = [e for name in macro.micro for e in causal.in_edges(name)]
        graph.remove_edges_from(cut)
    for macro in targets.values():
        graph.nodes[macro.name]["intervened"] = True
        for name in macro.micro:
            graph.remove_edge(name, macro.name)
            graph.add_edge(macro.name, name, kind="causal")
            graph.nodes[name].update(observed=False, deterministic=False)
    graph.graph["kind"] = "intervention"
    return graph


def macro_graph(
    model: Callable[..., Any],
    macros: MacroVariable | str | Iterable[MacroVariable | str],
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> nx.DiGraph:
    """The graph on the macro-variables that Theorem 4.1 starts from.

    There is an edge ``Xb -> Yb`` if a directed path leads from a micro site of ``Xb``
    to one of ``Yb``, through no site of a macro-variable; its attribute ``path`` is
    such a path. All other sites are projected out. What is left of them is a node of
    kind ``"latent"``, named after the site, for each of them that is a common cause of
    several nodes in this sense, unless another one is of the same nodes and more. A
    deterministic site has no noise of its own and leaves none. Every d-separation in
    the result holds among the micro states, as in a latent projection. Name a site in
    ``macros`` to keep it, say to adjust for it.

    **A hypothesis for macro values.** What the program guarantees are the independences
    of *micro states*: given the micro state ``Y``, ``X`` tells nothing of ``Z`` in a
    chain. "The macro variable Yb will not necessarily block the influence of Xb on Zb"
    (section 4.1), as ``Xb`` may tell of the micro state behind ``yb``. Theorem 4.1
    *assumes* that the macro-variables are Markovian relative to the graph. Test the
    independences that matter; where one fails add the arrow,
    ``graph.add_edge("xb", "zb", kind="causal")``: a graph with more arrows claims less.

    :param model: a callable with Pyro primitives.
    :param macros: macro-variables, and names of sites that stay nodes of their own;
        no site may be in two of them.
    :param model_args: positional arguments of the model.
    :param model_kwargs: keyword arguments of the model.
    :raises UnknownSite: if a site is not in the program.
    :raises NotAMicroState: if a directed path joins two micro sites of one
        macro-variable (Assumption 1).
    :raises CyclicPartition: if the macro-variables form a cycle.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
    ...     x = pyro.sample("x", dist.Normal(z, 1.0).to_event(1))
    ...     pyro.sample("y", dist.Normal(x + z, 1.0).to_event(1))
    >>> xb, yb = (pm.MacroVariable(f"{name}b", micro=name) for name in "xy")
    >>> pm.macro_graph(model, [xb, yb]).nodes.data("kind")
    NodeDataView({'xb': 'macro', 'yb': 'macro', 'z': 'latent'}, data='kind')
    >>> zb = pm.MacroVariable("zb", micro="z")
    >>> sorted(pm.macro_graph(model, [xb, yb, zb]).edges)
    [('xb', 'yb'), ('zb', 'xb'), ('zb', 'yb')]
    """
    micro = micro_graph(model, model_args=model_args, model_kwargs=model_kwargs)
    items = listed(macros)
    kept = [name for name in items if isinstance(name, str)]
    graph = nx.DiGraph(kind="macro")
    groups: dict[str, tuple[str, ...]] = {}
    for macro in _macro_variables((m for m in items if m not in kept), micro):
        _refuse_paths(micro, macro)
        _add_macro(graph, macro, micro)
        groups[macro.name] = macro.micro
    for name in kept:
        if name not in micro:
            raise UnknownSite.named("macros", name, micro)
        graph.add_node(name, **micro.nodes[name])
        groups[name] = (name,)
    owner: dict[str, str] = {}
    for name, sites in groups.items():
        for site in sites:
            if site in owner:
                raise PyroMacroError(
                    f"macro_graph: site {site!r} belongs to {owner[site]!r} and to "
                    f"{name!r}. Expected nodes that share no site: leave one of the "
                    "two out."
                )
            owner[site] = name
    for name, sites in groups.items():
        for reached, path in _paths(micro, sites, owner).items():
            graph.add_edge(name, reached, kind="causal", path=path)
    _refuse_cycle(graph)
    for site, shared in _confounders(micro, owner).items():
        graph.add_node(site, **{**micro.nodes[site], "kind": "latent"})
        for name in groups:
            if name in shared:
                graph.add_edge(site, name, kind="causal")
    return graph


def listed(items: Any) -> list[Any]:
    """One or several, as a list without repetitions."""
    single = isinstance(items, (MacroVariable, str))
    return list(dict.fromkeys([items] if single else items))


def _macro_variables(
    items: Iterable[Any], micro: nx.DiGraph
) -> Iterator[MacroVariable]:
    names: set[str] = set()
    for macro in items:
        if not isinstance(macro, MacroVariable):
            raise TypeError(f"macros: {macro!r} is no MacroVariable. Expected some.")
        for name in macro.micro:
            if name not in micro:
                raise UnknownSite.named(f"macro-variable {macro.name!r}", name, micro)
        if macro.name in micro:
            raise PyroMacroError(
                f"macro-variable {macro.name!r} has the name of a site of the program. "
                "Give it a name of its own, or pass the model without `aggregate` and "
                "`macro_do`."
            )
        if macro.name in names:
            raise PyroMacroError(
                f"macros: two macro-variables have the name {macro.name!r}. Give each "
                "a name of its own."
            )
        names.add(macro.name)
        yield macro


def _add_macro(graph: nx.DiGraph, macro: MacroVariable, micro: nx.DiGraph) -> None:
    sites = [micro.nodes[name] for name in macro.micro]
    graph.add_node(
        macro.name,
        kind="macro",
        micro=macro.micro,
        observed=all(site["observed"] for site in sites),
        intervened=False,
        plates=tuple(
            plate
            for plate in sites[0]["plates"]
            if plate not in macro.over and all(plate in s["plates"] for s in sites)
        ),
    )


def _causal(graph: nx.DiGraph) -> nx.DiGraph:
    """The graph without its aggregation ties."""
    result = nx.DiGraph()
    result.add_nodes_from(graph)
    kinds = graph.edges.data("kind")
    result.add_edges_from((u, v) for u, v, kind in kinds if kind != "aggregation")
    return result


def _paths(
    micro: nx.DiGraph, sources: Collection[str], owner: dict[str, str]
) -> dict[str, tuple[str, ...]]:
    """The nodes reached from some sites through sites of no node, and how.

    Shortest paths of micro sites, by the name of the node that their ends belong to.
    """
    came: dict[str, str] = {}
    ends: dict[str, str] = {}
    todo = deque(sources)
    while todo:
        site = todo.popleft()
        for child in micro.successors(site):
            if child in came:
                continue
            came[child] = site
            if child in owner:
                ends.setdefault(owner[child], child)
            else:
                todo.append(child)
    paths = {}
    for name, site in ends.items():
        path = [site]
        while path[0] not in sources:
            path.insert(0, came[path[0]])
        paths[name] = tuple(path)
    return paths


def _confounders(micro: nx.DiGraph, owner: dict[str, str]) -> dict[str, set[str]]:
    """The common causes that projecting out the other sites leaves.

    The nodes that each of them reaches, for those that reach at least two, and of
    which no other reaches as many and more: that one makes the same paths.
    """
    reached: dict[str, set[str]] = {}
    for site in reversed(list(nx.topological_sort(micro))):
        reached[site] = set()
        for child in micro.successors(site):
            reached[site] |= {owner[child]} if child in owner else reached[child]
    first: dict[frozenset[str], str] = {}
    for site, data in micro.nodes.items():
        if site not in owner and not data["deterministic"] and len(reached[site]) > 1:
            first.setdefault(frozenset(reached[site]), site)
    return {
        site: set(names)
        for names, site in first.items()
        if not any(names < other for other in first)
    }


def _refuse_paths(micro: nx.DiGraph, macro: MacroVariable) -> None:
    """An error if a directed path joins two micro sites (Assumption 1)."""
    sites = dict.fromkeys(macro.micro, macro.name)
    below = set().union(*(micro.successors(name) for name in sites))
    todo = list(below)
    while todo:
        new = set(micro.successors(todo.pop())) - below
        below |= new
        todo.extend(new)
    for name in macro.micro:
        if name in below:
            above = next(s for s in sites if s != name and nx.has_path(micro, s, name))
            path = " -> ".join(map(repr, nx.shortest_path(micro, above, name)))
            raise NotAMicroState(
                f"macro-variable {macro.name!r}: there is a directed path {path} "
                "between two of its micro sites. Assumption 1 of the paper excludes "
                "that: aggregate the two in separate macro-variables."
            )


def _refuse_cycle(graph: nx.DiGraph) -> None:
    if nx.is_directed_acyclic_graph(graph):
        return
    cycle = nx.find_cycle(graph)
    paths = ", ".join(" -> ".join(map(repr, graph.edges[e]["path"])) for e in cycle)
    names = " -> ".join(repr(name) for name, _ in [*cycle, cycle[0]])
    raise CyclicPartition(
        f"macro_graph: the macro-variables form a cycle {names}, by the paths {paths}. "
        "Theorem 4.1 needs an acyclic graph: aggregate the sites of one of them in "
        "separate macro-variables."
    )
