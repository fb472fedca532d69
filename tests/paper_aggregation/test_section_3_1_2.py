# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Section 3.1.2, equations (5) and (6): the noise of the macro model."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import LEVEL, assert_cdf
from scipy import stats
from shop import ALPHA, MU, QUERY, SALES, VARIANCE, condition, shop

import pyro_macro as pm


def draws_of(model, n, names=("x1", "x2")):
    with pyro.plate("draws", n):
        nodes = pyro.poutine.trace(model).get_trace().nodes
    return [nodes[name]["value"] for name in names]


def correlated():
    """Three products with two causes in common, and a noise V of the effect."""
    u = pyro.sample("u", dist.Normal(1.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(2.0 + u, 1.0))
    x2 = pyro.sample("x2", dist.Normal(1.0 - 0.5 * u, 2.0))
    x3 = pyro.sample("x3", dist.Normal(0.5 * u, 0.5))
    pyro.sample("y", dist.Normal(x1 + 4.0 * x2 - 2.0 * x3 + 7.0, 3.0))


THREE = pm.MacroVariable(
    "three", micro=["x1", "x2", "x3"], aggregation=pm.Linear([1.0, 2.0, 0.5])
)


def test_m_is_the_conditional_distribution_function():
    """M(xb, w) = P(W <= w | Xb = xb), by the dense conditional law."""
    noise = pm.macro_noise(shop, SALES, "revenue")
    for value in (20.0, QUERY, 41.0):
        rows, at = torch.ones(1, 2), torch.tensor([value])
        mean, cov = condition(MU, torch.diag(VARIANCE), rows, at)
        law = stats.norm(float(ALPHA @ mean), float(ALPHA @ cov @ ALPHA) ** 0.5)
        for w in (50.0, 74.2, 80.0):
            found = float(noise(torch.tensor(value), torch.tensor(w)))
            assert found == pytest.approx(law.cdf(w), abs=1e-12)
    assert noise.slope == pytest.approx(1.4)
    assert noise.spread == pytest.approx(3.2**0.5)


def test_m_of_correlated_products_and_weights():
    """W = alpha.X without V, for any weights of the macro-variable."""
    noise = pm.macro_noise(correlated, THREE, "y")
    load = torch.tensor([1.0, -0.5, 0.5])
    cov = torch.outer(load, load) + torch.diag(torch.tensor([1.0, 4.0, 0.25]))
    mean = torch.tensor([3.0, 0.5, 0.5])
    alpha, weights = torch.tensor([1.0, 4.0, -2.0]), torch.tensor([1.0, 2.0, 0.5])
    own, within = condition(mean, cov, weights[None], torch.tensor([6.0]))
    spread = (alpha @ within @ alpha).sqrt()
    at = torch.full((5,), 6.0)
    w = alpha @ own + spread * torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0])
    expected = torch.special.ndtr((w - alpha @ own) / spread)
    torch.testing.assert_close(noise(at, w), expected)
    torch.testing.assert_close(noise.inverse(at, noise(at, w)), w)


def test_equation_6_phi():
    """phi(xb, M) = W, and Yb = phi(xb, M) + V."""
    noise = pm.macro_noise(shop, SALES, "revenue")
    x1, x2 = draws_of(shop, 1000)
    total, w = x1 + x2, x1 + 3 * x2
    m = noise(total, w)
    assert m.shape == (1000,) and bool(((m > 0) & (m < 1)).all())
    torch.testing.assert_close(noise.inverse(total, m), w, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("which", ["shop", "correlated"])
def test_m_is_uniform_and_independent_of_the_macro_value(which):
    """20,000 draws: Kolmogorov-Smirnov overall and by quarter of Xb, correlation."""
    n = 20_000
    if which == "shop":
        noise = pm.macro_noise(shop, SALES, "revenue")
        x1, x2 = draws_of(shop, n)
        total, w = x1 + x2, x1 + 3 * x2
    else:
        noise = pm.macro_noise(correlated, THREE, "y")
        x1, x2, x3 = draws_of(correlated, n, ("x1", "x2", "x3"))
        total, w = x1 + 2 * x2 + 0.5 * x3, x1 + 4 * x2 - 2 * x3
    m = noise(total, w)
    assert_cdf(m, "uniform")
    quarters = m[total.argsort()].reshape(4, -1)
    for quarter in quarters:
        assert_cdf(quarter, "uniform", LEVEL / 4)
    for moment in (m, (m - 0.5) ** 2):
        assert stats.pearsonr(moment, total).pvalue > LEVEL


def test_a_natural_shift_keeps_m_constant():
    """5 (0.8, 0.2): M moves by less than 1e-12 in each draw."""
    noise = pm.macro_noise(shop, SALES, "revenue")
    for shift in (pm.Shift(5.0), pm.Shift(5.0, along=(0.8, 0.2)), pm.Shift(-7.0)):
        moved = noise.change(shift, num_samples=2000)
        assert moved.shape == (2000,)
        assert moved.abs().max() < 1e-12
    noise = pm.macro_noise(correlated, THREE, "y")
    assert noise.change(pm.Shift(2.0)).abs().max() < 1e-12


def test_other_shifts_move_m():
    """Along (0, 1): by what alpha.Delta = 3 is more than the slope 1.4."""
    noise = pm.macro_noise(shop, SALES, "revenue")
    moved = noise.change(pm.Shift(1.0, along=(0.0, 1.0)), num_samples=4000)
    assert bool((moved > 0).all())
    # E[Phi(Z + s) - Phi(Z)] = Phi(s / sqrt 2) - 1/2, in a range of one, 5 errors
    expected = stats.norm.cdf(1.6 / 3.2**0.5 / 2**0.5) - 0.5
    assert abs(moved.mean() - expected) < 5 * moved.std() / 4000**0.5
    # The same seed, the same draws
    again = noise.change(pm.Shift(1.0, along=(0.0, 1.0)), num_samples=4000)
    assert torch.equal(moved, again)
    other = noise.change(pm.Shift(1.0, along=(0.0, 1.0)), 4000, seed=1)
    assert not torch.equal(moved, other)


def test_shifts_that_keep_m_are_inhibiting_and_no_others():
    """Keeping M constant inhibits: the law after the shift is that which is seen."""
    for along, verdict in [(None, "inhibiting"), ((0.5, 0.5), "inducing")]:
        found = pm.shift_confounding(shop, SALES, "revenue", 5.0, along)
        assert found.verdict == verdict
        noise = pm.macro_noise(shop, SALES, "revenue")
        moved = noise.change(pm.Shift(5.0, along), 500).abs().max()
        assert (moved < 1e-12) == (verdict == "inhibiting")


def test_proportional_keeps_the_average_price_and_not_m():
    noise = pm.macro_noise(shop, SALES, "revenue")
    n = 4000
    assert noise.change(pm.Proportional(QUERY), n).abs().max() > 0.1
    x1, x2 = draws_of(pm.macro_do(shop, {SALES: pm.Proportional(QUERY)}), n)
    torch.testing.assert_close(x1 + x2, torch.full((n,), QUERY))
    price = (x1 + 3 * x2) / QUERY
    # E of the average price is about 2.339
    assert abs(price.mean() - 2.339) < 5 * price.std() / n**0.5 + 5e-4


def test_the_average_price_looks_confounded():
    """M = alpha.X / 1.X has correlation about -0.76 with Xb, mean about 2.339."""
    x1, x2 = draws_of(shop, 400_000)
    total = x1 + x2
    price = (x1 + 3 * x2) / total
    assert np.corrcoef(price, total)[0, 1] == pytest.approx(-0.76, abs=0.005)
    assert float(price.mean()) == pytest.approx(2.339, abs=0.001)
    # Yb = Xb M is another structural equation with the same joint law
    torch.testing.assert_close(price * total, x1 + 3 * x2)


def test_proportional_is_inducing():
    """Against N(74.2, 3.2): the mean is about 33 * 2.339 = 77.2. Level 0.01."""
    report = pm.confounding(
        shop, SALES, "revenue", pm.Proportional, [QUERY], num_samples=1000
    )
    assert report.verdict == "inducing"
    assert report.method.startswith("Monte Carlo")
    assert float(report.interventional_mean) == pytest.approx(77.2, abs=0.3)
    assert float(report.observational_mean) == pytest.approx(74.2, abs=0.3)


def test_realizations_without_a_natural_value():
    noise = pm.macro_noise(shop, SALES, "revenue")
    for other in (pm.Natural(33.0), pm.Residual(33.0, absorb="x2"), 5.0):
        with pytest.raises(pm.PyroMacroError, match="Shift or Proportional"):
            noise.change(other)


def test_programs_without_such_a_noise():
    def same():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("revenue", dist.Normal(2 * x1 + 2 * x2, 1.0))

    with pytest.raises(pm.UnsupportedLaw, match="macro value alone"):
        pm.macro_noise(same, SALES, "revenue")

    def several():
        shop()
        pyro.sample("two", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with pytest.raises(pm.PyroMacroError, match="one number"):
        pm.macro_noise(several, SALES, "two")

    def positive():
        x1 = pyro.sample("x1", dist.Gamma(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.deterministic("revenue", x1 + 3 * x2)

    with pytest.raises(pm.UnsupportedLaw, match="'x1' is not Gaussian"):
        pm.macro_noise(positive, SALES, "revenue")
