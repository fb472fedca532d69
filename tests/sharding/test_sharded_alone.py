# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Sharded plates on one process, beside closed forms and plain plates."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from sharded_models import (
    CASES,
    LOAD,
    MEAN,
    PRICE,
    SALES,
    SCALE,
    SIZE,
    TABLE,
    amount,
    independent,
    pieces,
    plain,
    sharded,
)

import pyro_macro as pm
from pyro_macro.sharding.shards import Shards


def traced(model, *args):
    trace = poutine.trace(model).get_trace(*args)
    trace.compute_log_prob()
    return trace


def conditional(case, value):
    """``P(X | w.X = value)``, from full matrices."""
    crossed = case.covariance @ case.weights
    total = case.weights @ crossed
    gain = crossed / total
    mean = case.loc + gain * (value - case.weights @ case.loc)
    return mean, case.covariance - torch.outer(gain, crossed), gain


@pytest.mark.parametrize("name", CASES)
def test_natural_is_the_conditional_law(name):
    case = CASES[name]
    value = amount(case)
    intervened = pm.macro_do(case.model, {case.macro: pm.Natural(value)})
    trace = traced(intervened, sharded)
    law = trace.nodes["sales__micro"]["fn"]
    mean, covariance, _ = conditional(case, value)
    torch.testing.assert_close(law.mean, mean)
    torch.testing.assert_close(law.variance, covariance.diagonal())
    x = trace.nodes["sales__micro"]["value"]
    torch.testing.assert_close(case.weights @ x, value)
    # The density of all elements but the last one, the others free
    free = dist.MultivariateNormal(mean[:-1], covariance[:-1, :-1])
    density = trace.nodes["sales__micro"]["log_prob_sum"]
    torch.testing.assert_close(density, free.log_prob(x[:-1]))
    torch.testing.assert_close(law.log_total, normal_total(case).log_prob(value))


def normal_total(case):
    variance = case.weights @ case.covariance @ case.weights
    return dist.Normal(case.weights @ case.loc, variance.sqrt())


@pytest.mark.parametrize("name", CASES)
def test_natural_draws_have_the_conditional_covariance(name):
    case, count = CASES[name], 20_000
    value = amount(case)
    intervened = pm.macro_do(case.model, {case.macro: pm.Natural(value)})
    with pyro.plate("draws", count, dim=-4):
        x = traced(intervened, sharded).nodes["sales__micro"]["value"]
    x = x.reshape(count, -1)
    mean, covariance, _ = conditional(case, value)
    error = (covariance.diagonal() / count).sqrt()
    assert ((x.mean(0) - mean).abs() < 5 * error).all()
    spread = covariance.diagonal().sqrt()
    bound = 5 * torch.outer(spread, spread) * (2 / count) ** 0.5
    assert ((x.T.cov() - covariance).abs() < bound).all()
    torch.testing.assert_close(x @ case.weights, value.expand(count))


@pytest.mark.parametrize("name", CASES)
def test_a_shift_goes_along_the_natural_direction(name):
    case = CASES[name]
    intervened = pm.macro_do(case.model, {case.macro: pm.Shift(2.0)})
    nodes = traced(intervened, sharded).nodes
    *_, gain = conditional(case, 0.0)
    natural = nodes["sales__micro"]["value"]
    moved = torch.cat([nodes[n]["value"].flatten() for n in case.macro.micro]) - natural
    torch.testing.assert_close(moved, 2 * gain)
    torch.testing.assert_close(
        nodes["sales"]["value"], case.weights @ (natural + moved)
    )


@pytest.mark.parametrize("name", CASES)
def test_proportional_keeps_the_mix(name):
    case = CASES[name]
    value = amount(case)
    intervened = pm.macro_do(case.model, {case.macro: pm.Proportional(value)})
    nodes = traced(intervened, sharded).nodes
    natural = nodes["sales__micro"]["value"]
    x = torch.cat([nodes[n]["value"].flatten() for n in case.macro.micro])
    torch.testing.assert_close(x, natural * value / (case.weights @ natural))


@pytest.mark.parametrize("name", CASES)
def test_traces_have_the_densities_of_a_plain_plate(name):
    case = CASES[name]
    value, shares = amount(case), case.weights / case.weights.square().sum()
    for realization in (
        pm.Natural(value),
        pm.Proportional(value),
        pm.Shift(0.5),
        pm.Allocate(value, shares),
    ):
        intervened = pm.macro_do(case.model, {case.macro: realization})
        trace = traced(intervened, sharded)
        beside = traced(poutine.replay(intervened, trace), plain)
        assert trace.nodes.keys() == beside.nodes.keys()
        for name, node in trace.nodes.items():
            if node["type"] == "sample":
                other = beside.nodes[name]
                torch.testing.assert_close(node["value"], other["value"])
                for which in ("log_prob_sum", "unscaled_log_prob"):
                    torch.testing.assert_close(node[which], other[which])


def test_draws_follow_the_law_of_their_site():
    """Means and variances of all elements, to 5 standard errors."""
    count = 20_000
    with pyro.plate("draws", count, dim=-3):
        nodes = traced(pieces, sharded).nodes
    laws = traced(pieces, plain).nodes
    for name in ("normal", "poisson", "gamma", "beta", "bernoulli", "lognormal"):
        draws = nodes[name]["value"].squeeze(1)
        law = laws[name]["fn"]
        error = (law.variance / count).sqrt()
        assert ((draws.mean(0) - law.mean).abs() < 5 * error).all(), name
        assert ((draws.var(0) / law.variance - 1).abs() < 0.4).all(), name
    shares = nodes["categorical"]["value"].squeeze(1)
    probs = laws["categorical"]["fn"].probs
    for k in range(3):
        error = (probs[:, k] * (1 - probs[:, k]) / count).sqrt()
        assert (((shares == k).double().mean(0) - probs[:, k]).abs() < 5 * error).all()


def test_draws_of_slots_and_sites_are_independent():
    count = 20_000

    def model():
        with sharded():
            for name in ("a", "b"):
                pyro.sample(name, dist.Normal(0.0, 1.0))
                pyro.sample(f"{name}_count", dist.Poisson(4.0))

    with pyro.plate("draws", count, dim=-2):
        nodes = traced(model).nodes
    names = ("a", "b", "a_count", "b_count")
    rows = torch.cat([nodes[name]["value"].mT for name in names])
    correlation = rows.corrcoef() - torch.eye(len(rows))
    assert (correlation.abs() < 5 * count**-0.5).all()


class OneOf:
    """A stand-in for one of several ranks."""

    def __init__(self, rank, count):
        self.rank, self.count = rank, count


@pytest.mark.parametrize("size", [7, 128, 1000, 2_100_000])
@pytest.mark.parametrize("count", [2, 3, 7])
def test_noise_is_the_same_however_slots_are_split(size, count):
    like, lead = torch.empty(0), () if size > 1000 else (3,)

    def noise(rank, of):
        shards = Shards("products", size, OneOf(rank, of))
        pyro.set_rng_seed(1)
        shape = torch.Size((*lead, shards.here))
        return shards, shards.normal(shape, len(lead), like)

    _, whole = noise(0, 1)
    start = 0
    for rank in range(count):
        shards, part = noise(rank, count)
        assert shards.start == start and shards.here > 0
        assert abs(shards.here - size / count) <= max(2, 0.02 * size)
        assert torch.equal(part, whole[..., shards.start : shards.stop])
        start = shards.stop
    assert start == size


def test_blocks_have_seeds_of_their_own():
    shards = Shards("products", 10**8, OneOf(0, 1))
    for _ in range(3):
        seeds = [seed % 2**32 for seed in shards.seeds()]
        assert len(set(seeds)) == len(seeds) == len(shards.blocks)


def test_a_draw_takes_one_number_from_the_random_state():
    def model():
        with sharded() as mine:
            pyro.sample("x", dist.Normal(MEAN[mine], 1.0))
            pyro.sample("n", dist.Poisson(MEAN[mine]))
        return torch.rand(())

    after = model()
    pyro.set_rng_seed(0)
    torch.randint(2**62, ()), torch.randint(2**62, ())
    assert after == torch.rand(())


def test_handlers_find_what_they_find_in_a_plain_plate():
    micro = torch.arange(SIZE).double()
    for model in (
        poutine.condition(independent, {"x": micro}),
        poutine.do(independent, {"x": micro}),
        poutine.scale(poutine.condition(independent, {"x": micro}), 3.0),
        poutine.mask(poutine.condition(independent, {"x": micro}), micro > 4),
    ):
        trace = traced(model, sharded)
        beside = traced(poutine.replay(model, trace), plain)
        for name in ("x", "y"):
            one, other = trace.nodes[name], beside.nodes[name]
            torch.testing.assert_close(one["value"], other["value"])
            torch.testing.assert_close(one["log_prob_sum"], other["log_prob_sum"])


def test_reparametrized_sites_are_drawn_block_by_block():
    config = {"x": pyro.infer.reparam.LocScaleReparam(0.0)}
    nodes = traced(poutine.reparam(independent, config), sharded).nodes
    noise = nodes["x_decentered"]["value"]
    torch.testing.assert_close(nodes["x"]["value"], MEAN + SCALE * noise)
    pyro.set_rng_seed(0)
    assert torch.equal(noise, sharded().shards.normal(noise.shape, 0, noise))


def test_enumerated_sites_stay_enumerated():
    def model(plate):
        with plate() as mine:
            z = pyro.sample("z", dist.Bernoulli(MEAN[mine] - 1))
            pyro.sample("y", dist.Normal(z, SCALE[mine]), obs=PRICE[mine])

    def guide(plate):
        pass

    elbo = pyro.infer.TraceEnum_ELBO(max_plate_nesting=1)
    enumerated = pyro.infer.config_enumerate(model)
    torch.testing.assert_close(
        elbo.loss(enumerated, guide, sharded), elbo.loss(enumerated, guide, plain)
    )


def test_aggregate_and_sums_are_over_the_plate():
    def model():
        products = sharded()
        with products as mine:
            x = pyro.sample("x", dist.Normal(MEAN[mine], SCALE[mine]))
        kept = products.sum(x, keepdim=True)
        return x, products.sum(PRICE[mine] * x), kept

    trace = traced(pm.aggregate(model, [SALES]))
    x, revenue, kept = trace.nodes["_RETURN"]["value"]
    torch.testing.assert_close(revenue, PRICE @ x)
    torch.testing.assert_close(trace.nodes["sales"]["value"], x.sum())
    torch.testing.assert_close(kept, x.sum().reshape(1))


def test_parameters_and_data_of_the_plate_are_those_of_the_rank():
    def model(data):
        with sharded():
            loc = pyro.param("loc", lambda: 2 * MEAN, event_dim=0)
            y = pyro.subsample(data, event_dim=0)
            pyro.sample("y", dist.Normal(loc, 1.0), obs=y)

    nodes = traced(model, PRICE).nodes
    torch.testing.assert_close(nodes["y"]["fn"].mean, 2 * MEAN)
    torch.testing.assert_close(nodes["y"]["value"], PRICE)


def test_each_slot_may_have_a_total_of_its_own():
    """The plate stays, the total is over the vector in each slot."""
    packs = pm.MacroVariable("packs", micro="x")
    vectors = CASES["vectors"]
    values = vectors.loc.reshape(SIZE, 3).sum(-1) + 1
    intervened = pm.macro_do(vectors.model, {packs: pm.Natural(values)})
    trace = traced(intervened, sharded)
    beside = traced(poutine.replay(intervened, trace), plain)
    one, other = (t.nodes["packs__micro"] for t in (trace, beside))
    torch.testing.assert_close(one["value"].sum(-1), values)
    torch.testing.assert_close(one["log_prob"], other["log_prob"])
    pyro.set_rng_seed(0)
    shards, law = sharded().shards, other["fn"]
    shards.normal(torch.Size([SIZE]), 0, values)  # of z, which comes before
    noise = shards.normal(one["value"].shape, 0, values)
    torch.testing.assert_close(
        one["value"], law._onto(law.loc + law.covariance.colour(noise))
    )


def test_as_a_context_manager():
    with pm.macro_do(interventions={SALES: pm.Natural(20.0)}):
        trace = traced(independent, sharded)
    law = trace.nodes["sales__micro"]["fn"]
    mean, *_ = conditional(CASES["independent"], 20.0)
    torch.testing.assert_close(law.mean, mean)
    torch.testing.assert_close(trace.nodes["x"]["value"].sum(), torch.tensor(20.0))


def test_a_value_that_another_handler_sets_is_checked():
    intervened = pm.macro_do(independent, {SALES: pm.Natural(20.0)})
    off = {"sales__micro": torch.ones(SIZE)}
    with pytest.raises(pm.OffFibre, match="has macro value 11"):
        poutine.condition(intervened, off)(sharded)
    on = {"sales__micro": torch.ones(SIZE) * 20 / SIZE}
    poutine.condition(intervened, on)(sharded)


def test_nested_interventions_hold_the_first():
    """What the first one set is held for the second: its law has no derivative here."""

    def model():
        products = sharded()
        with products as mine:
            x = pyro.sample("x", dist.Normal(MEAN[mine], SCALE[mine]))
            pyro.sample("y", dist.Normal(PRICE[mine] * x, 1.0))

    first = pm.macro_do(model, {SALES: pm.Natural(20.0)})
    revenue = pm.MacroVariable("revenue", micro="y", over="products")
    with pytest.raises(pm.UnsupportedLaw, match="Hold 'sales__micro' at its value"):
        pm.macro_do(first, {revenue: pm.Natural(60.0)})()
    held = pm.Natural(60.0, given=["sales__micro"])
    nodes = traced(pm.macro_do(first, {revenue: held})).nodes
    x, law = nodes["x"]["value"], nodes["revenue__micro"]["fn"]
    mean = PRICE * x + (60.0 - PRICE @ x) / SIZE
    torch.testing.assert_close(law.mean, mean)


def test_float32_models_meet_their_total_and_have_precise_densities():
    size, value = 300_001, 450_000.0
    loc, scale = 1 + torch.rand(2, size)

    def model(dtype, plate):
        with plate() as mine:
            at = slice(None) if mine is None else mine
            pyro.sample("x", dist.Normal(loc[at].to(dtype), scale[at].to(dtype)))

    def whole():
        return pm.sharded_plate("products", size)

    intervened = pm.macro_do(model, {SALES: pm.Natural(value)})
    node = traced(intervened, torch.float32, whole).nodes["sales__micro"]
    assert node["value"].dtype == torch.float32
    assert abs(node["value"].double().sum() - value) < 1e-7 * value
    law = traced(intervened, torch.float64, whole).nodes["sales__micro"]["fn"]
    exact = law._log_density(node["value"].double())
    torch.testing.assert_close(node["log_prob_sum"].double(), exact, rtol=1e-6, atol=0)


def natural_of(theta, plate, draw=None):
    """A draw of a natural law with parameters, and its density."""

    def model():
        with plate() as mine:
            z = pyro.sample("z", dist.Normal(theta[0], 1.0))
            loc = theta[0] * MEAN[mine] + z
            pyro.sample("x", dist.Normal(loc, theta[1] * SCALE[mine]))

    intervened = pm.macro_do(model, {SALES: pm.Natural(10 * theta[1])})
    if draw is not None:
        intervened = poutine.condition(intervened, {"sales__micro": draw})
    trace = traced(intervened)
    return trace.nodes["x"]["value"], trace.nodes["sales__micro"]["log_prob_sum"]


def test_gradients_of_densities_are_those_of_a_plain_plate():
    theta = torch.tensor([0.3, 0.7], requires_grad=True)
    draw = torch.full((SIZE,), 7.0 / SIZE) + torch.linspace(-1, 1, SIZE)
    _, density = natural_of(theta, sharded, draw)
    _, beside = natural_of(theta, plain, draw)
    torch.testing.assert_close(density, beside)
    (found,) = torch.autograd.grad(density, theta)
    (expected,) = torch.autograd.grad(beside, theta)
    torch.testing.assert_close(found, expected)


def test_gradients_of_draws_are_those_of_the_formula():
    theta = torch.tensor([0.3, 0.7], requires_grad=True)
    x, _ = natural_of(theta, sharded)
    (found,) = torch.autograd.grad((PRICE * x).sum(), theta)
    loc = theta[0] * MEAN + theta[0]
    variance = (theta[1] * SCALE) ** 2 + 1
    pyro.set_rng_seed(0)
    shards = sharded().shards
    shards.normal(x.shape, 0, x)  # of z, which comes before
    free = loc + variance.sqrt() * shards.normal(x.shape, 0, x)
    by_hand = free + variance / variance.sum() * (10 * theta[1] - free.sum())
    torch.testing.assert_close(x, by_hand)
    (expected,) = torch.autograd.grad((PRICE * by_hand).sum(), theta)
    torch.testing.assert_close(found, expected)


def test_observations_that_are_forgotten_are_drawn_block_by_block():
    def model(plate):
        with plate() as mine:
            pyro.sample("y", dist.Normal(MEAN[mine], SCALE[mine]), obs=PRICE[mine])

    nodes = traced(poutine.uncondition(model), sharded).nodes
    pyro.set_rng_seed(0)
    noise = sharded().shards.normal(torch.Size([SIZE]), 0, MEAN)
    torch.testing.assert_close(nodes["y"]["value"], MEAN + SCALE * noise)


def test_plates_that_stay_may_be_coupled():
    """Products split over ranks, stores that stay, a shock that both depend on."""

    def model(plate):
        shock = pyro.sample("shock", dist.Normal(0.0, 1.0))
        with plate(-2) as mine, pyro.plate("stores", 3, dim=-1):
            loc = TABLE[mine] + shock * LOAD[mine].unsqueeze(-1)
            pyro.sample("x", dist.Normal(loc, SCALE[mine].unsqueeze(-1)))

    totals = TABLE.sum(0) + torch.tensor([1.0, 0.0, -2.0])
    intervened = pm.macro_do(model, {SALES: pm.Natural(totals)})
    trace = traced(intervened, sharded)
    beside = traced(poutine.replay(intervened, trace), plain)
    one, other = (t.nodes["sales__micro"] for t in (trace, beside))
    torch.testing.assert_close(trace.nodes["x"]["value"].sum(0), totals)
    torch.testing.assert_close(one["fn"].mean, other["fn"].mean)
    torch.testing.assert_close(one["fn"].variance, other["fn"].variance)
    torch.testing.assert_close(one["log_prob_sum"], other["log_prob_sum"])


def test_shifts_of_sites_of_any_kind_go_along_their_variances():
    def model(plate):
        with plate() as mine:
            pyro.sample("x", dist.Gamma(MEAN[mine], SCALE[mine]))

    nodes = traced(pm.macro_do(model, {SALES: pm.Shift(1.0)}), sharded).nodes
    variance = MEAN / SCALE**2
    moved = nodes["x"]["value"] - nodes["sales__micro"]["value"]
    torch.testing.assert_close(moved, variance / variance.sum())
