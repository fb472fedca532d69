# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Models that make their tensors on torch's default device, which is not the CPU."""

import pyro
import pytest
import torch
from placed_models import CASES, PAIR
from pyro import poutine
from test_consolidation_on_device import KEPT, affine, mixture
from test_questions_on_device import DRAWN, EXACT, tensors_of

import pyro_macro as pm

SOME = [
    "natural",
    "natural, two rows",
    "natural, hierarchy",
    "natural, correlated",
    "natural, low rank",
    "natural, categorical",
    "natural, coarsen",
    "natural, finite confounder",
    "natural, mixture",
    "natural, binomial",
    "residual, confounded",
    "allocate, plate",
    "shift, confounded",
    "inhibiting",
    "inhibiting, finite",
    "even, polytope",
]
ASKED = [
    "verdict",
    "verdict, finite",
    "curves",
    "feasibility",
    "feasibility, finite",
    "adjustment, finite",
    "counterfactual",
    "counterfactual, finite",
]


@pytest.fixture
def default(place_of):
    """A place that is where tensors are made when nobody says where."""
    torch.set_default_dtype(torch.float64)
    place = place_of(torch.float64)
    with torch.device(place.device):
        yield place


@pytest.mark.parametrize("name", SOME)
def test_runs_stay_there(default, name):
    trace = poutine.trace(pm.macro_do(*CASES[name](default))).get_trace()
    assert default.holds(trace.log_prob_sum())


def test_numbers_are_put_there_by_torch(default):
    def shop():
        x1 = pyro.sample("x1", pyro.distributions.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", pyro.distributions.Normal(20.0, 1.0))
        return x1 + x2

    total = pm.macro_do(shop, {PAIR: pm.Natural(33.0)})()
    assert default.holds(total) and total.item() == pytest.approx(33.0)


@pytest.mark.parametrize("name", ASKED)
def test_answers_are_on_the_cpu(default, name):
    found = tensors_of(EXACT[name](default))
    assert all(tensor.device.type == "cpu" for tensor in found.values())


@pytest.mark.parametrize("name", ["verdict", "back-door"])
def test_so_are_answers_by_draws(default, name):
    found = tensors_of(DRAWN[name](default))
    assert all(tensor.device.type == "cpu" for tensor in found.values())


@pytest.mark.parametrize("made", [affine, mixture])
def test_consolidated_models_stay_there(default, made):
    fused = pm.consolidate(made(default), keep=KEPT, allow=["m"])
    assert all(method.startswith("exact") for method in fused.method.values())
    nodes = poutine.trace(fused).get_trace().nodes
    assert default.holds(nodes["y"]["value"])
