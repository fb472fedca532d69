# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Our graphs in pgmpy and DoWhy, and back-door sets compared with theirs."""

import random

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
from random_dags import program_of, random_dag, subsets

import pyro_macro as pm

NAMES = ["a", "x", "b", "y", "c", "d"]
SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
REVENUE = pm.MacroVariable("revenue", micro=["y1", "y2"])


def pgmpy_sets(graph, observed=None):
    """All sets that pgmpy accepts; it leaves descendants of the cause to the user."""
    pytest.importorskip("pgmpy", reason="needs pgmpy: pip install '.[neighbours]'")
    from pgmpy.base import DAG
    from pgmpy.identification import Adjustment

    dag = DAG(graph, roles={"exposures": "x", "outcomes": "y"})
    assert set(dag.edges) == set(graph.edges)
    assert set(dag.nodes) == set(graph.nodes)
    others = set(observed or graph) - {"x", "y"} - nx.descendants(graph, "x")
    criterion = Adjustment()
    found = set()
    for nodes in subsets(others):
        with_set = dag.with_role("adjustment", nodes) if nodes else dag
        if criterion.validate(with_set):
            found.add(nodes)
    return found


def dowhy_sets(graph, observed=None):
    """All sets that DoWhy finds: of nodes that tell of the cause or the effect."""
    pytest.importorskip("dowhy", reason="needs DoWhy: pip install '.[neighbours]'")
    from dowhy.causal_identifier import (
        AutoIdentifier,
        BackdoorAdjustment,
        EstimandType,
    )

    identifier = AutoIdentifier(
        EstimandType.NONPARAMETRIC_ATE, BackdoorAdjustment.BACKDOOR_EXHAUSTIVE
    )
    observed = list(observed or graph)
    found = identifier.identify_backdoor(graph, ["x"], ["y"], observed)
    return {frozenset(nodes.get_adjustment_variables()) for nodes in found}


def telling(graph, sets):
    """Those of nodes that are not independent of both cause and effect."""
    kept = set()
    for node in graph.nodes - {"x", "y"}:
        alone = (nx.is_d_separator(graph, node, end, set()) for end in "xy")
        if not all(alone):
            kept.add(node)
    return {nodes for nodes in sets if nodes <= kept}


SEEDS = range(25)


@pytest.mark.parametrize("seed", SEEDS)
def test_backdoor_sets_of_a_program_are_those_of_pgmpy(seed):
    dag = random_dag(random.Random(seed), NAMES, density=0.5)
    graph = pm.micro_graph(program_of(dag))
    assert set(pm.macro_backdoor_sets(graph, "x", "y")) == pgmpy_sets(graph)


@pytest.mark.parametrize("seed", SEEDS)
def test_backdoor_sets_of_a_program_are_those_of_dowhy(seed):
    dag = random_dag(random.Random(seed), NAMES, density=0.5)
    graph = pm.micro_graph(program_of(dag))
    ours = set(pm.macro_backdoor_sets(graph, "x", "y"))
    assert telling(graph, ours) == dowhy_sets(graph)


def projected(seed):
    """A program, and the graph on half of its sites, the others projected out."""
    dag = random_dag(random.Random(seed), ["u", "a", "v", "x", "b", "w", "y"], 0.4)
    model = program_of(dag)
    return pm.micro_graph(model), pm.macro_graph(model, ["a", "x", "b", "y"])


@pytest.mark.parametrize("seed", SEEDS)
def test_projected_sites_are_unobserved_nodes_of_pgmpy(seed):
    """The projection has the sets of the whole graph in which they are not seen."""
    whole, graph = projected(seed)
    ours = set(pm.macro_backdoor_sets(graph, "x", "y"))
    assert ours == pgmpy_sets(whole, observed=["a", "x", "b", "y"])
    seen = [n for n, kind in graph.nodes.data("kind") if kind != "latent"]
    assert ours == pgmpy_sets(graph, observed=seen)


@pytest.mark.parametrize("seed", SEEDS)
def test_projected_sites_are_unobserved_nodes_of_dowhy(seed):
    whole, graph = projected(seed)
    ours = set(pm.macro_backdoor_sets(graph, "x", "y"))
    assert telling(whole, ours) == dowhy_sets(whole, observed=["a", "x", "b", "y"])


def shop():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for i in (1, 2):
        x = pyro.sample(f"x{i}", dist.Normal(z, 1.0))
        pyro.sample(f"y{i}", dist.Normal(x + z, 1.0))


GRAPHS = {
    "micro": lambda: pm.micro_graph(shop),
    "amalgamated": lambda: pm.amalgamated_graph(shop, [SALES, REVENUE]),
    "intervention": lambda: pm.intervention_graph(shop, [SALES, REVENUE], SALES),
    "macro": lambda: pm.macro_graph(shop, [SALES, REVENUE]),
}


@pytest.mark.parametrize("kind", GRAPHS)
def test_there_and_back_by_pgmpy(kind):
    pytest.importorskip("pgmpy", reason="needs pgmpy: pip install '.[neighbours]'")
    from pgmpy.base import DAG

    graph = GRAPHS[kind]()
    latent = {n for n, found in graph.nodes.data("kind") if found == "latent"}
    there = DAG(graph, latents=latent)
    assert there.latents == latent
    back = nx.DiGraph(there)
    for node in back:
        back.nodes[node].pop("roles", None)  # what pgmpy notes
    assert dict(back.nodes(data=True)) == dict(graph.nodes(data=True))
    assert set(back.edges) == set(graph.edges)
    # pgmpy drops what edges have: whether they are arrows or ties is to be put back
    nx.set_edge_attributes(back, {(u, v): d for u, v, d in graph.edges(data=True)})
    assert sorted(back.edges(data="kind")) == sorted(graph.edges(data="kind"))


@pytest.mark.parametrize("kind", GRAPHS)
def test_there_and_back_by_dowhy(kind):
    pytest.importorskip("dowhy", reason="needs DoWhy: pip install '.[neighbours]'")
    from dowhy.gcm import ProbabilisticCausalModel

    graph = GRAPHS[kind]()
    back = nx.DiGraph(ProbabilisticCausalModel(graph.copy()).graph)
    assert nx.utils.graphs_equal(back, graph)


def test_d_separation_after_an_intervention():
    """Once sales are set, what was upstream of them tells nothing of the products."""
    pytest.importorskip("pgmpy", reason="needs pgmpy: pip install '.[neighbours]'")
    from pgmpy.base import DAG

    before, after = DAG(GRAPHS["amalgamated"]()), DAG(GRAPHS["intervention"]())
    for node in ("sales", "x1"):
        assert before.is_dconnected("z", node)
        assert not after.is_dconnected("z", node)
    assert after.is_dconnected("sales", "revenue")
    assert not after.is_dconnected("sales", "revenue", observed=["x1", "x2"])
