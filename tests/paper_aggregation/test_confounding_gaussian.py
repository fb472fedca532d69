# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Definitions 6 and 7 and Theorem 3.1 for Gaussian programs: equations (2) to (4)."""

import math
import resource

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive
from shop import ALPHA, MU, QUERY, SALES, VARIANCE, condition, shop

import pyro_macro as pm


def by_advertising(value):
    return pm.Residual(value, absorb="x2")


def by_giving_away(value):
    return pm.Allocate(value, shares=(1.0, 0.0))


def moments(report):
    return [
        getattr(report, f"{kind}_{which}")
        for kind in ("observational", "interventional")
        for which in ("mean", "variance")
    ]


# The shops


@pytest.mark.parametrize(
    "realization, mean, variance, verdict",
    [
        (pm.Natural, 74.2, 3.2, "inhibiting"),
        (by_advertising, 79.0, 16.0, "inducing"),
        (by_giving_away, 33.0, 0.0, "inducing"),
        (lambda v: pm.Residual(v, absorb="x1"), 73.0, 4.0, "inducing"),
        (lambda v: pm.Allocate(v, (0.4, 0.6)), 33 * 2.2, 0.0, "inducing"),
        (lambda v: pm.Inhibiting(v, "revenue"), 74.2, 3.2, "inhibiting"),
    ],
)
def test_equations_2_to_4_and_33(realization, mean, variance, verdict):
    report = pm.confounding(shop, SALES, "revenue", realization, [QUERY])
    found = [float(part) for part in moments(report)]
    assert found == pytest.approx([74.2, 3.2, mean, variance], rel=1e-9, abs=1e-9)
    assert report.verdict == verdict and report.verdicts == (verdict,)
    apart = math.hypot(mean - 74.2, variance**0.5 - 3.2**0.5)
    assert float(report.distance) == pytest.approx(apart, abs=1e-7)
    if variance:
        ratio = variance / 3.2
        divergence = 0.5 * (ratio - 1 - math.log(ratio) + (mean - 74.2) ** 2 / 3.2)
        assert float(report.divergence) == pytest.approx(divergence, abs=1e-9)
    else:
        assert float(report.divergence) == math.inf
    assert report.method == "exact: affine-Gaussian"
    assert report.p_value is None and report.num_samples == 0
    assert verdict in str(report) and "sales" in report.summary()


def test_equation_2_slope_and_intercept():
    report = pm.confounding(shop, SALES, "revenue", at=[0.0, 1.0])
    assert report.interventional_mean.tolist() == pytest.approx([28.0, 29.4])
    slope = pm.structural_coefficient(shop, SALES, "revenue")
    assert slope == pytest.approx(float((ALPHA * VARIANCE).sum() / VARIANCE.sum()))


def test_equation_4_the_noise_of_shop_b():
    """Slope alpha_2, and N~ = (a1 - a2) X1 with Cov(N~, Xb) = -8 under P."""
    report = pm.confounding(shop, SALES, "revenue", by_advertising, [0.0, 1.0])
    zero, one = report.interventional_mean.tolist()
    assert one - zero == pytest.approx(3.0)
    assert zero == pytest.approx(-2.0 * 10.0)

    n = 100_000
    with pyro.plate("draws", n):
        nodes = pyro.poutine.trace(shop).get_trace().nodes
    noise = (ALPHA[0] - ALPHA[1]) * nodes["x1"]["value"]
    total = nodes["x1"]["value"] + nodes["x2"]["value"]
    crossed = ((noise - noise.mean()) * (total - total.mean())).mean()
    assert abs(crossed + 8) < 5 * (16 * 5 + 64) ** 0.5 / n**0.5


def test_quantiles_by_default():
    report = pm.confounding(shop, SALES, "revenue")
    levels = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95])
    expected = 30 + 5**0.5 * torch.special.ndtri(levels)
    torch.testing.assert_close(report.at, expected)
    assert report.verdicts == ("inhibiting",) * 5


def test_definition_6_some_macro_value_is_enough():
    """Shop B at the value where both means agree, the variances do not."""
    same = (28.0 + 20.0) / (3 - 1.4)  # 28 + 1.4 x = 3 x - 20
    report = pm.confounding(shop, SALES, "revenue", by_advertising, [same])
    assert float(report.interventional_mean - report.observational_mean) == (
        pytest.approx(0, abs=1e-9)
    )
    assert report.verdict == "inducing"
    assert float(report.distance) == pytest.approx(4 - 3.2**0.5)

    def sometimes(value):
        """Natural at 33, and a point elsewhere."""
        factor = torch.where(value == QUERY, 1.0, 0.0)
        base = torch.tensor([12.4, 20.6])
        loc = base + (value.unsqueeze(-1) - QUERY) * torch.tensor([1.0, 0.0])
        root = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]) * 0.8**0.5
        tril = factor[..., None, None] * root
        return dist.MultivariateNormal(loc, scale_tril=tril, validate_args=False)

    report = pm.confounding(
        shop, SALES, "revenue", lambda v: pm.Explicit(v, sometimes), [QUERY, 40.0]
    )
    assert report.verdicts == ("inhibiting", "inducing")
    assert report.verdict == "inducing"


def test_distributions_are_compared_and_not_means():
    """Equal means at every macro value, and other variances."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = pyro.sample("y", dist.Normal(x, 1.0).to_event(1))
        price, delta = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 0.0])
        pyro.sample("z", dist.Normal(y @ price + x @ delta, 1.0))

    yb = pm.MacroVariable("yb", "y")

    seen = pm.confounding(model, yb, "z", at=[0.0, 1.0]).observational_mean

    def wider(value):
        # The slope is that of P(Zb | yb); the spread along (1, -1) is not
        mean = float(seen[1] - seen[0])
        loc = value.unsqueeze(-1) * torch.tensor([(3 - mean) / 2, (mean - 1) / 2])
        root = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]) * 5.0
        return dist.MultivariateNormal(loc, scale_tril=root, validate_args=False)

    report = pm.confounding(model, yb, "z", lambda v: pm.Explicit(v, wider), [0.0, 1.0])
    torch.testing.assert_close(report.observational_mean, report.interventional_mean)
    assert report.verdict == "inducing"


# Theorem 3.1


@pytest.mark.parametrize("seed", range(20))
def test_theorem_3_1(seed):
    """No common cause: P(Yb | do(xb)) = P(Yb | xb) for any covariance and weights."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(2, 6, (), generator=generator))
    factor = torch.randn(size, size, generator=generator)
    covariance = factor @ factor.mT + 0.1 * torch.eye(size)
    mu, alpha, w = (torch.randn(size, generator=generator) for _ in range(3))
    total = pm.MacroVariable("total", "x", aggregation=pm.Linear(w))

    def model():
        x = pyro.sample("x", dist.MultivariateNormal(mu, covariance))
        pyro.sample("y", dist.Normal(x @ alpha, 0.5))

    report = pm.confounding(model, total, "y", at=[-1.0, 3.0])
    assert report.verdict == "inhibiting"
    assert float(report.distance.max()) < 1e-10
    mean, within = condition(mu, covariance, w.unsqueeze(0), torch.tensor([3.0]))
    torch.testing.assert_close(report.interventional_mean[1], mean @ alpha)
    torch.testing.assert_close(
        report.interventional_variance[1], alpha @ within @ alpha + 0.25
    )


def test_definition_8_context():
    """The natural kernel of one shop induces confounding in another."""

    def other():
        x1 = pyro.sample("x1", dist.Normal(MU[0], 1.0))
        x2 = pyro.sample("x2", dist.Normal(MU[1], 2.0))
        pyro.deterministic("revenue", ALPHA[0] * x1 + ALPHA[1] * x2)

    def kernel_of_shop(value):
        share = torch.tensor([0.8, 0.2])
        loc = MU + share * (value.unsqueeze(-1) - MU.sum())
        root = torch.tensor([[1.0, 0.0], [-1.0, 0.0]]) * 0.8**0.5
        return dist.MultivariateNormal(loc, scale_tril=root, validate_args=False)

    def realization(value):
        return pm.Explicit(value, kernel_of_shop)

    at = [30.0, QUERY]
    here = pm.confounding(shop, SALES, "revenue", realization, at)
    there = pm.confounding(other, SALES, "revenue", realization, at)
    assert here.verdicts == ("inhibiting", "inhibiting")
    # At the mean the means agree, and so do the variances
    assert there.verdicts == ("inhibiting", "inducing")
    assert pm.confounding(other, SALES, "revenue", at=at).verdict == "inhibiting"


def test_a_common_cause_induces():
    def model(strength):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1) + strength * z, 1.0))

    total = pm.MacroVariable("total", "x")
    for strength, verdict in [(0.0, "inhibiting"), (1e-3, "inducing"), (1, "inducing")]:
        report = pm.confounding(model, total, "y", at=[1.0], model_args=(strength,))
        assert report.verdict == verdict
        gap = float(report.observational_mean - report.interventional_mean)
        assert gap == pytest.approx(strength * 2 / 6, abs=1e-12)


# Shapes


def test_plates_that_stay():
    """A cause of three stores; the effect of each, and one for all."""
    scale = torch.tensor([1.0, 2.0, 3.0])

    def model():
        with pyro.plate("stores", 3):
            x = pyro.sample(
                "x", dist.Normal(torch.ones(2), scale.unsqueeze(-1)).to_event(1)
            )
            y = pyro.sample("y", dist.Normal(x @ torch.tensor([1.0, 3.0]), scale))
        pyro.deterministic("chain", y.sum(-1))

    total = pm.MacroVariable("total", "x")
    at = [0.0, 4.0]
    report = pm.confounding(model, total, "y", at=at)
    assert report.interventional_mean.shape == (2, 3)
    assert report.interventional_variance.shape == (2, 3)
    assert report.distance.shape == (2,) and report.verdict == "inhibiting"
    # X given the sum: half each, variance s^2 / 2 along (1, -1); alpha sees 2^2 of it
    expected = torch.tensor([[0.0], [8.0]]).expand(2, 3)
    torch.testing.assert_close(report.interventional_mean, expected)
    variance = (2 * scale**2 + scale**2).expand(2, 3)
    torch.testing.assert_close(report.interventional_variance, variance)
    assert len(report.rows()) == 6

    report = pm.confounding(model, total, "chain", at=at)
    torch.testing.assert_close(report.interventional_mean, torch.tensor([0.0, 24.0]))
    torch.testing.assert_close(report.observational_variance, variance.sum(-1))
    point = pm.confounding(
        model, total, "chain", lambda v: pm.Allocate(v, (1.0, 0.0)), at
    )
    torch.testing.assert_close(point.interventional_mean, torch.tensor([0.0, 12.0]))
    one = (scale**2).sum().expand(2)
    torch.testing.assert_close(point.interventional_variance, one)


def test_vector_causes():
    """Two rows of weights over four products, that leave two free."""
    rows = torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.0, 2.0, 3.0, 5.0]])
    price = torch.tensor([2.0, 1.0, 4.0, 3.0])
    variance = torch.tensor([1.0, 2.0, 3.0, 4.0])
    both = pm.MacroVariable("both", "x", aggregation=pm.Linear(rows))

    def model():
        x = pyro.sample("x", dist.Normal(torch.ones(4), variance.sqrt()).to_event(1))
        pyro.deterministic("y", x @ price)

    at = torch.tensor([[4.0, 11.0], [5.0, 10.0]])
    report = pm.confounding(model, both, "y", at=at)
    for i, value in enumerate(at):
        mean, cov = condition(torch.ones(4), torch.diag(variance), rows, value)
        torch.testing.assert_close(report.interventional_mean[i], mean @ price)
        torch.testing.assert_close(
            report.observational_variance[i], price @ cov @ price
        )
    assert report.verdict == "inhibiting"
    other = pm.confounding(
        model, both, "y", lambda v: pm.Residual(v, absorb=[2, 3]), at
    )
    assert other.verdict == "inducing"
    # x3 + x4 = s - x1 - x2, 3 x3 + 5 x4 = t - x1 - 2 x2
    inverse = torch.linalg.inv(rows[:, 2:])
    left = price[:2] - price[2:] @ inverse @ rows[:, :2]
    expected = left.sum() + price[2:] @ inverse @ at[0]
    torch.testing.assert_close(other.interventional_mean[0], expected)
    torch.testing.assert_close(
        other.interventional_variance[0], (left**2 * variance[:2]).sum()
    )
    with pytest.raises(pm.PyroMacroError, match=r"\(n, m\)"):
        pm.confounding(model, both, "y", at=[4.0, 11.0])
    with pytest.raises(pm.PyroMacroError, match="quantiles"):
        pm.confounding(model, both, "y")


def test_effects_of_several_elements_have_joint_laws():
    """Equal marginals, another correlation: that is confounding, too."""

    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        noise = pyro.sample("noise", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("y", x[..., :2] + noise, event_dim=1)

    total = pm.MacroVariable("total", "x")

    def uncorrelated(value):
        # X1 and X2 keep mean v/3 and variance 2/3, and lose their covariance -1/3
        side = (2 / 3) ** 0.5
        root = torch.tensor([[side, 0, 0], [0, side, 0], [-side, -side, 0]])
        loc = value.unsqueeze(-1) / 3 + torch.zeros(3)
        return dist.MultivariateNormal(loc, scale_tril=root, validate_args=False)

    report = pm.confounding(
        model, total, "y", lambda v: pm.Explicit(v, uncorrelated), [1.0]
    )
    torch.testing.assert_close(report.observational_mean, report.interventional_mean)
    torch.testing.assert_close(
        report.observational_variance, report.interventional_variance
    )
    assert report.verdict == "inducing"
    # Eigenvalues along (1, 1) and (1, -1): 4/3 and 2 against 5/3 and 5/3
    roots = [(4 / 3, 5 / 3), (2.0, 5 / 3)]
    expected = sum((a**0.5 - b**0.5) ** 2 for a, b in roots) ** 0.5
    assert float(report.distance) == pytest.approx(expected, rel=1e-7)
    divergence = sum(0.5 * (b / a - 1 - math.log(b / a)) for a, b in roots)
    assert float(report.divergence) == pytest.approx(divergence, rel=1e-9)


# How it is asked


def test_arguments_of_the_model():
    def model(price, *, noise):
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal(x @ price, noise))

    total = pm.MacroVariable("total", "x")
    report = pm.confounding(
        model,
        total,
        "y",
        at=[1.0],
        model_args=(torch.tensor([1.0, 5.0]),),
        model_kwargs={"noise": 2.0},
    )
    assert float(report.observational_mean) == pytest.approx(3.0)
    assert float(report.observational_variance) == pytest.approx(0.5 * 16 + 4)


QUESTIONS = {
    "confounding": lambda m, c: pm.confounding(m, c, "y", at=[1.0]),
    "residual": lambda m, c: pm.confounding(
        m, c, "y", lambda v: pm.Residual(v, absorb=0), [1.0]
    ),
    "inhibiting": lambda m, c: pm.confounding(
        m, c, "y", lambda v: pm.Inhibiting(v, "y"), [1.0]
    ),
    "can_inhibit": lambda m, c: pm.can_inhibit(m, c, "y"),
    "coefficient": lambda m, c: pm.structural_coefficient(m, c, "y"),
    "scm": lambda m, c: pm.macro_scm_exists(m, c, "y"),
    "adjust": lambda m, c: pm.macro_adjust(m, c, "y", ["u"]),
    "backdoor": lambda m, c: pm.blocks_backdoor(m, c, "y", ["u"]),
    "irrelevant": lambda m, c: pm.irrelevant_cause(m, "u", c, "y"),
    "shift": lambda m, c: pm.shift_confounding(m, c, "y", 1.0),
    "atomic": lambda m, c: pm.atomic_from_shifts(m, c, "y"),
    "from_atomics": lambda m, c: pm.shift_from_atomics(m, c, "y", 1.0),
    "noise": lambda m, c: pm.macro_noise(m, c, "y").change(pm.Shift(1.0), 10),
    "drawn": lambda m, c: pm.confounding(
        m,
        c,
        "y",
        lambda v: pm.Residual(v, absorb=0, given=["u"]),
        [1.0],
        num_samples=100,
    ),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_nothing_of_the_user_s_changes(question):
    """Parameters, the random state, outer handlers, gradient mode."""
    calls = []

    def model():
        scale = pyro.param(
            "scale", lambda: torch.tensor(2.0), constraint=dist.constraints.positive
        )
        late = pyro.param("late", torch.tensor([1.0, 2.0]))
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        x = pyro.sample(
            "x", dist.Normal(0.5 * u.unsqueeze(-1), scale * torch.ones(2)).to_event(1)
        )
        calls.append(torch.is_grad_enabled())
        pyro.sample(
            "y", dist.Normal(x @ (late * torch.tensor([1.0, 3.0])) + 0.1 * u, 1.0)
        )

    cause = pm.MacroVariable("total", "x")
    state = torch.get_rng_state()
    with pyro.poutine.trace() as outer:
        QUESTIONS[question](model, cause)
    assert calls
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())
    assert not list(outer.trace.nodes.keys() - {"_INPUT", "_RETURN"})
    # And with parameters that are there already
    pyro.get_param_store()["scale"] = torch.tensor(3.0)
    before = {k: v.clone() for k, v in pyro.get_param_store().items()}
    QUESTIONS[question](model, cause)
    after = dict(pyro.get_param_store().items())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.is_grad_enabled()


def test_parameters_of_the_store_count():
    def model():
        price = pyro.param("price", torch.tensor([1.0, 3.0]))
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.deterministic("y", x @ price)

    cause = pm.MacroVariable("total", "x")
    assert pm.structural_coefficient(model, cause, "y") == pytest.approx(2.0)
    pyro.get_param_store()["price"] = torch.tensor([5.0, 9.0])
    assert pm.structural_coefficient(model, cause, "y") == pytest.approx(7.0)
    found = pm.structural_coefficient(model, cause, "y", along=[0.5, 0.5])
    assert isinstance(found, float) and found == pytest.approx(7.0)


@pytest.mark.parametrize("handler", ["condition", "do"])
def test_a_program_under_handlers(handler):
    """What is held by a handler is a constant of the program that is asked about."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1) + z, 1.0))

    cause = pm.MacroVariable("total", "x")
    held = getattr(pyro.poutine, handler)(model, data={"z": torch.tensor(2.0)})
    assert pm.confounding(model, cause, "y", at=[1.0]).verdict == "inducing"
    report = pm.confounding(held, cause, "y", at=[1.0])
    assert report.verdict == "inhibiting"
    assert float(report.interventional_mean) == pytest.approx(3.0)
    assert float(report.observational_variance) == pytest.approx(1.0)


def test_observations_are_refused():
    def model():
        x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        y = pyro.sample("y", dist.Normal(x.sum(-1), 1.0))
        pyro.sample("poll", dist.Normal(y, 1.0), obs=torch.tensor(1.0))
        pyro.sample("z", dist.Normal(y, 1.0))

    cause = pm.MacroVariable("total", "x")
    with pytest.raises(pm.UnsupportedLaw, match="'poll' is observed"):
        pm.confounding(model, cause, "z", at=[1.0])
    free = pyro.poutine.uncondition(model)
    assert pm.confounding(free, cause, "z", at=[1.0]).verdict == "inhibiting"


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m, c: pm.confounding(m, c, "revenu"), pm.UnknownSite, "revenue"),
        (lambda m, c: pm.confounding(m, c, "x1"), pm.PyroMacroError, "x1"),
        (
            lambda m, c: pm.confounding(m, "sales", "revenue"),
            pm.PyroMacroError,
            "cause",
        ),
        (lambda m, c: pm.confounding(m, c, 3), pm.PyroMacroError, "effect"),
        (lambda m, c: pm.confounding(3, c, "revenue"), pm.PyroMacroError, "callable"),
        (
            lambda m, c: pm.confounding(m, c, "revenue", pm.Natural(3.0)),
            pm.PyroMacroError,
            "function of the macro value",
        ),
        (
            lambda m, c: pm.confounding(m, c, "revenue", pm.Residual),
            pm.PyroMacroError,
            "Residual cannot be made",
        ),
        (
            lambda m, c: pm.confounding(m, c, "revenue", lambda v: pm.Shift(1.0)),
            pm.PyroMacroError,
            "shift_confounding",
        ),
        (
            lambda m, c: pm.confounding(m, c, "revenue", lambda v: v),
            pm.PyroMacroError,
            "Expected a Realization",
        ),
        (
            lambda m, c: pm.confounding(m, c, "revenue", at=[math.nan]),
            pm.PyroMacroError,
            "finite",
        ),
        (
            lambda m, c: pm.confounding(m, c, "revenue", at=[[1.0, 2.0]]),
            pm.PyroMacroError,
            "shape",
        ),
        (lambda m, c: pm.confounding(m, c, "revenue", at=[]), pm.PyroMacroError, "at"),
        (
            lambda m, c: pm.structural_coefficient(m, c, "revenue", along=[1.0, 1.0]),
            pm.OffFibre,
            "macro value 2",
        ),
        (
            lambda m, c: pm.structural_coefficient(m, c, "revenue", along=[1.0]),
            pm.PyroMacroError,
            r"\(2,\)",
        ),
    ],
)
def test_bad_questions(call, error, words):
    with pytest.raises(error, match=words):
        call(shop, SALES)


def test_a_cause_without_variance():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("x1", z)
        pyro.deterministic("x2", 3.0 - z)
        pyro.sample("y", dist.Normal(z, 1.0))

    total = pm.MacroVariable("total", ["x1", "x2"])
    with pytest.raises(pm.UnsupportedLaw, match="the same in every run"):
        pm.confounding(model, total, "y", at=[3.0])


def test_float32_programs_see_small_confounding():
    """Means are known to 1e-6 of the spread, and 1e-3 of it is not rounding."""

    def model(strength):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(z.unsqueeze(-1), torch.ones(2)).to_event(1))
        pyro.sample("y", dist.Normal(x.sum(-1) + strength * z, 1.0))

    torch.set_default_dtype(torch.float32)
    total = pm.MacroVariable("total", "x")
    for strength, verdict in [(0.0, "inhibiting"), (5e-3, "inducing")]:
        report = pm.confounding(model, total, "y", at=[1.0], model_args=(strength,))
        assert report.verdict == verdict


def test_float32_programs():
    def model():
        x1 = pyro.sample("x1", dist.Normal(torch.tensor(10.0), 2.0))
        x2 = pyro.sample("x2", dist.Normal(torch.tensor(20.0), 1.0))
        pyro.deterministic("revenue", x1 + 3 * x2)

    torch.set_default_dtype(torch.float32)
    for realization, numbers, verdict in [
        (pm.Natural, (74.2, 3.2), "inhibiting"),
        (by_advertising, (79.0, 16.0), "inducing"),
        (lambda v: pm.Inhibiting(v, "revenue"), (74.2, 3.2), "inhibiting"),
    ]:
        report = pm.confounding(model, SALES, "revenue", realization, [QUERY])
        assert report.verdict == verdict
        found = [float(p) for p in moments(report)]
        assert found == pytest.approx([74.2, 3.2, *numbers], rel=1e-5)
        assert report.interventional_mean.dtype == torch.float64


# Size


def retail(size, dtype=torch.float64):
    """A confounder for each product; prices, spreads and both loadings differ."""
    generator = torch.Generator().manual_seed(size)
    price, own, up, down = (
        (low + high * torch.rand(size, generator=generator)).to(dtype)
        for low, high in [(1, 9), (0.5, 2), (0.2, 1), (-1, 1.5)]
    )

    def model():
        with pyro.plate("products", size):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            x = pyro.sample("x", dist.Normal(up * z, own))
            pyro.sample("y", dist.Normal(price * x + down * z, 0.3))

    sums = {}
    price, own, up, down = (t.double() for t in (price, own, up, down))
    variance = up**2 + own**2
    crossed = up * down  # Cov(X_i, N_i)
    sums["within"] = variance.sum()
    sums["seen"] = (price * variance + crossed).sum() / sums["within"]
    sums["natural"] = (price * variance).sum() / sums["within"]
    noise = (down**2 + 0.09).sum()
    whole = (price**2 * variance + 2 * price * crossed).sum() + noise
    sums["seen_variance"] = whole - sums["seen"] ** 2 * sums["within"]
    through = (price**2 * variance).sum()
    sums["natural_variance"] = through - sums["natural"] ** 2 * sums["within"] + noise
    sums["noise"] = noise
    return model, sums


CAUSE = pm.MacroVariable("sales", micro="x", over="products")
EFFECT = pm.MacroVariable("revenue", micro="y", over="products")


def assert_retail(size, dtype, rel):
    model, sums = retail(size, dtype)
    report = pm.confounding(model, CAUSE, EFFECT, at=[0.0, 10.0])
    assert report.observational_mean.tolist() == pytest.approx(
        [0.0, 10 * float(sums["seen"])], rel=rel, abs=1e-6
    )
    assert report.interventional_mean.tolist() == pytest.approx(
        [0.0, 10 * float(sums["natural"])], rel=rel, abs=1e-6
    )
    for found, name in [
        (report.observational_variance, "seen_variance"),
        (report.interventional_variance, "natural_variance"),
    ]:
        assert found.tolist() == pytest.approx([float(sums[name])] * 2, rel=rel)
    assert report.verdict == "inducing"
    natural = pm.structural_coefficient(model, CAUSE, EFFECT)
    assert natural == pytest.approx(float(sums["natural"]), rel=rel)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", [3, 1000, 5000])
def test_section_5_with_a_confounder_each(size, dtype):
    assert_retail(size, dtype, 1e-9 if dtype == torch.float64 else 1e-5)


def test_no_matrix_of_the_size_of_the_state():
    """K = 200,000, where a K x K matrix takes 320 GB, under all questions."""
    size = 200_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_retail(size, torch.float64, 1e-8)
    model, sums = retail(size)
    feasible = pm.can_inhibit(model, CAUSE, EFFECT, [10.0])
    assert feasible.observational_variance == pytest.approx(
        float(sums["seen_variance"]), rel=1e-8
    )
    assert feasible.noise_variance == pytest.approx(float(sums["noise"]), rel=1e-8)
    assert feasible.feasible and bool(feasible.distance.isfinite())
    report = pm.confounding(
        model, CAUSE, EFFECT, lambda v: pm.Inhibiting(v, EFFECT), [10.0, 500.0]
    )
    assert report.verdict == "inhibiting"
    report = pm.confounding(
        model, CAUSE, EFFECT, lambda v: pm.Residual(v, absorb=0), [10.0]
    )
    assert report.verdict == "inducing"
    total = pm.MacroVariable("total_z", micro="z", over="products")
    with pytest.warns(pm.NotAdjusted):
        pm.macro_adjust(model, CAUSE, EFFECT, [total], [10.0])
    assert not pm.blocks_backdoor(model, CAUSE, EFFECT, [total])
    assert not pm.irrelevant_cause(model, total, CAUSE, EFFECT)
    assert pm.shift_confounding(model, CAUSE, EFFECT, 1.0).verdict == "inducing"
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 2_000_000  # kB


def test_the_report_is_what_predictive_draws():
    """40,000 draws of each law, at 4.5 standard errors."""
    n = 40_000
    report = pm.confounding(shop, SALES, "revenue", by_advertising, [QUERY])
    intervened = pm.macro_do(shop, {SALES: by_advertising(QUERY)})
    drawn = Predictive(
        intervened, num_samples=n, parallel=True, return_sites=["revenue"]
    )()["revenue"].reshape(n)
    variance = float(report.interventional_variance)
    mean = float(report.interventional_mean)
    assert abs(drawn.mean() - mean) < 4.5 * (variance / n) ** 0.5
    assert abs(drawn.var() / variance - 1) < 4.5 * (2 / n) ** 0.5
