# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of causal graphs."""

from __future__ import annotations

import shutil
from typing import Any

import networkx as nx

from pyro_macro.drawing.sources import dot, mermaid


def render(
    graph: nx.DiGraph,
    backend: str | None = None,
    *,
    title: str | None = None,
    ax: Any = None,
) -> Any:
    """A picture of a graph, from left to right in causal order.

    Sample sites are drawn with a simple border, macro-variables in bold with a double
    one. As in :func:`pyro.render_model` observed nodes are grey and deterministic sites
    have a dashed border. A macro-variable that is intervened on is orange; a latent
    common cause is dashed, with a grey label. Aggregation ties are dotted, with two
    heads. Plates are boxes; where no box fits, matplotlib puts their names under that
    of the node.

    :param graph: a graph of this library, or any :class:`networkx.DiGraph`.
    :param backend: ``"graphviz"`` for a :class:`graphviz.Digraph`, whose ``source``
        needs no other program; ``"matplotlib"`` for a
        :class:`matplotlib.figure.Figure`; ``"dot"`` and ``"mermaid"`` for source text.
        By default Graphviz where the package and the program ``dot`` are installed,
        and matplotlib otherwise.
    :param title: put above the graph.
    :param ax: for matplotlib: the axes to draw into, whose figure is returned.
    :raises ValueError: for another backend, or axes where they are not used.
    :raises ImportError: if the package of the backend is missing.
    :raises PyroMacroError: if matplotlib is to draw a graph that has a cycle.

    >>> import networkx as nx, pyro_macro as pm
    >>> print(pm.render(nx.DiGraph([("x", "y")]), backend="mermaid"))
    flowchart LR
      n0(["x"])
      n1(["y"])
      n0 --> n1
      style n0 fill:#ffffff,stroke:#222222,color:#222222
      style n1 fill:#ffffff,stroke:#222222,color:#222222
    """
    if backend is None:
        backend = "matplotlib" if ax is not None or not _has_dot() else "graphviz"
    if backend not in ("graphviz", "matplotlib", "mermaid", "dot"):
        raise ValueError(
            f"render: backend={backend!r}. Expected 'graphviz', 'matplotlib', "
            "'mermaid' or 'dot', or None to choose one that is installed."
        )
    if ax is not None and backend != "matplotlib":
        raise ValueError(
            f"render: ax is given, and backend={backend!r}. Expected axes for "
            "'matplotlib' alone: leave one of the two out."
        )
    if backend == "mermaid":
        return "\n".join(mermaid(graph, title))
    if backend == "dot":
        return "\n".join(["digraph {", *dot(graph, title), "}", ""])
    if backend == "graphviz":
        try:
            import graphviz
        except ImportError as error:
            raise ImportError(
                "render(backend='graphviz') needs the package graphviz: pip install "
                "'pyro_macro[demo]'. backend='dot' gives the source without it."
            ) from error
        return graphviz.Digraph(body=[f"{line}\n" for line in dot(graph, title)])
    try:
        from pyro_macro.drawing.figure import draw
    except ImportError as error:
        raise ImportError(
            "render(backend='matplotlib') needs matplotlib: pip install "
            "'pyro_macro[demo]'. backend='dot' and 'mermaid' need nothing."
        ) from error
    return draw(graph, title, ax)


def _has_dot() -> bool:
    try:
        import graphviz  # noqa: F401
    except ImportError:
        return False
    return shutil.which("dot") is not None
