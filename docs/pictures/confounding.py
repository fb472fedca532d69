# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""One shop without a confounder, under two micro-realizations."""

import matplotlib.pyplot as plt
from pictured import SALES, by_advertising, shop

import pyro_macro as pm


def draw():
    figure, axes = plt.subplots(
        1, 2, figsize=(9.6, 3.8), layout="constrained", sharey=True
    )
    at = [26.0, 28.0, 30.0, 32.0, 34.0]
    for ax, way in zip(axes, [pm.Natural, by_advertising], strict=True):
        pm.confounding(shop, SALES, "revenue", way, at=at).plot(ax)
        ax.set_xlabel("total sales, kg")
        ax.set_ylabel("revenue, €")
    axes[1].set_ylabel("")
    return figure
