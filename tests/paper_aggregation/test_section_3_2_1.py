# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Section 3.2.1: which confounded Gaussian models can be made to look unconfounded."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.linalg
import scipy.optimize
import torch
from brute_force import finite_difference
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from shop import condition, law

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro="x")
SWAP = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)


def fixture(alpha):
    """Var X = I, Cov(X, N) = (0.5, 0.5), Var N = 1, zero means."""
    alpha = torch.as_tensor(alpha)
    z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    x = pyro.deterministic("x", z, event_dim=1)
    n = pyro.sample("n", dist.Normal(0.5 * z.sum(-1), 0.5**0.5))
    pyro.deterministic("revenue", x @ alpha + n, event_dim=0)


def promotion(alpha, gamma=(0.5, 0.2)):
    """X = Z, N = gamma.Z, Var Z = (1, 4)."""
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal(0.0, 2.0))
    x1, x2 = pyro.deterministic("x1", z1), pyro.deterministic("x2", z2)
    extra = gamma[0] * z1 + gamma[1] * z2
    pyro.deterministic("revenue", alpha[0] * x1 + alpha[1] * x2 + extra)


PROMOTED = pm.MacroVariable("sales", micro=["x1", "x2"])


class Dense:
    """``Yb = alpha.X + N`` with jointly normal ``(X, N)``, as program and as matrices.

    :param covariance: of ``(X, N)``.
    """

    def __init__(self, alpha, mean, covariance, weights=None, dtype=torch.float64):
        self.alpha, self.mean, self.covariance = alpha, mean, covariance
        self.size, self.dtype = len(alpha), dtype
        self.weights = torch.ones(self.size) if weights is None else weights
        aggregation = pm.Sum() if weights is None else pm.Linear(weights)
        self.macro = pm.MacroVariable("sales", micro="x", aggregation=aggregation)
        rows = torch.atleast_2d(self.weights)
        zero = torch.zeros(len(rows), 1)
        self.rows = torch.cat([rows, zero], -1)

    def model(self):
        fn = dist.MultivariateNormal(self.mean, self.covariance)
        z = pyro.sample("z", fn).to(self.dtype)
        x = pyro.deterministic("x", z[..., :-1], event_dim=1)
        price = self.alpha.to(self.dtype)
        pyro.deterministic("revenue", x @ price + z[..., -1], event_dim=0)

    def seen(self, value):
        """``P(Yb | xb)``."""
        effect = torch.cat([self.alpha, torch.ones(1)])
        value = torch.as_tensor(value).reshape(-1)
        mean, cov = condition(self.mean, self.covariance, self.rows, value)
        return effect @ mean, effect @ cov @ effect

    def done(self, mean, cov):
        """The effect of a normal law of the micro state."""
        return (
            self.alpha @ mean + self.mean[-1],
            self.alpha @ cov @ self.alpha + self.covariance[-1, -1],
        )

    def natural(self, value):
        value = torch.as_tensor(value).reshape(-1)
        mean, cov = self.mean[:-1], self.covariance[:-1, :-1]
        return condition(mean, cov, self.rows[:, :-1], value)


def drawn(seed, size, rows=None):
    """A feasible model: prices far apart, and a noise that is correlated with all."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(100):
        factor = torch.randn(size + 1, size + 1, generator=generator)
        covariance = factor @ factor.mT + 0.3 * torch.eye(size + 1)
        mean = torch.randn(size + 1, generator=generator)
        alpha = 3 * torch.randn(size, generator=generator)
        weights = None
        if rows is not None:
            weights = torch.rand((*rows, size), generator=generator) + 0.2
        dense = Dense(alpha, mean, covariance, weights)
        if dense.seen(torch.zeros(len(dense.rows)))[1] > 1.1 * covariance[-1, -1]:
            return dense
    raise AssertionError("no feasible model")


def wasserstein(one, other):
    (m, a), (n, b) = ((np.asarray(t) for t in law) for law in (one, other))
    half = np.real(scipy.linalg.sqrtm(a + 1e-14 * np.eye(len(a))))
    cross = np.linalg.eigvalsh(half @ b @ half).clip(0)
    total = ((m - n) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.sqrt(cross).sum()
    return max(total, 0) ** 0.5


# Equations (9) and (10)


@pytest.mark.parametrize(
    "alpha, variance, feasible",
    [
        ((1.0, 1.0), 0.5, False),
        ((0.5, 1.0), 0.625, False),
        ((1.0, 3.0), 2.5, True),
        ((0.0, 1.0), 1.0, True),  # equality
        ((1.0, 0.0), 1.0, True),
        ((-2.0, -3.0), 1.0, True),
        ((0.0, 1.0 - 1e-6), 1 - 1e-6, False),
        ((0.0, 1.0 + 1e-6), 1 + 1e-6, True),
        ((7.0, 7.9), 0.905, False),
        ((7.0, 5.9), 1.105, True),
    ],
)
def test_equation_9(alpha, variance, feasible):
    report = pm.can_inhibit(fixture, SALES, "revenue", model_args=(alpha,))
    assert report.method == "exact: affine-Gaussian"
    assert report.observational_variance == pytest.approx(variance, rel=2e-12)
    assert report.noise_variance == pytest.approx(1.0, rel=1e-12)
    assert report.feasible is feasible
    assert set(report.feasible_at) == {feasible} and len(report.at) == 5
    assert bool(report.reason) is not feasible
    assert report.levers is None and report.cause == "sales"
    sign = ">=" if feasible else "<"
    assert sign in report.summary() and "(9)" in report.summary()
    assert bool(report.distance.isnan().all()) is not feasible


@pytest.mark.parametrize("seed", range(10))
def test_equation_10_as_projections(seed):
    """Norms in the space of random variables: by regression on a basis."""
    dense = drawn(seed, 3)
    factor = torch.linalg.cholesky(dense.covariance)  # rows: X1, X2, X3, N
    cause, noise = factor[:-1].sum(0), factor[-1]
    effect = dense.alpha @ factor[:-1] + noise
    unit = cause / cause.norm()
    left = (effect - (effect @ unit) * unit).norm()
    report = pm.can_inhibit(dense.model, dense.macro, "revenue")
    assert report.norms == pytest.approx((left.item(), noise.norm().item()))
    assert report.feasible == bool(left >= noise.norm())


@pytest.mark.parametrize(
    "alpha, left, feasible", [((2.0, 2.0), 0.072, False), ((1.0, 3.0), 2.312, True)]
)
def test_interpretation_promotion(alpha, left, feasible):
    """X := Z, Y := alpha X + gamma Z: prices that differ blur the confounding."""
    args = (promotion, PROMOTED, "revenue")
    report = pm.can_inhibit(*args, model_args=(alpha,))
    assert report.observational_variance == pytest.approx(left, rel=1e-9)
    assert report.noise_variance == pytest.approx(0.41, rel=1e-9)
    assert report.feasible is feasible

    def realization(value):
        return pm.Inhibiting(value, "revenue")

    natural = pm.confounding(*args, model_args=(alpha,), at=[2.0])
    assert natural.verdict == "inducing"
    if feasible:
        found = pm.confounding(*args, realization, [2.0], model_args=(alpha,))
        assert found.verdict == "inhibiting"
    else:
        with pytest.raises(pm.Infeasible, match=r"0\.072 < Var\(N\) = 0\.41"):
            pm.confounding(*args, realization, [2.0], model_args=(alpha,))


@pytest.mark.parametrize("scale", [1.0, 2.0, 5.0, 20.0])
def test_alpha_scaled_up_makes_room(scale):
    """The right of (8) grows without bound along a direction that is not 1."""
    alpha = (0.2 * scale, 0.6 * scale)  # h = 0.4 scale
    report = pm.can_inhibit(fixture, SALES, "revenue", model_args=(alpha,))
    assert report.feasible == (0.4 * scale >= 1)
    same = (0.4 * scale, 0.4 * scale)
    assert not pm.can_inhibit(fixture, SALES, "revenue", model_args=(same,)).feasible


# Messages


def test_infeasible_names_both_sides_of_9():
    with pytest.raises(pm.Infeasible) as raised:
        pm.macro_do(fixture, {SALES: pm.Inhibiting(2.0, "revenue")})((0.5, 1.0))
    text = str(raised.value)
    for part in ["'sales'", "'revenue'", "0.625 < Var(N) = 1", "(9)", "Prices (alpha)"]:
        assert part in text
    reason = pm.can_inhibit(fixture, SALES, "revenue", model_args=((0.5, 1.0),)).reason
    assert reason == text


def test_infeasible_with_prices_that_are_equal():
    """(9) does not hold, as Q N is shorter than N; prices apart would make room."""
    with pytest.raises(pm.Infeasible, match=r"0\.5 < Var\(N\) = 1 .*further apart"):
        pm.macro_do(fixture, {SALES: pm.Inhibiting(2.0, "revenue")})((3.0, 3.0))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, 1.0)])
def test_effect_of_the_macro_value_alone(weights):
    """alpha a multiple of the weights: feasible only where nothing is confounded."""
    weights = torch.tensor(weights)
    total = pm.MacroVariable("total", micro="x", aggregation=pm.Linear(weights))

    def model(confounded):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = pyro.deterministic("x", z, event_dim=1)
        apart = torch.tensor([weights[1], -weights[0]])
        n = z @ (apart + confounded * weights)  # Cov(N, Xb) = confounded |weights|^2
        pyro.deterministic("y", 3 * (x @ weights) + n + 1.0, event_dim=0)

    free = pm.can_inhibit(model, total, "y", [1.0], model_args=(0.0,))
    assert free.feasible and float(free.distance) < 1e-6
    found = pm.confounding(
        model, total, "y", lambda v: pm.Inhibiting(v, "y"), [1.0], model_args=(0.0,)
    )
    assert found.verdict == "inhibiting"
    # The natural law, for there is nothing to change
    one = law(
        pm.macro_do(lambda: model(0.0), {total: pm.Inhibiting(1.0, "y")}),
        "total__micro",
    )
    two = law(pm.macro_do(lambda: model(0.0), {total: pm.Natural(1.0)}), "total__micro")
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(one.covariance_matrix, two.covariance_matrix)
    for amount in (0.3, -0.3, 1e-3):
        report = pm.can_inhibit(model, total, "y", [1.0], model_args=(amount,))
        assert not report.feasible and "further apart" in report.reason
        assert report.observational_variance < report.noise_variance


def test_what_is_not_one_number():
    def stores():
        with pyro.plate("stores", 2):
            x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Normal(x[..., 0], 1.0))

    for ask in (
        lambda: pm.can_inhibit(stores, SALES, "y"),
        lambda: pm.macro_do(stores, {SALES: pm.Inhibiting(1.0, "y")})(),
    ):
        with pytest.raises(pm.UnsupportedLaw, match="aggregate over their plates"):
            ask()


def test_programs_that_are_not_gaussian():
    def model():
        x = pyro.sample("x", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x[..., 0], 1.0))

    with pytest.raises(pm.UnsupportedLaw, match="'x' is not Gaussian"):
        pm.can_inhibit(model, SALES, "y", [1.0])
    with pytest.raises(pm.UnsupportedLaw, match="'x' is not Gaussian"):
        pm.macro_do(model, {SALES: pm.Inhibiting(1.0, "y")})()


def test_unknown_effect_and_levers():
    with pytest.raises(pm.UnknownSite, match="revenue"):
        pm.can_inhibit(fixture, SALES, "revenu", model_args=((1.0, 3.0),))
    bad = pm.Inhibiting(1.0, "revenue", levers=["x3"])
    with pytest.raises(pm.UnknownSite, match="x"):
        pm.macro_do(fixture, {SALES: bad})((1.0, 3.0))
    for levers in ([2], [-1], [], "x", 0):
        bad = pm.Inhibiting(1.0, "revenue", levers=levers)
        with pytest.raises(pm.PyroMacroError, match="lever"):
            pm.macro_do(fixture, {SALES: bad})((1.0, 3.0))


# The law


def test_the_law_of_the_fixture():
    """alpha = (1, 3) at xb = 2: covariance 0.375 [[1,-1],[-1,1]], mean (0.5, 1.5)."""
    micro = law(
        pm.macro_do(lambda: fixture((1.0, 3.0)), {SALES: pm.Inhibiting(2.0, "revenue")})
    )
    torch.testing.assert_close(micro.mean, torch.tensor([0.5, 1.5]))
    torch.testing.assert_close(micro.covariance_matrix, 0.375 * SWAP)
    torch.testing.assert_close(micro.variance, torch.tensor([0.375, 0.375]))


def test_equality_in_9_leaves_a_point():
    """alpha = (0, 1): alpha.X has to be the constant E[Yb | xb] = xb."""
    intervened = pm.macro_do(fixture, {SALES: pm.Inhibiting(2.0, "revenue")})
    nodes = poutine.trace(intervened).get_trace((0.0, 1.0)).nodes
    torch.testing.assert_close(nodes["x"]["value"], torch.tensor([0.0, 2.0]))
    report = pm.confounding(
        fixture,
        SALES,
        "revenue",
        lambda v: pm.Inhibiting(v, "revenue"),
        [-1.0, 2.0],
        model_args=((0.0, 1.0),),
    )
    assert report.verdict == "inhibiting"
    torch.testing.assert_close(report.interventional_variance, torch.ones(2))


def test_equality_in_9_with_room_elsewhere():
    """Three products: alpha.X is constant, the rest of the natural law stays."""
    alpha = torch.tensor([0.0, 1.0, 0.5])
    covariance = torch.eye(4)
    covariance[3, :3] = covariance[:3, 3] = 0.3
    dense = Dense(alpha, torch.zeros(4), covariance)
    _, left = dense.seen(0.0)

    def scaled(scale):
        return Dense(scale * alpha, torch.zeros(4), covariance)

    # Var(Yb | xb) = Var N, by the scale of the prices
    scale = scipy.optimize.brentq(lambda s: float(scaled(s).seen(0.0)[1] - 1), 0.1, 5)
    dense = scaled(scale)
    micro = law(
        pm.macro_do(dense.model, {dense.macro: pm.Inhibiting(1.5, "revenue")}),
        "sales__micro",
    )
    wanted, left = dense.seen(1.5)
    assert left.item() == pytest.approx(1.0, abs=1e-9)
    rows = torch.stack([torch.ones(3), dense.alpha])
    mean, cov = condition(
        torch.zeros(3), torch.eye(3), rows, torch.stack([torch.tensor(1.5), wanted])
    )
    torch.testing.assert_close(micro.mean, mean, atol=1e-6, rtol=0)
    torch.testing.assert_close(micro.covariance_matrix, cov, atol=1e-4, rtol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_construction_of_the_paper_inhibits(seed, size):
    """v = alpha - mean(alpha) 1, a rank one covariance, mean (xb/n) 1 + t v."""
    dense = drawn(seed, size)
    at = torch.tensor([-1.0, 2.5])
    v = dense.alpha - dense.alpha.mean()
    _, left = dense.seen(0.0)
    spread = (left - dense.covariance[-1, -1]) / v.square().sum() ** 2
    laws = []
    for value in at:
        wanted = dense.seen(value)[0] - dense.mean[-1] - dense.alpha.mean() * value
        mean = value / size + wanted / v.square().sum() * v
        laws.append((mean, spread * torch.outer(v, v)))
        torch.testing.assert_close(dense.done(*laws[-1])[0], dense.seen(value)[0])
        torch.testing.assert_close(dense.done(*laws[-1])[1], left)
    # The least intrusive one is not farther from the natural one
    report = pm.can_inhibit(dense.model, dense.macro, "revenue", at)
    for value, found, own in zip(at, report.distance, laws, strict=True):
        assert found <= wasserstein(dense.natural(value), own) + 1e-6
    micro = law(
        pm.macro_do(dense.model, {dense.macro: pm.Inhibiting(at[1], "revenue")})
    )
    moments = dense.done(micro.mean, micro.covariance_matrix)
    torch.testing.assert_close(torch.stack(moments), torch.stack(dense.seen(at[1])))
    if size == 2:  # the only one
        torch.testing.assert_close(micro.mean, laws[1][0])
        torch.testing.assert_close(micro.covariance_matrix, laws[1][1])


@pytest.mark.parametrize("rows", [None, (), (2,)])
@pytest.mark.parametrize("size, seed", [(3, 0), (3, 3), (4, 1), (4, 2)])
def test_least_intrusive_among_all_gaussians(size, seed, rows):
    """Against a numerical optimizer over all normal laws on the fibre."""
    if rows == (2,) and size == 3:
        size = 4
    dense = drawn(seed, size, rows)
    value = torch.tensor([1.5]) if rows != (2,) else torch.tensor([1.5, -0.5])
    m0, c0 = (t.numpy() for t in dense.natural(value))
    mean, left = (float(t) for t in dense.seen(value))
    right, centre = float(dense.covariance[-1, -1]), float(dense.mean[-1])
    alpha, weights = dense.alpha.numpy(), np.atleast_2d(dense.weights.numpy())
    basis = scipy.linalg.null_space(weights)
    d = basis.shape[1]
    start, root = basis.T @ m0 * 0, scipy.linalg.sqrtm(basis.T @ c0 @ basis)
    below = np.tril_indices(d)
    price = basis.T @ alpha

    def unpack(t):
        factor = np.zeros((d, d))
        factor[below] = t[d:]
        return t[:d], factor

    def objective(t):
        move, factor = unpack(t)
        cov = factor @ factor.T
        # tr sqrt(A^1/2 L L' A^1/2) is the nuclear norm of A^1/2 L, smooth enough
        nuclear = np.linalg.svd(np.real(root) @ factor, compute_uv=False).sum()
        own = np.trace(root @ root) + np.trace(cov) - 2 * nuclear
        return move @ move + np.real(own)

    def constraints(t):
        move, factor = unpack(t)
        return np.array(
            [
                alpha @ m0 + price @ move + centre - mean,
                (price @ factor) @ (price @ factor) + right - left,
            ]
        )

    rng = np.random.default_rng(seed)
    best = None
    for attempt in range(4):
        first = np.concatenate([start, np.linalg.cholesky(basis.T @ c0 @ basis)[below]])
        first = first + 0.2 * attempt * rng.normal(size=len(first))
        found = scipy.optimize.minimize(
            objective,
            first,
            method="SLSQP",
            constraints={"type": "eq", "fun": constraints},
            options={"maxiter": 500, "ftol": 1e-14},
        )
        if np.abs(constraints(found.x)).max() < 1e-7:
            best = found if best is None or found.fun < best.fun else best
    assert best is not None
    args = (dense.model, dense.macro, "revenue")
    report = pm.can_inhibit(*args, at=value.reshape(1, -1) if rows == (2,) else value)
    assert float(report.distance) ** 2 == pytest.approx(best.fun, rel=1e-5, abs=1e-7)
    value = value if rows == (2,) else value[0]
    micro = law(
        pm.macro_do(dense.model, {dense.macro: pm.Inhibiting(value, "revenue")})
    )
    move, factor = unpack(best.x)
    np.testing.assert_allclose(micro.mean, m0 + basis @ move, atol=1e-3)
    cov = basis @ factor @ factor.T @ basis.T
    np.testing.assert_allclose(micro.covariance_matrix, cov, atol=5e-3 * np.trace(cov))
    # And it is the distance of the two laws
    own = (micro.mean, micro.covariance_matrix)
    assert float(report.distance) == pytest.approx(wasserstein((m0, c0), own), abs=1e-5)


# Levers


def levers_by_hand(dense, value, levers):
    """Others keep their law; levers are as they would be given these and the sum."""
    rest = [i for i in range(dense.size) if i not in levers]
    mean, cov = dense.mean[:-1], dense.covariance[:-1, :-1]
    # X_l given X_r and w.X = value is affine in X_r: found by its value at units
    rows = torch.cat([torch.eye(dense.size)[rest], dense.weights.reshape(1, -1)])

    def at(own):
        return condition(mean, cov, rows, torch.cat([own, value.reshape(1)]))

    zero, within = at(torch.zeros(len(rest)))
    linear = torch.zeros(dense.size, len(rest))
    for i, unit in enumerate(torch.eye(len(rest))):
        linear[:, i] = at(unit)[0] - zero
    return zero + linear @ mean[rest], linear @ cov[rest][:, rest] @ linear.mT + within


@pytest.mark.parametrize("levers", [[0, 1], [1, 3], [0, 2, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("seed", range(3))
def test_levers(seed, levers):
    dense = drawn(seed, 4, ())
    value = torch.tensor(0.7)
    inhibiting = pm.Inhibiting(value, "revenue", levers=levers)
    micro = law(pm.macro_do(dense.model, {dense.macro: inhibiting}))
    # The effect is as it is seen, and the others have their own law
    moments = dense.done(micro.mean, micro.covariance_matrix)
    torch.testing.assert_close(torch.stack(moments), torch.stack(dense.seen(value)))
    rest = [i for i in range(4) if i not in levers]
    torch.testing.assert_close(micro.mean[rest], dense.mean[:-1][rest])
    own = micro.covariance_matrix[rest][:, rest]
    torch.testing.assert_close(own, dense.covariance[:-1, :-1][rest][:, rest])
    torch.testing.assert_close(dense.weights @ micro.mean, value)
    flat = dense.weights @ micro.covariance_matrix
    torch.testing.assert_close(flat, torch.zeros(4), atol=1e-9, rtol=0)
    torch.testing.assert_close(micro.variance, micro.covariance_matrix.diagonal())
    # Moved along the shortest way that levers can go, from what they would be
    m0, c0 = levers_by_hand(dense, value, levers)
    w, a = dense.weights[levers], dense.alpha[levers]
    step = torch.zeros(4)
    step[levers] = a - (a @ w) / (w @ w) * w
    wanted, left = dense.seen(value)
    shift = wanted - dense.mean[-1] - dense.alpha @ m0
    before = (dense.alpha @ c0 @ dense.alpha).sqrt()
    after = (left - dense.covariance[-1, -1]).sqrt()
    expected = (shift.square() + (after - before).square()).sqrt() / step.norm()
    report = pm.can_inhibit(dense.model, dense.macro, "revenue", [0.7], levers=levers)
    assert report.levers == tuple(levers)
    assert report.distance.item() == pytest.approx(expected.item(), rel=1e-7)
    # alpha.(X - E X) is multiplied along the step, the mean moved
    move = torch.eye(4) + torch.outer(step, dense.alpha) * (after / before - 1) / (
        step @ step
    )
    torch.testing.assert_close(micro.mean, m0 + shift * step / (step @ step))
    torch.testing.assert_close(micro.covariance_matrix, move @ c0 @ move.mT)


def test_all_elements_as_levers_are_no_levers():
    dense = drawn(1, 3)
    one, two = (
        law(
            pm.macro_do(
                dense.model, {dense.macro: pm.Inhibiting(1.0, "revenue", levers=levers)}
            )
        )
        for levers in (None, ["x"])
    )
    torch.testing.assert_close(one.mean, two.mean)
    torch.testing.assert_close(one.covariance_matrix, two.covariance_matrix)
    x = one.sample((5,))
    torch.testing.assert_close(one.log_prob(x), two.log_prob(x))


def test_levers_by_name():
    """Of the promotion model; one lever alone moves the sum and no more."""
    args = (promotion, PROMOTED, "revenue")

    def three(alpha=(1.0, 3.0, 4.0)):
        z = [pyro.sample(f"z{i}", dist.Normal(0.0, 1.0)) for i in range(3)]
        x = [pyro.deterministic(f"x{i}", z[i]) for i in range(3)]
        extra = 0.3 * (z[0] + z[1] + z[2])
        pyro.deterministic(
            "revenue", sum(a * b for a, b in zip(alpha, x, strict=True)) + extra
        )

    total = pm.MacroVariable("sales", micro=["x0", "x1", "x2"])
    inhibited = pm.macro_do(
        three, {total: pm.Inhibiting(1.0, "revenue", levers=["x0", "x2"])}
    )
    micro = law(inhibited)
    torch.testing.assert_close(micro.mean[1], torch.tensor(0.0))
    torch.testing.assert_close(micro.covariance_matrix[1, 1], torch.tensor(1.0))
    by_name = pm.can_inhibit(three, total, "revenue", [1.0], levers=["x0", "x2"])
    by_index = pm.can_inhibit(three, total, "revenue", [1.0], levers=[0, 2])
    assert by_name.distance.item() == pytest.approx(by_index.distance.item())
    one = pm.can_inhibit(*args, [1.0], levers=["x1"], model_args=((1.0, 3.0),))
    assert not one.feasible and "cannot move the effect" in one.reason
    # Two levers of one price
    same = pm.can_inhibit(
        three,
        total,
        "revenue",
        [1.0],
        levers=["x0", "x1"],
        model_args=((2.0, 2.0, 5.0),),
    )
    assert not same.feasible and "cannot move the effect" in same.reason


def test_levers_without_weight():
    weights = torch.tensor([1.0, 0.0, 1.0])
    dense = drawn(0, 3)
    dense = Dense(dense.alpha, dense.mean, dense.covariance, weights)
    stuck = pm.Inhibiting(1.0, "revenue", levers=[1])
    with pytest.raises(pm.PyroMacroError, match="cannot set the macro value"):
        pm.macro_do(dense.model, {dense.macro: stuck})()
    # An element that does not count is free to move, and may be all that is moved
    found = law(
        pm.macro_do(
            dense.model, {dense.macro: pm.Inhibiting(1.0, "revenue", levers=[0, 1])}
        )
    )
    moments = dense.done(found.mean, found.covariance_matrix)
    torch.testing.assert_close(torch.stack(moments), torch.stack(dense.seen(1.0)))


# Densities and draws


def coordinates(micro, rows):
    """Those that remain when the last elements that count are solved for."""
    pivots = micro.pivots.tolist()
    return [i for i in range(rows.shape[1]) if i not in pivots]


@pytest.mark.parametrize("levers", [None, [0, 2], [1, 2, 3]])
@pytest.mark.parametrize("rows", [None, (), (2,)])
def test_log_density_in_coordinates(levers, rows):
    if rows == (2,) and levers == [0, 2]:
        levers = [0, 2, 4]
    dense = drawn(4, 5, rows)
    value = torch.tensor([1.0, 0.3]) if rows == (2,) else torch.tensor(1.0)
    realization = pm.Inhibiting(value, "revenue", levers=levers)
    micro = law(pm.macro_do(dense.model, {dense.macro: realization}))
    x = micro.sample((7,))
    free = coordinates(micro, torch.atleast_2d(dense.weights))
    inside = torch.distributions.MultivariateNormal(
        micro.mean[free], micro.covariance_matrix[free][:, free]
    )
    torch.testing.assert_close(micro.log_prob(x), inside.log_prob(x[:, free]))
    miss = x @ torch.atleast_2d(dense.weights).mT - value
    assert miss.abs().max() < 1e-10
    # With standard errors at 10^-5
    n = 40_000
    draws = micro.sample((n,))
    gap = (draws.mean(0) - micro.mean) / micro.variance.sqrt() * n**0.5
    assert gap.abs().max() < 4.5
    cov = micro.covariance_matrix
    scale = (torch.outer(cov.diagonal(), cov.diagonal()) + cov.square()).sqrt()
    assert ((torch.cov(draws.mT) - cov) / scale * n**0.5).abs().max() < 5


@pytest.mark.parametrize("levers", [None, ["x"]])
def test_float32(levers):
    """Draws in float32, the moments of the effect as in float64."""
    dense = drawn(2, 4)
    args = (dense.alpha, dense.mean.float(), dense.covariance.float())
    single = Dense(*args, dtype=torch.float32)
    inhibiting = pm.Inhibiting(1.0, "revenue", levers=levers)
    nodes = (
        poutine.trace(pm.macro_do(single.model, {single.macro: inhibiting}))
        .get_trace()
        .nodes
    )
    assert nodes["x"]["value"].dtype == torch.float32
    micro = nodes["sales__micro"]["fn"]
    wanted = torch.stack(dense.seen(1.0))
    moments = dense.done(micro.mean.double(), micro.covariance_matrix.double())
    torch.testing.assert_close(torch.stack(moments), wanted, rtol=1e-4, atol=1e-4)
    assert abs(nodes["x"]["value"].sum().item() - 1) < 1e-5
    report = pm.can_inhibit(single.model, single.macro, "revenue", [1.0])
    assert report.feasible


def test_a_grid_of_values_along_a_plate():
    values = torch.tensor([-1.0, 0.0, 2.0, 5.0])
    dense = drawn(0, 3)
    intervened = pm.macro_do(
        dense.model, {dense.macro: pm.Inhibiting(values, "revenue")}
    )
    with pyro.plate("grid", 4):
        nodes = poutine.trace(intervened).get_trace().nodes
    assert nodes["x"]["value"].shape == (4, 3)
    torch.testing.assert_close(nodes["x"]["value"].sum(-1), values)
    micro = nodes["sales__micro"]["fn"]
    for i, value in enumerate(values):
        own = law(
            pm.macro_do(dense.model, {dense.macro: pm.Inhibiting(value, "revenue")})
        )
        torch.testing.assert_close(micro.mean[i], own.mean)
        torch.testing.assert_close(
            micro.covariance_matrix.expand(4, 3, 3)[i], own.covariance_matrix
        )
        x = nodes["sales__micro"]["value"]
        torch.testing.assert_close(micro.log_prob(x)[i], own.log_prob(x[i]))


def test_the_effect_as_a_macro_variable():
    """The total over a plate, with a confounder for each product, K = 1000."""
    k = 1000
    generator = torch.Generator().manual_seed(0)
    price = 1 + 4 * torch.rand(k, generator=generator)
    own = 0.5 + torch.rand(k, generator=generator)
    total = pm.MacroVariable("total", micro="x", over="products")
    revenue = pm.MacroVariable("revenue", micro="y", over="products")

    def model():
        with pyro.plate("products", k):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x = pyro.sample("x", dist.Normal(0.7 * z, own))
            pyro.deterministic("y", price * x + 0.5 * z, event_dim=0)

    variance = 0.49 + own**2
    crossed = (price * variance + 0.35).sum() / variance.sum()
    whole = ((0.7 * price + 0.5) ** 2 + (price * own) ** 2).sum()
    left = whole - crossed**2 * variance.sum()
    report = pm.can_inhibit(model, total, revenue, [10.0])
    assert report.observational_variance == pytest.approx(left.item(), rel=1e-9)
    assert report.noise_variance == pytest.approx(0.25 * k, rel=1e-9)
    found = pm.confounding(
        model, total, revenue, lambda v: pm.Inhibiting(v, revenue), [10.0, 200.0]
    )
    assert found.verdict == "inhibiting"
    expected = crossed * torch.tensor([10.0, 200.0])
    torch.testing.assert_close(found.interventional_mean, expected)
    torch.testing.assert_close(found.interventional_variance, left.expand(2))


# In inference


def test_gradients_to_the_prices():
    """Of the log density, to parameters of prices, confounding and macro value."""
    start = torch.tensor([1.0, 3.0, 0.2, 0.6, 1.5])
    free = torch.tensor([0.4, -0.3])

    def log_density(t):
        def model():
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            x = pyro.sample("x", dist.Normal(0.5 * z, t[3]).to_event(1))
            price = torch.cat([t[:2], t.new_ones(1)])
            pyro.sample("y", dist.Normal(x @ price + t[2] * z.sum(-1), 0.5))

        micro = law(pm.macro_do(model, {SALES: pm.Inhibiting(t[4], "y")}))
        return micro.log_prob(torch.cat([free, (t[4] - free.sum()).reshape(1)]))

    start.requires_grad_()
    (found,) = torch.autograd.grad(log_density(start), start)
    expected = finite_difference(lambda t: log_density(t).detach(), start.detach())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found.abs() > 1e-3).all()


@pytest.mark.parametrize("levers", [None, ["x0", "x2"]])
def test_gradients_to_a_param(levers):
    """The same through the trace and ``pyro.param``, with and without levers."""

    def model():
        price = pyro.param("price", torch.tensor([1.0, 2.0, 4.0]))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = [pyro.sample(f"x{i}", dist.Normal(0.5 * z, 1.0 + i)) for i in range(3)]
        mean = sum(p * v for p, v in zip(price, x, strict=True))
        pyro.sample("y", dist.Normal(mean + z, 0.5))

    total = pm.MacroVariable("total", micro=["x0", "x1", "x2"])
    data = {
        "total__micro": torch.tensor([0.4, -0.3, 1.9]),
        "z": torch.tensor(0.2),
        "y": torch.tensor(3.0),
    }
    inhibited = pm.macro_do(model, {total: pm.Inhibiting(2.0, "y", levers=levers)})
    conditioned = poutine.condition(inhibited, data)
    value = poutine.trace(conditioned).get_trace().log_prob_sum()
    raw = pyro.get_param_store()._params["price"]
    (found,) = torch.autograd.grad(value, raw)

    def at(price):
        with torch.no_grad():
            pyro.get_param_store()["price"] = price
            return poutine.trace(conditioned).get_trace().log_prob_sum()

    expected = finite_difference(at, raw.detach().clone())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert (found.abs() > 1e-3).all()


def intervened():
    return pm.macro_do(
        lambda: fixture((1.0, 3.0)), {SALES: pm.Inhibiting(2.0, "revenue")}
    )


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(parallel):
    n = 200 if not parallel else 20_000
    sites = ["revenue", "x", "sales"]
    drawn = Predictive(
        intervened(), num_samples=n, parallel=parallel, return_sites=sites
    )()
    assert (drawn["x"].sum(-1) - 2).abs().max() < 1e-12
    assert bool((drawn["sales"] == 2).all())
    revenue = drawn["revenue"].reshape(n)
    # P(Yb | xb = 2): slope 2.5, variance 2.5
    assert abs(revenue.mean() - 5) < 4.5 * (2.5 / n) ** 0.5
    assert abs(revenue.var() / 2.5 - 1) < 4.5 * (2 / n) ** 0.5


@pytest.mark.slow
def test_nuts():
    """On the fibre, with the moments of the law."""
    kernel = NUTS(intervened(), jit_compile=False)
    mcmc = MCMC(kernel, num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["sales__micro"].reshape(-1, 2)
    assert (draws.sum(-1) - 2).abs().max() < 1e-9
    assert abs(draws[:, 0].mean() - 0.5) < 0.15
    assert abs(draws[:, 0].std() - 0.375**0.5) < 0.12


def test_svi():
    """The guide finds the law of the free coordinate."""
    model = intervened()
    guide = AutoNormal(model)
    optimizer = pyro.optim.Adam({"lr": 0.05})
    svi = SVI(model, guide, optimizer, Trace_ELBO(10, vectorize_particles=True))
    losses = [svi.step() for _ in range(200)]
    assert all(np.isfinite(losses))
    with torch.no_grad():
        low, middle, high = guide.quantiles([0.1587, 0.5, 0.8413])["sales__micro"]
    torch.testing.assert_close(middle.sum(-1), torch.tensor(2.0))
    assert abs(middle.reshape(2)[0] - 0.5) < 0.15
    assert abs((high - low).reshape(2)[0].abs() / 2 - 0.375**0.5) < 0.15
