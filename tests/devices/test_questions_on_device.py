# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Questions about models whose parameters are on a device.

Exact answers are those of the same model on the CPU. Reports are on the CPU.
"""

import dataclasses

import pyro
import pyro.distributions as dist
import pytest
import torch
from placed_models import (
    CASES,
    PAIR,
    VECTOR,
    coins,
    confounded,
    mixed,
    noisy,
    plate,
    shop,
    vector,
)
from torch import Tensor

import pyro_macro as pm

AT = [1.0, 2.0]
FEW = {"num_samples": 20, "progress": False}


def by_second(value):
    return pm.Residual(value, absorb="x2")


def inhibiting(value):
    return pm.Inhibiting(value, "y")


def tensors_of(report):
    """All tensors in a report, by where they are."""
    found = {}

    def collect(thing, where):
        if isinstance(thing, Tensor):
            found[where] = thing
        elif dataclasses.is_dataclass(thing):
            for f in dataclasses.fields(thing):
                collect(getattr(thing, f.name), f"{where}.{f.name}")
        elif isinstance(thing, (tuple, list)):
            for i, part in enumerate(thing):
                collect(part, f"{where}[{i}]")
        elif isinstance(thing, dict):
            collect(list(thing.values()), where)

    collect(report, "")
    return found


EXACT = {
    "verdict": lambda t: pm.confounding(confounded(t), VECTOR, "y", at=AT),
    "verdict, quantiles": lambda t: pm.confounding(confounded(t), VECTOR, "y"),
    "verdict, values on the device": lambda t: pm.confounding(
        confounded(t), VECTOR, "y", at=t(1.0, 2.0)
    ),
    "verdict, residual": lambda t: pm.confounding(noisy(t), PAIR, "y", by_second, AT),
    "verdict, inhibiting": lambda t: pm.confounding(
        noisy(t), PAIR, "y", inhibiting, AT
    ),
    "verdict, plate": lambda t: pm.confounding(
        plate(t), pm.MacroVariable("total", "x", over="k"), "y", at=AT
    ),
    "verdict, given": lambda t: pm.confounding(
        confounded(t), VECTOR, "y", lambda v: pm.Natural(v, given="z"), AT
    ),
    "verdict, finite": lambda t: pm.confounding(coins(t), PAIR, "y"),
    "verdict, finite residual": lambda t: pm.confounding(
        coins(t), PAIR, "y", lambda v: pm.MaxEntropy(v), [0.0, 1.0]
    ),
    "curve": lambda t: pm.dose_response(confounded(t), VECTOR, "y", at=AT),
    "curves": lambda t: pm.dose_response(
        noisy(t), PAIR, "y", {"natural": pm.Natural, "second": by_second}
    ),
    "curve, finite": lambda t: pm.dose_response(coins(t), PAIR, "y"),
    "feasibility": lambda t: pm.can_inhibit(noisy(t), PAIR, "y", AT),
    "feasibility, levers": lambda t: pm.can_inhibit(
        noisy(t), PAIR, "y", AT, levers=["x1", "x2"]
    ),
    "feasibility, finite": lambda t: pm.can_inhibit(coins(t), PAIR, "y"),
    "coefficient": lambda t: pm.structural_coefficient(confounded(t), VECTOR, "y"),
    "coefficient along": lambda t: pm.structural_coefficient(
        confounded(t), VECTOR, "y", along=t(1.0, 0.0, 0.0)
    ),
    "adjustment": lambda t: pm.macro_adjust(confounded(t), VECTOR, "y", "z", AT),
    "adjustment, finite": lambda t: pm.macro_adjust(coins(t), PAIR, "y", "z", [1.0]),
    "back-door": lambda t: pm.blocks_backdoor(confounded(t), VECTOR, "y", "z"),
    "macro model": lambda t: pm.macro_scm_exists(confounded(t), VECTOR, "y", at=AT),
    "macro noise": lambda t: pm.macro_noise(shop(t), PAIR, "y").change(
        pm.Shift(1.0), num_samples=5
    ),
    "shift": lambda t: pm.shift_confounding(confounded(t), VECTOR, "y", 1.0),
    "shifts": lambda t: pm.atomic_from_shifts(confounded(t), VECTOR, "y", at=AT),
    "counterfactual": lambda t: pm.counterfactual(
        shop(t), {PAIR: pm.Natural}, {"x1": 11.0, "x2": 19.0, "y": 70.0}, "y", [33.0]
    ),
    "counterfactual, confounded": lambda t: pm.counterfactual(
        confounded(t),
        {VECTOR: pm.Shift},
        {"x": t(1.0, 2.0, 0.5), "y": t(3.0)},
        "y",
        [1.0],
    ),
    "counterfactual, finite": lambda t: pm.counterfactual(
        coins(t), {PAIR: pm.Natural(1.0)}, {"z": 1.0, "x1": 1.0, "y": 1.0}, "y"
    ),
}
DRAWN = {
    "verdict": lambda t: pm.confounding(
        CASES["natural, gamma"](t)[0], PAIR, "x3", at=AT, **FEW
    ),
    "verdict, residual": lambda t: pm.confounding(
        CASES["natural, gamma"](t)[0], PAIR, "x3", by_second, AT, **FEW
    ),
    "verdict, quantiles": lambda t: pm.confounding(
        mixed(t), PAIR, "y", lambda v: pm.Allocate(v, [0.5, 0.5]), **FEW
    ),
    "verdict, proportional": lambda t: pm.confounding(
        vector(t), VECTOR, "y", pm.Proportional, AT, **FEW
    ),
    "curve": lambda t: pm.dose_response(mixed(t), PAIR, "y", at=AT, **FEW),
    "back-door": lambda t: pm.blocks_backdoor(
        mixed(t), PAIR, "y", "z", num_samples=20, progress=False
    ),
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_answers_are_those_of_the_cpu(fine, name):
    torch.set_default_dtype(torch.float64)
    found, expected = (tensors_of(EXACT[name](t)) for t in (fine, fine.on_cpu()))
    assert found.keys() == expected.keys()
    for where, tensor in found.items():
        assert tensor.device.type == "cpu", where
        if name == "macro noise":
            continue  # of draws
        assert torch.allclose(
            tensor.double(), expected[where].double(), 1e-8, 1e-8, equal_nan=True
        ), where


@pytest.mark.parametrize(
    "name", ["verdict", "verdict, finite", "curves", "feasibility", "adjustment"]
)
def test_so_are_their_words(place, name):
    found, expected = (EXACT[name](t) for t in (place, place.on_cpu()))
    assert str(found) == str(expected) and repr(found) == repr(expected)


@pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
@pytest.mark.parametrize("name", DRAWN)
def test_answers_by_draws_are_on_the_cpu(fine, name):
    torch.set_default_dtype(torch.float64)
    report = DRAWN[name](fine)
    tensors = tensors_of(report)
    assert all(tensor.device.type == "cpu" for tensor in tensors.values())
    assert "Monte Carlo" in str(report)


@pytest.mark.slow
def test_a_model_that_is_drawn_from_one_by_one(fine):
    torch.set_default_dtype(torch.float64)
    one = fine(1.0)

    def adding():
        x1 = pyro.sample("x1", dist.Gamma(one, one))
        x2 = pyro.sample("x2", dist.Gamma(one, one))
        return pyro.sample("y", dist.Normal((x1 * x2).sum(), one))

    report = pm.confounding(adding, PAIR, "y", by_second, AT, **FEW)
    assert report.interventional_mean.device.type == "cpu"


def test_graphs_of_a_model_on_a_device(place):
    graph = pm.micro_graph(confounded(place))
    assert set(graph.edges) == {("z", "x"), ("z", "y"), ("x", "y")}
