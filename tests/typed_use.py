# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What `mypy --strict` says of programs that use the library: nothing.

Checked by `make types`, and never run.
"""

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from typing_extensions import assert_type

import pyro_macro as pm
from pyro_macro.reports import ConfoundingReport, Descriptions, DoseResponse


def shop(weeks: int) -> Tensor:
    tea = pyro.sample("tea", dist.Normal(10.0, 2.0))
    coffee = pyro.sample("coffee", dist.Normal(20.0, 1.0))
    return weeks * torch.as_tensor(tea + 3 * coffee)


def advertise(value: Tensor) -> pm.Realization:
    return pm.Residual(value, absorb="coffee")


def program() -> None:
    sales = pm.MacroVariable("sales", micro=["tea", "coffee"], aggregation=pm.Mean())
    natural = pm.macro_do(shop, {sales: pm.Natural(33.0)})
    assert_type(natural(3), Tensor)
    assert_type(natural.describe(3), Descriptions)
    assert_type(pm.aggregate(shop, [sales])(3), Tensor)

    with pm.macro_do(interventions={sales: pm.Natural(33.0)}):
        shop(3)

    @pm.macro_do(interventions={sales: pm.Allocate(33.0, shares=[0.5, 0.5])})
    def fixed(weeks: int) -> Tensor:
        return shop(weeks)

    assert_type(
        pm.confounding(shop, sales, "revenue", pm.Natural, at=[33.0], model_args=(3,)),
        ConfoundingReport,
    )
    assert_type(
        pm.dose_response(shop, sales, "revenue", {"b": advertise}, model_args=(3,)),
        DoseResponse,
    )
    fused = pm.consolidate(shop, keep="coffee", allow=["tea"], model_args=(3,))
    assert_type(fused, pm.Fused)
    assert_type(fused.equations(), list[str])
    assert bool(pm.verify_consolidation(shop, fused, model_args=(3,)))
    graph = pm.macro_graph(shop, [sales], model_args=(3,))
    assert_type(pm.is_macro_backdoor(graph, "sales", "revenue"), bool)
