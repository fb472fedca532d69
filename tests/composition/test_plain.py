# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Plain calls and ``trace``: what a run returns, and what its trace holds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    assert_only_added,
    assert_same_gradients,
    assert_same_program,
    is_deterministic,
    market,
    market_by_hand,
    market_by_hand_given_z,
    sales_total,
    shop,
    shop_by_hand,
    stochastic,
)


def parts():
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    return x1, x2


def test_plain_call_returns_what_the_model_returns(do):
    model = do(parts, NATURAL)
    first, second = model(), model()
    assert first[0] != second[0], "each call draws afresh"
    for x1, x2 in (first, second):
        assert type(x1) is torch.Tensor
        torch.testing.assert_close(x1 + x2, torch.tensor(33.0))


def test_plain_call_of_aggregate_returns_what_the_model_returns(add):
    pyro.set_rng_seed(1)
    expected = parts()
    pyro.set_rng_seed(1)
    assert add(parts, [SALES])() == expected


def test_plain_call_passes_arguments(do):
    def model(*args, scale=1.0):
        x1, x2 = parts()
        return scale * (x1 + x2) + sum(args)

    torch.testing.assert_close(
        do(model, NATURAL)(1.0, 2.0, scale=2.0), torch.tensor(69.0)
    )


def test_plain_call_draws_from_the_conditional_law(do):
    # Mean and variance over n draws: z statistics beyond 4 in 6 tests have a chance
    # of 4e-4
    n = 400
    model = do(parts, NATURAL)
    draws = torch.stack([model()[0] for _ in range(n)])
    assert abs(draws.mean() - 12.4) < 4 * (0.8 / n) ** 0.5
    assert abs(draws.var() - 0.8) < 4 * 0.8 * (2 / n) ** 0.5


def test_trace_holds_macro_value_latent_site_and_micro_sites(do):
    trace = poutine.trace(do(shop, NATURAL)).get_trace()
    nodes = stochastic(trace)
    assert set(nodes) == {"sales", "sales__micro", "x1", "x2", "w", "y"}
    assert trace.stochastic_nodes == ["sales__micro", "w", "y"]
    for name in ("sales", "x1", "x2"):
        assert is_deterministic(nodes[name])
        assert nodes[name]["is_observed"]
    torch.testing.assert_close(nodes["sales"]["value"], torch.tensor(33.0))
    micro = nodes["sales__micro"]["value"]
    torch.testing.assert_close(micro[0], nodes["x1"]["value"], rtol=0, atol=0)
    torch.testing.assert_close(micro[1], nodes["x2"]["value"], rtol=0, atol=0)
    torch.testing.assert_close(micro.sum(), torch.tensor(33.0))


def test_trace_has_the_density_of_the_program_by_hand(do):
    assert_same_program(do(shop, NATURAL), shop_by_hand)
    assert_same_program(do(shop, NATURAL), shop_by_hand, y=torch.tensor(70.0))


def test_trace_of_a_confounded_program_has_its_ancestors_integrated_out():
    assert_same_program(pm.macro_do(market, NATURAL), market_by_hand)


def test_trace_of_a_confounded_program_with_given_holds_the_cause(do):
    model = do(market, {SALES: pm.Natural(33.0, given=["z"])})
    assert_same_program(model, market_by_hand_given_z)


def test_context_refuses_a_cause_that_it_would_have_to_integrate_out():
    with pytest.raises(pm.UnsupportedLaw, match="given=.'z'."):
        with pm.macro_do(interventions=NATURAL):
            market()


def test_trace_of_residual_lets_one_part_take_up_the_rest(do):
    def absorb_x2():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.deterministic("x2", 33 - x1)
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + w, 0.5))

    def absorb_x1():
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        x1 = pyro.deterministic("x1", 33 - x2)
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + w, 0.5))

    for absorb, by_hand in (("x2", absorb_x2), ("x1", absorb_x1)):
        model = do(shop, {SALES: pm.Residual(33.0, absorb=absorb)})
        assert_same_program(model, by_hand)


def test_trace_of_allocate_has_no_latent_site(do):
    def by_hand():
        x1 = pyro.deterministic("x1", torch.tensor(24.75))
        x2 = pyro.deterministic("x2", torch.tensor(8.25))
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + w, 0.5))

    model = do(shop, {SALES: pm.Allocate(33.0, shares=[0.75, 0.25])})
    trace = assert_same_program(model, by_hand)
    assert "sales__micro" not in trace
    torch.testing.assert_close(trace.nodes["sales"]["value"], torch.tensor(33.0))


def test_trace_of_deterministic_micro_sites_that_are_set(do):
    revenue = pm.MacroVariable("revenue", micro=["r1", "r2"])

    def model():
        x1, x2 = parts()
        r1 = pyro.deterministic("r1", 2 * x1)
        r2 = pyro.deterministic("r2", 3 * x2)
        pyro.sample("y", dist.Normal(r1 - r2, 1.0))

    def by_hand():
        parts()
        pyro.deterministic("r1", torch.tensor(20.0))
        pyro.deterministic("r2", torch.tensor(60.0))
        pyro.sample("y", dist.Normal(torch.tensor(-40.0), 1.0))

    allocated = do(model, {revenue: pm.Allocate(80.0, [0.25, 0.75])})
    assert_same_program(allocated, by_hand, macros=("revenue",))


@pytest.mark.parametrize("kind", ["proportional", "shift"])
def test_trace_of_what_acts_on_the_natural_state_holds_the_natural_state(do, kind):
    realization, act = {
        "proportional": (pm.Proportional(33.0), lambda n: n * 33 / n.sum()),
        "shift": (pm.Shift(5.0), lambda n: n + 5 * torch.tensor([0.8, 0.2])),
    }[kind]

    def by_hand():
        loc, scale = torch.tensor([10.0, 20.0]), torch.tensor([2.0, 1.0])
        natural = pyro.sample("sales__micro", dist.Normal(loc, scale).to_event(1))
        x = act(natural)
        pyro.deterministic("x1", x[0])
        pyro.deterministic("x2", x[1])
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x[0] + 3 * x[1] + w, 0.5))

    assert_same_program(do(shop, {SALES: realization}), by_hand)


def test_trace_of_explicit_has_the_stated_density(do):
    def split(total):
        shares = dist.Dirichlet(torch.tensor([2.0, 5.0]))
        scale = dist.transforms.AffineTransform(0.0, total, event_dim=1)
        return dist.TransformedDistribution(shares, [scale])

    def by_hand():
        # As the density of the stated distribution, over both coordinates
        x = pyro.sample("sales__micro", split(torch.tensor(33.0)))
        pyro.deterministic("x1", x[0])
        pyro.deterministic("x2", x[1])
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x[0] + 3 * x[1] + w, 0.5))

    assert_same_program(do(shop, {SALES: pm.Explicit(33.0, split)}), by_hand)


def with_parameters():
    loc = pyro.param("loc", torch.tensor([10.0, 20.0]))
    scale = pyro.param(
        "scale", torch.tensor([2.0, 1.0]), constraint=constraints.positive
    )
    price = pyro.param("price", torch.tensor([1.0, 3.0]))
    x1 = pyro.sample("x1", dist.Normal(loc[0], scale[0]))
    x2 = pyro.sample("x2", dist.Normal(loc[1], scale[1]))
    pyro.sample("y", dist.Normal(price[0] * x1 + price[1] * x2, 0.5))


def with_parameters_by_hand():
    loc = pyro.param("loc", torch.tensor([10.0, 20.0]))
    scale = pyro.param(
        "scale", torch.tensor([2.0, 1.0]), constraint=constraints.positive
    )
    price = pyro.param("price", torch.tensor([1.0, 3.0]))
    v1, v2 = scale.square().unbind(-1)
    mean = loc[0] + v1 / (v1 + v2) * (33 - loc.sum())
    x1 = pyro.sample("x1", dist.Normal(mean, (v1 * v2 / (v1 + v2)).sqrt()))
    x2 = pyro.deterministic("x2", 33 - x1)
    pyro.sample("y", dist.Normal(price[0] * x1 + price[1] * x2, 0.5))


def test_trace_has_the_gradients_of_the_program_by_hand(do):
    assert_same_gradients(do(with_parameters, NATURAL), with_parameters_by_hand)


def test_draws_carry_the_gradient_of_their_law(do):
    # E[x1] = mean, and the draw is reparametrized: d x1 / d loc = (0.2, -0.8) exactly
    def model():
        with_parameters()
        return pyro.param("loc")

    trace = poutine.trace(do(model, NATURAL)).get_trace()
    loc = pyro.get_param_store()["loc"].unconstrained()
    (found,) = torch.autograd.grad(trace.nodes["x1"]["value"], loc)
    torch.testing.assert_close(found, torch.tensor([0.2, -0.8]))


def test_trace_of_aggregate_has_the_macro_value_and_nothing_else_new(add):
    assert_only_added(add(shop, [SALES]), shop, sales_total)
    assert_only_added(add(market, [SALES]), market, sales_total)


def test_trace_of_aggregate_adds_deterministic_sites_up(add):
    def model():
        x1, x2 = parts()
        pyro.deterministic("r1", 2 * x1)
        pyro.deterministic("r2", 3 * x2)

    revenue = pm.MacroVariable("revenue", micro=["r1", "r2"])

    def total(trace):
        x = {name: trace.nodes[name]["value"] for name in ("x1", "x2")}
        return {"sales": x["x1"] + x["x2"], "revenue": 2 * x["x1"] + 3 * x["x2"]}

    assert_only_added(add(model, [SALES, revenue]), model, total)


def test_aggregate_outside_macro_do_shows_the_value_that_was_set(do):
    # `sales` is in the trace already, so the same sum under another name
    seen = pm.MacroVariable("seen", micro=["x1", "x2"])
    trace = poutine.trace(pm.aggregate(do(shop, NATURAL), [seen])).get_trace()
    torch.testing.assert_close(trace.nodes["seen"]["value"], torch.tensor(33.0))


def test_aggregate_inside_macro_do_adds_up_what_propagates(do):
    revenue = pm.MacroVariable("revenue", micro=["r1", "r2"])

    def model():
        x1, x2 = parts()
        pyro.deterministic("r1", 2 * x1)
        pyro.deterministic("r2", 3 * x2)

    trace = poutine.trace(do(pm.aggregate(model, [revenue]), NATURAL)).get_trace()
    x1, x2 = (trace.nodes[name]["value"] for name in ("x1", "x2"))
    torch.testing.assert_close(trace.nodes["revenue"]["value"], 2 * x1 + 3 * x2)
