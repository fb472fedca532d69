# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Section 4.1: chains, stacks and forks, and the composition of mechanisms."""

import itertools
import math

import networkx as nx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm
from pyro_macro.consolidation.compose import (
    Affine,
    Point,
    Table,
    compose,
    product,
    suffixes,
)

# Mechanisms as numbers, with plain numpy next to them

LINKS = [1, 2, 3, 4, 5, 7, 8, 13]


def affine(rng, *shape, size=2):
    """Random mechanisms of vectors; the noise has any covariance."""
    root = torch.tensor(rng.normal(size=(*shape, size, size)))
    return Affine(
        torch.tensor(rng.normal(size=(*shape, size, size))) / 2,
        torch.tensor(rng.normal(size=(*shape, size))),
        root @ root.mT,
    )


def table(rng, *shape, size=3):
    return Table(torch.tensor(rng.dirichlet(np.ones(size), size=(*shape, size))))


def parts(mechanism):
    return list(vars(mechanism).values())


def same(one, other):
    assert type(one) is type(other)
    for a, b in zip(parts(one), parts(other), strict=True):
        assert a.shape == b.shape
        assert torch.allclose(a, b, 1e-10, 1e-10)


def member(stack, i):
    return type(stack)(*(p[i] for p in parts(stack)))


@pytest.mark.parametrize("made", [affine, table])
@pytest.mark.parametrize("seed", range(3))
def test_composition_is_associative(made, seed):
    rng = np.random.default_rng(seed)
    a, b, c = (made(rng) for _ in range(3))
    same(compose(compose(c, b), a), compose(c, compose(b, a)))
    # Nor does it matter how many there are side by side
    a, b, c = (made(rng, 4) for _ in range(3))
    whole = compose(c, compose(b, a))
    for i in range(4):
        same(
            member(whole, i), compose(member(c, i), compose(member(b, i), member(a, i)))
        )


def test_composition_does_not_commute():
    rng = np.random.default_rng(0)
    a, b = affine(rng), affine(rng)
    assert not torch.allclose(compose(a, b).matrix, compose(b, a).matrix)


@pytest.mark.parametrize("seed", range(3))
def test_affine_mechanisms_one_after_another(seed):
    rng = np.random.default_rng(seed)
    first, second = affine(rng, size=3), affine(rng, size=3)
    both = compose(second, first)
    (a, b, q), (c, d, s) = ([p.numpy() for p in parts(m)] for m in (first, second))
    x = rng.normal(size=3)
    mean = c @ (a @ x + b) + d
    assert np.allclose(both.matrix.numpy() @ x + both.offset.numpy(), mean)
    # What noise adds: the covariance of c e + f
    wide = np.hstack([c, np.eye(3)])
    noise = np.block([[q, np.zeros((3, 3))], [np.zeros((3, 3)), s]])
    assert np.allclose(both.covariance.numpy(), wide @ noise @ wide.T)


def test_mechanisms_between_spaces_of_other_sizes():
    one = Affine(torch.ones(2, 4), torch.zeros(2), torch.eye(2))
    other = Affine(torch.ones(3, 2), torch.ones(3), torch.zeros(3, 3))
    both = compose(other, one)
    assert torch.equal(both.matrix, torch.full((3, 4), 2.0))
    assert torch.equal(both.covariance, torch.full((3, 3), 2.0))
    assert torch.equal(both.offset, torch.ones(3))


@pytest.mark.parametrize("seed", range(3))
def test_tables_one_after_another(seed):
    rng = np.random.default_rng(seed)
    first, second = table(rng), table(rng)
    both = compose(second, first).probs
    for i, k in itertools.product(range(3), repeat=2):
        paths = sum(
            float(first.probs[i, j]) * float(second.probs[j, k]) for j in range(3)
        )
        assert float(both[i, k]) == pytest.approx(paths, abs=1e-12)
    assert torch.allclose(both.sum(-1), torch.ones(3))


def test_a_point_forgets_what_was_before():
    rng = np.random.default_rng(0)
    point = Point(torch.tensor([1.0, -2.0]))
    for before in (affine(rng), point, compose(affine(rng), point)):
        assert compose(point, before) is point
    state = Point(torch.tensor(2))
    assert compose(state, table(rng)) is state
    assert compose(state, Point(torch.tensor(0))) is state
    # And with it whatever comes after
    after = affine(rng)
    same(
        compose(after, compose(point, affine(rng))),
        compose(after, compose(point, affine(rng))),
    )


@pytest.mark.parametrize("seed", range(3))
def test_what_comes_after_a_point(seed):
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.normal(size=2))
    after, later = affine(rng), affine(rng)
    found = compose(after, Point(x))
    assert found.matrix.shape == (2, 0)  # there is no input any more
    assert torch.allclose(found.offset, after.matrix @ x + after.offset)
    assert torch.equal(found.covariance, after.covariance)
    same(compose(later, found), compose(compose(later, after), Point(x)))
    one, other = table(rng), table(rng)
    for state in range(3):
        point = Point(torch.tensor(state))
        found = compose(one, point)
        assert torch.equal(found.probs, one.probs[state : state + 1])
        same(compose(other, found), compose(compose(other, one), point))


def test_points_side_by_side():
    rng = np.random.default_rng(0)
    one = table(rng)
    states = torch.tensor([2, 0, 1, 1])
    found = compose(one, Point(states)).probs
    assert torch.equal(found, one.probs[states].unsqueeze(-2))


@pytest.mark.parametrize("made", [affine, table])
@pytest.mark.parametrize("count", LINKS)
def test_suffixes_are_those_of_a_loop(made, count):
    links = made(np.random.default_rng(count), count)
    found = suffixes(links)
    after = member(links, count - 1)
    same(member(found, count - 1), after)
    for i in reversed(range(count - 1)):
        after = compose(after, member(links, i))
        same(member(found, i), after)


@pytest.mark.parametrize("made", [affine, table])
@pytest.mark.parametrize("count", LINKS)
def test_a_product_is_that_of_a_loop(made, count):
    links = made(np.random.default_rng(count), count)
    whole = member(links, 0)
    for i in range(1, count):
        whole = compose(member(links, i), whole)
    same(product(links), whole)
    same(member(suffixes(links), 0), whole)


def test_kinds_that_do_not_compose():
    rng = np.random.default_rng(0)
    for after, before in ((affine(rng), table(rng)), (table(rng), affine(rng))):
        with pytest.raises(NotImplementedError, match="no such composition"):
            compose(after, before)
    with pytest.raises(NotImplementedError, match="Register"):
        compose("one", "other")


# Programs

STATES = (0.0, 1.0)


def under(program, do):
    data = {name: torch.as_tensor(value) for name, value in do.items()}
    return poutine.do(program, data) if do else program


def density(program, do, point):
    data = {name: torch.as_tensor(value) for name, value in point.items()}
    program = poutine.condition(under(program, do), data=data)
    return float(poutine.trace(program).get_trace().log_prob_sum())


def gaussian(point, mean, cov):
    off = np.asarray(point) - mean
    log = -0.5 * off @ np.linalg.solve(cov, off)
    return log - 0.5 * math.log(np.linalg.det(2 * np.pi * np.asarray(cov)))


def linear(names, weights, offsets, sds, do):
    """Mean and covariance of ``x = W x + b + noise`` under an intervention."""
    w, b, s = (np.array(part, dtype=float) for part in (weights, offsets, sds))
    for i, name in enumerate(names):
        if name in do:
            w[i], b[i], s[i] = 0, do[name], 0
    inverse = np.linalg.inv(np.eye(len(names)) - w)
    return inverse @ b, inverse @ np.diag(s**2) @ inverse.T


def in_pyro(names, weights, offsets, sds):
    def model():
        x = {}
        for i, name in enumerate(names):
            mean = offsets[i] + sum(
                (weights[i][j] * x[names[j]] for j in range(i) if weights[i][j]),
                torch.tensor(0.0),
            )
            x[name] = pyro.sample(name, dist.Normal(mean, sds[i]))

    return model


def subsets(names):
    for size in range(len(names) + 1):
        yield from itertools.combinations(names, size)


POINTS = [(0.0, 0.0), (1.0, -0.5), (-2.0, 3.0)]


def check_gaussian(names, weights, offsets, sds, keep):
    """Every subset of what is not kept, set to some values."""
    model = in_pyro(names, weights, offsets, sds)
    gone = [n for n in names if n not in keep]
    fused = pm.consolidate(model, keep, allow=gone)
    assert set(fused.sites) == set(keep)
    place = [names.index(n) for n in keep]
    for some in subsets(gone):
        do = {name: 0.5 + names.index(name) for name in some}
        mean, cov = linear(names, weights, offsets, sds, do)
        mean, cov = mean[place], cov[np.ix_(place, place)]
        for point in POINTS:
            point = point[: len(keep)]
            found = density(fused, do, dict(zip(keep, point, strict=True)))
            assert found == pytest.approx(gaussian(point, mean, cov), abs=1e-8), do


@pytest.mark.parametrize("keep", [["e"], ["a", "e"], ["c", "e"]], ids=str)
def test_a_gaussian_chain(keep):
    weights = np.diag([0.8, -1.5, 0.5, 2.0], -1)
    check_gaussian(
        list("abcde"), weights, [1, 0, -1, 2, 0.5], [1, 0.5, 2, 1, 0.3], keep
    )


@pytest.mark.parametrize("keep", [["y"], ["x", "y"]], ids=str)
def test_gaussian_paths_side_by_side(keep):
    """Each path is blocked by an intervention on it, and by no other."""
    weights = np.zeros((5, 5))
    weights[1:4, 0] = 1.0, 0.5, -2.0
    weights[4, 1:4] = 0.7, 1.1, 0.4
    check_gaussian(list("xklmy"), weights, [0, 1, 0, 0, 2], [1, 1, 2, 0.5, 1], keep)


@pytest.mark.parametrize("keep", [["a", "b"], ["b"]], ids=str)
def test_a_gaussian_fork(keep):
    weights = np.zeros((4, 4))
    weights[1, 0], weights[2, 1], weights[3, 1] = 0.9, 2.0, -1.0
    check_gaussian(list("rcab"), weights, [0, 1, 0, 0], [1, 0.5, 0.5, 1], keep)


@pytest.mark.parametrize("keep", [["z"], ["x", "z"]], ids=str)
def test_a_gaussian_collider(keep):
    weights = np.zeros((5, 5))
    weights[2, 0], weights[3, 1], weights[4, 2:4] = 1.0, -1.0, (0.5, 2.0)
    check_gaussian(list("xwuvz"), weights, [1, 2, 0, 0, 0], [1, 1, 0.1, 0.2, 1], keep)


def test_only_an_intervention_on_every_path_cuts_the_effect():
    """do(k) alone leaves x acting on y; do(k, l, m) does not."""
    weights = np.zeros((5, 5))
    weights[1:4, 0] = 1.0
    weights[4, 1:4] = 0.7, 1.1, 0.4
    names = list("xklmy")
    fused = pm.consolidate(
        in_pyro(names, weights, [0.0] * 5, [1.0] * 5), ["x", "y"], allow=["k", "l", "m"]
    )
    for some in subsets(["k", "l", "m"]):
        do = dict.fromkeys(some, 0.0)
        means = []
        for x in STATES:
            program = poutine.condition(under(fused, do), data={"x": torch.tensor(x)})
            means.append(
                float(poutine.trace(program).get_trace().nodes["y"]["fn"].mean)
            )
        left = {"k": 0.7, "l": 1.1, "m": 0.4}
        expected = sum(w for name, w in left.items() if name not in some)
        assert means[1] - means[0] == pytest.approx(expected, abs=1e-8)


# Finite programs, by listing their states


def random_tables(shape, seed):
    """Sites by name with their parents and the probability of 1 given these."""
    rng = np.random.default_rng(seed)
    return {
        name: (parents, rng.uniform(0.05, 0.95, size=(2,) * len(parents)))
        for name, parents in shape.items()
    }


def finite_model(tables):
    def model():
        x = {}
        for name, (parents, probs) in tables.items():
            p = torch.tensor(probs)
            for parent in parents:
                p = p[x[parent].long()]
            x[name] = pyro.sample(name, dist.Bernoulli(p))

    return model


def listed(tables, keep, do):
    """The joint law of some sites, by going through all states."""
    found = dict.fromkeys(itertools.product(STATES, repeat=len(keep)), 0.0)
    names = list(tables)
    for states in itertools.product(STATES, repeat=len(names)):
        x = dict(zip(names, states, strict=True))
        weight = 1.0
        for name, (parents, probs) in tables.items():
            p = float(probs[tuple(int(x[q]) for q in parents)])
            if name in do:
                weight *= float(x[name] == do[name])
            else:
                weight *= p if x[name] else 1 - p
        found[tuple(x[n] for n in keep)] += weight
    return found


SHAPES = {
    "chain": ({"a": (), "b": "a", "c": "b", "d": "c"}, [["d"], ["a", "d"], ["b", "d"]]),
    "paths": (
        {"x": (), "k": "x", "l": "x", "m": "x", "y": "klm"},
        [["y"], ["x", "y"]],
    ),
    "fork": ({"r": (), "c": "r", "a": "c", "b": "c"}, [["a", "b"], ["r", "b"]]),
    "collider": ({"x": (), "w": (), "u": "x", "v": "w", "z": "uv"}, [["x", "z"]]),
}
CASES = [(name, keep) for name, (_, keeps) in SHAPES.items() for keep in keeps]


@pytest.mark.parametrize(("shape", "keep"), CASES, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_finite_ones(shape, keep, seed):
    tables = random_tables(SHAPES[shape][0], seed)
    gone = [n for n in tables if n not in keep]
    fused = pm.consolidate(finite_model(tables), keep, allow=gone)
    assert set(fused.sites) == set(keep)
    for some in subsets(gone):
        for states in itertools.product(STATES, repeat=len(some)):
            do = dict(zip(some, states, strict=True))
            for point, p in listed(tables, keep, do).items():
                found = density(fused, do, dict(zip(keep, point, strict=True)))
                assert math.exp(found) == pytest.approx(p, abs=1e-8), (do, point)


@pytest.mark.parametrize("length", [4, 30])
def test_states_along_a_chain(length):
    """The last intervention wins: a row of a power of tables."""
    rng = np.random.default_rng(length)
    tables = rng.dirichlet(np.ones(3), size=(length, 3))
    start = rng.dirichlet(np.ones(3))

    def model():
        x = pyro.sample("x0", dist.Categorical(torch.tensor(start)))
        for t in range(length):
            probs = torch.tensor(tables[t])[x]
            x = pyro.sample(f"x{t + 1}", dist.Categorical(probs))

    end = f"x{length}"
    allow = [f"x{t}" for t in range(length)]
    fused = pm.consolidate(model, keep=[end], allow=allow)
    pairs = list(itertools.combinations(range(length), 2))
    for j, k in [pairs[i] for i in rng.permutation(len(pairs))[:10]]:
        for state in range(3):
            do = {f"x{j}": torch.tensor((state + 1) % 3), f"x{k}": torch.tensor(state)}
            law = np.eye(3)[state]
            for t in range(k, length):
                law = law @ tables[t]
            found = [math.exp(density(fused, do, {end: s})) for s in range(3)]
            assert found == pytest.approx(law, abs=1e-8)
    law = start
    for t in range(length):
        law = law @ tables[t]
    found = [math.exp(density(fused, {}, {end: s})) for s in range(3)]
    assert found == pytest.approx(law, abs=1e-8)


# What is said of them


def test_graphs_keep_what_acts_on_what():
    """Whether or not an intervention in between is allowed."""
    for shape, keep in CASES:
        tables = random_tables(SHAPES[shape][0], 0)
        original = nx.DiGraph([(p, n) for n, (ps, _) in tables.items() for p in ps])
        gone = [n for n in tables if n not in keep]
        for allow in subsets(gone):
            graph = pm.consolidate(finite_model(tables), keep, allow=allow).graph
            for one, other in itertools.permutations(keep, 2):
                between = [
                    path
                    for path in nx.all_simple_paths(original, one, other)
                    if not set(path[1:-1]) & set(keep)
                ]
                assert graph.has_edge(one, other) == bool(between), (allow, one, other)
            for lever in allow:
                reached = nx.descendants(original, lever) & set(keep)
                found = nx.descendants(graph, lever) if lever in graph else set()
                assert reached == found & set(keep), (allow, lever)
