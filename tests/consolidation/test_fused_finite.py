# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs with finite sites, against a listing of all states.

The reference of the random programs is plain Python: each site has a function from the
values of its parents to its probabilities, and all states are gone through one by one.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy import stats

import pyro_macro as pm

# Random programs

STATES = 300  # joint states of the random sites of a program, at most
ROWS = 150  # joint values of the sites that are kept, at most


@dataclass(frozen=True)
class Node:
    """A site, twice.

    :ivar values: all it may have; some, if it is continuous.
    :ivar law: its probabilities, or densities, one a value, given numbers for its
        parents.
    :ivar emit: the statement of Pyro, given tensors for its parents.
    """

    name: str
    random: bool
    parents: tuple[str, ...]
    values: tuple[float, ...]
    law: Callable[..., list[float]]
    emit: Callable[..., torch.Tensor]
    finite: bool = True


class Program:
    """A random program of at most 8 finite sites, and of two that are continuous."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        self.nodes = {}
        count = int(self.rng.integers(3, 9))
        if seed % 2:  # tables depend on one, which is first
            self.nodes["p"] = self._beta("p")
        for i in range(count):
            node = None
            while node is None:
                node = self._random_node(f"x{i}")
            self.nodes[node.name] = node
            if seed % 4 == 3 and i == count // 2:  # a mixture, and what depends on it
                self.nodes["y"] = self._normal("y")

    def __call__(self):
        found = {}
        for name, node in self.nodes.items():
            found[name] = node.emit(*(found[p] for p in node.parents))

    @property
    def states(self):
        random = (n for n in self.nodes.values() if n.random and n.finite)
        return math.prod(len(n.values) for n in random)

    # By hand

    def joint(self, names, made):
        """The probabilities of joint values of some sites under an intervention.

        Those that are set count as what they would have been, as in Pyro: only what
        they act on sees the value they are set to.
        """
        found = defaultdict(float)
        nodes = list(self.nodes.values())
        while nodes[-1].name not in names:
            nodes.pop()

        def go(i, at, seen, weight):
            if i == len(nodes):
                found[tuple(seen[n] for n in names)] += weight
                return
            node = nodes[i]
            name, is_set = node.name, node.name in made
            if is_set and name not in names:
                go(i + 1, {**at, name: float(made[name])}, seen, weight)
                return
            law = node.law(*(at[p] for p in node.parents))
            for value, p in zip(node.values, law, strict=True):
                if p > 0:
                    acts = float(made[name]) if is_set else value
                    own = {**at, name: acts}, {**seen, name: value}
                    go(i + 1, *own, weight * p)

        go(0, {}, {}, 1.0)
        return found

    # Making

    def _random_node(self, name):
        rng = self.rng
        some = any(node.finite for node in self.nodes.values())
        if some and (rng.random() < 0.4 or self.states > STATES / 2):
            return self._deterministic(name)
        return self._sampled(name)

    def _beta(self, name):
        points = (0.25, 0.8)

        def emit():
            return pyro.sample(name, dist.Beta(2.0, 3.0))

        densities = [float(stats.beta.pdf(v, 2, 3)) for v in points]
        return Node(name, True, (), points, lambda: densities, emit, False)

    def _normal(self, name):
        points, parents = (-0.5, 1.3), self._choice(3)

        def emit(*v):
            return pyro.sample(name, dist.Normal(sum(number(x).double() for x in v), 1))

        def law(*v):
            return [float(stats.norm.pdf(point, sum(v))) for point in points]

        return Node(name, True, parents, points, law, emit, False)

    def _choice(self, most, fits=lambda node: node.finite):
        """Names of some sites as parents: the latest more often than others."""
        names = [n for n, node in self.nodes.items() if fits(node)]
        weights = np.arange(1.0, len(names) + 1)
        count = min(int(self.rng.integers(1, most + 1)), len(names))
        if not count:
            return ()
        picked = self.rng.choice(names, count, False, weights / weights.sum())
        return tuple(str(n) for n in picked)

    def _tables(self, parents, width):
        """A table of probabilities, some of them zero, with an axis a parent."""
        sizes = [int(max(self.nodes[p].values)) + 1 for p in parents]
        table = self.rng.dirichlet(np.ones(width), sizes)
        if self.rng.random() < 0.3:
            keep = self.rng.random(table.shape) < 0.6
            keep[..., 0] |= ~keep.any(-1)
            table = np.where(keep, table, 0.0)
            table = table / table.sum(-1, keepdims=True)
        return table

    def _sampled(self, name):
        rng = self.rng
        parents = () if rng.random() < 0.15 else self._choice(3, is_index)
        kinds = ["table", "logits", "categorical", "binomial", "where", "by"]
        if "p" in self.nodes:
            kinds += ["mixed", "sigmoid"]
        kind = str(rng.choice(kinds))
        if not parents and kind in ("where", "by", "sigmoid"):
            kind = "table"
        width = int(rng.integers(2, 5))
        if kind in ("table", "logits"):
            table = self._tables(parents, 2)
            probs = torch.tensor(table[..., 1])
            if kind == "logits":
                table = table * 0.9 + 0.05
                probs = torch.tensor(np.log(table[..., 1] / table[..., 0]))
            key = "probs" if kind == "table" else "logits"

            def emit(*v):
                return pyro.sample(name, dist.Bernoulli(**{key: probs[index(v)]}))

            return Node(
                name, True, parents, (0.0, 1.0), lambda *v: list(table[whole(v)]), emit
            )
        if kind == "categorical":
            table = self._tables(parents, width)
            probs = torch.tensor(table)

            def emit(*v):
                return pyro.sample(name, dist.Categorical(probs[index(v)]))

            values = tuple(float(i) for i in range(width))
            return Node(
                name, True, parents, values, lambda *v: list(table[whole(v)]), emit
            )
        if kind == "binomial":
            table = self._tables(parents, 2)[..., 1]
            probs, n = torch.tensor(table), width - 1

            def emit(*v):
                return pyro.sample(name, dist.Binomial(n, probs[index(v)]))

            def law(*v):
                p = table[whole(v)]
                return [
                    math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)
                ]

            values = tuple(float(k) for k in range(n + 1))
            return Node(name, True, parents, values, law, emit)
        if kind == "mixed":
            table, base = self._tables(parents, width), np.eye(width)[0]
            probs, first = torch.tensor(table), torch.tensor(base)

            def emit(p, *v):
                p = p.unsqueeze(-1)
                mixed = p * probs[index(v)] + (1 - p) * first
                return pyro.sample(name, dist.Categorical(mixed))

            def law(p, *v):
                return list(p * table[whole(v)] + (1 - p) * base)

            values = tuple(float(i) for i in range(width))
            return Node(name, True, ("p", *parents), values, law, emit)
        if kind == "sigmoid":
            parents = ("y" if "y" in self.nodes else "p", *parents)

            def emit(*v):
                total = sum(number(x).double() for x in v)
                return pyro.sample(name, dist.Bernoulli(logits=total - 1))

            def law(*v):
                p = 1 / (1 + math.exp(1 - sum(v)))
                return [1 - p, p]

            return Node(name, True, parents, (0.0, 1.0), law, emit)
        if kind == "where":
            bound, low, high = rng.integers(0, 3), *rng.random(2)

            def emit(*v):
                total = sum(number(x) for x in v)
                probs = torch.where(total > bound, high, low)
                return pyro.sample(name, dist.Bernoulli(probs.double()))

            def law(*v):
                p = high if sum(v) > bound else low
                return [1 - p, p]

            return Node(name, True, parents, (0.0, 1.0), law, emit)
        (parent,) = parents[:1]  # as it is, or a little more with each step
        most = max(self.nodes[parent].values)
        slope = 1.0 if most == 1 and rng.random() < 0.5 else 0.8 / max(most, 1)
        base = 0.0 if slope == 1.0 else 0.1

        def emit(v):
            probs = base + slope * number(v).double()
            return pyro.sample(name, dist.Bernoulli(probs))

        def law(v):
            p = base + slope * v
            return [1 - p, p]

        return Node(name, True, (parent,), (0.0, 1.0), law, emit)

    def _deterministic(self, name):
        rng = self.rng
        kinds = ["table", "floats", "and", "or", "xor", "sum", "where", "same", "flip"]
        kind = str(rng.choice([*kinds, "equal", "remainder", "largest"]))
        if kind in ("table", "floats"):
            parents = self._choice(2, is_index)
            if not parents:
                return None
            sizes = [int(max(self.nodes[p].values)) + 1 for p in parents]
            table = rng.integers(0, 3, sizes)
            if kind == "floats":
                table = np.array([-1.0, 0.5, 2.0])[table]
            tensor = torch.tensor(table)
            by_hand, run = (
                lambda *v: table[whole(v)],
                lambda *v: tensor[index(v)],
            )
        elif kind in ("and", "or", "xor"):
            parents = self._choice(3)
            python = {"and": all, "or": any, "xor": lambda v: sum(map(bool, v)) % 2}
            torched = {
                "and": torch.logical_and,
                "or": torch.logical_or,
                "xor": torch.logical_xor,
            }
            # Some stay of type bool
            cast = rng.random() < 0.5

            def by_hand(*v):
                return python[kind](v)

            def run(*v):
                first = v[0].bool()
                for other in v[1:]:
                    first = torched[kind](first, other)
                return first.double() if cast else first
        elif kind == "sum":
            parents = self._choice(3)
            shift = int(rng.integers(0, 2))
            by_hand, run = (
                lambda *v: sum(v) + shift,
                lambda *v: sum(number(x) for x in v) + shift,
            )
        elif kind == "where":
            parents = self._choice(3)
            bound, other = int(rng.integers(0, 2)), float(rng.integers(0, 3))

            def by_hand(first, *rest):
                return (rest[-1] if rest else first) if first > bound else other

            def run(first, *rest):
                last = number(rest[-1] if rest else first).double()
                return torch.where(number(first) > bound, last, other)
        elif kind == "same":
            parents = self._choice(1)
            by_hand, run = (lambda v: v), (lambda v: v)
        elif kind == "flip":
            parents = self._choice(1)
            by_hand, run = (lambda v: 1 - v), (lambda v: 1 - number(v))
        elif kind == "remainder":
            parents = self._choice(2)
            by_hand, run = (
                lambda *v: sum(v) % 2,
                lambda *v: sum(number(x) for x in v) % 2,
            )
        elif kind == "equal":
            parents = self._choice(2)
            by_hand, run = (
                lambda *v: v[0] == v[-1],
                lambda *v: number(v[0]) == number(v[-1]),
            )
        else:
            parents = self._choice(2)
            by_hand, run = (
                lambda *v: max(v),
                lambda *v: torch.maximum(number(v[0]).double(), number(v[-1]).double()),
            )
        supports = [self.nodes[p].values for p in parents]
        found = {float(by_hand(*v)) for v in itertools.product(*supports)}
        values = tuple(sorted(found))
        if len(values) > 8:
            return None

        def law(*v):
            value = float(by_hand(*v))
            return [float(value == one) for one in values]

        def emit(*v):
            return pyro.deterministic(name, run(*v))

        return Node(name, False, parents, values, law, emit)


def is_index(node):
    return node.finite and all(v >= 0 and v == int(v) for v in node.values)


def number(tensor):
    return tensor.long() if tensor.dtype == torch.bool else tensor


def index(tensors):
    return tuple(t.long() for t in tensors) if tensors else ()


def whole(values):
    return tuple(int(v) for v in values)


class Case:
    """A random program, what is kept, and what is allowed."""

    def __init__(self, seed):
        self.program = Program(seed)
        rng = self.program.rng
        nodes = self.program.nodes
        names = list(nodes)
        self.keep = [n for n in names if not nodes[n].finite]
        finite = [n for n in names if nodes[n].finite]
        for name in rng.permutation(finite)[: rng.integers(1, 4)]:
            more = [*self.keep, str(name)]
            if self._count(more) <= ROWS:
                self.keep = more
        self.keep.sort(key=names.index)
        hidden = [n for n in names if n not in self.keep]
        picked = [str(n) for n in rng.permutation(hidden)[: rng.integers(0, 4)]]
        self.free, self.explicit = [], []
        for name in picked:
            if rng.random() < 0.5:
                self.free.append(name)
            else:
                others = [n for n in rng.permutation(picked)[:1] if n != name]
                sites = [name, *map(str, others)]
                self.explicit.append({n: self._some_value(n) for n in sites})
        self.allow = [*self.free, *self.explicit]

    def _count(self, names):
        return math.prod(len(self.program.nodes[n].values) for n in names)

    def _some_value(self, name):
        return float(self.program.rng.choice(self.program.nodes[name].values))

    def interventions(self):
        """None, each that is allowed, on sites that are kept, and some pairs."""
        yield {}
        kept = [{n: self._some_value(n)} for n in self.keep]
        single = [{n: v} for n in self.free for v in self.program.nodes[n].values]
        yield from (*single, *self.explicit, *kept)
        if len(self.free) > 1:
            yield {n: self._some_value(n) for n in self.free}
        for one in (*single[-1:], *self.explicit[:1]):
            yield one | kept[0]
        if len(kept) > 1:
            yield kept[0] | kept[1]

    def rows(self, names):
        """All joint values of some sites, impossible ones among them."""
        return list(itertools.product(*(self.program.nodes[n].values for n in names)))

    def like(self, name, column):
        """Numbers as values of a site, of the dtype it has."""
        return torch.tensor(column, dtype=self.dtypes[name])

    @property
    def dtypes(self):
        trace = poutine.trace(self.program).get_trace()
        return {n: trace.nodes[n]["value"].dtype for n in self.program.nodes}


def probability(node, value):
    """What a site of a trace that is conditioned gave to a value."""
    fn = node["fn"]
    if not node["infer"].get("_deterministic"):
        return fn.log_prob(value).exp()
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return (fn.v == value).double()


def fused_table(case, fused, rows, made):
    """For each site, its probabilities in each row given those before it."""
    columns = dict(zip(fused.sites, zip(*rows, strict=True), strict=True))
    data = {n: case.like(n, column) for n, column in columns.items()}
    made = {n: case.like(n, value) for n, value in made.items()}
    model = poutine.condition(poutine.do(fused, data=made), data=data)
    with pyro.plate("rows", len(rows)):
        trace = poutine.trace(model).get_trace()
    return {
        n: probability(trace.nodes[n], data[n]).expand(len(rows)).numpy() for n in data
    }


def product(parts):
    """Zero where one is zero, whatever comes after."""
    total = np.ones_like(parts[0])
    for part in parts:
        total = np.where(total == 0, 0.0, total * part)
    return total


def close(found, expected, message="", tolerance=1e-8):
    found, expected = (torch.as_tensor(x).detach().numpy() for x in (found, expected))
    np.testing.assert_allclose(
        found, expected, rtol=tolerance, atol=tolerance, err_msg=message
    )


def assert_case(case):
    fused = pm.consolidate(case.program, keep=case.keep, allow=case.allow)
    sites = list(fused.sites)
    if all(case.program.nodes[n].random for n in case.keep):
        assert sites == case.keep
    assert set(case.keep) <= set(sites)  # at worst more has to stay
    rows = case.rows(sites)

    for made in case.interventions():
        joint = case.program.joint(sites, made)
        found = product(list(fused_table(case, fused, rows, made).values()))
        close(found, np.array([joint[row] for row in rows]), f"under {made}")


@pytest.mark.parametrize("seed", range(40))
def test_joint_of_what_is_kept(seed):
    assert_case(Case(seed))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 200))
def test_joint_of_what_is_kept_in_many_programs(seed):
    assert_case(Case(seed))


@pytest.mark.parametrize("seed", range(0, 40, 3))
def test_draws_are_of_the_dtype_they_had(seed):
    case = Case(seed)
    fused = pm.consolidate(case.program, keep=case.keep, allow=case.allow)
    for made in case.interventions():
        model = poutine.do(fused, data={n: case.like(n, v) for n, v in made.items()})
        trace = poutine.trace(model).get_trace()
        for name in {*case.keep, *made}:
            value = trace.nodes[name]["value"]
            assert value.dtype == case.dtypes[name]
            node = case.program.nodes[name]
            assert value.item() in node.values or not node.finite


# Help for what follows


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def conditioned(model, data, made=None):
    """A trace with some sites given, its log densities computed."""
    model = poutine.condition(model, data=data)
    if made:
        model = poutine.do(model, data=made)
    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    return trace


def log_density(model, data, made=None):
    return conditioned(model, data, made).log_prob_sum()


def categorical(name, probs):
    return pyro.sample(name, dist.Categorical(probs))


def bernoulli(name, probs):
    return pyro.sample(name, dist.Bernoulli(probs))


# Finite sites that are fused away, continuous ones that are kept

WEIGHTS = np.array([0.2, 0.5, 0.3])
LOCS, SCALES = np.array([-1.0, 0.5, 3.0]), np.array([0.5, 1.0, 2.0])
RATES, SHAPES = np.array([0.7, 2.0, 6.0]), np.array([1.0, 2.0, 5.0])
SCIPY = {
    "x": lambda v: stats.norm.logpdf(v, LOCS, SCALES),
    "k": lambda v: stats.poisson.logpmf(v, RATES),
    "g": lambda v: stats.gamma.logpdf(v, SHAPES, scale=1 / 1.5),
    "v": lambda v: sum(stats.norm.logpdf(one, LOCS, SCALES) for one in v),
}
PYRO = {
    "x": lambda z: dist.Normal(torch.tensor(LOCS)[z], torch.tensor(SCALES)[z]),
    "k": lambda z: dist.Poisson(torch.tensor(RATES)[z]),
    "g": lambda z: dist.Gamma(torch.tensor(SHAPES)[z], 1.5),
    "v": lambda z: (
        dist.Normal(
            torch.tensor(LOCS)[z].unsqueeze(-1), torch.tensor(SCALES)[z].unsqueeze(-1)
        )
        .expand((*z.shape, 2))
        .to_event(1)
    ),
}


def mixture(order):
    def model():
        z = categorical("z", torch.tensor(WEIGHTS))
        for name in order:
            pyro.sample(name, PYRO[name](z))

    return model


def logsumexp(values):
    top = np.max(values)
    return top + np.log(np.sum(np.exp(values - top)))


@pytest.mark.parametrize("order", itertools.permutations("xkg"))
@pytest.mark.parametrize("at", [(0.3, 2.0, 1.1), (-4.0, 9.0, 0.01), (9.0, 0.0, 7.0)])
def test_mixture_of_several_children(order, at):
    """Each one tells of the hidden site, and so changes the weights of the next."""
    fused = pm.consolidate(mixture(order), keep=order, allow=["z"])
    assert fused.sites == order
    values = dict(zip("xkg", at, strict=True))
    data = {n: torch.tensor(v) for n, v in values.items()}
    trace = conditioned(fused, data)
    logs, before = np.log(WEIGHTS), 0.0
    for name in order:
        logs = logs + SCIPY[name](values[name])
        total = logsumexp(logs)
        close(trace.nodes[name]["log_prob"], total - before)
        before = total
    for z in range(3):
        expected = sum(SCIPY[n](values[n])[z] for n in order)
        close(log_density(fused, data, {"z": torch.tensor(z)}), expected)


def test_mixture_of_vectors():
    fused = pm.consolidate(mixture("vx"), keep=["v", "x"])
    assert fused.sites == ("v", "x")
    v, x = (0.4, 2.0), 1.5
    expected = logsumexp(np.log(WEIGHTS) + SCIPY["v"](v) + SCIPY["x"](x))
    close(log_density(fused, {"v": tensor(*v), "x": torch.tensor(x)}), expected)
    with pyro.plate("many", 4):
        trace = poutine.trace(fused).get_trace()
    assert trace.nodes["v"]["value"].shape == (4, 2)
    assert trace.nodes["x"]["value"].shape == (4,)


def test_mixture_at_many_values_at_once():
    fused = pm.consolidate(mixture("xkg"), keep=["x", "k", "g"])
    x, k, g = torch.linspace(-3, 5, 6), torch.arange(6.0), torch.linspace(0.1, 4, 6)
    with pyro.plate("many", 6):
        trace = conditioned(fused, {"x": x, "k": k, "g": g})
    found = sum(trace.nodes[n]["log_prob"] for n in "xkg")
    expected = [
        logsumexp(
            np.log(WEIGHTS) + sum(SCIPY[n](v) for n, v in zip("xkg", row, strict=True))
        )
        for row in zip(x.tolist(), k.tolist(), g.tolist(), strict=True)
    ]
    close(found, expected)


def test_draws_of_a_mixture():
    fused = pm.consolidate(mixture("xkg"), keep=["x", "k", "g"])
    n = 40_000
    with pyro.plate("many", n):
        nodes = poutine.trace(fused).get_trace().nodes
    x, k, g = (nodes[name]["value"].numpy() for name in "xkg")
    for found, expected in [
        (x, (WEIGHTS * LOCS).sum()),
        (x * k, (WEIGHTS * LOCS * RATES).sum()),
        (k * g, (WEIGHTS * RATES * SHAPES / 1.5).sum()),
    ]:
        assert abs(found.mean() - expected) < 4.5 * found.std() / math.sqrt(n)


def test_evidence_that_turns_around():
    """What is unlikely by exp(-5,000) after one site is likely after the next."""

    def model():
        z = bernoulli("z", torch.tensor(0.5))
        pyro.sample("x", dist.Normal(100.0 * z, 1.0))
        pyro.sample("y", dist.Normal(200.0 * z, 1.0))

    fused = pm.consolidate(model, keep=["x", "y"])
    for x, y in [(0.0, 200.0), (100.0, 0.0), (0.0, 150.0), (1e4, -1e4)]:
        each = [
            math.log(0.5)
            + stats.norm.logpdf(x, 100 * z)
            + stats.norm.logpdf(y, 200 * z)
            for z in (0, 1)
        ]
        found = log_density(fused, {"x": torch.tensor(x), "y": torch.tensor(y)})
        close(found, logsumexp(np.array(each)))


W_GIVEN = np.array([[0.7, 0.1, 0.2], [0.0, 0.5, 0.5], [0.3, 0.3, 0.4]])
Z_GIVEN = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])


def between():
    """A kept site between two that are not, and a kept one that sees both."""
    a = categorical("a", torch.tensor(WEIGHTS))
    w = categorical("w", torch.tensor(W_GIVEN)[a])
    d = pyro.deterministic("d", (a + w) % 3)
    b = categorical("b", torch.tensor(Z_GIVEN)[d])
    pyro.sample("y", dist.Normal(torch.tensor(LOCS)[a] + 2 * b, 0.7))


def by_listing(w, y, made):
    total = 0.0
    for a, b in itertools.product(range(3), range(2)):
        p = float(made["a"] == a) if "a" in made else WEIGHTS[a]
        d = made.get("d", (a + made.get("w", w)) % 3)
        p *= W_GIVEN[a, w]  # if it is set: what it would have been
        p *= float(made["b"] == b) if "b" in made else Z_GIVEN[d, b]
        total += p * stats.norm.pdf(y, LOCS[a] + 2 * b, 0.7)
    return total


@pytest.mark.parametrize(
    "made",
    [{}, {"a": 2}, {"d": 1}, {"b": 0}, {"a": 0, "b": 1}, {"d": 0, "a": 1}, {"w": 2}],
)
def test_mixture_behind_a_kept_finite_site(made):
    fused = pm.consolidate(between, keep=["w", "y"], allow=["a", "d", "b"])
    assert fused.sites == ("w", "y")
    set_to = {n: torch.tensor(v) for n, v in made.items()}
    for w, y in itertools.product(range(3), (-2.0, 0.1, 3.5)):
        data = {"w": torch.tensor(w), "y": torch.tensor(y)}
        trace = conditioned(fused, data, set_to)
        found = trace.nodes["y"]["log_prob"] + trace.nodes["w"]["log_prob"]
        close(found.exp(), by_listing(w, y, made))


# Tables that depend on what is kept, and on parameters

ROWS_C = tensor(0.1, 0.2, 0.7, 0.5, 0.3, 0.2).reshape(2, 3)


def beta_table():
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    z = bernoulli("z", p)
    c = categorical("c", ROWS_C[z.long()])
    pyro.sample("x", dist.Normal(p * c + z, 1.0))


def log_beta_table(p, c, x):
    """Of ``c`` and ``x`` given ``p``."""
    each = [
        (p if z else 1 - p).log()
        + ROWS_C[z, c].log()
        + dist.Normal(p * c + z, 1.0).log_prob(x)
        for z in range(2)
    ]
    return torch.logsumexp(torch.stack(each), 0)


@pytest.mark.parametrize("c", range(3))
@pytest.mark.parametrize("at", [0.05, 0.6])
def test_table_of_a_kept_latent(c, at):
    fused = pm.consolidate(beta_table, keep=["p", "c", "x"], allow=["z"])
    assert fused.sites == ("p", "c", "x")
    x = torch.tensor(0.4)
    mine, theirs = (torch.tensor(at, requires_grad=True) for _ in range(2))
    data = {"p": mine, "c": torch.tensor(c), "x": x}
    trace = conditioned(fused, data)
    found = trace.nodes["c"]["log_prob"] + trace.nodes["x"]["log_prob"]
    expected = log_beta_table(theirs, c, x)
    close(found, expected)
    (slope,) = torch.autograd.grad(found, mine)
    close(slope, torch.autograd.grad(expected, theirs)[0])
    close(trace.nodes["p"]["log_prob"], stats.beta.logpdf(at, 2, 3))
    # Nothing of z is left when it is set
    trace = conditioned(fused, data, {"z": torch.tensor(1.0)})
    close(trace.nodes["c"]["log_prob"], ROWS_C[1, c].log())
    close(trace.nodes["x"]["log_prob"], dist.Normal(at * c + 1, 1.0).log_prob(x))


def test_table_of_a_kept_latent_at_many_values():
    fused = pm.consolidate(beta_table, keep=["p", "c", "x"])
    p, x = torch.linspace(0.1, 0.9, 5), torch.linspace(-1, 2, 5)
    c = torch.tensor([0, 2, 1, 1, 0])
    with pyro.plate("many", 5):
        trace = conditioned(fused, {"p": p, "c": c, "x": x})
    found = trace.nodes["c"]["log_prob"] + trace.nodes["x"]["log_prob"]
    expected = [log_beta_table(*row) for row in zip(p, c, x, strict=True)]
    close(found, torch.stack(expected))


def param_table():
    weights = pyro.param(
        "weights", tensor(0.2, 0.3, 0.5), constraint=dist.constraints.simplex
    )
    table = pyro.param("table", tensor(0.5, -1.0, 0.3, 0.1, 0.0, 2.0).reshape(3, 2))
    loc = pyro.param("loc", tensor(-1.0, 1.0))
    a = categorical("a", weights)
    b = pyro.sample("b", dist.Categorical(logits=table[a]))
    d = pyro.deterministic("d", a * b)
    c = bernoulli("c", torch.sigmoid(loc[b] + d))
    pyro.sample("y", dist.Normal(loc[b] * (1 + c), 0.8))


def log_param_table(weights, table, loc, c, y):
    each = []
    for a, b in itertools.product(range(3), range(2)):
        p = torch.sigmoid(loc[b] + a * b)
        each.append(
            weights[a].log()
            + torch.log_softmax(table[a], 0)[b]
            + (p if c else 1 - p).log()
            + dist.Normal(loc[b] * (1 + c), 0.8).log_prob(torch.tensor(y))
        )
    return torch.logsumexp(torch.stack(each), 0)


@pytest.mark.parametrize("c, y", [(0, -0.5), (1, 2.0)])
def test_gradients_of_parameters(c, y):
    fused = pm.consolidate(param_table, keep=["c", "y"])
    assert fused.sites == ("c", "y")
    found = log_density(fused, {"c": torch.tensor(float(c)), "y": torch.tensor(y)})
    store = pyro.get_param_store()
    names = ["weights", "table", "loc"]
    mine = [pyro.param(n).unconstrained() for n in names]
    theirs = [t.detach().clone().requires_grad_() for t in mine]
    simplex = store._constraints["weights"]
    weights = torch.distributions.transform_to(simplex)(theirs[0])
    expected = log_param_table(weights, theirs[1], theirs[2], c, y)
    close(found, expected)
    slopes = torch.autograd.grad(found, mine)
    for one, other in zip(slopes, torch.autograd.grad(expected, theirs), strict=True):
        close(one, other)


def test_parameters_of_other_values_than_it_was_prepared_with():
    fused = pm.consolidate(param_table, keep=["c", "y"])
    pyro.clear_param_store()
    loc, table = tensor(2.0, 0.1), torch.zeros(3, 2)
    pyro.param("loc", loc)
    pyro.param("table", table)
    found = log_density(fused, {"c": torch.tensor(1.0), "y": torch.tensor(0.5)})
    close(found, log_param_table(tensor(0.2, 0.3, 0.5), table, loc, 1, 0.5))


def test_gradient_of_what_is_captured():
    logits = torch.nn.Parameter(tensor(0.3, -0.4))

    def model():
        a = pyro.sample("a", dist.Bernoulli(logits=logits[0]))
        bernoulli("c", torch.sigmoid(logits[1] + 2 * a))

    fused = pm.consolidate(model, keep=["c"])
    found = log_density(fused, {"c": torch.tensor(1.0)})
    p = torch.sigmoid(logits[0])
    each = [torch.sigmoid(logits[1] + 2 * a) for a in range(2)]
    expected = ((1 - p) * each[0] + p * each[1]).log()
    close(found, expected)
    (slope,) = torch.autograd.grad(found, logits)
    close(slope, torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize("made", [{}, {"z": 0}, {"z": 1}])
def test_gradients_where_some_states_are_impossible(made):
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 2.0))
        loc = pyro.param("loc", tensor(-1.0, 2.0, 50.0))
        z = categorical("z", torch.stack([1 - p, p, 0 * p], -1))
        categorical("c", torch.eye(3)[[0, 0, 1]][z])
        pyro.sample("y", dist.Normal(loc[z], 1.0))

    fused = pm.consolidate(model, keep=["p", "c", "y"], allow=["z"])
    p = torch.tensor(0.3, requires_grad=True)
    data = {"p": p, "c": torch.tensor(0), "y": torch.tensor(0.7)}
    trace = conditioned(fused, data, {n: torch.tensor(v) for n, v in made.items()})
    found = trace.nodes["y"]["log_prob"] + trace.nodes["c"]["log_prob"]
    loc = tensor(-1.0, 2.0).requires_grad_()
    other = torch.tensor(0.3, requires_grad=True)
    weights = torch.stack([1 - other, other])
    if made:
        weights = 0 * weights + torch.eye(2)[made["z"]]
    densities = dist.Normal(loc, 1.0).log_prob(torch.tensor(0.7)).exp()
    expected = (weights * densities).sum().log()
    close(found, expected)
    inputs = [p, pyro.param("loc").unconstrained()]
    slopes = torch.autograd.grad(found, inputs, allow_unused=True)
    slopes = [0.0 * i if s is None else s for s, i in zip(slopes, inputs, strict=True)]
    wanted = torch.autograd.grad(expected, [other, loc])
    close(slopes[0], wanted[0])
    close(slopes[1], torch.cat([wanted[1], torch.zeros(1)]))


@pytest.mark.parametrize("last", ["finite", "continuous"])
@pytest.mark.parametrize("p", [0.5, None])
def test_values_that_cannot_be(p, last):
    """Their density is zero, whatever comes after them."""

    def model():
        weight = torch.tensor(p) if p else pyro.sample("p", dist.Beta(2.0, 3.0))
        a = bernoulli("a", weight)
        categorical("b", torch.eye(3)[a.long()])
        if last == "finite":
            categorical("c", ROWS_C[a.long()])
        else:
            pyro.sample("c", dist.Normal(a, 1.0))

    fused = pm.consolidate(model, keep=["b", "c", *([] if p else ["p"])])
    data = {"b": torch.tensor([0, 2, 1]), "c": torch.tensor([1, 1, 1])}
    if last == "continuous":
        data["c"] = data["c"].double()
    if not p:
        data["p"] = torch.full((3,), 0.5)
    with pyro.plate("many", 3):
        trace = conditioned(fused, data)
    found = (trace.nodes["b"]["log_prob"] + trace.nodes["c"]["log_prob"]).exp()
    each = ROWS_C[:, 1] if last == "finite" else stats.norm.pdf(1.0, [0, 1])
    close(found, [0.5 * each[0], 0.0, 0.5 * each[1]])


def test_table_of_an_argument():
    def model(p, table):
        a = bernoulli("a", p)
        return categorical("c", table[a.long()])

    fused = pm.consolidate(
        model, keep=["c"], model_args=(torch.tensor(0.5), torch.ones(2, 3) / 3)
    )
    for p in (0.1, 0.8):
        trace = poutine.trace(fused).get_trace(torch.tensor(p), ROWS_C)
        expected = (1 - p) * ROWS_C[0] + p * ROWS_C[1]
        close(trace.nodes["c"]["fn"].probs, expected)


# Hidden Markov chains

INITIAL = np.array([0.5, 0.3, 0.2])
STEPS = np.random.default_rng(5).dirichlet(np.ones(3), (8, 3))
EMISSIONS = {
    "normal": (
        lambda z: dist.Normal(torch.tensor(LOCS)[z], torch.tensor(SCALES)[z]),
        lambda y: stats.norm.pdf(y, LOCS, SCALES),
        np.array([0.1, -1.0, 2.5, 3.0, -7.0, 0.0, 6.0, 1.0]),
    ),
    "poisson": (
        lambda z: dist.Poisson(torch.tensor(RATES)[z]),
        lambda y: stats.poisson.pmf(y, RATES),
        np.array([0.0, 1.0, 7.0, 2.0, 2.0, 15.0, 0.0, 3.0]),
    ),
    "categorical": (
        lambda z: dist.Categorical(torch.tensor(W_GIVEN)[z]),
        lambda y: W_GIVEN[:, int(y)],
        np.array([0, 2, 1, 1, 2, 0, 0, 2]),
    ),
}


def hidden_markov(kind, length=8):
    def model():
        z = categorical("z0", torch.tensor(INITIAL))
        for t in range(length):
            if t:
                z = categorical(f"z{t}", torch.tensor(STEPS[t % 8])[z])
            pyro.sample(f"y{t}", EMISSIONS[kind][0](z))

    return model


def forward(kind, data, made=None, length=8):
    """The forward algorithm, started anew wherever the state is set."""
    total, alpha = 0.0, INITIAL
    for t in range(length):
        if t:
            alpha = alpha @ STEPS[t % 8]
        if made and f"z{t}" in made:
            alpha = np.eye(3)[made[f"z{t}"]]
        if data[t] is not None:
            alpha = alpha * EMISSIONS[kind][1](data[t])
            total += math.log(alpha.sum())
            alpha = alpha / alpha.sum()
    return total


@pytest.mark.parametrize("kind", EMISSIONS)
@pytest.mark.parametrize("made", [{}, {"z4": 1}, {"z0": 2, "z5": 0}, {"z7": 1}])
def test_hidden_markov_chain(kind, made):
    data = torch.tensor(EMISSIONS[kind][2])
    keep = [f"y{t}" for t in range(8)]
    fused = pm.consolidate(
        hidden_markov(kind), keep=keep, allow=["z0", "z4", "z5", "z7"]
    )
    assert fused.sites == tuple(keep)
    given = dict(zip(keep, data, strict=True))
    set_to = {n: torch.tensor(v) for n, v in made.items()}
    found = log_density(fused, given, set_to)
    close(found, forward(kind, data.tolist(), made))


def test_hidden_markov_chain_of_which_some_emissions_are_kept():
    data = EMISSIONS["normal"][2]
    fused = pm.consolidate(hidden_markov("normal"), keep=["y1", "y4", "y7"])
    seen = [y if t in (1, 4, 7) else None for t, y in enumerate(data)]
    given = {f"y{t}": torch.tensor(data[t]) for t in (1, 4, 7)}
    close(log_density(fused, given), forward("normal", seen))


def test_hidden_markov_chain_with_a_state_that_is_kept():
    fused = pm.consolidate(hidden_markov("poisson"), keep=["y3", "z4", "y6"])
    assert fused.sites == ("y3", "z4", "y6")
    for y3, z4, y6 in itertools.product((0, 4), range(3), (1, 9)):
        alpha = INITIAL
        for t in range(1, 4):
            alpha = alpha @ STEPS[t]
        alpha = alpha * stats.poisson.pmf(y3, RATES) @ STEPS[4]
        end = np.eye(3)[z4] @ STEPS[5] @ STEPS[6] @ stats.poisson.pmf(y6, RATES)
        given = {
            "y3": torch.tensor(float(y3)),
            "z4": torch.tensor(z4),
            "y6": torch.tensor(float(y6)),
        }
        close(log_density(fused, given), math.log(alpha[z4] * end))


@pytest.mark.slow
def test_long_hidden_markov_chain():
    data = torch.tensor(np.random.default_rng(0).normal(0, 3, 120))
    keep = [f"y{t}" for t in range(120)]
    fused = pm.consolidate(hidden_markov("normal", 120), keep=keep, allow=["z60"])
    given = dict(zip(keep, data, strict=True))
    close(log_density(fused, given), forward("normal", data.tolist(), length=120))
    found = log_density(fused, given, {"z60": torch.tensor(2)})
    close(found, forward("normal", data.tolist(), {"z60": 2}, length=120))


def test_hidden_function_of_a_kept_one():
    """A kept deterministic site has finitely many values, as its parents do."""

    def model():
        a = bernoulli("a", torch.tensor(0.3))
        b = pyro.deterministic("b", torch.tensor([1.0, 0.0])[a.long()])
        c = pyro.deterministic("c", torch.logical_or(a.bool(), b.bool()))
        e = pyro.deterministic("e", torch.logical_and(a.bool(), b.bool()))
        bernoulli("d", 0.1 + 0.3 * c.double() + 0.2 * e.double())

    fused = pm.consolidate(model, keep=["b", "d"])
    assert fused.sites == ("b", "d")
    for b, p in ((0.0, 0.3), (1.0, 0.7)):
        nodes = conditioned(fused, {"b": torch.tensor(b)}).nodes
        close(probability(nodes["b"], torch.tensor(b)), p)
        close(nodes["d"]["fn"].probs, 0.4)


# Plates

BY_SLOT = tensor(0.1, 0.9, 0.4)
ROWS_BY_SLOT = torch.tensor(np.random.default_rng(1).dirichlet(np.ones(3), (3, 2)))


def plated():
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("k", 3):
        z = bernoulli("z", BY_SLOT)
        d = pyro.deterministic("d", 1 - z)
        pyro.sample("c", dist.Categorical(ROWS_BY_SLOT[torch.arange(3), z.long()]))
        pyro.sample("y", dist.Normal(d + p, 0.5 + BY_SLOT))


def log_plated(p, c, y, z_is=None):
    """Of each slot given ``p``, in plain numbers."""
    found = []
    for k in range(3):
        total = 0.0
        for z in range(2):
            q = BY_SLOT[k].item()
            weight = (q if z else 1 - q) if z_is is None else float(z_is[k] == z)
            weight *= ROWS_BY_SLOT[k, z, int(c[k])].item()
            total += weight * stats.norm.pdf(y[k], 1 - z + p, 0.5 + q)
        found.append(math.log(total))
    return np.array(found)


@pytest.mark.parametrize("z_is", [None, (0, 1, 1), (1, 0, 1)])
@pytest.mark.parametrize("c", [(0, 1, 2), (2, 2, 0)])
def test_plate(c, z_is):
    fused = pm.consolidate(plated, keep=["p", "c", "y"], allow=["z"])
    assert fused.sites == ("p", "c", "y")
    y = (0.2, -1.0, 2.0)
    data = {"p": torch.tensor(0.3), "c": torch.tensor(c), "y": tensor(*y)}
    made = {} if z_is is None else {"z": tensor(*z_is)}
    trace = conditioned(fused, data, made)
    found = trace.nodes["c"]["log_prob"] + trace.nodes["y"]["log_prob"]
    assert found.shape == (3,)
    close(found, log_plated(0.3, c, y, z_is))


def test_one_value_for_all_slots():
    fused = pm.consolidate(plated, keep=["c"], allow=["z", "d"])
    trace = conditioned(fused, {}, {"z": torch.tensor(1.0)})
    close(trace.nodes["c"]["fn"].probs, ROWS_BY_SLOT[:, 1])
    assert trace.nodes["z"]["value"].tolist() in ([1, 1, 1], 1)


@pytest.mark.parametrize("dim", [-2, -3])
def test_plate_of_particles_outside(dim):
    fused = pm.consolidate(plated, keep=["p", "c", "y"], allow=["z"])
    shape = (4,) + (1,) * (-dim - 2)
    p = torch.linspace(0.1, 0.9, 4).reshape((*shape, 1))
    c = torch.tensor([[0, 1, 2], [1, 1, 0], [2, 0, 0], [0, 0, 1]])
    y = torch.linspace(-1, 2, 12)
    data = {"p": p, "c": c.reshape((*shape, 3)), "y": y.reshape((*shape, 3))}
    with pyro.plate("particles", 4, dim=dim):
        trace = conditioned(fused, data)
    found = trace.nodes["c"]["log_prob"] + trace.nodes["y"]["log_prob"]
    assert found.shape == (*shape, 3)
    expected = [
        log_plated(p.flatten()[i].item(), c[i].tolist(), y.reshape(4, 3)[i].tolist())
        for i in range(4)
    ]
    close(found.reshape(4, 3), np.array(expected))
    with pyro.plate("particles", 4, dim=dim):
        trace = poutine.trace(fused).get_trace()
    assert trace.nodes["y"]["value"].shape == (*shape, 3)


def nested():
    with pyro.plate("r", 2, dim=-2):
        with pyro.plate("k", 3, dim=-1):
            z = categorical("z", torch.tensor(WEIGHTS))
            low = tensor(0.0, 1.0).reshape(2, 1) + tensor(0.0, 5.0, 9.0)
            pyro.sample("y", dist.Normal(low + z, 1.0))
            pyro.sample("x", dist.Poisson(1.0 + z))


def test_nested_plates():
    fused = pm.consolidate(nested, keep=["y", "x"])
    assert fused.sites == ("y", "x")
    y = torch.linspace(-1, 10, 6).reshape(2, 3)
    x = torch.arange(6.0).reshape(2, 3)
    trace = conditioned(fused, {"y": y, "x": x})
    found = trace.nodes["y"]["log_prob"] + trace.nodes["x"]["log_prob"]
    for r, k in itertools.product(range(2), range(3)):
        low, z = r + (0, 5, 9)[k], np.arange(3)
        logs = stats.norm.logpdf(y[r, k].item(), low + z)
        logs = logs + stats.poisson.logpmf(x[r, k].item(), 1.0 + z) + np.log(WEIGHTS)
        close(found[r, k], logsumexp(logs))


def test_hidden_site_outside_of_the_plate_of_its_children():
    """All slots share it: whether it stays or not, the joint law is that it was."""

    def model():
        z = bernoulli("z", torch.tensor(0.3))
        with pyro.plate("k", 3):
            pyro.sample("y", dist.Normal(2 * z, 1.0))

    fused = pm.consolidate(model, keep=["y"])
    y = tensor(0.1, 1.0, 2.0)
    each = [
        math.log((0.7, 0.3)[z]) + stats.norm.logpdf(y.numpy(), 2 * z).sum()
        for z in range(2)
    ]
    if fused.sites == ("y",):
        close(log_density(fused, {"y": y}), logsumexp(np.array(each)))
    else:
        assert fused.sites == ("z", "y")
        for z in range(2):
            data = {"y": y, "z": torch.tensor(float(z))}
            close(log_density(fused, data), each[z])


def test_kept_function_of_all_slots():
    def model():
        with pyro.plate("k", 3):
            z = bernoulli("z", BY_SLOT)
        n = pyro.deterministic("n", z.sum(-1))
        pyro.sample("y", dist.Normal(n, 1.0))

    fused = pm.consolidate(model, keep=["n", "y"], allow=["z"])
    set_to = {"z": tensor(1.0, 0.0, 1.0)}
    trace = conditioned(fused, {"y": torch.tensor(1.0)}, set_to)
    assert trace.nodes["n"]["value"] == 2
    close(trace.nodes["y"]["log_prob"], stats.norm.logpdf(1.0, 2.0))
    if "z" in fused.sites:
        data = {"z": tensor(1.0, 1.0, 0.0), "y": torch.tensor(0.0)}
        trace = conditioned(fused, data)
        close(trace.nodes["z"]["log_prob"].sum().exp(), 0.1 * 0.9 * 0.6)
        assert trace.nodes["n"]["value"] == 2
        close(trace.nodes["y"]["log_prob"], stats.norm.logpdf(0.0, 2.0))


def test_hidden_function_of_a_finite_and_a_continuous_site():
    def model():
        p = pyro.sample("p", dist.Beta(2.0, 3.0))
        z = bernoulli("z", torch.tensor(0.3))
        d = pyro.deterministic("d", p * (1 + z))
        pyro.sample("y", dist.Normal(d, 0.1))

    fused = pm.consolidate(model, keep=["p", "y"])
    p, y = 0.4, 0.7
    each = np.array([0.7, 0.3]) * stats.norm.pdf(y, p * np.array([1, 2]), 0.1)
    data = {"p": torch.tensor(p), "y": torch.tensor(y)}
    if fused.sites == ("p", "y"):
        found = conditioned(fused, data).nodes["y"]["log_prob"]
        close(found.exp(), each.sum())
    else:
        assert fused.sites == ("p", "z", "y")
        for z in range(2):
            nodes = conditioned(fused, data | {"z": torch.tensor(float(z))}).nodes
            close((nodes["z"]["log_prob"] + nodes["y"]["log_prob"]).exp(), each[z])


def test_plate_that_draws_some_slots():
    many = torch.linspace(0.1, 0.9, 6)

    def model():
        with pyro.plate("k", 6, subsample_size=2) as some:
            z = bernoulli("z", many[some])
            pyro.sample("y", dist.Normal(3 * z + some, 1.0))

    fused = pm.consolidate(model, keep=["y"])
    assert fused.sites == ("y",)
    for _ in range(3):
        trace = conditioned(fused, {"y": tensor(1.0, 4.0)})
        some = trace.nodes["k"]["value"].numpy()
        q = many.numpy()[some]
        at = np.array([1.0, 4.0])
        each = (1 - q) * stats.norm.pdf(at, some) + q * stats.norm.pdf(at, 3 + some)
        close(trace.log_prob_sum(), 3 * np.log(each).sum())


# Long chains


def assert_chain(length, middle):
    tables = np.random.default_rng(length).dirichlet(0.3 * np.ones(3), (length, 3))

    def model():
        x = categorical("x0", torch.tensor(WEIGHTS))
        for i in range(1, length):
            x = categorical(f"x{i}", torch.tensor(tables[i])[x])

    last = f"x{length - 1}"
    fused = pm.consolidate(
        model, keep=["x0", last], allow=[f"x{i}" for i in (*middle, length - 2)]
    )
    assert fused.sites == ("x0", last)

    def end(start, rows):
        for i in range(start + 1, length):
            rows = rows @ tables[i]
        return rows

    every = end(0, np.eye(3))
    for x0 in range(3):
        trace = conditioned(fused, {"x0": torch.tensor(x0)})
        close(trace.nodes[last]["fn"].probs, every[x0])
    made = {}
    for i in (*middle, length - 2):
        # The last one wins
        made[f"x{i}"] = torch.tensor(i % 3)
        for which in (made, {f"x{i}": made[f"x{i}"]}):
            trace = conditioned(fused, {}, which)
            close(trace.nodes[last]["fn"].probs, end(i, np.eye(3)[i % 3]))
            close(trace.nodes["x0"]["fn"].probs, WEIGHTS)


def test_chain_of_a_thousand_sites():
    assert_chain(1000, (4, 500))


@pytest.mark.slow
def test_chain_of_ten_thousand_sites():
    assert_chain(10_000, (4, 5000))


def assert_row_of_maps(length):
    """Deterministic sites, with a coin now and then."""

    def model():
        x = categorical("x0", torch.tensor(WEIGHTS))
        for i in range(1, length):
            if i % 100 == 0:
                x = categorical(f"x{i}", torch.tensor(W_GIVEN)[x])
            else:
                x = pyro.deterministic(f"x{i}", (x + i) % 3)

    last = f"x{length - 1}"
    middle = length // 2 + 30
    fused = pm.consolidate(model, keep=["x0", last], allow=[f"x{middle}"])
    assert fused.sites == ("x0", last)

    def end(start, row):
        for i in range(start + 1, length):
            row = row @ W_GIVEN if i % 100 == 0 else np.roll(row, i % 3)
        return row

    x0 = conditioned(fused, {"x0": torch.tensor(1)})
    values = torch.arange(3)
    probs = x0.nodes[last]["fn"].log_prob(values).exp()
    close(probs, end(0, np.eye(3)[1]))
    trace = conditioned(fused, {}, {f"x{middle}": torch.tensor(2)})
    probs = trace.nodes[last]["fn"].log_prob(values).exp()
    close(probs, end(middle, np.eye(3)[2]))


def test_row_of_a_thousand_maps():
    assert_row_of_maps(1000)


@pytest.mark.slow
def test_row_of_ten_thousand_maps():
    assert_row_of_maps(10_000)


# Noise that is shared: Appendix C


def shared():
    a = pyro.sample("A", dist.Beta(2.0, 1.0))
    b = bernoulli("B", a)
    c = pyro.deterministic("C", b)
    pyro.deterministic("D", b)
    pyro.deterministic("E", 1 - c)


@pytest.mark.parametrize("made", [{}, {"B": 0.0}, {"B": 1.0}])
def test_what_has_noise_in_common_stays_equal(made):
    fused = pm.consolidate(shared, keep=["A", "C", "D", "E"], allow=["B"])
    assert fused.sites == ("A", "C", "D", "E")
    with pyro.plate("many", 300):
        trace = conditioned(fused, {}, {n: torch.tensor(v) for n, v in made.items()})
    c, d, e = (trace.nodes[n]["value"].expand(300) for n in "CDE")
    assert torch.equal(c, d)
    assert torch.equal(e, 1 - c)
    if made:
        assert (c == made["B"]).all()
    else:
        assert 0 < c.sum() < 300
        a = trace.nodes["A"]["value"]
        law = trace.nodes["C"]["fn"]
        close(law.log_prob(torch.ones(300)).exp(), a)
        close(law.log_prob(torch.zeros(300)).exp(), 1 - a)


def test_what_has_noise_in_common_with_a_site_that_is_set():
    """Setting C changes nothing of D, which is what C would have been."""
    fused = pm.consolidate(shared, keep=["A", "C", "D", "E"], allow=["B"])
    with pyro.plate("many", 300):
        trace = conditioned(fused, {}, {"C": torch.tensor(1.0)})
    a, c, d, e = (trace.nodes[n]["value"].expand(300) for n in "ACDE")
    close(trace.nodes["C"]["fn"].log_prob(torch.ones(300)).exp(), a)
    assert torch.equal(c, d)
    assert 0 < d.sum() < 300
    assert (e == 0).all()


def test_what_a_site_would_have_been_tells_of_the_others():
    """A site that is set shares its noise with those it does not act on any more."""

    def model():
        u = bernoulli("u", torch.tensor(0.4))
        x = bernoulli("x", 0.1 + 0.8 * u)
        bernoulli("y", 0.2 + 0.5 * u + 0.2 * x)

    fused = pm.consolidate(model, keep=["x", "y"])
    for x, y in itertools.product((0.0, 1.0), (0.0, 1.0)):
        expected = 0.0
        for u in range(2):
            p_x, p_y = 0.1 + 0.8 * u, 0.2 + 0.5 * u + 0.2  # x is set to 1
            expected += (
                (0.6, 0.4)[u] * (p_x if x else 1 - p_x) * (p_y if y else 1 - p_y)
            )
        data = {"x": torch.tensor(x), "y": torch.tensor(y)}
        found = log_density(fused, data, {"x": torch.tensor(1.0)})
        close(found.exp(), expected)


# Values that cannot be reached: Appendix B.3


def image_of(law):
    return sorted(law.enumerate_support().flatten().tolist())


def test_values_out_of_reach_are_dropped():
    """The image of a composition is no larger than the smallest on the way."""
    maps = [lambda x: x // 4, lambda x: x % 5, lambda x: 3 * x, lambda x: x + 100]

    def model():
        x = categorical("x", torch.ones(64))
        for i, f in enumerate(maps):
            x = pyro.deterministic(f"m{i}", f(x))
        bernoulli("y", torch.where(x > 104, 0.9, 0.2))

    images, values = [], range(64)
    for f in maps:
        values = [f(v) for v in values]
        images.append(len(set(values)))
    fused = pm.consolidate(model, keep=["m3", "y"], allow=["m0"])
    assert fused.sites == ("m3", "y")
    law = poutine.trace(fused).get_trace().nodes["m3"]["fn"]
    reached = image_of(law)
    assert reached == sorted(set(values)) == [100, 103, 106, 109, 112]
    assert len(reached) <= min(images)
    for value in range(90, 120):
        found = law.log_prob(torch.tensor(value)).exp()
        close(found, values.count(value) / 64)


def test_many_states_with_few_images():
    """1,000 ** 6 joint states, of which 2 ** 6 can be told apart."""

    def model():
        total = 0
        for i in range(6):
            x = categorical(f"x{i}", torch.ones(1000))
            half = pyro.deterministic(f"h{i}", (x >= 100 * (i + 1)).long())
            total = pyro.deterministic(f"t{i}", total + half)
        pyro.sample("y", dist.Normal(total.double(), 1.0))

    fused = pm.consolidate(model, keep=["t5", "y"])
    assert fused.sites == ("t5", "y")
    law = poutine.trace(fused).get_trace().nodes["t5"]["fn"]
    assert image_of(law) == list(range(7))
    counts = np.array([1.0])
    for i in range(6):
        p = 1 - 0.1 * (i + 1)
        counts = np.convolve(counts, [1 - p, p])
    close(law.log_prob(torch.arange(7)).exp(), counts)


def test_function_that_is_constant():
    def model():
        x = categorical("x", torch.ones(5))
        d = pyro.deterministic("d", 0 * x + 3)
        bernoulli("y", 0.1 * d + 0.05 * x)

    fused = pm.consolidate(model, keep=["d", "y"])
    trace = poutine.trace(fused).get_trace()
    assert trace.nodes["d"]["value"] == 3
    close(trace.nodes["y"]["fn"].probs, 0.4)


# What is refused


def three():
    a = bernoulli("a", torch.tensor(0.3))
    b = categorical("b", torch.tensor(W_GIVEN)[a.long()])
    d = pyro.deterministic("d", a + b)
    with pyro.plate("k", 2):
        v = bernoulli("v", tensor(0.2, 0.6))
        pyro.sample("w", dist.Normal(v, 1.0))
    c = categorical("c", torch.tensor(W_GIVEN)[b])
    bernoulli("y", 0.1 + 0.1 * d + 0.2 * c)


P_Y = {
    (a, b, c): 0.1 + 0.1 * (a + b) + 0.2 * c
    for a, b, c in itertools.product(range(2), range(3), range(3))
}


def p_y(a_is=None, b_is=None, c_is=None):
    total = 0.0
    for (a, b, c), p in P_Y.items():
        p *= (0.7, 0.3)[a] if a_is is None else a == a_is
        p *= W_GIVEN[a, b] if b_is is None else b == b_is
        p *= W_GIVEN[b, c] if c_is is None else c == c_is
        total += p
    return total


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("a", 2.0, "support"),
        ("a", torch.tensor(0.5), "support"),
        ("a", float("nan"), "NaN"),
        ("a", torch.tensor(float("nan")), "NaN"),
        ("a", "yes", "number"),
        ("b", 3, "support"),
        ("b", -1, "support"),
        ("b", 1.5, "int64"),
        ("v", torch.zeros(3), r"\(3,\).*\(2,\)"),
        ("v", tensor(0.0, 2.0), "support"),
        ("d", float("nan"), "NaN|int64|float"),
    ],
)
def test_values_that_are_refused(name, value, words):
    fused = pm.consolidate(three, keep=["y", "w"], allow=["a", "b", "d", "v"])
    with pytest.raises(pm.InterventionNotAllowed, match=words) as refused:
        poutine.do(fused, data={name: value})()
    assert_message(refused.value, name)


def assert_message(error, name):
    text = str(error)
    assert name in text
    assert len(text) < 400
    assert text.endswith(".")


@pytest.mark.parametrize("value", [3, -1])
def test_values_of_kept_sites_that_are_refused(value):
    fused = pm.consolidate(three, keep=["b", "y"])
    with pytest.raises(pm.PyroMacroError, match="'?b'?.*(values|support)"):
        poutine.do(fused, data={"b": torch.tensor(value)})()


def test_value_outside_of_the_image_of_a_map():
    """It is computed with, or refused; it is not taken for another one."""
    fused = pm.consolidate(three, keep=["y"], allow=["d"])
    try:
        trace = conditioned(fused, {}, {"d": torch.tensor(5.0)})
    except pm.PyroMacroError as error:
        assert_message(error, "d")
        return
    assert trace.nodes["d"]["value"] == 5
    p_b = 0.7 * W_GIVEN[0] + 0.3 * W_GIVEN[1]
    close(trace.nodes["y"]["fn"].probs, 0.6 + 0.2 * (p_b @ W_GIVEN @ np.arange(3)))


@pytest.mark.parametrize("value", [1, 1.0, True, torch.tensor(1.0), torch.tensor(1)])
def test_forms_of_a_value(value):
    fused = pm.consolidate(three, keep=["y"], allow=["a"])
    trace = conditioned(fused, {}, {"a": value})
    close(trace.nodes["y"]["fn"].probs, p_y(a_is=1))
    assert trace.nodes["a"]["value"] == 1
    assert trace.nodes["a"]["infer"]["_deterministic"]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"keep": ["yy"]}, "keep.*'yy'.*mean 'y'"),
        ({"keep": ["y", "q"]}, "keep.*'q'"),
        ({"keep": ["y"], "allow": ["aa"]}, "allow.*'aa'.*mean 'a'"),
        ({"keep": ["y"], "allow": [{"q": 1.0}]}, "allow.*'q'"),
        ({"keep": ["y"], "allow": [{"a": 1.0, "q": 1.0}]}, "allow.*'q'"),
        ({"keep": ["y"], "partition": [{"a", "q"}]}, "partition.*'q'"),
    ],
)
def test_names_that_are_unknown(options, words):
    with pytest.raises(pm.UnknownSite, match=words) as refused:
        pm.consolidate(three, **options)
    assert "Its sites are: 'a', 'b', 'c', 'd', 'v', 'w', 'y'" in str(refused.value)


def test_allow_of_neither_kind():
    with pytest.raises(pm.PyroMacroError, match="allow=3.*name of a site"):
        pm.consolidate(three, keep=["y"], allow=[3])


@pytest.mark.parametrize("value", [2.0, float("nan"), "yes"])
def test_explicit_values_that_are_refused(value):
    with pytest.raises(pm.PyroMacroError, match="do\\(a = |'a'"):
        fused = pm.consolidate(three, keep=["y"], allow=[{"a": value}])
        poutine.do(fused, data={"a": value})()


def test_clusters_that_overlap():
    with pytest.raises(pm.PyroMacroError, match="'b'.*two clusters") as refused:
        pm.consolidate(three, keep=["y"], partition=[{"a", "b"}, {"b", "c"}])
    assert "['a', 'b']" in str(refused.value)
    assert "['b', 'c']" in str(refused.value)


def test_clusters_that_need_one_another():
    with pytest.raises(pm.CyclicPartition) as refused:
        pm.consolidate(three, keep=["y"], partition=[{"a", "c"}, {"b"}])
    text = str(refused.value)
    for part in ("['a', 'c']", "['b']", "'a' acts on 'b'", "'b' acts on 'c'"):
        assert part in text


def test_empty_cluster():
    with pytest.raises(pm.PyroMacroError, match="empty"):
        pm.consolidate(three, keep=["y"], partition=[set()])


@pytest.mark.parametrize(
    "partition", [[{"a", "b"}, {"c", "d", "y"}], [{"a"}, {"b", "c", "d"}], []]
)
def test_partitions_change_nothing_of_the_law(partition):
    fused = pm.consolidate(three, keep=["y"], allow=["a"], partition=partition)
    of = {"a": 2, "b": 3, "c": 3, "d": 4}
    stays = [n for n in fused.sites if n in of]
    assert {*fused.sites} <= {*of, "v", "y"}
    for made in ({}, {"a": torch.tensor(1.0)}):
        total = 0.0
        random = [n for n in stays if n not in made]
        for values in itertools.product(*(range(of[n]) for n in random)):
            data = {n: torch.tensor(v) for n, v in zip(random, values, strict=True)}
            for n in {"a", "d"} & set(data):
                data[n] = data[n].double()
            trace = conditioned(fused, data, made)
            parts = [probability(trace.nodes[n], data[n]).item() for n in random]
            if 0 not in parts:
                p = trace.nodes["y"]["fn"].log_prob(torch.tensor(1.0)).exp().item()
                total += math.prod(parts) * p
        close(total, p_y(a_is=1 if made else None))


def do_probs(fused, **made):
    return conditioned(fused, {}, made).nodes["y"]["fn"].probs


def test_explicit_interventions_only_as_they_are_listed():
    allow = [{"a": 1.0, "b": 2}, {"b": 0}, {"c": 1}]
    fused = pm.consolidate(three, keep=["y"], allow=allow)
    close(do_probs(fused), p_y())
    close(do_probs(fused, a=1.0, b=2), p_y(1, 2))
    close(do_probs(fused, b=torch.tensor(0)), p_y(b_is=0))
    close(do_probs(fused, c=1), p_y(c_is=1))
    for made in (
        {"a": 1.0},
        {"b": 2},
        {"a": 1.0, "b": 0},
        {"a": 0.0, "b": 2},
        {"b": 0, "c": 1},
        {"a": 1.0, "b": 2, "c": 1},
        {"c": 0},
        {"d": 1.0},
    ):
        with pytest.raises(pm.InterventionNotAllowed) as refused:
            do_probs(fused, **made)
        text = str(refused.value)
        for name in made:
            assert f"do({name} =" in text
        assert "Allowed: do(a = 1.0) and do(b = 2); do(b = 0); do(c = 1)" in text


def test_free_sites_in_any_combination():
    fused = pm.consolidate(three, keep=["y"], allow=["a", "b", "c"])
    for a, b, c in itertools.product((None, 0, 1), (None, 0, 2), (None, 1)):
        made = {n: v for n, v in zip("abc", (a, b, c), strict=True) if v is not None}
        close(do_probs(fused, **made), p_y(a, b, c))
    with pytest.raises(pm.InterventionNotAllowed, match=r"do\(d = 1.*any values of a"):
        do_probs(fused, a=1, d=1.0)


def test_explicit_intervention_on_sites_that_are_free():
    fused = pm.consolidate(three, keep=["y"], allow=["a", {"a": 1.0, "b": 2}])
    close(do_probs(fused, a=0.0), p_y(0))
    close(do_probs(fused, a=1.0, b=2), p_y(1, 2))
    with pytest.raises(pm.InterventionNotAllowed, match="b = 2"):
        do_probs(fused, b=2)
    with pytest.raises(pm.InterventionNotAllowed, match="b = 2"):
        do_probs(fused, a=0.0, b=2)


def test_kept_sites_may_always_be_set():
    fused = pm.consolidate(three, keep=["b", "y"], allow=[{"c": 1}])
    for made in ({"b": torch.tensor(1)}, {"b": torch.tensor(1), "c": torch.tensor(1)}):
        total = 0.0
        for b in range(3):  # what it would have been tells of `a`
            nodes = conditioned(fused, {"b": torch.tensor(b)}, made).nodes
            total += nodes["b"]["log_prob"].exp() * nodes["y"]["fn"].probs
        close(total, p_y(b_is=1, c_is=made.get("c")))
    with pytest.raises(pm.InterventionNotAllowed):
        do_probs(fused, b=1, c=2)


def test_condition_on_what_was_fused_away():
    fused = pm.consolidate(three, keep=["y"], allow=["a"])
    with pytest.raises(pm.PyroMacroError, match="'b' is conditioned on.*keep"):
        poutine.condition(fused, data={"b": torch.tensor(1)})()


# Types of numbers


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_single_and_double_precision(dtype, default):
    def model():
        p = pyro.sample("p", dist.Beta(torch.tensor(2.0, dtype=dtype), 3.0))
        z = bernoulli("z", p)
        b = bernoulli("b", 0.2 + 0.5 * z)
        c = categorical("c", ROWS_C.to(dtype)[z.long()])
        n = pyro.sample("n", dist.Binomial(2, 0.3 + 0.5 * z))
        pyro.deterministic("d", z + 1)
        loc = torch.tensor([1.0, 4.0], dtype=dtype)[z.long()]
        pyro.sample("x", dist.Normal(loc + b + c + n, 1.0))

    torch.set_default_dtype(default)
    keep = ["p", "b", "c", "n", "d", "x"]
    fused = pm.consolidate(model, keep=keep, allow=["z"])
    assert fused.sites == tuple(keep)
    made = {"z": torch.tensor(1.0, dtype=dtype)}
    for one, other in [
        (fused, model),
        (poutine.do(fused, data=made), poutine.do(model, data=made)),
    ]:
        mine, theirs = (poutine.trace(m).get_trace().nodes for m in (one, other))
        for name in keep:
            assert mine[name]["value"].dtype == theirs[name]["value"].dtype, name
    data = {n: poutine.trace(model).get_trace().nodes[n]["value"] for n in keep}
    data |= {"p": torch.tensor(0.3, dtype=dtype), "x": torch.tensor(3.5, dtype=dtype)}
    data |= {"b": torch.ones_like(data["b"]), "c": torch.tensor(2)}
    data |= {"n": torch.ones_like(data["n"]), "d": torch.full_like(data["d"], 2)}
    trace = conditioned(fused, data)
    found = [probability(trace.nodes[n], data[n]) for n in keep[1:]]
    expected = 0.3 * 0.7 * 0.2 * (2 * 0.8 * 0.2) * stats.norm.pdf(3.5, 8.0)
    double = dtype == default == torch.float64
    close(
        math.prod(p.item() for p in found), expected, tolerance=1e-8 if double else 1e-6
    )
    assert trace.nodes["x"]["log_prob"].dtype == dtype


# Enumeration of what is kept


def enumerated():
    p = pyro.sample("p", dist.Beta(2.0, 2.0))
    with pyro.plate("k", 4):
        a = bernoulli("a", p)
        w = categorical("w", ROWS_C[a.long()])
        b = bernoulli("b", 0.2 + 0.2 * w + 0.1 * a)
        y = tensor(0.0, 1.0, -2.0, 4.0)
        pyro.sample("y", dist.Normal(w + 2 * b, 1.0), obs=y)


def at_a_point():
    pyro.sample("p", dist.Delta(pyro.param("at", torch.tensor(0.3))))


def test_enumeration_of_a_kept_site():
    fused = pm.consolidate(enumerated, keep=["p", "w"])
    assert fused.sites == ("p", "w", "y")
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    losses, slopes = [], []
    for model in (enumerated, fused):
        pyro.clear_param_store()
        loss = elbo.differentiable_loss(config_enumerate(model), at_a_point)
        losses.append(loss)
        slopes.append(torch.autograd.grad(loss, pyro.param("at"))[0])
    close(losses[1], losses[0])
    close(slopes[1], slopes[0])
    # By hand
    total = stats.beta.logpdf(0.3, 2, 2)
    for y in (0.0, 1.0, -2.0, 4.0):
        each = 0.0
        for a, w, b in itertools.product(range(2), range(3), range(2)):
            q = 0.2 + 0.2 * w + 0.1 * a
            p = (0.7, 0.3)[a] * ROWS_C[a, w].item() * (q if b else 1 - q)
            each += p * stats.norm.pdf(y, w + 2 * b)
        total += math.log(each)
    close(losses[1], -total)


def test_enumeration_of_several_kept_sites():
    def model():
        a = bernoulli("a", torch.tensor(0.4))
        u = categorical("u", ROWS_C[a.long()])
        v = categorical("v", torch.tensor(W_GIVEN)[u])
        b = bernoulli("b", 0.1 + 0.2 * a + 0.3 * (v > 0))
        w = bernoulli("w", 0.2 + 0.3 * b + 0.1 * u)
        pyro.sample("y", dist.Normal(u + v + 2 * w - b, 1.0), obs=torch.tensor(1.2))

    fused = pm.consolidate(model, keep=["u", "v", "w"])
    assert fused.sites == ("u", "v", "w", "y")
    elbo = TraceEnum_ELBO(max_plate_nesting=0)

    def guide():
        pass

    losses = [elbo.loss(config_enumerate(m), guide) for m in (model, fused)]
    close(losses[1], losses[0])
