# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What is run unseen leaves no trace in the random state of the device."""

import pytest
import torch
from placed_models import CASES, PAIR, VECTOR, coins, confounded, shares, shop

import pyro_macro as pm
from pyro_macro.program.reading import draw, read

FEW = pm.Chains(num_samples=4, warmup_steps=1, num_chains=1, progress=False)
FLOW = pm.Flow(0.5, 1.5, num_draws=50, steps=1, progress=False)


def by_second(value):
    return pm.Residual(value, absorb="x2")


QUESTIONS = {
    "reading": lambda t: read(shop(t)),
    "a private draw": lambda t: draw(torch.distributions.Normal(t(0.0), t(1.0))),
    "graph": lambda t: pm.micro_graph(shop(t)),
    "description": lambda t: pm.macro_do(shop(t), {PAIR: pm.Natural(33.0)}).describe(),
    "description of chains": lambda t: pm.macro_do(
        shares(t), {PAIR: pm.Natural(1.0, sampler=FEW)}
    ).describe(),
    "description of a flow": lambda t: pm.macro_do(
        shares(t), {PAIR: pm.Natural(1.0, sampler=FLOW)}
    ).describe(),
    "verdict": lambda t: pm.confounding(confounded(t), VECTOR, "y", at=[1.0]),
    "verdict by tables": lambda t: pm.confounding(coins(t), PAIR, "y"),
    "verdict by draws": lambda t: pm.confounding(
        CASES["natural, gamma"](t)[0],
        PAIR,
        "x3",
        by_second,
        at=[1.0],
        num_samples=20,
        progress=False,
    ),
    "curve": lambda t: pm.dose_response(confounded(t), VECTOR, "y", at=[1.0]),
    "consolidation": lambda t: pm.consolidate(confounded(t), keep=["z", "y"]),
    "verification": lambda t: pm.verify_consolidation(
        confounded(t), pm.consolidate(confounded(t), keep=["z", "y"]), [{}], draws=30
    ),
}


@pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
@pytest.mark.parametrize("name", QUESTIONS)
def test_it_is_as_it_was(fine, name):
    torch.set_default_dtype(torch.float64)
    fine(1.0).normal_()  # the device is in use
    here, there = torch.get_rng_state(), fine.random_state()
    QUESTIONS[name](fine)
    assert torch.equal(fine.random_state(), there)
    assert torch.equal(torch.get_rng_state(), here)
    torch.randn(2, device=fine.device)
    assert not torch.equal(fine.random_state(), there)
