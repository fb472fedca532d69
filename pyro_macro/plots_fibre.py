# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of fibres: all micro states of a macro value, and how one is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.macro import MacroVariable
from pyro_macro.plots import COLORS, axes_of, finished
from pyro_macro.plots_plane import deep_axes, draw_plane
from pyro_macro.questions.fibres import FibreProgram, OnFibre, extent
from pyro_macro.realizations import Realization

GREY, INK = "#999999", "#333333"
FINE = 400  # steps along a line, and across a picture
TALL = 0.16  # the highest density, as a part of the picture
MASSES = (0.5, 0.8, 0.95)  # inside of the contours of the model as it is


def plot_fibre(
    model: Callable[..., Any],
    macro: MacroVariable,
    realization: Realization | Mapping[str, Realization],
    ax: Any = None,
    *,
    labels: Sequence[str] | None = None,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    num_samples: int = 20_000,
    seed: int = 0,
) -> Any:
    """A micro-realization on its fibre, for micro states of two or three elements.

    The fibre of a macro value is the set of the micro states that have it (Definition 4
    of *Meaningful Causal Aggregation and Paradoxical Confounding*). Of two elements it
    is a line, with the density standing on it, over contours that hold 50, 80 and 95 %
    of the model as it is. Of three it is a plane, or a triangle where the elements are
    positive, with the density as its colour. States that have a probability each are
    points, the larger the more probable. Densities are exact where they are known, and
    otherwise estimated from draws, which the legend then says.

    :param model: the model; it is run on ``model_args`` and ``model_kwargs``.
    :param macro: a macro-variable that is a weighted sum of its elements.
    :param realization: with its macro value; for two elements also several, by name.
    :param ax: axes of matplotlib, three-dimensional ones for three elements; new ones
        by default.
    :param labels: what to write at the axes, one for each element, for instance with
        units; by default the names of the elements.
    :param num_samples: the number of draws.
    :param seed: of the draws; the random state is left as it was.
    :returns: the axes.
    :raises UnsupportedLaw: if the micro state has another number of elements, or the
        macro value is no weighted sum, or not the same in all draws.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     pyro.sample("x2", dist.Normal(20.0, 1.0))
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> ways = {"A": pm.Natural(33.0), "B": pm.Residual(33.0, absorb="x2")}
    >>> axes = pm.plot_fibre(shop, sales, ways, labels=["tea, kg", "coffee, kg"])
    >>> axes.get_xlabel(), axes.get_legend_handles_labels()[1]
    ('tea, kg', ['the model as it is', 'sales = 33', 'A', 'B'])
    """
    ways = _named(realization)
    whole = (model, tuple(model_args), dict(model_kwargs or {}))
    program = FibreProgram(whole, macro, num_samples, seed)
    names = program.elements
    if len(names) not in (2, 3):
        raise UnsupportedLaw(
            f"plot_fibre: {program.what} has a micro state of {len(names)} elements. "
            "Expected 2 or 3, for a picture has no more dimensions."
        )
    if len(ways) > 1 and len(names) == 3:
        raise PyroMacroError(
            f"plot_fibre: {len(ways)} realizations of a micro state of 3 elements. "
            "Expected one, for its density is the colour of the plane: draw each into "
            "axes of its own."
        )
    shown = list(names if labels is None else labels)
    if len(shown) != len(names):
        raise PyroMacroError(
            f"plot_fibre: labels={labels!r}. Expected {len(names)}, for "
            f"{', '.join(names)}."
        )
    found = {name: program.under(way) for name, way in ways.items()}
    if len(names) == 2:
        own, ax = ax is None, axes_of(ax)
        _Lines(program, list(found.values()), ax).draw(found)
        if own:
            figure = ax.get_figure()
            figure.set_size_inches(7.6, 4.4)
            handles = ax.get_legend_handles_labels()
            figure.legend(*handles, frameon=False, loc="outside right center")
        else:
            ax.legend(frameon=False)
    else:
        ax = deep_axes(ax)
        ((name, only),) = found.items()
        draw_plane(program, name, only, ax)
        ax.set_zlabel(shown[2])
    ax.set_xlabel(shown[0])
    ax.set_ylabel(shown[1])
    return ax


def _named(realization: Any) -> dict[str, Realization]:
    named = realization
    if isinstance(realization, Realization):
        named = {type(realization).__name__: realization}
    if (
        not isinstance(named, Mapping)
        or not named
        or not all(isinstance(way, Realization) for way in named.values())
    ):
        raise PyroMacroError(
            f"plot_fibre: realization is {realization!r}. Expected a realization with "
            "its value, such as Natural(33.0), or several by name."
        )
    return {str(name): way for name, way in named.items()}


class _Lines:
    """Fibres of micro states of two elements, and what stands on them."""

    def __init__(
        self, program: FibreProgram, found: Sequence[OnFibre], ax: Any
    ) -> None:
        self.program, self.ax = program, ax
        self.natural = program.natural()
        states = [f.states for f in found if f.states is not None]
        draws = torch.cat([self.natural, *(f.draws for f in found)])
        low, high = extent(draws, program.limits())
        self.low = torch.cat([low.unsqueeze(0), *states]).amin(0)
        self.high = torch.cat([high.unsqueeze(0), *states]).amax(0)
        width = self.high - self.low
        self.equal = 0.2 < float(width[0] / width[1]) < 5
        # At right angles to the lines, as they are seen
        seen = width.min().expand(2) if self.equal else width
        along = torch.stack([program.weights[1], -program.weights[0]]) / seen
        across = torch.stack([-along[1], along[0]]) / along.norm()
        self.across = TALL * across.sum().sign() * across * seen
        tops = [f.highest for f in found if f.density is not None]
        self.tallest = max(tops, default=1.0)

    def draw(self, found: Mapping[str, OnFibre]) -> None:
        ax = self.ax
        self._model()
        for name, value in {f"{f.value:g}": f.value for f in found.values()}.items():
            line, label = (
                self._line(value).numpy(),
                f"{self.program.macro.name} = {name}",
            )
            ax.plot(*line.T, color=INK, lw=1.0, ls=(0, (6, 3)), zorder=2, label=label)
        for color, (name, way) in zip(cycle(COLORS), found.items(), strict=False):
            label = way.labelled(name)
            if way.density is None:
                self._points(way, color, label)
            else:
                self._ridge(way, color, label)
        gap = 0.03 * (self.high - self.low)  # points at an end are seen whole
        ax.set_xlim(float(self.low[0] - gap[0]), float(self.high[0] + gap[0]))
        ax.set_ylim(float(self.low[1] - gap[1]), float(self.high[1] + gap[1]))
        if self.equal:
            ax.set_aspect("equal")
        finished(ax)

    def _line(self, value: float) -> Tensor:
        """As much of a fibre as is within the picture, from end to end: ``(n, 2)``."""
        w, middle = self.program.weights, (self.low + self.high) / 2
        near = middle + w * (value - w @ middle) / w.square().sum()
        along = torch.stack([w[1], -w[0]])
        ends = torch.stack([self.low - near, self.high - near]) / along
        first, last = ends.amin(0).amax(), ends.amax(0).amin()
        steps = torch.linspace(float(first), float(last), FINE, dtype=torch.float64)
        return near + steps.unsqueeze(-1) * along

    def _points(self, way: OnFibre, color: str, label: str) -> None:
        assert way.states is not None and way.probabilities is not None
        areas = (20 + 150 * way.probabilities).numpy()
        self.ax.scatter(*way.states.T.numpy(), s=areas, color=color, lw=0, zorder=5)
        self.ax.plot([], [], "o", color=color, label=label)

    def _ridge(self, way: OnFibre, color: str, label: str) -> None:
        assert way.density is not None
        points = self._line(way.value)
        height = (way.density(points) / self.tallest).clamp(max=1.1)
        ridge = points + height.unsqueeze(-1) * self.across
        ax = self.ax
        outline = torch.cat([ridge, points.flip(0)]).numpy()
        ax.fill(*outline.T, color=color, alpha=0.25, lw=0, zorder=3)
        there = (height > 0.01).unsqueeze(-1)
        shown = torch.where(there, ridge, torch.nan).numpy()
        ax.plot(*shown.T, color=color, lw=1.8, label=label, zorder=4)

    def _model(self) -> None:
        """What the model does without an intervention."""
        ax, label = self.ax, "the model as it is"
        states, counts = self.natural.unique(dim=0, return_counts=True)
        if len(states) < len(self.natural) / 4:
            areas = (6 + 400 * counts / counts.sum()).numpy()
            ax.scatter(*states.T.numpy(), s=areas, color=GREY, alpha=0.45, lw=0)
            ax.plot([], [], "o", color=GREY, alpha=0.45, label=label)
            return
        grids = [
            torch.linspace(float(low), float(high), 80, dtype=torch.float64)
            for low, high in zip(self.low, self.high, strict=True)
        ]
        draws = self.natural
        width = 1.3 * draws.std(0) * len(draws) ** (-1 / 6)
        x, y = (
            (-0.5 * ((grid.unsqueeze(-1) - draws[:, i]) / width[i]).square()).exp()
            for i, grid in enumerate(grids)
        )
        density = y @ x.mT
        highest_first = density.flatten().sort(descending=True).values
        mass = highest_first.cumsum(0) / highest_first.sum()
        levels = sorted(float(highest_first[(mass < m).sum()]) for m in MASSES)
        ax.contour(
            grids[0].numpy(),
            grids[1].numpy(),
            density.numpy(),
            levels,
            colors=GREY,
            linewidths=0.9,
        )
        ax.plot([], [], color=GREY, lw=0.9, label=label)
