# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_macro.reports import AdjustmentReport, ConfoundingReport, Outcomes

SEEN, DONE, OTHER = "#4477AA", "#CC6677", "#228833"


def _axes(ax: Any) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'pyro_macro[demo]'."
        ) from error
    if ax is not None:
        return ax
    return plt.subplots(figsize=(6.4, 4.0), layout="constrained")[1]


def _numbers(at: Tensor, *others: Tensor) -> list[Any]:
    """Macro values in ascending order, and the rest along with them, as arrays."""
    if at.dim() > 1 or any(t.dim() > 1 for t in others):
        raise ValueError(
            "a picture shows one number against one number. Choose one element of the "
            "cause or the effect."
        )
    order = at.argsort()
    return [t[order].detach().cpu().numpy() for t in (at, *others)]


def _band(ax: Any, at: Any, law: tuple[Any, Any], color: str, label: str) -> None:
    """A mean, and one standard deviation on either side."""
    mean, variance = law
    spread = variance.clip(min=0) ** 0.5
    ax.plot(at, mean, color=color, label=label, marker="o", markersize=4, lw=1.8)
    if len(at) > 1:
        ax.fill_between(at, mean - spread, mean + spread, color=color, alpha=0.18, lw=0)
    else:
        ax.errorbar(at, mean, spread, color=color, capsize=4)


def plot_confounding(report: ConfoundingReport, ax: Any = None) -> Any:
    """Both laws of an effect along the macro values.

    Means, and one standard deviation on either side. With a single macro value, the two
    whole distributions.

    :param ax: axes of matplotlib; new ones by default.
    :returns: the axes.
    """
    ax = _axes(ax)
    at, *laws = _numbers(
        report.at,
        report.observational_mean,
        report.observational_variance,
        report.interventional_mean,
        report.interventional_variance,
    )
    seen = f"seen: P({report.effect} | {report.cause})"
    done = f"set: P({report.effect} | do({report.cause}))"
    if len(at) == 1:
        pairs = [
            (report.observational, (laws[0], laws[1]), SEEN, seen),
            (report.interventional, (laws[2], laws[3]), DONE, done),
        ]
        for outcomes, moments, color, label in pairs:
            _distribution(ax, outcomes, moments, color, label)
        ax.set_xlabel(report.effect)
        ax.set_ylabel("probability")
        ax.set_title(
            f"{report.cause} = {at[0]:g}, {report.realization}: {report.verdict}"
        )
    else:
        _band(ax, at, (laws[0], laws[1]), SEEN, seen)
        _band(ax, at, (laws[2], laws[3]), DONE, done)
        ax.set_xlabel(report.cause)
        ax.set_ylabel(report.effect)
        ax.set_title(f"{report.realization}: {report.verdict}")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _distribution(
    ax: Any, outcomes: Outcomes, moments: tuple[Any, Any], color: str, label: str
) -> None:
    if outcomes.values is not None and outcomes.weights is not None:
        values, weights = outcomes.values.numpy(), outcomes.weights[0].numpy()
        gap = (
            float(outcomes.values.sort().values.diff().min()) if len(values) > 1 else 1
        )
        move = -0.2 if color == SEEN else 0.2
        ax.bar(values + move * gap, weights, 0.4 * gap, color=color, label=label)
        return
    if outcomes.draws is not None:
        draws = outcomes.draws[0].numpy()
        ax.hist(draws, 50, density=True, color=color, alpha=0.4, label=label)
        return
    mean, spread = float(moments[0][0]), float(moments[1][0].clip(min=0)) ** 0.5
    if spread == 0:
        ax.axvline(mean, color=color, label=label, lw=2)
        return
    line = torch.linspace(mean - 4 * spread, mean + 4 * spread, 200)
    density = torch.distributions.Normal(mean, spread).log_prob(line).exp()
    ax.plot(line.numpy(), density.numpy(), color=color, label=label, lw=1.8)
    ax.fill_between(line.numpy(), density.numpy(), color=color, alpha=0.15, lw=0)


def plot_adjustment(report: AdjustmentReport, ax: Any = None) -> Any:
    """An adjusted effect along the macro values, beside what is seen.

    :param ax: axes of matplotlib; new ones by default.
    :returns: the axes.
    """
    ax = _axes(ax)
    at, *laws = _numbers(
        report.at,
        report.observational_mean,
        report.observational_variance,
        report.mean,
        report.variance,
        report.interventional_mean,
    )
    _band(
        ax, at, (laws[0], laws[1]), SEEN, f"seen: P({report.effect} | {report.cause})"
    )
    names = ", ".join(report.adjustment)
    _band(ax, at, (laws[2], laws[3]), OTHER, f"adjusted for {names}")
    if not report.condition.holds:
        ax.plot(at, laws[4], color=DONE, ls="--", label="under do: (15) does not hold")
    ax.set_xlabel(report.cause)
    ax.set_ylabel(report.effect)
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
