# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""One total, and what setting it does, by micro-realization: the README's picture."""

import matplotlib.pyplot as plt
import torch
from pictured import SALES, by_advertising, half_and_half, shop

import pyro_macro as pm
from pyro_macro.plots import COLORS

WAYS = {
    "as found in nature": pm.Natural,
    "advertise coffee": by_advertising,
    "half and half": half_and_half,
}
VALUE = 33.0


def draw():
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9.6, 4.2), layout="constrained", width_ratios=[1, 1.15]
    )
    ways = {name: way(VALUE) for name, way in WAYS.items()}
    units = ["tea sold, kg", "coffee sold, kg"]
    pm.plot_fibre(shop, SALES, ways, left, labels=units)
    left.get_legend().remove()
    left.set_title("Set total sales to 33 kg: which 33?")
    left.text(4.0, 29.6, "tea + coffee = 33", color="#333333")
    left.text(10.0, 16.7, "sales as they are", color="#777777", ha="center")

    effect = pm.dose_response(shop, SALES, "revenue", WAYS, at=[VALUE])
    x = torch.linspace(52.0, 96.0, 500)
    for color, curve in zip(COLORS, effect.curves, strict=False):
        mean, spread = float(curve.mean), float(curve.variance) ** 0.5
        label = f"{curve.realization}: {mean:.1f}"
        if spread == 0:
            right.plot([mean, mean], [0, 0.22], color=color, lw=2.4)
            right.text(mean - 0.5, 0.2, label, color=color, ha="right")
            continue
        density = torch.distributions.Normal(mean, spread).log_prob(x).exp()
        right.plot(x, density, color=color, lw=1.8)
        right.fill_between(x, density, color=color, alpha=0.25, lw=0)
        right.text(mean + 0.9 * spread, float(density.max()) * 0.86, label, color=color)
    right.set(xlim=(52, 96), ylim=(0, 0.25), yticks=[], xlabel="revenue, €")
    right.set_title("What that does to revenue")
    right.spines[["left", "top", "right"]].set_visible(False)
    return figure
