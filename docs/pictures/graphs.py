# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""An amalgamated graph, before and after a macro intervention."""

import matplotlib.pyplot as plt
from pictured import ALL_SOLD, REVENUE, season

import pyro_macro as pm


def draw():
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 3.6), layout="constrained")
    macros = [ALL_SOLD, REVENUE]
    before = pm.amalgamated_graph(season, macros)
    after = pm.intervention_graph(season, macros, on="sales")
    pm.render(before, "matplotlib", title="amalgamated graph", ax=axes[0])
    pm.render(after, "matplotlib", title="after do(sales)", ax=axes[1])
    return figure
