# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Draws are made in place, and nobody notices: derivatives, transforms, tensors."""

import gc
import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm
from pyro_macro.laws.gaussian.covariance import (
    Blocks,
    Dense,
    Diagonal,
    Explained,
    Shared,
    add_product,
    may_overwrite,
)
from pyro_macro.laws.gaussian.fibre import NaturalNormal, ResidualNormal
from pyro_macro.laws.gaussian.inhibiting import LeverNormal, Stretch, StretchedNormal

K, SEED = 4, 3


def parameters(seed=0):
    """Leaves, and numbers that all formulas below are smooth at."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    return {
        "loc": normal(K),
        "variance": 0.5 + torch.rand(K, generator=generator),
        "lower": torch.eye(K) + 0.3 * normal(K, K).tril(),
        "pair": torch.eye(2) + 0.3 * normal(2, 2, 2).tril(),  # (slots, 2, 2)
        "factor": 0.3 * normal(K, 2),
        "weights": torch.tensor([[1.0, 2.0, -1.0, 0.5]]),
        "value": torch.tensor([[[3.0]], [[4.0]], [[6.0]]]),  # (3, 1, m)
    }


# -- The same by hand --------------------------------------------------------------
#
# A centred draw and the matrix itself, from the parameters and from noise.


def column(matrix, vector):
    return torch.einsum("ij,...j->...i", matrix, vector)


def diagonal(p, noise):
    return p["variance"].sqrt() * noise, torch.diag(p["variance"])


def dense(p, noise):
    return column(p["lower"], noise), p["lower"] @ p["lower"].T


def shared(p, noise):
    own, few = noise.split([K, 2], -1)
    matrix = torch.diag(p["variance"]) + p["factor"] @ p["factor"].T
    return p["variance"].sqrt() * own + column(p["factor"], few), matrix


def explained(p, noise):
    own, few = noise.split([K, 2], -1)
    draw, factor = p["variance"].sqrt() * own, p["factor"]
    solved = factor / p["variance"].unsqueeze(-1)
    rest = torch.linalg.cholesky(torch.eye(2) - factor.T @ solved)
    known = column(solved.T, draw) + column(rest, few)
    matrix = torch.diag(p["variance"]) - factor @ factor.T
    return draw - column(factor, known), matrix


def blocks(p, noise):
    """Two slots of two elements each, in turn: 0 and 2, 1 and 3."""
    part = noise.unflatten(-1, (2, 2))
    draw = torch.einsum("sij,...sj->...is", p["pair"], part).flatten(-2)
    small = p["pair"] @ p["pair"].mT
    slots = torch.eye(2)
    matrix = torch.einsum("sij,st->isjt", small, slots).reshape(K, K)
    return draw, matrix


COVARIANCES = {
    "diagonal": (lambda p: Diagonal(p["variance"]), diagonal),
    "dense": (lambda p: Dense(p["lower"]), dense),
    "shared": (lambda p: Shared(Diagonal(p["variance"]), p["factor"]), shared),
    "explained": (lambda p: Explained(Diagonal(p["variance"]), p["factor"]), explained),
    "blocks": (lambda p: Blocks(Dense(p["pair"]), 2, 2, 1), blocks),
}
USED = {
    "diagonal": ["variance"],
    "dense": ["lower"],
    "shared": ["variance", "factor"],
    "explained": ["variance", "factor"],
    "blocks": ["pair"],
}


def natural_gain(p, matrix):
    rows = p["weights"]
    return matrix @ rows.T @ torch.linalg.inv(rows @ matrix @ rows.T)


def residual_gain(p, matrix):
    gain = torch.zeros(K, 1)
    gain[1] = 1.0
    return gain / p["weights"][0, 1]


def lever_gain(p, matrix):
    """By the covariance of elements 0 and 3 given the others."""
    levers = [0, 3]
    within = torch.linalg.inv(torch.linalg.inv(matrix)[levers][:, levers])
    own = p["weights"][:, levers]
    small = within @ own.T @ torch.linalg.inv(own @ within @ own.T)
    return torch.eye(K)[:, levers] @ small


def put_onto(p, x, gain):
    miss = p["value"] - column(p["weights"], x)
    return x + torch.einsum("ij,...j->...i", gain, miss)


ALPHA = torch.tensor([1.0, -0.5, 2.0, 0.3], dtype=torch.float64)
DIRECTION = torch.tensor([0.5, 0.0, 0.8, 0.6], dtype=torch.float64)  # weights: 0
FACTOR, SHIFT = 1.7, -0.4


def stretch():
    factor, shift = torch.tensor(FACTOR), torch.tensor(SHIFT)
    return Stretch(ALPHA, DIRECTION, factor, shift)


def stretched(p, x, matrix):
    gain = natural_gain(p, matrix)
    before, centre = put_onto(p, x, gain), put_onto(p, p["loc"], gain)
    along = (before - centre) @ ALPHA
    step = DIRECTION / DIRECTION.square().sum()
    return before + ((FACTOR - 1) * along + SHIFT).unsqueeze(-1) * step


def on(gain):
    return lambda p, x, matrix: put_onto(p, x, gain(p, matrix))


PIVOT, ABSORB, LEVERS = torch.tensor([3]), torch.tensor([1]), torch.tensor([0, 3])


def natural_law(p, covariance):
    return NaturalNormal(p["loc"], covariance, p["weights"], p["value"], PIVOT)


def residual_law(p, covariance):
    return ResidualNormal(
        p["loc"], covariance, p["weights"], p["value"], PIVOT, absorb=ABSORB
    )


def lever_law(p, covariance):
    return LeverNormal(
        p["loc"], covariance, p["weights"], p["value"], PIVOT, levers=LEVERS
    )


LAWS = {
    "natural": (natural_law, on(natural_gain)),
    "residual": (residual_law, on(residual_gain)),
    "levers": (lever_law, on(lever_gain)),
    "stretched": (
        lambda p, c: StretchedNormal(natural_law(p, c), stretch()),
        stretched,
    ),
}
SHAPE = (5,)  # of samples


def drawn(kind, law, p):
    torch.manual_seed(SEED)
    return LAWS[law][0](p, COVARIANCES[kind][0](p)).rsample(SHAPE)


def by_hand(kind, law, p):
    size = COVARIANCES[kind][0](p).noise_size
    torch.manual_seed(SEED)
    noise = torch.randn(*SHAPE, 3, 1, size)
    draw, matrix = COVARIANCES[kind][1](p, noise)
    return LAWS[law][1](p, p["loc"] + draw, matrix)


def derivatives(make, p, names):
    """Of a curved function of the draw, the first ones, and the second along one."""
    leaves = {n: p[n].clone().requires_grad_() for n in names}
    draw = make({**p, **leaves})
    weights = torch.linspace(-1, 1, draw.numel()).reshape(draw.shape)
    result = (weights * draw.sin()).sum()
    first = torch.autograd.grad(
        result, list(leaves.values()), create_graph=True, materialize_grads=True
    )
    along = sum((g * (g.detach() + 1)).sum() for g in first)
    second = torch.autograd.grad(
        along, list(leaves.values()), materialize_grads=True, allow_unused=True
    )
    return draw.detach(), [g.detach() for g in first], list(second)


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("law", LAWS)
def test_derivatives_are_those_of_the_formula(kind, law):
    """Of each parameter by itself, and of all at once: the first and the second."""
    p = parameters()
    names = ["loc", *USED[kind], "weights", "value"]
    if law == "stretched":
        names.remove("weights")  # the direction depends on them
    for some in [*([n] for n in names), names]:
        draw, first, second = derivatives(lambda q: drawn(kind, law, q), p, some)
        expected = derivatives(lambda q: by_hand(kind, law, q), p, some)
        torch.testing.assert_close(draw, expected[0])
        torch.testing.assert_close(first, expected[1])
        torch.testing.assert_close(second, expected[2], rtol=1e-6, atol=1e-7)
        assert all(bool((g != 0).any()) for g in first) or law == "residual"


@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("law", LAWS)
def test_draws_are_the_same_with_and_without_derivatives(kind, law):
    """In place (no derivatives, ``no_grad``, ``inference_mode``), and out of place."""
    p = parameters()
    leaves = {n: t.clone().requires_grad_() for n, t in p.items()}
    versions = {n: t._version for n, t in leaves.items()}
    expected = drawn(kind, law, leaves)
    assert expected.requires_grad
    plain = drawn(kind, law, p)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, expected.detach(), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        unseen = drawn(kind, law, leaves)
    assert not unseen.requires_grad
    torch.testing.assert_close(unseen, plain, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        quick = drawn(kind, law, p)
    torch.testing.assert_close(quick.clone(), plain, rtol=1e-12, atol=1e-12)
    assert {n: t._version for n, t in leaves.items()} == versions
    for n, t in leaves.items():
        assert torch.equal(t, p[n])


def test_a_law_made_with_derivatives_is_drawn_from_without_and_again_with():
    """What was drawn in place belongs to no graph, and breaks none."""
    p = parameters()
    loc = p["loc"].clone().requires_grad_()
    law = natural_law({**p, "loc": loc}, Diagonal(p["variance"]))
    first = law.rsample(SHAPE)
    with torch.no_grad():
        law.rsample(SHAPE)
        law.sample(SHAPE)
    second = law.rsample(SHAPE)
    (gradient,) = torch.autograd.grad((first + second).sum(), loc)
    gain = natural_gain(p, torch.diag(p["variance"]))
    linear = torch.eye(K) - gain @ p["weights"]
    expected = 2 * 5 * 3 * linear.sum(0)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("kind", COVARIANCES)
@pytest.mark.parametrize("shape", ["one value", "values", "means and values"])
def test_log_prob_and_moments_do_not_change_the_law(law, kind, shape):
    """Nor any tensor that it was made of, whatever may be overwritten on the way."""
    p = parameters()
    if shape == "one value":
        p["value"] = torch.tensor([3.0])
    if shape == "means and values":
        p["loc"] = p["loc"] + torch.arange(3.0).reshape(3, 1, 1)
    copies = {n: (t._version, t.clone()) for n, t in p.items()}
    made = LAWS[law][0](p, COVARIANCES[kind][0](p))
    before = made.mean.clone(), made.variance.clone()
    for _ in range(2):
        x = made.rsample(SHAPE)
        copy = x.clone()
        made.log_prob(x)
        made.rsample()
        assert torch.equal(x, copy)
        assert torch.equal(made.mean, before[0])
        assert torch.equal(made.variance, before[1])
    rows = p["weights"][0]
    torch.testing.assert_close(made.mean @ rows, p["value"][..., 0])
    torch.testing.assert_close(x @ rows, p["value"][..., 0].expand(x.shape[:-1]))
    for n, t in p.items():
        assert t._version == copies[n][0] and torch.equal(t, copies[n][1]), n


# -- Other ways to derivatives -----------------------------------------------------


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("which", ["loc", "variance", "value"])
def test_forward_derivatives(law, which):
    """Tangents of dual numbers: ``requires_grad`` does not tell of these."""
    p = parameters()
    tangent = torch.linspace(0.5, 1, p[which].numel()).reshape(p[which].shape)

    def at(step):
        moved = {**p, which: p[which] + step * tangent}
        return by_hand("diagonal", law, moved)

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(p[which], tangent)
        draw = drawn("diagonal", law, {**p, which: dual})
        found = torch.autograd.forward_ad.unpack_dual(draw).tangent
        assert found is not None
        found = found.clone()
    expected = (at(1e-6) - at(-1e-6)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("law", LAWS)
def test_transforms_of_torch(law):
    """``jacrev`` and ``jacfwd`` of a draw, with respect to the macro value."""
    p = parameters()
    p["value"] = torch.tensor([3.0])

    def draw(value):
        torch.manual_seed(SEED)
        made = LAWS[law][0]({**p, "value": value}, Diagonal(p["variance"]))
        return made.rsample(SHAPE)

    def formula(value):
        torch.manual_seed(SEED)
        noise = torch.randn(*SHAPE, K)
        x = p["loc"] + p["variance"].sqrt() * noise
        return LAWS[law][1]({**p, "value": value}, x, torch.diag(p["variance"]))

    expected = torch.autograd.functional.jacobian(formula, p["value"])
    found = torch.func.jacrev(draw)(p["value"])
    torch.testing.assert_close(found, expected)
    found = torch.func.jacfwd(draw, randomness="same")(p["value"])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("randomness", ["different", "same"])
def test_vmap(law, randomness):
    """Draws side by side: each on its own fibre, with noise as it was asked for."""
    p = parameters()
    values = torch.tensor([[3.0], [3.0], [7.0]])

    def draw(value):
        made = LAWS[law][0]({**p, "value": value}, Diagonal(p["variance"]))
        return made.rsample(SHAPE)

    found = torch.func.vmap(draw, randomness=randomness)(values)
    assert found.shape == (3, *SHAPE, K)
    torch.testing.assert_close(found @ p["weights"][0], values.expand(3, 5))
    assert torch.equal(found[0], found[1]) == (randomness == "same")


def test_vmap_over_what_the_draw_does_not_depend_on():
    p = parameters()
    law = natural_law({**p, "value": torch.tensor([3.0])}, Diagonal(p["variance"]))
    found = torch.func.vmap(lambda x: x + law.rsample(), randomness="different")(
        torch.zeros(6, K)
    )
    torch.testing.assert_close(found @ p["weights"][0], torch.full((6,), 3.0))
    assert len(found[:, 0].unique()) == 6


def test_vmap_over_the_covariance():
    p = parameters()

    def draw(variance):
        one = {**p, "value": torch.tensor([3.0])}
        return natural_law(one, Diagonal(variance)).rsample((2000,))

    variances = torch.stack([p["variance"], 9 * p["variance"]])
    found = torch.func.vmap(draw, randomness="same")(variances)
    # Nine times the variance, the same noise: three times as far from the mean
    gain = natural_gain(p, torch.diag(p["variance"]))
    mean = p["loc"] + (gain @ (3.0 - p["weights"] @ p["loc"]))
    torch.testing.assert_close(found[1] - mean, 3 * (found[0] - mean))


# -- The arithmetic ----------------------------------------------------------------

SHAPES = {
    "single": ((K,), (K, 1), (1,)),
    "samples": ((5, K), (K, 1), (5, 1)),
    "samples, two rows": ((5, K), (K, 2), (5, 2)),
    "plates": ((5, 3, K), (K, 2), (5, 3, 2)),
    "narrow start": ((1, 5, K), (K, 1), (3, 5, 1)),
    "narrow start, two rows": ((1, 5, K), (K, 2), (3, 5, 2)),
    "narrow vector": ((3, 5, K), (K, 1), (3, 1, 1)),
    "narrow vector, two rows": ((3, 5, K), (K, 2), (5, 2)),
    "matrices": ((3, 5, K), (5, K, 1), (3, 5, 1)),
    "matrices, two rows": ((3, 5, K), (5, K, 2), (3, 5, 2)),
    "matrices, narrow start": ((5, K), (3, 1, K, 1), (3, 5, 1)),
    "matrices, narrow start, two rows": ((5, K), (3, 1, K, 2), (3, 5, 2)),
    "matrices, lower vector": ((3, 5, K), (3, 1, K, 1), (1,)),
    "start of one": ((K,), (K, 1), (5, 1)),
    "start of one, two rows": ((K,), (K, 2), (5, 2)),
    "nothing": ((0, K), (K, 1), (0, 1)),
}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
def test_add_product(shapes, own):
    start, matrix, vector = (torch.randn(*shape) for shape in shapes)
    copies = [t.clone() for t in (start, matrix, vector)]
    expected = start + torch.einsum("...ij,...j->...i", matrix, vector)
    found = add_product(start, matrix, vector, own)
    torch.testing.assert_close(found, expected)
    assert torch.equal(matrix, copies[1]) and torch.equal(vector, copies[2])
    assert own or torch.equal(start, copies[0])


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("which", [0, 1, 2])
def test_add_product_with_a_derivative(shapes, own, which):
    """Of each operand; then nothing is overwritten, own or not."""
    operands = [torch.randn(*shape) for shape in shapes]
    operands[which].requires_grad_()
    copies = [t.detach().clone() for t in operands]
    found = add_product(*operands, own)
    assert found.requires_grad
    (gradient,) = torch.autograd.grad(found.square().sum(), operands[which])
    again = operands[0] + torch.einsum("...ij,...j->...i", *operands[1:])
    (expected,) = torch.autograd.grad(again.square().sum(), operands[which])
    torch.testing.assert_close(gradient, expected)
    for now, before in zip(operands, copies, strict=True):
        assert torch.equal(now.detach(), before)


@pytest.mark.parametrize("own", [False, True])
def test_add_product_of_tensors_that_do_not_lie_in_a_row(own):
    """Transposed, strided and expanded memory."""
    matrix, vector = torch.randn(K, 1), torch.randn(5, 1)
    for start in (
        torch.randn(K, 5).mT,
        torch.randn(10, K)[::2],
        torch.randn(5, 2 * K)[:, ::2],
    ):
        expected = start + vector @ matrix.mT
        torch.testing.assert_close(add_product(start, matrix, vector, own), expected)
    start = torch.randn(1, K).expand(5, K)  # nobody's own: all places are one
    expected = start + vector @ matrix.mT
    torch.testing.assert_close(add_product(start, matrix, vector), expected)


def test_what_may_be_overwritten():
    plain, leaf = torch.zeros(2), torch.zeros(2, requires_grad=True)
    assert may_overwrite(plain, plain)
    assert not may_overwrite(plain, leaf)
    assert not may_overwrite(leaf, plain)
    with torch.no_grad():
        assert may_overwrite(plain, leaf)
    found = []
    torch.func.vmap(lambda x: found.append(may_overwrite(plain)) or x)(plain)
    torch.func.grad(lambda x: found.append(may_overwrite(plain)) or x.sum())(plain)
    assert found == [False, False]
    assert may_overwrite(plain)


# -- Whole programs ----------------------------------------------------------------

PAIR = pm.MacroVariable("s", ["x1", "x2"])
PLATE = pm.MacroVariable("s", "x", over="parts")


class Tensors:
    """What a user hands in: all are checked not to have been written to."""

    def __init__(self):
        self.loc = torch.tensor([10.0, 20.0, 5.0])
        self.scale = torch.tensor([2.0, 1.0, 0.5])
        self.prices = torch.tensor([1.0, 3.0, -1.0])
        self.weights = torch.tensor([1.0, 2.0, -0.5])
        self.value = torch.tensor(33.0)
        self.shares = torch.tensor([0.5, 0.3, 0.2])
        self.covariance = torch.diag(self.scale.square()) + 0.1

    def state(self):
        return {n: (t, t._version, t.clone()) for n, t in vars(self).items()}


def check_untouched(before):
    for name, (tensor, version, copy) in before.items():
        assert tensor._version == version, name
        assert torch.equal(tensor, copy), name


def parts(t, hidden=True):
    def model():
        z = pyro.sample("z", dist.Normal(1.0, 1.5)) if hidden else 0.0
        with pyro.plate("parts", 3):
            x = pyro.sample("x", dist.Normal(t.loc + 0.1 * z, t.scale))
        return pyro.sample("y", dist.Normal((t.prices * x).sum(-1) + z, 0.5))

    return model


def whole(t):
    def model():
        x = pyro.sample("x", dist.MultivariateNormal(t.loc, t.covariance))
        return pyro.sample("y", dist.Normal((t.prices * x).sum(-1), 0.5))

    return model


def gammas(t):
    def model():
        with pyro.plate("parts", 3):
            x = pyro.sample("x", dist.Gamma(t.scale, 2.0))
        return pyro.sample("y", dist.Normal((t.prices * x).sum(-1), 0.5))

    return model


def explicit(t):
    def split(total):
        return dist.Delta(total.unsqueeze(-1) * t.shares, event_dim=1)

    return split


def interventions(t):
    """By name: a program, what is aggregated, and what is done to it."""
    linear = pm.MacroVariable("s", "x", "parts", pm.Linear(t.weights))
    event = pm.MacroVariable("s", "x")
    scaled = pm.Allocate(t.value, t.shares)
    return {
        "natural": (parts(t), PLATE, pm.Natural(t.value)),
        "natural, alone": (parts(t, False), PLATE, pm.Natural(t.value)),
        "natural, given": (parts(t), PLATE, pm.Natural(t.value, given="z")),
        "natural, linear": (parts(t), linear, pm.Natural(t.value)),
        "natural, dense": (whole(t), event, pm.Natural(t.value)),
        "natural, gamma": (gammas(t), PLATE, pm.Natural(t.value)),
        "residual": (parts(t), PLATE, pm.Residual(t.value, absorb=1)),
        "residual, linear": (parts(t), linear, pm.Residual(t.value, absorb=2)),
        "allocate": (parts(t), PLATE, scaled),
        "explicit": (parts(t), PLATE, pm.Explicit(t.value, explicit(t))),
        "proportional": (parts(t), PLATE, pm.Proportional(t.value)),
        "shift": (parts(t), PLATE, pm.Shift(t.value)),
        "shift, along": (parts(t), PLATE, pm.Shift(t.value, t.shares)),
        "entropy": (
            parts(t),
            PLATE,
            pm.MaxEntropy(
                t.value, reference=dist.MultivariateNormal(t.loc, t.covariance)
            ),
        ),
        "inhibiting": (parts(t), PLATE, pm.Inhibiting(t.value, "y")),
        "inhibiting, levers": (parts(t), PLATE, pm.Inhibiting(t.value, "y", [0, 2])),
    }


NAMES = list(interventions(Tensors()))


@pytest.mark.parametrize("name", NAMES)
def test_runs_do_not_write_to_tensors_of_the_user(name):
    t = Tensors()
    before = t.state()
    model, macro, realization = interventions(t)[name]
    fn = pm.macro_do(model, {macro: realization})
    for _ in range(3):
        trace = poutine.trace(fn).get_trace()
        with torch.no_grad():
            fn()
        trace.compute_log_prob()
    check_untouched(before)


@pytest.mark.parametrize("name", NAMES)
def test_writing_to_a_trace_does_not_change_the_next_run(name):
    """Values of a trace may be written to, but for the user's own tensors."""
    t = Tensors()
    model, macro, realization = interventions(t)[name]
    fn = pm.macro_do(model, {macro: realization})
    fn()
    pyro.set_rng_seed(1)
    expected = {n: v.clone() for n, v in values(fn).items()}
    found = values(fn)
    for latent in {"s__micro", "y"} & set(found):
        found[latent].zero_()
    pyro.set_rng_seed(1)
    for n, v in values(fn).items():
        torch.testing.assert_close(v, expected[n], msg=n)


def values(fn):
    trace = poutine.trace(fn).get_trace()
    sites = trace.nodes.items()
    return {n: s["value"] for n, s in sites if isinstance(s.get("value"), torch.Tensor)}


def test_a_value_that_is_changed_in_place_counts():
    """The next run has the new one, though nothing else has changed."""
    t = Tensors()
    for name in ("natural", "natural, linear", "residual", "natural, dense"):
        t.value.fill_(33.0)
        model, macro, realization = interventions(t)[name]
        fn = pm.macro_do(model, {macro: realization})
        weights = t.weights if "linear" in name else torch.ones(3)
        for value in (33.0, 40.0, -2.0):
            t.value.fill_(value)
            x = values(fn)["x"]
            torch.testing.assert_close((weights * x).sum(), torch.tensor(value))


# -- Derivatives of whole programs -------------------------------------------------


def learned(loc, scale, slope):
    def model():
        z = pyro.sample("z", dist.Normal(1.0, 1.5))
        x1 = pyro.sample("x1", dist.Normal(loc + slope * z, scale))
        x2 = pyro.sample("x2", dist.Normal(20 - z, 1.0))
        return pyro.sample("y", dist.Normal(x1 + 3 * x2 + 0.1 * z, 0.5))

    return model


REALIZATIONS = {
    "natural": lambda v: pm.Natural(v),
    "natural, given": lambda v: pm.Natural(v, given="z"),
    "residual": lambda v: pm.Residual(v, absorb="x2"),
    "shift": lambda v: pm.Shift(v),
    "proportional": lambda v: pm.Proportional(v),
    "inhibiting": lambda v: pm.Inhibiting(v, "y"),
}


@pytest.mark.parametrize("grid", [False, True])
@pytest.mark.parametrize("name", REALIZATIONS)
def test_derivatives_of_a_run(name, grid):
    """Reverse mode through a run, against the same run a little to the side."""
    leaves = [torch.tensor(v) for v in (10.0, 2.0, 0.7)]
    value = torch.tensor([[30.0], [33.0]])

    def run(loc, scale, slope, value):
        realization = REALIZATIONS[name](value)
        fn = pm.macro_do(learned(loc, scale, slope), {PAIR: realization})
        pyro.set_rng_seed(5)
        plate = pm.grid if grid else pyro.plate
        with plate("values", 2, dim=-2), pyro.plate("draws", 3, dim=-1):
            y = fn()
        return (torch.linspace(1, 2, 6).reshape(2, 3) * y.sin()).sum()

    inputs = [t.clone().requires_grad_() for t in (*leaves, value)]
    found = torch.autograd.grad(run(*inputs), inputs)
    for i, gradient in enumerate(found):
        flat = gradient.flatten()
        for k in range(flat.numel()):
            step = torch.zeros(flat.numel())
            step[k] = 1e-5
            ends = []
            for sign in (1, -1):
                moved = [t.detach().clone() for t in (*leaves, value)]
                moved[i] = moved[i] + sign * step.reshape(moved[i].shape)
                ends.append(run(*moved))
            expected = (ends[0] - ends[1]) / 2e-5
            torch.testing.assert_close(flat[k], expected, rtol=1e-6, atol=1e-6)


# -- Memory ------------------------------------------------------------------------


@pytest.fixture
def known():
    """What is there before does not count, which makes collections cheap."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def without_collection(known):
    gc.disable()
    yield
    gc.enable()


def alive(fn, latent):
    """Which values of a run outlive its trace."""
    trace = poutine.trace(fn).get_trace()
    names = [n for n in ("x", "y", latent) if n in trace.nodes]
    kept = {n: weakref.ref(trace.nodes[n]["value"]) for n in names}
    del trace
    return {n for n, ref in kept.items() if ref() is not None}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_runs_leave_nothing_behind(name, grad, without_collection):
    """Draws die with their trace, by reference counts alone."""
    t = Tensors()
    if grad:
        t.loc.requires_grad_()
    model, macro, realization = interventions(t)[name]
    fn = pm.macro_do(model, {macro: realization})
    for _ in range(3):
        assert alive(fn, "s__micro") == set()


def test_a_grid_leaves_nothing_behind(without_collection):
    t = Tensors()
    natural = pm.macro_do(whole(t), {pm.MacroVariable("s", "x"): pm.Natural(t.value)})

    def run():
        with pm.grid("values", 2, dim=-2), pyro.plate("draws", 100, dim=-1):
            return natural()

    for _ in range(3):
        assert alive(run, "s__micro") == set()


def alive_numbers():
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum(t.numel() for t in tensors)


def many(scale=1.0):
    with pyro.plate("parts", 1000):
        x = pyro.sample("x", dist.Normal(1.0, scale))
    return pyro.sample("y", dist.Normal(x.mean(), 0.5))


def many_below():
    z = pyro.sample("z", dist.Normal(1.0, 2.0))
    return many(1.0 + 0 * z)


@pytest.mark.parametrize("realization", [pm.Natural(3.0), pm.Residual(3.0, absorb=7)])
@pytest.mark.parametrize("model", [many, many_below])
def test_a_run_of_what_is_remembered_leaves_no_micro_state(
    model, realization, without_collection
):
    """Nothing of the size of the micro state stays, though nobody collects."""
    fn = pm.macro_do(model, {PLATE: realization})
    for _ in range(2):
        fn()
    before = alive_numbers()
    for _ in range(5):
        fn()
    assert alive_numbers() - before < 1000


@pytest.mark.parametrize("name", NAMES)
def test_no_run_leaks(name, known):
    """What is left in cycles is collected."""
    t = Tensors()
    model, macro, realization = interventions(t)[name]
    fn = pm.macro_do(model, {macro: realization})
    for _ in range(5):
        fn()
    gc.collect()
    before = alive_numbers()
    for _ in range(5):
        fn()
    gc.collect()
    assert alive_numbers() <= before
