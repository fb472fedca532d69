# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Reading a program: its sites in order, with plates and parents."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import networkx as nx
import pyro
import torch
from pyro.poutine.runtime import Message

from pyro_macro.errors import PyroMacroError, UnknownSite, UnsupportedLaw
from pyro_macro.program.inner import (
    InnerRun,
    Site,
    preserved_params,
    preserved_random_state,
    shards_of,
)


@dataclass(frozen=True, eq=False)
class Program:
    """What one run of a model shows.

    :ivar sites: the sample sites in program order, deterministic ones among them.
    :ivar params: the names of its parameters.
    """

    sites: dict[str, Site]
    params: frozenset[str]

    def ancestors(self, name: str) -> frozenset[str]:
        """All sites with a directed path to ``name``."""
        return frozenset(nx.ancestors(dependence(self.sites), name))


def dependence(sites: Mapping[str, Site], roots: Collection[str] = ()) -> nx.DiGraph:
    """The graph of the sites, an edge from each parent to its child.

    :param roots: sites whose parents are left out, as those that are held.
    """
    graph = nx.DiGraph()
    graph.add_nodes_from(sites)
    for name, site in sites.items():
        if name not in roots:
            graph.add_edges_from((parent, name) for parent in site.parents)
    return graph


def structural(model: Callable[..., Any]) -> Callable[..., Any]:
    """The model that tells what acts on what: of a consolidated one the original.

    What was fused stays correlated, without one site acting on the other.
    """
    return getattr(model, "unfused", model)


def refuse_fused(model: Any, names: Collection[str], why: str) -> None:
    """An error if a consolidated model has lost what some sites depend on.

    :param why: what they are needed for, in words.
    """
    gone = model.fused_behind(names) if hasattr(model, "fused_behind") else []
    if gone:
        raise PyroMacroError(
            f"{why}: the model is consolidated, and {gone}, which {sorted(names)} "
            "depend on, were fused away, so that these cannot be held or drawn by "
            "themselves. Keep them, or intervene on the `unfused` model."
        )


def refuse_sharded(sites: Iterable[Site], why: str) -> None:
    """An error if a site lies on several ranks.

    :param why: what is found for programs that are all in one place, in words.
    """
    for site in sites:
        for frame in site.frames:
            if shards_of(frame) is not None:
                raise UnsupportedLaw(
                    f"site {site.name!r} is in plate {frame.name!r}, which is split "
                    f"over ranks, and {why} is found for programs that are all in one "
                    "place. Use a plain plate on one process."
                )


class _ReadingRun(InnerRun):
    def __init__(self, values: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.values = values

    def choose(self, msg: Message, site: Site) -> Any:
        if site.name in self.values:
            return self.values[site.name]
        if msg["value"] is not None:
            return msg["value"]
        return draw(site.fn)


def draw(fn: Any) -> torch.Tensor:
    """A private draw, after which the random state is what it was."""
    with preserved_random_state(), torch.no_grad():
        return fn.sample()


def read(
    model: Callable[..., Any],
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    *,
    values: Mapping[str, torch.Tensor] | None = None,
) -> Program:
    """Runs a model once, unseen, and tells what it is made of.

    Parents are found by watching the operations, through deterministic sites too: a
    deterministic site is itself a parent of what is computed from it. Where the model
    turns a tensor into a Python number, or branches on it, all that follows counts as
    computed from it.

    The parameter store, the random state and the buffers of modules are left as they
    were.

    :param model: a callable with Pyro primitives.
    :param values: values to run under, by name of the site: all at once, so that each
        site's distribution is a function of its parents' values alone.
    :raises UnknownSite: if ``values`` names a site that the program does not have.

    >>> import pyro.distributions as dist
    >>> def model():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     x = pyro.deterministic("x", 2 * z)
    ...     pyro.sample("y", dist.Normal(x, 1.0))
    >>> {name: sorted(site.parents) for name, site in read(model).sites.items()}
    {'z': [], 'x': ['z'], 'y': ['x']}
    """
    values = values or {}
    run = _ReadingRun(values)
    with pyro.poutine.block(), preserved_params():
        run.run(model, model_args, model_kwargs or {})
    for name in values:
        if name not in run.sites:
            raise UnknownSite.named("values", name, run.sites)
    return Program(run.sites, frozenset(run.params))
