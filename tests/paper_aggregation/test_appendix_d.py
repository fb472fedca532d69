# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix D, in Gaussian programs: when no macro model explains both regimes."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from shop import QUERY, SALES, shop

import pyro_macro as pm


def shop_b(value):
    return pm.Residual(value, absorb="x2")


def shop_c(value):
    return pm.Allocate(value, shares=(1.0, 0.0))


def test_shop_a_has_an_unconfounded_model():
    """(2): Yb = 1.4 Xb + N with N independent of Xb."""
    report = pm.macro_scm_exists(shop, SALES, "revenue")
    assert report.exists and report.exists_at == (True,) * 5
    assert bool((report.excess == 0).all())
    assert report.linear == pytest.approx(
        {"beta": 1.4, "Var(U)": 3.2, "Cov(xb, U)": 0.0}, abs=1e-9
    )
    assert report.method == "exact: affine-Gaussian"
    assert report.realization == "Natural"
    assert "beta = 1.4" in report.summary()


def test_shop_b_has_a_confounded_model():
    """(4): Yb = 3 Xb + N~ with N~ = -2 X1, Cov(N~, Xb) = -8."""
    report = pm.macro_scm_exists(shop, SALES, "revenue", shop_b, [20.0, QUERY])
    assert report.exists
    assert report.linear == pytest.approx(
        {"beta": 3.0, "Var(U)": 16.0, "Cov(xb, U)": -8.0}, abs=1e-9
    )
    other = pm.macro_scm_exists(
        shop, SALES, "revenue", lambda v: pm.Residual(v, absorb="x1"), [0.0, 1.0]
    )
    # N~ = 2 X2: variance 4, covariance 2
    assert other.linear == pytest.approx(
        {"beta": 1.0, "Var(U)": 4.0, "Cov(xb, U)": 2.0}, abs=1e-9
    )


def test_the_linear_model_explains_both_regimes():
    """P(yb | do(xb)) and P(xb, yb) follow from beta, Var(U) and Cov(xb, U)."""
    for realization in (pm.Natural, shop_b):
        at = [20.0, 30.0, QUERY]
        found = pm.macro_scm_exists(shop, SALES, "revenue", realization, at).linear
        report = pm.confounding(shop, SALES, "revenue", realization, at)
        beta, variance, crossed = found.values()
        done = 70 + beta * (torch.tensor(at) - 30)
        torch.testing.assert_close(report.interventional_mean, done)
        torch.testing.assert_close(
            report.interventional_variance, torch.full((3,), variance)
        )
        # Observed: slope beta + Cov / Var(xb), variance Var(U) - Cov^2 / Var(xb)
        seen = 70 + (beta + crossed / 5) * (torch.tensor(at) - 30)
        torch.testing.assert_close(report.observational_mean, seen)
        torch.testing.assert_close(
            report.observational_variance, torch.full((3,), variance - crossed**2 / 5)
        )


def test_shop_c_has_none():
    """(33) to (36): Var(Yb | xb) = 3.2 > 0 = Var(Yb | do(xb))."""
    report = pm.macro_scm_exists(shop, SALES, "revenue", shop_c, [20.0, QUERY])
    assert not report.exists and report.exists_at == (False, False)
    assert bool((report.excess > 1).all())
    assert report.linear is None
    assert report.summary().startswith("No causal model")
    assert [row["explained"] for row in report.rows()] == [False, False]


@pytest.mark.parametrize("shares", [(1.0, 0.0), (0.3, 0.7)])
def test_equal_prices_leave_nothing_open(shares):
    """alpha_1 = alpha_2: Yb is a function of Xb in both regimes."""

    def same():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.deterministic("revenue", 2 * x1 + 2 * x2)

    report = pm.macro_scm_exists(
        same, SALES, "revenue", lambda v: pm.Allocate(v, shares), [20.0, QUERY]
    )
    assert report.exists
    assert report.linear == pytest.approx(
        {"beta": 2.0, "Var(U)": 0.0, "Cov(xb, U)": 0.0}, abs=1e-6
    )


def test_noise_of_the_effect_makes_room():
    """Shop C with noise in the revenue: every outcome may happen under do(xb)."""

    def noisy():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))

    report = pm.macro_scm_exists(noisy, SALES, "revenue", shop_c, [20.0, QUERY])
    assert report.exists
    # No linear one: Var(Yb | do(xb)) = 1, where U would need the variance of N~
    assert report.linear is None


def test_another_variance_has_no_linear_model():
    """The means lie on a line through the observed mean, U's variance does not fit."""

    def spread(factor):
        def fn(value):
            loc = torch.tensor([10.0, 20.0]) + (value.unsqueeze(-1) - 30) * 0.5
            root = factor * torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
            return dist.MultivariateNormal(loc, scale_tril=root, validate_args=False)

        return lambda value: pm.Explicit(value, fn)

    # beta = 2, Cov(xb, U) = (1.4 - 2) 5 = -3, Var(U) = 3.2 + 9/5 = 5 = (2 factor)^2
    fits = spread(1.25**0.5)
    report = pm.macro_scm_exists(shop, SALES, "revenue", fits, [20.0, QUERY])
    assert report.exists
    assert report.linear == pytest.approx(
        {"beta": 2.0, "Var(U)": 5.0, "Cov(xb, U)": -3.0}, abs=1e-9
    )
    report = pm.macro_scm_exists(shop, SALES, "revenue", spread(2.0), [20.0, QUERY])
    assert report.exists and report.linear is None


def test_effects_of_which_a_part_is_fixed():
    """Two revenues: X1 is set to a multiple of xb, X2 and X3 vary."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.deterministic("y", x[..., :2], event_dim=1)

    cause = pm.MacroVariable("xb", "x")

    def half(value):
        """X1 = xb / 2, X2 varies, X3 takes up the rest."""
        root = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [-1.0, 0, 0]])
        loc = value.unsqueeze(-1) * torch.tensor([0.5, 0.0, 0.5])
        return dist.MultivariateNormal(loc, scale_tril=root, validate_args=False)

    report = pm.macro_scm_exists(
        model, cause, "y", lambda v: pm.Explicit(v, half), [0.0, 1.0]
    )
    assert not report.exists and report.linear is None
    assert pm.macro_scm_exists(model, cause, "y", at=[0.0, 1.0]).exists
    rest = pm.macro_scm_exists(
        model, cause, "y", lambda v: pm.Residual(v, absorb=2), [0.0, 1.0]
    )
    assert rest.exists


def test_confounded_and_inhibited():
    """The inhibiting realization turns a confounded model into Yb = slope xb + N."""

    def model():
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        x = pyro.deterministic("x", z, event_dim=1)
        n = pyro.sample("n", dist.Normal(0.5 * z.sum(-1), 0.5**0.5))
        pyro.deterministic("y", x @ torch.tensor([1.0, 3.0]) + n, event_dim=0)

    cause = pm.MacroVariable("xb", "x")
    found = pm.macro_scm_exists(
        model, cause, "y", lambda v: pm.Inhibiting(v, "y"), [0.0, 2.0]
    )
    assert found.linear == pytest.approx(
        {"beta": 2.5, "Var(U)": 2.5, "Cov(xb, U)": 0.0}, abs=1e-9
    )
    natural = pm.macro_scm_exists(model, cause, "y", at=[0.0, 2.0])
    # beta = 2, Cov(xb, N) = 1, but Var(Yb | do(xb)) = 2 + 1 and U has 2.5 + 0.5
    assert natural.exists
    assert natural.linear == pytest.approx(
        {"beta": 2.0, "Var(U)": 3.0, "Cov(xb, U)": 1.0}, abs=1e-9
    )


def test_unknown_laws():
    def model():
        x = pyro.sample("x", dist.Gamma(torch.ones(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1), 1.0))

    cause = pm.MacroVariable("xb", "x")
    with pytest.raises(pm.UnsupportedLaw, match="explains both regimes"):
        pm.macro_scm_exists(model, cause, "y", at=[1.0])
