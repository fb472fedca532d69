# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Section 4: chains and back-door adjustment, in Gaussian programs.

Lemmas 10 and 11, Definition 12, Theorem 4.1, and the confounded retailer of section 5.
"""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from shop import condition, law

import pyro_macro as pm

XB = pm.MacroVariable("xb", "x")
YB = pm.MacroVariable("yb", "y")
PRICE = torch.tensor([1.0, 3.0], dtype=torch.float64)


def chain(variances, delta=(0.0, 0.0)):
    """X ~ N(0, I), Y = X + E, Zb = (1, 3).Y + delta.X + noise."""
    x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    spread = torch.as_tensor(variances).sqrt()
    y = pyro.sample("y", dist.Normal(x, spread).to_event(1))
    mean = y @ PRICE + x @ torch.as_tensor(delta)
    pyro.sample("z", dist.Normal(mean, 1.0))


def line(report, which="interventional_mean"):
    """Slope and intercept of a mean at macro values 0 and 1."""
    zero, one = getattr(report, which).tolist()
    return one - zero, zero


def exactly(call):
    """No warning: the condition of the adjustment holds."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return call()


# Lemma 10


@pytest.mark.parametrize(
    "variances, holds", [((1.0, 1.0), True), ((1.0, 2.0), False), ((2.0, 2.0), True)]
)
def test_lemma_10(variances, holds):
    report = pm.irrelevant_cause(chain, XB, YB, "z", model_args=(variances,))
    assert report.holds is holds and bool(report) is holds
    assert (report.deviation < 1e-9) == holds
    assert report.method == "exact: affine-Gaussian"
    assert "xb is independent of z given yb" in report.statement
    # Both realizations have the same effect if and only if it holds
    args = (chain, YB, "z")
    plain = pm.confounding(*args, at=[0.0, 1.0], model_args=(variances,))
    given = pm.confounding(
        *args,
        lambda v: pm.Natural(v, given=[XB]),
        [0.0, 1.0],
        model_args=(variances,),
    )
    assert plain.verdict == "inhibiting"
    assert (given.verdict == "inhibiting") == holds


def test_lemma_10_slopes():
    """(1, 1): slope 2 twice. (1, 2): 2.2 yb against 7/3 yb - 1/3 xb."""
    for variances, slope, other, share in [
        ((1.0, 1.0), 2.0, 2.0, 0.0),
        ((1.0, 2.0), 2.2, 7 / 3, -1 / 3),
    ]:
        args = (chain, YB, "z")
        plain = pm.confounding(*args, at=[0.0, 1.0], model_args=(variances,))
        assert line(plain) == pytest.approx((slope, 0.0), abs=1e-12)
        found = pm.structural_coefficient(*args, model_args=(variances,))
        assert found == pytest.approx(slope)
        given = pm.confounding(
            *args,
            lambda v: pm.Natural(v, given=[XB]),
            [0.0, 1.0],
            model_args=(variances,),
        )
        assert line(given) == pytest.approx((other, 0.0), abs=1e-12)
        # With xb = 1.5 held, the law itself
        held = pyro.poutine.condition(
            pm.macro_do(chain, {YB: pm.Natural(1.0, given=[XB])}),
            {"x": torch.tensor([0.7, 0.8])},
        )
        micro = law(lambda held=held, v=variances: held(v), "yb__micro")
        assert float(PRICE @ micro.mean) == pytest.approx(other + 1.5 * share)


def test_lemma_10_by_draws():
    """Both laws for (1, 2), the latter with xb = 1.5 set: 200,000 draws, 5 errors."""
    n = 200_000
    both = {XB: pm.Natural(1.5), YB: pm.Natural(1.0, given=[XB])}
    for interventions, mean in [
        ({YB: pm.Natural(1.0)}, 2.2),
        (both, 7 / 3 - 1.5 / 3),
    ]:
        with pyro.plate("draws", n):
            nodes = pyro.poutine.trace(pm.macro_do(chain, interventions)).get_trace(
                (1.0, 2.0)
            )
        z = nodes.nodes["z"]["value"]
        assert abs(z.mean() - mean) < 5 * z.std() / n**0.5


# Lemma 11, Theorem 4.1


@pytest.mark.parametrize(
    "delta, share, seen, done",
    [((2.0, 2.0), 2.0, 5.0, 5.0), ((2.0, 0.0), 1.0, 3.0, 7.0)],
)
def test_lemma_11_by_hand(delta, share, seen, done):
    """The numbers of item 12 that the next two tests compare with, densely."""
    factor = torch.zeros(5, 5)  # of (X, Y, Zb)
    factor[:2, :2] = torch.eye(2)
    factor[2:4, :2] = factor[2:4, 2:4] = torch.eye(2)
    factor[4] = torch.tensor([1 + delta[0], 3 + delta[1], 1.0, 3.0, 1.0])
    rows = torch.tensor([[1.0, 1, 0, 0, 0], [0, 0, 1.0, 1, 0]])
    cov = factor @ factor.mT
    for value, expected in [((0.0, 1.0), 2.0), ((1.0, 0.0), share)]:
        mean, within = condition(torch.zeros(5), cov, rows, torch.tensor(value))
        assert float(mean[4]) == pytest.approx(expected)
        # With Y apart from X: delta.X given xb is that of X1 - X2 alone
        means = PRICE @ mean[2:4] + torch.tensor(delta).mean() * value[0]
        assert float(means) == pytest.approx(expected)
    assert float(within[4, 4]) == pytest.approx(seen)
    apart = PRICE @ within[2:4, 2:4] @ PRICE + 0.5 * (delta[0] - delta[1]) ** 2 + 1
    assert float(apart) == pytest.approx(done)


@pytest.mark.parametrize(
    "delta, share, seen, done",
    [((2.0, 2.0), 2.0, 5.0, 5.0), ((2.0, 0.0), 1.0, 3.0, 7.0)],
)
def test_lemma_11(delta, share, seen, done):
    """Variances given xb; averaged over it, share^2 Var(xb) = 2 share^2 more."""
    args = (chain, YB, "z", [XB], [0.0, 1.0])
    unit = ((1.0, 1.0), delta)
    condition_ = pm.blocks_backdoor(chain, YB, "z", XB, model_args=unit)
    assert condition_.holds is (seen == done)
    if condition_.holds:
        report = exactly(lambda: pm.macro_adjust(*args, model_args=unit))
    else:
        with pytest.warns(pm.NotAdjusted, match=r"\(15\)"):
            report = pm.macro_adjust(*args, model_args=unit)
    more = 2 * share**2
    assert line(report, "mean") == pytest.approx((2.0, 0.0), abs=1e-12)
    assert line(report) == pytest.approx((2.0, 0.0), abs=1e-12)
    assert report.variance.tolist() == pytest.approx([seen + more] * 2)
    assert report.interventional_variance.tolist() == pytest.approx([done + more] * 2)
    assert report.condition.holds is condition_.holds
    assert report.adjustment == ("xb",)
    # Without adjustment it is confounded: Cov(Zb, yb) / Var(yb)
    slope = 2.0 + sum(delta) / 4
    assert line(report, "observational_mean") == pytest.approx((slope, 0.0), abs=1e-12)
    assert not pm.blocks_backdoor(chain, YB, "z", model_args=unit).holds


@pytest.mark.parametrize("delta, share, done", [((2.0, 2.0), 2, 5), ((2.0, 0.0), 1, 7)])
def test_lemma_11_by_draws(delta, share, done):
    """Mean 2 yb + share xb and that variance, with xb = 1.5 and yb = 1 set."""
    n = 200_000
    both = {XB: pm.Natural(1.5), YB: pm.Natural(1.0, given=[XB])}
    with pyro.plate("draws", n):
        trace = pyro.poutine.trace(pm.macro_do(chain, both)).get_trace(
            (1.0, 1.0), delta
        )
    z = trace.nodes["z"]["value"]
    assert abs(z.mean() - (2 + 1.5 * share)) < 5 * (done / n) ** 0.5
    assert abs(z.var() / done - 1) < 5 * (2 / n) ** 0.5


def two_ways():
    """U -> W -> X, U -> Y: either blocks the path from X to Y."""
    u = pyro.sample("u", dist.Normal(1.0, 1.0))
    w = pyro.sample("w", dist.Normal(2 * u, 0.5))
    x = pyro.sample(
        "x", dist.Normal(w.unsqueeze(-1) * torch.tensor([1.0, -0.3]), 1.0).to_event(1)
    )
    pyro.sample("y", dist.Normal(x @ PRICE + 4 * u, 1.0))


def test_theorem_4_1_two_adjustment_sets_have_the_same_effect():
    found = [
        exactly(lambda b=b: pm.macro_adjust(two_ways, XB, "y", b, [0.0, 1.0]))
        for b in (["w"], ["u", "w"])
    ]
    for report in found:
        torch.testing.assert_close(report.mean, report.interventional_mean)
        torch.testing.assert_close(report.variance, report.interventional_variance)
        assert report.condition.holds
    # X is dependent on U through W alone, so that U adds nothing
    torch.testing.assert_close(found[0].mean, found[1].mean)
    torch.testing.assert_close(found[0].variance, found[1].variance)
    assert pm.confounding(two_ways, XB, "y", at=[0.0]).verdict == "inducing"
    # U alone is valid, too; P(X | xb, u) is another kernel than P(X | xb, w)
    alone = exactly(lambda: pm.macro_adjust(two_ways, XB, "y", "u", [0.0, 1.0]))
    assert alone.condition.holds
    torch.testing.assert_close(alone.mean, alone.interventional_mean)
    torch.testing.assert_close(alone.variance, alone.interventional_variance)


def test_condition_15_is_about_the_micro_state():
    """Nothing is correlated with Xb given b, and yet an element of X is."""

    def model():
        b = pyro.sample("b", dist.Normal(0.0, 1.0))
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(b + h, 1.0))
        x2 = pyro.sample("x2", dist.Normal(b - h, 1.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + b + h, 1.0))

    cause = pm.MacroVariable("xb", ["x1", "x2"])
    assert pm.irrelevant_cause(model, "h", cause, "b").holds
    report = pm.blocks_backdoor(model, cause, "y", ["b"])
    assert not report.holds and report.deviation > 0.01
    assert pm.blocks_backdoor(model, cause, "y", ["b", "h"]).holds
    assert not pm.blocks_backdoor(model, cause, "y", ["h"]).holds


def test_unconfounded_without_adjustment():
    """Nothing between X and Y: (15) holds for the empty set, and for others."""

    def model():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        x = pyro.sample(
            "x", dist.Normal(u.unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1)
        )
        pyro.sample("y", dist.Normal(x @ PRICE, 1.0))

    assert pm.blocks_backdoor(model, XB, "y").holds
    assert pm.blocks_backdoor(model, XB, "y", []).deviation == 0
    assert pm.blocks_backdoor(model, XB, "y", "u").holds


def test_a_collider_opens_a_path():
    """M-bias: nothing is to be adjusted for, and not for the collider."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        c = pyro.sample("c", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a + c, 0.5))
        x = pyro.sample(
            "x", dist.Normal(a.unsqueeze(-1) + torch.zeros(2), 1.0).to_event(1)
        )
        pyro.sample("y", dist.Normal(x @ PRICE + c, 1.0))

    assert pm.blocks_backdoor(model, XB, "y").holds
    assert not pm.blocks_backdoor(model, XB, "y", "b").holds
    assert pm.blocks_backdoor(model, XB, "y", ["b", "c"]).holds
    assert pm.blocks_backdoor(model, XB, "y", ["a", "b"]).holds


def test_definition_12_no_descendants():
    def model():
        chain((1.0, 1.0))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    for bad in ("z", "y", YB):
        with pytest.raises(pm.PyroMacroError, match="Definition 12"):
            pm.macro_adjust(model, XB, "z" if bad != "z" else "other", [bad], [0.0])
        with pytest.raises(pm.PyroMacroError, match="Definition 12"):
            pm.blocks_backdoor(model, XB, "z" if bad != "z" else "other", [bad])
    with pytest.raises(pm.PyroMacroError, match="nothing is adjusted for"):
        pm.macro_adjust(model, XB, "z", [], [0.0])
    with pytest.raises(pm.UnknownSite):
        pm.macro_adjust(model, XB, "z", ["othre"], [0.0])


# Section 5, confounded


ALPHA = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
VARIANCE = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
CROSSED = torch.tensor([0.5, -0.4, 0.9], dtype=torch.float64)
SALES = pm.MacroVariable("sales", micro="x", over="products")
REVENUE = pm.MacroVariable("revenue", micro="y", over="products")
NOISE = pm.MacroVariable("noise", micro="n", over="products")


def retail():
    with pyro.plate("products", 3):
        n = pyro.sample("n", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(CROSSED * n, (VARIANCE - CROSSED**2).sqrt()))
        pyro.deterministic("y", ALPHA * x + n, event_dim=0)


def test_section_5_observational_and_natural_slopes():
    report = pm.confounding(retail, SALES, REVENUE, at=[0.0, 1.0])
    assert line(report, "observational_mean")[0] == pytest.approx(3.0)
    assert line(report)[0] == pytest.approx(17 / 6)
    assert report.verdict == "inducing"
    found = pm.structural_coefficient(retail, SALES, REVENUE)
    assert found == pytest.approx(17 / 6)


def test_section_5_back_door():
    """477/170 with Natural(xb, given=[Nb]), for which (14) holds."""
    args = (retail, SALES, REVENUE)
    assert pm.blocks_backdoor(*args, NOISE).holds
    report = exactly(lambda: pm.macro_adjust(*args, NOISE, [0.0, 1.0]))
    assert line(report, "mean")[0] == pytest.approx(477 / 170)
    assert line(report)[0] == pytest.approx(477 / 170)
    torch.testing.assert_close(report.variance, report.interventional_variance)
    under = pm.confounding(*args, lambda v: pm.Natural(v, given=[NOISE]), [0.0, 1.0])
    torch.testing.assert_close(under.interventional_mean, report.mean)
    torch.testing.assert_close(under.interventional_variance, report.variance)
    # All three noises are another valid adjustment, with the same effect as (15) holds
    wide = exactly(lambda: pm.macro_adjust(*args, ["n"], [0.0, 1.0]))
    assert wide.condition.holds
    torch.testing.assert_close(wide.mean, wide.interventional_mean)
    torch.testing.assert_close(wide.variance, wide.interventional_variance)


def test_section_5_back_door_by_draws():
    """200,000 draws of the adjusted realization: 5 standard errors."""
    n = 200_000
    report = exactly(lambda: pm.macro_adjust(retail, SALES, REVENUE, NOISE, [2.0]))
    fn = pm.macro_do(retail, {SALES: pm.Natural(2.0, given=[NOISE])})
    with pyro.plate("draws", n, dim=-2):
        y = pyro.poutine.trace(fn).get_trace().nodes["y"]["value"].sum(-1)
    variance = float(report.variance)
    assert float(report.mean) == pytest.approx(2 * 477 / 170)
    assert abs(y.mean() - float(report.mean)) < 5 * (variance / n) ** 0.5
    assert abs(y.var() / variance - 1) < 5 * (2 / n) ** 0.5
