# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Finite programs as Bayesian networks of pgmpy and pyAgrum: their answers and ours.

A network is made of what the program says of itself: its micro graph, and the
distribution of each site at all values of its parents.
"""

import itertools

import networkx as nx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])


def table(*shape):
    values = torch.rand(shape) + 0.1
    return values / values.sum(-1, keepdim=True)


@pytest.fixture
def shop():
    """A season that confounds two products and revenue, and what comes of revenue."""
    pyro.set_rng_seed(3)
    start, of_x1, of_x2 = table(2), table(2, 3), table(2, 3)
    of_y, of_mood = table(2, 3, 3, 3), table(3, 2)

    def model():
        season = pyro.sample("season", dist.Categorical(start))
        x1 = pyro.sample("x1", dist.Categorical(of_x1[season]))
        x2 = pyro.sample("x2", dist.Categorical(of_x2[season]))
        y = pyro.sample("y", dist.Categorical(of_y[season, x1, x2]))
        return pyro.sample("mood", dist.Categorical(of_mood[y]))

    return model


def tables(model, sizes):
    """The probabilities of each site, its parents in front, as of a program."""
    graph = pm.micro_graph(model)
    found = {}
    for name in nx.topological_sort(graph):
        parents = list(graph.predecessors(name))
        shape = [sizes[parent] for parent in parents]
        cpt = np.empty([*shape, sizes[name]])
        for at in itertools.product(*map(range, shape)):
            values = dict(zip(parents, map(torch.tensor, at), strict=True))
            run = poutine.trace(poutine.do(model, data=values)).get_trace()
            site = run.nodes[name]
            if graph.nodes[name]["deterministic"]:
                cpt[at] = np.eye(sizes[name])[int(site["value"])]
            else:
                cpt[at] = site["fn"].probs.numpy()
        found[name] = parents, cpt
    return found


SIZES = {"season": 2, "x1": 3, "x2": 3, "y": 3, "mood": 2}
TOTALS = SIZES["x1"] + SIZES["x2"] - 1


def with_total(model):
    """The tables of the program, and that of the sum of the two products."""
    total = np.zeros((SIZES["x1"], SIZES["x2"], TOTALS))
    for i, j in np.ndindex(total.shape[:2]):
        total[i, j, i + j] = 1.0
    return {**tables(model, SIZES), "sales": (["x1", "x2"], total)}


class Pgmpy:
    def __init__(self, found):
        pytest.importorskip("pgmpy", reason="needs pgmpy: pip install '.[neighbours]'")
        from pgmpy.factors.discrete import TabularCPD
        from pgmpy.models import DiscreteBayesianNetwork

        self.network = DiscreteBayesianNetwork()
        self.network.add_nodes_from(found)
        for name, (parents, _) in found.items():
            self.network.add_edges_from((parent, name) for parent in parents)
        for name, (parents, cpt) in found.items():
            columns = cpt.reshape(-1, cpt.shape[-1]).T
            self.network.add_cpds(
                TabularCPD(name, cpt.shape[-1], columns, parents, cpt.shape[:-1])
            )
        assert self.network.check_model()

    def query(self, names, seen=None, done=None):
        from pgmpy.inference import VariableElimination

        network = self.network
        if done:
            network = network.do(list(done))
        inference = VariableElimination(network)
        found = inference.query(
            names, evidence={**(seen or {}), **(done or {})}, show_progress=False
        )
        order = [found.variables.index(name) for name in names]
        return torch.as_tensor(found.values.transpose(order))


class Pyagrum:
    def __init__(self, found):
        self.gum = pytest.importorskip(
            "pyagrum", reason="needs pyAgrum: pip install '.[neighbours]'"
        )
        self.network = self.gum.BayesNet()
        for name, (_, cpt) in found.items():
            self.network.add(self.gum.LabelizedVariable(name, "", cpt.shape[-1]))
        for name, (parents, cpt) in found.items():
            for parent in parents:
                self.network.addArc(parent, name)
            for at in itertools.product(*map(range, cpt.shape[:-1])):
                values = dict(zip(parents, at, strict=True))
                self.network.cpt(name)[values] = cpt[at].tolist()

    def query(self, names, seen=None, done=None):
        if done:
            model = self.gum.CausalModel(self.network)
            found = self.gum.causalImpact(
                model,
                on=set(names),
                doing=set(done),
                knowing=set(seen or ()),
                values={**done, **(seen or {})},
            )[1]
        else:
            inference = self.gum.LazyPropagation(self.network)
            inference.setEvidence(seen or {})
            inference.addJointTarget(set(names))
            found = inference.jointPosterior(set(names))
        return torch.as_tensor(found.reorganize(names[::-1]).toarray())


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


NETWORKS = pytest.mark.parametrize("network", [Pgmpy, Pyagrum])
EACH = [(i, j) for i in range(SIZES["x1"]) for j in range(SIZES["x2"])]


def law_of_parts(model, value, **more):
    """The probabilities of all micro states under the natural realization."""
    intervened = pm.macro_do(model, {SALES: pm.Natural(value, **more)})
    law = poutine.trace(intervened).get_trace().nodes["sales__micro"]["fn"]
    found = torch.zeros(SIZES["x1"], SIZES["x2"])
    for i, j in EACH:
        if i + j == value:
            found[i, j] = law.log_prob(torch.tensor([i, j]).to(found)).exp()
    return found


@NETWORKS
def test_the_natural_realization_is_the_network_given_the_sum(shop, network):
    net = network(with_total(shop))
    for value in range(TOTALS):
        expected = net.query(["x1", "x2"], seen={"sales": value})
        close(law_of_parts(shop, float(value)), expected)


@NETWORKS
def test_the_natural_realization_in_a_season(shop, network):
    net = network(with_total(shop))
    for season in range(SIZES["season"]):
        then = poutine.condition(shop, data={"season": torch.tensor(season)})
        found = law_of_parts(then, 2.0, given="season")
        close(found, net.query(["x1", "x2"], seen={"sales": 2, "season": season}))


def moments(laws):
    """Means and variances of laws on 0, 1, 2..., one a row."""
    laws = torch.stack(laws)
    values = torch.arange(laws.shape[-1]).to(laws)
    mean = laws @ values
    return mean, laws @ values**2 - mean**2


@NETWORKS
def test_confounding_in_the_words_of_a_network(shop, network):
    """P(y | sales), and P(y | do(sales)): sum P(x | sales) P(y | do(x)) over x."""
    net = network(with_total(shop))
    after = {(i, j): net.query(["y"], done={"x1": i, "x2": j}) for i, j in EACH}
    seen, done = [], []
    for value in range(TOTALS):
        seen.append(net.query(["y"], seen={"sales": value}))
        parts = net.query(["x1", "x2"], seen={"sales": value})
        done.append(sum(parts[at] * after[at] for at in EACH))
    at = torch.arange(float(TOTALS))
    report = pm.confounding(shop, SALES, "y", pm.Natural, at=at)
    assert report.method == "exact: finite" and report.verdict == "inducing"
    mean, variance = moments(seen)
    close(report.observational_mean, mean)
    close(report.observational_variance, variance)
    mean, variance = moments(done)
    close(report.interventional_mean, mean)
    close(report.interventional_variance, variance)
    distance = 0.5 * (torch.stack(seen) - torch.stack(done)).abs().sum(-1)
    close(report.distance, distance)


@NETWORKS
def test_adjustment_in_the_words_of_a_network(shop, network):
    """Theorem 4.1: sum P(y | sales, season) P(season) over seasons."""
    net = network(with_total(shop))
    prior = net.query(["season"])
    laws = [
        sum(
            prior[season] * net.query(["y"], seen={"sales": value, "season": season})
            for season in range(SIZES["season"])
        )
        for value in range(TOTALS)
    ]
    at = torch.arange(float(TOTALS))
    report = pm.macro_adjust(shop, SALES, "y", "season", at=at)
    mean, variance = moments(laws)
    close(report.mean, mean)
    close(report.variance, variance)


@NETWORKS
def test_a_network_sets_the_sum_and_nothing_follows(shop, network):
    """It takes the sum for one more effect of its parts, which are as they were."""
    net = network(with_total(shop))
    close(net.query(["y"], done={"sales": 4}), net.query(["y"]))
    report = pm.confounding(shop, SALES, "y", pm.Natural, at=[4.0])
    assert (report.interventional_mean - moments([net.query(["y"])])[0]).abs() > 0.05


INTERVENTIONS = [{}, {"x1": 2}, {"season": 1}, {"x1": 0, "x2": 1}, {"y": 2}]


@NETWORKS
def test_a_consolidated_model_answers_as_the_network(shop, network):
    net = network(tables(shop, SIZES))
    fused = pm.consolidate(shop, keep="mood", allow=["season", "x1", "x2", "y"])
    for done in INTERVENTIONS:
        values = {name: torch.tensor(value) for name, value in done.items()}
        run = poutine.trace(poutine.do(fused, data=values)).get_trace()
        found = run.nodes["mood"]["fn"].probs
        close(found, net.query(["mood"], done=done))


def random_program(seed):
    """Six sites, of two or three values, each of at most three before it."""
    rng = np.random.default_rng(seed)
    pyro.set_rng_seed(seed)
    names = [f"x{i}" for i in range(6)]
    sizes = {name: int(rng.integers(2, 4)) for name in names}
    parents, cpts = {}, {}
    for i, name in enumerate(names):
        count = int(rng.integers(0, min(i, 3) + 1))
        parents[name] = sorted(rng.choice(names[:i], count, replace=False).tolist())
        cpts[name] = table(*(sizes[p] for p in parents[name]), sizes[name])

    def model():
        values = {}
        for name in names:
            rows = cpts[name]
            if parents[name]:
                rows = rows[tuple(values[p] for p in parents[name])]
            values[name] = pyro.sample(name, dist.Categorical(rows))

    return model, sizes


@NETWORKS
@pytest.mark.parametrize("seed", range(6))
def test_random_consolidated_models_answer_as_networks(network, seed):
    model, sizes = random_program(seed)
    net = network(tables(model, sizes))
    fused = pm.consolidate(model, keep=["x3", "x5"], allow=["x1", "x4"])
    for done in ({}, {"x1": 1}, {"x4": 0}, {"x1": 0, "x4": 1}):
        values = {name: torch.tensor(value) for name, value in done.items()}
        made = poutine.do(fused, data=values)
        found = torch.zeros(sizes["x3"], sizes["x5"])
        for i, j in np.ndindex(*found.shape):
            at = {"x3": torch.tensor(i), "x5": torch.tensor(j)}
            run = poutine.trace(poutine.condition(made, data=at)).get_trace()
            run.compute_log_prob()
            logs = [run.nodes[name]["log_prob"] for name in at]
            found[i, j] = sum(logs).exp()
        close(found, net.query(["x3", "x5"], done=done))


def unit_shop():
    """All that differs between units is one number; the rest are equations."""
    u = pyro.sample("u", dist.Categorical(torch.arange(1.0, 13.0) / 78.0))
    season = pyro.deterministic("season", (u >= 5).double())
    x1 = pyro.deterministic("x1", (u + season) % 3)
    x2 = pyro.deterministic("x2", (2 * u + season) % 3)
    pyro.deterministic("y", (x1 + 2 * x2 + season + (u % 2)) % 3)


@pytest.mark.parametrize("seen", [{"y": 1}, {"x1": 0, "y": 2}, {"season": 1, "x2": 1}])
def test_a_counterfactual_by_a_twin_network(seen):
    gum = pytest.importorskip(
        "pyagrum", reason="needs pyAgrum: pip install '.[neighbours]'"
    )
    sizes = {"u": 12, "season": 2, "x1": 3, "x2": 3, "y": 3}
    net = Pyagrum(tables(unit_shop, sizes)).network
    done = {"x1": 1, "x2": 1}
    expected = gum.counterfactual(
        gum.CausalModel(net), profile=seen, on={"y"}, whatif=set(done), values=done
    )
    shared = {SALES: pm.Allocate(2.0, shares=[0.5, 0.5])}
    observed = {name: float(value) for name, value in seen.items()}
    report = pm.counterfactual(unit_shop, shared, observed, "y")
    found = torch.zeros(3)
    found[report.outcomes.flatten().long()] = report.probabilities[0].to(found)
    close(found, torch.as_tensor(expected.toarray()))
