# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Natural realizations of programs that nobody tuned for, against dense matrices."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.autograd.functional import jacobian

import pyro_macro as pm

REGIONS, STORES = 2, 3


def hierarchy():
    """A global confounder, two plates, an MVN block, scales from 0.01 to 50."""
    market = pyro.sample("market", dist.Normal(1.0, 2.0))
    taste = pyro.sample(
        "taste",
        dist.MultivariateNormal(
            torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 0.6], [0.6, 1.0]])
        ),
    )
    regions = pyro.plate("regions", REGIONS, dim=-2)
    stores = pyro.plate("stores", STORES, dim=-1)
    with regions:
        region = pyro.sample("region", dist.Normal(0.3 * market, 0.7))
    with stores:
        store = pyro.sample("store", dist.Normal(taste[..., 0], 0.2))
    with regions, stores:
        local = pyro.sample("local", dist.Normal(region - store, 50.0))
        level = pyro.deterministic("level", 0.1 * local + market, event_dim=0)
        loc = torch.stack([level, 2 * store + level, region + 0 * store], -1)
        block = torch.tensor([[1.0, 0.2, 0.1], [0.2, 0.5, 0.0], [0.1, 0.0, 9.0]])
        pyro.sample("a", dist.MultivariateNormal(loc, block))
        pyro.sample(
            "b",
            dist.LowRankMultivariateNormal(
                loc[..., :2], torch.tensor([[1.0], [2.0]]), torch.tensor([1e-4, 4.0])
            ),
        )
        pyro.sample("c", dist.Normal(3 * level - taste[..., 1], 0.01))


def by_hand(noise):
    """The same program written out: sites ``a``, ``b``, ``c`` from one noise vector."""
    take = iter(noise.split([1, 2, 2, 3, 6, 18, 6, 12, 6]))
    market = 1 + 2 * next(take)[0]
    taste = torch.tensor([1.0, -1.0]) + torch.linalg.cholesky(
        torch.tensor([[2.0, 0.6], [0.6, 1.0]])
    ) @ next(take)
    region = 0.3 * market + 0.7 * next(take).reshape(2, 1)
    store = taste[0] + 0.2 * next(take)
    local = region - store + 50 * next(take).reshape(2, 3)
    level = 0.1 * local + market
    loc = torch.stack([level, 2 * store + level, region + 0 * store], -1)
    block = torch.tensor([[1.0, 0.2, 0.1], [0.2, 0.5, 0.0], [0.1, 0.0, 9.0]])
    a = loc + next(take).reshape(2, 3, 3) @ torch.linalg.cholesky(block).mT
    shared = next(take).reshape(2, 3, 1) * torch.tensor([1.0, 2.0])
    own = next(take).reshape(2, 3, 2) * torch.tensor([1e-4, 4.0]).sqrt()
    b = loc[..., :2] + shared + own
    c = 3 * level - taste[1] + 0.01 * next(take).reshape(2, 3)
    return {"a": a, "b": b, "c": c.unsqueeze(-1)}


def dense(names, along):
    """Mean and covariance of the stacked sites; ``along``: how to order elements."""

    def stacked(noise):
        values = by_hand(noise)
        return torch.cat([along(values[name]) for name in names])

    zero = torch.zeros(56)
    linear = jacobian(stacked, zero)
    return stacked(zero), linear @ linear.mT


def condition(mean, covariance, rows, value):
    crossed = covariance @ rows.mT
    gain = torch.linalg.solve(rows @ crossed, crossed.mT).mT
    return mean + gain @ (value - rows @ mean), covariance - gain @ crossed.mT


def check(law, mean, covariance):
    scale = covariance.diagonal().clamp(min=1e-12).sqrt()
    torch.testing.assert_close(law.mean.reshape(-1), mean, rtol=1e-8, atol=1e-8)
    found = law.covariance_matrix.reshape(covariance.shape)
    error = (found - covariance) / (scale[:, None] * scale)
    assert error.abs().max() < 1e-7
    torch.testing.assert_close(
        law.variance.reshape(-1), covariance.diagonal(), rtol=1e-6, atol=1e-9
    )


def log_density(x, mean, covariance, rows, value):
    """log p(x | rows x = value) in the coordinates without the last ones, densely."""
    joint = dist.MultivariateNormal(mean, covariance).log_prob(x)
    total = dist.MultivariateNormal(rows @ mean, rows @ covariance @ rows.mT).log_prob(
        value
    )
    return joint - total


def law_of(model, name):
    return pyro.poutine.trace(model).get_trace().nodes[f"{name}__micro"]["fn"]


@pytest.mark.parametrize(
    "names", [["a"], ["b"], ["c"], ["a", "b"], ["c", "a"], ["b", "c"], ["a", "b", "c"]]
)
def test_over_both_plates(names):
    total = pm.MacroVariable("total", micro=names, over=["regions", "stores"])
    law = law_of(pm.macro_do(hierarchy, {total: pm.Natural(40.0)}), "total")
    prior = dense(names, lambda v: v.reshape(-1))
    rows, value = torch.ones(1, len(prior[0])), torch.tensor([40.0])
    check(law, *condition(*prior, rows, value))
    x = law.sample()
    torch.testing.assert_close(x.sum(), torch.tensor(40.0))
    torch.testing.assert_close(
        law.log_prob(x), log_density(x, *prior, rows, value), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("over", ["regions", "stores", None])
@pytest.mark.parametrize("names", [["a"], ["b", "c"]])
def test_a_plate_that_stays_is_coupled_by_what_is_global(names, over):
    """One total for each slot of the plates that stay, all known at once."""
    total = pm.MacroVariable("total", micro=names, over=over or ())
    staying = {"regions": (1, STORES), "stores": (REGIONS, 1), None: (REGIONS, STORES)}
    value = torch.linspace(-5.0, 9.0, math.prod(staying[over])).reshape(staying[over])
    law = law_of(pm.macro_do(hierarchy, {total: pm.Natural(value)}), "total")
    prior = dense(names, lambda v: v.reshape(-1))
    slots = torch.arange(REGIONS * STORES).reshape(REGIONS, STORES, 1)
    if over == "regions":
        slots = slots[:1].expand(REGIONS, -1, -1)
    elif over == "stores":
        slots = slots[:, :1].expand(-1, STORES, -1)
    sizes = {"a": 3, "b": 2, "c": 1}
    slot = torch.cat([slots.expand(-1, -1, sizes[name]).reshape(-1) for name in names])
    rows = (slot == slot.unique()[:, None]).to(torch.float64)
    check(law, *condition(*prior, rows, value.reshape(-1)))
    trace = pyro.poutine.trace(
        pm.macro_do(hierarchy, {total: pm.Natural(value)})
    ).get_trace()
    states = torch.cat([trace.nodes[n]["value"].reshape(-1) for n in names])
    torch.testing.assert_close(rows @ states, value.reshape(-1), rtol=1e-9, atol=1e-9)
    x = trace.nodes["total__micro"]["value"].reshape(-1)
    found = law.log_prob(x.reshape(law.event_shape))
    torch.testing.assert_close(
        found, log_density(x, *prior, rows, value.reshape(-1)), rtol=1e-6, atol=1e-6
    )


def test_given_a_root_a_descendant_and_a_sibling():
    """P(X | total, market, region, local at one place): proper conditioning."""

    def model():
        market = pyro.sample("market", dist.Normal(1.0, 2.0))
        region = pyro.sample("region", dist.Normal(0.3 * market, 0.7))
        sibling = pyro.sample("sibling", dist.Normal(2 * region - market, 0.5))
        pyro.sample("x1", dist.Normal(market + region, 1.0))
        pyro.sample("x2", dist.Normal(region - market, 2.0))
        return sibling

    def by_noise(e):
        market = 1 + 2 * e[0]
        region = 0.3 * market + 0.7 * e[1]
        sibling = 2 * region - market + 0.5 * e[2]
        x1, x2 = market + region + e[3], region - market + 2 * e[4]
        return torch.stack([x1, x2, market, region, sibling])

    zero = torch.zeros(5)
    linear = jacobian(by_noise, zero)
    prior = by_noise(zero), linear @ linear.mT
    places = {"market": 2, "region": 3, "sibling": 4}
    sales = pm.MacroVariable("sales", ["x1", "x2"])
    held = {"market": -0.4, "region": 0.9, "sibling": 2.2}
    for given in (["market"], ["region"], ["sibling"], ["market", "sibling"]):
        intervened = pyro.poutine.condition(
            pm.macro_do(model, {sales: pm.Natural(3.0, given=given)}),
            {name: torch.tensor(held[name]) for name in given},
        )
        rows = torch.zeros(1 + len(given), 5)
        rows[0, :2] = 1
        for i, name in enumerate(given, start=1):
            rows[i, places[name]] = 1
        value = torch.tensor([3.0] + [held[name] for name in given])
        mean, covariance = condition(*prior, rows, value)
        check(law_of(intervened, "sales"), mean[:2], covariance[:2, :2])


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_a_proxy_is_evidence_if_it_is_given(late, inside):
    """Wherever it stands in the program, and whether it is observed or drawn."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if not late:
            pyro.sample("proxy", dist.Normal(z, 0.5))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(2 * z, 1.0))
        if late:
            pyro.sample("proxy", dist.Normal(z, 0.5))

    def with_proxy(program):
        return pyro.poutine.condition(program, {"proxy": torch.tensor(1.5)})

    sales = pm.MacroVariable("sales", ["x1", "x2"])
    square, line = torch.tensor([[1.0, 2.0], [2.0, 4.0]]), torch.tensor([1.0, 2.0])
    # z ~ N(0, 1) without, z | proxy ~ N(1.2, 0.2) with the proxy
    for given, mean, variance in [((), 0.0, 1.0), ("proxy", 1.2, 0.2)]:
        interventions = {sales: pm.Natural(4.0, given=given)}
        if inside:
            intervened = pm.macro_do(with_proxy(model), interventions)
        else:
            intervened = with_proxy(pm.macro_do(model, interventions))
        prior = mean * line, torch.eye(2) + variance * square
        expected = condition(*prior, torch.ones(1, 2), torch.tensor([4.0]))
        check(law_of(intervened, "sales"), *expected)


def test_an_observed_parent_is_known():
    """u -> z -> X and u -> X with z observed: what z tells of u counts."""

    def model():
        u = pyro.sample("u", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(u, 0.5), obs=torch.tensor(1.5))
        pyro.sample("x1", dist.Normal(u + z, 1.0))
        pyro.sample("x2", dist.Normal(2 * u, 1.0))

    sales = pm.MacroVariable("sales", ["x1", "x2"])
    law = law_of(pm.macro_do(model, {sales: pm.Natural(4.0)}), "sales")
    covariance = torch.eye(2) + 0.2 * torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    mean = 1.2 * torch.tensor([1.0, 2.0]) + torch.tensor([1.5, 0.0])
    check(law, *condition(mean, covariance, torch.ones(1, 2), torch.tensor([4.0])))
    for hidden in (
        pyro.poutine.mask(model, mask=False),
        pyro.poutine.scale(model, scale=3.0),
    ):
        with pytest.raises(pm.UnsupportedLaw, match="'z'.*masked out or weighted"):
            pm.macro_do(hidden, {sales: pm.Natural(4.0)})()
        pm.macro_do(hidden, {sales: pm.Natural(4.0, given=["u"])})()


def test_a_given_deterministic_site():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        d = pyro.deterministic("d", z + w)
        pyro.sample("x1", dist.Normal(d, 1.0))
        pyro.sample("x2", dist.Normal(z, 1.0))

    sales = pm.MacroVariable("sales", ["x1", "x2"])
    trace = pyro.poutine.trace(
        pm.macro_do(model, {sales: pm.Natural(4.0, given="d")})
    ).get_trace()
    d = trace.nodes["d"]["value"]
    # z | d ~ N(d / 2, 1 / 2)
    mean, covariance = torch.stack([d, d / 2]), torch.diag(torch.tensor([1.0, 1.5]))
    expected = condition(mean, covariance, torch.ones(1, 2), torch.tensor([4.0]))
    check(trace.nodes["sales__micro"]["fn"], *expected)


def test_slots_that_act_on_one_another_outside_of_their_plate():
    """Centred across the plate: the slots' laws are coupled, and found to be."""

    def model():
        with pyro.plate("p", 3):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        centred = z - z.mean(-1, keepdim=True)
        with pyro.plate("p", 3):
            pyro.sample("x1", dist.Normal(centred, 1.0))
            pyro.sample("x2", dist.Normal(0.0, 1.0))

    value = torch.tensor([30.0, 33.0, 36.0])
    sales = pm.MacroVariable("sales", ["x1", "x2"])
    law = law_of(pm.macro_do(model, {sales: pm.Natural(value)}), "sales")
    covariance = torch.eye(6)
    covariance[:3, :3] += torch.eye(3) - 1 / 3
    rows = torch.cat([torch.eye(3), torch.eye(3)], 1)
    check(law, *condition(torch.zeros(6), covariance, rows, value))
    torch.testing.assert_close(law.mean[:3], torch.tensor([14.5, 16.5, 18.5]))


def test_a_shared_parent_without_a_plate_is_refused():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x1", dist.Normal(z.expand(3), 1.0))
        pyro.sample("x2", dist.Normal(torch.zeros(3), 1.0))

    sales = pm.MacroVariable("sales", ["x1", "x2"])
    with pytest.raises(pm.NotAMicroState, match="no plate of size 3 at dim -1"):
        pm.macro_do(model, {sales: pm.Natural(1.0)})()


def test_a_plain_delta_site_upstream():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        d = pyro.sample("d", dist.Delta(2 * z))
        pyro.sample("x1", dist.Normal(d, 1.0))
        pyro.sample("x2", dist.Normal(0.0, 1.0))

    sales = pm.MacroVariable("sales", ["x1", "x2"])
    trace = pyro.poutine.trace(pm.macro_do(model, {sales: pm.Natural(4.0)})).get_trace()
    assert trace.nodes["d"]["value"] == 2 * trace.nodes["z"]["value"]
    law = trace.nodes["sales__micro"]["fn"]
    covariance = torch.diag(torch.tensor([5.0, 1.0]))
    expected = condition(
        torch.zeros(2), covariance, torch.ones(1, 2), torch.tensor([4.0])
    )
    check(law, *expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda law: law.to_event(1),
        lambda law: law.mask(True).to_event(1),
        lambda law: dist.TransformedDistribution(
            law, [dist.transforms.AffineTransform(0.0, 1.0)]
        ).to_event(1),
    ],
)
def test_wrapped_gaussians(wrap):
    matrix = torch.tensor([[2.0, 0.5], [0.5, 1.0]])

    def model():
        pyro.sample("x", wrap(dist.MultivariateNormal(torch.ones(3, 2), matrix)))

    total = pm.MacroVariable("total", "x")
    law = law_of(pm.macro_do(model, {total: pm.Natural(4.0)}), "total")
    prior = torch.ones(6), torch.block_diag(matrix, matrix, matrix)
    check(law, *condition(*prior, torch.ones(1, 6), torch.tensor([4.0])))


@pytest.mark.parametrize("seed", range(3))
def test_several_rows_with_zeros(seed):
    """Linear with an m x K matrix, its last weights zero in places."""
    torch.manual_seed(seed)
    weights = torch.tensor([[1.0, 2.0, 0.0, 0.0, 0.0], [0.0, 1.0, 1.0, -1.0, 0.0]])
    factor = torch.randn(5, 5)
    covariance = factor @ factor.mT + torch.eye(5)

    def model():
        pyro.sample("x", dist.MultivariateNormal(torch.ones(5), covariance))

    macro = pm.MacroVariable("m", "x", aggregation=pm.Linear(weights))
    value = torch.tensor([1.0, -2.0])
    law = law_of(pm.macro_do(model, {macro: pm.Natural(value)}), "m")
    check(law, *condition(torch.ones(5), covariance, weights, value))
    x = law.sample()
    torch.testing.assert_close(weights @ x, value)
    # Free: all elements but the last two that can be solved for, 1 and 3
    assert law.pivots.tolist() == [1, 3]
    free = torch.tensor([0, 2, 4])
    mean, within = condition(torch.ones(5), covariance, weights, value)
    expected = dist.MultivariateNormal(mean[free], within[free][:, free])
    torch.testing.assert_close(law.log_prob(x), expected.log_prob(x[free]))


def test_draws_of_the_joint_law():
    """20,000 draws: the covariance within 6 standard errors, elementwise."""
    total = pm.MacroVariable("total", micro=["a", "c"], over="stores")
    value = torch.tensor([[3.0], [-1.0]])
    law = law_of(pm.macro_do(hierarchy, {total: pm.Natural(value)}), "total")
    n = 20_000
    draws = law.sample((n,)).reshape(n, -1)
    expected = law.covariance_matrix.reshape(24, 24)
    scale = expected.diagonal().sqrt()
    error = (torch.cov(draws.mT) - expected) / (scale[:, None] * scale)
    assert error.abs().max() < 6 * (2 / n) ** 0.5
    shift = (draws.mean(0) - law.mean.reshape(-1)) / scale
    assert shift.abs().max() < 5 / n**0.5


@pytest.mark.parametrize(
    "law",
    [
        lambda z: dist.Poisson(z + 4),
        lambda z: dist.Gamma(z + 4, 1.0),
        lambda z: dist.Categorical(torch.stack([0.5 + z / 10, 0.5 - z / 10])),
        lambda z: dist.Binomial(10, 0.5 + z / 10),
    ],
)
def test_sites_beside_the_micro_state_need_not_bear_large_noise(law):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 0.9))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("beside", law(z))
        pyro.sample("x2", dist.Normal(2 * z, 1.0))

    sales = pm.MacroVariable("sales", ["x1", "x2"])
    with pyro.validation_enabled(False):
        law = law_of(pm.macro_do(model, {sales: pm.Natural(4.0)}), "sales")
    line = torch.tensor([1.0, 2.0])
    prior = torch.zeros(2), torch.eye(2) + 0.81 * torch.outer(line, line)
    check(law, *condition(*prior, torch.ones(1, 2), torch.tensor([4.0])))
