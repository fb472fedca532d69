# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix B: what composition makes simpler, and what it does not."""

import functools
import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm


def under(program, do):
    data = {name: torch.as_tensor(value) for name, value in do.items()}
    return poutine.do(program, data) if do else program


def value(program, name, do=None, *args):
    trace = poutine.trace(under(program, do or {})).get_trace(*args)
    return trace.nodes[name]["value"]


# B.1, chained inverses


def scaled(x):
    x = pyro.deterministic("X", x)
    a = pyro.deterministic("A", 2 * x + 1)
    pyro.deterministic("B", (a - 1) / 2)


def exponential(x):
    x = pyro.deterministic("X", x)
    a = pyro.deterministic("A", torch.exp(x))
    pyro.deterministic("B", torch.log(a))


INVERSES = {"scaled": (scaled, lambda a: (a - 1) / 2), "exp": (exponential, math.log)}


@pytest.mark.parametrize("name", INVERSES)
@pytest.mark.parametrize("allow", [(), ("A",)])
def test_a_function_and_its_inverse_are_the_identity(name, allow):
    model, inverse = INVERSES[name]
    fused = pm.consolidate(
        model, keep=["X", "B"], allow=allow, model_args=(torch.tensor(3.0),)
    )
    assert fused.sites == ("X", "B")
    x, b = fused.equations()
    assert x == "X := x"
    assert b == "B := X" or (allow and b.endswith("else X"))
    # Under an intervention what is left is its own conditional branch
    assert ("do(A)" in b) == bool(allow)
    assert fused.cost.after.operations < fused.cost.before.operations
    assert fused.cost.after.numbers == 0
    for x in (-1.5, 0.0, 4.0):
        assert float(value(fused, "B", {}, torch.tensor(x))) == pytest.approx(x)
        for a in (0.5, 3.0):
            if allow:
                found = value(fused, "B", {"A": a}, torch.tensor(x))
                assert float(found) == pytest.approx(inverse(a))


@pytest.mark.parametrize("length", [3, 6])
def test_a_long_chain_of_inverses(length):
    def model(x):
        s = pyro.deterministic("s0", x)
        for i in range(1, length + 1):
            s = pyro.deterministic(f"s{i}", 4 * s - 3)
        for i in range(length + 1, 2 * length + 1):
            s = pyro.deterministic(f"s{i}", (s + 3) / 4)

    last = f"s{2 * length}"
    fused = pm.consolidate(model, ["s0", last], model_args=(torch.tensor(2.0),))
    assert fused.equations() == ["s0 := x", f"{last} := s0"]
    assert fused.cost.before.equations == 2 * length + 1
    assert fused.cost.after.equations == 2


@pytest.mark.parametrize("allow", [(), ("A",)])
def test_a_random_site_and_its_copy(allow):
    def model():
        x = pyro.sample("X", dist.Normal(1.0, 2.0))
        a = pyro.deterministic("A", 2 * x + 1)
        pyro.deterministic("B", (a - 1) / 2)

    both = pm.consolidate(model, keep=["X", "B"], allow=allow)
    nodes = poutine.trace(both).get_trace().nodes
    assert torch.equal(nodes["X"]["value"], nodes["B"]["value"])
    alone = pm.consolidate(model, keep=["B"], allow=allow)
    given = poutine.condition(alone, data={"B": torch.tensor(0.3)})
    found = float(poutine.trace(given).get_trace().log_prob_sum())
    expected = -0.5 * ((0.3 - 1) / 2) ** 2 - 0.5 * math.log(2 * math.pi * 4)
    assert found == pytest.approx(expected, abs=1e-8)
    if allow:
        assert float(value(alone, "B", {"A": 4.0})) == 1.5
        assert float(value(both, "B", {"A": 4.0})) == 1.5


@pytest.mark.parametrize("keep", [["X", "B"], ["B"]], ids=str)
@pytest.mark.parametrize("allow", [(), ("A",)])
def test_a_permutation_and_its_inverse(keep, allow):
    forth = [2, 0, 3, 1]
    back = [forth.index(i) for i in range(4)]
    law = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def model():
        x = pyro.sample("X", dist.Categorical(law))
        a = pyro.deterministic("A", torch.tensor(forth)[x])
        pyro.deterministic("B", torch.tensor(back)[a])

    fused = pm.consolidate(model, keep=keep, allow=allow)
    if "X" in keep:
        for x in range(4):
            program = poutine.condition(fused, data={"X": torch.tensor(x)})
            assert int(value(program, "B")) == x
        assert fused.equations()[1].endswith("X")
    else:
        (line,) = fused.equations()
        assert line.endswith("one of {0: 0.1, 1: 0.2, 2: 0.3, 3: 0.4}")
        for x in range(4):
            site = poutine.trace(fused).get_trace().nodes["B"]
            found = float(site["fn"].log_prob(torch.tensor(x)).exp())
            assert found == pytest.approx(float(law[x]), abs=1e-8)
    if allow:
        for a in range(4):
            assert int(value(fused, "B", {"A": a})) == back[a]
    cost = fused.cost
    assert cost.after.operations < cost.before.operations
    assert cost.after.numbers < cost.before.numbers


def test_a_matrix_and_its_inverse():
    forth, back = [[2.0, 1.0], [1.0, 1.0]], [[1.0, -1.0], [-1.0, 2.0]]

    def model():
        law = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        x = pyro.sample("X", law)
        a = pyro.deterministic("A", torch.tensor(forth) @ x, event_dim=1)
        pyro.deterministic("B", torch.tensor(back) @ a, event_dim=1)

    fused = pm.consolidate(model, keep=["X", "B"], allow=["A"])
    nodes = poutine.trace(fused).get_trace().nodes
    assert torch.allclose(nodes["X"]["value"], nodes["B"]["value"])
    found = value(fused, "B", {"A": [3.0, 2.0]})
    assert found.tolist() == pytest.approx([1.0, 1.0])
    assert fused.cost.after.operations <= 2 < fused.cost.before.operations


# B.2, matrices whose product is larger than they are

A_PRINTED = [[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
B_PRINTED = [[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]]


def nonzeros(*matrices):
    return sum(int(np.count_nonzero(m)) for m in matrices)


def linear(b, a):
    """X to Y = B X to Z = A Y."""
    b, a = np.array(b), np.array(a)

    def model():
        law = dist.Normal(torch.zeros(b.shape[1]), 1.0).to_event(1)
        x = pyro.sample("X", law)
        y = pyro.deterministic("Y", torch.tensor(b) @ x, event_dim=1)
        pyro.deterministic("Z", torch.tensor(a) @ y, event_dim=1)

    return model


def said_of(fused, name):
    found = [h for names, h in fused.method.items() if name in names.split(", ")]
    assert len(found) == 1, fused.method
    return found[0]


def test_the_counterexample_as_printed():
    product = np.array(A_PRINTED) @ np.array(B_PRINTED)
    assert product.tolist() == [[0.0, 1.0, 1.0]] * 3
    assert nonzeros(A_PRINTED, B_PRINTED) == 5
    assert nonzeros(product) == 6


def test_no_smaller_product_of_these_shapes_is_worse():
    """Five ones are needed: with fewer of them no product has more."""
    cells = list(itertools.product("AB", range(6)))
    worst: dict[int, int] = {}
    for count in range(6):
        for chosen in itertools.combinations(cells, count):
            a, b = np.zeros((3, 2)), np.zeros((2, 3))
            for which, i in chosen:
                (a if which == "A" else b).flat[i] = 1
            worst[count] = max(worst.get(count, 0), nonzeros(a @ b))
    assert all(worst[count] <= count for count in range(5))
    assert worst[5] == 6


@pytest.mark.parametrize("allow", [(), ("Y",)])
def test_a_cluster_that_would_cost_more_keeps_its_factors(allow):
    fused = pm.consolidate(linear(B_PRINTED, A_PRINTED), ["X", "Z"], allow=allow)
    cost = fused.cost
    assert cost.before.operations == 5
    assert cost.after.operations == 5
    assert not cost.after.exceeds(cost.before)
    assert "kept as factors" in said_of(fused, "Z")
    assert "cost more" in said_of(fused, "Z")
    product = torch.tensor(A_PRINTED) @ torch.tensor(B_PRINTED)
    nodes = poutine.trace(fused).get_trace().nodes
    assert torch.allclose(nodes["Z"]["value"], product @ nodes["X"]["value"])
    if allow:
        found = value(fused, "Z", {"Y": [5.0, 7.0]})
        assert found.tolist() == [7.0, 7.0, 7.0]


# A product that is smaller: a column through one number, back to a row
FAVOURABLE = [
    (np.eye(3), np.array([[1.0, 2.0, 3.0]])),
    (np.ones((6, 2)), np.ones((2, 6))),
    (np.array([[1.0], [2.0], [3.0]]), np.array([[1.0, 1.0, 1.0]])),
]


@pytest.mark.parametrize("allow", [(), ("Y",)])
@pytest.mark.parametrize(("b", "a"), FAVOURABLE, ids=range(3))
def test_a_favourable_cluster_is_fused(b, a, allow):
    product = a @ b
    assert nonzeros(product) < nonzeros(a, b)
    fused = pm.consolidate(linear(b, a), ["X", "Z"], allow=allow)
    assert said_of(fused, "Z").startswith("exact")
    assert fused.cost.before.operations == nonzeros(a, b)
    assert fused.cost.after.operations <= nonzeros(product)
    assert fused.cost.after.equations == 2
    nodes = poutine.trace(fused).get_trace().nodes
    expected = torch.tensor(product) @ nodes["X"]["value"]
    assert torch.allclose(nodes["Z"]["value"], expected)
    if allow:
        y = np.arange(1.0, len(b) + 1)
        found = value(fused, "Z", {"Y": torch.tensor(y)})
        assert found.tolist() == pytest.approx((a @ y).tolist())


@pytest.mark.parametrize("seed", range(20))
def test_sparse_matrices_never_become_dearer(seed):
    rng = np.random.default_rng(seed)
    shapes = [(3, 2), (4, 3), (2, 4), (3, 2)]
    links = [(rng.random(s) < 0.4).astype(float) for s in shapes]
    worth = nonzeros(functools.reduce(lambda x, y: y @ x, links)), nonzeros(*links)

    def model():
        x = pyro.sample("x0", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        for i, link in enumerate(links):
            x = pyro.deterministic(f"x{i + 1}", torch.tensor(link) @ x, event_dim=1)

    fused = pm.consolidate(model, ["x0", "x4"], allow=["x2"])
    assert fused.cost.before.operations == worth[1]
    assert fused.cost.after.operations <= min(worth[1], max(worth[0], 1))
    nodes = poutine.trace(fused).get_trace().nodes
    expected = functools.reduce(
        lambda x, link: link @ x, links, nodes["x0"]["value"].numpy()
    )
    assert nodes["x4"]["value"].tolist() == pytest.approx(expected.tolist())
    found = value(fused, "x4", {"x2": torch.arange(4.0)})
    expected = links[3] @ (links[2] @ np.arange(4.0))
    assert found.tolist() == pytest.approx(expected.tolist())


# B.3, finite domains


def maps(seed, sizes):
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, after, size=before).tolist()
        for before, after in itertools.pairwise(sizes)
    ]


def along(functions, x):
    for f in functions:
        x = f[x]
    return x


def chain_of_maps(functions, law):
    def model():
        x = pyro.sample("x0", dist.Categorical(torch.tensor(law)))
        for i, f in enumerate(functions):
            x = pyro.deterministic(f"x{i + 1}", torch.tensor(f)[x])

    return model


SIZES = [(6, 4, 5, 3), (5, 5, 5, 5), (8, 2, 8), (4, 9, 3, 9, 4)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_tables_shrink_to_what_can_be_reached(sizes, seed):
    functions = maps(seed, sizes)
    rng = np.random.default_rng(seed)
    law = rng.dirichlet(np.ones(sizes[0]))
    end = f"x{len(functions)}"
    allow = [f"x{i}" for i in range(1, len(functions))]
    fused = pm.consolidate(chain_of_maps(functions, law), keep=[end], allow=allow)
    image = {along(functions, x) for x in range(sizes[0])}
    assert len(image) <= min(len(set(f)) for f in functions)
    expected = {
        y: sum(law[x] for x in range(sizes[0]) if along(functions, x) == y)
        for y in image
    }
    site = poutine.trace(fused).get_trace().nodes[end]
    if len(image) > 1:
        support = site["fn"].enumerate_support().tolist()
        assert sorted(support) == sorted(image)
        for y, p in expected.items():
            found = float(site["fn"].log_prob(torch.tensor(y)).exp())
            assert found == pytest.approx(p, abs=1e-8)
    else:
        assert int(site["value"]) == image.pop()
    assert fused.cost.after.numbers <= len(expected)
    assert fused.cost.before.numbers == nonzeros(*functions) + sizes[0]
    # Under interventions, from any state that can be reached
    for i in range(1, len(functions)):
        for x in {along(functions[:i], x) for x in range(sizes[0])}:
            found = int(value(fused, end, {f"x{i}": x}))
            assert found == along(functions[i:], x)


def test_reading_a_row_of_a_table_is_one_operation():
    functions = maps(0, (6, 4, 5))
    fused = pm.consolidate(chain_of_maps(functions, [1 / 6] * 6), ["x0", "x1", "x2"])
    assert fused.cost.before.operations == len(functions)
    assert fused.cost.after.operations <= len(functions)


@pytest.mark.parametrize("seed", range(3))
def test_a_table_of_what_is_kept(seed):
    """x0 is kept: the chain becomes one table with a number for each of its states."""
    functions = maps(seed, (6, 4, 5, 3))
    fused = pm.consolidate(
        chain_of_maps(functions, [1 / 6] * 6), ["x0", "x3"], allow=["x1", "x2"]
    )
    for x in range(6):
        program = poutine.condition(fused, data={"x0": torch.tensor(x)})
        assert int(value(program, "x3")) == along(functions, x)
        for y in range(5):
            found = int(value(program, "x3", {"x2": y}))
            assert found == functions[2][y]
    table = [along(functions, x) for x in range(6)]
    assert fused.cost.before.numbers == 6 + nonzeros(*functions)
    assert fused.cost.after.numbers <= 6 + len(table)
    assert fused.cost.after.numbers < fused.cost.before.numbers
    assert fused.cost.after.operations <= 1


def test_states_out_of_reach_can_be_set_if_that_was_asked():
    """f1 never comes to 3, but an explicit intervention may."""
    functions = [[0, 1, 2, 0], [5, 6, 7, 8]]
    model = chain_of_maps(functions, [0.25] * 4)
    fused = pm.consolidate(model, keep=["x2"], allow=[{"x1": 3}, {"x1": 0}])
    assert int(value(fused, "x2", {"x1": 0})) == 5
    assert int(value(fused, "x2", {"x1": 3})) == 8


@pytest.mark.parametrize("seed", range(3))
def test_noisy_tables_among_maps(seed):
    """Maps before and after a random step; all states listed."""
    rng = np.random.default_rng(seed)
    down, up = maps(seed, (6, 3)), maps(seed + 10, (4, 2))
    table = rng.dirichlet(np.ones(4), size=3)
    law = rng.dirichlet(np.ones(6))

    def model():
        a = pyro.sample("a", dist.Categorical(torch.tensor(law)))
        b = pyro.deterministic("b", torch.tensor(down[0])[a])
        c = pyro.sample("c", dist.Categorical(torch.tensor(table)[b]))
        pyro.deterministic("d", torch.tensor(up[0])[c])

    fused = pm.consolidate(model, keep=["d"], allow=["b", "c"])
    reached = set(down[0])

    def expected(weights):
        found = [0.0, 0.0]
        for b, w in enumerate(weights):
            for c in range(4):
                found[up[0][c]] += w * table[b, c]
        return found

    natural = [sum(law[a] for a in range(6) if down[0][a] == b) for b in range(3)]
    cases = [({}, expected(natural))]
    cases += [({"b": b}, expected(np.eye(3)[b])) for b in reached]
    cases += [({"c": c}, np.eye(2)[up[0][c]]) for c in range(4)]
    for do, law_of_d in cases:
        site = poutine.trace(under(fused, do)).get_trace().nodes["d"]
        for d in range(2):
            if site["infer"].get("_deterministic"):
                found = float(site["value"] == d)
            else:
                found = chance(site["fn"], d)
            assert found == pytest.approx(law_of_d[d], abs=1e-8), do


def chance(fn, state):
    if state not in fn.enumerate_support().tolist():
        return 0.0
    return float(fn.log_prob(torch.tensor(state)).exp())
