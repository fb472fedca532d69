# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix B: shifts and atomic interventions, (16) to (18), Definition 13, Lemma 4."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from shop import SALES, shop

import pyro_macro as pm

XB = pm.MacroVariable("xb", ["x1", "x2"])


def confounded(crossed=2.0):
    """Yb = 2 Xb + N with Var Xb = 4, Cov(Xb, N) = crossed, means 1 and 3."""
    z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    z2 = pyro.sample("z2", dist.Normal(0.0, 3**0.5))
    x1 = pyro.deterministic("x1", 0.25 + z1)
    x2 = pyro.deterministic("x2", 0.75 + z2)
    n = 3.0 + crossed / 4 * (z1 + z2)
    pyro.sample("y", dist.Normal(2 * (x1 + x2) + n, 1.0))


def three():
    """Prices that differ, three products, and a confounder of two of them."""
    z = pyro.sample("z", dist.Normal(0.5, 1.0))
    x1 = pyro.sample("x1", dist.Normal(z, 1.0))
    x2 = pyro.sample("x2", dist.Normal(1.0 - 0.5 * z, 2.0))
    x3 = pyro.sample("x3", dist.Normal(2.0, 0.5))
    pyro.sample("y", dist.Normal(x1 - 2 * x2 + 3 * x3 + 1.5 * z, 0.7))


THREE = pm.MacroVariable("xb", ["x1", "x2", "x3"])


class Three:
    """The same as coefficients of (1, z, e1, e2, e3, ey)."""

    X = np.array(
        [[0.5, 1, 1, 0, 0, 0], [0.75, -0.5, 0, 2, 0, 0], [2.0, 0, 0, 0, 0.5, 0]]
    )
    N = np.array([0.75, 1.5, 0, 0, 0, 0.7])
    ALPHA = np.array([1.0, -2.0, 3.0])
    XB = X.sum(0)
    Y = ALPHA @ X + N

    @staticmethod
    def law(row):
        return row[0], (row[1:] ** 2).sum()

    @classmethod
    def seen(cls, value):
        slope = cls.XB[1:] @ cls.Y[1:] / (cls.XB[1:] @ cls.XB[1:])
        rest = cls.Y - slope * cls.XB
        return rest[0] + slope * value, (rest[1:] ** 2).sum()


def quadrature(mean, variance, points=40):
    nodes, weights = np.polynomial.hermite_e.hermegauss(points)
    return mean + variance**0.5 * nodes, weights / weights.sum()


def mixture(weights, means, variances):
    means, variances = np.asarray(means), np.asarray(variances)
    mean = weights @ means
    return mean, weights @ (variances + means**2) - mean**2


def number(tensor):
    return float(tensor.reshape(()))


# Definition 13 and Lemma 4


def test_definition_13_gap_of_the_means():
    """-delta Cov(X, N) / Var X: a = 2, Var X = 4, Cov = 2, delta = 1.5 gives -0.75."""
    report = pm.shift_confounding(confounded, XB, "y", 1.5, at=[-1.0, 0.0, 2.0])
    gap = report.interventional_mean - report.observational_mean
    torch.testing.assert_close(gap, torch.full((3,), -0.75))
    torch.testing.assert_close(
        report.interventional_variance, report.observational_variance
    )
    assert report.verdict == "inducing"
    torch.testing.assert_close(report.distance, torch.full((3,), 0.75))
    # Var(Y | X) = 1 + Var(N | X) = 1
    torch.testing.assert_close(report.observational_variance, torch.ones(3))
    torch.testing.assert_close(report.divergence, torch.full((3,), 0.75**2 / 2))
    assert report.method == "exact: affine-Gaussian"
    assert "Shift" in report.realization


@pytest.mark.parametrize("crossed", [0.0, 1e-4, -3.0, 2.0])
def test_lemma_4(crossed):
    """P(Y | do(x)) = P(Y | x) if and only if all shifts are unconfounded."""
    atomic = pm.confounding(confounded, XB, "y", at=[0.0, 3.0], model_args=(crossed,))
    for delta in (-2.0, 0.3, 1.5):
        shifted = pm.shift_confounding(
            confounded, XB, "y", delta, at=[0.0, 3.0], model_args=(crossed,)
        )
        assert shifted.verdict == atomic.verdict
        gap = shifted.interventional_mean - shifted.observational_mean
        expected = torch.full((2,), -delta * crossed / 4)
        torch.testing.assert_close(gap, expected, atol=1e-12, rtol=1e-9)
    assert atomic.verdict == ("inducing" if crossed else "inhibiting")
    none = pm.shift_confounding(confounded, XB, "y", 0.0, model_args=(crossed,))
    assert none.verdict == "inhibiting" and len(none.at) == 5


def test_definition_13_along_a_direction():
    """The gap is delta (alpha.Delta - slope): natural direction none, in SHOP."""
    natural = pm.shift_confounding(shop, SALES, "revenue", 5.0)
    assert natural.verdict == "inhibiting"
    for along in ((0.0, 1.0), (0.5, 0.5), (0.8, 0.2), (3.0, -2.0)):
        report = pm.shift_confounding(shop, SALES, "revenue", 5.0, along, [33.0])
        gap = number(report.interventional_mean - report.observational_mean)
        assert gap == pytest.approx(5 * (along[0] + 3 * along[1] - 1.4), abs=1e-9)
    with pytest.raises(pm.OffFibre):
        pm.shift_confounding(shop, SALES, "revenue", 5.0, (1.0, 1.0))


@pytest.mark.parametrize("along", [None, (0.2, 0.5, 0.3), (0.0, 0.0, 1.0)])
def test_definition_13_by_hand(along):
    """P(Yb | Xb + delta = xb) after the shift, from the coefficients."""
    delta, at = 0.8, [-1.0, 2.0]
    found = pm.shift_confounding(three, THREE, "y", delta, along, at)
    if along is None:
        within = Three.XB[1:] @ Three.XB[1:]
        along = Three.X[:, 1:] @ Three.XB[1:] / within
    moved = delta * Three.ALPHA @ np.asarray(along)
    for i, value in enumerate(at):
        mean, variance = Three.seen(value - delta)
        assert float(found.interventional_mean[i]) == pytest.approx(mean + moved)
        assert float(found.interventional_variance[i]) == pytest.approx(variance)
        mean, variance = Three.seen(value)
        assert float(found.observational_mean[i]) == pytest.approx(mean)


# Equations (16) to (18)


def test_equation_16_of_one_variable():
    """Shifts by x - x' from every x', averaged, are do(X := x)."""
    at = [-1.0, 2.5]
    atomic = pm.atomic_from_shifts(confounded, XB, "y", at=at)
    done = pm.confounding(confounded, XB, "y", at=at)
    torch.testing.assert_close(atomic.mean, done.interventional_mean)
    torch.testing.assert_close(atomic.variance, done.interventional_variance)
    # E Y = 2 x + 3, Var = Var N = 1 + 1
    torch.testing.assert_close(atomic.mean, torch.tensor([1.0, 8.0]))
    torch.testing.assert_close(atomic.variance, torch.full((2,), 2.0))


@pytest.mark.parametrize("along", [None, (0.2, 0.5, 0.3), (0.0, 0.0, 1.0)])
def test_equation_16_by_quadrature(along):
    """The integral over x' of P(Y | X = x', X + (x - x')), as it stands."""
    value = 1.7
    points, weights = quadrature(*Three.law(Three.XB))
    parts = [
        pm.shift_confounding(three, THREE, "y", value - x, along, [value])
        for x in points
    ]
    mean, variance = mixture(
        weights,
        [number(p.interventional_mean) for p in parts],
        [number(p.interventional_variance) for p in parts],
    )
    found = pm.atomic_from_shifts(three, THREE, "y", along, [value])
    assert number(found.mean) == pytest.approx(mean)
    assert number(found.variance) == pytest.approx(variance)
    # X + Delta (x - Xb), from the coefficients
    if along is None:
        along = Three.X[:, 1:] @ Three.XB[1:] / (Three.XB[1:] @ Three.XB[1:])
    beta = Three.ALPHA @ np.asarray(along)
    row = Three.Y - beta * Three.XB
    row[0] += beta * value
    assert number(found.mean) == pytest.approx(Three.law(row)[0])
    assert number(found.variance) == pytest.approx(Three.law(row)[1])


@pytest.mark.parametrize("along", [None, (0.2, 0.5, 0.3)])
def test_equation_18_by_quadrature(along):
    """The integral over x' of what setting x' + delta does to those with x'."""
    delta = -1.3
    points, weights = quadrature(*Three.law(Three.XB))
    moved = [
        pm.shift_confounding(three, THREE, "y", delta, along, [x + delta])
        for x in points
    ]
    mean, variance = mixture(
        weights,
        [number(p.interventional_mean) for p in moved],
        [number(p.interventional_variance) for p in moved],
    )
    found = pm.shift_from_atomics(three, THREE, "y", [delta, 0.0], along)
    assert float(found.mean[0]) == pytest.approx(mean)
    assert float(found.variance[0]) == pytest.approx(variance)
    # No shift: the marginal law
    mean, variance = Three.law(Three.Y)
    assert float(found.mean[1]) == pytest.approx(mean)
    assert float(found.variance[1]) == pytest.approx(variance)
    assert found.at.tolist() == [delta, 0.0]


@pytest.mark.parametrize("along", [None, (0.2, 0.5, 0.3)])
def test_equation_18_is_what_shift_draws(along):
    """200,000 draws under Shift: 5 standard errors."""
    n, delta = 200_000, 2.0
    found = pm.shift_from_atomics(three, THREE, "y", delta, along)
    with pyro.plate("draws", n):
        fn = pm.macro_do(three, {THREE: pm.Shift(delta, along)})
        y = pyro.poutine.trace(fn).get_trace().nodes["y"]["value"]
    variance = number(found.variance)
    assert abs(y.mean() - number(found.mean)) < 5 * (variance / n) ** 0.5
    assert abs(y.var() / variance - 1) < 5 * (2 / n) ** 0.5


def test_unconfounded_natural_shifts_are_natural_interventions():
    """In SHOP (16) along the natural direction gives the law of shop A."""
    at = [30.0, 33.0]
    atomic = pm.atomic_from_shifts(shop, SALES, "revenue", at=at)
    natural = pm.confounding(shop, SALES, "revenue", at=at)
    torch.testing.assert_close(atomic.mean, natural.interventional_mean)
    torch.testing.assert_close(atomic.variance, natural.interventional_variance)
    # Along (0, 1) it is shop B: X1 stays, X2 takes up the rest
    other = pm.atomic_from_shifts(shop, SALES, "revenue", (0.0, 1.0), at)
    advertised = pm.confounding(
        shop, SALES, "revenue", lambda v: pm.Residual(v, absorb="x2"), at
    )
    torch.testing.assert_close(other.mean, advertised.interventional_mean)
    torch.testing.assert_close(other.variance, advertised.interventional_variance)


# App. C.1


@pytest.mark.parametrize("along", [(0.2, 0.5, 0.3), (0.0, 0.0, 1.0), (2.0, -3.0, 2.0)])
def test_appendix_c_1_coefficient(along):
    found = pm.structural_coefficient(three, THREE, "y", along)
    assert found == pytest.approx(Three.ALPHA @ np.asarray(along))


def test_appendix_c_1_natural_directions():
    """SHOP: Delta = (0.8, 0.2) gives 1.4; correlated X: S1 / (1'S1)."""
    assert pm.structural_coefficient(shop, SALES, "revenue") == pytest.approx(1.4)
    found = pm.structural_coefficient(shop, SALES, "revenue", (0.8, 0.2))
    assert found == pytest.approx(1.4)
    spread = Three.X[:, 1:] @ Three.X[:, 1:].T
    natural = spread.sum(-1) / spread.sum()
    found = pm.structural_coefficient(three, THREE, "y")
    assert found == pytest.approx(Three.ALPHA @ natural)
    # It is not the slope of the regression, for three() is confounded
    slope = Three.seen(1.0)[0] - Three.seen(0.0)[0]
    assert abs(found - slope) > 0.1


def test_effects_with_several_elements():
    """One coefficient, and one law of a shift, for each."""

    def model():
        x = pyro.sample(
            "x", dist.Normal(torch.ones(2), torch.tensor([1.0, 2.0])).to_event(1)
        )
        pyro.sample("y", dist.Normal(x * torch.tensor([1.0, 3.0]), 1.0).to_event(1))

    cause = pm.MacroVariable("xb", "x")
    found = pm.structural_coefficient(model, cause, "y")
    torch.testing.assert_close(found, torch.tensor([0.2, 2.4]))
    shifted = pm.shift_from_atomics(model, cause, "y", [0.0, 1.0])
    assert shifted.mean.shape == shifted.variance.shape == (2, 2)
    torch.testing.assert_close(shifted.mean, torch.tensor([[1.0, 3.0], [1.2, 5.4]]))
    torch.testing.assert_close(
        shifted.variance, torch.tensor([[2.0, 37.0], [2.0, 37.0]])
    )
    atomic = pm.atomic_from_shifts(model, cause, "y", at=[2.0, 3.0])
    natural = pm.confounding(model, cause, "y", at=[2.0, 3.0])
    torch.testing.assert_close(atomic.mean, natural.interventional_mean)
    torch.testing.assert_close(atomic.variance, natural.interventional_variance)
    report = pm.shift_confounding(model, cause, "y", 1.0)
    assert report.verdict == "inhibiting" and report.distance.shape == (5,)


def test_programs_that_are_not_gaussian():
    def model():
        x = pyro.sample("x", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0))

    cause = pm.MacroVariable("xb", "x")
    for ask in (
        lambda: pm.shift_confounding(model, cause, "y", 1.0),
        lambda: pm.atomic_from_shifts(model, cause, "y"),
        lambda: pm.shift_from_atomics(model, cause, "y", 1.0),
        lambda: pm.structural_coefficient(model, cause, "y"),
    ):
        with pytest.raises(pm.UnsupportedLaw, match="'x' is not Gaussian"):
            ask()


@pytest.mark.parametrize("delta", [[1.0, 2.0, 3.0], "a", float("nan"), None])
def test_a_shift_is_one_finite_number(delta):
    with pytest.raises(pm.PyroMacroError, match="delta"):
        pm.shift_confounding(shop, SALES, "revenue", delta, at=[33.0])
