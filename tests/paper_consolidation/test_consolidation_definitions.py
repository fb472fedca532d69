# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Definitions 1, 3 and 4, Algorithms 1 and 2 of *Do Not Marginalize Mechanisms, Rather
Consolidate!*, against structural causal models that are evaluated in plain Python."""

import itertools
import operator
import random
from collections import defaultdict

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm
from pyro_macro.consolidation.partition import (
    boundary,
    clusters,
    quotient,
    restricted,
)

# A structural causal model: its equations by variable, with the names of their inputs

EXOGENOUS = ("u0", "u1", "u2")
INPUTS = list(itertools.product([False, True], repeat=len(EXOGENOUS)))
OPERATIONS = {
    "copy": (1, lambda a: a & True),
    "not": (1, lambda a: a ^ True),
    "and": (2, operator.and_),
    "or": (2, operator.or_),
    "xor": (2, operator.xor),
}


def random_scm(seed, size=7):
    rng = random.Random(seed)
    scm = {}
    for i in range(size):
        kind = rng.choice(sorted(OPERATIONS))
        above = [*EXOGENOUS, *scm, *scm]  # endogenous ones twice as likely
        count = min(OPERATIONS[kind][0], len(set(above)))
        inputs: list[str] = []
        while len(inputs) < count:
            inputs += [n for n in [rng.choice(above)] if n not in inputs]
        scm[f"v{i}"] = (kind, tuple(inputs))
    return scm


def whole(scm, u, do):
    """All values of M under an intervention, by its equations one after another."""
    x = dict(u)
    for name, (kind, inputs) in scm.items():
        x[name] = do[name] if name in do else OPERATIONS[kind][1](*map(x.get, inputs))
    return {name: x[name] for name in scm}


def part(scm, cluster, given, do):
    """A sub-SCM: it knows the parents of its cluster outside of it, and no others."""
    x = dict(given)
    for name in scm:
        if name in cluster:
            kind, inputs = scm[name]
            value = OPERATIONS[kind][1](*(x[i] for i in inputs))
            x[name] = do.get(name, value)
    return {name: x[name] for name in cluster}


def outer_parents(scm, cluster):
    return {i for name in cluster for i in scm[name][1]} - set(cluster)


def partitioned(scm, order, u, do):
    """Algorithm 2."""
    x = dict(u)
    for cluster in order:
        given = {name: x[name] for name in outer_parents(scm, cluster)}
        x.update(part(scm, cluster, given, restricted(do, cluster)))
    return {name: x[name] for name in scm}


def graph_of(scm):
    graph = nx.DiGraph()
    graph.add_nodes_from(scm)
    graph.add_edges_from((i, n) for n, (_, ins) in scm.items() for i in ins if i in scm)
    return graph


def is_order(graph, order):
    place = {name: i for i, cluster in enumerate(order) for name in cluster}
    return all(place[a] <= place[b] for a, b in graph.edges)


def all_orders(graph, parts):
    return [o for o in itertools.permutations(parts) if is_order(graph, o)]


def partitions(names):
    """All ways to divide names into clusters."""
    if not names:
        yield []
        return
    first, *rest = names
    for division in partitions(rest):
        yield [{first}, *division]
        for i in range(len(division)):
            yield [*division[:i], division[i] | {first}, *division[i + 1 :]]


def random_partition(scm, rng):
    """Clusters that do not need one another in a circle."""
    graph = graph_of(scm)
    while True:
        parts = defaultdict(set)
        for name in scm:
            parts[rng.randrange(4)].add(name)
        if all_orders(graph, parts.values()):
            return [frozenset(p) for p in parts.values()]


def in_pyro(scm):
    def model(u):
        x = dict(u)
        with pyro.plate("inputs", len(INPUTS)):
            for name, (kind, inputs) in scm.items():
                value = OPERATIONS[kind][1](*(x[i] for i in inputs))
                x[name] = pyro.deterministic(name, value)

    return model


def all_inputs():
    return dict(zip(EXOGENOUS, torch.tensor(INPUTS).T, strict=True))


def values(model, u, do):
    do = {name: torch.tensor(value) for name, value in do.items()}
    trace = poutine.trace(poutine.do(model, do) if do else model).get_trace(u)
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}


def random_interventions(scm, rng, count=6):
    """Distinct ones, on one to three variables."""
    found = []
    while len(found) < count:
        names = rng.sample(sorted(scm), rng.choice([1, 1, 2, 3]))
        one = {name: rng.random() < 0.5 for name in names}
        if one not in found:
            found.append(one)
    return found


# Partitions, Definitions 3 and 4


def test_a_partition_is_accepted_if_and_only_if_it_can_be_ordered():
    seen = set()
    for seed in range(6):
        scm = random_scm(seed, size=5)
        graph = graph_of(scm)
        for parts in partitions(list(scm)):
            orders = all_orders(graph, [frozenset(p) for p in parts])
            seen.add(bool(orders))
            if orders:
                assert clusters(graph, parts) in orders
            else:
                with pytest.raises(pm.CyclicPartition, match="need"):
                    clusters(graph, parts)
    assert seen == {True, False}


def test_the_smallest_circle_is_refused():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(a, 1.0))
        pyro.sample("c", dist.Normal(b, 1.0))

    chain = nx.DiGraph([("a", "b"), ("b", "c")])
    with pytest.raises(pm.CyclicPartition) as error:
        clusters(chain, [{"a", "c"}, {"b"}])
    assert "'a'" in str(error.value) and "'b'" in str(error.value)
    with pytest.raises(pm.CyclicPartition):
        pm.consolidate(model, keep=["c"], partition=[{"a", "c"}, {"b"}])
    for fine in ([{"a", "b"}, {"c"}], [{"a"}, {"b", "c"}], [{"a", "b", "c"}]):
        assert pm.consolidate(model, keep=["c"], partition=fine).sites[-1] == "c"


def test_clusters_cover_all_without_overlap():
    graph = graph_of(random_scm(3))
    found = clusters(graph, [{"v1", "v2"}])
    assert sorted(n for c in found for n in c) == sorted(graph)
    assert sorted(map(len, found)) == [1] * (len(graph) - 2) + [2]
    with pytest.raises(pm.PyroMacroError, match="overlap"):
        clusters(graph, [{"v0", "v1"}, {"v1", "v2"}])
    with pytest.raises(pm.UnknownSite, match="v0"):
        clusters(graph, [{"v00"}])


def test_the_relation_that_a_graph_induces_on_clusters():
    for seed in range(10):
        scm, rng = random_scm(seed), random.Random(seed)
        parts = random_partition(scm, rng)
        of = {name: cluster for cluster in parts for name in cluster}
        expected = {
            (of[i], of[name])
            for name, (_, inputs) in scm.items()
            for i in inputs
            if i in scm and of[i] != of[name]
        }
        induced = quotient(graph_of(scm), of)
        assert set(induced.edges) == expected
        assert set(induced.nodes) == set(parts)
        crossing = {i for p in parts for i in outer_parents(scm, p) if i in scm}
        assert boundary(graph_of(scm), parts) == [n for n in scm if n in crossing]


def test_psi_takes_interventions_apart():
    rng = random.Random(0)
    scm = random_scm(0)
    for do in random_interventions(scm, rng, 20):
        pieces = [restricted(do, c) for c in random_partition(scm, rng)]
        assert sum(map(len, pieces)) == len(do)
        assert {n: v for piece in pieces for n, v in piece.items()} == do


# Algorithm 2


@pytest.mark.parametrize("seed", range(8))
def test_algorithm_2_evaluates_the_whole_model(seed):
    rng = random.Random(seed)
    scm = random_scm(seed)
    graph = graph_of(scm)
    parts = random_partition(scm, rng)
    orders = all_orders(graph, parts)
    assert clusters(graph, parts) in orders
    for do in [{}, *random_interventions(scm, rng)]:
        for bits in INPUTS:
            u = dict(zip(EXOGENOUS, bits, strict=True))
            expected = whole(scm, u, do)
            for order in orders:
                assert partitioned(scm, order, u, do) == expected


def test_ties_are_evaluated_in_any_order():
    scm = {
        "a": ("copy", ("u0",)),
        "b": ("not", ("u1",)),
        "c": ("xor", ("a", "u2")),
        "d": ("and", ("b", "u0")),
        "e": ("or", ("c", "d")),
    }
    parts = [frozenset("ac"), frozenset("b"), frozenset("d"), frozenset("e")]
    orders = all_orders(graph_of(scm), parts)
    induced = quotient(graph_of(scm), {n: c for c in parts for n in c})
    assert len(orders) == 3
    assert sorted(map(str, nx.all_topological_sorts(induced))) == sorted(
        str(list(order)) for order in orders
    )


# Compositional variables and Algorithm 1


@pytest.mark.parametrize("seed", range(12))
def test_consolidated_models_agree_with_the_whole_one(seed):
    rng = random.Random(100 + seed)
    scm = random_scm(seed)
    keep = rng.sample(sorted(scm), 2)
    allow = random_interventions(scm, rng)
    parts = random_partition(scm, rng) if seed % 2 else None
    u = all_inputs()
    fused = pm.consolidate(
        in_pyro(scm), keep, allow=allow, partition=parts, model_args=(u,)
    )

    stays = set(fused.sites)

    def check(do):
        found = values(fused, u, do)
        assert set(found) == {*stays, *do}
        for i, bits in enumerate(INPUTS):
            u_i = dict(zip(EXOGENOUS, bits, strict=True))
            for name, value in found.items():
                # Under its own name `do` shows what a site would have been
                others = {n: v for n, v in do.items() if n != name or n not in stays}
                expected = whole(scm, u_i, others)[name]
                assert bool(value.expand(len(INPUTS))[i]) == expected, (do, name)

    for do in [{}, *allow, *({name: True} for name in keep)]:
        check(do)


@pytest.mark.parametrize("seed", range(12))
def test_what_stays_is_what_is_kept_or_needed_elsewhere(seed):
    rng = random.Random(seed)
    scm = random_scm(seed, size=9)
    keep = set(rng.sample(sorted(scm), 2))
    parts = random_partition(scm, rng)
    fused = pm.consolidate(
        in_pyro(scm), sorted(keep), partition=parts, model_args=(all_inputs(),)
    )
    graph = graph_of(scm)
    needed = keep.union(*(nx.ancestors(graph, name) for name in keep))
    extended = {  # E' of all clusters
        i
        for cluster in parts
        for name in cluster & needed
        for i in scm[name][1]
        if i in scm and i not in cluster
    }
    assert set(fused.sites) == keep | extended
    assert list(fused.sites) == [name for name in scm if name in keep | extended]
    assert fused.cost.before.equations == len(scm)


def test_the_interventions_of_a_cluster_include_none():
    scm = random_scm(1)
    allow = [{"v0": True}, {"v0": True, "v3": False}, {"v4": False}]
    fused = pm.consolidate(
        in_pyro(scm), ["v6"], allow=allow, model_args=(all_inputs(),)
    )
    cases = {
        frozenset(["v1", "v2"]): [{}],
        frozenset(["v0", "v1"]): [{}, {"v0": True}],
        frozenset(["v0", "v3"]): [{}, {"v0": True}, {"v0": True, "v3": False}],
        frozenset(["v3", "v4"]): [{}, {"v3": False}, {"v4": False}],
        frozenset(scm): [{}, *allow],
    }
    for cluster, expected in cases.items():
        found = fused.allowed.on(cluster)
        assert found[0] == {}
        assert sorted(map(str, found)) == sorted(map(str, expected))
        # It is psi of each of them
        assert all(restricted(one, cluster) in found for one in [{}, *allow])


def test_interventions_outside_of_the_allowed_are_errors():
    scm = {
        "a": ("copy", ("u0",)),
        "b": ("not", ("a",)),
        "c": ("xor", ("b", "u1")),
        "d": ("or", ("c", "u2")),
        "e": ("and", ("c", "d")),
    }
    u = all_inputs()
    fused = pm.consolidate(
        in_pyro(scm),
        ["e"],
        allow=[{"a": True}, {"b": False}, {"a": False, "c": True}],
        model_args=(u,),
    )
    fine = ({"a": True}, {"b": False}, {"a": False, "c": True})
    for do in fine:
        values(fused, u, do)
        values(fused, u, {**do, "e": True})  # what is kept can always be set
    wrong = (
        {"a": False},
        {"b": True},
        {"c": True},
        {"d": True},
        {"a": True, "b": False},
        {"a": True, "c": True},
        {"a": False, "c": True, "d": True},
    )
    for do in wrong:
        with pytest.raises(pm.InterventionNotAllowed) as error:
            values(fused, u, do)
        assert all(name in str(error.value) for name in do)
        with pytest.raises(pm.InterventionNotAllowed):
            values(fused, u, {**do, "e": True})


def test_without_interventions_it_is_marginalization():
    scm = random_scm(5)
    u = all_inputs()
    fused = pm.consolidate(in_pyro(scm), ["v6"], model_args=(u,))
    assert fused.sites == ("v6",)
    assert fused.allowed.on(scm) == [{}]
    expected = [
        whole(scm, dict(zip(EXOGENOUS, bits, strict=True)), {})["v6"] for bits in INPUTS
    ]
    assert values(fused, u, {})["v6"].tolist() == expected
    for name in list(scm)[:-1]:
        with pytest.raises(pm.InterventionNotAllowed, match=name):
            values(fused, u, {name: True})


# Dependent exogenous variables


@pytest.mark.parametrize("seed", range(6))
def test_exogenous_variables_may_be_dependent(seed):
    rng = random.Random(seed)
    scm = random_scm(20 + seed, size=5)
    weights = [rng.random() for _ in INPUTS]
    law = [w / sum(weights) for w in weights]

    def model():
        joint = pyro.sample("u", dist.Categorical(torch.tensor(law)))
        x = {
            name: pyro.deterministic(name, joint // 2 ** (2 - i) % 2 == 1)
            for i, name in enumerate(EXOGENOUS)
        }
        for name, (kind, inputs) in scm.items():
            value = OPERATIONS[kind][1](*(x[i] for i in inputs))
            x[name] = pyro.deterministic(name, value)

    keep = ["v3", "v4"]
    allow = [{"v0": True}, {"v1": False}, {"v0": False, "v2": True}]
    fused = pm.consolidate(model, keep, allow=allow)
    assert set(fused.sites) == set(keep)
    for do in [{}, *allow]:
        expected = defaultdict(float)
        for bits, p in zip(INPUTS, law, strict=True):
            x = whole(scm, dict(zip(EXOGENOUS, bits, strict=True)), do)
            expected[x["v3"], x["v4"]] += p
        under = {name: torch.tensor(value) for name, value in do.items()}
        found = joint_of_two(poutine.do(fused, under) if do else fused, *keep)
        for pair in itertools.product([False, True], repeat=2):
            assert found[pair] == pytest.approx(expected[pair], abs=1e-8), (do, pair)


def joint_of_two(model, one, other):
    """The probabilities of two truth values, each certain or with a law of its own."""
    found = defaultdict(float)
    for first in (False, True):
        given = poutine.condition(model, data={one: torch.tensor(first)})
        trace = poutine.trace(given).get_trace()
        p = probability(poutine.trace(model).get_trace().nodes[one], first)
        if p:
            for second in (False, True):
                q = probability(trace.nodes[other], second)
                found[first, second] += p * q
    return found


def probability(site, value):
    if site["infer"].get("_deterministic"):
        return float(bool(site["value"]) == value)
    return float(site["fn"].log_prob(torch.tensor(value)).exp())
