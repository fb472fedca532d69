# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Independent sites of finite support, given their macro value, for all kinds of maps.

Compared with the joint law listed state by state, and for large micro states with
convolutions by numpy.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import (
    assert_counts,
    assert_gradient,
    assert_is_law,
    given,
    law_of,
    product_of,
    run,
    states_of,
)
from pyro import poutine

import pyro_macro as pm

MICRO = ["x0", "x1", "x2"]


def sites(*fns):
    def model():
        for i, fn in enumerate(fns):
            pyro.sample(f"x{i}", fn)

    return model


def macro_of(aggregation, count=3):
    return pm.MacroVariable("m", MICRO[:count], aggregation=aggregation)


def mixed():
    return [
        dist.Bernoulli(0.3),
        dist.Binomial(5, torch.tensor(0.6)),
        dist.Categorical(torch.tensor([0.2, 0.5, 0.3])),
    ]


def dice():
    return [
        dist.Categorical(torch.tensor(p))
        for p in ([0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.3, 0.3, 0.4])
    ]


def counts():
    return [
        dist.Poisson(1.3),
        dist.ZeroInflatedPoisson(torch.tensor(2.0), gate=torch.tensor(0.4)),
        dist.Binomial(3, torch.tensor(0.6)),
    ]


VALUES = {
    mixed: [range(2), range(6), range(3)],
    dice: [range(3)] * 3,
    counts: [range(12), range(12), range(4)],
}
ROWS = [[1.0, 1.0, 1.0], [1.0, 0.0, -1.0]]
DP, LIST = "dynamic programming", "enumeration"


def maps():
    return {
        "sum": (pm.Sum(), 4.0, DP),
        "mean": (pm.Mean(), 5 / 3, DP),
        "linear": (pm.Linear([1.0, 2.0, 0.5]), 4.0, DP),
        "linear, thirds": (pm.Linear([1 / 3, 0.5, 1.0]), 4 / 3, DP),
        "linear, negative": (pm.Linear([1.0, -1.0, 2.0]), 1.0, DP),
        "linear, a weight of zero": (pm.Linear([1.0, 0.0, 2.0]), 3.0, DP),
        "linear, no lattice": (pm.Linear([2**0.5, 2**0.5, 1.0]), 1 + 2**0.5, LIST),
        "two rows": (pm.Linear(ROWS), torch.tensor([2.0, 0.0]), DP),
        "count": (pm.Count(1), 2.0, DP),
        "max": (pm.Max(), 2.0, DP),
        "min": (pm.Min(), 1.0, DP),
        "squares": (pm.Custom(lambda x: x.square().sum(-1)), 5.0, LIST),
        "parity": (pm.Custom(lambda x: x.sum(-1) % 2), 1.0, LIST),
        "squares and sum": (
            pm.Custom(lambda x: torch.stack([x.square().sum(-1), x[..., 0]], -1), 1),
            torch.tensor([5.0, 1.0]),
            LIST,
        ),
    }


def listed(fns, values, aggregation, value):
    """The joint law on the fibre, the macro value being that of plain arithmetic."""
    states = states_of(*values)
    logs = sum(fn.log_prob(states[:, k]) for k, fn in enumerate(fns))
    miss = (aggregation(states).double() - torch.as_tensor(value).double()).abs()
    met = (miss < 1e-6) if miss.dim() == 1 else (miss < 1e-6).all(-1)
    return given(logs, states, met)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("which", maps())
@pytest.mark.parametrize("program", [mixed, dice])
def test_the_law_given_a_macro_value_is_the_joint_law_conditioned(
    program, which, dtype
):
    torch.set_default_dtype(dtype)
    aggregation, value, method = maps()[which]
    macro, fns = macro_of(aggregation), program()
    law = law_of(sites(*fns), macro, pm.Natural(value))
    assert law.method.startswith("exact: finite") and method in law.method
    states, probs, log_total = listed(fns, VALUES[program], aggregation, value)
    assert len(states) > 1
    probs, log_total = probs.double(), log_total.double()
    loose = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else {}
    on = law.log_prob(states.to(dtype)).exp().double()
    torch.testing.assert_close(on, probs, **loose)
    torch.testing.assert_close(law.log_total.double(), log_total, **loose)
    found = law.enumerate_support(expand=False)
    assert sorted(found.tolist()) == sorted(states.tolist())
    draws = law.sample((10_000,))
    assert draws.dtype == dtype
    assert_counts(draws, states, probs)
    mean = (probs.unsqueeze(-1) * states.double()).sum(0)
    torch.testing.assert_close(law.mean.double(), mean, **loose)


COUNTABLE = ["sum", "mean", "linear", "linear, thirds", "two rows", "max"]


@pytest.mark.parametrize("which", COUNTABLE)
def test_counts_without_end_are_finite_where_the_macro_value_bounds_them(which):
    aggregation, value, _ = maps()[which]
    if which == "two rows":
        aggregation, value = pm.Linear([ROWS[0], [1.0, 1.0, 0.0]]), [4.0, 2.0]
        value = torch.tensor(value)
    fns = counts()
    law = law_of(sites(*fns), macro_of(aggregation), pm.Natural(value))
    states, probs, log_total = listed(fns, VALUES[counts], aggregation, value)
    assert_is_law(law, states, probs, log_total)
    assert_counts(law.sample((10_000,)), states, probs)


@pytest.mark.parametrize(
    "which", ["min", "linear, negative", "linear, a weight of zero", "squares"]
)
def test_counts_without_end_on_an_unbounded_fibre_are_refused(which):
    aggregation, value, _ = maps()[which]
    fns = [dist.Poisson(1.0), dist.Poisson(2.0), dist.Poisson(1.0)]
    with pytest.raises(pm.UnsupportedLaw, match="'x[012]' is Poisson.*infinitely many"):
        law_of(sites(*fns), macro_of(aggregation), pm.Natural(value))


@pytest.mark.parametrize("which", maps())
def test_macro_values_that_no_state_has_are_refused(which):
    aggregation, value, _ = maps()[which]
    impossible = torch.as_tensor(value) + (0.01 if "linear" in which else 20.3)
    with pytest.raises(pm.Infeasible, match="'m'.*cannot be reached"):
        law_of(sites(*mixed()), macro_of(aggregation), pm.Natural(impossible))


@pytest.mark.parametrize("way", ["probs", "logits"])
def test_states_of_probability_zero_do_not_count(way):
    def fn(*probs):
        probs = torch.tensor(probs)
        return dist.Categorical(**{way: probs if way == "probs" else probs.log()})

    fns = [fn(0.0, 1.0, 0.0), fn(0.5, 0.0, 0.5), fn(0.5, 0.5)]
    law = law_of(sites(*fns), macro_of(pm.Sum()), pm.Natural(3.0))
    torch.testing.assert_close(law.log_prob(torch.tensor([1.0, 2.0, 0.0])).item(), 0.0)
    with pytest.raises(pm.Infeasible, match="no micro state of positive prob"):
        law_of(sites(*fns[:2]), macro_of(pm.Sum(), 2), pm.Natural(2.0))


def test_states_off_the_fibre_are_off_the_support_and_impossible():
    law = law_of(sites(*mixed()), macro_of(pm.Sum()), pm.Natural(4.0))
    for state in ([1.0, 2.0, 2.0], [0.5, 2.5, 1.0], [2.0, 1.0, 1.0], [-1.0, 5.0, 0.0]):
        state = torch.tensor(state)
        assert not law.support.check(state)
        with pytest.raises(ValueError, match="support"):
            law.log_prob(state)
        with pyro.validation_enabled(False):
            law._validate_args = False
            assert law.log_prob(state) == -torch.inf
            law._validate_args = True


def test_categorical_sites_stay_whole_numbers_that_index():
    table = torch.tensor([10.0, 20.0, 30.0])

    def model():
        a = pyro.sample("x0", dist.Categorical(torch.tensor([0.1, 0.2, 0.7])))
        b = pyro.sample("x1", dist.Categorical(torch.tensor([0.5, 0.25, 0.25])))
        pyro.sample("x2", dist.Bernoulli(0.5))
        pyro.deterministic("cost", table[a] + table[b])

    nodes = run(model, macro_of(pm.Sum()), pm.Natural(3.0)).nodes
    assert nodes["x0"]["value"].dtype == torch.long
    assert nodes["x1"]["value"].dtype == torch.long
    assert nodes["x2"]["value"].dtype == torch.get_default_dtype()
    a, b = nodes["x0"]["value"], nodes["x1"]["value"]
    assert nodes["cost"]["value"] == 10 * (a + b + 2)


# Plates and event dimensions


def test_slots_of_plates_that_stay_have_laws_of_their_own():
    """Plates of the vector between, left of and right of those that stay."""
    generator = torch.Generator().manual_seed(4)
    probs = torch.rand(2, 3, 2, 4, generator=generator)
    values = torch.tensor([1.0, 2.0, 4.0]).reshape(1, 3, 1, 1)

    def model():
        with pyro.plate("p", 2, dim=-4), pyro.plate("kept", 3, dim=-3):
            with pyro.plate("q", 2, dim=-2), pyro.plate("slot", 4, dim=-1):
                pyro.sample("x", dist.Bernoulli(probs))

    macro = pm.MacroVariable("m", "x", over=["p", "q"])
    intervened = pm.macro_do(model, {macro: pm.Natural(values)})
    nodes = poutine.trace(intervened).get_trace().nodes
    law, x = nodes["m__micro"]["fn"], nodes["x"]["value"]
    assert x.shape == (2, 3, 2, 4)
    torch.testing.assert_close(x.sum((0, 2), keepdim=True), values.expand(1, 3, 1, 4))
    assert law.batch_shape == (3, 1, 4)
    draws = law.sample((4000,))
    for kept in range(3):
        for slot in range(4):
            own = probs[:, kept, :, slot].flatten()
            states, p, log_total = product_of(
                [dist.Bernoulli(q) for q in own],
                [range(2)] * 4,
                lambda x: x.sum(-1),
                values.flatten()[kept],
            )
            assert_counts(draws[:, kept, 0, slot], states, p, level=1e-4)
            torch.testing.assert_close(law.log_total[kept, 0, slot], log_total)
            at = states[:, None, None, None].expand(-1, 3, 1, 4, 4)
            with pyro.validation_enabled(False):
                law._validate_args = False
                found = law.log_prob(at)[:, kept, 0, slot].exp()
            torch.testing.assert_close(found, p)


def test_event_dimensions_are_elements():
    p = torch.tensor([0.2, 0.5, 0.9])

    def model():
        pyro.sample("x0", dist.Bernoulli(p).to_event(1))
        pyro.sample("x1", dist.Binomial(2, p[:1]).to_event(1))

    law = law_of(model, pm.MacroVariable("m", ["x0", "x1"]), pm.Natural(3.0))
    fns = [*(dist.Bernoulli(q) for q in p), dist.Binomial(2, p[0])]
    states, probs, log_total = product_of(
        fns, [range(2)] * 3 + [range(3)], lambda x: x.sum(-1), 3
    )
    assert_is_law(law, states, probs, log_total)


def test_a_grid_of_values_comes_out_along_its_plate():
    grid = torch.arange(1.0, 7.0)
    with pyro.plate("grid", 6):
        trace = run(sites(*mixed()), macro_of(pm.Sum()), pm.Natural(grid))
    law = trace.nodes["m__micro"]["fn"]
    x = torch.stack([trace.nodes[name]["value"] for name in MICRO], -1)
    torch.testing.assert_close(x.sum(-1), grid)
    draws = law.sample((5000,))
    for i, total in enumerate(grid):
        states, probs, log_total = listed(mixed(), VALUES[mixed], pm.Sum(), total)
        assert_counts(draws[:, i], states, probs)
        torch.testing.assert_close(law.log_total[i], log_total)
    with pytest.raises(NotImplementedError, match="differs along the batch"):
        law.enumerate_support()


def test_an_expanded_law_draws_anew_and_seeds_repeat():
    law = law_of(sites(*mixed()), macro_of(pm.Sum()), pm.Natural(4.0))
    many = law.expand((50, 2))
    pyro.set_rng_seed(5)
    draws = many.sample((3,))
    assert draws.shape == (3, 50, 2, 3)
    assert len(draws.reshape(-1, 3).unique(dim=0)) > 4
    assert (draws[0, :, 0] != draws[0, :, 1]).any()
    assert many.log_prob(draws).shape == (3, 50, 2)
    pyro.set_rng_seed(5)
    torch.testing.assert_close(many.sample((3,)), draws, rtol=0, atol=0)
    support = many.enumerate_support()
    assert support.shape[1:] == (50, 2, 3)


def test_reading_takes_no_random_numbers_and_leaves_no_parameters():
    def model():
        p = pyro.param("p", torch.tensor(0.3))
        pyro.sample("x0", dist.Bernoulli(p))
        pyro.sample("x1", dist.Binomial(3, 0.5 * p))
        pyro.sample("x2", dist.Bernoulli(0.2))

    intervened = pm.macro_do(model, {macro_of(pm.Sum()): pm.Natural(2.0)})
    pyro.set_rng_seed(6)
    node = poutine.trace(intervened).get_trace().nodes["m__micro"]
    pyro.set_rng_seed(6)
    torch.testing.assert_close(node["fn"].sample(), node["value"], rtol=0, atol=0)
    assert set(pyro.get_param_store().keys()) == {"p"}


# Gradients


@pytest.mark.parametrize("which", ["sum", "linear", "max", "count", "squares"])
def test_the_log_density_has_the_gradient_of_differences(which):
    aggregation, value, _ = maps()[which]
    state = torch.tensor([1.0, 2.0, 0.0])
    value = aggregation(state)

    def density(theta):
        fns = [
            dist.Bernoulli(logits=theta[0]),
            dist.Binomial(5, logits=theta[1]),
            dist.Categorical(logits=theta[2:]),
        ]
        law = law_of(sites(*fns), macro_of(aggregation), pm.Natural(value))
        return law.log_prob(state) + 0.3 * law.log_total

    assert_gradient(density, torch.tensor([0.3, -0.5, 0.1, 0.8, -0.4]))


def test_the_gradient_of_the_total_is_the_conditional_mean():
    """d log P(S = s) / d logit_k = E[X_k | S = s] - p_k."""
    logits = torch.linspace(-3, 2, 40, requires_grad=True)

    def model():
        with pyro.plate("k", 40):
            pyro.sample("x", dist.Bernoulli(logits=logits))

    law = law_of(model, pm.MacroVariable("m", "x", over="k"), pm.Natural(9.0))
    (gradient,) = torch.autograd.grad(law.log_total, logits)
    wanted = conditional_means(logits.detach().sigmoid().numpy(), 9)
    p = logits.detach().sigmoid()
    torch.testing.assert_close(gradient + p, torch.tensor(wanted))


# Large micro states


def convolved(tables):
    total = np.ones(1)
    for table in tables:
        total = np.convolve(total, table)
    return total


def conditional_means(p, s, which=None):
    """``E[X_k | S = s]`` of Bernoulli variables, leaving out one at a time."""
    tables = np.stack([1 - p, p], -1)
    whole = convolved(tables)[s]
    which = range(len(p)) if which is None else which
    others = [convolved(np.delete(tables, k, 0))[s - 1] for k in which]
    return np.array([p[k] * o / whole for k, o in zip(which, others, strict=True)])


@pytest.mark.parametrize("s", [3, 250, 700])
def test_a_thousand_bernoullis_have_the_conditional_means(s):
    p = torch.rand(1000, generator=torch.Generator().manual_seed(7)) * 0.8 + 0.01

    def model():
        with pyro.plate("k", 1000):
            pyro.sample("x", dist.Bernoulli(p))

    law = law_of(model, pm.MacroVariable("m", "x", over="k"), pm.Natural(float(s)))
    n = 1000
    draws = law.sample((n,))
    assert (draws.sum(-1) == s).all()
    which = list(range(0, 1000, 40))
    wanted = torch.tensor(conditional_means(p.numpy(), s, which))
    error = (wanted * (1 - wanted) / n).sqrt()
    assert ((draws.mean(0)[which] - wanted).abs() < 5 * error + 1e-9).all()
    total = convolved(torch.stack([1 - p, p], -1).numpy())[s]
    torch.testing.assert_close(law.log_total.item(), np.log(total))
    x = draws[0]
    joint = torch.where(x > 0, p, 1 - p).log().sum()
    torch.testing.assert_close(law.log_prob(x), joint - np.log(total))


def test_two_hundred_dice_have_the_conditional_margins():
    weights = torch.rand(200, 6, generator=torch.Generator().manual_seed(8)) + 0.05
    probs = weights / weights.sum(-1, keepdim=True)

    def model():
        with pyro.plate("k", 200):
            pyro.sample("x", dist.Categorical(probs))

    law = law_of(model, pm.MacroVariable("m", "x", over="k"), pm.Natural(400.0))
    draws = law.sample((2000,))
    assert (draws.sum(-1) == 400).all()
    tables, whole = probs.numpy(), convolved(probs.numpy())[400]
    states = torch.arange(6.0).unsqueeze(-1)
    for k in (0, 100, 127, 128, 199):
        others = convolved(np.delete(tables, k, 0))
        margin = [tables[k, v] * others[400 - v] / whole for v in range(6)]
        assert_counts(draws[:, k], states, torch.tensor(margin))
    # Dependence: two of them together
    others = convolved(np.delete(tables, [3, 150], 0))
    pair = [
        tables[3, a] * tables[150, b] * others[400 - a - b] / whole
        for a in range(6)
        for b in range(6)
    ]
    assert_counts(draws[:, [3, 150]], states_of(range(6), range(6)), torch.tensor(pair))
    torch.testing.assert_close(law.log_total.item(), np.log(whole))


@pytest.mark.parametrize("which", ["count", "max", "min"])
def test_many_dice_under_other_maps(which):
    probs = torch.tensor([0.3, 0.4, 0.2, 0.1])
    aggregation, value = {
        "count": (pm.Count(3), 7.0),
        "max": (pm.Max(), 2.0),
        "min": (pm.Min(), 1.0),
    }[which]

    def model():
        with pyro.plate("k", 60):
            pyro.sample("x", dist.Categorical(probs))

    macro = pm.MacroVariable("m", "x", over="k", aggregation=aggregation)
    law = law_of(model, macro, pm.Natural(value))
    cdf = probs.cumsum(0)
    total = {
        "count": torch.distributions.Binomial(60, probs[3]).log_prob(torch.tensor(7.0)),
        "max": (cdf[2] ** 60 - cdf[1] ** 60).log(),
        "min": ((1 - cdf[0]) ** 60 - (1 - cdf[1]) ** 60).log(),
    }[which]
    torch.testing.assert_close(law.log_total, total)
    draws = law.sample((3000,))
    assert (macro.aggregation(draws) == value).all()
    if which == "count":
        margin = torch.cat(
            [probs[:3] / probs[:3].sum() * 53 / 60, torch.tensor([7 / 60])]
        )
    elif which == "max":
        # P(x = v, all <= 2, one at least = 2)
        margin = probs[:3] * torch.stack(
            [cdf[2] ** 59 - cdf[1] ** 59] * 2 + [cdf[2] ** 59]
        )
        margin = torch.cat([margin, torch.zeros(1)]) / total.exp()
    else:
        rest = (1 - cdf[0]) ** 59 - (1 - cdf[1]) ** 59
        margin = probs * torch.stack([0 * rest, (1 - cdf[0]) ** 59, rest, rest])
        margin = margin / total.exp()
    states = torch.arange(4.0).unsqueeze(-1)
    for k in (0, 31, 59):
        assert_counts(draws[:, k], states, margin)
    for x in draws[:3]:
        joint = probs.log()[x.long()].sum()
        torch.testing.assert_close(law.log_prob(x), joint - total)


def test_too_many_states_to_list_say_so():
    def model():
        with pyro.plate("k", 40):
            pyro.sample("x", dist.Bernoulli(torch.full((40,), 0.5)))

    parity = pm.Custom(lambda x: x.sum(-1) % 2)
    macro = pm.MacroVariable("m", "x", over="k", aggregation=parity)
    with pytest.raises(pm.UnsupportedLaw, match="enumerated.*micro states. Expected"):
        law_of(model, macro, pm.Natural(1.0))


def test_a_map_that_is_injective_on_the_states_is_refused():
    for aggregation in (
        pm.Custom(lambda x: x[..., 0] + 10 * x[..., 1]),
        pm.Linear([1.0, 10.0]),
    ):
        with pytest.raises(pm.NotAMicroState, match="injective"):
            law_of(sites(*mixed()[1:]), macro2(aggregation), pm.Natural(12.0))


def macro2(aggregation):
    return pm.MacroVariable("m", ["x0", "x1"], aggregation=aggregation)
