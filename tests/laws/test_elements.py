# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The supports of the elements of a micro state, and where they are likely to be."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import transforms

from pyro_macro.laws.elements import bounds, elements_of
from pyro_macro.program.layout import Layout
from pyro_macro.program.reading import read

INF = math.inf
UNIT = dist.Uniform(0.0, 1.0)
AFFINE = transforms.AffineTransform(3.0, -2.0)


@pytest.mark.parametrize(
    "fn, low, high",
    [
        (dist.Normal(0.0, 1.0), -INF, INF),
        (dist.Gamma(2.0, 1.0), 0.0, INF),
        (dist.Exponential(1.0), 0.0, INF),
        (dist.LogNormal(0.0, 1.0), 0.0, INF),
        (dist.HalfNormal(1.0), 0.0, INF),
        (dist.HalfCauchy(1.0), 0.0, INF),
        (dist.Pareto(2.0, 3.0), 2.0, INF),
        (dist.Weibull(1.0, 2.0), 0.0, INF),
        (dist.Gumbel(0.0, 1.0), -INF, INF),
        (dist.Beta(2.0, 2.0), 0.0, 1.0),
        (dist.Kumaraswamy(2.0, 3.0), 0.0, 1.0),
        (dist.Uniform(-1.0, 3.0), -1.0, 3.0),
        (dist.TransformedDistribution(UNIT, [AFFINE]), 1.0, 3.0),
        (dist.TransformedDistribution(dist.Gamma(2.0, 1.0), [AFFINE]), -INF, 3.0),
        (
            dist.TransformedDistribution(
                dist.Normal(0.0, 1.0), [transforms.SigmoidTransform(), AFFINE]
            ),
            1.0,
            3.0,
        ),
        (
            dist.TransformedDistribution(UNIT, [transforms.ExpTransform(), AFFINE]),
            3 - 2 * math.e,
            1.0,
        ),
    ],
    ids=lambda x: type(x).__name__,
)
def test_supports_have_their_ends(fn, low, high):
    found = bounds(fn, torch.zeros(()))
    torch.testing.assert_close(torch.stack(found), torch.tensor([low, high]))
    draws = fn.sample((1000,))
    assert (draws >= low).all() and (draws <= high).all()


def test_elements_of_sites_and_plates():
    def model():
        pyro.sample("x", dist.Gamma(torch.tensor([2.0, 8.0]), 2.0).to_event(1))
        with pyro.plate("o", 2):
            pyro.sample("y", dist.Uniform(torch.tensor([-1.0, 0.0]), 1.0))
        pyro.sample("z", dist.Cauchy(0.0, 1.0))

    sites = read(model).sites
    micro = {name: sites[name] for name in ("x", "y", "z")}
    found = elements_of(micro, Layout(list(micro.values()), ["o"]), "it")
    assert found.low.tolist() == [0.0, 0.0, -1.0, 0.0, -INF]
    assert found.high.tolist() == [INF, INF, 1.0, 1.0, INF]
    torch.testing.assert_close(
        found.centre[:4], torch.tensor([1.0, 4.0, 0.0, 0.5]), check_dtype=False
    )
    spread = torch.tensor([0.5, 2.0]).sqrt()
    torch.testing.assert_close(found.spread[:2], spread, check_dtype=False)
    # No mean, no variance: some numbers in their place
    assert found.centre.isfinite().all()
    assert found.spread.isfinite().all() and (found.spread > 0).all()
