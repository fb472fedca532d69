# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What is refused over a sharded plate: with any number of ranks, one among them."""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal
from sharded_models import (
    CASES,
    MEAN,
    SALES,
    SCALE,
    SIZE,
    TABLE,
    confounded,
    independent,
    sharded,
    shocked,
    vectors,
)
from torch.distributions import biject_to

import pyro_macro as pm

OVER = "plate 'products' (slots 0 to 10 of 11)"


def refused(error, *parts):
    return pytest.raises(error, match=".*".join(map(re.escape, parts)))


def do(model, realization, macro=SALES):
    return pm.macro_do(model, {macro: realization})(sharded)


@pytest.mark.parametrize(
    "realization",
    [
        pm.Residual(20.0, absorb=0),
        pm.MaxEntropy(20.0),
        pm.Explicit(20.0, lambda v: dist.Delta(v * torch.ones(SIZE), event_dim=1)),
        pm.Inhibiting(20.0, "y"),
    ],
)
def test_realizations_that_need_all_elements_in_one_place(realization):
    name = type(realization).__name__
    with refused(
        pm.UnsupportedLaw, f"'sales': its elements are split over ranks, {OVER}", name
    ):
        do(independent, realization)


@pytest.mark.parametrize(
    "aggregation", [pm.Max(), pm.Min(), pm.Custom(torch.sum), pm.Linear(TABLE.mT)]
)
def test_maps_that_are_no_weighted_sums(aggregation):
    macro = pm.MacroVariable("sales", "x", "products", aggregation)
    said = OVER, "Expected a linear map with one value"
    with refused(pm.UnsupportedLaw, "macro-variable 'sales'", *said):
        do(independent, pm.Natural(20.0), macro)
    with refused(pm.UnsupportedLaw, "macro-variable 'sales'", *said):
        pm.aggregate(independent, [macro])(sharded)


def test_natural_laws_of_other_sites_than_gaussians():
    def counts(plate):
        with plate() as mine:
            pyro.sample("x", dist.Poisson(MEAN[mine]))

    with refused(pm.UnsupportedLaw, "micro site 'x' is Poisson. Expected a Gaussian"):
        do(counts, pm.Natural(20.0))

    def curved(plate):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with plate() as mine:
            pyro.sample("x", dist.Normal(MEAN[mine] * z.exp(), 1.0))

    with refused(pm.UnsupportedLaw, "not jointly affine-Gaussian"):
        do(curved, pm.Natural(20.0))


def test_slots_that_act_on_one_another():
    def chained(plate):
        with plate():
            z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([SIZE]))
            pyro.sample("x", dist.Normal(z.cumsum(-1), 1.0))

    with refused(pm.UnsupportedLaw, "site 'z'", "acts on other slots than its own"):
        do(chained, pm.Natural(20.0))


def test_ancestors_that_are_sums_over_the_plate():
    def fed_back():
        products = sharded(-1)
        with products:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
        total = products.sum(z)
        pyro.sample("a", dist.Normal(total, 1.0))
        pyro.sample("b", dist.Normal(total, 2.0))
        with pm.sharded_plate("others", SIZE):
            pyro.sample("x", dist.Normal(total, 1.0))

    both = pm.MacroVariable("both", ["a", "b"])
    others = pm.MacroVariable("sales", "x", "others")
    for macro in (both, others):
        with refused(
            pm.UnsupportedLaw, macro.name, "depend on 'z', in plate 'products', which"
        ):
            pm.macro_do(fed_back, {macro: pm.Natural(3.0)})()
    # Held at its value, it is a number like any other
    held = pm.macro_do(fed_back, {both: pm.Natural(3.0, given=["z"])})
    nodes = poutine.trace(held).get_trace().nodes
    total = nodes["z"]["value"].sum()
    mean = total + torch.tensor([0.2, 0.8]) * (3.0 - 2 * total)
    torch.testing.assert_close(nodes["both__micro"]["fn"].mean, mean)


def test_what_is_known_in_each_slot_of_sites_that_are_not_held():
    def reported(plate):
        shock = pyro.sample("shock", dist.Normal(0.0, 1.0))
        with plate() as mine:
            report = pyro.sample("report", dist.Normal(shock, 1.0), obs=MEAN[mine])
            pyro.sample("x", dist.Normal(report + shock, SCALE[mine]))

    with refused(pm.UnsupportedLaw, "'sales'", "known of 'report'", "with given=[...]"):
        do(reported, pm.Natural(20.0))
    do(reported, pm.Natural(20.0, given=["shock"]))


def test_totals_that_depend_on_one_another():
    def two(plate):
        shock = pyro.sample("shock", dist.Normal(0.0, 1.0))
        with plate():
            pyro.sample("x", dist.Normal(shock, 1.0))
            pyro.sample("w", dist.Normal(shock, 1.0))

    other = pm.MacroVariable("other", "w", "products")
    with refused(pm.UnsupportedLaw, OVER, "which is split over ranks, and what else"):
        pm.macro_do(two, {SALES: pm.Natural(1.0), other: pm.Natural(2.0)})(sharded)
    with refused(pm.UnsupportedLaw, OVER, "Set it alone"):
        pm.macro_do(
            two, {SALES: pm.Natural(1.0, given=[other]), other: pm.Proportional(2.0)}
        )(sharded)
    weights = pm.Linear(MEAN)
    again = pm.MacroVariable("again", "x", "products", weights)
    with refused(pm.UnsupportedLaw, "sales_again", "Expected a linear map"):
        pm.macro_do(two, {SALES: pm.Natural(1.0), again: pm.Natural(2.0)})(sharded)


def test_slots_of_a_plate_that_stays_and_share_a_cause():
    def packs(plate):
        shock = pyro.sample("shock", dist.Normal(0.0, 1.0))
        with plate() as mine:
            pyro.sample("x", dist.Normal(TABLE[mine] + shock, 1.0).to_event(1))

    macro = pm.MacroVariable("packs", "x")
    with refused(pm.UnsupportedLaw, "plate 'products' are dependent", "split over ran"):
        do(packs, pm.Natural(5.0), macro)
    do(packs, pm.Natural(5.0, given=["shock"]), macro)


def test_plates_that_lie_left_of_the_sharded_one():
    def stores(plate):
        with plate(-1) as mine, pyro.plate("stores", 3, dim=-2):
            pyro.sample("x", dist.Normal(MEAN[mine], 1.0))

    macro = pm.MacroVariable("sales", "x", ["products", "stores"])
    with refused(pm.NotAMicroState, "'products' is split", "left of the other plates"):
        do(stores, pm.Natural(5.0), macro)


def test_sites_of_which_some_are_outside():
    def part(plate):
        pyro.sample("w", dist.Normal(0.0, 1.0))
        with plate():
            pyro.sample("x", dist.Normal(0.0, 1.0))

    macro = pm.MacroVariable("sales", ["w", "x"], "products")
    with refused(pm.NotAMicroState, "site 'w'", "around every micro site"):
        do(part, pm.Natural(5.0), macro)


def test_two_sharded_plates():
    def model():
        with sharded(-1), pm.sharded_plate("others", 3, dim=-2):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with refused(pm.PyroMacroError, "site 'x' is in two sharded plates"):
        model()


def test_shares_and_weights_of_a_wrong_size():
    with refused(pm.PyroMacroError, "shares have shape (3,)", "Expected 11"):
        do(independent, pm.Allocate(1.0, torch.ones(3) / 3))
    macro = pm.MacroVariable("sales", "x", "products", pm.Linear(torch.ones(3)))
    with refused(pm.NotAMicroState, "Linear", "Expected 11 in the rightmost"):
        do(independent, pm.Natural(1.0), macro)
    with refused(pm.OffFibre, "shares have macro value 11"):
        do(independent, pm.Allocate(1.0, torch.ones(SIZE)))


def test_natural_values_of_zero():
    intervened = pm.macro_do(independent, {SALES: pm.Proportional(3.0)})
    nothing = {"sales__micro": torch.zeros(SIZE)}
    with refused(pm.OffFibre, "its natural value is zero in this run"):
        poutine.condition(intervened, nothing)(sharded)


@pytest.mark.parametrize(
    "realization", [pm.Natural(20.0), pm.Proportional(20.0), pm.Shift(1.0)]
)
def test_coordinates_of_the_latent_site(realization):
    intervened = pm.macro_do(independent, {SALES: realization})
    support = (
        poutine.trace(intervened).get_trace(sharded).nodes["sales__micro"]["fn"].support
    )
    said = "the elements of this latent site lie on several ranks"
    with refused(pm.UnsupportedLaw, said):
        biject_to(support)
    with refused(pm.UnsupportedLaw, said):
        AutoNormal(intervened)(sharded)


def test_questions_and_consolidation():
    said = "site 'x' is in plate 'products', which is split over ranks"
    revenue = pm.MacroVariable("revenue", "y", "products")

    def model():
        independent(sharded)

    with refused(pm.UnsupportedLaw, said):
        pm.confounding(model, SALES, revenue, pm.Natural)
    with refused(pm.UnsupportedLaw, said):
        pm.can_inhibit(model, SALES, revenue)
    with refused(pm.UnsupportedLaw, "split over ranks, and what can be fused"):
        pm.consolidate(lambda: confounded(sharded), keep=["x"])()


def test_distributions_that_cannot_be_cut():
    class Odd(dist.TorchDistribution):
        arg_constraints = {}
        support = dist.constraints.real

        def expand(self, batch_shape, _instance=None):
            return Odd(torch.Size(batch_shape))

        def sample(self, sample_shape=()):
            return torch.rand(torch.Size(sample_shape) + self.batch_shape)

    def model():
        with sharded():
            pyro.sample("x", Odd())

    with refused(pm.UnsupportedLaw, "site 'x': Odd in plate", "cannot be drawn block"):
        model()


def test_parameters_that_are_lifted():
    def model():
        with sharded():
            pyro.param("w", torch.zeros(SIZE))

    with refused(pm.PyroMacroError, "parameter 'w' is in sharded plate 'products'"):
        poutine.lift(model, {"w": dist.Normal(torch.zeros(SIZE), 1.0)})()


@pytest.mark.parametrize("size", [0, -1, 2.0, True, "2"])
def test_sizes_that_are_none(size):
    with refused(pm.PyroMacroError, "'products': size is", "positive whole number"):
        pm.sharded_plate("products", size)


def test_a_group_without_torch_distributed():
    with refused(pm.PyroMacroError, "torch.distributed is not initialized"):
        pm.sharded_plate("products", 3, group=object())


def test_use_before_or_outside_of_a_with_statement():
    with refused(pm.PyroMacroError, "its dimension is not known before it is entered"):
        sharded().sum(MEAN)
    with refused(pm.PyroMacroError, "cannot be iterated over"):
        list(sharded())


def test_a_plain_plate_in_the_guide():
    def guide():
        with pyro.plate("products", SIZE, subsample_size=5):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    trace = poutine.trace(guide).get_trace()
    with refused(pm.PyroMacroError, "sharded_plate 'products'", "create_plates="):
        poutine.replay(independent, trace)(sharded)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_draws_under_jit():
    def model():
        with sharded():
            return pyro.sample("x", dist.Normal(MEAN, 1.0))

    with refused(pm.PyroMacroError, "torch.jit cannot trace draws"):
        torch.jit.trace(model, (), check_trace=False)


def test_cases_are_all_allowed():
    """So that the refusals above are not for other reasons."""
    for case in CASES.values():
        pm.macro_do(case.model, {case.macro: pm.Natural(1.0)})(sharded)
    do(shocked, pm.Natural(1.0))
    do(vectors, pm.Natural(1.0))
