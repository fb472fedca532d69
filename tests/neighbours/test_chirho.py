# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Macro interventions in ChiRho's worlds, against the equations of the shop.

In ChiRho, worlds share what no intervention acts on; a site that is drawn below an
intervention is drawn in each world. So noise that worlds are to share is a site of its
own, as in a structural causal model.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.transforms import AffineTransform

import pyro_macro as pm

pytest.importorskip("chirho", reason="needs ChiRho: pip install '.[neighbours]'")

from chirho.counterfactual.handlers import (  # noqa: E402
    MultiWorldCounterfactual,
    TwinWorldCounterfactual,
)
from chirho.counterfactual.ops import split  # noqa: E402
from chirho.indexed.handlers import IndexPlatesMessenger  # noqa: E402
from chirho.indexed.ops import (  # noqa: E402
    IndexSet,
    gather,
    get_index_plates,
    scatter_n,
)
from chirho.interventional.handlers import do  # noqa: E402
from chirho.observational.handlers import condition  # noqa: E402

DRAWS = 1000
COUNTERFACTUAL = [TwinWorldCounterfactual, MultiWorldCounterfactual]
SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
# cov(x) = ((5, -1), (-1, 2)): the natural direction is its row sums over their total
DIRECTION = (0.8, 0.2)
MEAN = (11.0, 19.0)


def shop():
    """Two products, a season that confounds them and revenue, noise of its own."""
    season = pyro.sample("season", dist.Normal(1.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(10.0 + season, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0 - season, 1.0))
    price = pyro.sample("price", dist.Normal(1.0, 0.1))
    noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
    return pyro.deterministic("revenue", price * x1 + 3.0 * x2 + 2.0 * season + noise)


def revenue_of(values, **changed):
    """The equation of revenue, at the values of a run."""
    v = {**values, **changed}
    return v["price"] * v["x1"] + 3.0 * v["x2"] + 2.0 * v["season"] + v["noise"]


def micro_values(macro_run, names=SALES.micro):
    """The micro values of a run under ``macro_do``, as actions of ChiRho's ``do``."""
    nodes = poutine.trace(macro_run).get_trace().nodes
    return {name: nodes[name]["value"] for name in names}


def across(trace, names, count=2):
    """The values of sites in each world, the factual one first.

    ``MultiWorldCounterfactual`` has a dimension for each site that is set, and worlds
    where some of them are: those where none is, and where all are, are meant here.
    """

    def seen(name, k):
        world = IndexSet(**{plate: {k} for plate in get_index_plates()})
        return gather(trace.nodes[name]["value"], world).flatten()

    return [{name: seen(name, k) for name in names} for k in range(count)]


NAMES = ["season", "x1", "x2", "price", "noise", "revenue", "sales"]
SHARED = ["season", "price", "noise"]


def plate():
    return pyro.plate("draws", DRAWS, dim=-1)


def close(found, expected):
    expected = torch.as_tensor(expected).expand_as(found)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def is_mean(found, expected):
    """Whether the mean of draws is as expected, within five standard errors."""
    error = found.std() / len(found) ** 0.5
    assert (found.mean() - expected).abs() < 5 * error, (found.mean(), expected, error)


@pytest.mark.parametrize("counterfactual", COUNTERFACTUAL)
def test_a_shift_in_one_world(counterfactual):
    """A shift by nothing is the factual world, with the same natural micro state."""
    with counterfactual(first_available_dim=-2), poutine.trace() as record:
        delta = split(torch.tensor(0.0), (torch.tensor(1.5),), name="setting")
        with plate():
            pm.macro_do(shop, {SALES: pm.Shift(delta)})()
        factual, other = across(record.trace, NAMES)
    for name in SHARED:
        assert record.trace.nodes[name]["value"].shape == (DRAWS,)  # drawn once
    close(factual["revenue"], revenue_of(factual))
    natural = record.trace.nodes["sales__micro"]["value"]
    close(torch.stack([factual["x1"], factual["x2"]], -1), natural)
    for name, step in zip(SALES.micro, DIRECTION, strict=True):
        close(other[name] - factual[name], 1.5 * step)
    slope = factual["price"] * DIRECTION[0] + 3.0 * DIRECTION[1]
    close(other["revenue"] - factual["revenue"], 1.5 * slope)
    is_mean(factual["revenue"], 1.0 * MEAN[0] + 3.0 * MEAN[1] + 2.0)


def test_a_shift_in_the_worlds_of_index_plates():
    with IndexPlatesMessenger(first_available_dim=-2), poutine.trace() as record:
        values = {k: torch.tensor(float(delta)) for k, delta in enumerate([0, 2, -1])}
        delta = scatter_n({IndexSet(world={k}): v for k, v in values.items()})
        with plate():
            pm.macro_do(shop, {SALES: pm.Shift(delta)})()
        factual, more, less = across(record.trace, NAMES, 3)
    slope = factual["price"] * DIRECTION[0] + 3.0 * DIRECTION[1]
    close(more["revenue"] - factual["revenue"], 2.0 * slope)
    close(less["revenue"] - factual["revenue"], -slope)


REALIZATIONS = [
    (pm.Natural(33.0), (13.4, 19.6)),  # the mean, and 3 more along the direction
    (pm.Residual(33.0, absorb="x2"), (11.0, 22.0)),
    (pm.Allocate(33.0, shares=[0.5, 0.5]), (16.5, 16.5)),
]


@pytest.mark.parametrize("counterfactual", COUNTERFACTUAL)
@pytest.mark.parametrize(
    "realization, mean", REALIZATIONS, ids=lambda r: type(r).__name__
)
def test_a_macro_value_in_one_world(counterfactual, realization, mean):
    """Beside the factual world: its micro values go in as actions of ChiRho's do."""
    with counterfactual(first_available_dim=-2), plate():
        actions = micro_values(pm.macro_do(shop, {SALES: realization}))
        with do(actions=actions), poutine.trace() as record:
            pm.aggregate(shop, SALES)()
        factual, other = across(record.trace, NAMES)
    for name in SHARED:
        assert record.trace.nodes[name]["value"].shape == (DRAWS,)
    close(factual["sales"], factual["x1"] + factual["x2"])
    close(other["sales"], 33.0)
    step = {name: other[name] - factual[name] for name in SALES.micro}
    change = factual["price"] * step["x1"] + 3.0 * step["x2"]
    close(other["revenue"] - factual["revenue"], change)
    close(factual["revenue"], revenue_of(factual))
    is_mean(factual["revenue"], MEAN[0] + 3.0 * MEAN[1] + 2.0)
    is_mean(other["revenue"], mean[0] + 3.0 * mean[1] + 2.0)


def beside(seen, macro_run):
    """The worlds of a run that was seen, and of one in which micro sites are set."""
    with MultiWorldCounterfactual(first_available_dim=-2), plate():
        with poutine.replay(trace=seen):
            actions = micro_values(macro_run)
            with do(actions=actions), poutine.trace() as record:
                pm.aggregate(shop, SALES)()
        factual, other = across(record.trace, NAMES)
    for name in [*SHARED, "x1", "x2", "revenue"]:
        close(factual[name], seen.nodes[name]["value"])
    close(other["sales"], 33.0)
    close(other["revenue"], revenue_of(factual, x1=other["x1"], x2=other["x2"]))
    return factual, other


def seen_shop():
    with plate():
        return poutine.trace(shop).get_trace()


def test_a_realization_that_holds_a_site_of_the_factual_world():
    """It is drawn in a replay of the factual run, which the worlds replay too."""
    natural = pm.macro_do(shop, {SALES: pm.Natural(33.0, given="season")})
    factual, other = beside(seen_shop(), natural)
    # Given the season x1 and x2 are independent, of variances 4 and 1
    rest = other["x1"] - (10.0 + factual["season"] + 0.8 * 3.0)
    is_mean(rest, 0.0)
    is_mean(rest * factual["season"], 0.0)
    is_mean(rest**2, 4.0 / 5.0)


def test_a_realization_that_changes_the_factual_micro_state():
    """Its latent site is the natural micro state, and is given the factual one."""
    seen = seen_shop()
    state = torch.stack([seen.nodes[name]["value"] for name in SALES.micro], -1)
    rescaled = pm.macro_do(shop, {SALES: pm.Proportional(33.0)})
    rescaled = poutine.condition(rescaled, data={"sales__micro": state})
    factual, other = beside(seen, rescaled)
    for name in SALES.micro:
        close(other[name], factual[name] * 33.0 / factual["sales"])


@pytest.mark.parametrize("counterfactual", COUNTERFACTUAL)
@pytest.mark.parametrize("site", ["price", "season", "noise"])
def test_worlds_of_another_site_under_macro_do(counterfactual, site):
    """They share the micro state: it is cut off from what the other site does."""
    with counterfactual(first_available_dim=-2), poutine.trace() as record, plate():
        with do(actions={site: torch.tensor(5.0)}):
            pm.macro_do(shop, {SALES: pm.Natural(33.0)})()
        assert record.trace.nodes["sales__micro"]["value"].shape == (DRAWS, 2)
        factual, other = across(record.trace, NAMES)
    close(factual["revenue"], revenue_of(factual))
    close(other["revenue"], revenue_of(factual, **{site: torch.tensor(5.0)}))
    close(factual["sales"], 33.0)
    is_mean(factual["x1"], 13.4)


def test_worlds_of_a_site_that_the_realization_holds():
    natural = pm.macro_do(shop, {SALES: pm.Natural(33.0, given="season")})
    natural()  # once without worlds, which is not remembered
    with MultiWorldCounterfactual(first_available_dim=-2):
        with poutine.trace() as record, plate():
            with do(actions={"season": torch.tensor(5.0)}):
                natural()
        factual, other = across(record.trace, NAMES)
    for world in (factual, other):
        close(world["sales"], 33.0)
    is_mean(factual["x1"] - factual["season"], 10.0 + 0.8 * 3.0)
    is_mean(other["x1"], 10.0 + 5.0 + 0.8 * 3.0)
    is_mean((other["x1"] - 17.4) ** 2, 0.8)


def test_macro_and_micro_interventions_make_four_worlds():
    with MultiWorldCounterfactual(first_available_dim=-2), poutine.trace() as record:
        delta = split(torch.tensor(0.0), (torch.tensor(1.5),), name="setting")
        with plate(), do(actions={"price": torch.tensor(4.0)}):
            pm.macro_do(shop, {SALES: pm.Shift(delta)})()
        value = record.trace.nodes["revenue"]["value"]
        at = {
            (i, j): gather(value, IndexSet(setting={i}, price={j})).reshape(-1)
            for i in (0, 1)
            for j in (0, 1)
        }
    price = record.trace.nodes["price"]["value"]
    both = at[1, 1] - at[1, 0] - at[0, 1] + at[0, 0]
    close(both, 1.5 * DIRECTION[0] * (4.0 - price))


def test_several_macro_values_make_worlds():
    with MultiWorldCounterfactual(first_available_dim=-2), poutine.trace() as record:
        acts = (torch.tensor(33.0), torch.tensor(36.0))
        value = split(torch.tensor(30.0), acts, name="setting")
        with plate():
            pm.macro_do(shop, {SALES: pm.Natural(value)})()
        worlds = across(record.trace, NAMES, 3)
    for total, world in zip((30.0, 33.0, 36.0), worlds, strict=True):
        close(world["x1"] + world["x2"], total)
        close(world["revenue"], revenue_of(world))
        is_mean(world["x1"], MEAN[0] + DIRECTION[0] * (total - 30.0))


def stores():
    """Products in a plate, that a macro-variable is over, and stores that stay."""
    with pyro.plate("stores", 3, dim=-2):
        with pyro.plate("products", 2, dim=-1):
            x = pyro.sample("x", dist.Normal(1.0, torch.tensor([2.0, 1.0])))
        noise = pyro.sample("noise", dist.Normal(0.0, 1.0))
        pyro.deterministic("revenue", x @ torch.tensor([[1.0], [3.0]]) + noise)


def test_worlds_lie_left_of_the_plates_of_the_model():
    each = pm.MacroVariable("each", micro="x", over="products")
    with MultiWorldCounterfactual(first_available_dim=-3), poutine.trace() as record:
        delta = split(torch.tensor(0.0), (torch.tensor(1.0),), name="setting")
        pm.macro_do(stores, {each: pm.Shift(delta)})()
    value = record.trace.nodes["revenue"]["value"]
    assert value.shape == (2, 3, 1)
    close(value[1] - value[0], 0.8 + 3.0 * 0.2)
    with TwinWorldCounterfactual(first_available_dim=-3):
        actions = micro_values(pm.macro_do(stores, {each: pm.Natural(5.0)}), ["x"])
        with do(actions=actions), poutine.trace() as record:
            pm.aggregate(stores, each)()
    x, revenue = (record.trace.nodes[name]["value"] for name in ("x", "revenue"))
    assert x.shape == (2, 3, 2)
    close(record.trace.nodes["each"]["value"][1], 5.0)
    step = (x[1] - x[0]) @ torch.tensor([[1.0], [3.0]])
    close(revenue[1] - revenue[0], step)


def revenue_law(mean):
    """As ChiRho wants it to infer the noise from what was seen."""
    noise = dist.Normal(torch.zeros(()), torch.ones(()))
    return dist.TransformedDistribution(noise, [AffineTransform(mean, 1.0)])


def observed_shop(law=revenue_law):
    season = pyro.sample("season", dist.Normal(1.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(10.0 + season, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0 - season, 1.0))
    pyro.sample("revenue", law(x1 + 3.0 * x2 + 2.0 * season))


def exactly(realization, seen):
    """What the library says: the same program, whose noise it knows to be normal."""
    normal = {"law": lambda mean: dist.Normal(mean, 1.0)}
    return pm.counterfactual(
        observed_shop,
        {SALES: realization},
        {"revenue": seen},
        "revenue",
        model_kwargs=normal,
    )


def posterior(seen):
    """Means of season, x1, x2 given revenue, by conditioning their joint normal."""
    mean = torch.tensor([1.0, *MEAN])
    covariance = torch.tensor([[1.0, 1.0, -1.0], [1.0, 5.0, -1.0], [-1.0, -1.0, 2.0]])
    weights = torch.tensor([2.0, 1.0, 3.0])
    gain = covariance @ weights / (weights @ covariance @ weights + 1.0)
    return mean + gain * (seen - weights @ mean)


def test_what_revenue_would_have_been():
    """Abduction, action, prediction: the noise of the revenue that was seen stays."""
    with MultiWorldCounterfactual(first_available_dim=-2), poutine.trace() as record:
        delta = split(torch.tensor(0.0), (torch.tensor(1.5),), name="setting")
        with plate(), condition(data={"revenue": torch.tensor(75.0)}):
            pm.macro_do(observed_shop, {SALES: pm.Shift(delta)})()
        factual, other = across(record.trace, ["revenue", "x1", "x2"])
    close(factual["revenue"], 75.0)
    close(other["revenue"], 75.0 + 1.5 * (0.8 + 3.0 * 0.2))
    exact = exactly(pm.Shift(1.5), 75.0)
    close(other["revenue"], exact.mean.item())
    assert exact.variance.item() < 1e-9


def test_a_macro_value_that_was_not_what_was_seen():
    """E[revenue had sales been 33 | revenue = 75], by weighting draws of the worlds."""
    draws, seen = 40_000, torch.tensor(75.0)
    with TwinWorldCounterfactual(first_available_dim=-2):
        with pyro.plate("draws", draws, dim=-1):
            actions = micro_values(
                pm.macro_do(observed_shop, {SALES: pm.Natural(33.0)})
            )
            with poutine.trace() as record, do(actions=actions):
                with condition(data={"revenue": seen}):
                    observed_shop()
        _, other = across(record.trace, ["revenue"])
    record.trace.compute_log_prob()
    likelihood = record.trace.nodes["revenue_noise_prior"]["log_prob"]
    weights = likelihood[0].softmax(-1)  # of the factual world
    found = weights @ other["revenue"]
    error = (weights**2 @ (other["revenue"] - found) ** 2).sqrt()
    season, x1, x2 = posterior(seen)
    noise = seen - (x1 + 3.0 * x2 + 2.0 * season)
    expected = 13.4 + 3.0 * 19.6 + 2.0 * season + noise
    close(exactly(pm.Natural(33.0), 75.0).mean, expected)
    assert error < 0.1
    assert (found - expected).abs() < 5 * error


@pytest.mark.parametrize("counterfactual", COUNTERFACTUAL)
@pytest.mark.parametrize(
    "site, message",
    [
        ("x1", "micro site 'x1' is set by macro_do, and a handler outside"),
        ("sales", "the macro value 'sales' is set by macro_do"),
        ("sales__micro", "the micro state has macro value"),
    ],
)
def test_two_interventions_on_one_micro_state_are_refused(
    counterfactual, site, message
):
    with counterfactual(first_available_dim=-2), do(actions={site: torch.tensor(5.0)}):
        with pytest.raises(pm.PyroMacroError, match=message):
            pm.macro_do(shop, {SALES: pm.Natural(33.0)})()


def test_worlds_inside_of_the_model_are_refused():
    """There the program that macro_do reads ahead has no plate for the worlds."""
    inside = do(shop, {"season": torch.tensor(5.0)})
    with MultiWorldCounterfactual(first_available_dim=-2):
        with pytest.raises(pm.NotAMicroState, match="no plate of size 2 at dim -2"):
            pm.macro_do(inside, {SALES: pm.Natural(33.0)})()


@pytest.mark.parametrize("counterfactual", COUNTERFACTUAL)
def test_an_intervention_inside_on_a_micro_site_is_refused(counterfactual):
    """ChiRho changes the value after all other handlers have looked at it."""
    inside = do(shop, {"x1": torch.tensor(5.0)})
    with counterfactual(first_available_dim=-2):
        with pytest.raises(pm.PyroMacroError, match="'x1' is set.* a handler inside"):
            pm.macro_do(inside, {SALES: pm.Natural(33.0)})()
        with pytest.raises(pm.PyroMacroError, match="put aggregate inside"):
            pm.aggregate(inside, SALES)()
        do(pm.aggregate(shop, SALES), {"x1": torch.tensor(5.0)})()
