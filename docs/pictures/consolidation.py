# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A tool that wears and is renewed, before and after consolidation."""

import matplotlib.pyplot as plt
from pictured import tool

import pyro_macro as pm


def draw():
    figure, axes = plt.subplots(
        2, 1, figsize=(9.6, 3.9), layout="constrained", height_ratios=[1, 2]
    )
    fused = pm.consolidate(tool, keep=["s36"], allow=["s12", "s24"])
    fused.plot(axes)
    return figure
