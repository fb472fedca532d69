# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Micro-realizations of one total, on the fibre of two products."""

from pictured import SALES, by_advertising, half_and_half, shop

import pyro_macro as pm

VALUE = 33.0


def draw():
    ways = {
        "Natural": pm.Natural(VALUE),
        "Residual, coffee absorbs": by_advertising(VALUE),
        "Proportional": pm.Proportional(VALUE),
        "Allocate, half and half": half_and_half(VALUE),
    }
    units = ["tea sold, kg", "coffee sold, kg"]
    return pm.plot_fibre(shop, SALES, ways, labels=units).get_figure()
