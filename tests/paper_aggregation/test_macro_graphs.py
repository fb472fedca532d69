# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Definitions 3, 5 and 12, Figures 1 to 5, and the graph of Theorem 4.1."""

import random
from itertools import combinations

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from random_dags import is_blocked, paths, program_of, random_dag, separated, subsets

import pyro_macro as pm
from pyro_macro.program.reading import read

XB, YB, ZB = (pm.MacroVariable(f"{name}b", micro=name) for name in "xyz")


def vector(name, mean):
    return pyro.sample(name, dist.Normal(mean, 1.0).expand([2]).to_event(1))


def figure_1():
    for i in range(1, 5):
        x = pyro.sample(f"x{i}", dist.Normal(10.0 * i, 1.0))
        pyro.sample(f"y{i}", dist.Normal(i * x, 1.0))


def figure_3():
    z = vector("z", 0.0)
    x = vector("x", z)
    vector("y", x + 2 * z)


def figure_4():
    vector("z", vector("y", vector("x", 0.0)))


def figure_5():
    x = vector("x", 0.0)
    y = vector("y", x)
    vector("z", x + y)


def edges(graph, kind="causal"):
    return {(u, v) for u, v, found in graph.edges.data("kind") if found == kind}


def test_definition_1_micro_graph():
    graph = pm.micro_graph(figure_5)
    assert list(graph) == ["x", "y", "z"]
    assert edges(graph) == {("x", "y"), ("x", "z"), ("y", "z")}
    assert set(graph.nodes.data("kind")) == {(name, "micro") for name in "xyz"}


def test_definition_3_amalgamated_graph():
    """Micro edges, and a tie between each micro site and its macro-variable."""
    graph = pm.amalgamated_graph(figure_3, [XB, YB])
    assert dict(graph.nodes.data("kind")) == {
        "z": "micro",
        "x": "micro",
        "y": "micro",
        "xb": "macro",
        "yb": "macro",
    }
    assert edges(graph) == {("z", "x"), ("z", "y"), ("x", "y")}
    assert edges(graph, "aggregation") == {("x", "xb"), ("y", "yb")}


def test_definition_5_and_figure_3():
    """{Z -> X, Z -> Y, X -> Y} becomes {Xb -> X, X -> Y, Z -> Y}; Y keeps its tie."""
    graph = pm.intervention_graph(figure_3, [XB, YB], on=XB)
    assert edges(graph) == {("xb", "x"), ("x", "y"), ("z", "y")}
    assert edges(graph, "aggregation") == {("y", "yb")}
    assert [n for n, was in graph.nodes.data("intervened") if was] == ["xb"]


def test_definition_5_figure_1():
    xb = pm.MacroVariable("xb", micro=[f"x{i}" for i in range(1, 5)])
    yb = pm.MacroVariable("yb", micro=[f"y{i}" for i in range(1, 5)])
    micro = {(f"x{i}", f"y{i}") for i in range(1, 5)}
    before = pm.amalgamated_graph(figure_1, [xb, yb])
    assert edges(before) == micro
    assert edges(before, "aggregation") == {
        (f"{n}{i}", f"{n}b") for n in "xy" for i in range(1, 5)
    }
    after = pm.intervention_graph(figure_1, [xb, yb], "xb")
    assert edges(after) == micro | {("xb", f"x{i}") for i in range(1, 5)}
    assert edges(after, "aggregation") == {(f"y{i}", "yb") for i in range(1, 5)}


def test_figure_2():
    """One arrow on the macro level."""
    xb = pm.MacroVariable("xb", micro=[f"x{i}" for i in range(1, 5)])
    yb = pm.MacroVariable("yb", micro=[f"y{i}" for i in range(1, 5)])
    graph = pm.macro_graph(figure_1, [xb, yb])
    assert list(graph) == ["xb", "yb"] and edges(graph) == {("xb", "yb")}


def test_definition_5_of_several_macro_variables():
    graph = pm.intervention_graph(figure_5, [XB, YB, ZB], on=[XB, "yb"])
    assert edges(graph) == {("xb", "x"), ("yb", "y"), ("x", "z"), ("y", "z")}
    assert edges(graph, "aggregation") == {("z", "zb")}


@pytest.mark.parametrize("seed", range(25))
def test_definition_5_is_what_the_intervened_program_shows(seed):
    """The edges of the graph are those that are read off ``macro_do``."""
    rng = random.Random(seed)
    names = [f"s{k}" for k in range(7)]
    deterministic, pairs = set(rng.sample(names[2:], 2)), []
    while not pairs:
        dag = random_dag(rng, names)
        free = [n for n in names if n not in deterministic or not dag.in_degree(n)]
        pairs = [p for p in combinations(free, 2) if not nx.has_path(dag, *p)]
    micro = rng.choice(pairs)
    total = pm.MacroVariable("total", micro=micro)
    model = program_of(dag, deterministic)
    intervened = pm.macro_do(model, {total: pm.Natural(1.0)})
    found = set()
    for name, site in read(intervened).sites.items():
        for parent in site.parents:
            parent = "total" if parent == "total__micro" else parent
            if (parent, name) != ("total", "total__micro"):
                found.add((parent, name))
    assert edges(pm.intervention_graph(model, total, total)) == found
    assert edges(pm.micro_graph(model)) == set(dag.edges)


def test_definition_5_cuts_deterministic_micro_sites():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.deterministic("x1", 2 * z)
        x2 = pyro.deterministic("x2", 3 * z)
        pyro.deterministic("y", x1 * x2)

    total = pm.MacroVariable("total", micro=["x1", "x2"])
    graph = pm.intervention_graph(model, total, total)
    assert edges(graph) == {("total", "x1"), ("total", "x2"), ("x1", "y"), ("x2", "y")}
    assert not graph.nodes["x1"]["deterministic"] and graph.nodes["y"]["deterministic"]


def test_figure_3_has_a_latent_common_cause():
    """Z belongs to no macro-variable, and confounds Xb and Yb."""
    graph = pm.macro_graph(figure_3, [XB, YB])
    assert graph.nodes["z"]["kind"] == "latent"
    assert edges(graph) == {("xb", "yb"), ("z", "xb"), ("z", "yb")}
    assert pm.macro_backdoor_sets(graph, XB, YB) == []
    kept = pm.macro_graph(figure_3, [XB, YB, "z"])
    assert kept.nodes["z"]["kind"] == "micro"
    assert pm.macro_backdoor_sets(kept, XB, YB) == [{"z"}]


def test_figure_4_chain():
    graph = pm.macro_graph(figure_4, [XB, YB, ZB])
    assert edges(graph) == {("xb", "yb"), ("yb", "zb")}
    assert pm.is_macro_backdoor(graph, YB, ZB)
    assert pm.macro_backdoor_sets(graph, YB, ZB) == [set(), {"xb"}]


@pytest.mark.parametrize("variance, holds", [((1.0, 1.0), True), ((1.0, 2.0), False)])
def test_section_4_1_the_chain_is_a_hypothesis(variance, holds):
    """Xb and Zb given Yb are independent or not, by the numbers, on one graph."""

    def model():
        x = vector("x", 0.0)
        scale = torch.tensor(variance).sqrt()
        y = pyro.sample("y", dist.Normal(x, scale).to_event(1))
        pyro.sample("z", dist.Normal(y[0] + 3 * y[1], 1.0))

    graph = pm.macro_graph(model, [XB, YB, "z"])
    assert edges(graph) == {("xb", "yb"), ("yb", "z")}
    # of X, E, nu to (Xb, Yb, Z)
    mix = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 3, 1, 3, 1.0]])
    covariance = mix @ torch.diag(torch.tensor([1.0, 1.0, *variance, 1.0])) @ mix.T
    partial = covariance[0, 2] - covariance[0, 1] * covariance[1, 2] / covariance[1, 1]
    assert torch.isclose(partial, torch.tensor(0.0)).item() == holds
    graph.add_edge("xb", "z", kind="causal")  # what footnote 4 asks for if it fails
    assert pm.macro_backdoor_sets(graph, YB, "z") == [{"xb"}]


def test_figure_5():
    before = pm.amalgamated_graph(figure_5, [XB, YB, ZB])
    assert edges(before) == {("x", "y"), ("x", "z"), ("y", "z")}
    assert edges(before, "aggregation") == {("x", "xb"), ("y", "yb"), ("z", "zb")}
    graph = pm.macro_graph(figure_5, [XB, YB, ZB])
    assert edges(graph) == {("xb", "yb"), ("xb", "zb"), ("yb", "zb")}
    assert pm.macro_backdoor_sets(graph, YB, ZB) == [{"xb"}]
    assert pm.macro_backdoor_sets(graph, XB, ZB) == [set()]


@pytest.mark.parametrize("yb, xb", [(1.0, 0.5), (-2.0, 1.5)])
def test_theorem_4_1_on_the_set_that_the_criterion_finds(yb, xb):
    """Zb = (1, 3).Y + (2, 2).X + nu: given Xb, do(yb) is as seeing: 2 yb + 2 xb, 5."""
    prices = torch.tensor([1.0, 3.0])

    def model():
        x = vector("x", 0.0)
        y = vector("y", x)
        pyro.sample("z", dist.Normal(y @ prices + 2 * x.sum(-1), 1.0))

    graph = pm.macro_graph(model, [XB, YB, "z"])
    (adjustment,) = pm.macro_backdoor_sets(graph, YB, "z")
    macros = [macro for macro in (XB, YB) if macro.name in adjustment]
    natural = pm.macro_do(model, {YB: pm.Natural(yb, given=macros)})
    seen = pyro.poutine.condition(natural, {"x": torch.tensor([xb + 0.7, -0.7])})
    law = pyro.poutine.trace(seen).get_trace().nodes["yb__micro"]["fn"]
    mean = prices @ law.mean + 2 * xb
    variance = prices @ law.covariance_matrix @ prices + 1
    torch.testing.assert_close(mean, torch.tensor(2 * yb + 2 * xb))
    torch.testing.assert_close(variance, torch.tensor(5.0))


@pytest.mark.parametrize("seed", range(150))
def test_definition_12_against_all_paths(seed):
    """(i) nothing below the cause, (ii) each path with an arrow into it is blocked."""
    rng = random.Random(seed)
    names = list("abcdef"[: rng.choice([5, 6])])
    graph = random_dag(rng, names, rng.choice([0.3, 0.5, 0.7]))
    cause, effect = rng.sample(names, 2)
    valid = []
    for given in subsets(set(names) - {cause, effect}):
        into = [p for p in paths(graph, cause, effect) if graph.has_edge(p[1], cause)]
        expected = not given & nx.descendants(graph, cause)
        expected = expected and all(is_blocked(graph, path, given) for path in into)
        assert pm.is_macro_backdoor(graph, cause, effect, given) == expected
        valid += [given] if expected else []
    minimal = [s for s in valid if not any(other < s for other in valid)]
    rest = [s for s in valid if s not in minimal]
    assert pm.macro_backdoor_sets(graph, cause, effect) == minimal + rest
    small = [s for s in minimal + rest if len(s) <= 1]
    assert pm.macro_backdoor_sets(graph, cause, effect, max_size=1) == small


def grouped(rng, dag):
    """Macro-variables of one or two sites, a site that is kept, and the others."""
    names = list(dag)
    rng.shuffle(names)
    groups = {}
    for k in range(rng.choice([2, 3])):
        size = rng.choice([1, 1, 2])
        groups[f"m{k}"], names = tuple(names[:size]), names[size:]
    groups[names[0]] = (names[0],)
    return groups, names[1:]


def quotient(dag, groups):
    """Each group as one node, by its definition."""
    owner = {site: name for name, sites in groups.items() for site in sites}
    graph = nx.DiGraph()
    graph.add_nodes_from(owner.get(site, site) for site in dag)
    graph.add_edges_from((owner.get(u, u), owner.get(v, v)) for u, v in dag.edges)
    return graph


def macros_of(groups):
    return [
        pm.MacroVariable(name, micro=sites) if sites != (name,) else name
        for name, sites in groups.items()
    ]


@pytest.mark.parametrize("seed", range(60))
def test_theorem_4_1_macro_graph_is_the_latent_projection(seed):
    """Arrows by all directed paths, separations by all paths of the quotient."""
    rng = random.Random(seed)
    dag = random_dag(rng, [f"s{k}" for k in range(8)], 0.3)
    groups, others = grouped(rng, dag)
    whole = quotient(dag, groups)
    model, macros = program_of(dag), macros_of(groups)
    if any(
        nx.has_path(dag, a, b) for g in groups.values() for a in g for b in g if a != b
    ):
        with pytest.raises(pm.NotAMicroState):
            pm.macro_graph(model, macros)
        return
    if not nx.is_directed_acyclic_graph(whole):
        with pytest.raises(pm.CyclicPartition):
            pm.macro_graph(model, macros)
        return
    graph = pm.macro_graph(model, macros)
    latent = {n for n, kind in graph.nodes.data("kind") if kind == "latent"}
    assert set(graph) - latent == set(groups) and latent <= set(others)
    arrows = {
        (a, b)
        for a in groups
        for b in groups
        for path in ([] if a == b else nx.all_simple_paths(whole, a, b))
        if not set(path[1:-1]) & set(groups)
    }
    assert {e for e in graph.edges if e[0] not in latent} == arrows
    for a, b in arrows:
        path = graph.edges[a, b]["path"]
        assert path[0] in groups[a] and path[-1] in groups[b]
        assert nx.is_path(dag, path) and set(path[1:-1]) <= set(others)
    for a in groups:
        for b in groups:
            for given in subsets(set(groups) - {a, b}) if a < b else ():
                assert separated(graph, a, b, given) == separated(whole, a, b, given)


@pytest.mark.parametrize("seed", range(60))
def test_theorem_4_1_separations_hold_among_micro_states(seed):
    """In random linear programs, by covariances: and none is missed for single sites.

    Some of the sites that are projected out are deterministic.
    """
    rng = random.Random(1000 + seed)
    generator = torch.Generator().manual_seed(seed)
    dag = random_dag(rng, [f"s{k}" for k in range(8)], 0.3)
    groups, others = grouped(rng, dag)
    deterministic = {name for name in others if dag.in_degree(name)}
    try:
        graph = pm.macro_graph(program_of(dag, deterministic), macros_of(groups))
    except (pm.NotAMicroState, pm.CyclicPartition):
        return
    place = {name: k for k, name in enumerate(dag)}
    weight = torch.zeros(8, 8)
    for parent, child in dag.edges:
        draw = torch.rand((), generator=generator)
        weight[place[child], place[parent]] = draw + 0.5
    noise = torch.diag(torch.tensor([float(n not in deterministic) for n in dag]))
    spread = torch.linalg.inv(torch.eye(8) - weight)
    covariance = spread @ noise @ spread.T

    def partial(a, b, given):
        rows, columns = [place[s] for s in groups[a]], [place[s] for s in groups[b]]
        held = [place[s] for name in given for s in groups[name]]
        inner = torch.linalg.inv(covariance[held][:, held])
        known = covariance[rows][:, held] @ inner @ covariance[held][:, columns]
        return (covariance[rows][:, columns] - known).abs().max()

    single = all(len(sites) == 1 for sites in groups.values())
    for a in groups:
        for b in groups:
            for given in subsets(set(groups) - {a, b}) if a < b else ():
                independent = partial(a, b, given) < 1e-9
                if separated(graph, a, b, given):
                    assert independent
                elif single:
                    assert not independent
