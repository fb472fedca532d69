# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The own distributions of sites, stacked: what natural values are drawn from."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

import pyro_macro as pm


def stores():
    """Products over a plate, stores stay: a scalar and a vector site in both."""
    with pyro.plate("stores", 2, dim=-2):
        level = pyro.sample("level", dist.Normal(0.0, 1.0))
        with pyro.plate("products", 3, dim=-1):
            pyro.sample("x", dist.Normal(level, torch.tensor([1.0, 2.0, 3.0])))
            pyro.sample(
                "v",
                dist.MultivariateNormal(
                    level.unsqueeze(-1) * torch.ones(2), torch.eye(2) * 4
                ),
            )


MACRO = pm.MacroVariable("total", ["x", "v"], over="products")


@pytest.mark.parametrize("realization", [pm.Proportional(9.0), pm.Shift(1.0)])
def test_log_density_over_a_plate(realization):
    """One density a store, the product over its elements, given its level."""
    trace = pyro.poutine.trace(pm.macro_do(stores, {MACRO: realization})).get_trace()
    trace.compute_log_prob()
    latent = trace.nodes["total__micro"]
    assert latent["value"].shape == (2, 1, 9)
    level = trace.nodes["level"]["value"]
    x, v = latent["value"][..., 0, :3], latent["value"][..., 0, 3:]
    scale = torch.cat([torch.tensor([1.0, 2.0, 3.0]), torch.full((6,), 2.0)])
    expected = dist.Normal(level, scale).log_prob(torch.cat([x, v], -1)).sum(-1)
    torch.testing.assert_close(latent["log_prob"], expected.unsqueeze(-1))
    assert trace.nodes["x"]["value"].shape == (2, 3)
    assert trace.nodes["v"]["value"].shape == (2, 3, 2)


def test_draws_follow_the_sites():
    """20,000 draws within 5 standard errors, under a plate outside."""
    n = 20_000
    with pyro.plate("draws", n, dim=-3):
        nodes = (
            pyro.poutine.trace(pm.macro_do(stores, {MACRO: pm.Shift(0.0)}))
            .get_trace()
            .nodes
        )
    natural = nodes["total__micro"]["value"] - nodes["level"]["value"].unsqueeze(-1)
    scale = torch.cat([torch.tensor([1.0, 2.0, 3.0]), torch.full((6,), 2.0)])
    assert natural.shape == (n, 2, 1, 9)
    assert (natural.mean(0).abs() < 5 * scale / n**0.5).all()
    assert ((natural.std(0) / scale - 1).abs() < 5 * (0.5 / n) ** 0.5).all()


def test_positive_sites_keep_their_support():
    def model():
        pyro.sample("x1", dist.Gamma(2.0, 1.0))
        pyro.sample("x2", dist.LogNormal(0.0, 1.0))
        pyro.sample("x3", dist.Normal(3.0, 1.0))

    for micro, free in [(["x1", "x2"], 2), (["x1", "x3"], 2)]:
        macro = pm.MacroVariable("total", micro)
        law = (
            pyro.poutine.trace(pm.macro_do(model, {macro: pm.Proportional(5.0)}))
            .get_trace()
            .nodes["total__micro"]["fn"]
        )
        x = law.sample()
        transform = biject_to(law.support)
        unconstrained = transform.inv(x)
        assert unconstrained.shape == (free,)
        torch.testing.assert_close(transform(unconstrained), x)
        assert law.support.check(x)
        assert not law.support.check(-x)


def test_counts_that_are_rescaled_leave_their_support():
    def model():
        pyro.sample("x1", dist.Poisson(2.0))
        pyro.sample("x2", dist.Poisson(3.0))

    macro = pm.MacroVariable("total", ["x1", "x2"])
    with pytest.raises(pm.OffFibre, match="'x[12]' gets the value.*whole numbers only"):
        pm.macro_do(model, {macro: pm.Proportional(5.3)})()


@pytest.mark.parametrize(
    "realization",
    [
        pm.Shift(-9.0, along=[1.0, 0.0]),
        pm.Proportional(-1.0),
        pm.Allocate(-1.0, [0.5, 0.5]),
        pm.Allocate(1.0, [1.5, -0.5]),
        pm.Explicit(-1.0, lambda v: dist.Delta(v.expand(2) / 2, event_dim=1)),
    ],
)
def test_a_value_off_the_support_of_a_site_is_refused(realization):
    def model():
        pyro.sample("x1", dist.Gamma(2.0, 1.0))
        pyro.sample("x2", dist.Gamma(2.0, 1.0))

    macro = pm.MacroVariable("total", ["x1", "x2"])
    with pytest.raises(pm.OffFibre, match="'x[12]' gets the value -.*support Greater"):
        pm.macro_do(model, {macro: realization})()
    pm.macro_do(model, {macro: pm.Shift(1.0, along=[1.0, 0.0])})()
