# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Two micro-realizations of a total of three positive parts, on their triangle."""

import matplotlib.pyplot as plt
from pictured import crew

import pyro_macro as pm

HOURS = pm.MacroVariable("hours in all", micro="hours", over="people")


def draw():
    figure = plt.figure(figsize=(9.6, 3.8), layout="constrained")
    people = ["Ann, h", "Bob, h", "Cy, h"]
    for i, way in enumerate([pm.Natural(9.0), pm.MaxEntropy(9.0)]):
        ax = figure.add_subplot(1, 2, i + 1, projection="3d")
        pm.plot_fibre(crew, HOURS, way, ax, labels=people)
    return figure
