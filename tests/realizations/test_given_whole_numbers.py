# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A macro-variable of sites with whole numbers, given for another one."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm

TABLE = [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]
TOTAL = pm.MacroVariable("total", ["a", "b"])


def model():
    z = pyro.sample("z", dist.Bernoulli(0.4)).long()
    for name in "abcd":
        pyro.sample(name, dist.Categorical(torch.tensor(TABLE)[z]))


@pytest.mark.parametrize("aggregation", [pm.Sum(), pm.Mean(), pm.Max(), pm.Count(1)])
def test_natural_law_given_another_macro_variable_is_that_of_the_joint(aggregation):
    other = pm.MacroVariable("other", ["c", "d"], aggregation=aggregation)
    intervened = pm.macro_do(model, {TOTAL: pm.Natural(2.0, given=other)})
    nodes = pyro.poutine.trace(intervened).get_trace().nodes
    law = nodes["total__micro"]["fn"]
    seen = aggregation(torch.stack([nodes[k]["value"] for k in "cd"]).double())
    table, prior = torch.tensor(TABLE), torch.tensor([0.6, 0.4])
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    joint = table[:, pairs].prod(-1)  # (z, pairs)
    told = joint[:, aggregation(pairs.double()) == seen].sum(-1)
    weight = (prior * told).unsqueeze(-1) * joint
    on_fibre = pairs.sum(-1) == 2
    expected = weight.sum(0)[on_fibre]
    found = law.log_prob(pairs[on_fibre].double()).exp()
    assert torch.allclose(found, expected / expected.sum())
