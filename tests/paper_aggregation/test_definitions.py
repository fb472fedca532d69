# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Definitions 2 to 7, Assumption 1 and Example 1."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from shop import ALPHA, MU, QUERY, SALES, VARIANCE, condition, law, shop

import pyro_macro as pm
from pyro_macro.program.reading import read


def confounded():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(z, 1.0))
    x2 = pyro.sample("x2", dist.Normal(-z, 1.0))
    pyro.sample("y", dist.Normal(x1 + 2 * x2 + z, 1.0))


def test_definition_5_intervention_graph():
    """Figure 3: Z -> X, Z -> Y, X -> Y becomes Xb -> X, X -> Y, Z -> Y."""
    before = read(confounded).sites
    assert before["x1"].parents == before["x2"].parents == {"z"}
    assert before["y"].parents == {"z", "x1", "x2"}
    after = read(pm.macro_do(confounded, {SALES: pm.Natural(1.0)}))
    assert after.sites["x1"].parents == after.sites["x2"].parents == {"sales__micro"}
    assert after.sites["y"].parents == {"z", "x1", "x2"}
    assert "z" not in after.ancestors("x1")
    assert after.sites["sales"].parents == frozenset()


def test_definition_5_cuts_the_micro_state_from_its_parents():
    """Exactly: the law of X under do(xb) does not move with Z, that of Y does."""
    intervened = pm.macro_do(confounded, {SALES: pm.Natural(1.0)})
    laws = [
        pyro.poutine.trace(
            pyro.poutine.condition(intervened, {"z": torch.tensor(z)})
        ).get_trace()
        for z in (0.0, 5.0)
    ]
    first, second = (t.nodes["sales__micro"]["fn"] for t in laws)
    assert torch.equal(first.mean, second.mean)
    # X1 = Z + E1, X2 = -Z + E2: the total is E1 + E2, its parts share Z
    covariance = torch.tensor([[2.0, -1.0], [-1.0, 2.0]])
    mean, within = condition(
        torch.zeros(2), covariance, torch.ones(1, 2), torch.tensor([1.0])
    )
    torch.testing.assert_close(first.mean, mean)
    torch.testing.assert_close(first.covariance_matrix, within)


@pytest.mark.parametrize(
    "realization",
    [
        pm.Natural(QUERY),
        pm.Residual(QUERY, absorb="x2"),
        pm.Residual(QUERY, absorb="x1"),
        pm.Allocate(QUERY, shares=[0.25, 0.75]),
        pm.Proportional(QUERY),
    ],
)
def test_definition_4_every_draw_is_on_the_fibre(realization):
    with pyro.plate("draws", 1000):
        nodes = (
            pyro.poutine.trace(pm.macro_do(shop, {SALES: realization}))
            .get_trace()
            .nodes
        )
    total = nodes["x1"]["value"] + nodes["x2"]["value"]
    assert (total - QUERY).abs().max() < 1e-12 * QUERY


def test_definition_4_refuses_a_kernel_off_the_fibre():
    def anywhere(value):
        return dist.Normal(value.expand(2) / 2, 1.0).to_event(1)

    with pytest.raises(pm.OffFibre, match=r"'sales'.*Expected 33\.0"):
        pm.macro_do(shop, {SALES: pm.Explicit(QUERY, anywhere)})()


@pytest.mark.parametrize("between", ["direct", "gaussian", "discrete", "deterministic"])
def test_assumption_1_refuses_a_directed_path(between):
    def model():
        x1 = pyro.sample("x1", dist.Normal(0.0, 1.0))
        if between == "gaussian":
            x1 = pyro.sample("between", dist.Normal(x1, 1.0))
        elif between == "discrete":
            x1 = pyro.sample("between", dist.Bernoulli(logits=x1))
        elif between == "deterministic":
            x1 = pyro.deterministic("between", x1 + 1)
        pyro.sample("x2", dist.Normal(x1, 1.0))

    with pytest.raises(pm.NotAMicroState, match="path from 'x1' to 'x2'"):
        pm.macro_do(model, {SALES: pm.Natural(1.0)})()


def test_definition_2_refuses_an_injective_map():
    single = pm.MacroVariable("single", micro="x1")
    with pytest.raises(pm.NotAMicroState, match="injective"):
        pm.macro_do(shop, {single: pm.Natural(1.0)})()
    with pytest.raises(pm.NotAMicroState, match="injective"):
        pm.aggregate(shop, [single])()


@pytest.mark.parametrize(
    "prices, effects", [((2.0, 5.0), (2, 5)), ((4.0, 4.0), (4, 4))]
)
def test_example_1_the_effect_of_a_total_is_ill_defined(prices, effects):
    """Two realizations of Xb = 1 agree on Yb only if the prices are equal."""

    def model():
        for j, price in enumerate(prices, start=1):
            x = pyro.sample(f"x{j}", dist.Bernoulli(0.5))
            pyro.deterministic(f"y{j}", price * x)

    revenue = pm.MacroVariable("revenue", micro=["y1", "y2"])
    found = []
    for shares in ([1.0, 0.0], [0.0, 1.0]):
        intervened = pm.macro_do(model, {SALES: pm.Allocate(1, shares)})
        trace = pyro.poutine.trace(pm.aggregate(intervened, [revenue])).get_trace()
        found.append(trace.nodes["revenue"]["value"].item())
    assert tuple(found) == effects


def observational(value):
    """P(Yb | xb) in SHOP, from the joint covariance of (Xb, Yb)."""
    total, covariance = VARIANCE.sum(), (ALPHA * VARIANCE).sum()
    mean = ALPHA @ MU + covariance / total * (value - MU.sum())
    return mean, (ALPHA**2 * VARIANCE).sum() - covariance**2 / total


def effect(realization):
    """P(Yb | do(xb)): mean and variance of alpha.X, from the latent site's law."""
    micro = law(pm.macro_do(shop, {SALES: realization}))
    return ALPHA @ micro.mean, ALPHA @ micro.covariance_matrix @ ALPHA


@pytest.mark.parametrize("value", [25.0, 30.0, 33.0])
def test_definitions_6_and_7_inhibiting_and_inducing(value):
    seen = observational(value)
    torch.testing.assert_close(effect(pm.Natural(value)), seen)
    for absorb in ("x1", "x2"):
        mean, variance = effect(pm.Residual(value, absorb=absorb))
        assert not torch.isclose(mean, seen[0]) or not torch.isclose(variance, seen[1])


def test_definition_6_compares_distributions_not_means():
    """At the mean of Xb the means agree, and the variances do not."""
    value = MU.sum().item()
    seen = observational(value)
    mean, variance = effect(pm.Residual(value, absorb="x2"))
    torch.testing.assert_close(mean, seen[0])
    torch.testing.assert_close(variance, torch.tensor(16.0))
    torch.testing.assert_close(seen[1], torch.tensor(3.2))
