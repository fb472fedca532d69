# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""SHOP, the running example of the paper, and the dense formulas it is checked with."""

import pyro
import pyro.distributions as dist
import torch

import pyro_macro as pm

ALPHA = torch.tensor([1.0, 3.0], dtype=torch.float64)
MU = torch.tensor([10.0, 20.0], dtype=torch.float64)
VARIANCE = torch.tensor([4.0, 1.0], dtype=torch.float64)
SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
QUERY = 33.0


def shop():
    x1 = pyro.sample("x1", dist.Normal(MU[0], VARIANCE[0].sqrt()))
    x2 = pyro.sample("x2", dist.Normal(MU[1], VARIANCE[1].sqrt()))
    return pyro.deterministic("revenue", ALPHA[0] * x1 + ALPHA[1] * x2)


def law(model, name="sales__micro"):
    """The distribution of the latent site."""
    return pyro.poutine.trace(model).get_trace().nodes[name]["fn"]


def condition(mean, covariance, rows, value):
    """Mean and covariance of a Gaussian given ``rows @ x = value``, densely."""
    crossed = covariance @ rows.mT
    total = rows @ crossed
    gain = torch.linalg.solve(total, crossed.mT).mT
    return mean + gain @ (value - rows @ mean), covariance - gain @ crossed.mT
