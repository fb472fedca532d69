# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""DoWhy on the graphs and draws of a program: the same effects, where it has them."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Predictive

import pyro_macro as pm

pytest.importorskip("dowhy", reason="needs DoWhy: pip install '.[neighbours]'")

import pandas as pd  # noqa: E402
from dowhy import CausalModel, gcm  # noqa: E402

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
ALPHA, GAMMA = (1.0, 3.0), 2.0  # of revenue in the products and the season


def shop():
    season = pyro.sample("season", dist.Normal(0.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(10.0 + season, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0 - 0.5 * season, 1.0))
    mean = ALPHA[0] * x1 + ALPHA[1] * x2 + GAMMA * season
    pyro.sample("revenue", dist.Normal(mean, 1.0))


SITES = ["season", "x1", "x2", "revenue"]


def draws(count, sites=(*SITES, "sales")):
    """Draws of the program with its macro value."""
    observed = pm.aggregate(shop, SALES)
    drawn = Predictive(observed, num_samples=count, parallel=True, return_sites=sites)
    return pd.DataFrame({k: v.flatten().numpy() for k, v in drawn().items()})


def test_an_adjusted_effect_is_that_of_the_natural_realization():
    """Theorem 4.1: adjusting for b estimates do(sales) of Natural(value, given=b).

    Given the season, x1 and x2 are independent with variances 4 and 1, so that one more
    unit of sales is found as 4/5 of x1 and 1/5 of x2.
    """
    count, slope = 20_000, 0.8 * ALPHA[0] + 0.2 * ALPHA[1]
    exact = pm.macro_adjust(shop, SALES, "revenue", "season", at=[30.0, 31.0]).mean
    assert (exact[1] - exact[0]).item() == pytest.approx(slope, abs=1e-9)

    graph = pm.macro_graph(shop, [SALES, "season", "revenue"])
    model = CausalModel(draws(count), "sales", "revenue", graph=graph)
    estimand = model.identify_effect()
    assert estimand.get_backdoor_variables() == ["season"]
    found = model.estimate_effect(estimand, "backdoor.linear_regression").value
    # What is left of revenue: noise, and the mix of sales, of variance 4/5; what is
    # left of sales given the season has variance 5
    error = ((1.0 + 0.8 * (ALPHA[0] - ALPHA[1]) ** 2) / (5.0 * count)) ** 0.5
    assert abs(found - slope) < 5 * error


def test_a_season_that_was_not_seen_leaves_the_effect_unidentified():
    graph = pm.macro_graph(shop, [SALES, "revenue"])
    assert graph.nodes["season"]["kind"] == "latent"
    assert pm.macro_backdoor_sets(graph, SALES, "revenue") == []
    seen = draws(10, sites=("sales", "revenue"))
    with pytest.warns(UserWarning, match="1 variables are assumed unobserved"):
        model = CausalModel(seen, "sales", "revenue", graph=graph)
    estimand = model.identify_effect(proceed_when_unidentifiable=True)
    assert estimand.estimands["backdoor"] is None


COUNT = 4000


@pytest.fixture
def fitted():
    """The program as DoWhy learns it from draws, macro value included."""
    gcm.util.general.set_random_seed(0)
    graph = pm.amalgamated_graph(shop, SALES)
    model = gcm.InvertibleStructuralCausalModel(graph)
    for name in graph:
        if graph.in_degree(name):
            linear = gcm.AdditiveNoiseModel(gcm.ml.create_linear_regressor())
            model.set_causal_mechanism(name, linear)
        else:
            model.set_causal_mechanism(name, gcm.EmpiricalDistribution())
    gcm.config.disable_progress_bars()
    gcm.fit(model, draws(COUNT))
    return model


def is_mean(found, expected):
    """Of draws from a model that was learnt from as many."""
    error = (2.0 / COUNT) ** 0.5 * found.std()
    assert abs(found.mean() - expected) < 5 * error


def test_dowhy_sets_the_sum_and_nothing_follows(fitted):
    """That is what a micro-realization is for: the parts of a sum are not its effects.

    With its micro values as interventions DoWhy finds what macro_do does.
    """
    drawn = gcm.interventional_samples(
        fitted, {"sales": lambda _: 40.0}, num_samples_to_draw=COUNT
    )
    assert (drawn["sales"] == 40.0).all()
    is_mean(drawn["x1"] + drawn["x2"], 30.0)
    is_mean(drawn["revenue"], ALPHA[0] * 10.0 + ALPHA[1] * 20.0)

    shared = {SALES: pm.Allocate(40.0, shares=[0.25, 0.75])}
    nodes = pyro.poutine.trace(pm.macro_do(shop, shared)).get_trace().nodes
    actions = {
        name: lambda _, value=nodes[name]["value"].item(): value for name in SALES.micro
    }
    drawn = gcm.interventional_samples(fitted, actions, num_samples_to_draw=COUNT)
    assert (drawn["sales"] - 40.0).abs().max() < 1e-6
    is_mean(drawn["revenue"], ALPHA[0] * 10.0 + ALPHA[1] * 30.0)


def test_the_counterfactual_of_a_unit(fitted):
    """All of it was seen; had sales been 1.5 higher, along the natural direction."""
    seen = {"season": 0.4, "x1": 11.0, "x2": 19.0, "revenue": 70.0}
    report = pm.counterfactual(shop, {SALES: pm.Shift(1.5)}, seen, "revenue")
    # cov(x) = ((5, -1/2), (-1/2, 5/4)): row sums 9/2 and 3/4
    direction = (6.0 / 7.0, 1.0 / 7.0)
    slope = ALPHA[0] * direction[0] + ALPHA[1] * direction[1]
    assert report.mean.item() == pytest.approx(70.0 + 1.5 * slope, abs=1e-6)

    unit = pd.DataFrame({name: [value] for name, value in seen.items()})
    unit["sales"] = 30.0
    steps = zip(SALES.micro, direction, strict=True)
    actions = {name: lambda x, by=1.5 * step: x + by for name, step in steps}
    found = gcm.counterfactual_samples(fitted, actions, observed_data=unit)
    assert found["sales"].item() == pytest.approx(31.5, abs=1e-6)
    # Coefficients of revenue are learnt with errors 1/sqrt(4 n) and 1/sqrt(n)
    error = 1.5 * (direction[0] / 2.0 + direction[1]) / COUNT**0.5
    assert abs(found["revenue"].item() - report.mean.item()) < 5 * error
    torch.testing.assert_close(report.variance, torch.zeros_like(report.variance))
