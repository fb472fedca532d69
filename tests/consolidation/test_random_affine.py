# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Affine-Gaussian programs, fused, against their linear algebra.

The reference is ``(I - B) v = c + noise``, the rows of an intervention cut: each site
is an affine form of independent standard normals. Of the sites that are emitted these
forms are orthogonalized in program order: what is left of one, given those before it,
is its conditional distribution, found without a covariance being inverted.

Of a kept site that is intervened on a program emits, under its name, the value it would
have had; those below it get the one it is set to.
"""

import itertools
import math
import random
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)
from pyro.poutine import condition, do, trace

import pyro_macro as pm

GRID = 256.0  # numbers of the random programs are multiples of 1 / 256
CERTAIN = 1e-12  # of a standard deviation, if no more is left: it is a function


# The reference


class Noise:
    """Affine forms of independent standard normals, arrays ``(*shape, 1 + count)``.

    The first of the last dimension is the constant.
    """

    def __init__(self, count):
        self.count, self.used = count, 0

    def __call__(self, *shape):
        """New ones."""
        size = math.prod(shape)
        found = np.zeros((size, 1 + self.count), np.longdouble)
        found[:, 1 + self.used : 1 + self.used + size] = np.eye(size)
        self.used += size
        assert self.used <= self.count
        return found.reshape((*shape, 1 + self.count))

    def const(self, value):
        value = np.asarray(value, np.longdouble)
        found = np.zeros((*value.shape, 1 + self.count), np.longdouble)
        found[..., 0] = value
        return found


def drawn(forms, names, seed):
    """Values of some sites, wider than they are distributed."""
    count = max((forms[name].shape[-1] - 1 for name in names), default=0)
    noise = 2 * np.random.default_rng(seed).normal(size=count)
    whole = np.concatenate([[1.0], noise]).astype(np.longdouble)
    return {n: torch.as_tensor((forms[n] @ whole).astype(float)) for n in names}


def conditionals(forms, values):
    """The law of each site, given the values of those before it.

    :param forms: of the sites, by name.
    :param values: of the sites, in order.
    :returns: for each name its mean, a factor of its covariance, and its log density:
        that of its only value, if there is but one, is 0.
    """
    basis, noise, found = [], [], {}
    for name, value in values.items():
        rows = forms[name].reshape(-1, forms[name].shape[-1])
        value = np.asarray(value, np.longdouble).reshape(-1)
        earlier = len(basis)
        given = np.array(noise, np.longdouble)
        table = np.zeros((len(rows), earlier + len(rows)), np.longdouble)
        mean, log_prob = rows[:, 0].copy(), 0.0
        for i, row in enumerate(rows[:, 1:]):
            size, rest = np.sqrt(row @ row), row
            for _ in range(2):  # the second time for the rounding of the first
                for k, direction in enumerate(basis):
                    part = direction @ rest
                    table[i, k] += part
                    rest = rest - part * direction
            left = np.sqrt(rest @ rest)
            mean[i] += table[i, :earlier] @ given
            if left > CERTAIN * size:
                own = table[i, earlier : len(basis)] @ noise[earlier:]
                noise.append((value[i] - mean[i] - own) / left)
                table[i, len(basis)] = left
                basis.append(rest / left)
                log_prob -= noise[-1] ** 2 / 2 + np.log(left) + np.log(2 * np.pi) / 2
        own = table[:, earlier : len(basis)]
        found[name] = SimpleNamespace(
            mean=mean.astype(float),
            factor=own.astype(float),
            log_prob=float(log_prob),
            prior=np.sqrt((rows[:, 1:] ** 2).sum(1)).astype(float),
            size=(np.abs(rows[:, 0]) + np.abs(table[:, :earlier]) @ np.abs(given)),
        )
    return found


# What is found


def moments(fn):
    """Mean and covariance of the elements of an event, behind the batch shape."""
    if isinstance(fn, MaskedDistribution):
        return moments(fn.base_dist)
    if isinstance(fn, ExpandedDistribution):
        mean, covariance = moments(fn.base_dist)
        count = mean.shape[-1]
        return (
            mean.expand((*fn.batch_shape, count)),
            covariance.expand((*fn.batch_shape, count, count)),
        )
    if isinstance(fn, torch.distributions.TransformedDistribution):
        (reshape,) = fn.transforms  # any other one would not be affine-Gaussian
        assert isinstance(reshape, torch.distributions.transforms.ReshapeTransform)
        return moments(fn.base_dist)
    count = torch.Size(fn.event_shape).numel()
    mean = fn.mean.reshape((*fn.batch_shape, count))
    if isinstance(
        fn,
        (
            torch.distributions.MultivariateNormal,
            torch.distributions.LowRankMultivariateNormal,
        ),
    ):
        return mean, fn.covariance_matrix
    base = fn
    while isinstance(base, torch.distributions.Independent):
        base = base.base_dist
    if isinstance(base, dist.Delta):
        return mean, torch.zeros((*mean.shape, count))
    assert isinstance(base, torch.distributions.Normal), type(base)
    return mean, torch.diag_embed(fn.variance.reshape((*fn.batch_shape, count)))


def dense(fn, shape):
    """Mean and covariance of all elements of a site, those of plates independent."""
    mean, covariance = moments(fn)
    count = mean.shape[-1]
    slots = math.prod(shape) // count
    batch = torch.Size(shape[: len(shape) - len(fn.event_shape)])
    mean = mean.expand((*batch, count)).reshape(-1)
    covariance = covariance.expand((*batch, count, count))
    blocks = covariance.reshape(slots, count, count)
    return mean.detach().numpy(), torch.block_diag(*blocks).detach().numpy()


def agrees(node, expected, shape, what):
    """Means and covariances to 1e-8; of what is certain but for rounding, to that."""
    assert node["value"].shape == shape, what
    mean, covariance = dense(node["fn"], shape)
    factor, prior = expected.factor, expected.prior
    limit = 1e-8 * np.abs(expected.mean) + 1e-12 * (expected.size + prior)
    error = np.abs(mean - expected.mean)
    assert (error <= limit).all(), f"{what}: mean {mean}, not {expected.mean}"
    wanted = factor @ factor.T
    spread = np.sqrt(np.diag(wanted))
    limit = 1e-8 * np.outer(spread, spread) + 1e-14 * np.outer(prior, prior)
    error = np.abs(covariance - wanted)
    assert (error <= limit).all(), f"{what}: covariance {covariance}, not {wanted}"
    if factor.size and factor.shape[0] == factor.shape[1]:
        smallest = np.linalg.svd(factor / spread[:, None], compute_uv=False)[-1]
        ratio = (prior / spread).max() / smallest
        limit = (1e-8 + 1e-13 * ratio**2) * (10 + np.abs(expected.log_prob))
        found = node["log_prob_sum"].item()
        assert abs(found - expected.log_prob) <= limit, f"{what}: log density"


def check(fused, forms, names, under=None, args=(), seed=0, given=None):
    """The laws of the sites of a fused program, each given those before it.

    :param forms: the reference, for the same intervention.
    :param names: all sites that stay, in order.
    :param under: the intervention.
    :param given: values of other sites that stay, and are not compared.
    """
    under, given = under or {}, given or {}
    values = drawn(forms, names, seed)
    model = do(condition(fused, {**values, **given}), under)
    run = trace(model).get_trace(*args)
    emitted = [
        name
        for name, node in run.nodes.items()
        if node["type"] == "sample" and name not in given
    ]
    emitted = [name for name in emitted if name in names or name not in under]
    assert emitted == list(names)
    run.compute_log_prob()
    for name, expected in conditionals(forms, values).items():
        what = f"{name} under do({list(under)})"
        agrees(run.nodes[name], expected, values[name].shape, what)
    return run


# Random programs


def number(rng, low, high):
    return round(rng.uniform(low, high) * GRID) / GRID


def matrix(rng, rows, columns):
    found = torch.zeros(rows, columns)
    for i, j in itertools.product(range(rows), range(columns)):
        found[i, j] = rng.choice((-1, 1)) * number(rng, 0.2, 1.4)
    return found


def factor(rng, size, scale):
    """A lower triangular factor of a covariance."""
    lower = torch.tril(matrix(rng, size, size)) * scale / 2
    return lower + torch.eye(size) * 2 * scale


class Program:
    """A program and what it consists of.

    :ivar parents: for each site the matrices of its parents, in program order.
    :ivar offsets: for each site a vector.
    :ivar noises: for each site a factor of the covariance of its noise; ``None`` for a
        deterministic one.
    :ivar shapes: of the sites' values.
    """

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        count = rng.randint(3, 15)
        self.names = [f"v{i}" for i in range(count)]
        self.parents, self.offsets, self.noises = {}, {}, {}
        self.shapes, self.kinds, self.styles = {}, {}, {}
        motif = rng.choice(["chain", "fork", "collider", "any", "any", "any"])
        density = rng.uniform(1.0, 2.5) / count
        for i, name in enumerate(self.names):
            kind = rng.choice(
                ["normal"] * 5 + ["event", "mvn", "matrix"] + ["certain"] * 2
            )
            above = [
                other
                for j, other in enumerate(self.names[:i])
                if rng.random() < density
                or (motif == "chain" and j == i - 1)
                or (motif == "fork" and j == 0)
                or (motif == "collider" and i == count - 1)
            ][:5]
            if kind == "certain" and not above:
                kind = "normal"
            shape = {"normal": (), "matrix": (2, 2)}.get(kind, (rng.randint(2, 3),))
            if kind == "certain" and rng.random() < 0.7:
                shape = ()
            size = torch.Size(shape).numel()
            scale = max(1, round(10 ** rng.uniform(-2, 2) * GRID)) / GRID
            noise = torch.eye(size) * scale
            if kind == "mvn":
                noise = factor(rng, size, scale)
            elif kind != "normal":
                noise = noise * torch.arange(1, size + 1)
            self.kinds[name], self.shapes[name] = kind, shape
            self.parents[name] = {
                p: matrix(rng, size, torch.Size(self.shapes[p]).numel()) for p in above
            }
            self.offsets[name] = torch.tensor(
                [number(rng, -10, 10) for _ in range(size)]
            )
            self.noises[name] = None if kind == "certain" else noise
            self.styles[name] = rng.randrange(4)

    def __call__(self):
        values = {}
        for name in self.names:
            values[name] = self._site(name, self._mean(name, values))
        return values

    def _mean(self, name, values):
        """The same in different words."""
        shape, style = self.shapes[name], self.styles[name]
        total = self.offsets[name].reshape(shape)
        if not shape:
            total = total.item()
        for parent, weights in self.parents[name].items():
            value = values[parent]
            if value.dim() == 0 and not shape:
                a = weights.item()
                term = [a * value, value * a, value / (1 / a), -(value * -a)][style]
            elif value.dim() == 0:
                term = (weights[:, 0] * value).reshape(shape)
            else:
                flat = value.reshape(-1)
                term = [
                    lambda w, x: w @ x,
                    lambda w, x: (w * x).sum(-1),
                    lambda w, x: torch.einsum("ij,j->i", w, x),
                    lambda w, x: torch.stack([(row * x).sum() for row in w]),
                ][style](weights, flat).reshape(shape)
            total = total + term if style % 2 else term + total
        return total

    def _site(self, name, mean):
        kind, noise, style = self.kinds[name], self.noises[name], self.styles[name]
        if kind == "certain":
            return pyro.deterministic(name, mean)
        if kind == "normal":
            return pyro.sample(name, dist.Normal(mean, noise.item()))
        if kind == "mvn":
            given = [{"scale_tril": noise}, {"covariance_matrix": noise @ noise.mT}]
            return pyro.sample(
                name, dist.MultivariateNormal(mean, **given[int(style > 1)])
            )
        scale = noise.diagonal().reshape(self.shapes[name])
        fn = dist.Normal(mean, scale).to_event(len(self.shapes[name]))
        return pyro.sample(name, fn)

    def question(self):
        """What to keep, what to allow, and the interventions to make."""
        rng = self.rng
        keep = rng.sample(self.names, rng.randint(1, min(4, len(self.names))))
        hidden = [n for n in self.names if n not in keep]
        allow = rng.sample(hidden, rng.randint(0, min(5, len(hidden))))
        wanted = [[], *([name] for name in allow), [rng.choice(keep)]]
        pairs = list(itertools.combinations(allow, 2))
        wanted += map(list, rng.sample(pairs, min(2, len(pairs))))
        if allow:
            wanted.append([rng.choice(keep), rng.choice(allow)])
        if len(allow) > 2:
            wanted.append(list(allow))
        interventions = [{n: self._value(n) for n in names} for names in wanted]
        return sorted(keep, key=self.names.index), allow, interventions

    def _value(self, name):
        shape = self.shapes[name]
        if not shape and self.rng.random() < 0.5:
            return number(self.rng, -20, 20)
        size = torch.Size(shape).numel()
        flat = torch.tensor([number(self.rng, -20, 20) for _ in range(size)])
        return flat.reshape(shape)


class Reference:
    """The joint distribution of a random program's sites under an intervention.

    :ivar forms: by name of the site.
    """

    def __init__(self, program, intervention):
        sizes = {n: 0 if f is None else len(f) for n, f in program.noises.items()}
        noise = Noise(sum(sizes.values()))
        rows = {n: torch.Size(s).numel() for n, s in program.shapes.items()}
        at = dict(zip(rows, np.cumsum([0, *rows.values()]), strict=False))
        count = sum(rows.values())
        b = np.zeros((count, count), np.longdouble)
        solved = np.zeros((count, 1 + noise.count), np.longdouble)
        for name in program.names:
            mine = slice(at[name], at[name] + rows[name])
            own = noise(sizes[name])
            for parent, weights in program.parents[name].items():
                theirs = slice(at[parent], at[parent] + rows[parent])
                b[mine, theirs] = weights.numpy()
            solved[mine] = noise.const(program.offsets[name].numpy())
            if sizes[name]:
                solved[mine] += program.noises[name].numpy() @ own
        self.forms = {}
        for name, shape in program.shapes.items():
            mine = slice(at[name], at[name] + rows[name])
            # I - B is triangular: forward substitution
            solved[mine] += b[mine] @ solved
            self.forms[name] = solved[mine].copy().reshape((*shape, -1))
            if name in intervention:
                value = torch.as_tensor(intervention[name]).reshape(-1)
                solved[mine] = noise.const(value.numpy())


def is_singular(forms, names):
    """Whether a vector, given what is before it, is certain in some directions only."""
    laws = conditionals(forms, drawn(forms, names, 0))
    return any(0 < law.factor.shape[1] < len(law.factor) for law in laws.values())


def compare(seed):
    program = Program(seed)
    keep, allow, interventions = program.question()
    fused = pm.consolidate(program, keep=keep, allow=allow)
    singular = False
    for under in interventions:
        forms = Reference(program, under).forms
        singular |= is_singular(forms, keep)
        try:
            check(fused, forms, fused.sites, under, seed=seed)
        except pm.UnsupportedLaw:  # no distribution of Pyro is such
            assert is_singular(forms, fused.sites)
    assert list(fused.sites) == keep or (singular and set(keep) < set(fused.sites))


@pytest.mark.parametrize("seed", range(40))
def test_random_program(seed):
    compare(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200))
def test_random_program_more(seed):
    compare(seed)


def test_other_interventions_are_refused():
    for seed in range(10):
        program = Program(seed)
        keep, allow, _ = program.question()
        fused = pm.consolidate(program, keep=keep, allow=allow)
        assert set(keep) <= set(fused.sites)
        for name in set(program.names) - set(fused.sites) - set(allow):
            value = torch.ones(program.shapes[name])
            with pytest.raises(pm.InterventionNotAllowed, match=name):
                do(fused, {name: value})()
            with pytest.raises(pm.PyroMacroError, match=name):
                condition(fused, {name: value})()


def test_natural_value_tells_of_later_sites():
    """As in the program: ``x`` as it would have been shares its cause with ``y``."""

    def model():
        h = pyro.sample("h", dist.Normal(0.0, 2.0))
        x = pyro.sample("x", dist.Normal(h, 1.0))
        pyro.sample("y", dist.Normal(h + 3 * x, 1.0))

    fused = pm.consolidate(model, keep=["x", "y"])
    values = {"x": torch.tensor(5.0), "y": torch.tensor(1.0)}
    run = trace(do(condition(fused, values), {"x": 7.0})).get_trace()
    y = run.nodes["y"]["fn"]
    assert y.mean.item() == pytest.approx(4 / 5 * 5 + 3 * 7)  # h given the natural x
    assert y.variance.item() == pytest.approx(4 - 16 / 5 + 1)


# Vectors that are certain in some directions


SINGULAR = {
    "of a scalar": lambda h: torch.tensor([1.0, 2.0, -1.0]) * h[0],
    "twice the same": lambda h: torch.stack([h[0], h[1], h[0]]),
    "one is a constant": lambda h: torch.cat([h, torch.ones(1)]),
    "their sum": lambda h: torch.stack([h[0], h[1], h[0] + h[1]]),
}


@pytest.mark.parametrize("name", SINGULAR)
def test_singular_vector(name):
    """Draws lie where those of the program do, and what follows is right."""
    function = SINGULAR[name]

    def model():
        h = pyro.sample("h", dist.Normal(torch.ones(2), 2.0).to_event(1))
        v = pyro.deterministic("v", function(h))
        pyro.sample("y", dist.Normal(v.sum() + h[0], 1.0))

    zero = function(torch.zeros(2))
    a = torch.stack([function(row) - zero for row in torch.eye(2)], 1)
    fused = pm.consolidate(model, keep=["v", "y"])
    pyro.set_rng_seed(3)
    draws = torch.stack(
        [trace(fused).get_trace().nodes["v"]["value"] for _ in range(9)]
    )
    inside = torch.linalg.pinv(a) @ (draws - zero).mT
    assert torch.allclose(a @ inside, (draws - zero).mT, atol=1e-9)
    assert draws.std(0)[:1].item() > 0.5
    h = torch.tensor([3.0, -1.0])
    values = {"v": function(h)}
    if "h" in fused.sites:
        values["h"] = h
    y = trace(condition(fused, values)).get_trace().nodes["y"]["fn"]
    assert y.mean.item() == pytest.approx(values["v"].sum().item() + 3.0, rel=1e-8)
    assert y.variance.item() == pytest.approx(1.0, rel=1e-8)


# Plates


class World(Noise):
    """A reference that is written out, one site after the other.

    :param under: the intervention.
    :ivar forms: by name of the site.
    """

    def __init__(self, under=None, count=64):
        super().__init__(count)
        self.under, self.forms = under or {}, {}

    def site(self, name, form):
        """What sites below get."""
        self.forms[name] = form
        if name not in self.under:
            return form
        value = np.asarray(self.under[name], np.longdouble)
        return self.const(np.broadcast_to(value, form.shape[:-1]))


W = torch.tensor([0.5, -1.2, 2.0, 0.7], dtype=torch.float64)
S = torch.tensor([0.1, 1.0, 3.0, 0.4], dtype=torch.float64)
w, s = W.numpy()[:, None], S.numpy()[:, None]
FOUR = torch.tensor([3.0, -2.0, 0.5, 10.0], dtype=torch.float64)


def test_chain_in_a_plate():
    def model():
        top = pyro.sample("top", dist.Normal(1.0, 2.0))
        with pyro.plate("slots", 4):
            a = pyro.sample("a", dist.Normal(W * top + 1, S))
            b = pyro.sample("b", dist.Normal(2 * a - 1, 0.3))
            c = pyro.deterministic("c", b * W)
            y = pyro.sample("y", dist.Normal(c + a, 0.1))
            pyro.sample("z", dist.Normal(y - a, 0.2))

    def reference(under):
        world = World(under)
        top = world.site("top", world.const(1) + 2 * world())
        a = world.site("a", w * top + world.const(1) + s * world(4))
        b = world.site("b", 2 * a - world.const(1) + 0.3 * world(4))
        c = world.site("c", w * b)
        y = world.site("y", c + a + 0.1 * world(4))
        world.site("z", y - a + 0.2 * world(4))
        return world.forms

    interventions = [
        {},
        {"a": FOUR},
        {"a": 2.0},
        {"b": FOUR},
        {"c": FOUR},
        {"a": FOUR, "c": -FOUR},
        {"a": FOUR, "b": 1.5, "c": -FOUR},
        {"top": 5.0},
        {"top": 5.0, "b": FOUR},
        {"y": FOUR},
        {"y": 1.0, "a": FOUR},
    ]
    for keep in (["top", "y", "z"], ["top", "z"], ["top", "c"]):
        fused = pm.consolidate(model, keep=keep, allow=["a", "b", "c", "y"])
        for under in interventions:
            check(fused, reference(under), keep, under)
            assert list(fused.sites) == keep


def test_vectors_in_a_plate():
    a = torch.tensor([[1.0, 0.5], [-2.0, 0.3], [0.1, 1.0]])
    factor = torch.tensor([[1.0, 0.0, 0.0], [0.5, 2.0, 0.0], [-0.3, 0.2, 0.5]])

    def model():
        top = pyro.sample("top", dist.Normal(torch.ones(2), 3.0).to_event(1))
        with pyro.plate("slots", 4):
            h = pyro.sample("h", dist.Normal(W[:, None] * top, 0.5).to_event(1))
            g = pyro.sample("g", dist.MultivariateNormal(h @ a.T, scale_tril=factor))
            pyro.sample("y", dist.Normal(g[..., 0] - g[..., 2] + h[..., 1], S))
            k = dist.Normal(g[..., 1:], S[:, None]).to_event(1)
            pyro.sample("k", k)

    def reference(under):
        world = World(under)
        top = world.site("top", world.const([1, 1]) + 3 * world(2))
        h = world.site("h", w[..., None] * top + 0.5 * world(4, 2))
        g = np.einsum("ij,sjn->sin", a.numpy(), h)
        g = world.site("g", g + np.einsum("ij,sjn->sin", factor.numpy(), world(4, 3)))
        world.site("y", g[:, 0] - g[:, 2] + h[:, 1] + s * world(4))
        world.site("k", g[:, 1:] + s[..., None] * world(4, 2))
        return world.forms

    fused = pm.consolidate(model, keep=["top", "y", "k"], allow=["h", "g"])
    generator = torch.Generator().manual_seed(1)
    h = torch.randn(4, 2, generator=generator)
    g = torch.randn(4, 3, generator=generator)
    for under in (
        {},
        {"h": h},
        {"g": g},
        {"h": h[0]},
        {"h": h, "g": g},
        {"top": h[0]},
        {"top": h[0], "g": g},
    ):
        check(fused, reference(under), fused.sites, under)


SUMS = {
    "sum": (lambda x: x.sum(-1), lambda x: x.sum(0)),
    "mean": (lambda x: x.mean(-1), lambda x: x.sum(0) / 4),
    "weights": (lambda x: x @ W, lambda x: (w * x).sum(0)),
    "some": (lambda x: x[..., 1:3].sum(-1), lambda x: x[1:3].sum(0)),
    "one": (lambda x: x[..., 2], lambda x: x[2]),
}


@pytest.mark.parametrize("name", SUMS)
def test_hidden_plate_summed(name):
    total, expected = SUMS[name]

    def model():
        top = pyro.sample("top", dist.Normal(-1.0, 1.5))
        with pyro.plate("slots", 4):
            x = pyro.sample("x", dist.Normal(W * top, S))
            u = pyro.sample("u", dist.Normal(x, 1.0))
        t = pyro.deterministic("t", total(x))
        y = pyro.sample("y", dist.Normal(2 * t + top, 0.5))
        pyro.sample("z", dist.Normal(y + total(u), 0.25))

    def reference(under):
        world = World(under)
        top = world.site("top", world.const(-1) + 1.5 * world())
        x = world.site("x", w * top + s * world(4))
        u = world.site("u", x + world(4))
        t = world.site("t", expected(x))
        y = world.site("y", 2 * t + top + 0.5 * world())
        world.site("z", y + expected(u) + 0.25 * world())
        return world.forms

    for keep in (["y"], ["top", "y", "z"], ["top", "t", "z"], ["z"]):
        fused = pm.consolidate(model, keep=keep, allow=["x", "u", "t", "top"])
        assert list(fused.sites) == keep
        for under in (
            {},
            {"x": FOUR},
            {"x": 2.0},
            {"u": FOUR},
            {"x": FOUR, "u": -FOUR},
            {"t": 7.0},
            {"top": 2.0},
            {"top": 2.0, "u": FOUR},
        ):
            check(fused, reference(under), keep, under)


def test_kept_sites_inside_and_outside_of_a_plate():
    """Those inside tell, slot by slot, of what is summed outside."""

    def model():
        with pyro.plate("slots", 4):
            x = pyro.sample("x", dist.Normal(W, S))
            pyro.sample("y", dist.Normal(2 * x, 0.5))
        pyro.sample("z", dist.Normal(x @ W, 1.0))

    def reference(under):
        world = World(under)
        x = world.site("x", world.const(W.numpy()) + s * world(4))
        world.site("y", 2 * x + 0.5 * world(4))
        world.site("z", (w * x).sum(0) + world())
        return world.forms

    fused = pm.consolidate(model, keep=["y", "z"], allow=["x"])
    stays = list(fused.sites)
    assert set(stays) in ({"y", "z"}, {"x", "y", "z"})
    for under in ({}, {"x": FOUR}, {"y": FOUR}, {"x": 1.0, "y": FOUR}):
        check(fused, reference(under), stays, under)


def test_hidden_outside_of_a_plate():
    """The slots would not be independent without it: it stays."""

    def model():
        h = pyro.sample("h", dist.Normal(1.0, 2.0))
        g = pyro.sample("g", dist.Normal(3 * h, 0.5))
        with pyro.plate("slots", 4):
            a = pyro.sample("a", dist.Normal(W * g, S))
            pyro.sample("y", dist.Normal(a - 1, 0.1))

    def reference(under):
        world = World(under)
        h = world.site("h", world.const(1) + 2 * world())
        g = world.site("g", 3 * h + 0.5 * world())
        a = world.site("a", w * g + s * world(4))
        world.site("y", a - world.const(1) + 0.1 * world(4))
        return world.forms

    fused = pm.consolidate(model, keep=["y"], allow=["h", "g", "a"])
    assert {"g", "y"} <= set(fused.sites) <= {"h", "g", "y"}
    for under in ({}, {"g": 2.0}, {"h": 2.0}, {"a": FOUR}, {"g": 1.0, "a": FOUR}):
        check(fused, reference(under), fused.sites, under)
    assert list(fused.sites) == ["g", "y"]  # not what only acts through it


def test_plate_into_a_plate():
    """A hidden plate, summed, and what was summed acts inside of another one."""

    def model():
        with pyro.plate("first", 3):
            x = pyro.sample("x", dist.Normal(torch.tensor([1.0, 2.0, 3.0]), 0.5))
        total = pyro.deterministic("total", x.sum())
        with pyro.plate("second", 4):
            a = pyro.sample("a", dist.Normal(W * total, S))
            pyro.sample("y", dist.Normal(a, 1.0))

    def reference(under):
        world = World(under)
        x = world.site("x", world.const([1, 2, 3]) + 0.5 * world(3))
        total = world.site("total", x.sum(0))
        a = world.site("a", w * total + s * world(4))
        world.site("y", a + world(4))
        return world.forms

    fused = pm.consolidate(model, keep=["y"], allow=["x", "a"])
    stays = list(fused.sites)
    assert stays[-1] == "y" and "a" not in stays and len(stays) > 1
    for under in ({}, {"x": torch.tensor([1.0, -5.0, 2.0])}, {"x": 1.0}, {"a": FOUR}):
        check(fused, reference(under), stays, under)


MIXING = {
    "flip": lambda x: x.flip(-1),
    "roll": lambda x: x.roll(1, -1),
    "cumsum": lambda x: x.cumsum(-1),
    "center": lambda x: x - x.mean(-1, keepdim=True),
    "first": lambda x: x + x[..., :1],
    "diff": lambda x: torch.cat([x[..., :1], x.diff()], -1),
}


@pytest.mark.parametrize("name", MIXING)
def test_slots_that_act_on_one_another(name):
    function = MIXING[name]
    matrix = torch.stack([function(row) for row in torch.eye(4)], 1).numpy()

    def model():
        with pyro.plate("slots", 4):
            g = pyro.sample("g", dist.Normal(1.0, S))
            x = pyro.sample("x", dist.Normal(2 * g, S))
            y = pyro.sample("y", dist.Normal(function(x), 0.5))
            pyro.sample("z", dist.Normal(y + x, 0.5))

    def reference(under):
        world = World(under)
        g = world.site("g", world.const(np.ones(4)) + s * world(4))
        x = world.site("x", 2 * g + s * world(4))
        y = world.site("y", matrix @ x + 0.5 * world(4))
        world.site("z", y + x + 0.5 * world(4))
        return world.forms

    for keep in (["y"], ["z"], ["y", "z"]):
        fused = pm.consolidate(model, keep=keep, allow=["x", "g"])
        for under in ({}, {"g": FOUR}, {"x": FOUR}, {"y": FOUR}):
            if not under.keys() <= {"x", "g", *keep}:
                continue
            check(fused, reference(under), fused.sites, under)


def test_nested_plates():
    rows = torch.tensor([[1.0], [-2.0]])  # of the inner plate

    def model():
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with pyro.plate("outer", 4, dim=-1):
            a = pyro.sample("a", dist.Normal(W * top, S))
            b = pyro.sample("b", dist.Normal(a, 0.5))
            with pyro.plate("inner", 2, dim=-2):
                c = pyro.sample("c", dist.Normal(rows * b + 1, S))
                d = pyro.sample("d", dist.Normal(c + a, 0.1))
            pyro.sample("y", dist.Normal(d.sum(0), 1.0))
        pyro.sample("z", dist.Normal(d[0].sum() - d[1, 2], 1.0))

    def reference(under):
        world = World(under)
        top = world.site("top", world())
        a = world.site("a", w * top + s * world(4))
        b = world.site("b", a + 0.5 * world(4))
        c = rows.numpy()[..., None] * b + world.const(1) + s * world(2, 4)
        c = world.site("c", c)
        d = world.site("d", c + a + 0.1 * world(2, 4))
        world.site("y", d.sum(0) + world(4))
        world.site("z", d[0].sum(0) - d[1, 2] + world())
        return world.forms

    eight = torch.stack([FOUR, W])
    allow = ["a", "b", "c", "d"]
    interventions = [
        {},
        {"a": FOUR},
        {"b": FOUR},
        {"c": eight},
        {"c": FOUR},
        {"c": torch.tensor([[1.0], [2.0]])},
        {"d": eight},
        {"a": 1.0, "c": eight},
        {"b": FOUR, "d": 2.0},
    ]
    for keep in (["top", "y"], ["z"], ["top", "z"], ["a", "d"], ["top", "d", "y"]):
        fused = pm.consolidate(model, keep=keep, allow=allow)
        for under in interventions:
            check(fused, reference(under), fused.sites, under)
        if "d" not in keep:
            assert list(fused.sites) == keep


def test_sequential_plate():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        for i in pyro.plate("steps", 4):
            h = pyro.sample(f"h{i}", dist.Normal(2 * x + i, 0.5))
            pyro.sample(f"y{i}", dist.Normal(h - 1, 0.5))

    def reference(under):
        world = World(under)
        x = world.site("x", world())
        for i in range(4):
            h = world.site(f"h{i}", 2 * x + world.const(i) + 0.5 * world())
            world.site(f"y{i}", h - world.const(1) + 0.5 * world())
        return world.forms

    fused = pm.consolidate(model, keep=["y0", "y2", "y3"], allow=["h1", "h2", "x"])
    for under in ({}, {"h2": 1.0}, {"x": 2.0}, {"h2": 1.0, "x": 2.0}, {"y2": 1.0}):
        check(fused, reference(under), ["y0", "y2", "y3"], under)


# Random programs with plates


class Plated:
    """A random program with two plates that cross, of slots with numbers of their own.

    Values are kept as ``(2, 3, elements)``, of size 1 where a site is outside of the
    plates ``q`` and ``p``. Coefficients may depend on ``theta``, outside of them, and
    on ``slot``, in ``p``.
    """

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        self.learned = seed % 3 == 0
        count = rng.randint(3, 9)
        self.names = [f"v{i}" for i in range(count)]
        self.plates, self.sizes, self.kinds, self.parents = {}, {}, {}, {}
        self.offsets, self.scales, self.trained = {}, {}, {}
        for i, name in enumerate(self.names):
            self.plates[name] = rng.choice(["", "p", "p", "q", "qp"])
            self.sizes[name] = rng.choice([None, None, None, 2, 3])
            above = [p for p in self.names[:i] if rng.random() < 2.2 / count]
            kinds = ["normal", "normal", "certain"] if above else ["normal"]
            if self.sizes[name]:
                kinds.append("mvn")
            self.kinds[name] = rng.choice(kinds)
            shape = self.canonical(name)
            self.parents[name] = {p: self._link(p, name) for p in above}
            self.offsets[name] = self._numbers(*shape)
            self.scales[name] = 0.2 + self._numbers(*shape).abs()
            if self.kinds[name] == "mvn":
                lower = self._numbers(shape[2], shape[2]).tril(-1)
                self.scales[name] = lower + torch.diag(0.5 + torch.rand(shape[2]))
            self.trained[name] = rng.choice(["", "", "theta", "slot"])
            if "p" not in self.plates[name] or not self.learned:
                self.trained[name] = self.trained[name].replace("slot", "theta")
            if not self.learned:
                self.trained[name] = ""

    def canonical(self, name):
        q, p = (
            (2 if "q" in self.plates[name] else 1),
            3 if "p" in self.plates[name] else 1,
        )
        return q, p, self.sizes[name] or 1

    def shape(self, name):
        q, p, size = self.canonical(name)
        plates = {"": (), "p": (p,), "q": (q, 1), "qp": (q, p)}[self.plates[name]]
        return plates + ((size,) if self.sizes[name] else ())

    def _numbers(self, *shape):
        count = math.prod(shape)
        return torch.tensor(
            [number(self.rng, -2, 2) for _ in range(count)], dtype=torch.float64
        ).reshape(shape)

    def _link(self, parent, child):
        """What to sum over, how slots are mixed, and weights."""
        q, p, size = self.canonical(child)
        mine, theirs = self.canonical(child), self.canonical(parent)
        over = [d for d in (0, 1) if theirs[d] > mine[d]]
        mixed = None
        if theirs[1] == mine[1] == 3 and self.rng.random() < 0.1:
            mixed = self._numbers(3, 3)
        weights = self._numbers(*theirs[:2], 1)
        matrix_ = self._numbers(size, theirs[2])
        return over, mixed, weights, matrix_, self._numbers(q, p, 1)

    def __call__(self):
        numbers = {"": None}
        p, q = pyro.plate("p", 3, dim=-1), pyro.plate("q", 2, dim=-2)
        if self.learned:
            numbers["theta"] = pyro.sample("theta", dist.Normal(0.0, 1.0))
            with p:
                numbers["slot"] = pyro.sample("slot", dist.Normal(0.0, 1.0))
        values = {}
        for name in self.names:
            mean = self.offsets[name]
            for parent, (over, mixed, weights, a, own) in self.parents[name].items():
                term = values[parent]
                if over:
                    term = (weights * term).sum(over, keepdim=True)
                if mixed is not None:
                    term = torch.einsum("ij,qje->qie", mixed, term)
                term = own * (term @ a.mT)
                mean = mean + term * self._factor(name, numbers)
            mean = mean.expand(self.canonical(name)).reshape(self.shape(name))
            with p if "p" in self.plates[name] else pyro.poutine.block(hide=[]):
                with q if "q" in self.plates[name] else pyro.poutine.block(hide=[]):
                    value = self._site(name, mean)
            values[name] = value.reshape(self.canonical(name))

    def _factor(self, name, numbers):
        factor = numbers[self.trained[name]]
        if factor is None:
            return 1.0
        return torch.cos(factor)[..., None] if factor.dim() else torch.cos(factor)

    def _site(self, name, mean):
        scales, depth = self.scales[name], 1 if self.sizes[name] else 0
        if self.kinds[name] == "certain":
            explicit = {"event_dim": depth} if self.offsets[name].sum() > 0 else {}
            return pyro.deterministic(name, mean, **explicit)
        if self.kinds[name] == "mvn":
            fn = dist.MultivariateNormal(mean, scale_tril=scales)
        else:
            fn = dist.Normal(mean, scales.reshape(self.shape(name))).to_event(depth)
        return pyro.sample(name, fn)

    def reference(self, under, theta, slot):
        world = World(under, 150)
        values = {}
        for name in self.names:
            shape = self.canonical(name)
            mean = world.const(self.offsets[name].numpy())
            for parent, (over, mixed, weights, a, own) in self.parents[name].items():
                term = values[parent]
                if over:
                    term = (weights.numpy()[..., None] * term).sum(
                        tuple(over), keepdims=True
                    )
                if mixed is not None:
                    term = np.einsum("ij,qjen->qien", mixed.numpy(), term)
                term = np.einsum("fe,qpen->qpfn", a.numpy(), term)
                term = own.numpy()[..., None] * term
                if self.trained[name] == "theta":
                    term = term * math.cos(theta)
                elif self.trained[name] == "slot":
                    term = term * torch.cos(slot).numpy()[:, None, None]
                mean = mean + term
            scales = self.scales[name].numpy()
            if self.kinds[name] == "mvn":
                noise = world(*shape)
                mean = mean + np.einsum("fe,qpen->qpfn", scales, noise)
            elif self.kinds[name] == "normal":
                mean = mean + scales[..., None] * world(*shape)
            mean = np.broadcast_to(mean, (*shape, mean.shape[-1]))
            form = mean.reshape((*self.shape(name), mean.shape[-1]))
            values[name] = world.site(name, form).reshape(mean.shape)
        return world.forms


def compare_plated(seed):
    torch.manual_seed(seed)
    program = Plated(seed)
    rng = program.rng
    names = program.names
    keep = sorted(rng.sample(names, rng.randint(1, 3)), key=names.index)
    hidden = [n for n in names if n not in keep]
    allow = rng.sample(hidden, min(3, len(hidden)))
    learned = ["theta", "slot"] if program.learned else []
    fused = pm.consolidate(program, keep=[*learned, *keep], allow=allow)
    wanted = [[], *([n] for n in allow), [rng.choice(keep)], [*allow, rng.choice(keep)]]
    for chosen in wanted:
        under = {n: program._numbers(*program.shape(n)) * 3 for n in chosen}
        theta, slot = torch.tensor(rng.gauss(0, 1)), torch.randn(3)
        forms = program.reference(under, theta.item(), slot)
        emitted = [n for n in fused.sites if n not in learned]
        given = {"theta": theta, "slot": slot} if learned else {}
        try:
            check(fused, forms, emitted, under, seed=seed, given=given)
        except pm.UnsupportedLaw:
            assert is_singular(forms, emitted)


@pytest.mark.parametrize("seed", range(60))
def test_random_plates(seed):
    compare_plated(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 400))
def test_random_plates_more(seed):
    compare_plated(seed)


# Coefficients that are learned


FUNCTIONS = [
    lambda u, k: k * u,
    lambda u, k: k * torch.cos(u),
    lambda u, k: k / (1 + u**2),
    lambda u, k: k * torch.exp(u / 2),
    lambda u, k: k + 0 * u,
]


class Learned:
    """A random program of scalar sites; its numbers are functions of others.

    These are a latent vector, a parameter of Pyro and one of torch, two of each.
    """

    def __init__(self, seed):
        self.rng = rng = random.Random(seed)
        count = rng.randint(4, 9)
        self.names = [f"v{i}" for i in range(count)]
        self.b, self.c, self.s = {}, {}, {}
        for i in range(count):
            self.c[i] = self._coefficient()
            self.s[i] = self._coefficient(scale=True)
            for j in range(i):
                if rng.random() < 2.5 / count or j == i - 1 and seed % 2:
                    self.b[i, j] = self._coefficient()
        self.own = torch.nn.Parameter(torch.tensor([0.4, -0.6]))

    def _coefficient(self, scale=False):
        rng = self.rng
        which = 3 if scale else rng.randrange(len(FUNCTIONS))
        k = rng.uniform(0.2, 2.0) * (1 if scale else rng.choice((-1, 1)))
        return which, rng.randrange(6), k

    def coefficient(self, code, numbers):
        which, place, k = code
        return FUNCTIONS[which](numbers[..., place], k)

    def __call__(self):
        theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        phi = pyro.param("phi", torch.tensor([0.3, -0.5]))
        numbers = torch.cat([theta, phi, self.own], -1)
        values = []
        for i, name in enumerate(self.names):
            mean = self.coefficient(self.c[i], numbers)
            for j in range(i):
                if (i, j) in self.b:
                    mean = mean + self.coefficient(self.b[i, j], numbers) * values[j]
            scale = self.coefficient(self.s[i], numbers)
            values.append(pyro.sample(name, dist.Normal(mean, scale)))

    def marginal(self, numbers, values, under):
        """The log density of some sites, by linear algebra.

        Each site has two rows: what it would be, and what those below it get.
        """
        count = len(self.names)
        b, c = torch.zeros(2 * count, 2 * count), torch.zeros(2 * count)
        s = torch.zeros(2 * count)
        for i, name in enumerate(self.names):
            c[i] = self.coefficient(self.c[i], numbers)
            s[i] = self.coefficient(self.s[i], numbers)
            for j in range(i):
                if (i, j) in self.b:
                    b[i, count + j] = self.coefficient(self.b[i, j], numbers)
            if name in under:
                c[count + i] = under[name]
            else:
                b[count + i, i] = 1.0
        inverse = torch.linalg.inv(torch.eye(2 * count) - b)
        at = [self.names.index(name) for name in values]
        mean, effect = (inverse @ c)[at], (inverse * s)[at]
        law = torch.distributions.MultivariateNormal(mean, effect @ effect.mT)
        return law.log_prob(torch.stack(list(values.values())))


@pytest.mark.parametrize("seed", range(10))
def test_learned_coefficients(seed):
    """The log density, and its derivatives, are those of the exact marginal."""
    program = Learned(seed)
    rng = program.rng
    names = program.names
    keep = sorted(rng.sample(names, rng.randint(1, 3)), key=names.index)
    allow = [n for n in names if n not in keep][:3]
    fused = pm.consolidate(program, keep=["theta", *keep], allow=allow)
    assert list(fused.sites) == ["theta", *keep]
    interventions = [{}, {allow[0]: 1.5}, {n: -2.0 for n in allow}, {keep[0]: 0.5}]
    for under in interventions:
        values = {n: torch.tensor(rng.gauss(0, 2)) for n in keep}
        for _ in range(2):
            theta = torch.tensor([rng.gauss(0, 1), rng.gauss(0, 1)])
            theta.requires_grad_()
            with torch.no_grad():
                pyro.param("phi", torch.tensor([0.3, -0.5])).normal_()
            phi = pyro.param("phi")
            given = {**values, "theta": theta}
            run = trace(do(condition(fused, given), under)).get_trace()
            run.compute_log_prob()
            found = sum(run.nodes[n]["log_prob_sum"] for n in keep)
            numbers = torch.cat([theta, phi, program.own])
            exact = program.marginal(numbers, values, under)
            assert found.item() == pytest.approx(exact.item(), rel=1e-8, abs=1e-8)
            wanted = (theta, phi.unconstrained(), program.own)
            options = {"allow_unused": True, "materialize_grads": True}
            mine = torch.autograd.grad(found, wanted, **options)
            right = torch.autograd.grad(exact, wanted, **options)
            for one, other in zip(mine, right, strict=True):
                tolerance = 1e-8 * float(1 + other.abs().max())
                assert one.tolist() == pytest.approx(
                    other.tolist(), rel=1e-8, abs=tolerance
                )


def test_learned_second_derivatives():
    """As a Laplace approximation needs them."""

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(theta**2, theta.exp()))
        z = pyro.sample("z", dist.Normal(theta * x, 0.5))
        pyro.sample("y", dist.Normal(z - theta, 0.1))

    fused = pm.consolidate(model, keep=["theta", "y"], allow=["x"])

    def found(theta):
        given = {"theta": theta, "y": torch.tensor(0.7)}
        return trace(condition(fused, given)).get_trace().log_prob_sum()

    def exact(theta):
        variance = (theta * theta.exp()) ** 2 + 0.25 + 0.01
        law = torch.distributions.Normal(theta**3 - theta, variance.sqrt())
        prior = torch.distributions.Normal(0.0, 1.0).log_prob(theta)
        return law.log_prob(torch.tensor(0.7)) + prior

    for value in (-1.0, 0.3, 1.2):
        theta = torch.tensor(value)
        mine = torch.func.hessian(exact)(theta)
        right = torch.autograd.functional.hessian(found, theta)
        assert right.item() == pytest.approx(mine.item(), rel=1e-8)


def test_learned_by_slots():
    """Each slot of a plate has a theta of its own, and all have one in common."""

    def model():
        common = pyro.sample("common", dist.Normal(0.0, 1.0))
        with pyro.plate("slots", 4):
            theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
            a = pyro.sample("a", dist.Normal(W, S))
            b = pyro.sample("b", dist.Normal(theta * a, common.exp()))
            pyro.sample("y", dist.Normal(b + common, 0.5))

    fused = pm.consolidate(model, keep=["common", "theta", "y"], allow=["a", "b"])
    assert list(fused.sites) == ["common", "theta", "y"]
    theta, common = FOUR.clone().requires_grad_(), torch.tensor(0.4).requires_grad_()
    values = {"theta": theta, "common": common, "y": W}
    for under in ({}, {"a": FOUR}, {"b": FOUR}, {"a": 2.0, "b": 1.0}):
        mean, variance = theta * W, (theta * S) ** 2 + (2 * common).exp()
        if "a" in under:
            mean, variance = theta * under["a"], (2 * common).exp()
        if "b" in under:
            mean, variance = torch.as_tensor(under["b"]), torch.zeros(4)
        scale = (variance + 0.25).sqrt()
        exact = torch.distributions.Normal(mean + common, scale).log_prob(W).sum()
        run = trace(do(condition(fused, values), under)).get_trace()
        run.compute_log_prob()
        found = run.nodes["y"]["log_prob_sum"]
        assert found.item() == pytest.approx(exact.item(), rel=1e-8)
        options = {"allow_unused": True, "materialize_grads": True}
        mine = torch.autograd.grad(found, (theta, common), **options)
        right = torch.autograd.grad(exact, (theta, common), **options)
        assert mine[0].tolist() == pytest.approx(right[0].tolist(), rel=1e-8)
        assert mine[1].item() == pytest.approx(right[1].item(), rel=1e-8)


def test_learned_vectors():
    """A matrix and a covariance that depend on what is learned."""

    def parts(theta, phi):
        a = torch.stack([torch.stack([theta, phi]), torch.stack([phi**2, -theta])])
        lower = torch.stack([theta.exp(), theta * 0, theta * phi, 1 + phi**2])
        return a, lower.reshape(2, 2)

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        phi = pyro.param("phi", torch.tensor(0.5))
        a, lower = parts(theta, phi)
        x = pyro.sample("x", dist.Normal(torch.ones(2), theta.exp()).to_event(1))
        z = pyro.sample("z", dist.MultivariateNormal(a @ x, scale_tril=lower))
        d = pyro.deterministic("d", a.mT @ z - phi)
        pyro.sample(
            "y", dist.Normal(d, torch.stack([phi.exp(), phi * 0 + 1])).to_event(1)
        )
        pyro.sample("u", dist.Normal(z.sum() + x[0], 0.5))

    fused = pm.consolidate(model, keep=["theta", "y", "u"], allow=["x", "z"])
    assert list(fused.sites) == ["theta", "y", "u"]
    y, u = torch.tensor([1.0, -2.0]), torch.tensor([0.3])
    for value, under in itertools.product((-0.7, 1.1), ({}, {"x": y}, {"z": 3 * y})):
        theta = torch.tensor(value).requires_grad_()
        given = {"theta": theta, "y": y, "u": u[0]}
        run = trace(do(condition(fused, given), under)).get_trace()
        run.compute_log_prob()
        found = run.nodes["y"]["log_prob_sum"] + run.nodes["u"]["log_prob_sum"]
        phi = pyro.param("phi").unconstrained()
        a, lower = parts(theta, phi)
        x, of_x = torch.ones(2), torch.eye(2) * (2 * theta).exp()
        if "x" in under:
            x, of_x = under["x"], torch.zeros(2, 2)
        z, of_z, cross = a @ x, a @ of_x @ a.mT + lower @ lower.mT, a @ of_x
        if "z" in under:
            z, of_z, cross = under["z"], torch.zeros(2, 2), torch.zeros(2, 2)
        both = torch.cat([torch.cat([of_x, cross.mT], 1), torch.cat([cross, of_z], 1)])
        rows = torch.cat([torch.zeros(2, 2), a.mT], 1)
        last = torch.tensor([[1.0, 0.0, 1.0, 1.0]])
        rows = torch.cat([rows, last])
        noise = torch.stack([(2 * phi).exp(), phi * 0 + 1, phi * 0 + 0.25])
        mean = rows @ torch.cat([x, z]) - torch.stack([phi, phi, phi * 0])
        law = torch.distributions.MultivariateNormal(
            mean, rows @ both @ rows.mT + torch.diag(noise)
        )
        exact = law.log_prob(torch.cat([y, u]))
        assert found.item() == pytest.approx(exact.item(), rel=1e-8)
        mine = torch.autograd.grad(found, (theta, phi))
        right = torch.autograd.grad(exact, (theta, phi))
        assert [g.item() for g in mine] == pytest.approx(
            [g.item() for g in right], rel=1e-8
        )


def test_derivatives_of_interventions_and_arguments():
    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        a = pyro.sample("a", dist.Normal(x * theta, 0.5))
        b = pyro.sample("b", dist.Normal(2 * a + x, x.exp()))
        pyro.sample("y", dist.Normal(theta * b, 1.0))

    start = torch.tensor(0.1)
    fused = pm.consolidate(model, keep=["theta", "y"], allow=["a"], model_args=(start,))
    theta, y = torch.tensor(0.8), torch.tensor(-1.0)
    model = condition(fused, {"theta": theta, "y": y})
    x, a = torch.tensor(0.4).requires_grad_(), torch.tensor(1.3).requires_grad_()
    for under in ({}, {"a": a}):
        run = trace(do(model, under)).get_trace(x)
        run.compute_log_prob()
        mean, variance = 2 * x * theta, torch.tensor(1.0)
        if under:
            mean, variance = 2 * a, torch.tensor(0.0)
        variance = theta**2 * (variance + (2 * x).exp()) + 1
        law = torch.distributions.Normal(theta * (mean + x), variance.sqrt())
        options = {"allow_unused": True, "materialize_grads": True}
        found = run.nodes["y"]["log_prob_sum"]
        mine = torch.autograd.grad(found, (x, a), **options)
        right = torch.autograd.grad(law.log_prob(y), (x, a), **options)
        assert [g.item() for g in mine] == pytest.approx(
            [g.item() for g in right], rel=1e-8
        )


def test_theta_that_is_hidden_in_a_product():
    """Not affine in both: one of the two stays."""

    def model():
        theta = pyro.sample("theta", dist.Normal(2.0, 0.5))
        x = pyro.sample("x", dist.Normal(-1.0, 3.0))
        pyro.sample("y", dist.Normal(theta * x, 0.1))

    fused = pm.consolidate(model, keep=["y"])
    stays = set(fused.sites) - {"y"}
    assert stays
    values = {"theta": torch.tensor(1.7), "x": torch.tensor(4.0)}
    values = {name: values[name] for name in stays}
    y = trace(condition(fused, values)).get_trace().nodes["y"]["fn"]
    spread = {"theta": 0.5 * 4.0, "x": 3.0 * 1.7}
    mean = values.get("theta", torch.tensor(2.0)) * values.get("x", torch.tensor(-1.0))
    variance = 0.01 + sum(v**2 for n, v in spread.items() if n not in stays)
    assert y.mean.item() == pytest.approx(mean.item(), rel=1e-8)
    assert y.variance.item() == pytest.approx(variance, rel=1e-8)


# Batches of interventions, and particles


def row_of_particles(under=None):
    """The laws of ``test_particles`` for one particle."""
    world = World(under)
    z = world.site("z", world.const(1) + 2 * world())
    a = world.site("a", 3 * z - world.const(1) + 0.5 * world())
    v = np.array([1.0, -2.0])[:, None] * a + 0.3 * world(2)
    v = world.site("v", v)
    b = world.site("b", v[0] + 2 * v[1] + z + world())
    world.site("y", -b + 0.2 * world())
    return world.forms


def program_of_particles():
    z = pyro.sample("z", dist.Normal(1.0, 2.0))
    a = pyro.sample("a", dist.Normal(3 * z - 1, 0.5))
    mean = torch.tensor([1.0, -2.0]) * a[..., None]
    v = pyro.sample("v", dist.Normal(mean, 0.3).to_event(1))
    b = pyro.sample("b", dist.Normal(v @ torch.tensor([1.0, 2.0]) + z, 1.0))
    return pyro.sample("y", dist.Normal(-b, 0.2))


def particle(value, i, event=()):
    value = torch.as_tensor(value)
    if value.dim() == len(event):
        return value
    return value.reshape((-1, *event))[i]


FIVE = torch.tensor([0.0, 1.0, -2.0, 3.5, 10.0], dtype=torch.float64)


@pytest.mark.parametrize("particles", [True, False])
def test_particles(particles):
    """Each particle is right by itself, with an intervention of its own or not."""
    fused = pm.consolidate(program_of_particles, keep=["z", "y"], allow=["a", "v", "b"])
    events = {"v": (2,)}
    vectors = torch.stack([FIVE, FIVE.flip(0)], -1)
    interventions = [
        {},
        {"a": FIVE},
        {"a": 2.0},
        {"v": vectors},
        {"v": vectors[0]},
        {"b": FIVE},
        {"a": FIVE, "v": vectors},
        {"a": FIVE, "b": 1.0},
        {"z": FIVE},
        {"z": FIVE, "a": -FIVE},
    ]
    values = {"z": FIVE.flip(0) / 3, "y": FIVE * 2 - 30}
    for under in interventions:
        given = {n: v for n, v in values.items() if n not in under}
        model = do(condition(fused, given), under)
        if particles:
            with pyro.plate("particles", 5):
                run = trace(model).get_trace()
        else:
            run = trace(model).get_trace()
        for i in range(5):
            mine = {n: particle(v, i, events.get(n, ())) for n, v in under.items()}
            laws = conditionals(
                row_of_particles(mine), {n: v[i] for n, v in given.items()}
            )
            for name, law in laws.items():
                fn = run.nodes[name]["fn"]
                if particles:
                    assert fn.batch_shape == (5,)
                mean, variance = fn.mean.expand(5)[i], fn.variance.expand(5)[i]
                what = (name, list(under), i)
                assert mean.item() == pytest.approx(law.mean[0], rel=1e-8), what
                wanted = law.factor[0] @ law.factor[0]
                assert variance.item() == pytest.approx(wanted, rel=1e-8), what


def test_particles_are_drawn_apart():
    fused = pm.consolidate(program_of_particles, keep=["z", "y"], allow=["a"])
    with pyro.plate("particles", 20_000):
        run = trace(fused).get_trace()
    z, y = run.nodes["z"]["value"], run.nodes["y"]["value"]
    assert z.shape == y.shape == (20_000,)
    law = conditionals(row_of_particles(), {"z": 0.0, "y": 0.0})["y"]
    forms = row_of_particles()
    exact = (forms["z"][1:] @ forms["y"][1:]) / math.prod(
        np.sqrt(forms[n][1:] @ forms[n][1:]) for n in "zy"
    )
    found = torch.corrcoef(torch.stack([z, y]))[0, 1].item()
    assert found == pytest.approx(float(exact), abs=0.01)
    assert y.std().item() == pytest.approx(float(law.prior[0]), rel=0.03)


def test_particles_around_plates():
    def model():
        top = pyro.sample("top", dist.Normal(1.0, 2.0))
        with pyro.plate("slots", 4, dim=-1):
            a = pyro.sample("a", dist.Normal(W * top, S))
            b = pyro.sample("b", dist.Normal(a - 1, 0.5))
        pyro.sample("y", dist.Normal(b.sum(-1, keepdim=True), 1.0))

    def reference(under):
        world = World(under)
        top = world.site("top", world.const(1) + 2 * world())
        a = world.site("a", w * top + s * world(4))
        b = world.site("b", a - world.const(1) + 0.5 * world(4))
        world.site("y", b.sum(0) + world())
        return world.forms

    fused = pm.consolidate(model, keep=["top", "y"], allow=["a", "b"])
    column = FIVE[:, None]
    for under in ({}, {"a": column}, {"b": column * W}, {"a": FOUR, "b": column * W}):
        values = {"top": column / 2 - 1, "y": column * 2}
        with pyro.plate("particles", 5, dim=-2):
            run = trace(do(condition(fused, values), under)).get_trace()
        for i in range(5):
            mine = {n: v[i] if v.dim() == 2 else v for n, v in under.items()}
            given = {n: v[i, 0] for n, v in values.items()}
            for name, law in conditionals(reference(mine), given).items():
                fn = run.nodes[name]["fn"]
                assert fn.mean.expand(5, 1)[i].item() == pytest.approx(law.mean[0])
                wanted = law.factor[0] @ law.factor[0]
                assert fn.variance.expand(5, 1)[i].item() == pytest.approx(wanted)


def test_particles_take_the_last_dimension():
    """Plates inside, that name no dimension, take what those outside leave."""

    def model():
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        with pyro.plate("slots", 4):
            a = pyro.sample("a", dist.Normal(2 * theta, 0.5))
            b = pyro.sample("b", dist.Normal(theta * a, 0.5))
            pyro.sample("y", dist.Normal(b + 1, 1.0))

    fused = pm.consolidate(model, keep=["theta", "y"], allow=["a"])
    run = trace(fused).get_trace()
    assert run.nodes["y"]["value"].shape == (4,)
    values = {"theta": FIVE / 5}
    column = FOUR[:, None] + FIVE
    for under in ({}, {"a": column}, {"a": FOUR[:, None]}, {"a": FIVE}, {"a": 2.0}):
        with pyro.plate("particles", 5):
            run = trace(do(condition(fused, values), under)).get_trace()
        y, theta = run.nodes["y"]["fn"], FIVE / 5
        mean, variance = 2 * theta**2 + 1, 0.25 * theta**2 + 1.25
        if under:
            mean, variance = theta * under["a"] + 1, torch.tensor(1.25)
        assert run.nodes["y"]["value"].shape == y.batch_shape == (4, 5)
        assert torch.allclose(y.mean, mean.expand(4, 5), rtol=1e-8)
        assert torch.allclose(y.variance, variance.expand(4, 5), rtol=1e-8)


def test_particles_with_a_learned_coefficient():
    def model():
        theta = pyro.sample("theta", dist.Normal(1.0, 0.5))
        x = pyro.sample("x", dist.Normal(2.0, theta.exp()))
        z = pyro.sample("z", dist.Normal(theta * x, 0.5))
        pyro.sample("y", dist.Normal(z - x, 0.1))

    fused = pm.consolidate(model, keep=["theta", "y"], allow=["x", "z"])
    theta, x, z = FIVE / 5, FIVE.flip(0), FIVE + 3
    for under in ({}, {"x": x}, {"z": z}, {"x": x, "z": z}, {"x": 1.0}):
        with pyro.plate("particles", 5):
            run = trace(do(condition(fused, {"theta": theta}), under)).get_trace()
        y = run.nodes["y"]["fn"]
        a, b, noise = theta - 1, torch.tensor(0.0), torch.tensor(0.26)  # y: a x + b
        if "z" in under:
            a, b, noise = torch.full((5,), -1.0), z, torch.tensor(0.01)
        mean, variance = a * 2 + b, (a * theta.exp()) ** 2 + noise
        if "x" in under:
            mean, variance = a * under["x"] + b, noise.expand(5)
        assert y.mean.tolist() == pytest.approx(mean.tolist(), rel=1e-8)
        assert y.variance.expand(5).tolist() == pytest.approx(
            variance.tolist(), rel=1e-8
        )


# Arguments of the model


def test_arguments():
    def model(x, shift=0.0, y=None):
        u = pyro.sample("u", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Normal(x * u + shift, 0.5))
            g = pyro.sample("g", dist.Normal(2 * h, x.abs() + 0.1))
            pyro.sample("y", dist.Normal(g - x, 1.0), obs=y)

    def reference(x, shift, under):
        world, n = World(under), len(x)
        x = x.numpy()
        u = world.site("u", 2 * world())
        h = x[:, None] * u + world.const(np.full(n, shift)) + 0.5 * world(n)
        h = world.site("h", h)
        g = world.site("g", 2 * h + (np.abs(x) + 0.1)[:, None] * world(n))
        world.site("y", g - world.const(x) + world(n))
        return world.forms

    x = torch.tensor([1.0, -2.0])
    fused = pm.consolidate(model, keep=["u", "y"], allow=["h"], model_args=(x,))
    others = [x, -x, torch.tensor([0.3, 4.0, 5.0]), torch.ones(7), torch.zeros(1), x]
    for new, shift in itertools.product(others, (0.0, 1.5, torch.tensor(-2.0))):
        for under in ({}, {"h": 3.0}, {"h": new + 1}):
            forms = reference(new, float(shift), under)
            names = ["u", "y"]
            check(fused, forms, names, under, args=(new, shift))
            # Observed by an argument instead
            values = drawn(forms, names, 1)
            given = {"u": values["u"]}
            model = do(condition(fused, given), under)
            run = trace(model).get_trace(new, shift, y=values["y"])
            run.compute_log_prob()
            assert run.nodes["y"]["is_observed"]
            assert torch.equal(run.nodes["y"]["value"], values["y"])
            law = conditionals(forms, values)["y"]
            agrees(run.nodes["y"], law, values["y"].shape, "y, observed")


def test_arguments_that_are_numbers_and_lists():
    def model(count, numbers, options=None):
        x = pyro.sample("x0", dist.Normal(0.0, 1.0))
        for i in range(count):
            x = pyro.sample(f"x{i + 1}", dist.Normal(numbers[i] * x, 1.0))
        if options is not None:
            x = x * options["factor"] + options["shift"]
        pyro.sample("y", dist.Normal(x, 1.0))

    fused = pm.consolidate(model, keep=["y"], model_args=(2, [1.0, 2.0]))
    cases = [(2, [1.0, 2.0]), (2, [3.0, -1.0]), (3, [1.0, 0.5, 2.0]), (1, [2.0])]
    cases.append((2, [torch.tensor(4.0), 1.0]))
    options = [None, {"factor": 2.0, "shift": 1.0}]
    options.append({"factor": torch.tensor(3.0), "shift": 0.0})
    for (count, numbers), chosen in itertools.product(cases, options):
        variance, mean = 1.0, 0.0
        for number_ in numbers[:count]:
            variance = float(number_) ** 2 * variance + 1
        if chosen is not None:
            mean, variance = chosen["shift"], float(chosen["factor"]) ** 2 * variance
        y = trace(fused).get_trace(count, numbers, chosen).nodes["y"]["fn"]
        assert y.mean.item() == pytest.approx(mean)
        assert y.variance.item() == pytest.approx(variance + 1, rel=1e-8)


def test_observed_in_the_program():
    """An observed site stays, and tells of what is hidden."""
    data = torch.tensor([1.0, 2.0, -1.0])

    def model(obs):
        h = pyro.sample("h", dist.Normal(0.0, 2.0))
        g = pyro.sample("g", dist.Normal(h, 0.5))
        with pyro.plate("data", 3):
            pyro.sample("y", dist.Normal(g, 1.0), obs=obs)
        pyro.sample("z", dist.Normal(h, 0.1))

    def reference(under):
        world = World(under)
        h = world.site("h", 2 * world())
        g = world.site("g", h + 0.5 * world())
        world.site("y", g + world(3))
        world.site("z", h + 0.1 * world())
        return world.forms

    fused = pm.consolidate(model, keep=["z"], allow=["h", "g"], model_args=(data,))
    assert {"y", "z"} < set(fused.sites)  # one outside of the plate stays as well
    for under, obs in itertools.product(({}, {"h": 1.0}, {"g": 1.0}), (data, 5 * data)):
        names = list(fused.sites)
        forms = reference(under)
        values = {**drawn(forms, names, 0), "y": obs}
        given = {n: v for n, v in values.items() if n != "y"}
        run = trace(do(condition(fused, given), under)).get_trace(obs)
        run.compute_log_prob()
        values = {n: values[n] for n in names}
        for name, law in conditionals(forms, values).items():
            agrees(run.nodes[name], law, values[name].shape, name)


# Plates that draw some of their slots


def test_subsampled_plate():
    data = torch.linspace(-1, 2, 10)

    def model():
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        with pyro.plate("slots", 10, subsample_size=4) as index:
            x = data[index]
            h = pyro.sample("h", dist.Normal(x * top, 0.5))
            g = pyro.sample("g", dist.Normal(2 * h, x.exp()))
            pyro.sample("y", dist.Normal(g, 1.0))

    fused = pm.consolidate(model, keep=["top", "y"], allow=["h"])
    assert list(fused.sites) == ["top", "y"]
    seen = set()
    for i, under in enumerate(({}, {"h": 2.0}, {"h": FOUR}, {"top": 3.0}, {})):
        pyro.set_rng_seed(i)
        values = {"top": torch.tensor(0.7), "y": FOUR}
        given = {n: v for n, v in values.items() if n not in under}
        run = trace(do(condition(fused, given), under)).get_trace()
        run.compute_log_prob()
        index = run.nodes["slots"]["value"]
        seen.add(tuple(index.tolist()))
        x, node = data[index], run.nodes["y"]
        top = under.get("top", 0.7)
        mean, variance = 2 * x * top, 1.0 + (2 * x).exp() + torch.zeros(4)
        if "h" in under:
            mean = 2 * torch.as_tensor(under["h"]).expand(4)
        else:
            variance = variance + 1.0
        assert node["fn"].mean.tolist() == pytest.approx(mean.tolist(), rel=1e-8)
        found = node["fn"].variance.tolist()
        assert found == pytest.approx(variance.tolist(), rel=1e-8)
        exact = torch.distributions.Normal(mean, variance.sqrt()).log_prob(FOUR).sum()
        assert node["scale"] == 2.5
        assert node["log_prob_sum"].item() == pytest.approx(2.5 * exact.item())
    assert len(seen) == 5


def test_subsampled_plate_summed():
    """A hidden plate of drawn slots, summed: the sum is of these."""
    data = torch.linspace(-1, 2, 10)

    def model():
        with pyro.plate("slots", 10, subsample_size=4) as index:
            h = pyro.sample("h", dist.Normal(data[index], 0.5))
        pyro.sample("y", dist.Normal(h.sum(), 1.0))

    fused = pm.consolidate(model, keep=["y"], allow=["h"])
    for i in range(4):
        pyro.set_rng_seed(i)
        run = trace(fused).get_trace()
        index, y = run.nodes["slots"]["value"], run.nodes["y"]["fn"]
        if "h" in fused.sites:
            mean, variance = run.nodes["h"]["value"].sum(), 1.0
        else:
            mean, variance = data[index].sum(), 1.0 + 4 * 0.25
        assert y.mean.item() == pytest.approx(mean.item(), rel=1e-8)
        assert y.variance.item() == pytest.approx(variance, rel=1e-8)


# Dtypes


def test_single_precision_stays():
    torch.set_default_dtype(torch.float32)

    def model(x):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(2 * theta, 1.0))
        factor = torch.tensor([[1.0, 0.0], [0.5, 2.0]])
        mean = torch.stack([h, -h])
        v = pyro.sample("v", dist.MultivariateNormal(mean, scale_tril=factor))
        d = pyro.deterministic("d", v * theta)
        with pyro.plate("slots", 3):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("y", dist.Normal(a * theta, 1.0))
        pyro.sample("u", dist.Normal(d, 1.0).to_event(1))
        pyro.sample("z", dist.Normal(a.sum() + d[0], 0.5))

    keep = ["theta", "v", "y", "u", "z"]
    x = torch.tensor([1.0, 2.0, 3.0])
    fused = pm.consolidate(model, keep=keep, allow=["h", "d", "a"], model_args=(x,))
    fewer = pm.consolidate(model, keep=["u", "z"], allow=["h", "a"], model_args=(x,))
    for one in (fused, fewer):
        for under in ({}, {"h": 1.0}, {"a": 2}, {"a": x.double()}, {"h": 1, "a": x}):
            run = trace(do(one, under)).get_trace(x)
            run.compute_log_prob()
            for name, node in run.nodes.items():
                if node["type"] == "sample":
                    assert node["value"].dtype == torch.float32, (name, under)
                    assert node["log_prob"].dtype == torch.float32, (name, under)
    given = {"theta": torch.tensor(0.5)}
    v = trace(condition(fused, given)).get_trace(x).nodes["v"]["fn"]
    assert v.loc.tolist() == pytest.approx([1.0, -1.0])
    wanted = torch.tensor([[2.0, -0.5], [-0.5, 5.25]])
    assert torch.allclose(v.covariance_matrix, wanted)


def test_double_precision_among_single():
    """Sites keep the precision that each of them has."""
    torch.set_default_dtype(torch.float32)

    def model():
        h = pyro.sample("h", dist.Normal(torch.tensor(1.0, dtype=torch.double), 1.0))
        g = pyro.sample("g", dist.Normal(h.float() * 2, 0.5))
        pyro.sample("y", dist.Normal(g.double() + h, torch.ones((), dtype=h.dtype)))
        pyro.sample("z", dist.Normal(g, 1.0))

    fused = pm.consolidate(model, keep=["y", "z"], allow=["h"])
    for under in ({}, {"h": 2.0}):
        run = trace(do(fused, under)).get_trace()
        assert run.nodes["y"]["value"].dtype == torch.float64
        assert run.nodes["z"]["value"].dtype == torch.float32


# Operations


def _written(x):
    out = torch.zeros(3)
    out[0] = x[1] * 2
    out[1] = x.sum()
    out[2] = x[0] - 1
    return out


def _written_over(x):
    out = torch.ones(3)
    out[:] = x
    out[1] = 5.0
    out[2] += out[0]
    return out


def _in_place(x):
    out = x * 2
    out += x.flip(0)
    out.mul_(3).sub_(1)
    return out


def _through_a_view(x):
    out = torch.zeros(2, 3)
    out[1].copy_(x)
    out[0, 1:] += x[:2]
    return out.sum(0)


def _row_of_a_view(x):
    out = torch.zeros(4)
    part = out[1:]
    part += x
    return out[:3] * 2


def _by_index(x):
    out = torch.zeros(3)
    index = torch.tensor([2, 0, 1])
    out[index] = x
    return out[[0, 0, 2]]


def _by_mask(x):
    out = torch.ones(3)
    out[torch.tensor([True, False, True])] = x[:2]
    return out


def _loop(x):
    state, found = x.new_zeros(()), []
    for i in range(3):
        state = 0.5 * state + x[i]
        found.append(state)
    return torch.stack(found)


def _module():
    torch.manual_seed(5)
    inner = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 3))
    return inner


def _normalized():
    """Evaluated, a normalization of batches is affine."""
    norm = torch.nn.BatchNorm1d(3).double().eval()
    norm.running_mean += torch.tensor([1.0, 2.0, -1.0])
    norm.running_var += torch.tensor([1.0, 3.0, 0.5])
    return lambda x: norm(x.unsqueeze(0)).squeeze(0)


def _a():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(3, 3, generator=generator, dtype=torch.float64)


A = _a()
OPERATIONS = {
    "stack": lambda x: torch.stack([x[0], x[2] - x[1], 2 * x[0]]),
    "stack of rows": lambda x: torch.stack([x, -x, x.flip(0)], 1).sum(0),
    "cat": lambda x: torch.cat([x[1:], x[:1] * 3]),
    "cat with constants": lambda x: torch.cat([torch.ones(1), x[:2]]),
    "matmul": lambda x: A @ x,
    "rmatmul": lambda x: x @ A,
    "mv": lambda x: torch.mv(A, x) + A[0],
    "addmv": lambda x: torch.addmv(x, A, x, beta=2, alpha=-1),
    "bmm": lambda x: torch.bmm(A[None], x[None, :, None])[0, :, 0],
    "einsum": lambda x: torch.einsum("i,ij->j", x, A),
    "linear": lambda x: torch.nn.functional.linear(x, A, A[1]),
    "tensordot": lambda x: torch.tensordot(A, x, dims=1),
    "outer": lambda x: torch.outer(x, A[0]).diagonal(),
    "dot": lambda x: torch.dot(x, A[0]) * A[1],
    "index": lambda x: x[[2, 0, 0]],
    "tensor index": lambda x: x[torch.tensor([1, 1, 2])],
    "ellipsis": lambda x: x[None, ..., None].squeeze() - x[-1],
    "unpacked": lambda x: torch.stack([b - a for a, b in zip(x, x.flip(0))]),  # noqa: B905
    "gather": lambda x: x.gather(0, torch.tensor([0, 0, 1])),
    "index_select": lambda x: x.index_select(0, torch.tensor([2, 1, 1])),
    "take": lambda x: torch.take(x, torch.tensor([2, 1, 1])),
    "scatter_add": lambda x: torch.zeros(3).scatter_add(0, torch.tensor([0, 0, 2]), x),
    "index_add": lambda x: torch.ones(3).index_add(0, torch.tensor([2, 2, 0]), x),
    "where of a constant": lambda x: torch.where(A[0] > 0, x, -2 * x),
    "masked_fill": lambda x: x.masked_fill(torch.tensor([True, False, False]), 4.0),
    "tril": lambda x: (torch.tril(A) * x).sum(-1),
    "cumsum": lambda x: x.cumsum(0),
    "diff": lambda x: torch.diff(x, prepend=x.new_zeros(1)),
    "roll": lambda x: x.roll(1, 0) + x.mean(),
    "reshape": lambda x: x.reshape(3, 1).expand(3, 2).reshape(-1)[1:4],
    "repeat": lambda x: x.repeat(2)[2:5] - x.repeat_interleave(2)[:3],
    "permute": lambda x: (x[:, None] * A).permute(1, 0).sum(0),
    "split": lambda x: torch.cat(x.split([1, 2])[::-1]),
    "chunk": lambda x: torch.cat(torch.chunk(x, 3)[::-1]),
    "unbind": lambda x: torch.stack(x.unbind()[::-1]),
    "pad": lambda x: torch.nn.functional.pad(x, (1, 0))[:3],
    "convolution": lambda x: torch.nn.functional.conv1d(
        x[None, None], A[:1, None], padding=1
    )[0, 0],
    "kron": lambda x: torch.kron(x, A[0, :2])[1:4],
    "lerp": lambda x: torch.lerp(x, A[0], 0.3),
    "addcmul": lambda x: torch.addcmul(A[0], x, A[1], value=2),
    "solve": lambda x: torch.linalg.solve(A, x),
    "triangular": lambda x: torch.linalg.solve_triangular(
        torch.tril(A), x[:, None], upper=False
    )[:, 0],
    "fft": lambda x: torch.fft.fft(x).real,
    "diag": lambda x: torch.diag(x) @ A[0],
    "numbers on the left": lambda x: 1 - (3 - x) / 2,
    "double": lambda x: x.float().double() * 2 if False else x.to(torch.float64),
    "written": _written,
    "written over": _written_over,
    "in place": _in_place,
    "through a view": _through_a_view,
    "row of a view": _row_of_a_view,
    "by index": _by_index,
    "by mask": _by_mask,
    "loop": _loop,
}
COMMON = {  # that have to be fused
    "stack",
    "cat",
    "matmul",
    "rmatmul",
    "mv",
    "einsum",
    "linear",
    "dot",
    "index",
    "cumsum",
    "where of a constant",
    "written",
    "in place",
    "by index",
    "loop",
    "numbers on the left",
    "tensor index",
    "reshape",
    "unbind",
}


def matrix_of(function):
    """An affine function's matrix and offset, by brute force."""
    with torch.no_grad():
        offset = function(torch.zeros(3))
        columns = [function(row) - offset for row in torch.eye(3)]
    return torch.stack(columns, -1).numpy(), offset.numpy()


def compare_operation(function, name=""):
    """A chain through a vector, on which an operation acts twice."""

    def model():
        top = pyro.sample("top", dist.Normal(0.5, 2.0))
        x = pyro.sample("x", dist.Normal(top * W[:3], S[:3]).to_event(1))
        d = pyro.deterministic("d", function(x))
        z = pyro.sample("z", dist.Normal(function(d) - x, 0.3).to_event(1))
        pyro.sample("y", dist.Normal(z.sum() + d[1], 1.0))

    a, offset = matrix_of(function)

    def reference(under):
        world = World(under)
        top = world.site("top", world.const(0.5) + 2 * world())
        x = world.site("x", w[:3] * top + s[:3] * world(3))
        d = world.site("d", a @ x + world.const(offset))
        z = a @ d + world.const(offset) - x + 0.3 * world(3)
        z = world.site("z", z)
        world.site("y", z.sum(0) + d[1] + world())
        return world.forms

    for keep in (["y"], ["top", "z", "y"]):
        fused = pm.consolidate(model, keep=keep, allow=["x", "d", "z"])
        assert set(keep) <= set(fused.sites)
        if name in COMMON:
            assert list(fused.sites) == keep
        for under in ({}, {"x": FOUR[:3]}, {"d": FOUR[1:]}, {"x": W[:3], "z": W[1:]}):
            check(fused, reference(under), fused.sites, under)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operation(name):
    compare_operation(OPERATIONS[name], name)


@pytest.mark.parametrize("made", [_module, _normalized])
def test_module(made):
    compare_operation(made())


def test_module_that_is_trained():
    """The fused program has the weights of the module as they are now."""
    module = _module()

    def model():
        x = pyro.sample("x", dist.Normal(torch.ones(3), 2.0).to_event(1))
        h = pyro.sample("h", dist.Normal(module(x), 0.5).to_event(1))
        pyro.sample("y", dist.Normal(h.sum(), 1.0))

    fused = pm.consolidate(model, keep=["y"], allow=["x"])
    assert list(fused.sites) == ["y"]
    value = torch.tensor(2.0)
    weights = list(module.parameters())
    for step in range(3):
        for under in ({}, {"x": FOUR[:3]}):
            one, two = module
            row = (two.weight @ one.weight).sum(0)
            shift = (two.weight @ one.bias + two.bias).sum()
            mean, variance = row.sum() + shift, 4 * (row**2).sum() + 0.75 + 1
            if under:
                mean, variance = row @ FOUR[:3] + shift, torch.tensor(1.75)
            exact = torch.distributions.Normal(mean, variance.sqrt()).log_prob(value)
            run = trace(do(condition(fused, {"y": value}), under)).get_trace()
            run.compute_log_prob()
            found = run.nodes["y"]["log_prob"]
            assert found.item() == pytest.approx(exact.item(), rel=1e-8), step
            mine = torch.autograd.grad(found, weights)
            right = torch.autograd.grad(exact, weights)
            for a, b in zip(mine, right, strict=True):
                assert torch.allclose(a, b, rtol=1e-8, atol=1e-10)
        with torch.no_grad():
            for weight in weights:
                weight += 0.3 * torch.randn_like(weight)


def test_pyro_module():
    class Regression(pyro.nn.PyroModule):
        def __init__(self):
            super().__init__()
            self.linear = pyro.nn.PyroModule[torch.nn.Linear](1, 2)
            self.linear.weight = pyro.nn.PyroSample(
                dist.Normal(0.0, 1.0).expand([2, 1]).to_event(2)
            )
            self.gain = pyro.nn.PyroParam(torch.tensor(1.5))

        def forward(self, x):
            mean = self.linear(x)
            with pyro.plate("data", len(x)):
                h = pyro.sample("h", dist.Normal(mean, 0.5).to_event(1))
                return pyro.sample("y", dist.Normal(self.gain * h.sum(-1), 1.0))

    module, x = Regression(), torch.tensor([[1.0], [-2.0], [3.0]])
    keep = ["linear.weight", "y"]
    fused = pm.consolidate(module, keep=keep, allow=["h"], model_args=(x,))
    assert list(fused.sites) == keep
    weight = torch.tensor([[0.7], [-1.1]])
    for gain in (1.5, -2.0):
        with torch.no_grad():
            module.gain.fill_(gain)
        for new in (x, x[:2] * 2):
            run = trace(condition(fused, {"linear.weight": weight})).get_trace(new)
            h = new @ weight.mT + module.linear.bias
            y = run.nodes["y"]["fn"]
            mean, variance = gain * h.sum(-1), gain**2 * 0.5 + 1.0
            assert y.mean.tolist() == pytest.approx(mean.tolist(), rel=1e-8)
            assert y.variance.expand(len(new)).tolist() == pytest.approx(
                [variance] * len(new), rel=1e-8
            )


# What cannot be taken apart


def branches(x):
    return 2 * x if x > 0 else x - 10


NONLINEAR = {
    "branch": branches,
    "branch far away": lambda x: x if x < 40 else x + 100,
    "item": lambda x: torch.tensor(x.item() * 2 + 1),
    "float": lambda x: float(x) * 2.0,
    "tolist": lambda x: torch.tensor([x.tolist()]).sum() * 3,
    "numpy": lambda x: torch.as_tensor(x.detach().numpy() * 2.0),
    "detached": lambda x: x.detach() * 2 + 1,
    "data": lambda x: x.data * 2 + 1,
    "half detached": lambda x: x + x.detach(),
    "cloned": lambda x: x.clone().detach() + x,
    "square": lambda x: x**2,
    "sine": lambda x: torch.sin(x),
    "nearly affine": lambda x: x + 1e-5 * x**3,
    "exp": lambda x: (x / 5).exp(),
    "abs": lambda x: x.abs(),
    "relu": lambda x: torch.relu(x),
    "relu far away": lambda x: x + torch.relu(x - 1000),
    "clamp": lambda x: x.clamp(-50, 50),
    "clamp far away": lambda x: x.clamp(max=1e6),
    "maximum": lambda x: torch.maximum(x, torch.tensor(-1.0)),
    "where": lambda x: torch.where(x > 0, x, 3 * x),
    "where far away": lambda x: torch.where(x > 500.0, -x, x),
    "multiplied by a truth value": lambda x: x * (x > 20),
    "heaviside": lambda x: torch.heaviside(x - 30, torch.tensor(0.5)),
    "hinge loss": lambda x: torch.nn.functional.softshrink(x, 0.5),
    "round": lambda x: torch.round(x),
    "floor division": lambda x: x // 1,
    "remainder": lambda x: x % 7,
    "integer": lambda x: x.long().to(x.dtype),
    "single precision": lambda x: x.float().double() * 3.3,
    "bucketize": lambda x: torch.bucketize(x, torch.tensor([0.0, 60.0])) + x,
    "searchsorted": lambda x: torch.searchsorted(torch.tensor([0.0, 60.0]), x) + x,
    "softplus far away": lambda x: x + torch.nn.functional.softplus(x - 60),
    "sigmoid far away": lambda x: x + 100 * torch.sigmoid(9 * (x - 60)),
    "tanh far away": lambda x: x + torch.tanh(50 * (x - 60)),
    "erf far away": lambda x: x - torch.erf(9 * (x + 60)),
    "exp far away": lambda x: x + torch.exp(x - 80),
    "bump far away": lambda x: x + 50 * torch.exp(-((x - 60) ** 2)),
    "logaddexp": lambda x: torch.logaddexp(x, torch.tensor(55.0)),
    "softmax far away": lambda x: (
        torch.softmax(torch.stack([x, torch.tensor(50.0)]), 0)[0] + x
    ),
}


@pytest.mark.parametrize("name", NONLINEAR)
def test_nonlinear_site(name):
    """Whatever of it is fused, what is left is right: everywhere, by intervention."""
    function = NONLINEAR[name]

    def model():
        a = pyro.sample("a", dist.Normal(1.0, 2.0))
        x = pyro.sample("x", dist.Normal(3 * a, 1.0))
        f = pyro.sample("f", dist.Normal(function(x), 0.5))
        g = pyro.sample("g", dist.Normal(2 * f, 0.5))
        pyro.sample("y", dist.Normal(g - 1, 0.1))

    fused = pm.consolidate(model, keep=["y"], allow=["x", "f"])
    grid = [0.0, 0.3, -0.3, 2.5, -7.6, 33.0, 61.0, -61.0, 90.0, 600.0, -1e3, 2e3]
    with torch.no_grad():
        values = {x: float(function(torch.tensor(x))) for x in grid}
    for x, image in values.items():
        run = trace(do(fused, {"x": torch.tensor(x)})).get_trace()
        mean, variance = 2 * image - 1, 4 * 0.25 + 0.25 + 0.01
        if "f" in run.nodes:
            mean, variance = 2 * run.nodes["f"]["value"].item() - 1, 0.26
        if "g" in run.nodes:
            mean, variance = run.nodes["g"]["value"].item() - 1, 0.01
        y = run.nodes["y"]["fn"]
        assert y.mean.item() == pytest.approx(mean, rel=1e-8, abs=1e-8), x
        assert y.variance.item() == pytest.approx(variance, rel=1e-8), x
        if "x" in fused.sites and "f" in run.nodes:
            f = run.nodes["f"]["fn"]
            assert f.mean.item() == pytest.approx(image, rel=1e-8, abs=1e-8), x
        run = trace(do(fused, {"f": torch.tensor(x)})).get_trace()
        if "g" not in run.nodes:
            y = run.nodes["y"]["fn"]
            assert y.mean.item() == pytest.approx(2 * x - 1, rel=1e-8, abs=1e-8)
            assert y.variance.item() == pytest.approx(0.26, rel=1e-8)


@pytest.mark.parametrize("name", ["square", "relu", "branch", "exp", "item"])
def test_nonlinear_site_by_draws(name):
    """Without an intervention: the distribution function of draws."""
    function = NONLINEAR[name]

    def model():
        a = pyro.sample("a", dist.Normal(0.2, 0.5))
        x = pyro.sample("x", dist.Normal(a, 1.0))
        f = pyro.sample("f", dist.Normal(function(x), 0.5))
        pyro.sample("y", dist.Normal(2 * f, 0.5))

    fused = pm.consolidate(model, keep=["y"])
    found, right = (
        torch.stack([trace(p).get_trace().nodes["y"]["value"] for _ in range(400)])
        for p in (fused, model)
    )
    both = torch.cat([found, right]).sort().values
    below = torch.searchsorted(found.sort().values, both, right=True) / 400
    there = torch.searchsorted(right.sort().values, both, right=True) / 400
    # Kolmogorov and Smirnov: exceeded once in 10,000 times
    assert (below - there).abs().max().item() < 2.23 * math.sqrt(2 / 400)


HIDDEN = {
    "randn": lambda: torch.randn(()),
    "rand": lambda: 10 * torch.rand(()),
    "normal_": lambda: torch.zeros(()).normal_(),
    "distribution": lambda: torch.distributions.Normal(0.0, 1.0).sample(),
    "pyro distribution": lambda: dist.Gamma(2.0, 1.0)(),
    "multinomial": lambda: torch.multinomial(torch.ones(9), 1)[0],
    "randperm": lambda: torch.randperm(9)[0],
    "a rare event": lambda: torch.bernoulli(torch.tensor(0.1)) * 50,
    "a rare branch": lambda: 50.0 if torch.rand(()) < 0.1 else 0.0,
    "of Python": lambda: random.gauss(0, 1),
    "of numpy": lambda: np.random.normal(),
    "a rare event of Python": lambda: 50.0 * (random.random() < 0.1),
    "a rare event of numpy": lambda: 50.0 * float(np.random.rand() < 0.1),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_randomness(name):
    """What a program draws by itself is drawn afresh in each run."""
    function = HIDDEN[name]
    random.seed(1)
    np.random.seed(1)

    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(2 * x + function(), 1e-3))
        pyro.sample("y", dist.Normal(h, 1e-3))

    fused = pm.consolidate(model, keep=["x", "y"])
    given = condition(fused, {"x": torch.tensor(0.0)})
    draws = [trace(given).get_trace().nodes["y"]["value"].item() for _ in range(150)]
    shifts = [float(function()) for _ in range(150)]
    assert len({round(d) for d in draws}) > 1
    both = np.sort(np.concatenate([draws, shifts])) + 0.1  # far from any atom
    below = np.searchsorted(np.sort(draws), both) / 150
    there = np.searchsorted(np.sort(shifts), both) / 150
    assert np.abs(below - there).max() < 2.23 * math.sqrt(2 / 150)


def test_dropout():
    """A vector of which parts are dropped, by chance."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.ones(4), 1e-3).to_event(1))
        h = torch.nn.functional.dropout(x, 0.5)
        pyro.sample("y", dist.Normal(h.sum(), 1e-3))

    fused = pm.consolidate(model, keep=["y"])
    draws = {
        round(trace(fused).get_trace().nodes["y"]["value"].item()) for _ in "x" * 60
    }
    assert draws == {0, 2, 4, 6, 8}


def test_a_number_that_changes_from_run_to_run():
    """A program with a memory is no function of its sites."""
    calls = []

    def model():
        calls.append(1)
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(x + len(calls), 1.0))
        pyro.sample("y", dist.Normal(h, 1.0))

    fused = pm.consolidate(model, keep=["x", "y"])
    given = condition(fused, {"x": torch.tensor(0.0)})
    for _ in range(3):
        before = len(calls)
        run = trace(given).get_trace()
        if "h" in run.nodes:
            mean, variance = run.nodes["h"]["value"].item(), 1.0
        else:
            mean, variance = before + 1, 2.0
        y = run.nodes["y"]["fn"]
        assert y.mean.item() == pytest.approx(mean, rel=1e-8)
        assert y.variance.item() == pytest.approx(variance, rel=1e-8)


def test_sites_that_depend_on_values():
    def model():
        x = pyro.sample("x", dist.Normal(0.0, 1.0))
        mean = x
        for i in range(1 + int(x.item() > 0)):
            mean = pyro.sample(f"h{i}", dist.Normal(mean + 1, 0.5))
        pyro.sample("y", dist.Normal(mean, 1.0))

    fused = pm.consolidate(model, keep=["x", "y"])
    counts = set()
    for value in (-1.0, 1.0, -2.0, 0.5):
        run = trace(condition(fused, {"x": torch.tensor(value)})).get_trace()
        hidden = sorted(n for n in run.nodes if n.startswith("h"))
        counts.add(len(hidden))
        if hidden:
            assert len(hidden) == 1 + (value > 0)
            mean, variance = run.nodes[hidden[-1]]["value"].item(), 1.0
        else:
            steps = 1 + (value > 0)
            mean, variance = value + steps, 1.0 + 0.25 * steps
        y = run.nodes["y"]["fn"]
        assert y.mean.item() == pytest.approx(mean, rel=1e-8)
        assert y.variance.item() == pytest.approx(variance, rel=1e-8)
    assert counts in ({0}, {1, 2})


LAWS = {
    "scale": lambda x: dist.Normal(1.0, 0.5 + x**2),
    "affine scale": lambda x: dist.Normal(x, 0.5 * (x - x) + 2 + 0.1 * x.abs()),
    "both": lambda x: dist.Normal(x, x.exp()),
    "log-normal": lambda x: dist.LogNormal(x, 1.0),
    "Student": lambda x: dist.StudentT(5.0, x, 1.0),
    "Cauchy": lambda x: dist.Cauchy(x, 1.0),
    "Laplace": lambda x: dist.Laplace(x, 1.0),
    "Bernoulli": lambda x: dist.Bernoulli(logits=x),
    "Poisson": lambda x: dist.Poisson(x.exp()),
    "transformed": lambda x: dist.TransformedDistribution(
        dist.Normal(x, 1.0), [dist.transforms.AffineTransform(1.0, 2.0)]
    ),
    "half-normal": lambda x: dist.HalfNormal(1.0 + x**2),
    "uniform": lambda x: dist.Uniform(x, x + 2.0, validate_args=False),
    "mixture": lambda x: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])),
        dist.Normal(torch.stack([x, -x]), 1.0),
    ),
}


@pytest.mark.parametrize("name", LAWS)
def test_law_that_is_not_affine(name):
    """By quadrature: the law of ``y``, with whatever else is emitted."""
    law = LAWS[name]

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 0.5))
        x = pyro.sample("x", dist.Normal(a + 0.3, 0.4))
        pyro.sample("y", law(x))

    fused = pm.consolidate(model, keep=["y"], allow=["a", "x"])
    grid = torch.linspace(-6, 6, 4001)
    y = torch.tensor(1.0)
    for under in ({}, {"a": 0.7}, {"x": -0.4}):
        run = trace(do(fused, under)).get_trace()
        mean, variance = 0.3 + under.get("a", 0.0), 0.16 + 0.25 * ("a" not in under)
        if "x" in under:
            expected = law(torch.tensor(-0.4)).log_prob(y)
        elif "x" in run.nodes:
            expected = law(run.nodes["x"]["value"]).log_prob(y)
        else:
            if "a" in run.nodes and "a" not in under:
                mean, variance = run.nodes["a"]["value"] + 0.3, 0.16
            prior = torch.distributions.Normal(mean, variance**0.5).log_prob(grid)
            each = torch.stack([law(x).log_prob(y) for x in grid[::4]])
            expected = torch.logsumexp(each + prior[::4], 0) + math.log(4 * 12 / 4000)
        found = run.nodes["y"]["fn"].log_prob(y)
        assert found.item() == pytest.approx(expected.item(), rel=1e-8), under


def test_density_that_counts_otherwise():
    """Masked, scaled and with a factor: the joint density is that of the program."""

    def model():
        a = pyro.sample("a", dist.Normal(1.0, 1.0))
        x = pyro.sample("x", dist.Normal(a, 1.0))
        with pyro.poutine.mask(mask=torch.tensor(False)):
            m = pyro.sample("m", dist.Normal(x, 0.5))
        with pyro.poutine.scale(scale=3.0):
            u = pyro.sample("u", dist.Normal(m, 0.7))
        pyro.factor("f", -0.3 * x**2)
        pyro.sample("y", dist.Normal(u + a, 1.0))

    fused = pm.consolidate(model, keep=["y"])
    for seed in range(5):
        pyro.set_rng_seed(seed)
        run = trace(fused).get_trace()
        stays = {n for n, v in run.nodes.items() if v["type"] == "sample"}
        assert {"x", "m", "u", "f", "y"} <= stays
        values = {n: run.nodes[n]["value"] for n in stays - {"f"}}
        if "a" in stays:
            right = trace(condition(model, values)).get_trace().log_prob_sum()
        else:
            x, m, u, y = (values[n] for n in "xmuy")
            normal = torch.distributions.Normal
            # a given x, and y of both
            right = normal(1.0, math.sqrt(2)).log_prob(x) - 0.3 * x**2
            right = right + 3 * normal(m, 0.7).log_prob(u)
            right = right + normal(u + (1 + x) / 2, math.sqrt(1.5)).log_prob(y)
        assert run.log_prob_sum().item() == pytest.approx(right.item(), rel=1e-8)
