# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Dose-response curves: exact ones, drawn ones, and what is reported of them."""

import itertools

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyro_macro as pm

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

PAIR = pm.MacroVariable("s", ["x1", "x2"])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def ask(model, cause=PAIR, effect="y", realization=pm.Natural, at=None, **kwargs):
    kwargs = {"progress": False, **kwargs}
    return pm.dose_response(model, cause, effect, realization, at, **kwargs)


def double(numbers):
    return torch.as_tensor(np.asarray(numbers), dtype=torch.float64)


def close(found, expected, tolerance=1e-9):
    torch.testing.assert_close(found, double(expected), rtol=tolerance, atol=tolerance)


# -- Affine-Gaussian programs, by numpy --------------------------------------------

PRICES = np.array([1.0, 3.0, -2.0, 0.5])
LOADINGS = np.array([[1.0, 0.5], [-0.5, 1.0], [0.3, 0.0], [0.0, -2.0]])
OWN = np.array([2.0, 1.0, 0.5, 1.5])
MEANS = np.array([10.0, 5.0, -3.0, 1.0])
DIRECT = np.array([0.5, -0.4])  # of the causes on the effect
WEIGHTS = np.array([1.0, 2.0, -0.5, 1.0])
FOUR = [f"x{k}" for k in range(4)]
TOTAL = pm.MacroVariable("s", FOUR, aggregation=pm.Linear(WEIGHTS.tolist()))


def program():
    """``X = m + L z + noise`` and ``Y = p.X + d.z + noise``."""
    z = [pyro.sample(f"z{j}", dist.Normal(0.0, 1.0)) for j in range(2)]
    x = []
    for k, name in enumerate(FOUR):
        loc = MEANS[k] + sum(float(LOADINGS[k, j]) * z[j] for j in range(2))
        x.append(pyro.sample(name, dist.Normal(loc, float(OWN[k]))))
    y = sum(float(p) * v for p, v in zip(PRICES, x, strict=True))
    y = y + sum(float(d) * v for d, v in zip(DIRECT, z, strict=True))
    return pyro.sample("y", dist.Normal(y, 0.7))


COVARIANCE = LOADINGS @ LOADINGS.T + np.diag(OWN**2)
SPREAD = WEIGHTS @ COVARIANCE @ WEIGHTS
REST = DIRECT @ DIRECT + 0.49  # what is independent of X once it is set


def effect_of(mean, covariance):
    """Mean and variance of Y when X has this law, whatever Z is."""
    return PRICES @ mean, PRICES @ covariance @ PRICES + REST


def natural(v):
    gain = COVARIANCE @ WEIGHTS / SPREAD
    mean = MEANS + gain * (v - WEIGHTS @ MEANS)
    return effect_of(mean, COVARIANCE - np.outer(gain, WEIGHTS @ COVARIANCE))


def residual(k):
    def law(v):
        linear = np.eye(4)
        linear[k] -= WEIGHTS / WEIGHTS[k]
        step = np.eye(4)[k] * v / WEIGHTS[k]
        return effect_of(linear @ MEANS + step, linear @ COVARIANCE @ linear.T)

    return law


def allocated(shares):
    return lambda v: effect_of(v * np.asarray(shares), np.zeros((4, 4)))


def reference(v):
    """A standard normal, given the total."""
    gain = WEIGHTS / (WEIGHTS @ WEIGHTS)
    return effect_of(gain * v, np.eye(4) - np.outer(gain, WEIGHTS))


def held(v):
    """Natural given z0: the law of X given s and z0, and z0 as it is."""
    rest = COVARIANCE - np.outer(LOADINGS[:, 0], LOADINGS[:, 0])
    gain = rest @ WEIGHTS / (WEIGHTS @ rest @ WEIGHTS)
    # X = c + e z0 + noise, where the noise has no total
    along = LOADINGS[:, 0] - gain * (WEIGHTS @ LOADINGS[:, 0])
    mean = MEANS + gain * (v - WEIGHTS @ MEANS)
    inside = rest - np.outer(gain, WEIGHTS @ rest)
    own = (PRICES @ along + DIRECT[0]) ** 2 + DIRECT[1] ** 2 + 0.49
    return PRICES @ mean, PRICES @ inside @ PRICES + own


def seen(v):
    """What an inhibiting realization brings about: Y given the total."""
    crossed = PRICES @ COVARIANCE @ WEIGHTS + DIRECT @ LOADINGS.T @ WEIGHTS
    variance = PRICES @ COVARIANCE @ PRICES + REST
    variance += 2 * PRICES @ LOADINGS @ DIRECT
    mean = PRICES @ MEANS + crossed / SPREAD * (v - WEIGHTS @ MEANS)
    return mean, variance - crossed**2 / SPREAD


SHARES = (np.array([0.4, 0.1, 0.2, 0.5]) / 1.0).tolist()  # of total one


def identity():
    return dist.MultivariateNormal(torch.zeros(4), torch.eye(4))


def at_even(v):
    return dist.Delta(v.unsqueeze(-1) * torch.tensor(SHARES), event_dim=1)


AFFINE = {
    "Natural": (pm.Natural, natural),
    "Natural, given": (lambda v: pm.Natural(v, given="z0"), held),
    "Residual": (lambda v: pm.Residual(v, "x1"), residual(1)),
    "Residual, other": (lambda v: pm.Residual(v, 2), residual(2)),
    "Allocate": (lambda v: pm.Allocate(v, SHARES), allocated(SHARES)),
    "Explicit": (lambda v: pm.Explicit(v, at_even), allocated(SHARES)),
    "MaxEntropy": (lambda v: pm.MaxEntropy(v, identity()), reference),
    "Inhibiting": (lambda v: pm.Inhibiting(v, "y"), seen),
}
AT = [10.0, 18.0, 25.0]


def test_shares_are_of_one():
    assert abs(WEIGHTS @ SHARES - 1.0) < 1e-12


@pytest.mark.parametrize("name", AFFINE)
def test_affine_programs(name):
    """Means and variances are those of matrices."""
    way, law = AFFINE[name]
    (curve,) = ask(program, TOTAL, realization=way, at=AT).curves
    assert "Monte Carlo" not in curve.method and curve.method.startswith("exact")
    expected = [law(v) for v in AT]
    close(curve.mean, [m for m, _ in expected], 1e-8)
    close(curve.variance, [s for _, s in expected], 1e-8)
    for level in (0.1, 0.5, 0.975):
        wanted = [stats.norm(m, s**0.5).ppf(level) for m, s in expected]
        close(curve.quantile(level), wanted, 1e-8)


DRAWN_AFFINE = {
    # y = p.X + d.z with X = own part given z0, and x1 takes the rest
    "Residual, given": lambda v: pm.Residual(v, "x1", given="z0"),
    "Proportional": lambda v: pm.Proportional(v),
}


def test_affine_programs_that_have_to_be_drawn():
    """Given a cause, the rest is taken: a straight line, up to rounding."""
    at = [10.0, 13.0, 18.0, 25.0]
    way = DRAWN_AFFINE["Residual, given"]
    (curve,) = ask(program, TOTAL, realization=way, at=at, num_samples=2000).curves
    slopes = curve.mean.diff() / double(at).diff()
    close(slopes, [PRICES[1] / WEIGHTS[1]] * 3, 1e-8)
    close(curve.variance, [float(curve.variance[0])] * 4, 1e-8)
    # X given z0, in which x1 takes the rest; z0 is as it is
    linear = np.eye(4)
    linear[1] -= WEIGHTS / WEIGHTS[1]
    rest = COVARIANCE - np.outer(LOADINGS[:, 0], LOADINGS[:, 0])
    mean = [PRICES @ (linear @ MEANS) + PRICES[1] * v / WEIGHTS[1] for v in at]
    variance = PRICES @ linear @ rest @ linear.T @ PRICES
    variance += (PRICES @ linear @ LOADINGS[:, 0] + DIRECT[0]) ** 2
    variance += DIRECT[1] ** 2 + 0.49
    error = (variance / 2000) ** 0.5
    assert float((curve.mean - double(mean)).abs().max()) < 5 * error
    assert abs(float(curve.variance[0]) / variance - 1) < 5 * (2 / 2000) ** 0.5


def test_proportional_curves():
    """Ratios have no closed form, but along the values they are straight lines."""
    at = [10.0, 20.0, 30.0, 40.0]
    way = DRAWN_AFFINE["Proportional"]
    (curve,) = ask(positive, realization=way, at=at, num_samples=2000).curves
    assert "Monte Carlo" in curve.method
    assert float(curve.mean.diff().diff().abs().max()) < 1e-8

    x1, x2 = np.meshgrid(np.linspace(4, 16, 801), np.linspace(14, 26, 801))
    density = stats.norm(10, 1).pdf(x1) * stats.norm(20, 1).pdf(x2)
    mix = ((x1 + 3 * x2) / (x1 + x2) * density).sum() / density.sum()
    slope = float(curve.mean.diff()[0]) / 10
    assert abs(slope - mix) < 5 * 0.06 / 2000**0.5
    error = (curve.variance / 2000) ** 0.5
    assert bool(((curve.mean - mix * double(at) - 1).abs() < 5 * error).all())


def positive():
    z = pyro.sample("z", dist.Normal(1.0, 2.0))
    x1 = pyro.sample("x1", dist.Normal(10.0, 1.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + z, 1.0))


def test_curves_agree_with_the_report_on_confounding():
    for way in (pm.Natural, AFFINE["Residual"][0], AFFINE["Natural, given"][0]):
        report = pm.confounding(program, TOTAL, "y", way, at=AT)
        (curve,) = ask(program, TOTAL, realization=way, at=AT).curves
        torch.testing.assert_close(curve.mean, report.interventional_mean)
        torch.testing.assert_close(curve.variance, report.interventional_variance)


def test_a_program_in_single_precision():
    torch.set_default_dtype(torch.float32)
    for name in ("Natural", "Residual", "Inhibiting"):
        way, law = AFFINE[name]
        (curve,) = ask(program, TOTAL, realization=way, at=AT).curves
        close(curve.mean.double(), [law(v)[0] for v in AT], 1e-4)
        close(curve.variance.double(), [law(v)[1] for v in AT], 1e-4)


def test_default_values_of_an_affine_program():
    """Quantiles of the macro value, as it is."""
    report = ask(program, TOTAL)
    levels = np.array([0.05, 0.25, 0.5, 0.75, 0.95])
    expected = stats.norm(WEIGHTS @ MEANS, SPREAD**0.5).ppf(levels)
    close(report.at, expected, 1e-8)
    close(report.curves[0].mean, [natural(v)[0] for v in expected], 1e-8)


# -- Plates, vectors, several elements ---------------------------------------------


def market():
    """For each of three shops, a total over two goods, and an effect."""
    with pyro.plate("shops", 3):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(torch.arange(3.0) + z, 2.0))
        x2 = pyro.sample("x2", dist.Normal(1.0, 1.0))
        return pyro.sample("y", dist.Normal(x1 + 3 * x2 + z, 0.5))


def test_plates_that_stay():
    """The same macro value in each shop, and the effect in each."""
    at = [0.0, 4.0]
    (curve,) = ask(market, at=at).curves
    # Given the total, x1 moves 5 times as much as x2
    start = np.arange(3.0)
    x1 = [start + 5 / 6 * (v - start - 1) for v in at]
    x2 = [1 + 1 / 6 * (v - start - 1) for v in at]
    mean = np.array(x1) + 3 * np.array(x2)
    assert curve.mean.shape == curve.variance.shape == (2, 3)
    close(curve.mean, mean)
    close(curve.variance, np.full((2, 3), 4 * 5 / 6 + 1.25))
    close(curve.quantile(0.3), mean + stats.norm.ppf(0.3) * (4 * 5 / 6 + 1.25) ** 0.5)


def test_a_macro_variable_as_the_effect():
    """The sum of all effects; noises of shops are independent."""
    revenue = pm.MacroVariable("revenue", "y", over="shops")
    (curve,) = ask(market, effect=revenue, at=[0.0, 4.0]).curves
    each = ask(market, at=[0.0, 4.0]).curves[0]
    close(curve.mean, each.mean.sum(-1))
    close(curve.variance, each.variance.sum(-1))


def test_a_macro_variable_over_a_plate():
    cause = pm.MacroVariable("s", "x1", over="shops")
    way = {"natural": pm.Natural, "first": lambda v: pm.Residual(v, 0)}
    report = ask(market, cause, pm.MacroVariable("r", "y", over="shops"), way, [6.0])
    for name in way:  # Y sums x1 and 3 for x2, whatever the parts are
        close(report[name].mean, [6.0 + 9.0])
        close(report[name].variance, [3 * (9 + 1 + 0.25)])


def test_a_vector_of_macro_values():
    rows = np.array([[1.0, 1.0, 0.0], [0.0, 1.0, 2.0]])
    cause = pm.MacroVariable("s", "x", "parts", pm.Linear(rows.tolist()))
    prices = np.array([1.0, -2.0, 0.5])

    def model():
        with pyro.plate("parts", 3):
            x = pyro.sample("x", dist.Normal(torch.arange(3.0), 1.0))
        pyro.sample("y", dist.Normal((x * double(prices)).sum(-1), 0.1))

    at = np.array([[0.0, 1.0], [2.0, 2.0], [-1.0, 3.0]])
    report = ask(model, cause, at=at)
    gain = rows.T @ np.linalg.inv(rows @ rows.T)
    means = [np.arange(3.0) + gain @ (v - rows @ np.arange(3.0)) for v in at]
    variance = prices @ (np.eye(3) - gain @ rows) @ prices + 0.01
    close(report.curves[0].mean, [prices @ m for m in means])
    close(report.curves[0].variance, [variance] * 3)
    close(report.at, at)
    frame = report.to_pandas()
    assert list(frame["s"]) == [tuple(v) for v in at]
    with pytest.raises(pm.PyroMacroError, match="vector"):
        ask(model, cause)
    with pytest.raises(pm.PyroMacroError, match="several"):
        report.plot()


def test_an_effect_of_several_elements_that_is_drawn():
    """Moments by element; of whole laws, one is to be asked about."""
    at = [28.0, 32.0]

    def model():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        with pyro.plate("shops", 2):
            loc = torch.tensor([0.1, 0.0]) * x1 + torch.tensor([0.0, 0.1]) * x2
            pyro.sample("y", dist.LogNormal(loc, 0.1))

    (curve,) = ask(model, at=at).curves
    assert curve.mean.shape == (2, 2)
    for i, v in enumerate(at):
        loc = np.array([10 + 0.8 * (v - 30), 20 + 0.2 * (v - 30)]) / 10
        spread = 0.01 + 0.8 / 100
        mean = np.exp(loc + spread / 2)
        variance = (np.exp(spread) - 1) * mean**2
        error = double(variance / 2000).sqrt()
        assert bool(((curve.mean[i] - double(mean)).abs() < 5 * error).all())
        assert bool(((curve.variance[i] / double(variance) - 1).abs() < 0.2).all())
    with pytest.raises(pm.PyroMacroError, match="2"):
        curve.quantile(0.5)


# -- Finite programs, by enumeration -----------------------------------------------

CHANCE = {0: 0.3, 1: 0.7}  # of the cause
KINDS = {0: [0.5, 0.3, 0.2], 1: [0.1, 0.2, 0.7]}  # of x1, by the cause
HALF = {0: 0.4, 1: 0.8}  # of x2
SIZES = [0.0, 1.0, 2.0, 4.0]


def level(a, b, z):
    """Weights of the outcomes."""
    return np.array([1.0 + z, 1.0 + a, 2.0 * b + 0.5, 0.5 + a * b])


def finite():
    z = pyro.sample("z", dist.Bernoulli(CHANCE[1])).long()
    x1 = pyro.sample("x1", dist.Categorical(torch.tensor([KINDS[0], KINDS[1]])[z]))
    x2 = pyro.sample("x2", dist.Bernoulli(torch.tensor([HALF[0], HALF[1]])[z]))
    table = torch.stack([1.0 + z, 1.0 + x1, 2.0 * x2 + 0.5, 0.5 + x1 * x2], -1)
    k = pyro.sample("k", dist.Categorical(table / table.sum(-1, keepdim=True)))
    return pyro.deterministic("y", torch.tensor(SIZES)[k])


def micro(a, b, z):
    return KINDS[z][a] * (HALF[z] if b else 1 - HALF[z])


STATES = list(itertools.product(range(3), range(2)))


def under(law):
    """The outcome when the micro state has a law, which may depend on the cause."""

    def outcome(v):
        total = np.zeros(4)
        for z, (a, b) in itertools.product(CHANCE, STATES):
            if a + b == v:
                weights = level(a, b, z)
                total += CHANCE[z] * law(a, b, z, v) * weights / weights.sum()
        return total

    return outcome


def normalized(weight):
    def law(a, b, z, v):
        inside = [(c, d) for c, d in STATES if c + d == v]
        return weight(a, b, z) / sum(weight(c, d, z) for c, d in inside)

    return law


def mixed(a, b, z):
    return sum(CHANCE[c] * micro(a, b, c) for c in CHANCE)


FINITE = {
    "Natural": (pm.Natural, under(normalized(mixed))),
    "Natural, given": (
        lambda v: pm.Natural(v, given="z"),
        under(normalized(micro)),
    ),
    "MaxEntropy": (pm.MaxEntropy, under(normalized(lambda a, b, z: 1.0))),
}


@pytest.mark.parametrize("name", FINITE)
def test_finite_programs(name):
    way, outcome = FINITE[name]
    at = [0.0, 1.0, 2.0, 3.0]
    (curve,) = ask(finite, realization=way, at=at).curves
    assert curve.method == "exact: finite"
    laws = [outcome(v) for v in at]
    sizes = np.array(SIZES)
    means = [law @ sizes for law in laws]
    close(curve.mean, means)
    close(
        curve.variance,
        [law @ sizes**2 - m**2 for law, m in zip(laws, means, strict=True)],
    )
    for quantile in (0.05, 0.31, 0.5, 0.77, 0.999):
        wanted = [sizes[np.searchsorted(law.cumsum(), quantile)] for law in laws]
        close(curve.quantile(quantile), wanted)


def test_default_values_of_a_finite_program():
    report = ask(finite)
    close(report.at, [0.0, 1.0, 2.0, 3.0])


def test_values_that_a_finite_program_cannot_have():
    ways = {"Natural": pm.Natural, "MaxEntropy": pm.MaxEntropy}
    ways["given"] = lambda v: pm.Natural(v, given="z")
    for way, at in (("Natural", [1.0, 7.0]), ("MaxEntropy", [1.5]), ("given", [-1.0])):
        with pytest.raises(pm.Infeasible):
            ask(finite, realization=ways[way], at=at)


def test_a_finite_effect_of_several_elements():
    """Bernoulli sites in a plate: moments are right, and no quantile is made up."""

    def model():
        with pyro.plate("shops", 2):
            x1 = pyro.sample("x1", dist.Bernoulli(0.5))
            x2 = pyro.sample("x2", dist.Bernoulli(0.4))
            pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * x1 + 0.5 * x2))

    (curve,) = ask(model, at=[0.0, 1.0, 2.0]).curves
    p = 0.5 * 0.4 / (0.5 * 0.4 + 0.5 * 0.6)  # of x2, given that one of them is
    mean = np.array([0.1, 0.3 + 0.3 * p, 0.8])
    close(curve.mean, np.stack([mean, mean], -1))
    close(curve.variance, np.stack([mean * (1 - mean)] * 2, -1))
    with pytest.raises(pm.PyroMacroError, match="quantile"):
        curve.quantile(0.5)


# -- Monte Carlo -------------------------------------------------------------------


def curved(kind="exp"):
    """A shop, whose outcome is no affine function of its sales."""

    def model():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        u = (x1 - 10 + 2 * (x2 - 20)) / 4
        if kind == "exp":
            return pyro.sample("y", dist.Normal(u.exp(), 0.3))
        if kind == "square":
            return pyro.deterministic("y", u.square())
        if kind == "lognormal":
            return pyro.sample("y", dist.LogNormal(u, 0.2))
        if kind == "bernoulli":
            law = torch.distributions.Normal(0.0, 1.0)
            return pyro.sample("y", dist.Bernoulli(law.cdf(u)))
        if kind == "kink":
            return pyro.deterministic("y", u.clamp(min=0.0))
        if kind == "exponential":
            return pyro.sample("y", dist.Exponential(u.exp()))
        return pyro.sample("y", dist.Poisson(u.exp()))

    return model


def spread(v, way):
    """Mean and variance of u, under what is done."""
    if way == "natural":
        return (0.8 + 2 * 0.2) * (v - 30) / 4, 0.8 / 16
    return 2 * (v - 30) / 4, 4.0 / 16  # x1 as it is, x2 takes the rest


def moments(kind, m, s):
    """Of the outcome, for ``u ~ N(m, s)``."""
    grown = np.exp(m + s / 2)
    inflated = np.exp(2 * m + 2 * s)
    if kind == "exp":
        return grown, inflated - grown**2 + 0.09
    if kind == "square":
        return m**2 + s, 2 * s**2 + 4 * m**2 * s
    if kind == "lognormal":
        mean = np.exp(m + (s + 0.04) / 2)
        return mean, (np.exp(s + 0.04) - 1) * mean**2
    if kind == "bernoulli":
        p = stats.norm.cdf(m / (1 + s) ** 0.5)
        return p, p * (1 - p)
    if kind == "kink":
        d = s**0.5
        p, q = stats.norm.cdf(m / d), stats.norm.pdf(m / d)
        mean = m * p + d * q
        return mean, (m**2 + s) * p + m * d * q - mean**2
    if kind == "exponential":
        mean = np.exp(-m + s / 2)
        return mean, 2 * np.exp(-2 * m + 2 * s) - mean**2
    return grown, grown + inflated - grown**2


SMOOTH = ["exp", "square", "lognormal", "kink", "exponential"]
OUTCOMES = [*SMOOTH, "bernoulli", "poisson"]
WAYS = {"natural": pm.Natural, "rest": lambda v: pm.Residual(v, "x2")}
GRID = np.linspace(27, 33, 13)
DRAWS = 2000


@pytest.mark.parametrize("kind", OUTCOMES)
def test_drawn_outcomes(kind):
    """Within five standard errors of closed forms, at each macro value."""
    report = ask(curved(kind), realization=WAYS, at=GRID, num_samples=DRAWS)
    for way in WAYS:
        curve = report[way]
        assert "Monte Carlo: 2,000 draws" in curve.method
        expected = [moments(kind, *spread(v, way)) for v in GRID]
        mean, variance = (double([e[i] for e in expected]) for i in range(2))
        error = (variance / DRAWS).sqrt()
        assert bool(((curve.mean - mean).abs() < 5 * error).all())
        common = mean.abs() > 0.01  # rare outcomes have no variance to speak of
        ratio = (curve.variance / variance)[common]
        assert bool(((ratio - 1).abs() < 0.5).all())


@pytest.mark.parametrize("kind", SMOOTH)
@pytest.mark.parametrize("way", WAYS)
def test_drawn_curves_are_smooth(kind, way):
    """Second differences have much less noise than those of independent draws."""
    model, draws = curved(kind), 500
    realization = WAYS[way]
    (curve,) = ask(model, realization=realization, at=GRID, num_samples=draws).curves
    at = double(GRID).unsqueeze(-1)
    pyro.set_rng_seed(0)
    with pyro.plate("values", 13, dim=-2), pyro.plate("draws", draws, dim=-1):
        apart = pm.macro_do(model, {PAIR: realization(at)})().mean(1)
    exact = double([moments(kind, *spread(v, way))[0] for v in GRID])
    bend = exact.diff().diff()
    mine = (curve.mean.diff().diff() - bend).square().mean().sqrt()
    yours = (apart.diff().diff() - bend).square().mean().sqrt()
    assert float(mine) < 0.2 * float(yours)


def test_the_difference_of_neighbours_is_precise():
    """A derivative from two macro values: its error is far below that of two means."""
    step, slope = 0.01, (1.2 / 4)
    at = [30.0, 30.0 + step]
    (curve,) = ask(curved("exp"), at=at, num_samples=DRAWS).curves
    expected = slope * np.exp(0.05 / 2)
    assert abs(float(curve.mean.diff()) / step - expected) < 0.02


def test_monotone_bernoulli_curves():
    """Each draw goes up where its probability does, so that the curve does."""
    (curve,) = ask(curved("bernoulli"), at=GRID, num_samples=200).curves
    assert bool((curve.mean.diff() >= 0).all())
    draws = curve.outcomes.draws
    assert draws.shape == (13, 200) and bool((draws.diff(dim=0) >= 0).all())


def test_quantiles_of_draws():
    (curve,) = ask(curved("lognormal"), at=GRID, num_samples=DRAWS).curves
    for q in (0.1, 0.5, 0.9):
        for i, v in enumerate(GRID):
            m, s = spread(v, "natural")
            law = stats.lognorm((s + 0.04) ** 0.5, scale=np.exp(m))
            share = law.cdf(float(curve.quantile(q)[i]))
            assert abs(share - q) < 5 * (q * (1 - q) / DRAWS) ** 0.5


PARTS = {
    "Poisson": (
        lambda k: dist.Poisson(float(k)),
        [3.0, 6.0, 9.0],
        lambda v: (v / 3, v * 2 / 9),  # binomial
    ),
    "Gamma": (
        lambda k: dist.Gamma(float(k), 2.0),
        [1.0, 2.0, 5.0],
        lambda v: (v / 3, v**2 * 2 / (9 * 4)),  # beta
    ),
    "Exponential": (
        lambda k: dist.Exponential(2.0),
        [1.0, 2.0, 5.0],
        lambda v: (v / 2, v**2 / 12),  # uniform
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_other_families(name):
    """The natural law is known, the outcome ``x1 + 3 x2`` is drawn: ``3 v - 2 x1``."""
    make, at, law = PARTS[name]

    def model():
        x1, x2 = pyro.sample("x1", make(1)), pyro.sample("x2", make(2))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))

    (curve,) = ask(model, at=at).curves
    for i, v in enumerate(at):
        m, s = law(v)
        variance = 4 * s + 0.25
        error = (variance / DRAWS) ** 0.5
        assert abs(float(curve.mean[i]) - (3 * v - 2 * m)) < 5 * error
        assert abs(float(curve.variance[i]) / variance - 1) < 0.25


def test_the_scale_family_is_smooth():
    """Parts of positive sites are shares, the same at all totals."""
    make, at, _ = PARTS["Gamma"]

    def model():
        x1, x2 = pyro.sample("x1", make(1)), pyro.sample("x2", make(2))
        pyro.deterministic("y", x1 + 3 * x2)

    ways = {"even": lambda v: pm.Allocate(v, [0.5, 0.5]), "mix": pm.Proportional}
    report = ask(model, realization=ways, at=[1.0, 2.0, 3.0, 4.0])
    close(report["even"].mean, [2.0, 4.0, 6.0, 8.0])
    close(report["even"].variance, [0.0] * 4, 1e-12)
    bend = report["mix"].mean.diff().diff()
    assert float(bend.abs().max()) < 1e-8


def test_parts_without_a_known_law():
    """Student's t: by draws given the total, against an integral."""

    def model():
        x1 = pyro.sample("x1", dist.StudentT(5.0, 0.0, 1.0))
        x2 = pyro.sample("x2", dist.Normal(0.0, 1.5))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))

    at = [-1.0, 2.0]
    (curve,) = ask(model, at=at).curves
    for i, v in enumerate(at):
        x = np.linspace(-60, 60, 200001)
        p = stats.t(5.0).pdf(x) * stats.norm(0, 1.5).pdf(v - x)
        p /= p.sum()
        m = (p * x).sum()
        variance = 4 * ((p * x**2).sum() - m**2) + 0.25
        error = (variance / DRAWS) ** 0.5
        assert abs(float(curve.mean[i]) - (3 * v - 2 * m)) < 5 * error
        assert abs(float(curve.variance[i]) / variance - 1) < 0.25


def test_the_largest_of_two():
    """Of two exponential sites with a maximum, one is it, the other below."""
    cause = pm.MacroVariable("most", ["x1", "x2"], aggregation=pm.Max())

    def model():
        x1 = pyro.sample("x1", dist.Exponential(1.0))
        x2 = pyro.sample("x2", dist.Exponential(1.0))
        pyro.sample("y", dist.Normal(x1 + x2, 0.5))

    at = [0.5, 1.0, 3.0]
    (curve,) = ask(model, cause, at=at).curves
    for i, v in enumerate(at):
        below = stats.truncexpon(v)
        variance = below.var() + 0.25
        error = (variance / DRAWS) ** 0.5
        assert abs(float(curve.mean[i]) - v - below.mean()) < 5 * error


def test_a_confounded_outcome_that_is_drawn():
    """The cause acts on parts and outcome; under do, only the latter."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(10 + z, 1.0))
        pyro.sample("x2", dist.Normal(20 - z, 1.0))
        pyro.deterministic("y", (x1 - 10) * (1 + z) + z.square())

    # Var x1 = 2, Cov = -1: given the total, x1 moves by (v - 30) / 2 on average
    (curve,) = ask(model, at=[28.0, 30.0, 34.0]).curves
    for i, v in enumerate([28.0, 30.0, 34.0]):
        m, s = (v - 30) / 2, 2 - 0.5
        # z is independent of x1 now: E = m + 1
        second = (m**2 + s) * 2 + 2 * m * (1 + 0) + 3
        variance = second - (m + 1) ** 2
        error = (variance / DRAWS) ** 0.5
        assert abs(float(curve.mean[i]) - (m + 1)) < 5 * error
        assert abs(float(curve.variance[i]) / variance - 1) < 0.5
    way = {"given": lambda v: pm.Natural(v, given="z")}
    held = ask(model, realization=way, at=[28.0, 30.0, 34.0])["given"]
    for i, v in enumerate([28.0, 30.0, 34.0]):
        # Given z: x1 - 10 = z + (v - 30) / 2 + noise of variance one half
        shift = (v - 30) / 2
        mean = shift + 1 + 1  # E[(z + shift)(1 + z) + z^2]
        error = float(held.variance[i] / DRAWS) ** 0.5
        assert abs(float(held.mean[i]) - mean) < 5 * error
        assert error < 0.2


# -- Programs that cannot be run for many values at once ----------------------------


def branching():
    """Branches on a value: a bonus above ten."""
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    bonus = 5.0 if x1 > 10 else 0.0
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + bonus, 1.0))


def test_a_program_that_branches_on_values():
    count = 150
    at = [27.0, 33.0]
    report = ask(branching, realization=WAYS, at=at, num_samples=count)
    for way, own in (("natural", 0.8), ("rest", 4.0)):
        for i, v in enumerate(at):
            m = 10 + 0.8 * (v - 30) if way == "natural" else 10.0
            p = stats.norm.sf((10 - m) / own**0.5)
            mean = 3 * v - 2 * m + 5 * p
            curve = report[way]
            error = float(curve.variance[i] / count) ** 0.5
            assert abs(float(curve.mean[i]) - mean) < 5 * error
            assert f"{count} draws" in curve.method
            # y = 3 v - 2 x1 + 5 [x1 > 10] + noise
            together = own**0.5 * stats.norm.pdf((10 - m) / own**0.5)
            variance = 4 * own + 25 * p * (1 - p) - 20 * together + 1
            assert 0.6 < float(curve.variance[i]) / variance < 1.5


def test_a_program_that_adds_up_everything():
    """Its draws would act on one another: they are made one by one, and are right."""

    def model():
        with pyro.plate("parts", 2):
            x = pyro.sample("x", dist.Normal(torch.tensor([1.0, 2.0]), 1.0))
        y = (x * torch.tensor([1.0, 3.0])).sum()
        return pyro.deterministic("y", y.square())

    cause = pm.MacroVariable("s", "x", over="parts")
    at, count = [2.0, 5.0], 150
    (curve,) = ask(model, cause, at=at, num_samples=count).curves
    for i, v in enumerate(at):
        m = 1 + (v - 3) / 2 + 3 * (2 + (v - 3) / 2)
        s = 0.5 * 4  # x1 - E = e, x2 - E = -e: (1 - 3) e
        mean, variance = m**2 + s, 2 * s**2 + 4 * m**2 * s
        error = (variance / count) ** 0.5
        assert abs(float(curve.mean[i]) - mean) < 5 * error
        assert 0.4 < float(curve.variance[i]) / variance < 2


def test_progress_can_be_turned_off(capfd):
    ask(branching, at=[30.0], num_samples=20)
    way = lambda v: pm.Natural(v, given="z")  # noqa: E731

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(10.0 + z, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        bonus = 5.0 if x1 > 10 else 0.0
        return pyro.sample("y", dist.Normal(x1 + 3 * x2 + bonus, 1.0))

    ask(model, realization=way, at=[30.0], num_samples=20)
    assert capfd.readouterr().err == ""


# -- Several realizations ----------------------------------------------------------


def test_several_realizations_by_name():
    ways = {
        "as found": pm.Natural,
        "advertise": lambda v: pm.Residual(v, "x1"),
        "shares": lambda v: pm.Allocate(v, SHARES),
        "as seen": lambda v: pm.Inhibiting(v, "y"),
    }
    report = ask(program, TOTAL, realization=ways, at=AT)
    assert [c.realization for c in report.curves] == list(ways)
    for name, way in ways.items():
        (alone,) = ask(program, TOTAL, realization=way, at=AT).curves
        torch.testing.assert_close(report[name].mean, alone.mean)
        torch.testing.assert_close(report[name].variance, alone.variance)
    turned = dict(reversed(ways.items()))
    again = ask(program, TOTAL, realization=turned, at=AT)
    assert [c.realization for c in again.curves] == list(turned)
    with pytest.raises(KeyError, match="advertise"):
        report["nobody"]
    with pytest.raises(KeyError):
        report["Natural"]


def test_what_is_given_belongs_to_one_realization():
    """The others are as if it was not there."""
    ways = {
        "held": lambda v: pm.Natural(v, given="z0"),
        "natural": pm.Natural,
        "both": lambda v: pm.Natural(v, given=["z0", "z1"]),
        "rest": lambda v: pm.Residual(v, "x1"),
    }
    for order in (ways, dict(reversed(ways.items()))):
        report = ask(program, TOTAL, realization=order, at=AT)
        for name, law in (("held", held), ("natural", natural), ("rest", residual(1))):
            close(report[name].mean, [law(v)[0] for v in AT], 1e-8)
            close(report[name].variance, [law(v)[1] for v in AT], 1e-8)


def test_a_realization_without_a_name():
    """It is called what it is."""
    assert ask(program, TOTAL, at=AT).curves[0].realization == "Natural"
    (curve,) = ask(
        program, TOTAL, realization=lambda v: pm.Residual(v, "x1"), at=AT
    ).curves
    assert curve.realization == "Residual(absorb='x1')"
    (curve,) = ask(program, TOTAL, realization={"": pm.Natural}, at=AT).curves
    assert curve.realization == "Natural"


def test_drawn_and_exact_curves_in_one_report():
    ways = {"exact": lambda v: pm.Allocate(v, [0.5, 0.5]), "drawn": pm.Proportional}
    report = ask(positive, realization=ways, at=[20.0, 30.0])
    assert report["exact"].method == "exact: affine-Gaussian"
    close(report["exact"].mean, [41.0, 61.0])
    close(report["exact"].variance, [5.0, 5.0])
    assert "Monte Carlo" in report["drawn"].method


# -- Handlers, arguments, state ----------------------------------------------------


def test_arguments_of_the_model():
    def model(price, *, bonus=0.0):
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("y", dist.Normal(x1 + price * x2 + bonus, 1.0))

    for price, bonus in ((3.0, 0.0), (2.0, 7.0)):
        (curve,) = ask(
            model, at=[33.0], model_args=(price,), model_kwargs={"bonus": bonus}
        ).curves
        close(curve.mean, [12.4 + 20.6 * price + bonus])


def test_a_model_under_handlers():
    """Conditioned on a cause; another macro-variable set; set at a site."""

    def model():
        w1 = pyro.sample("w1", dist.Normal(1.0, 1.0))
        w2 = pyro.sample("w2", dist.Normal(2.0, 1.0))
        z = pyro.sample("z", dist.Normal(w1 - w2, 1.5))
        x1 = pyro.sample("x1", dist.Normal(10 + 2 * z, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20 - z, 1.0))
        return pyro.sample("y", dist.Normal(x1 + 3 * x2 + 5 * z + w1, 0.5))

    (curve,) = ask(poutine.do(model, {"z": torch.tensor(2.0)}), at=[30.0]).curves
    x = np.array([14.0, 18.0]) + np.array([0.8, 0.2]) * (30 - 32)
    close(curve.mean, [x @ [1, 3] + 10 + 1])
    close(curve.variance, [0.8 * 4 + 0.25 + 1])
    other = pm.MacroVariable("w", ["w1", "w2"])
    fn = pm.macro_do(model, {other: pm.Allocate(4.0, [0.75, 0.25])})
    (curve,) = ask(fn, at=[30.0]).curves
    # z ~ N(2, 1.5^2): X ~ N((14, 18), [[13, -4.5], [-4.5, 3.25]])
    x = np.array([14.0, 18.0]) + np.array([8.5, -1.25]) / 7.25 * (30 - 32)
    close(curve.mean, [x @ [1, 3] + 10 + 3])
    found = pm.dose_response(
        pm.aggregate(model, [other]), PAIR, "y", at=[30.0], progress=False
    )
    plain = ask(model, at=[30.0])
    close(found.curves[0].mean, plain.curves[0].mean)


def test_observations_are_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(z, 1.0))
        x2 = pyro.sample("x2", dist.Normal(z, 1.0))
        pyro.sample("seen", dist.Normal(z, 1.0), obs=torch.tensor(0.3))
        pyro.sample("y", dist.Normal(x1 + x2, 1.0))

    with pytest.raises(pm.UnsupportedLaw, match="seen"):
        ask(model, at=[1.0])


@pytest.mark.parametrize(
    "model", [program, None, branching], ids=["affine", "drawn", "branching"]
)
def test_nothing_of_the_user_changes(model):
    """Random numbers, parameters, gradients, the stack of handlers."""
    model, cause = (program, TOTAL) if model is program else (model, PAIR)
    model = model or curved("exp")

    def learned():
        p = pyro.param("p", torch.tensor(0.0))
        with pyro.plate("free", 2):
            pyro.sample("other", dist.Normal(p, 1.0))
        return model()

    pyro.set_rng_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    report = ask(learned, cause, at=[30.0, 31.0], num_samples=20)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()
    assert not list(pyro.get_param_store())
    assert not pyro.poutine.runtime._PYRO_STACK
    for curve in report.curves:
        assert not curve.mean.requires_grad and not curve.variance.requires_grad
    pyro.param("p", torch.tensor(3.0))
    ask(learned, cause, at=[30.0], num_samples=20)
    assert list(pyro.get_param_store()) == ["p"]
    assert float(pyro.param("p").detach()) == 3.0
    assert pyro.param("p").grad is None


def test_it_sees_nothing_of_handlers_around_it():
    def model():
        return curved("exp")()

    expected = ask(model, at=[30.0]).curves[0].mean
    with poutine.trace() as trace, pyro.plate("users", 3):
        found = ask(model, at=[30.0]).curves[0].mean
    assert torch.equal(found, expected)
    assert set(trace.trace.nodes) <= {"users"}


def test_seeds():
    one, other = (ask(curved(), at=[30.0], seed=s).curves[0].mean for s in (0, 1))
    assert not torch.equal(one, other)
    torch.manual_seed(99)
    assert torch.equal(ask(curved(), at=[30.0], seed=0).curves[0].mean, one)


def test_parameters_have_no_part_in_gradients():
    scale = torch.tensor(2.0, requires_grad=True)

    def model():
        x1 = pyro.sample("x1", dist.Normal(10.0, scale))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 1.0))

    report = ask(model, realization=WAYS, at=[33.0])
    for curve in report.curves:
        assert not curve.mean.requires_grad
    close(report["natural"].mean, [12.4 + 3 * 20.6])
    assert not report["natural"].quantile(0.5).requires_grad
    report.plot()


# -- What is wrong -----------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"num_samples": 19},
        {"num_samples": 0},
        {"num_samples": 100.0},
        {"num_samples": "many"},
        {"num_samples": None},
        {"seed": 0.5},
        {"seed": None},
        {"at": []},
        {"at": "high"},
        {"at": [float("nan")]},
        {"at": [1.0, float("inf")]},
        {"at": [[1.0, 2.0]]},
        {"at": {"low": 1.0}},
        {"realization": {}},
        {"realization": {1: pm.Natural}},
        {"realization": [pm.Natural]},
        {"realization": pm.Natural(3.0)},
        {"realization": {"natural": pm.Natural(3.0)}},
        {"realization": 3.0},
        {"realization": "Natural"},
        {"realization": lambda v: v},
        {"realization": lambda v: None},
        {"realization": pm.Residual},
        {"realization": lambda: pm.Natural(3.0)},
        {"realization": pm.Shift},
        {"realization": lambda v: pm.Shift(v)},
        {"realization": lambda v: pm.Residual(v, "nobody")},
        {"realization": lambda v: pm.Natural(v, given="nobody")},
        {"realization": lambda v: pm.Natural(v, given="y")},
        {"realization": lambda v: pm.Inhibiting(v, "nobody")},
        {"cause": "s"},
        {"cause": pm.MacroVariable("s", ["x1", "nobody"])},
        {"effect": "nobody"},
        {"effect": "x1"},
        {"effect": 3},
        {"effect": None},
        {"effect": pm.MacroVariable("t", ["x1", "y"])},
        {"model": 3},
        {"model_args": 3},
        {"model_kwargs": [3]},
    ],
    ids="-".join,
)
def test_wrong_arguments(change):
    """One clear sentence, by an error of the library."""
    kwargs = {"at": [30.0], "model": curved(), "cause": PAIR, **change}
    model, cause = kwargs.pop("model"), kwargs.pop("cause")
    with pytest.raises(pm.PyroMacroError):
        ask(model, cause, **kwargs)


def test_unknown_sites_are_named():
    with pytest.raises(pm.UnknownSite, match="nobody"):
        ask(curved(), effect="nobody", at=[30.0])


def test_without_values_where_the_law_is_not_known():
    with pytest.raises(pm.PyroMacroError, match="at="):
        ask(curved("exp"))


def test_values_out_of_reach():
    def gammas():
        x1 = pyro.sample("x1", dist.Gamma(1.0, 1.0))
        x2 = pyro.sample("x2", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 1.0))

    def counts():
        x1 = pyro.sample("x1", dist.Poisson(1.0))
        x2 = pyro.sample("x2", dist.Poisson(2.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 1.0))

    for model, at in ((gammas, [1.0, -1.0]), (counts, [2.5]), (counts, [-1.0])):
        with pytest.raises(pm.Infeasible):
            ask(model, at=at)


def test_off_the_fibre():
    """A realization of the user's that misses the value."""

    for model in (program, curved()):
        cause = TOTAL if model is program else PAIR

        def wrong(v, k=4 if model is program else 2):
            def law(total):
                return dist.Delta(total.unsqueeze(-1) * torch.ones(k), event_dim=1)

            return pm.Explicit(v, law)

        with pytest.raises(pm.OffFibre):
            ask(model, cause, realization=wrong, at=[30.0])


@pytest.mark.parametrize("where", ["loc", "scale", "effect"])
def test_nan_is_refused(where):
    nan = float("nan")

    def model():
        x1 = pyro.sample("x1", dist.Normal(nan if where == "loc" else 1.0, 1.0))
        scale = torch.tensor(nan) if where == "scale" else torch.tensor(1.0)
        x2 = pyro.sample("x2", dist.Normal(1.0, scale))
        y = x1 * x2
        pyro.deterministic("y", y * nan if where == "effect" else y)

    pyro.enable_validation(False)
    try:
        with pytest.raises(pm.PyroMacroError):
            ask(model, at=[1.0, 2.0])
    finally:
        pyro.enable_validation(True)


def test_nan_at_one_macro_value_is_refused():
    """Not only where the program is read, but also where it is drawn."""

    def model():
        x1 = pyro.sample("x1", dist.Normal(10.0, 1.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.deterministic("y", (x1 + x2 - 25).log() + x1 * x2)

    ask(model, at=[29.0, 30.0])
    with pytest.raises(pm.PyroMacroError, match="NaN"):
        ask(model, at=[20.0, 30.0], num_samples=50)


def test_a_branch_on_a_macro_value_by_the_user():
    """A function that is not for many values at once: right, or refused in words."""

    def way(value):
        high = float(value) > 30
        return pm.Residual(value, "x1" if high else "x2")

    for at, mean in ((29.0, 3 * 29.0 - 2 * 10 + 1), (31.0, 31.0 + 2 * 20 + 1)):
        (curve,) = ask(positive, realization=way, at=[at]).curves
        close(curve.mean, [mean])
    (curve,) = ask(curved("exp"), realization=way, at=[29.0], num_samples=500).curves
    mean, variance = moments("exp", *spread(29.0, "rest"))
    assert abs(float(curve.mean) - mean) < 5 * (variance / 500) ** 0.5
    try:
        (curve,) = ask(positive, realization=way, at=[29.0, 31.0]).curves
    except pm.PyroMacroError:
        return
    close(curve.mean, [3 * 29.0 - 2 * 10 + 1, 31.0 + 2 * 20 + 1])


# -- Reports -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def report():
    ways = {
        "natural": pm.Natural,
        "a & b": lambda v: pm.Residual(v, "x1"),
    }
    torch.set_default_dtype(torch.float64)
    return ask(program, TOTAL, realization=ways, at=[25.0, 10.0, 18.0])


def test_text(report):
    text = str(report)
    lines = text.splitlines()
    assert lines[0] == "What setting s does to y."
    assert "natural: exact: affine-Gaussian." in lines
    assert lines[3].split() == ["realization", "s", "mean", "variance"]
    assert len(lines) == 4 + 6
    assert repr(report) == text
    mean = natural(25.0)[0]
    assert lines[4].split() == ["natural", "25", f"{mean:.5g}", f"{natural(25)[1]:.5g}"]


def test_html(report):
    html = report._repr_html_()
    assert "a &amp; b" in html and "a & b" not in html
    assert html.count("<tr>") == 7 and html.count("<td>") == 24


def test_pandas(report):
    pytest.importorskip("pandas")
    frame = report.to_pandas()
    assert list(frame.columns) == ["realization", "s", "mean", "variance"]
    assert list(frame["s"]) == [25.0, 10.0, 18.0] * 2
    assert list(frame["realization"]) == ["natural"] * 3 + ["a & b"] * 3
    expected = [natural(v)[0] for v in (25, 10, 18)]
    np.testing.assert_allclose(frame["mean"][:3], expected)
    expected = [residual(1)(v)[1] for v in (25, 10, 18)]
    np.testing.assert_allclose(frame["variance"][3:], expected)


def bands(ax):
    """Lower and upper edges of the bands, by ascending macro value."""
    found = []
    for band in ax.collections:
        points = {}
        for x, y in band.get_paths()[0].vertices:
            points.setdefault(round(float(x), 9), []).append(float(y))
        found.append([(min(points[x]), max(points[x])) for x in sorted(points)])
    return found


@pytest.mark.parametrize("level", [0.5, 0.8, 0.99])
def test_picture(report, level):
    ax = pm.plot_dose_response(report, level=level, labels=("sales [pcs]", "y [EUR]"))
    assert ax.get_xlabel() == "sales [pcs]" and ax.get_ylabel() == "y [EUR]"
    assert f"{level:.0%}" in ax.get_title()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["natural", "a & b"]
    for line, band, law in zip(
        ax.lines, bands(ax), (natural, residual(1)), strict=True
    ):
        np.testing.assert_allclose(line.get_xdata(), [10, 18, 25])
        for k, v in enumerate((10, 18, 25)):
            mean, variance = law(v)
            np.testing.assert_allclose(line.get_ydata()[k], mean)
            reach = stats.norm(mean, variance**0.5).interval(level)
            np.testing.assert_allclose(band[k], reach, rtol=1e-6)


def test_picture_by_the_report_itself(report):
    figure, ax = plt.subplots()
    assert report.plot(ax) is ax
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("s", "y")
    figure.canvas.draw()


def test_picture_of_draws_and_of_finite_laws():
    drawn = ask(curved("lognormal"), realization=WAYS, at=GRID, num_samples=500)
    for curve, band in zip(drawn.curves, bands(drawn.plot()), strict=True):
        draws = curve.outcomes.draws.numpy()
        for k in range(len(GRID)):
            np.testing.assert_allclose(band[k], np.quantile(draws[k], [0.1, 0.9]))
    table = ask(finite)
    outcome = FINITE["Natural"][1]
    for k, band in enumerate(bands(table.plot())[0]):
        share = outcome(k).cumsum()
        wanted = [SIZES[int(np.searchsorted(share, q))] for q in (0.1, 0.9)]
        np.testing.assert_allclose(band, wanted)


def test_picture_of_many_curves():
    """More than there are colours: each pair of colour and stroke is another."""
    ways = {f"{k}": (lambda v, k=k: pm.Residual(v, k % 4)) for k in range(12)}
    ax = ask(program, TOTAL, realization=ways, at=AT).plot()
    looks = {(line.get_color(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == 12


def test_picture_of_one_value():
    ask(program, TOTAL, at=[20.0]).plot().figure.canvas.draw()


@pytest.mark.parametrize("level", [-0.1, 0.0, 1.0, 1.5, float("nan"), "most"])
def test_wrong_levels_of_bands(report, level):
    with pytest.raises(pm.PyroMacroError, match="level"):
        pm.plot_dose_response(report, level=level)


@pytest.mark.parametrize("level", [-0.1, 1.5, float("nan"), None])
def test_wrong_levels_of_quantiles(report, level):
    """In all three kinds of laws, none of which has such a quantile."""
    laws = [
        report,
        ask(finite),
        ask(curved("exp"), at=[30.0], num_samples=20),
    ]
    for known in laws:
        with pytest.raises(pm.PyroMacroError, match="level"):
            known.curves[0].quantile(level)


def test_quantiles_at_the_ends():
    """Least and largest values of finite laws and of draws."""
    (curve,) = ask(finite).curves
    close(curve.quantile(1.0), [4.0] * 4)
    close(curve.quantile(0.0), [0.0] * 4)
    (curve,) = ask(curved("exp"), at=[30.0], num_samples=20).curves
    draws = curve.outcomes.draws
    close(curve.quantile(1.0), draws.amax(1))
    close(curve.quantile(0.0), draws.amin(1))


def test_quantiles_of_a_finite_law_in_single_precision():
    torch.set_default_dtype(torch.float32)
    (curve,) = ask(finite).curves
    close(curve.quantile(1.0).double(), [4.0] * 4)
    close(curve.quantile(0.0).double(), [0.0] * 4)
