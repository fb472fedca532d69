# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix C.1: shifts along a direction, and the natural direction."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from shop import ALPHA, SALES, shop

import pyro_macro as pm


def moved(model, realization, sites=("x1", "x2"), name="sales"):
    """By how much each element moves when the macro value moves by delta."""
    nodes = (
        pyro.poutine.trace(
            pm.macro_do(model, {SALES: realization} if name == "sales" else realization)
        )
        .get_trace()
        .nodes
    )
    after = torch.cat([nodes[s]["value"].reshape(-1) for s in sites])
    return after - nodes[f"{name}__micro"]["value"].reshape(-1)


def test_natural_direction_of_the_shop():
    direction = moved(shop, pm.Shift(1.0))
    torch.testing.assert_close(direction, torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(ALPHA @ direction, torch.tensor(1.4))


@pytest.mark.parametrize("along", [(1.0, 0.0), (0.5, 0.5), (-1.0, 2.0)])
def test_structural_coefficient_is_alpha_times_direction(along):
    """beta = alpha . Delta: revenue moves by beta times the shift, draw by draw."""
    trace = pyro.poutine.trace(
        pm.macro_do(shop, {SALES: pm.Shift(2.5, along=along)})
    ).get_trace()
    natural = trace.nodes["sales__micro"]["value"] @ ALPHA
    gap = trace.nodes["revenue"]["value"] - natural
    torch.testing.assert_close(gap, 2.5 * ALPHA @ torch.tensor(along))


def test_natural_direction_of_correlated_sites():
    """S1 / (1'S1), with the confounder integrated out."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(0.5 * z, 3.0))

    covariance = torch.tensor([[5.0, 2.0], [2.0, 10.0]])
    expected = covariance.sum(1) / covariance.sum()
    torch.testing.assert_close(moved(model, pm.Shift(1.0)), expected)
    # Given Z, the sites are independent
    held = torch.tensor([0.1, 0.9])
    torch.testing.assert_close(moved(model, pm.Shift(1.0, given="z")), held)


def test_a_shift_acts_on_the_natural_value():
    """X keeps its dependence on its parents: it is not cut off from them."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 2.0))
        pyro.sample("x1", dist.Normal(z, 1e-3))
        pyro.sample("x2", dist.Normal(2 * z, 1e-3))

    nodes = (
        pyro.poutine.trace(pm.macro_do(model, {SALES: pm.Shift(4.0, along=[0.5, 0.5])}))
        .get_trace()
        .nodes
    )
    z = nodes["z"]["value"]
    assert (nodes["x1"]["value"] - z - 2).abs() < 0.01
    assert (nodes["x2"]["value"] - 2 * z - 2).abs() < 0.01


def test_a_shift_of_a_program_that_interleaves_sites():
    """Parents that come after the first micro site are those of this run."""

    def model():
        z1 = pyro.sample("z1", dist.Normal(0.0, 2.0))
        x1 = pyro.sample("x1", dist.Normal(z1, 1e-3))
        pyro.sample("y1", dist.Normal(x1, 1e-3))
        z2 = pyro.sample("z2", dist.Normal(0.0, 2.0))
        pyro.sample("x2", dist.Normal(z2, 1e-3))

    nodes = (
        pyro.poutine.trace(pm.macro_do(model, {SALES: pm.Proportional(3.0)}))
        .get_trace()
        .nodes
    )
    natural = torch.stack([nodes["z1"]["value"], nodes["z2"]["value"]])
    expected = 3 * natural / natural.sum()
    found = torch.stack([nodes["x1"]["value"], nodes["x2"]["value"]])
    assert (found / expected - 1).abs().max() < 0.05
    assert (nodes["y1"]["value"] - found[0]).abs() < 0.01
