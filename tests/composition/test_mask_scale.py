# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``mask`` and ``scale``, inside and outside."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    assert_only_added,
    assert_same_gradients,
    assert_same_program,
    market_by_hand_given_z,
    sales_total,
    shop,
    shop_by_hand,
)

GIVEN_Z = {SALES: pm.Natural(33.0, given=["z"])}


# mask


def masked(model, mask):
    def run():
        with poutine.mask(mask=mask):
            return model()

    return run


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_mask_of_a_whole_program(do, where, mask):
    by_hand = masked(shop_by_hand, mask)
    if where == "inside":
        model = do(masked(shop, mask), NATURAL)
    else:
        model = masked(do(shop, NATURAL), mask)
    trace = assert_same_program(model, by_hand)
    hidden = trace.nodes["sales__micro"]["log_prob_sum"] == 0
    assert hidden == (not mask)


def slots(model, mask, outer_mask=None):
    def run(*args):
        with pyro.plate("n", 3, dim=-1), poutine.mask(mask=mask):
            return model(*args)

    return run


MASK = torch.tensor([True, False, True])


def test_mask_outside_hides_slots_of_the_latent_site(do):
    model = slots(do(shop, NATURAL), MASK)
    trace = assert_same_program(model, slots(shop_by_hand, MASK))
    log_prob = trace.nodes["sales__micro"]["log_prob"]
    assert ((log_prob != 0) == MASK).all()


def test_mask_inside_hides_slots_of_the_latent_site(do):
    model = do(slots(shop, MASK), NATURAL)
    trace = assert_same_program(model, slots(shop_by_hand, MASK))
    log_prob = trace.nodes["sales__micro"]["log_prob"]
    assert ((log_prob != 0) == MASK).all()


def test_masks_inside_and_outside_hide_together(do):
    other = torch.tensor([True, True, False])
    trace = assert_same_program(
        masked(do(slots(shop, MASK), NATURAL), other),
        masked(slots(shop_by_hand, MASK), other),
    )
    log_prob = trace.nodes["sales__micro"]["log_prob"]
    assert ((log_prob != 0) == (MASK & other)).all()


def test_mask_of_other_sites_leaves_the_latent_site_alone(do):
    def model():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        with poutine.mask(mask=False):
            pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))

    def by_hand():
        x1 = pyro.sample("x1", dist.Normal(12.4, 0.8**0.5))
        x2 = pyro.deterministic("x2", 33 - x1)
        with poutine.mask(mask=False):
            pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))

    trace = assert_same_program(do(model, NATURAL), by_hand)
    assert trace.nodes["sales__micro"]["log_prob"] != 0


def test_mask_of_elements_of_a_micro_state_is_an_error_that_says_why(do):
    total = pm.MacroVariable("total", micro="x", over="products")

    def model():
        with pyro.plate("products", 3, dim=-1), poutine.mask(mask=MASK):
            pyro.sample("x", dist.Normal(0.0, 1.0))

    with pytest.raises(pm.PyroMacroError, match="'total'.*mask of shape"):
        do(model, {total: pm.Natural(9.0)})()


@pytest.mark.parametrize("which", ["x1", "x2"])
@pytest.mark.parametrize("handler", ["mask", "scale"])
def test_micro_sites_that_are_masked_or_scaled_apart_are_an_error(do, which, handler):
    # The joint density has no part that could be masked or scaled

    def apart(name):
        if name != which:
            return poutine.scale(scale=1.0)
        if handler == "mask":
            return poutine.mask(mask=False)
        return poutine.scale(scale=0.5)

    def model():
        with apart("x1"):
            pyro.sample("x1", dist.Normal(10.0, 2.0))
        with apart("x2"):
            pyro.sample("x2", dist.Normal(20.0, 1.0))

    with pytest.raises(pm.PyroMacroError, match="sales.*(mask|scale)"):
        do(model, NATURAL)()


def test_mask_is_seen_by_aggregate(add):
    for mask in (False, MASK):
        model = slots(shop, mask)
        assert_only_added(add(model, [SALES]), model, sales_total)
        assert_only_added(slots(add(shop, [SALES]), mask), model, sales_total)


def test_mask_of_a_given_cause_leaves_it_held(do):
    def model():
        with poutine.mask(mask=False):
            z = pyro.sample("z", dist.Normal(1.0, 1.5))
        x1 = pyro.sample("x1", dist.Normal(10 + 2 * z, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20 - z, 1.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + 5 * z, 0.5))

    def by_hand():
        trace_of_z = poutine.mask(
            lambda: pyro.sample("z", dist.Normal(1.0, 1.5)), mask=False
        )
        z = trace_of_z()
        with poutine.block(hide=["z"]), poutine.condition(data={"z": z}):
            market_by_hand_given_z()

    assert_same_program(do(model, GIVEN_Z), by_hand)


# scale


def scaled(model, scale):
    def run():
        with poutine.scale(scale=scale):
            return model()

    return run


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_scale_of_a_whole_program(do, where):
    if where == "inside":
        model = do(scaled(shop, 0.3), NATURAL)
    else:
        model = scaled(do(shop, NATURAL), 0.3)
    trace = assert_same_program(model, scaled(shop_by_hand, 0.3))
    site = trace.nodes["sales__micro"]
    assert site["scale"] == 0.3
    torch.testing.assert_close(
        site["log_prob_sum"], 0.3 * site["fn"].log_prob(site["value"])
    )


def test_scales_inside_and_outside_multiply(do):
    model = scaled(do(scaled(shop, 0.5), NATURAL), 3.0)
    trace = assert_same_program(model, scaled(shop_by_hand, 1.5))
    assert trace.nodes["sales__micro"]["scale"] == 1.5


def test_scale_of_other_sites_leaves_the_latent_site_alone(do):
    def model():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        with poutine.scale(scale=0.3):
            pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))

    def by_hand():
        x1 = pyro.sample("x1", dist.Normal(12.4, 0.8**0.5))
        x2 = pyro.deterministic("x2", 33 - x1)
        with poutine.scale(scale=0.3):
            pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))

    trace = assert_same_program(do(model, NATURAL), by_hand)
    assert trace.nodes["sales__micro"]["scale"] == 1.0


def test_scale_leaves_the_law_itself_alone(do):
    # An annealed prior is still the prior: P(X | 33) does not depend on the scale
    trace = poutine.trace(do(scaled(shop, 0.3), NATURAL)).get_trace()
    torch.testing.assert_close(
        trace.nodes["sales__micro"]["fn"].mean, torch.tensor([12.4, 20.6])
    )


def test_scale_acts_on_the_gradients(do):
    def model():
        loc = pyro.param("loc", torch.tensor(10.0))
        x1 = pyro.sample("x1", dist.Normal(loc, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))

    def by_hand():
        loc = pyro.param("loc", torch.tensor(10.0))
        x1 = pyro.sample("x1", dist.Normal(loc + 0.8 * (13 - loc), 0.8**0.5))
        x2 = pyro.deterministic("x2", 33 - x1)
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 0.5))

    assert_same_gradients(do(scaled(model, 0.3), NATURAL), scaled(by_hand, 0.3))
    assert_same_gradients(scaled(do(model, NATURAL), 0.3), scaled(by_hand, 0.3))


def test_scale_is_seen_by_aggregate(add):
    model = scaled(shop, 0.3)
    assert_only_added(add(model, [SALES]), model, sales_total)
    assert_only_added(scaled(add(shop, [SALES]), 0.3), model, sales_total)
