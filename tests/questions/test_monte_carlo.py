# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Draws given a macro value, draws under interventions, and what is made of them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats

import pyro_macro as pm
from pyro_macro.questions.conditioning import given_total
from pyro_macro.questions.question import Question
from pyro_macro.questions.sampling import Sampler

LEVEL = 1e-3
COUNT = 4000
PAIR = pm.MacroVariable("total", micro=["x1", "x2"])


def sampler_of(model, cause, effect="y", count=COUNT, seed=0, args=()):
    question = Question(model, cause, effect, args)
    return question, Sampler(question.model, question.cut, count, seed, False)


def given(model, cause, at, effect="y", count=COUNT, seed=0, args=()):
    """Draws of the effect given macro values, by rejection: ``(n, count, size)``."""
    question, sampler = sampler_of(model, cause, effect, count, seed, args)
    at = torch.as_tensor(at, dtype=torch.float64)
    return given_total(sampler, at, question.cut.others["effect"])[0]


def check_ks(draws, cdf):
    assert len(set(draws.tolist())) > 0.9 * len(draws), "draws are repeated"
    p = stats.kstest(draws.numpy(), cdf).pvalue
    assert p > LEVEL, p


def check_counts(draws, table):
    """Draws of few values against their probabilities, by a chi-squared test."""
    values = torch.tensor(sorted(table), dtype=torch.float64)
    index = (draws[:, None] == values).double()
    assert bool((index.sum(-1) == 1).all()), "a value that cannot be"
    expected = torch.tensor([table[v] for v in sorted(table)]) * len(draws)
    seen = index.sum(0)
    p = stats.chisquare(seen.numpy(), expected.numpy()).pvalue
    assert p > LEVEL, (p, seen, expected)


def allocate(*shares):
    return lambda value: pm.Allocate(value, shares)


# -- Observational draws -----------------------------------------------------------


def confounded(weights=(1.0, 3.0), loading=(1.0, -0.5)):
    z = pyro.sample("z", dist.Normal(1.0, 1.5))
    x1 = pyro.sample("x1", dist.Normal(loading[0] * z, 2.0))
    x2 = pyro.sample("x2", dist.Normal(1 + loading[1] * z, 1.0))
    pyro.sample("y", dist.Normal(weights[0] * x1 + weights[1] * x2 + 2 * z, 0.7))


@pytest.mark.parametrize(
    "aggregation",
    [pm.Sum(), pm.Mean(), pm.Linear([2.0, -0.5]), pm.Linear([0.1, 3.0])],
    ids=["sum", "mean", "linear", "linear, first small"],
)
def test_given_total_gaussian(aggregation):
    """``P(Yb | xb)`` by rejection is that of the closed form."""
    macro = pm.MacroVariable("m", ["x1", "x2"], aggregation=aggregation)
    at = torch.tensor([-1.0, 2.0], dtype=torch.float64)
    question, sampler = sampler_of(confounded, macro)
    exact = question.affine.effect_given(at.unsqueeze(-1))
    found = given_total(sampler, at, question.cut.others["effect"])[0][..., 0]
    for i in range(2):
        law = stats.norm(exact.mean[i, 0], exact.covariance[i, 0, 0] ** 0.5)
        check_ks(found[i], law.cdf)


def test_given_total_unequal_spreads():
    """Any micro site may be the narrow one."""
    for scales in [(0.05, 5.0), (5.0, 0.05)]:

        def model(scales=scales):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            x1 = pyro.sample("x1", dist.Normal(z, scales[0]))
            x2 = pyro.sample("x2", dist.Normal(-z, scales[1]))
            pyro.sample("y", dist.Normal(x1 + 3 * x2 + z, 0.5))

        question = Question(model, PAIR, "y")
        exact = question.affine.effect_given(torch.tensor([[1.0]]).double())
        law = stats.norm(exact.mean[0, 0], exact.covariance[0, 0, 0] ** 0.5)
        check_ks(given(model, PAIR, [1.0])[0, :, 0], law.cdf)


def test_given_total_in_a_plate():
    """One element of a plate makes up the rest."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("p", 4):
            x = pyro.sample("x", dist.Normal(z, torch.tensor([0.3, 1.0, 2.0, 0.5])))
        pyro.sample(
            "y", dist.Normal((x * torch.arange(4)).sum(-1, keepdim=True) - z, 0.7)
        )

    macro = pm.MacroVariable("m", "x", over="p")
    question = Question(model, macro, "y")
    exact = question.affine.effect_given(torch.tensor([[2.0]]).double())
    law = stats.norm(exact.mean[0, 0], exact.covariance[0, 0, 0] ** 0.5)
    check_ks(given(model, macro, [2.0])[0, :, 0], law.cdf)


def test_given_total_of_event_dims_and_several_sites():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(z, 1.0))
        scale = torch.tensor([1.0, 2.0, 0.5])
        v = pyro.sample("v", dist.Normal(z.unsqueeze(-1), scale).to_event(1))
        w = torch.tensor([1.0, -1.0, 2.0])
        pyro.sample("y", dist.Normal(x1 + (v * w).sum(-1) + z, 0.7))

    macro = pm.MacroVariable("m", ["x1", "v"])
    question = Question(model, macro, "y")
    exact = question.affine.effect_given(torch.tensor([[1.0]]).double())
    law = stats.norm(exact.mean[0, 0], exact.covariance[0, 0, 0] ** 0.5)
    check_ks(given(model, macro, [1.0])[0, :, 0], law.cdf)


def test_given_total_zero_weight_last():
    """A site without weight cannot make up the rest; another one can."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(z, 1.0))
        x2 = pyro.sample("x2", dist.Normal(-z, 1.0))
        x3 = pyro.sample("x3", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + z + x3, 1.0))

    linear = pm.Linear([1.0, 2.0, 0.0])
    macro = pm.MacroVariable("m", ["x1", "x2", "x3"], aggregation=linear)
    question = Question(model, macro, "y")
    exact = question.affine.effect_given(torch.tensor([[1.0]]).double())
    law = stats.norm(exact.mean[0, 0], exact.covariance[0, 0, 0] ** 0.5)
    check_ks(given(model, macro, [1.0])[0, :, 0], law.cdf)


def gammas(a=2.0, b=3.0, scale=0.0):
    z = pyro.sample("z", dist.Exponential(1.0))
    pyro.sample("x1", dist.Gamma(a + scale * z, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(b + scale * z, 1.0))
    pyro.deterministic("y", x2 + scale * z)


def plain_gammas():
    x1 = pyro.sample("x1", dist.Gamma(2.0, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(3.0, 1.0))
    pyro.deterministic("y", x2 + 0 * x1)


def test_given_total_gammas():
    """Given their sum, gammas of one rate are beta times that sum."""
    found = given(gammas, PAIR, [1.0, 6.0])[..., 0]
    for i, total in enumerate((1.0, 6.0)):
        check_ks(found[i], stats.beta(3, 2, scale=total).cdf)


def test_given_total_exponentials():
    def model():
        x1 = pyro.sample("x1", dist.Exponential(2.0))
        x2 = pyro.sample("x2", dist.Exponential(2.0))
        pyro.deterministic("y", x1 - x2)

    found = given(model, PAIR, [3.0])[0, :, 0]
    check_ks(found, stats.uniform(-3, 6).cdf)


@pytest.mark.parametrize("shape", [0.9, 0.3])
def test_given_total_unbounded_density(shape):
    """Where the density of the last site has a pole no draw can be kept for sure."""

    def model():
        x1 = pyro.sample("x1", dist.Gamma(1.0, 1.0))
        x2 = pyro.sample("x2", dist.Gamma(shape, 1.0))
        pyro.deterministic("y", x2 + 0 * x1)

    with pytest.raises(pm.UnsupportedLaw, match="'x2'"):
        given(model, PAIR, [2.0], count=1000)


def test_given_total_poisson():
    """Given their sum, Poisson counts are binomial."""

    def model():
        x1 = pyro.sample("x1", dist.Poisson(2.0))
        x2 = pyro.sample("x2", dist.Poisson(3.0))
        pyro.deterministic("y", x2 + 0 * x1)

    found = given(model, PAIR, [4.0, 7.0])[..., 0]
    for i, total in enumerate((4, 7)):
        law = stats.binom(total, 0.6)
        check_counts(found[i], {float(k): law.pmf(k) for k in range(total + 1)})


def test_given_total_of_counts_with_a_confounder():
    """With a finite common cause all can be listed."""

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x1 = pyro.sample("x1", dist.Poisson(1 + 2 * z))
        x2 = pyro.sample("x2", dist.Poisson(3 - 2 * z))
        pyro.deterministic("y", x1 + 10 * z + 0 * x2)

    total, table = 4, {}
    for z, p in ((0, 0.6), (1, 0.4)):
        for k in range(total + 1):
            one, two = stats.poisson(1 + 2 * z), stats.poisson(3 - 2 * z)
            table[float(k + 10 * z)] = p * one.pmf(k) * two.pmf(total - k)
    norm = sum(table.values())
    found = given(model, PAIR, [4.0])[0, :, 0]
    check_counts(found, {v: p / norm for v, p in table.items()})


def test_given_total_finite():
    def model():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        x1 = pyro.sample("x1", dist.Bernoulli(0.2 + 0.6 * z))
        x2 = pyro.sample("x2", dist.Bernoulli(0.5 + 0.3 * z))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.3 * x1 + 0.1 * x2 + 0.4 * z))

    question, sampler = sampler_of(model, PAIR)
    at = torch.arange(3.0).double()
    table = question.finite.effect_given(question.index(at))
    found = given_total(sampler, at, question.cut.others["effect"])[0][..., 0]
    for i in range(3):
        check_counts(found[i], {0.0: float(table[i, 0]), 1.0: float(table[i, 1])})


def test_given_total_is_the_total():
    """The macro value is met in each draw, and the cause itself can be looked at."""
    question, sampler = sampler_of(confounded, PAIR)
    at = torch.tensor([0.0, 5.0]).double()
    found = given_total(sampler, at, [question.cut.cause])[0][..., 0]
    torch.testing.assert_close(found, at[:, None].expand(found.shape))


def test_rare_macro_values():
    """Far out the proposals hardly ever fit; what comes back is right, or nothing."""
    question = Question(confounded, PAIR, "y")
    exact = question.affine.effect_given(torch.tensor([[9.0]]).double())
    law = stats.norm(exact.mean[0, 0], exact.covariance[0, 0, 0] ** 0.5)
    _, sampler = sampler_of(confounded, PAIR, count=500)
    found = given_total(sampler, torch.tensor([9.0]), question.cut.others["effect"])
    assert found is not None
    check_ks(found[0][0, :, 0], law.cdf)


def test_impossible_macro_values_are_refused():
    with pytest.raises(pm.Infeasible, match="-1"):
        given(gammas, PAIR, [2.0, -1.0], count=50)


# -- Draws under interventions -----------------------------------------------------


def report_of(model, realization, at, cause=PAIR, effect="y", **options):
    settings = {"num_samples": 1000, "progress": False} | options
    return pm.confounding(model, cause, effect, realization, at=at, **settings)


def test_draws_under_do_are_cut_off():
    """Definition 5: the confounder keeps its own law when the micro state is set."""
    report = report_of(gammas, allocate(0.25, 0.75), [1.0, 8.0], model_args=(2, 3, 1.0))
    assert report.method.startswith("Monte Carlo") and report.verdict == "inducing"
    for i, total in enumerate((1.0, 8.0)):
        draws = report.interventional.draws[i] - 0.75 * total
        check_ks(draws, stats.expon().cdf)


def test_draws_under_a_grid_are_those_under_each_value():
    """A grid goes in as one; so does a function that takes one value only."""

    def split(value):
        def law(total):
            parts = dist.Dirichlet(torch.tensor([2.0, 3.0]))
            scale = dist.transforms.AffineTransform(0.0, total.item(), event_dim=1)
            return dist.TransformedDistribution(parts, [scale])

        return pm.Explicit(value, law)

    report = report_of(gammas, split, [1.0, 8.0])
    for i, total in enumerate((1.0, 8.0)):
        law = stats.beta(3, 2, scale=total)
        check_ks(report.interventional.draws[i], law.cdf)
        check_ks(report.observational.draws[i], law.cdf)
    assert report.verdict == "undecided"


def test_report_of_draws():
    at = [1.0, 4.0, 8.0]
    report = report_of(gammas, allocate(0.5, 0.5), at, num_samples=700)
    assert report.num_samples == 700 and "700 draws" in report.method
    assert report.observational.draws.shape == (3, 700)
    assert report.interventional.draws.shape == (3, 700)
    for draws, mean, variance in [
        (report.observational.draws, report.observational_mean, "observational"),
        (report.interventional.draws, report.interventional_mean, "interventional"),
    ]:
        torch.testing.assert_close(draws.mean(-1), mean)
        spread = getattr(report, f"{variance}_variance")
        torch.testing.assert_close(draws.var(-1), spread)
    assert report.p_value.shape == report.detectable.shape == report.distance.shape
    assert report.divergence is None and report.distance_kind == "Wasserstein-2"
    torch.testing.assert_close(report.at, torch.tensor(at).double())


# -- Models that cannot be run side by side ----------------------------------------


def adds_up_everything():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    weighted = x * torch.tensor([1.0, 3.0])
    pyro.deterministic("y", weighted.sum())


def indexes_from_the_left():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    pyro.deterministic("y", x[0] + 3 * x[1])


def indexes_the_second():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    pyro.deterministic("y", 3 * x[1] + 0.0)


def unpacks():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    x1, x2 = x
    pyro.deterministic("y", x1 + 3 * x2)


def branches():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    first, second = x[..., 0], x[..., 1]
    # As it is for each share of the first below a half
    pyro.deterministic("y", first + 3 * second if first > -1 else first)


def takes_items():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    pyro.deterministic("y", torch.tensor(x[..., 0].item() + 3 * x[..., 1].item()))


def picks_from_a_list():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    total = x[..., 0] + 3 * x[..., 1]
    pyro.deterministic("y", [total, total][(x[..., 0] > 1).long()])


def looks_up():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    total = x[..., 0] + 3 * x[..., 1]
    pyro.deterministic("y", {True: total, False: total}[bool(x[..., 0] > 1)])


def loops():
    x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]), 1.0).to_event(1))
    total = x[..., 0] + 3 * x[..., 1]
    for _ in range((x[..., 0] > 1).long()):
        total = total + 0
    pyro.deterministic("y", total)


BASKET = pm.MacroVariable("total", "x")


@pytest.mark.parametrize(
    "model",
    [
        adds_up_everything,
        indexes_from_the_left,
        unpacks,
        branches,
        takes_items,
        picks_from_a_list,
        looks_up,
        loops,
    ],
    ids=lambda model: model.__name__,
)
@pytest.mark.parametrize("realization", [pm.Natural, "Proportional"])
def test_model_that_is_not_vectorizable(model, realization):
    """It is recognized, and drawn from one by one, with the right laws."""
    made = pm.Proportional if realization == "Proportional" else realization
    report = report_of(model, made, [4.0], BASKET, num_samples=120)
    law = stats.beta(3, 2)
    for outcomes in (report.observational, report.interventional):
        # y = total + 2 x2
        share = (outcomes.draws[0] - 4) / 8
        check_ks(share, law.cdf)
    natural = realization is pm.Natural
    assert report.verdict == ("inhibiting" if natural else "undecided")


def test_model_that_indexes_the_second():
    """What looks at one of two draws is not to be taken for what looks at one place."""
    report = report_of(indexes_the_second, pm.Natural, [4.0], BASKET, num_samples=120)
    for outcomes in (report.observational, report.interventional):
        check_ks(outcomes.draws[0] / 12, stats.beta(3, 2).cdf)


def in_a_plate():
    z = pyro.sample("z", dist.Exponential(1.0))
    with pyro.plate("p", 2):
        x = pyro.sample("x", dist.Gamma(torch.tensor([2.0, 3.0]) + 0 * z, 1.0))
    pyro.deterministic("y", x[1] + 0 * z)


def branching():
    z = pyro.sample("z", dist.Exponential(1.0))
    x1 = pyro.sample("x1", dist.Gamma(2.0 + 0 * z, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(3.0 + 0 * z, 1.0))
    pyro.deterministic("y", x2 if z > -1 else x1)


@pytest.mark.parametrize("model", [in_a_plate, branching])
def test_confounded_model_that_is_not_vectorizable(model):
    """Conditioned on one by one."""
    plate = model is in_a_plate
    macro = pm.MacroVariable("total", "x", over="p") if plate else PAIR
    report = report_of(model, allocate(0.5, 0.5), [4.0], macro, num_samples=120)
    check_ks(report.observational.draws[0], stats.beta(3, 2, scale=4).cdf)
    assert report.interventional.draws.unique().tolist() == [2.0]
    assert report.verdict == "inducing"


# -- Verdicts ----------------------------------------------------------------------


def test_theorem_3_1():
    """Natural realizations inhibit where no site acts on both, whatever the law."""
    report = report_of(plain_gammas, pm.Natural, [1.0, 8.0], num_samples=100)
    assert report.verdict == "inhibiting" and "Theorem 3.1" in report.method
    assert report.p_value is None and report.distance.tolist() == [0, 0]


def test_theorem_3_1_needs_that_no_site_acts_on_both():
    report = report_of(gammas, pm.Proportional, [1.0, 8.0], model_args=(2, 3, 1.0))
    assert report.verdict == "inducing" and "Theorem" not in report.method


def test_confounder_above_a_deterministic_site():
    """A common cause may act through what is computed from it."""

    def model():
        z = pyro.sample("z", dist.Exponential(1.0))
        m = pyro.deterministic("m", 2 * z)
        x1 = pyro.sample("x1", dist.Gamma(2.0 + m, 1.0))
        x2 = pyro.sample("x2", dist.Gamma(3.0 + m, 1.0))
        n = pyro.deterministic("n", 3 * z)
        pyro.deterministic("y", x1 + x2 - n)

    assert report_of(model, allocate(0.5, 0.5), [3.0, 9.0]).verdict == "inducing"


def test_mediators_do_not_confound():
    """What lies between micro state and effect is no common cause."""

    def model():
        x1 = pyro.sample("x1", dist.Gamma(2.0, 1.0))
        x2 = pyro.sample("x2", dist.Gamma(3.0, 1.0))
        m = pyro.sample("m", dist.Exponential(1 / (1 + x1 + x2)))
        pyro.sample("y", dist.Normal(m + x1, 1.0))

    assert Question(model, PAIR, "y").common_causes == []
    report = report_of(model, pm.Natural, [4.0], num_samples=50)
    assert report.verdict == "inhibiting"


def test_same_means_other_variances_are_inducing():
    """Definition 6 is about distributions."""
    mean_split = allocate(0.4, 0.6)
    report = report_of(gammas, mean_split, [5.0], num_samples=500)
    assert abs(report.observational_mean - report.interventional_mean) < 0.2
    assert report.verdict == "inducing"


def test_hidden_confounder_of_other_laws():
    """Student, Laplace and uniform sites under a common cause."""

    def model(kind):
        z = pyro.sample("z", dist.StudentT(4.0, 0.0, 1.0))
        site = {
            "student": lambda: dist.StudentT(5.0, z, 1.0),
            "laplace": lambda: dist.Laplace(z, 1.0),
            "uniform": lambda: dist.Uniform(z - 2, z + 2),
        }[kind]
        x1, x2 = pyro.sample("x1", site()), pyro.sample("x2", site())
        pyro.sample("y", dist.Normal(x1 + x2 - 2 * z, 0.5))

    for kind in ("student", "laplace", "uniform"):
        report = report_of(
            model, allocate(0.5, 0.5), [0.0, 3.0], num_samples=400, model_args=(kind,)
        )
        assert report.verdict == "inducing"
        # y = x1 + x2 - 2 z: given the total it is total - 2 E[z | total]
        assert abs(report.interventional_mean[1] - 3) < 0.6
        assert report.observational_mean[1] < 1.5


def test_counts_with_a_confounder():
    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 1.0))
        x1 = pyro.sample("x1", dist.Poisson(z))
        x2 = pyro.sample("x2", dist.Poisson(2 * z))
        pyro.sample("y", dist.Poisson(1 + x1 + x2 + 3 * z))

    report = report_of(model, allocate(1 / 3, 2 / 3), [3.0, 12.0], num_samples=400)
    assert report.verdict == "inducing"
    # E[z | total] = (2 + total) / 4 for gamma shape 2, rate 1 + 3
    expected = 1 + torch.tensor([3.0, 12.0]) + 3 * torch.tensor([5.0, 14.0]) / 4
    assert (report.observational_mean - expected).abs().max() < 1.0
    assert (report.interventional_mean - torch.tensor([10.0, 19.0])).abs().max() < 1.5


@pytest.mark.slow
def test_natural_law_by_nuts():
    """Where the natural law itself is known by chains."""

    def model():
        x1 = pyro.sample("x1", dist.LogNormal(0.0, 0.5))
        x2 = pyro.sample("x2", dist.LogNormal(0.0, 0.5))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.1))

    def natural(value):
        chains = pm.Chains(
            num_samples=150, warmup_steps=50, num_chains=2, progress=False
        )
        return pm.Natural(value, sampler=chains)

    report = report_of(model, natural, [2.0], num_samples=200)
    assert report.verdict == "inhibiting"
    assert abs(float(report.interventional_mean) - 4) < 0.3


@pytest.mark.slow
def test_chains_do_not_raise_false_alarms():
    """Stored draws of chains are no independent draws, however many are asked for."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.LogNormal(0 * z, 0.5))
        x2 = pyro.sample("x2", dist.LogNormal(0 * z, 0.5))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + 0 * z, 0.1))

    def natural(value):
        chains = pm.Chains(
            num_samples=60, warmup_steps=60, num_chains=2, progress=False
        )
        return pm.Natural(value, sampler=chains)

    alarms = [
        report_of(model, natural, [2.0], num_samples=2000, seed=1000 * i).verdict
        for i in range(5)
    ]
    assert "inducing" not in alarms


# -- Seeds, state, and bars --------------------------------------------------------


def test_seeds():
    def draws(seed):
        return report_of(gammas, allocate(0.5, 0.5), [4.0], num_samples=50, seed=seed)

    one, same, other = draws(3), draws(3), draws(4)
    assert torch.equal(one.observational.draws, same.observational.draws)
    assert torch.equal(one.interventional_mean, same.interventional_mean)
    assert torch.equal(one.p_value, same.p_value)
    assert not torch.equal(one.observational.draws, other.observational.draws)


def test_neighbouring_seeds_share_no_draws():
    """Repeated questions, with seeds 0, 1, 2, ..., are independent."""
    kinds = {}
    for seed in range(3):
        report = report_of(
            gammas, pm.Proportional, [4.0], num_samples=50, seed=seed, model_args=(2, 3)
        )
        for outcomes in (report.observational, report.interventional):
            key = tuple(outcomes.draws[0].tolist())
            assert key not in kinds
            kinds[key] = seed
            for other in kinds:
                assert key is other or len(set(key) & set(other)) == 0


def test_both_laws_are_drawn_apart():
    """A two-sample test needs independent samples."""
    report = report_of(gammas, pm.Proportional, [4.0])
    one, other = report.observational.draws[0], report.interventional.draws[0]
    assert abs(stats.pearsonr(one, other).statistic) < 4 / len(one) ** 0.5
    assert not set(one.tolist()) & set(other.tolist())


def test_two_runs_of_one_program_are_apart():
    """Also where both laws are made by the same calls."""

    class Copy(pm.Natural):
        pass

    report = report_of(plain_gammas, Copy, [4.0], num_samples=100)
    one, other = report.observational.draws[0], report.interventional.draws[0]
    assert not set(one.tolist()) & set(other.tolist())
    assert report.verdict == "undecided"


def test_draws_are_independent_of_one_another():
    report = report_of(gammas, allocate(0.5, 0.5), [4.0], model_args=(2, 3, 0.5))
    for outcomes in (report.observational, report.interventional):
        draws = outcomes.draws[0]
        lagged = stats.pearsonr(draws[1:], draws[:-1]).statistic
        assert abs(lagged) < 4 / len(draws) ** 0.5


@pytest.mark.parametrize("model", [gammas, adds_up_everything])
def test_nothing_of_the_user_is_touched(model):
    net = torch.nn.BatchNorm1d(1)

    def trained():
        model()
        pyro.param("p", torch.tensor(1.0))
        pyro.module("net", net)
        net(torch.randn(5, 1))

    cause = PAIR if model is gammas else BASKET
    pyro.get_param_store().clear()
    pyro.param("mine", torch.tensor(2.0))
    state, mean = torch.get_rng_state(), net.running_mean.clone()
    with poutine.trace() as trace:
        report_of(trained, pm.Proportional, [4.0], cause, num_samples=30)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert torch.equal(net.running_mean, mean)
    assert list(trace.trace.nodes) == []
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize(
    "way",
    ["conditioning", "one by one", pytest.param("chains", marks=pytest.mark.slow)],
)
def test_progress_bars(way, progress, capfd):
    def by_chains():
        x1 = pyro.sample("x1", dist.LogNormal(0.0, 0.5))
        x2 = pyro.sample("x2", dist.LogNormal(0.0, 0.5))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.1))

    model, cause, realization = {
        "conditioning": (gammas, PAIR, allocate(0.5, 0.5)),
        "one by one": (adds_up_everything, BASKET, pm.Proportional),
        "chains": (by_chains, PAIR, pm.Natural),
    }[way]
    report_of(
        model,
        realization,
        [4.0],
        cause,
        num_samples=50,
        progress=progress,
        model_args=(2, 3, 1.0) if way == "conditioning" else (),
    )
    out, err = capfd.readouterr()
    assert out == ""
    assert bool(err) == progress, err[:200]


def test_default_macro_values_are_quantiles_of_the_cause():
    report = report_of(gammas, allocate(0.5, 0.5), None)
    law = stats.gamma(5)
    assert len(report.at) == 5
    for value, q in zip(report.at, (0.05, 0.25, 0.5, 0.75, 0.95), strict=True):
        error = (q * (1 - q) / report.num_samples) ** 0.5
        assert abs(law.cdf(value) - q) < 4 * error


def test_default_macro_values_of_counts_can_be_reached():
    def model():
        x1 = pyro.sample("x1", dist.Poisson(2.0))
        x2 = pyro.sample("x2", dist.Poisson(3.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 1.0))

    report = report_of(model, allocate(0.5, 0.5), None, num_samples=100)
    assert torch.equal(report.at, report.at.round())
    assert report.verdict in ("undecided", "inducing")


def test_plates_that_stay():
    """Without ``over`` there is a macro value in each slot, and an effect of each."""

    def model():
        with pyro.plate("p", 2):
            x1 = pyro.sample("x1", dist.Gamma(2.0, 1.0))
            x2 = pyro.sample("x2", dist.Gamma(3.0, 1.0))
            pyro.deterministic("y", torch.tensor([1.0, 2.0]) * x2 + 0 * x1)

    report = report_of(model, pm.Natural, [4.0, 5.0])
    assert report.observational_mean.shape == (2, 2)
    expected = torch.tensor([[2.4, 4.8], [3.0, 6.0]]).double()
    for found in (report.observational_mean, report.interventional_mean):
        assert (found - expected).abs().max() < 0.3
