# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of reports."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.reports import (
    PICTURES,
    AdjustmentReport,
    ConfoundingReport,
    CounterfactualReport,
    DoseResponse,
    EffectReport,
    FeasibilityReport,
    Outcomes,
)

# Told apart by colour-blind readers, and in print by their strokes
COLORS = ["#4477AA", "#CC6677", "#228833", "#AA3377", "#CCBB44", "#66CCEE"]
STYLES = ["-", "--", "-.", ":"]
SEEN, DONE, OTHER = "#4477AA", "#CC6677", "#228833"


def axes_of(ax: Any) -> Any:
    """Axes of matplotlib to draw into: new ones, if there are none."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "pictures need matplotlib: pip install 'pyro_macro[demo]'."
        ) from error
    if ax is not None:
        return ax
    return plt.subplots(figsize=(6.4, 4.0), layout="constrained")[1]


def finished(ax: Any) -> Any:
    """The same axes, without what frames them above and on the right."""
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _numbers(at: Tensor, *others: Tensor) -> list[Any]:
    """Macro values in ascending order, and the rest along with them, as arrays."""
    if at.dim() > 1 or any(t.dim() > 1 for t in others):
        raise PyroMacroError(
            "plot: a picture shows one number against one number, and the cause or the "
            "effect has several. Ask about one element."
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
    at, *laws = _numbers(
        report.at,
        report.observational_mean,
        report.observational_variance,
        report.interventional_mean,
        report.interventional_variance,
    )
    ax = axes_of(ax)
    seen = f"seen: P({report.effect} | {report.cause})"
    done = f"set: P({report.effect} | do({report.cause}))"
    if len(at) == 1:
        pairs = [
            (report.observational, (laws[0], laws[1]), SEEN, seen),
            (report.interventional, (laws[2], laws[3]), DONE, done),
        ]
        bins = _bins(report.observational, report.interventional)
        for outcomes, moments, color, label in pairs:
            _distribution(ax, outcomes, moments, (color, label), bins)
        discrete = report.observational.weights is not None
        ax.set_xlabel(report.effect)
        ax.set_ylabel("probability" if discrete else "density")
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])  # room for the legend
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
    return finished(ax)


def _bins(*laws: Outcomes) -> Any:
    """The same bins for both: whole numbers where the draws are."""
    known = [law.draws[0] for law in laws if law.draws is not None]
    if not known:
        return None
    draws = torch.cat(known)
    low, high = float(draws.min()), float(draws.max())
    if bool((draws == draws.round()).all()) and high - low < 100:
        return (torch.arange(low, high + 2, device="cpu") - 0.5).numpy()
    count = min(60, max(8, int(len(known[0]) ** 0.5)))
    return torch.linspace(low, high, count + 1, device="cpu").numpy()


def _distribution(
    ax: Any, outcomes: Outcomes, moments: tuple[Any, Any], look: Any, bins: Any
) -> None:
    color, label = look
    if outcomes.values is not None and outcomes.weights is not None:
        values, weights = outcomes.values.numpy(), outcomes.weights[0].numpy()
        steps = outcomes.values.sort().values.diff()
        gap = float(steps.min()) if len(steps) else 1.0
        move = -0.2 if color == SEEN else 0.2
        ax.bar(values + move * gap, weights, 0.4 * gap, color=color, label=label)
        return
    if outcomes.draws is not None:
        draws = outcomes.draws[0].numpy()
        ax.hist(draws, bins, density=True, color=color, alpha=0.4, label=label)
        return
    mean, spread = float(moments[0][0]), float(moments[1][0].clip(min=0)) ** 0.5
    if spread == 0:
        ax.axvline(mean, color=color, label=label, lw=2)
        return
    line = torch.linspace(mean - 4 * spread, mean + 4 * spread, 200, device="cpu")
    density = torch.distributions.Normal(mean, spread).log_prob(line).exp()
    ax.plot(line.numpy(), density.numpy(), color=color, label=label, lw=1.8)
    ax.fill_between(line.numpy(), density.numpy(), color=color, alpha=0.15, lw=0)


def plot_adjustment(report: AdjustmentReport, ax: Any = None) -> Any:
    """An adjusted effect along the macro values, beside what is seen.

    :param ax: axes of matplotlib; new ones by default.
    :returns: the axes.
    """
    at, *laws = _numbers(
        report.at,
        report.observational_mean,
        report.observational_variance,
        report.mean,
        report.variance,
        report.interventional_mean,
        report.interventional_variance,
    )
    ax = axes_of(ax)
    _band(
        ax, at, (laws[0], laws[1]), SEEN, f"seen: P({report.effect} | {report.cause})"
    )
    names = ", ".join(report.adjustment)
    _band(ax, at, (laws[2], laws[3]), OTHER, f"adjusted for {names}")
    if not report.condition.holds:
        label = f"set: Natural(value, given={names})"
        _band(ax, at, (laws[4], laws[5]), DONE, label)
    ax.set_xlabel(report.cause)
    ax.set_ylabel(report.effect)
    said = "holds" if report.condition.holds else "does not hold"
    ax.set_title(f"adjusted for {names}: condition (15) {said}")
    ax.legend(frameon=False)
    return finished(ax)


def plot_effect(report: EffectReport, ax: Any = None) -> Any:
    """The law of an effect along what the cause is set to, or shifted by.

    :param ax: axes of matplotlib; new ones by default.
    :returns: the axes.
    """
    at, mean, variance = _numbers(report.at, report.mean, report.variance)
    ax = axes_of(ax)
    _band(ax, at, (mean, variance), DONE, report.effect)
    ax.set_xlabel(report.cause)
    ax.set_ylabel(report.effect)
    return finished(ax)


def plot_feasibility(report: FeasibilityReport, ax: Any = None) -> Any:
    """Both sides of (9); in finite programs, how far mixtures stay from the effect.

    :param ax: axes of matplotlib; new ones by default.
    :returns: the axes.
    """
    ax = axes_of(ax)
    said = "a realization inhibits" if report.feasible else "no realization inhibits"
    left, right = report.observational_variance, report.noise_variance
    if left is not None and right is not None:
        names = [f"Var({report.effect} | {report.cause})", "Var(N)"]
        bars = ax.barh(names[::-1], [right, left], color=[DONE, SEEN], height=0.5)
        ax.bar_label(bars, fmt="%.4g", padding=4)
        ax.set_xlim(0, 1.2 * max(left, right))
        ax.set_xlabel("variance")
    else:
        assert report.gap is not None
        at, gap = _numbers(report.at, report.gap)
        ax.bar([f"{value:g}" for value in at], gap, color=DONE, width=0.5)
        ax.set_ylim(0, max(1.2 * float(gap.max()), 0.05))
        ax.set_xlabel(report.cause)
        ax.set_ylabel("total variation left")
    ax.set_title(said)
    return finished(ax)


def plot_dose_response(
    report: DoseResponse, ax: Any = None, *, level: float = 0.8, labels: Any = None
) -> Any:
    """An effect along the macro values, a curve for each realization.

    Means, and around them the band that holds the effect with probability ``level``.

    :param ax: axes of matplotlib; new ones by default.
    :param level: between 0 and 1.
    :param labels: what to write at the axes, for instance with units: a pair, of the
        macro value and of the effect; their names by default.
    :returns: the axes.
    """
    if not isinstance(level, (int, float)) or not 0 < level < 1:
        raise PyroMacroError(f"plot: level is {level!r}. Expected one in (0, 1).")
    ax = axes_of(ax)
    for i, curve in enumerate(report.curves):
        low, high = (curve.quantile((1 + sign * level) / 2) for sign in (-1, 1))
        at, mean, low, high = _numbers(report.at, curve.mean, low, high)
        color, style = COLORS[i % len(COLORS)], STYLES[i % len(STYLES)]
        ax.plot(at, mean, style, color=color, lw=1.8, label=curve.realization)
        ax.fill_between(at, low, high, color=color, alpha=0.16, lw=0)
    cause, effect = labels or (report.cause, report.effect)
    ax.set_xlabel(cause)
    ax.set_ylabel(effect)
    ax.set_title(f"{report.effect} when {report.cause} is set, {level:.0%} bands")
    ax.legend(frameon=False)
    return finished(ax)


def plot_counterfactual(report: CounterfactualReport, ax: Any = None) -> Any:
    """What an effect would have been along what the cause is set to; and what it was.

    With a single macro value, the two whole distributions.

    :param ax: axes of matplotlib; new ones by default.
    :returns: the axes.
    """
    at, mean, variance = _numbers(report.at, report.mean, report.variance)
    was = float(report.factual_mean), float(report.factual_variance) ** 0.5
    cause = report.cause.split(", ")[0]
    ax, would = axes_of(ax), "as it would be"
    if len(at) > 1:
        _band(ax, at, (mean, variance), DONE, would)
        ax.axhline(was[0], color=SEEN, label="as it was", lw=1.8)
        ax.axhspan(was[0] - was[1], was[0] + was[1], color=SEEN, alpha=0.12, lw=0)
        ax.set_xlabel(cause)
        ax.set_ylabel(report.effect)
        ax.set_title(report.realization)
    else:
        first, second = Outcomes(), Outcomes()
        if report.outcomes is not None and report.factual_probabilities is not None:
            values, weights = report.outcomes[:, 0], report.factual_probabilities
            first = Outcomes(values, weights.unsqueeze(0))
            second = Outcomes(values, report.probabilities)
        known = [was[0]], torch.tensor([was[1] ** 2], device="cpu").numpy()
        _distribution(ax, first, known, (SEEN, "as it was"), None)
        _distribution(ax, second, (mean, variance), (DONE, would), None)
        ax.set_xlabel(report.effect)
        ax.set_ylabel("density" if report.outcomes is None else "probability")
        ax.set_ylim(0, 1.25 * ax.get_ylim()[1])  # room for the legend
        ax.set_title(f"{cause}: {report.realization}, {at[0]:g}")
    ax.legend(frameon=False)
    return finished(ax)


PICTURES[DoseResponse] = plot_dose_response
PICTURES[ConfoundingReport] = plot_confounding
PICTURES[AdjustmentReport] = plot_adjustment
PICTURES[EffectReport] = plot_effect
PICTURES[FeasibilityReport] = plot_feasibility
PICTURES[CounterfactualReport] = plot_counterfactual
