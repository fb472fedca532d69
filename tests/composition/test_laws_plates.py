# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws that are not Gaussian under plates: outside, inside, both, subsampled."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

from .laws import (
    CASES,
    CHAINS,
    EXACT,
    EXTREME,
    FINITE,
    GIVEN,
    SAMPLED,
    every_law,
)
from .models import SALES, assert_same_program

pytestmark = pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")


def in_plate(model, n, dim):
    def run(*args):
        with pyro.plate("outer", n, dim=dim):
            return model(*args)

    return run


# Outside


@every_law
@pytest.mark.parametrize("dim", [-1, -3])
def test_plate_outside_draws_a_micro_state_in_each_slot(law, dim):
    model = in_plate(law.intervened, 30, dim)
    trace = assert_same_program(model, in_plate(law.case.by_hand, 30, dim))
    site = trace.nodes["sales__micro"]
    assert site["log_prob"].shape == (30,) + (1,) * (-dim - 1)
    assert len(site["value"].reshape(30, 2).unique(dim=0)) > 1
    total = law.case.total(site["value"])
    torch.testing.assert_close(total, torch.full_like(total, law.case.value))


def with_value(case, value):
    kwargs = {"sampler": CHAINS} if case is SAMPLED else {}
    kwargs |= {"given": ["c"]} if case is GIVEN else {}
    return {case.macro: type(case.realization)(value, **kwargs)}


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_plate_outside_takes_a_grid_of_values(case):
    # Each slot has the density that a run of its own has with its value
    grid = case.value - torch.tensor([0.0, 1.0, 0.0])
    model = in_plate(pm.macro_do(case.model, with_value(case, grid)), 3, -1)
    trace = poutine.trace(model).get_trace()
    x = trace.nodes["sales__micro"]["value"]
    torch.testing.assert_close(case.total(x), grid)
    torch.testing.assert_close(trace.nodes["sales"]["value"], grid)
    if case is SAMPLED:
        return
    site = trace.nodes["sales__micro"]
    density = site["fn"].log_prob(site["value"])
    for slot in range(3):
        data = {"sales__micro": x[slot]}
        if case.cause:
            data["c"] = trace.nodes["c"]["value"][slot]
        single = pm.macro_do(case.model, with_value(case, float(grid[slot])))
        single = poutine.trace(poutine.condition(single, data)).get_trace()
        single.compute_log_prob()
        torch.testing.assert_close(
            density[slot], single.nodes["sales__micro"]["log_prob"]
        )


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_grid_of_values_without_its_plate_is_an_error_that_says_so(case):
    grid = case.value - torch.tensor([0.0, 1.0, 0.0])
    with pytest.raises(pm.PyroMacroError, match="plate of its own"):
        pm.macro_do(case.model, with_value(case, grid))()


# Inside, staying


@every_law
def test_plate_inside_stays_a_batch_dimension(law):
    model = law.do(in_plate(law.case.model, 4, -1))
    trace = assert_same_program(model, in_plate(law.case.by_hand, 4, -1))
    assert trace.nodes["sales__micro"]["log_prob"].shape == (4,)


@pytest.mark.parametrize("case", EXACT, ids=repr)
def test_plate_inside_takes_a_value_for_each_slot(case):
    values = case.value - torch.tensor([0.0, 1.0, 0.0])
    model = pm.macro_do(in_plate(case.model, 3, -1), with_value(case, values))
    trace = poutine.trace(model).get_trace()
    torch.testing.assert_close(trace.nodes["sales"]["value"], values)
    total = case.total(trace.nodes["sales__micro"]["value"])
    torch.testing.assert_close(total, values)
    with pytest.raises(pm.PyroMacroError, match=r"\(2,\).*'outer' of size 3"):
        pm.macro_do(in_plate(case.model, 3, -1), with_value(case, values[:2]))()


@every_law
def test_plates_inside_and_outside(law):
    def outer(model):
        def run():
            with pyro.plate("far", 2, dim=-2):
                return model()

        return run

    model = outer(law.do(in_plate(law.case.model, 3, -1)))
    trace = assert_same_program(model, outer(in_plate(law.case.by_hand, 3, -1)))
    assert trace.nodes["sales__micro"]["log_prob"].shape == (2, 3)


def test_cause_outside_of_a_plate_that_stays_makes_one_law_of_its_slots():
    def model():
        c = pyro.sample("c", dist.Bernoulli(0.4))
        with pyro.plate("slots", 2, dim=-1):
            return FINITE.parts(c)

    values = torch.tensor([2.0, 1.0])
    intervened = pm.macro_do(model, {SALES: pm.Natural(values)})
    trace = poutine.trace(intervened).get_trace()
    x1, x2 = trace.nodes["x1"]["value"], trace.nodes["x2"]["value"]
    torch.testing.assert_close(x1 + x2, values)
    p = torch.tensor([[0.2], [0.7]])  # rows: the values of c
    q = torch.tensor([[0.3], [0.6]])

    def joint(x1):  # log P(c, x1, x2 of both slots)
        parts = dist.Bernoulli(p).log_prob(x1) + dist.Binomial(2, q).log_prob(
            values - x1
        )
        return (torch.tensor([0.6, 0.4]).log() + parts.sum(-1)).logsumexp(0)

    states = [torch.tensor([a, b]) for a in (0.0, 1.0) for b in (0.0, 1.0)]
    total = torch.stack([joint(s) for s in states]).logsumexp(0)
    trace.compute_log_prob()
    found = trace.nodes["sales__micro"]["log_prob"]
    torch.testing.assert_close(found, joint(x1) - total)


# Inside, aggregated over

SHAPES = [2.0, 1.0, 0.5, 3.0]


def over(kind, aggregation=None):
    def model():
        with pyro.plate("parts", 4, dim=-1):
            x = pyro.sample("x", kind(torch.tensor(SHAPES)))
            pyro.sample("y", dist.Normal(2 * x, 1.0))

    return model, pm.MacroVariable("total", "x", "parts", aggregation)


KINDS = {
    "gamma": lambda a: dist.Gamma(a, 2.0),
    "Poisson": dist.Poisson,
    "uniform": lambda a: dist.Uniform(0.0, a),
}


def over_by_hand(kind, x):
    """The log density of a micro state with total 3."""
    if kind == "gamma":
        # With respect to the elements without the last one, of 3 times the shares
        density = dist.Dirichlet(torch.tensor(SHAPES)).log_prob(x / 3)
        return density - 3 * torch.tensor(3.0).log()
    if kind == "Poisson":
        return dist.Multinomial(3, torch.tensor(SHAPES)).log_prob(x)
    # The density of a sum of uniforms, by inclusion and exclusion
    sides = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 4)
    rest = (3 - sides @ torch.tensor(SHAPES)).clamp(min=0)
    return -((1 - 2 * (sides.sum(-1) % 2)) * rest**3).sum().div(6).log()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("outer", [False, True])
def test_plate_in_over_is_added_up(do, kind, outer):
    model, macro = over(KINDS[kind])
    realize = pm.MaxEntropy if kind == "uniform" else pm.Natural
    intervened = do(model, {macro: realize(3.0)})
    if outer:
        intervened = in_plate(intervened, 5, -2)
    trace = poutine.trace(intervened).get_trace()
    trace.compute_log_prob()
    site, x = trace.nodes["total__micro"], trace.nodes["x"]["value"]
    assert x.shape == ((5, 4) if outer else (4,))
    torch.testing.assert_close(x.sum(-1), torch.full(x.shape[:-1], 3.0))
    wanted = torch.stack([over_by_hand(kind, row) for row in x.reshape(-1, 4)])
    torch.testing.assert_close(site["log_prob"].reshape(-1), wanted)


def test_weighted_plate_in_over_has_the_density_in_its_own_coordinates(do):
    # The weighted elements are 3 times the shares; x_k is that over its weight
    weights = torch.tensor([1.0, 2.0, 1.5, 4.0])
    total = pm.MacroVariable("total", "x", "parts", pm.Linear(weights))

    def model():
        with pyro.plate("parts", 4, dim=-1):
            pyro.sample("x", dist.Gamma(torch.tensor(SHAPES), weights))

    trace = poutine.trace(do(model, {total: pm.Natural(3.0)})).get_trace()
    x = trace.nodes["x"]["value"]
    torch.testing.assert_close(weights @ x, torch.tensor(3.0))
    share = dist.Dirichlet(torch.tensor(SHAPES)).log_prob(weights * x / 3)
    wanted = share + (weights[:-1] / 3).log().sum()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["total__micro"]["log_prob"], wanted)


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_one_plate_stays_and_one_is_added_up(case):
    macro = pm.MacroVariable("total", ["x1", "x2"], "parts", case.macro.aggregation)

    def model():
        with pyro.plate("slots", 2, dim=-2), pyro.plate("parts", 2, dim=-1):
            return case.model()

    value = case.value if case is EXTREME else 2 * case.value
    realization = next(iter(with_value(case, value).values()))
    nodes = poutine.trace(pm.macro_do(model, {macro: realization})).get_trace().nodes
    x = torch.stack([nodes[n]["value"] for n in ("x1", "x2")], -1)
    assert x.shape == (2, 2, 2)
    total = case.total(x.flatten(1))
    torch.testing.assert_close(total, torch.full((2,), value))


# Subsampled


@every_law
def test_subsampled_plate_outside_scales_every_site(law):
    def outer(model):
        def run():
            with pyro.plate("outer", 40, subsample_size=4, dim=-1):
                return model()

        return run

    trace = assert_same_program(outer(law.intervened), outer(law.case.by_hand))
    assert trace.nodes["sales__micro"]["scale"] == 10.0


@every_law
def test_subsampled_plate_inside_scales_the_density(law):
    def inner(model):
        def run():
            with pyro.plate("inner", 6, subsample_size=2, dim=-1):
                return model()

        return run

    model = law.do(inner(law.case.model))
    trace = assert_same_program(model, inner(law.case.by_hand))
    assert trace.nodes["sales__micro"]["scale"] == 3.0
    assert trace.nodes["sales__micro"]["log_prob"].shape == (2,)


@pytest.mark.parametrize("case", EXACT, ids=repr)
def test_subsampled_plate_inside_subsamples_the_values(case):
    def model():
        with pyro.plate("inner", 6, subsample_size=2, dim=-1):
            return case.model()

    values = case.value - torch.arange(6.0) % 2
    trace = poutine.trace(pm.macro_do(model, with_value(case, values))).get_trace()
    index = trace.nodes["inner"]["value"]
    torch.testing.assert_close(trace.nodes["sales"]["value"], values[index])


@pytest.mark.parametrize("kind", KINDS)
def test_subsampled_plate_in_over_is_an_error_that_says_why(do, kind):
    def model():
        with pyro.plate("parts", 4, subsample_size=2, dim=-1) as i:
            pyro.sample("x", KINDS[kind](torch.tensor(SHAPES)[i]))

    total = pm.MacroVariable("total", "x", "parts")
    for realization in (pm.Natural(3.0), pm.MaxEntropy(3.0)):
        with pytest.raises(pm.NotAMicroState, match="'parts' is subsampled"):
            do(model, {total: realization})()
