# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The laws of an effect, seen and set, where they are known exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.laws.moments import Moments, kullback_leibler, two_wasserstein
from pyro_macro.laws.quantity import name_of
from pyro_macro.questions.question import (
    Question,
    Realizing,
    describe,
    is_natural,
)
from pyro_macro.realizations import Realization
from pyro_macro.reports import ConfoundingReport, Outcomes

INHIBITING, INDUCING, UNDECIDED = "inhibiting", "inducing", "undecided"


def exact_laws(
    question: Question, realization: Realizing, instance: Realization, at: Any
) -> Laws | None:
    """``P(Yb | xb)`` and ``P(Yb | do(xb))``, where both are known exactly."""
    for known in (_affine, _finite):
        laws = known(question, realization, instance, at)
        if laws is not None:
            return laws
    return None


@dataclass(frozen=True, eq=False)
class Laws:
    """Both laws at some macro values, and how far they are apart.

    :ivar kind: which distance it is.
    :ivar equal: whether they are the same but for rounding, shape ``(n,)``.
    :ivar tolerance: what counts as rounding, in the units of the distance.
    """

    at: Tensor
    seen: Moments
    done: Moments
    equal: Tensor
    distance: Tensor
    kind: str
    divergence: Tensor
    method: str
    tolerance: float
    observational: Outcomes
    interventional: Outcomes

    def report(self, question: Question, instance: Realization) -> ConfoundingReport:
        question.refuse_nan(torch.cat([self.seen.mean, self.done.mean]))
        verdicts = tuple(INHIBITING if same else INDUCING for same in self.equal)
        shape = Size([len(self.at)]) + question.cut.others["effect"][0].shape
        return ConfoundingReport(
            cause=question.cause.name,
            effect=name_of(question.effect),
            realization=describe(instance),
            at=self.at,
            observational_mean=self.seen.mean.reshape(shape),
            observational_variance=self.seen.variance.reshape(shape),
            interventional_mean=self.done.mean.reshape(shape),
            interventional_variance=self.done.variance.reshape(shape),
            distance=torch.where(self.equal, 0.0, self.distance),
            distance_kind=self.kind,
            divergence=torch.where(self.equal, 0.0, self.divergence),
            verdict=INHIBITING if bool(self.equal.all()) else INDUCING,
            verdicts=verdicts,
            method=self.method,
            tolerance=self.tolerance,
            observational=self.observational,
            interventional=self.interventional,
        )


def _affine(
    question: Question, realization: Realizing, instance: Realization, at: Any
) -> Laws | None:
    affine = question.affine
    if affine is None:
        return None
    within = affine.joint([0]).covariance
    least = 1e-12 * within.diagonal().max()
    if bool((torch.linalg.eigvalsh(within) <= least).any()):
        raise UnsupportedLaw(
            f"{question.what}: its value is the same in every run (or one of several "
            "follows from the others), so that there is no P(effect | cause)."
        )
    at = question.asked(at)
    seen = affine.effect_given(question.spread(at))
    done = affine_done(question, realization, instance, at)
    if done is None:
        return None
    # Coefficients have the precision of the program, arithmetic on them is in float64
    slack, fine = 100 * question.precision, 1e-12
    own = torch.maximum(seen.variance.sum(-1), done.variance.sum(-1))  # (n,)
    total = torch.maximum(own, affine.joint([1]).variance.sum())
    # A natural law has the same mean as the observational one, digit by digit
    mean = 0.0 if is_natural(instance) else seen.mean.abs().sum(-1)
    step = slack * (own.sqrt() + mean) + fine * total.sqrt()
    near = (seen.mean - done.mean).abs().amax(-1) <= step
    apart = (seen.covariance - done.covariance).abs().amax((-1, -2))
    alike = apart <= slack * own + fine * total
    return Laws(
        at,
        seen,
        done,
        near & alike,
        two_wasserstein(seen, done),
        "Wasserstein-2",
        kullback_leibler(done, seen),
        "exact: affine-Gaussian",
        float(step.max()),
        Outcomes(),
        Outcomes(),
    )


def affine_done(
    question: Question, realization: Realizing, instance: Realization, at: Tensor
) -> Moments | None:
    """``P(Yb | do(xb))`` of an affine-Gaussian program, if it is a Gaussian."""
    affine = question.affine
    if affine is None:
        return None
    if is_natural(instance):
        return affine.effect_adjusted(question.spread(at))
    if instance.given or instance.acts_on_natural:
        return None
    parts = [
        affine.effect_under(r.law, r.layout, r.push)
        for r in question.realized(realization, at)
    ]
    return None if None in parts else _joined([p for p in parts if p is not None])


def _joined(parts: list[Moments]) -> Moments:
    return Moments(
        torch.cat([p.mean for p in parts]), torch.cat([p.covariance for p in parts])
    )


def _finite(
    question: Question, realization: Realizing, instance: Realization, at: Any
) -> Laws | None:
    finite = question.finite
    if finite is None or instance.acts_on_natural:
        return None
    at = question.asked(at)
    index = question.index(at)
    at = question.exactly(at, index)
    done = finite_done(question, realization, instance, at)
    if done is None:
        return None
    seen = finite.effect_given(index)
    eps = question.precision
    ratio = (done / seen.clamp(min=1e-300)).clamp(min=1e-300).log()
    divergence = torch.where(done > 0, done * ratio, 0.0)
    divergence = torch.where((seen <= 0) & (done > eps), torch.inf, divergence).sum(-1)
    values = finite.effects[:, 0] if finite.effects.shape[1] == 1 else None
    apart = (seen - done).abs().sum(-1) / 2
    return Laws(
        at,
        finite.moments(seen),
        finite.moments(done),
        apart <= eps**0.6,
        apart,
        "total variation",
        divergence.clamp(min=0),
        "exact: finite",
        eps**0.6,
        Outcomes(values, seen),
        Outcomes(values, done),
    )


def finite_done(
    question: Question, realization: Realizing, instance: Realization, at: Tensor
) -> Tensor | None:
    """``P(yb | do(xb))`` of a finite program, shape ``(n, Y)``, if it is known."""
    finite = question.finite
    if finite is None or instance.acts_on_natural:
        return None
    index = question.index(at)
    if is_natural(instance) and instance.given:
        return finite.effect_adjusted(index)
    if is_natural(instance):
        return finite.effect_under(finite.natural(index))
    if instance.given:
        return None
    weights = [
        finite.weights_of(r.law, r.layout, r.push)
        for r in question.realized(realization, at)
    ]
    known = [w for w in weights if w is not None]
    if len(known) < len(weights):
        return None
    return finite.effect_under(torch.cat(known))
