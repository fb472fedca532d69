# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Shift interventions: what moves everybody by the same (Appendix B)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.laws.gaussian.effect import AffineEffect
from pyro_macro.laws.moments import Moments, kullback_leibler, two_wasserstein
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.exact import Laws
from pyro_macro.questions.feasibility import coefficient
from pyro_macro.questions.question import Question
from pyro_macro.realizations import Shift
from pyro_macro.reports import ConfoundingReport, EffectReport, Outcomes


def shift_confounding(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    delta: float,
    along: Any = None,
    at: Any = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> ConfoundingReport:
    """Whether those who were moved to a macro value are as those who are found there.

    Definition 13: cause and effect are unconfounded under shifts if
    ``P(Yb | Xb + delta = xb) = P(Yb | Xb = xb)``, on the left ``Yb`` after the shift.
    By Lemma 4 that holds for all shifts if and only if ``P(Yb | do(xb)) = P(Yb | xb)``.
    The means differ by ``delta (beta - slope)``, with ``beta`` the structural
    coefficient along the shift and ``slope`` that of the regression: for one variable
    ``Y = a X + N`` by ``-delta Cov(X, N) / Var(X)``.

    :param delta: by how much the macro value is shifted.
    :param along: the direction, as for :class:`~pyro_macro.Shift`.
    :param at: the macro values after the shift.
    :returns: a report, whose interventional law is the one after the shift.
    :raises UnsupportedLaw: if the program is not jointly affine-Gaussian.
    """
    question, affine, beta = _asked(
        model, cause, effect, along, model_args, model_kwargs
    )
    delta = _number(question, delta)
    at = question.asked(at)
    value = question.spread(at)
    seen, before = affine.effect_given(value), affine.effect_given(value - delta)
    done = Moments(before.mean + delta * beta, before.covariance)
    distance = two_wasserstein(seen, done)
    # The gap of the means is in proportion to the shift
    both = affine.joint([0, 1]).variance.sqrt()
    rounding = 100 * question.precision * abs(delta) * both[1:].norm() / both[0]
    rounding = rounding + 1e-14 * seen.mean.abs().max()
    laws = Laws(
        at,
        seen,
        done,
        distance <= rounding,
        distance,
        "Wasserstein-2",
        kullback_leibler(done, seen),
        "exact: affine-Gaussian",
        float(rounding),
        Outcomes(),
        Outcomes(),
    )
    return laws.report(question, Shift(delta, along))


def atomic_from_shifts(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    along: Any = None,
    at: Any = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> EffectReport:
    """The effect of setting the cause, made of shifts (equation 16).

    ``P(Yb | do(xb))`` is the average over ``x'`` of ``P(Yb | Xb = x')`` after a shift
    by ``xb - x'``: everybody is moved to ``xb`` from where they are, along a direction.

    :param along: the direction, as for :class:`~pyro_macro.Shift`.
    :param at: the macro values; by default quantiles of ``P(xb)``.
    :raises UnsupportedLaw: if the program is not jointly affine-Gaussian.
    """
    question, affine, beta = _asked(
        model, cause, effect, along, model_args, model_kwargs
    )
    at = question.asked(at)
    joint = affine.joint([0, 1])
    left = joint.given([0], joint.mean[:1])
    # Averaged over x': what is left of the regression when the shift takes its share
    slope = joint.covariance[1:, 0] / joint.covariance[0, 0] - beta
    mean = joint.mean[1:] + beta * (question.spread(at) - joint.mean[0])
    variance = left.variance + slope.square() * joint.covariance[0, 0]
    return _report(question, at, mean, variance.expand(mean.shape))


def shift_from_atomics(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    delta: Any,
    along: Any = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> EffectReport:
    """The effect of shifting the cause, made of setting it (equation 18).

    ``P(Yb | do(Xb + delta))`` is the average over ``x'`` of setting those with
    ``Xb = x'`` to ``x' + delta``.

    :param delta: one shift or several, shape ``(n,)``.
    :param along: the direction, as for :class:`~pyro_macro.Shift`.
    :returns: a report, whose ``at`` are the shifts.
    :raises UnsupportedLaw: if the program is not jointly affine-Gaussian.
    """
    question, affine, beta = _asked(
        model, cause, effect, along, model_args, model_kwargs
    )
    shifts = question.values(delta)
    joint = affine.joint([0, 1])
    left = joint.given([0], joint.mean[:1])
    slope = joint.covariance[1:, 0] / joint.covariance[0, 0]
    mean = joint.mean[1:] + beta * shifts.unsqueeze(-1)
    variance = left.variance + slope.square() * joint.covariance[0, 0]
    return _report(question, shifts, mean, variance.expand(mean.shape))


def _number(question: Question, delta: Any) -> float:
    try:
        number = float(delta)
    except (TypeError, ValueError):
        number = float("nan")
    if isinstance(delta, str) or not math.isfinite(number):
        raise PyroMacroError(
            f"{question.what}: delta is {delta!r}. Expected one finite number."
        )
    return number


class _Shifted(Question):
    """Definition 13 is about one variable: it stands for itself."""

    single = True


def _asked(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    along: Any,
    model_args: tuple,
    model_kwargs: dict[str, Any] | None,
) -> tuple[Question, AffineEffect, Tensor]:
    """The question, its answer in parts, and the coefficient along the shift."""
    question = _Shifted(model, cause, effect, model_args, model_kwargs)
    affine = question.affine
    if affine is None:
        raise question.unsupported("the effect of a shift")
    return question, affine, coefficient(question, affine, along)


def _report(
    question: Question, at: Tensor, mean: Tensor, variance: Tensor
) -> EffectReport:
    effect = question.cut.others["effect"][0]
    shape = torch.Size([len(at)]) + effect.shape
    return EffectReport(
        cause=question.cause.name,
        effect=effect.name,
        at=at,
        mean=mean.reshape(shape),
        variance=variance.reshape(shape),
        method="exact: affine-Gaussian",
    )
