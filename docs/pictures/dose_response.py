# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Revenue along total sales, by micro-realization."""

import torch
from pictured import SALES, by_advertising, half_and_half, shop

import pyro_macro as pm


def draw():
    ways = {
        "Natural": pm.Natural,
        "Residual, coffee absorbs": by_advertising,
        "Proportional": pm.Proportional,
        "Allocate, half and half": half_and_half,
    }
    at = torch.linspace(24.0, 36.0, 13)
    report = pm.dose_response(shop, SALES, "revenue", ways, at=at, progress=False)
    ax = pm.plot_dose_response(report, labels=("total sales, kg", "revenue, €"))
    return ax.get_figure()
