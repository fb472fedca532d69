# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The models that the pictures are of."""

import pyro
import pyro.distributions as dist
import torch

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["tea", "coffee"])
ALL_SOLD = pm.MacroVariable("sales", micro="sold", over="products")
REVENUE = pm.MacroVariable("revenue", micro="earned", over="products")


def shop():
    """Two products, at prices 1 and 3."""
    tea = pyro.sample("tea", dist.Normal(10.0, 2.0))
    coffee = pyro.sample("coffee", dist.Normal(20.0, 1.0))
    pyro.deterministic("revenue", 1 * tea + 3 * coffee)


def by_advertising(value):
    """More of the second product."""
    return pm.Residual(value, absorb="coffee")


def half_and_half(value):
    return pm.Allocate(value, shares=[0.5, 0.5])


def season():
    """The season acts on what is sold, and on what that brings."""
    season = pyro.sample("season", dist.Normal(0.0, 1.0))
    with pyro.plate("products", 2):
        sold = pyro.sample("sold", dist.Normal(10 + season, 2.0))
        pyro.sample("earned", dist.Normal(3 * sold + season, 1.0))


def crew():
    """Hours that three people work."""
    rates = torch.tensor([2.0, 4.0, 3.0])
    with pyro.plate("people", 3):
        pyro.sample("hours", dist.Gamma(rates, 1.0))


def tool():
    """A tool that wears, and may be renewed."""
    wear = pyro.deterministic("s0", torch.tensor(1.0))
    for t in range(1, 37):
        wear = pyro.deterministic(f"s{t}", 0.95 * wear)
