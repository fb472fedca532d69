# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What is realized at once, and what depends on what."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import networkx as nx

from pyro_macro.aggregation.stacked import Stacked
from pyro_macro.errors import UnsupportedLaw
from pyro_macro.laws.upstream import Evidence, Upstream
from pyro_macro.macro import MacroVariable
from pyro_macro.realizations import MicroState, Natural, Realization

Interventions = Mapping[MacroVariable, Realization]


@dataclass(frozen=True, eq=False)
class Unit:
    """What is realized at once: a macro-variable, or several that share sites.

    :ivar macro: the macro-variable.
    :ivar realization: of it.
    :ivar members: the macro-variables that it stands for.
    """

    macro: MacroVariable
    realization: Realization
    members: tuple[MacroVariable, ...]


def units(interventions: Interventions) -> list[Unit]:
    """Interventions on shared sites become one.

    :raises PyroMacroError: if their realizations cannot be joined.
    """
    graph = nx.Graph()
    graph.add_nodes_from(interventions)
    for one, other in itertools.combinations(interventions, 2):
        if set(one.micro) & set(other.micro):
            graph.add_edge(one, other)
    found = []
    for component in nx.connected_components(graph):
        members = tuple(m for m in interventions if m in component)
        first = members[0]
        if len(members) == 1:
            found.append(Unit(first, interventions[first], members))
            continue
        pairs = [(macro, interventions[macro]) for macro in members]
        realization = pairs[0][1].joined(pairs)
        micro = tuple(dict.fromkeys(n for macro in members for n in macro.micro))
        maps = tuple((macro.aggregation, macro.micro) for macro in members)
        name = "_".join(macro.name for macro in members)
        whole = MacroVariable(name, micro, first.over, Stacked(maps))
        found.append(Unit(whole, realization, members))
    return found


def value_of(unit: Unit, state: MicroState) -> Evidence:
    """A macro value that is set, as something known of the program."""
    value = unit.realization.macro_value(state)
    assert value is not None
    return Evidence.of_macro(state.macro, state.layout, value)


def groups(
    read: Mapping[Unit, tuple[MicroState, Upstream]],
) -> list[list[Unit]]:
    """Units whose micro states depend on one another, in program order.

    :raises UnsupportedLaw: if it is not stated how they are realized together.
    """
    graph = nx.Graph()
    graph.add_nodes_from(read)
    for one, other in itertools.combinations(read, 2):
        if not (one.realization.draws_own_law and other.realization.draws_own_law):
            continue
        if set(one.members) & set(other.realization.given):
            continue
        if set(other.members) & set(one.realization.given):
            continue
        mine = read[one][1].latent_sources(one.macro.micro)
        common = mine & read[other][1].latent_sources(other.macro.micro)
        if not common:
            continue
        if not all(isinstance(u.realization, Natural) for u in (one, other)):
            raise UnsupportedLaw(
                f"macro-variables {one.macro.name!r} and {other.macro.name!r} are "
                f"dependent, through {sorted(common)}, and it is not stated how they "
                "are realized together. Use Natural for both, hold the common sites "
                "with given=[...], or nest two macro_do."
            )
        graph.add_edge(one, other)
    order = {unit: i for i, unit in enumerate(read)}

    def place(unit: Unit) -> tuple[int, int]:
        # The last of the first micro sites has seen all of them
        sites = list(read[unit][1].sites)
        return min(sites.index(n) for n in unit.macro.micro), order[unit]

    return [sorted(c, key=place) for c in nx.connected_components(graph)]
