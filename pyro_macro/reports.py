# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What the library says about a model: small records that print as tables."""

from __future__ import annotations

import html
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError

Row = dict[str, Any]

# How reports are drawn, by kind: whoever can draw one registers here
PICTURES: dict[type, Callable[[Any, Any], Any]] = {}


class Report(ABC):
    """Something that prints as a table, in notebooks too, and turns into pandas.

    A new one owes :meth:`rows`; :meth:`summary` says the most important in words.
    """

    @abstractmethod
    def rows(self) -> list[Row]:
        """The table, each row by names of columns."""

    def summary(self) -> str:
        """What it comes to, in words."""
        return ""

    def plot(self, ax: Any = None) -> Any:
        """A picture.

        :param ax: axes of matplotlib to draw on; new ones by default.
        :returns: the axes.
        :raises ImportError: if matplotlib is missing.
        :raises NotImplementedError: of a report without one.
        """
        if type(self) not in PICTURES:
            raise NotImplementedError(
                f"{type(self).__name__} has no picture: print it."
            )
        return PICTURES[type(self)](self, ax)

    def __str__(self) -> str:
        rows = [{k: _shown(v) for k, v in row.items()} for row in self.rows()]
        if not rows:
            return self.summary()
        widths = {k: max(len(k), *(len(row[k]) for row in rows)) for k in rows[0]}
        lines = ["  ".join(k.rjust(width) for k, width in widths.items())]
        lines += [
            "  ".join(row[k].rjust(width) for k, width in widths.items())
            for row in rows
        ]
        return "\n".join([self.summary(), *lines]).strip("\n")

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        rows = self.rows()
        head = html.escape(self.summary()).replace("\n", "<br>")
        head = f"<p>{head}</p>" if head else ""
        if not rows:
            return head

        def line(cells: Any, tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(_shown(c))}</{tag}>" for c in cells)

        body = "".join(f"<tr>{line(row.values(), 'td')}</tr>" for row in rows)
        return f"{head}<table><tr>{line(rows[0], 'th')}</tr>{body}</table>"

    def to_pandas(self) -> Any:
        """A data frame, a row for each of the table.

        :raises ImportError: if pandas is missing (``pip install pyro_macro[demo]``).
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install 'pyro_macro[demo]'."
            ) from error
        return pandas.DataFrame(self.rows())


def _shown(cell: Any) -> str:
    if isinstance(cell, bool) or cell is None:
        return {True: "yes", False: "no", None: ""}[cell]
    if isinstance(cell, float):
        if 1e5 <= abs(cell) < 1e12:
            return f"{cell:.0f}"
        return f"{cell:.1e}" if 0 < abs(cell) < 1e-4 else f"{cell:.5g}"
    if isinstance(cell, (tuple, list)):
        return f"({', '.join(map(_shown, cell))})"
    return str(cell)


@dataclass(frozen=True)
class Description:
    """How one macro intervention is realized in a program.

    :ivar macro: the name of the macro-variable.
    :ivar realization: the kind of realization.
    :ivar law: the distribution of the micro state.
    :ivar exact: whether it is known exactly.
    :ivar method: how it is known.
    :ivar elements: the number of elements of the micro state.
    :ivar free: the number of free coordinates on the fibre; zero where the law is
        discrete or a point.
    :ivar cost: of a run, in words.
    """

    macro: str
    realization: str
    law: str
    exact: bool
    method: str
    elements: int
    free: int
    cost: str


class Descriptions(Report, Sequence[Description]):
    """The descriptions of several interventions; prints as a table."""

    def __init__(self, items: Sequence[Description]) -> None:
        self._items = tuple(items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def rows(self) -> list[Row]:
        return [asdict(item) for item in self]

    def __str__(self) -> str:
        lines = []
        for row in self.rows():
            width = max(map(len, row))
            pairs = row.items()
            lines.append("\n".join(f"{name:>{width}}  {cell}" for name, cell in pairs))
        return "\n\n".join(lines)


@dataclass(frozen=True, eq=False, repr=False)
class Outcomes:
    """The laws of an effect, one a macro value, for pictures and further questions.

    Either weights on some values, or draws, or neither: then they are normal, with the
    moments of the report.

    :ivar values: shape ``(Y,)``.
    :ivar weights: shape ``(n, Y)``.
    :ivar draws: shape ``(n, N)``.
    """

    values: Tensor | None = None
    weights: Tensor | None = None
    draws: Tensor | None = None


@dataclass(frozen=True, eq=False, repr=False)
class ConfoundingReport(Report):
    """Whether a cause and an effect are confounded under a realization.

    Definitions 6 and 7 of *Meaningful Causal Aggregation and Paradoxical Confounding*.
    Tensors have a row for each of ``n`` macro values, and the shape of the effect
    behind that if it is not a number.

    :ivar cause: the name of the macro-variable.
    :ivar effect: the name of the effect.
    :ivar realization: the name of the micro-realization.
    :ivar at: the macro values, shape ``(n,)``.
    :ivar observational_mean: of the effect given the macro value.
    :ivar observational_variance: the same.
    :ivar interventional_mean: of the effect when the macro value is set.
    :ivar interventional_variance: the same.
    :ivar distance: between the two whole distributions, shape ``(n,)``; zero where
        they agree but for rounding.
    :ivar distance_kind: which one: total variation, or Wasserstein-2 (in units of the
        effect), estimated where the method is Monte Carlo.
    :ivar divergence: Kullback-Leibler, of the interventional law from the observational
        one, in nats; ``None`` where the method is Monte Carlo.
    :ivar verdict: ``"inhibiting"`` if the laws are equal at all macro values,
        ``"inducing"`` if they differ at some, ``"undecided"`` if that is not known.
    :ivar verdicts: the same at each macro value.
    :ivar method: how it is known.
    :ivar tolerance: what counts as rounding, in the units of the distance.
    :ivar p_value: of the two-sample test, where the method is Monte Carlo.
    :ivar detectable: the least shift of the effect, in its units, that the test sees in
        four of five cases.
    :ivar num_samples: the number of draws from each law; zero where none are made.
    """

    cause: str
    effect: str
    realization: str
    at: Tensor
    observational_mean: Tensor
    observational_variance: Tensor
    interventional_mean: Tensor
    interventional_variance: Tensor
    distance: Tensor
    distance_kind: str
    divergence: Tensor | None
    verdict: str
    verdicts: tuple[str, ...]
    method: str
    tolerance: float
    p_value: Tensor | None = None
    detectable: Tensor | None = None
    num_samples: int = 0
    observational: Outcomes = field(default_factory=Outcomes)
    interventional: Outcomes = field(default_factory=Outcomes)

    def summary(self) -> str:
        pair = f"{self.cause} and {self.effect}"
        said = {
            "inhibiting": f"{pair} are not confounded under {self.realization}",
            "inducing": f"{pair} are confounded under {self.realization}",
            "undecided": f"whether {pair} are confounded under {self.realization} "
            "is undecided",
        }[self.verdict]
        return f"{said}: {self.verdict}.\nMethod: {self.method}."

    def rows(self) -> list[Row]:
        columns = {
            "mean given": self.observational_mean,
            "variance given": self.observational_variance,
            "mean under do": self.interventional_mean,
            "variance under do": self.interventional_variance,
            f"{self.distance_kind} distance": self.distance,
        }
        if self.divergence is not None:
            columns["KL divergence"] = self.divergence
        if self.p_value is not None:
            columns["p-value"] = self.p_value
        if self.detectable is not None:
            columns["detectable shift"] = self.detectable
        return table(self.cause, self.at, columns, self.verdicts)


def table(
    name: str, at: Tensor, columns: dict[str, Tensor], verdicts: Sequence[str] = ()
) -> list[Row]:
    """A row for each macro value, and each element of an effect that has several."""
    first = next(iter(columns.values()))
    shape = first.shape[1:]
    count = max(1, shape.numel())
    flat = {k: v.reshape(len(at), -1).expand(-1, count) for k, v in columns.items()}
    rows = []
    for i, value in enumerate(at.tolist()):
        for j in range(count):
            row: Row = {name: tuple(value) if isinstance(value, list) else value}
            if shape:
                row["element"] = _place(j, shape)
            row |= {k: v[i, j].item() for k, v in flat.items()}
            if verdicts:
                row["verdict"] = verdicts[i]
            rows.append(row)
    return rows


def _place(index: int, shape: Sequence[int]) -> Any:
    place = []
    for size in reversed(shape):
        place.append(index % size)
        index //= size
    return tuple(reversed(place)) if len(place) > 1 else place[0]


@dataclass(frozen=True, eq=False, repr=False)
class FeasibilityReport(Report):
    """Whether some micro-realization inhibits the confounding (section 3.2.1).

    :ivar at: the macro values, shape ``(n,)``.
    :ivar feasible: whether there is one at all of them.
    :ivar feasible_at: at each of them.
    :ivar observational_variance: ``Var(Yb | xb)``, left of (9); ``None`` if finite.
    :ivar noise_variance: ``Var(N)``, right of (9); ``None`` if finite.
    :ivar distance: of the least intrusive one from the natural realization, shape
        ``(n,)``; NaN where there is none. With levers, from what they would be given
        the other sites and the macro value.
    :ivar distance_kind: Wasserstein-2, or total variation.
    :ivar levers: the sites that are moved; ``None`` for all.
    :ivar reason: why there is none, in words.
    :ivar method: how it is known.
    :ivar gap: in finite programs, how far the closest mixture of micro states stays
        from ``P(Yb | xb)``, in total variation, shape ``(n,)``.
    :ivar outcomes: in finite programs, the values of the effect, shape ``(Y,)``.
    :ivar certificates: for each macro value where there is none, a function of the
        outcome, ``(Y,)``, whose mean given the macro value is larger than under each
        micro state.
    """

    cause: str
    effect: str
    at: Tensor
    feasible: bool
    feasible_at: tuple[bool, ...]
    observational_variance: float | None
    noise_variance: float | None
    distance: Tensor
    distance_kind: str
    levers: tuple[Any, ...] | None
    reason: str
    method: str
    gap: Tensor | None = None
    outcomes: Tensor | None = None
    certificates: tuple[Tensor | None, ...] = ()

    @property
    def norms(self) -> tuple[float, float] | None:
        """Both sides of (10): the square roots of those of (9)."""
        if self.observational_variance is None or self.noise_variance is None:
            return None
        return self.observational_variance**0.5, self.noise_variance**0.5

    def summary(self) -> str:
        pair = f"{self.cause} and {self.effect}"
        by = "" if self.levers is None else f" that moves {list(self.levers)}"
        lines = [
            f"{'A' if self.feasible else 'No'} micro-realization{by} inhibits the "
            f"confounding of {pair}."
        ]
        left, right = self.observational_variance, self.noise_variance
        if left is not None and right is not None and not self.reason:
            sign = ">=" if left >= right else "<"
            lines.append(
                f"(9): Var({self.effect} | {self.cause}) = {left:.5g} {sign} Var(N) = "
                f"{right:.5g}."
            )
        if self.reason:
            lines.append(self.reason)
        lines.append(f"Method: {self.method}.")
        return "\n".join(lines)

    def rows(self) -> list[Row]:
        moved = "from natural" if self.levers is None else "of the levers"
        columns = {f"{self.distance_kind} distance {moved}": self.distance}
        if self.gap is not None:
            columns["gap"] = self.gap
        rows = table(self.cause, self.at, columns)
        return [
            row | {"feasible": known}
            for row, known in zip(rows, self.feasible_at, strict=True)
        ]


@dataclass(frozen=True, eq=False, repr=False)
class ScmReport(Report):
    """Whether a causal model of the macro-variables explains both regimes (App. D).

    :ivar at: the macro values, shape ``(n,)``.
    :ivar exists: whether there is one, as far as these macro values tell.
    :ivar exists_at: at each of them.
    :ivar excess: in finite programs, by how much ``P(xb, yb)`` exceeds
        ``P(yb | do(xb))``, at most, shape ``(n,)``; otherwise the observational
        variance where setting the macro value leaves none.
    :ivar linear: in affine-Gaussian programs, the linear model ``Yb = beta xb + U``
        that explains both regimes, if one does: ``beta``, ``Var(U)``,
        ``Cov(xb, U)``.
    :ivar method: how it is known.
    """

    cause: str
    effect: str
    realization: str
    at: Tensor
    exists: bool
    exists_at: tuple[bool, ...]
    excess: Tensor
    linear: dict[str, float] | None
    method: str

    def summary(self) -> str:
        said = "A" if self.exists else "No"
        lines = [
            f"{said} causal model of {self.cause} and {self.effect} explains what is "
            f"seen and what happens under {self.realization}."
        ]
        if self.linear is not None:
            shown = ", ".join(f"{k} = {v:.5g}" for k, v in self.linear.items())
            lines.append(
                f"A linear one: {self.effect} = beta {self.cause} + U, {shown}."
            )
        lines.append(f"Method: {self.method}.")
        return "\n".join(lines)

    def rows(self) -> list[Row]:
        rows = table(self.cause, self.at, {"excess": self.excess})
        return [
            row | {"explained": known}
            for row, known in zip(rows, self.exists_at, strict=True)
        ]


@dataclass(frozen=True, eq=False, repr=False)
class IndependenceReport(Report):
    """Whether a conditional independence holds.

    :ivar statement: in words.
    :ivar holds: whether it does; ``None`` if a test has not rejected it.
    :ivar deviation: how far it is from holding. In affine-Gaussian programs the largest
        conditional correlation; for condition (15) the largest conditional covariance
        with an element of the micro state, relative to the terms it is the difference
        of. In finite programs the largest total variation distance between joint law
        and product; where it is tested, the largest distance correlation.
    :ivar method: how it is known.
    :ivar p_value: of the test, where the method is Monte Carlo.
    """

    statement: str
    holds: bool | None
    deviation: float
    method: str
    p_value: float | None = None

    def __bool__(self) -> bool:
        if self.holds is None:
            raise ValueError(
                f"a test has not rejected that {self.statement}, which does not show "
                "that it holds. Look at .p_value and .deviation."
            )
        return self.holds

    def summary(self) -> str:
        said = {
            True: f"It holds that {self.statement}.",
            False: f"It is not the case that {self.statement}.",
            None: f"It is not rejected, nor shown, that {self.statement}.",
        }[self.holds]
        return f"{said}\nMethod: {self.method}."

    def rows(self) -> list[Row]:
        row: Row = {"holds": self.holds, "deviation": self.deviation}
        return [row if self.p_value is None else row | {"p-value": self.p_value}]


@dataclass(frozen=True, eq=False, repr=False)
class AdjustmentReport(Report):
    """The effect of a macro-variable by back-door adjustment (Theorem 4.1).

    Tensors have a row for each of ``n`` macro values, and the shape of the effect
    behind that if it is not a number.

    :ivar adjustment: the names of what is adjusted for.
    :ivar at: the macro values, shape ``(n,)``.
    :ivar mean: of ``sum_b P(Yb | xb, b) P(b)``, the adjusted effect.
    :ivar variance: the same.
    :ivar observational_mean: of ``P(Yb | xb)``, without adjustment.
    :ivar observational_variance: the same.
    :ivar interventional_mean: of ``P(Yb | do(xb))`` under ``Natural(xb, given=b)``,
        which is the adjusted effect if the condition holds.
    :ivar interventional_variance: the same.
    :ivar condition: (15), ``Yb`` with ``X`` set is independent of ``X`` given ``b``.
    :ivar method: how it is known.
    """

    cause: str
    effect: str
    adjustment: tuple[str, ...]
    at: Tensor
    mean: Tensor
    variance: Tensor
    observational_mean: Tensor
    observational_variance: Tensor
    interventional_mean: Tensor
    interventional_variance: Tensor
    condition: IndependenceReport
    method: str

    def summary(self) -> str:
        said = "holds" if self.condition.holds else "does not hold"
        return (
            f"The effect of {self.cause} on {self.effect}, adjusted for "
            f"{list(self.adjustment)}; condition (15) {said}.\nMethod: {self.method}."
        )

    def rows(self) -> list[Row]:
        columns = {
            "mean": self.mean,
            "variance": self.variance,
            "mean given": self.observational_mean,
            "variance given": self.observational_variance,
            "mean under do": self.interventional_mean,
            "variance under do": self.interventional_variance,
        }
        return table(self.cause, self.at, columns)


@dataclass(frozen=True, eq=False, repr=False)
class EffectReport(Report):
    """The law of an effect, for each of ``n`` interventions.

    :ivar at: what the cause is set to, or shifted by, shape ``(n,)``.
    :ivar mean: of the effect, with its shape behind ``n``.
    :ivar variance: the same.
    :ivar method: how it is known.
    """

    cause: str
    effect: str
    at: Tensor
    mean: Tensor
    variance: Tensor
    method: str

    def summary(self) -> str:
        return f"The effect of {self.cause} on {self.effect}.\nMethod: {self.method}."

    def rows(self) -> list[Row]:
        columns = {"mean": self.mean, "variance": self.variance}
        return table(self.cause, self.at, columns)


@dataclass(frozen=True, eq=False, repr=False)
class Curve:
    """One realization's effect along the macro values.

    :ivar realization: its name.
    :ivar mean: of the effect, shape ``(n,)`` and then its own.
    :ivar variance: the same.
    :ivar method: how it is known.
    :ivar outcomes: the whole laws; ``None`` of an effect of several numbers that is not
        normal.
    """

    realization: str
    mean: Tensor
    variance: Tensor
    method: str
    outcomes: Outcomes | None

    def quantile(self, level: float) -> Tensor:
        """A quantile of the effect at each macro value, shape of the mean.

        :param level: between 0 and 1.
        """
        if isinstance(level, bool) or not isinstance(level, (int, float)):
            raise PyroMacroError(f"quantile: level is {level!r}. Expected a number.")
        if not 0 <= level <= 1:
            raise PyroMacroError(f"quantile: level is {level}. Expected one in [0, 1].")
        laws = self.outcomes
        if laws is None:
            raise PyroMacroError(
                f"quantile: the effect has {self.mean[0].numel()} numbers, of which "
                "moments alone are kept. Ask about one of them."
            )
        if laws.draws is not None:
            return laws.draws.double().quantile(level, dim=-1)
        if laws.values is not None and laws.weights is not None:
            values, order = laws.values.sort()
            steps = laws.weights[:, order].double().cumsum(-1)
            reached = steps >= level * steps[:, -1:] - 1e-12
            return values[reached.int().argmax(-1)]
        step = torch.special.ndtri(
            torch.tensor(level, dtype=torch.float64, device="cpu")
        )
        return self.mean + step * self.variance.clamp(min=0).sqrt()


@dataclass(frozen=True, eq=False, repr=False)
class DoseResponse(Report):
    """What setting a macro-variable does to an effect, by realization.

    :ivar cause: the name of the macro-variable.
    :ivar effect: the name of the effect.
    :ivar at: the macro values, shape ``(n,)``.
    :ivar curves: one for each realization.
    """

    cause: str
    effect: str
    at: Tensor
    curves: tuple[Curve, ...]

    def __getitem__(self, realization: str) -> Curve:
        for curve in self.curves:
            if curve.realization == realization:
                return curve
        known = [curve.realization for curve in self.curves]
        raise KeyError(f"{realization!r}: expected one of {known}.")

    def summary(self) -> str:
        lines = [f"What setting {self.cause} does to {self.effect}."]
        lines += [f"{curve.realization}: {curve.method}." for curve in self.curves]
        return "\n".join(lines)

    def rows(self) -> list[Row]:
        rows: list[Row] = []
        for curve in self.curves:
            columns = {"mean": curve.mean, "variance": curve.variance}
            for row in table(self.cause, self.at, columns):
                rows.append({"realization": curve.realization, **row})
        return rows


@dataclass(frozen=True, eq=False, repr=False)
class CounterfactualReport(Report):
    """What an effect would have been in a unit that was seen.

    Of several effects, or one that has a shape, all ``m`` numbers have a joint law.

    :ivar cause: the name of the macro-variable, or of several.
    :ivar effect: the name of the effect, or of several.
    :ivar realization: how the cause is set.
    :ivar at: what the cause is set to, or shifted by, shape ``(n,)``.
    :ivar elements: what the ``m`` numbers are called.
    :ivar factual_mean: of the effect as it was, given what was seen: what was seen
        itself, if it was. Of the shape of the effect; ``(m,)`` of several.
    :ivar factual_variance: the same; zero where the effect is known.
    :ivar mean: of the effect as it would have been, with ``n`` in front.
    :ivar variance: the same.
    :ivar covariance: shape ``(n, m, m)``; ``None`` for more than 1,000 numbers. In
        affine-Gaussian programs the law is normal, singular where part of it is known.
    :ivar outcomes: in finite programs, the values that the effect may have, shape
        ``(Y, m)``.
    :ivar factual_probabilities: of these, as it was, shape ``(Y,)``.
    :ivar probabilities: of these, as it would have been, shape ``(n, Y)``.
    :ivar method: how it is known.
    """

    cause: str
    effect: str
    realization: str
    at: Tensor
    elements: tuple[str, ...]
    factual_mean: Tensor
    factual_variance: Tensor
    mean: Tensor
    variance: Tensor
    covariance: Tensor | None
    method: str
    outcomes: Tensor | None = None
    factual_probabilities: Tensor | None = None
    probabilities: Tensor | None = None

    def summary(self) -> str:
        return (
            f"What {self.effect} would have been in this unit under "
            f"{self.realization} of {self.cause}.\nMethod: {self.method}."
        )

    def rows(self) -> list[Row]:
        cause = self.cause.split(", ")[0]
        if self.outcomes is not None:
            return self._of_outcomes(cause)
        was = self.factual_mean.reshape(-1), self.factual_variance.reshape(-1)
        n = len(self.at)
        would = self.mean.reshape(n, -1), self.variance.reshape(n, -1)
        rows = []
        for i, value in enumerate(self.at.tolist()):
            for j, name in enumerate(self.elements):
                each = isinstance(value, list) and len(value) == len(self.elements)
                row: Row = {cause: value[j] if each else value}
                row |= {"effect": name} if len(self.elements) > 1 else {}
                row["as it was"], row["variance"] = (t[j].item() for t in was)
                row["as it would be"], row["its variance"] = (
                    t[i, j].item() for t in would
                )
                rows.append(row)
        return rows

    def _of_outcomes(self, cause: str) -> list[Row]:
        was, would = self.factual_probabilities, self.probabilities
        assert self.outcomes is not None and was is not None and would is not None
        rows = []
        for i, value in enumerate(self.at.tolist()):
            for k, outcome in enumerate(self.outcomes.tolist()):
                row: Row = {cause: value}
                row |= dict(zip(self.elements, outcome, strict=True))
                row["P as it was"] = was[k].item()
                row["P as it would be"] = would[i, k].item()
                rows.append(row)
        return rows
