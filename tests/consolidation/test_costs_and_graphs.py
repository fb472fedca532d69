# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What a fused program costs, counted by hand, and what its graph says.

Of random programs the random numbers are counted in a run, and the edges of the graph
are found by listing paths.
"""

import contextlib
import itertools
import random

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm
from pyro_macro.consolidation.cost import Cost

# Small programs, counted by hand


def row(weight=2.0, offset=1.0):
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(weight * a + offset, 1.0))
    pyro.sample("c", dist.Normal(3 * b, 2.0))


def ones():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0))
    pyro.sample("c", dist.Normal(b, 2.0))


def fork():
    h = pyro.sample("h", dist.Normal(0.0, 1.0))
    pyro.sample("x", dist.Normal(2 * h, 1.0))
    e = pyro.sample("e", dist.Normal(0.0, 1.0))
    y = pyro.sample("y", dist.Normal(3 * h + e, 1.0))
    pyro.sample("unused", dist.Normal(5 * y + 2, 1.0))


def weather():
    h = pyro.sample("h", dist.Bernoulli(0.3))
    x = pyro.sample("x", dist.Bernoulli(0.1 + 0.5 * h))
    pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * x))


def shared():
    b = pyro.sample("B", dist.Bernoulli(0.3))
    pyro.deterministic("C", b)
    pyro.deterministic("D", b)


def shared_given():
    """Appendix C."""
    a = pyro.sample("A", dist.Uniform(0.0, 1.0))
    b = pyro.sample("B", dist.Bernoulli(a))
    pyro.deterministic("C", b)
    pyro.deterministic("D", b)


def plates():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("plate", 4):
        x = pyro.sample("x", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(2 * x, 1.0), obs=torch.zeros(4))


def vectors():
    w = torch.tensor([[1.0, 2.0], [0.0, 3.0], [4.0, 0.0]])
    v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    x = pyro.sample("x", dist.Normal(v @ w, 1.0).to_event(1))
    pyro.sample("y", dist.Normal(x, 1.0).to_event(1))


def tool(steps=36):
    s = pyro.deterministic("s0", torch.tensor(1.0))
    for t in range(1, steps + 1):
        s = pyro.deterministic(f"s{t}", 0.95 * s)


def branching():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(1.0 if a > 0 else 2.0, 1.0))
    pyro.sample("c", dist.Normal(2 * b, 1.0))


# Equations, random numbers, and operations, before and after
COUNTED = {
    "row, marginal": (row, "c", [], (3, 3, 3), (1, 1, 0)),
    "row": (row, "ac", [], (3, 3, 3), (2, 2, 2)),  # 6 * a + 3
    "row, allowed": (row, "ac", ["b"], (3, 3, 3), (2, 2, 2)),
    "row, all": (row, "abc", [], (3, 3, 3), (3, 3, 3)),
    "row, without its end": (row, "ab", [], (3, 3, 3), (2, 2, 2)),
    "ones": (ones, "ac", [], (3, 3, 0), (2, 2, 0)),
    # y given x is a multiple of it
    "fork": (fork, "xy", [], (5, 5, 5), (2, 2, 1)),
    "fork, from its root": (fork, "hy", [], (5, 5, 5), (2, 2, 1)),
    "weather, marginal": (weather, "y", [], (3, 3, 4), (1, 1, 0)),
    "weather": (weather, "hy", [], (3, 3, 4), (2, 2, 1)),  # a row of a table
    "plates": (plates, "z", [], (3, 5, 4), (2, 1, 4)),
    "vectors": (vectors, "y", [], (3, 7, 4), (1, 2, 0)),
    "vectors, between": (vectors, "vy", [], (3, 7, 4), (2, 5, 4)),
    "tool": (tool, ["s36"], ["s12", "s24"], (37, 0, 36), (1, 0, 0)),
    "not taken apart": (branching, "c", [], (3, 3, 1), (3, 3, 1)),
}


def counts(cost):
    return cost.equations, cost.draws, cost.operations


@pytest.mark.parametrize("case", COUNTED)
def test_by_hand(case):
    model, keep, allow, before, after = COUNTED[case]
    cost = pm.consolidate(model, list(keep), allow).cost
    assert counts(cost.before) == before
    assert counts(cost.after) == after


@pytest.mark.parametrize(
    "model, keep, draws",
    [(shared, "CD", (1, 1)), (shared_given, "ACD", (2, 2)), (shared, "C", (1, 1))],
)
def test_shared_noise_is_drawn_once(model, keep, draws):
    cost = pm.consolidate(model, list(keep)).cost
    assert (cost.before.draws, cost.after.draws) == draws
    assert not cost.after.exceeds(cost.before)


@pytest.mark.parametrize("keep", ["x", "y", "xy", "hy"])
def test_tables_in_plates(keep):
    def model():
        with pyro.plate("plate", 3):
            h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.2, 0.5, 0.7])))
            x = pyro.sample("x", dist.Bernoulli(0.1 + 0.5 * h))
            pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * x))

    cost = pm.consolidate(model, list(keep)).cost
    assert counts(cost.before) == (3, 9, 12)
    assert (cost.after.equations, cost.after.draws) == (len(keep), 3 * len(keep))
    assert cost.after.operations < 12


def test_numbers_that_are_stored():
    """Without zeros: weights, offsets and scales."""
    cost = pm.consolidate(row, ["c"]).cost
    assert (cost.before.numbers, cost.after.numbers) == (6, 2)  # 3 and 7^2
    cost = pm.consolidate(row, ["a", "c"]).cost
    assert (cost.before.numbers, cost.after.numbers) == (6, 4)  # 1; 6, 3, 13
    cost = pm.consolidate(weather, ["y"]).cost
    assert (cost.before.numbers, cost.after.numbers) == (5, 2)


def test_what_is_fused_by_hand_costs_the_same():
    """The measure is one: before it is taken of statements, after of laws."""

    def by_hand():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("c", dist.Normal(6 * a + 3, 13**0.5))

    cost = pm.consolidate(by_hand, ["a", "c"]).cost
    assert cost.before == cost.after == pm.consolidate(row, ["a", "c"]).cost.after

    def fork_by_hand():
        x = pyro.sample("x", dist.Normal(0.0, 5**0.5))
        pyro.sample("y", dist.Normal(1.2 * x, 3.8**0.5))

    cost = pm.consolidate(fork_by_hand, ["x", "y"]).cost
    assert cost.before == cost.after == pm.consolidate(fork, ["x", "y"]).cost.after

    def vectors_by_hand():
        w = torch.tensor([[1.0, 2.0], [0.0, 3.0], [4.0, 0.0]])
        v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(v @ w, 2**0.5).to_event(1))

    cost = pm.consolidate(vectors_by_hand, ["v", "y"]).cost
    after = pm.consolidate(vectors, ["v", "y"]).cost.after
    assert counts(cost.before) == counts(cost.after) == counts(after)


@pytest.mark.parametrize("kind", ["Gaussian", "finite", "mixture", "deterministic"])
def test_the_cost_does_not_depend_on_the_length(kind):
    def model(n):
        s = pyro.sample("s0", dist.Bernoulli(0.5))
        if kind in ("Gaussian", "deterministic"):
            s = pyro.sample("s1", dist.Normal(s, 1.0))
        for i in range(2, n):
            if kind == "Gaussian":
                s = pyro.sample(f"s{i}", dist.Normal(0.9 * s + 1, 1.0))
            elif kind in ("finite", "mixture"):
                s = pyro.sample(f"s{i}", dist.Bernoulli(0.1 + 0.8 * s))
            else:
                s = pyro.deterministic(f"s{i}", 0.5 * s + 1)
        if kind == "finite":
            pyro.sample("end", dist.Bernoulli(0.9 * s))
        else:
            pyro.sample("end", dist.Normal(s, 1.0))

    costs = []
    for n in (10, 40):
        keep = ["s0", "end"]
        if kind in ("Gaussian", "deterministic"):
            keep.append("s1")
        allow = [f"s{i}" for i in range(2, n)]
        fused = pm.consolidate(model, keep, allow, model_args=(n,))
        costs.append(fused.cost)
    assert costs[0].after == costs[1].after
    assert costs[0].before.equations + 30 == costs[1].before.equations
    assert costs[0].after.equations == len(keep)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("steps", [1, 2])
def test_formulas_of_vectors(steps, wide):
    """A number for all elements: the site has its shape all the same."""

    def model():
        with pyro.plate("plate", 2) if wide else contextlib.nullcontext():
            b = pyro.sample("b", dist.Gamma(2.0, 1.0))
            c = torch.tensor(1.0) + 1.0 * b
            if steps == 2:
                c = 2 * pyro.deterministic("c", c)
            pyro.deterministic("d", c.unsqueeze(-1) * torch.ones(3), event_dim=1)

    fused = pm.consolidate(model, ["b", "d"])
    assert not fused.cost.after.exceeds(fused.cost.before)
    nodes = poutine.trace(fused).get_trace().nodes
    b, d = nodes["b"]["value"], nodes["d"]["value"]
    assert d.shape == (2, 3)[1 - wide :]
    assert torch.allclose(d, steps * (1 + b.unsqueeze(-1)).expand(d.shape))


def test_a_product_of_more_numbers_than_its_factors_is_not_made():
    """Appendix B.2: a matrix with 6 numbers of two with 5."""
    down, up = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0], [-1.0], [3.0]])

    def model(x):
        v = pyro.deterministic("v", x, event_dim=1)
        u = pyro.deterministic("u", down @ v, event_dim=1)
        pyro.deterministic("w", up @ u, event_dim=1)

    x = torch.tensor([1.0, -2.0])
    fused = pm.consolidate(model, ["v", "w"], model_args=(x,))
    assert fused.cost.before.operations == fused.cost.after.operations == 5
    assert fused.cost.before == fused.cost.after
    assert any("would cost more" in how for how in fused.method.values())
    found = poutine.trace(fused).get_trace(x).nodes
    assert torch.equal(found["w"]["value"], up @ (down @ x))
    assert "u" not in found
    # The other way round it is one number
    up, down = torch.tensor([[1.0, 0.0, 2.0]]), up
    fused = pm.consolidate(model, ["w"], model_args=(torch.ones(1),))
    assert fused.cost.after.operations < fused.cost.before.operations


# Random programs: never worse


class Mixed:
    """A random program of sites of all kinds."""

    def __init__(self, seed):
        self.draw = draw = random.Random(seed)
        self.wide = draw.random() < 0.3
        self.lines = {}
        for i in range(draw.randint(3, 8)):
            some = draw.sample(list(self.lines), min(i, draw.randint(0, 2)))
            roots = ["normal", "vector", "bernoulli", "beta"]
            kind = draw.choice(roots + ["sum", "matrix", "compare"] * bool(some))
            weights = [draw.choice([-2.0, -0.5, 0.5, 1.0, 1.0, 3.0]) for _ in some]
            matrix = [[draw.choice([0.0, 0.0, 1.0, 2.0]) for _ in "xyz"] for _ in "xyz"]
            line = kind, some, weights, draw.random(), torch.tensor(matrix)
            self.lines[f"v{i}"] = line
        names = list(self.lines)
        self.keep = draw.sample(names, draw.randint(1, max(1, len(names) // 2)))
        self.allow = draw.sample(names, draw.randint(0, 3))

    def __call__(self):
        if self.wide:
            with pyro.plate("plate", 2):
                self.body()
        else:
            self.body()

    def body(self):
        values = {}
        for name, (kind, some, weights, number, matrix) in self.lines.items():
            mean = torch.tensor(number)
            vector = None
            for parent, weight in zip(some, weights, strict=True):
                value = values[parent].double()
                if value.dim() > self.wide:  # a vector
                    vector = value @ matrix
                    value = value.sum(-1)
                mean = mean + weight * value
            if vector is None:
                vector = mean.unsqueeze(-1) * torch.ones(3)
            if kind == "normal":
                value = pyro.sample(name, dist.Normal(mean, 1.0))
            elif kind == "vector":
                value = pyro.sample(name, dist.Normal(vector, 1.0).to_event(1))
            elif kind == "bernoulli":
                value = pyro.sample(name, dist.Bernoulli(torch.sigmoid(mean)))
            elif kind == "beta":
                value = pyro.sample(name, dist.Beta(1 + mean.abs(), 2.0))
            elif kind == "sum":
                value = pyro.deterministic(name, mean)
            elif kind == "matrix":
                value = pyro.deterministic(name, vector, event_dim=1)
            else:
                value = pyro.deterministic(name, (mean > 0.3).double())
            values[name] = value


def random_numbers(model):
    """How many a run draws."""
    nodes = poutine.trace(model).get_trace().nodes.values()
    return sum(
        node["value"].numel()
        for node in nodes
        if node["type"] == "sample"
        and not node["is_observed"]
        and type(node["fn"]).__name__ != "_Subsample"
    )


def check_cost(seed):
    model = Mixed(seed)
    fused = pm.consolidate(model, model.keep, model.allow)
    before, after = fused.cost.before, fused.cost.after
    assert (after.draws, after.operations) <= (before.draws, before.operations)
    assert not after.exceeds(before)
    assert after.equations <= before.equations == len(model.lines)
    assert before.draws == random_numbers(model)
    drawn = random_numbers(fused)
    computed = {n for n, line in model.lines.items() if line[0] in ("sum", "compare")}
    if computed.isdisjoint(fused.sites):
        assert after.draws == drawn
    else:  # what they share is counted once
        assert after.draws <= drawn


@pytest.mark.parametrize("seed", range(60))
def test_never_worse(seed):
    check_cost(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 600))
def test_never_worse_in_more_programs(seed):
    check_cost(seed)


# As a report


def test_costs_are_compared_by_random_numbers_first():
    little = Cost(5, 1, 100, 100)
    assert not little.exceeds(little)
    assert not little.exceeds(Cost(1, 2, 3, 4))
    assert little.exceeds(Cost(9, 1, 99, 999)) and little.exceeds(Cost(9, 0, 999, 9))
    assert not little.exceeds(Cost(1, 1, 100, 1))
    assert little + Cost(1, 2, 3, 4) == Cost(6, 3, 103, 104)


def test_costs_print_as_a_table():
    cost = pm.consolidate(row, ["a", "c"]).cost
    lines = str(cost).split("\n")
    assert lines[0] == "3 equations became 2, 3 random numbers 2."
    assert lines[1].split() == ["equations", "draws", "operations", "numbers"]
    assert lines[2].split() == ["before", "3", "3", "3", "6"]
    assert lines[3].split() == ["after", "2", "2", "2", "4"]
    assert cost._repr_html_().count("<tr>") == 3
    pandas = pytest.importorskip("pandas")
    frame = cost.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame["draws"]) == [3, 2]


# Graphs


class Linear:
    """A random program of Gaussian and deterministic sites, by its edges."""

    def __init__(self, seed, count=8):
        draw = random.Random(seed)
        self.names = [f"v{i}" for i in range(count)]
        self.parents, self.random = {}, {}
        for i, name in enumerate(self.names):
            few = draw.sample(self.names[:i], min(i, draw.randint(0, 3)))
            self.parents[name] = few
            self.random[name] = not few or draw.random() < 0.8
        self.keep = sorted(draw.sample(self.names, draw.randint(1, 5)))
        rest = [n for n in self.names if n not in self.keep]
        self.allow = draw.sample(rest, draw.randint(0, len(rest)))

    def __call__(self):
        values = {}
        for i, (name, parents) in enumerate(self.parents.items()):
            loc = torch.tensor(float(i))
            for j, parent in enumerate(parents):
                loc = loc + (j + 1.5) * values[parent]
            if self.random[name]:
                values[name] = pyro.sample(name, dist.Normal(loc, 1.0 + i))
            else:
                values[name] = pyro.deterministic(name, loc)

    @property
    def children(self):
        found = {name: [] for name in self.names}
        for name, parents in self.parents.items():
            for parent in parents:
                found[parent].append(name)
        return found

    def reached(self, name, kept):
        """The kept sites that a path leads to which meets no other kept one."""
        found = set()
        for child in self.children[name]:
            found |= {child} if child in kept else self.reached(child, kept)
        return found


def check_graph(seed):
    program = Linear(seed)
    fused = pm.consolidate(program, program.keep, program.allow)
    graph, kept = fused.graph, set(fused.sites)
    latent = {n for n, kind in graph.nodes(data="kind") if kind == "latent"}
    gone = [n for n in program.names if n not in kept]
    allowed = {n for n in program.allow if n in gone and program.reached(n, kept)}
    assert set(graph) - latent == kept | allowed
    assert latent.isdisjoint(program.names)
    expected = {
        (name, child)
        for name in kept | allowed
        for child in program.reached(name, kept)
    }
    found = {(a, b) for a, b in graph.edges if a not in latent}
    assert found == expected
    assert nx.is_directed_acyclic_graph(graph)
    # Which sites have a common cause that is gone
    together = set()
    for name in gone:
        if program.random[name]:
            pairs = itertools.combinations(sorted(program.reached(name, kept)), 2)
            together |= set(pairs)
    shown = set()
    for name in latent:
        children = sorted(graph.successors(name))
        assert len(children) > 1 and not list(graph.predecessors(name))
        shown |= set(itertools.combinations(children, 2))
    assert shown == together
    groups = [set(graph.successors(name)) for name in latent]
    assert not any(a < b for a in groups for b in groups)
    for name in kept | allowed:
        data = graph.nodes[name]
        assert data["kind"] == "micro" and data["plates"] == ()
        assert data["intervened"] == (name in allowed)
        assert data["deterministic"] == (not program.random[name])
        assert not data["observed"]


@pytest.mark.parametrize("seed", range(40))
def test_graphs_of_random_programs(seed):
    check_graph(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 400))
def test_graphs_of_more_random_programs(seed):
    check_graph(seed)


def latent_of(graph):
    return [n for n, kind in graph.nodes(data="kind") if kind == "latent"]


def test_a_latent_common_cause():
    """Appendix C: one exogenous variable, drawn once."""
    graph = pm.consolidate(shared, ["C", "D"]).graph
    assert set(graph.edges) == {("R", "C"), ("R", "D")}
    assert graph.nodes["R"]["kind"] == "latent"
    graph = pm.consolidate(shared, ["C", "D"], ["B"]).graph
    assert set(graph.edges) == {("R", "C"), ("R", "D"), ("B", "C"), ("B", "D")}
    assert graph.nodes["B"]["intervened"] and not graph.nodes["C"]["intervened"]
    graph = pm.consolidate(shared_given, ["A", "C", "D"]).graph
    assert {("A", "C"), ("A", "D"), ("R", "C"), ("R", "D")} == set(graph.edges)


def test_latent_causes_take_no_names_of_sites():
    def model():
        r = pyro.sample("R", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(r, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0))
        pyro.sample("y", dist.Normal(h, 1.0))

    graph = pm.consolidate(model, ["R", "x", "y"]).graph
    (name,) = latent_of(graph)
    assert name != "R" and set(graph.successors(name)) == {"x", "y"}
    assert set(graph.successors("R")) == {"x", "y"}


def test_several_latent_causes():
    def model():
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        e = pyro.sample("e", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(h, 1.0))
        pyro.sample("y", dist.Normal(h + e, 1.0))
        pyro.sample("z", dist.Normal(e, 1.0))

    graph = pm.consolidate(model, ["x", "y", "z"]).graph
    groups = {frozenset(graph.successors(n)) for n in latent_of(graph)}
    assert groups == {frozenset("xy"), frozenset("yz")}
    assert len(graph.edges) == 4


def test_no_latent_cause_without_chance():
    """What is computed from a site that is kept is no cause of its own."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.deterministic("b", 2 * a)
        pyro.sample("x", dist.Normal(b, 1.0))
        pyro.sample("y", dist.Normal(b, 1.0))

    graph = pm.consolidate(model, ["a", "x", "y"]).graph
    assert set(graph.edges) == {("a", "x"), ("a", "y")}


def test_kept_sites_act_though_formulas_do_without_them():
    """They can be intervened on."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.deterministic("b", 2 * a)
        pyro.deterministic("c", 3 * b + a)

    fused = pm.consolidate(model, ["a", "b", "c"])
    done = poutine.do(fused, {"b": torch.tensor(0.0)})
    nodes = poutine.trace(done).get_trace().nodes
    assert nodes["c"]["value"] == nodes["a"]["value"]
    assert {("a", "b"), ("b", "c")} <= set(fused.graph.edges)


def test_interventions_act_past_one_another():
    """Figure 1: each of a row of allowed sites acts on the end, as the first does."""

    def model():
        s = pyro.sample("s1", dist.Bernoulli(0.5))
        for i in range(2, 6):
            s = pyro.sample(f"s{i}", dist.Bernoulli(0.9 * s))

    graph = pm.consolidate(model, ["s1", "s5"], ["s2", "s3", "s4"]).graph
    assert set(graph.edges) == {(f"s{i}", "s5") for i in range(1, 5)}
    intervened = {n for n, yes in graph.nodes(data="intervened") if yes}
    assert intervened == {"s2", "s3", "s4"}


def test_explicit_interventions_are_in_the_graph():
    graph = pm.consolidate(fork, ["x", "y"], [{"h": 1.0}, {"unused": 0.0}]).graph
    assert graph.nodes["h"]["intervened"]
    assert set(graph.successors("h")) == {"x", "y"}
    assert "unused" not in graph and "e" not in graph


def test_plates_and_observed_sites_in_the_graph():
    graph = pm.consolidate(plates, ["z"], ["x"]).graph
    assert set(graph.edges) == {("z", "y"), ("x", "y")}
    assert graph.nodes["y"]["observed"] and not graph.nodes["z"]["observed"]
    assert graph.nodes["y"]["plates"] == graph.nodes["x"]["plates"] == ("plate",)
    assert graph.nodes["z"]["plates"] == ()


def test_graph_of_a_program_that_is_not_taken_apart():
    graph = pm.consolidate(branching, ["c"]).graph
    assert set(graph) == {"a", "b", "c"}
    assert ("b", "c") in graph.edges


def test_the_graph_is_a_copy():
    fused = pm.consolidate(row, ["a", "c"])
    fused.graph.remove_node("a")
    assert set(fused.graph) == {"a", "c"}


# Pictures


def chain(count):
    def model():
        s = pyro.sample("s0", dist.Normal(0.0, 1.0))
        for i in range(1, count + 1):
            s = pyro.sample(f"s{i}", dist.Normal(0.9 * s, 1.0))

    return model


def squad():
    order = pyro.sample("captain", dist.Bernoulli(0.5))
    shots = [pyro.deterministic(f"rifle{i}", order) for i in range(1, 9)]
    pyro.deterministic("dies", torch.stack(shots).amax(0))


RIFLES = [f"rifle{i}" for i in range(1, 9)]
PICTURES = {
    "row": (row, ["a", "c"], ["b"], {"a", "b", "c"}, {"a", "b", "c"}),
    "fork": (
        fork,
        ["x", "y"],
        ["h"],
        {"h", "x", "e", "y", "unused"},
        {"h", "x", "y", "R"},
    ),
    "plates": (plates, ["z"], ["x"], {"z", "x", "y"}, {"z", "x", "y"}),
    "long": (
        chain(50),
        ["s0", "s50"],
        [],
        {"s0", "s1 ... s49", "s50"},
        {"s0", "s50"},
    ),
    "long, some allowed": (
        chain(50),
        ["s50"],
        ["s12", "s24"],
        {"s0", "s1 ... s11", "s12", "s13 ... s23", "s24", "s25 ... s49", "s50"},
        {"s12", "s24", "s50"},
    ),
    "long, all allowed": (
        chain(50),
        ["s0", "s50"],
        [f"s{i}" for i in range(1, 50)],
        {"s0", "s1 ... s49", "s50"},
        {"s0", "s1 ... s49", "s50"},
    ),
    "squad": (
        squad,
        ["captain", "dies"],
        RIFLES,
        {"captain", "dies", *RIFLES},
        {"captain", "dies", "rifle1 ... rifle8"},
    ),
}


def words(axes):
    return {text.get_text() for text in axes.texts}


@pytest.mark.parametrize("case", PICTURES)
def test_pictures(case, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    model, keep, allow, before, after = PICTURES[case]
    fused = pm.consolidate(model, keep, allow)
    open_figures = pyplot.get_fignums()
    figure = fused.plot()
    assert pyplot.get_fignums() == open_figures
    first, second = figure.axes
    cost = fused.cost
    assert first.get_title() == f"before: {cost.before.equations} equations"
    count = cost.after.equations
    assert second.get_title() == f"after: {count} equation{'s' * (count != 1)}"
    plate_names = {"plate"} if case == "plates" else set()
    assert words(first) - plate_names == before
    assert words(second) - plate_names == after
    path = tmp_path / "picture.png"
    figure.savefig(path)
    assert path.stat().st_size > 5000


def test_axes_of_the_user():
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure, axes = pyplot.subplots(1, 2)
    assert pm.consolidate(row, ["a", "c"]).plot(axes) is figure
    assert words(axes[0]) == {"a", "b", "c"} and words(axes[1]) == {"a", "c"}
    pyplot.close(figure)


def test_the_fused_graph_can_be_rendered():
    graph = pm.consolidate(fork, ["x", "y"], ["h"]).graph
    source = pm.render(graph, "mermaid")
    assert source.count("-->") + source.count("-.->") == len(graph.edges)
