# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Confounded or not: ``P(Yb | xb)`` against ``P(Yb | do(xb))``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.handlers import macro_do
from pyro_macro.laws.cut import over_grid
from pyro_macro.laws.moments import Moments, kullback_leibler, root, two_wasserstein
from pyro_macro.laws.quantity import name_of
from pyro_macro.laws.sampled.chains import SampledLaw
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.conditioning import given_total
from pyro_macro.questions.question import (
    QUANTILES,
    Question,
    Realizing,
    describe,
    is_natural,
)
from pyro_macro.questions.sampling import Sampler
from pyro_macro.questions.two_sample import compare
from pyro_macro.realizations import Natural, Realization
from pyro_macro.reports import ConfoundingReport, Outcomes

INHIBITING, INDUCING, UNDECIDED = "inhibiting", "inducing", "undecided"


def confounding(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    realization: Realizing = Natural,
    at: Any = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    num_samples: int = 2000,
    level: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> ConfoundingReport:
    """Whether a cause and an effect are confounded, under a micro-realization.

    Definitions 6 and 7 of *Meaningful Causal Aggregation and Paradoxical Confounding*:
    a realization is *confounding-inhibiting* if setting the macro-variable has the
    effect that seeing it would have, ``P(Yb | do(xb)) = P(Yb | xb)``, and
    *confounding-inducing* if it has not, for some macro value. Whole distributions are
    compared:

    * in jointly affine-Gaussian programs and for Gaussian realizations exactly, by the
      Wasserstein-2 distance and the Kullback-Leibler divergence in closed form;
    * in programs of finite sites (of at most 2^22 joint values) exactly, by the total
      variation distance;
    * otherwise by draws and a permutation test on their energy distance, at ``level``
      for all macro values together. Such a test can say that laws differ, never that
      they are equal: the verdict is ``"undecided"`` then, and the report says which
      shift the test would have seen. Only Theorem 3.1 still gives ``"inhibiting"``:
      under the natural realization, where no site acts on both cause and effect.

    :param model: the model; it is run on ``model_args`` and ``model_kwargs``.
    :param cause: the macro-variable that is set.
    :param effect: a macro-variable, or the name of a site.
    :param realization: from a macro value to a realization: a class such as
        :class:`~pyro_macro.Natural`, or a function such as
        ``lambda value: Residual(value, absorb="x2")``.
    :param at: the macro values, shape ``(n,)``, or ``(n, m)`` for a vector of them.
        By default quantiles of ``P(xb)``, or all values where they are few.
    :param num_samples: draws from each law and for each macro value, where draws are
        needed.
    :param level: the probability of a false alarm, where the method is Monte Carlo.
    :param seed: of the draws; the random state is left as it was.
    :param progress: whether bars are shown where draws take long.
    :raises UnknownSite: if the program lacks a site.
    :raises Infeasible: if a macro value cannot be reached.
    :raises UnsupportedLaw: if ``P(Yb | xb)`` or the realization is not known.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     pyro.deterministic("revenue", x1 + 3 * x2)
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> pm.confounding(shop, sales, "revenue", at=[33.0]).verdict
    'inhibiting'
    >>> by_advertising = lambda value: pm.Residual(value, absorb="x2")
    >>> report = pm.confounding(shop, sales, "revenue", by_advertising, at=[33.0])
    >>> report.verdict, report.interventional_variance
    ('inducing', tensor([16.], dtype=torch.float64))
    """
    question, instance = Question.of(
        model, cause, effect, realization, at, model_args, model_kwargs
    )
    numbers = isinstance(num_samples, int) and isinstance(level, float)
    if not numbers or num_samples < 20 or not 0 < level < 1:
        raise PyroMacroError(
            f"confounding: num_samples={num_samples!r} and level={level!r}. Expected "
            "at least 20 draws, and a level between 0 and 1."
        )
    question.progress = progress
    laws = exact_laws(question, realization, instance, at)
    if laws is not None:
        return laws.report(question, instance)
    bars = Sampler(question.model, question.cut, num_samples, seed, progress)
    return _drawn(question, realization, instance, at, bars, level)


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
    size = within.diagonal().sqrt()
    if bool((torch.linalg.eigvalsh(within) <= 1e-12 * size.square().max()).any()):
        raise UnsupportedLaw(
            f"{question.what}: its value is the same in every run (or one of several "
            "follows from the others), so that there is no P(effect | cause)."
        )
    at = question.default_at() if at is None else question.values(at)
    value = question.spread(at)
    seen = affine.effect_given(value)
    if is_natural(instance):
        done: Moments | None = affine.effect_adjusted(value)
    elif instance.given or instance.acts_on_natural:
        done = None
    else:
        parts = [
            affine.effect_under(r.law, r.layout, r.push)
            for r in question.realized(realization, at)
        ]
        done = None if None in parts else _joined([p for p in parts if p is not None])
    if done is None:
        return None
    slack = 100 * question.precision
    variances = [m.variance.sum(-1) for m in (seen, done, affine.joint([1]))]
    total = torch.stack(torch.broadcast_tensors(*variances)).amax(0)  # (n,)
    # A natural law has the same mean as the observational one, digit by digit
    mean = 0.0 if is_natural(instance) else seen.mean.abs().sum(-1)
    near = (seen.mean - done.mean).abs().amax(-1) <= slack * (total.sqrt() + mean)
    alike = (seen.covariance - done.covariance).abs().amax((-1, -2)) <= slack * total
    return Laws(
        at,
        seen,
        done,
        near & alike,
        two_wasserstein(seen, done),
        "Wasserstein-2",
        kullback_leibler(done, seen),
        "exact: affine-Gaussian",
        float((slack * (total.sqrt() + mean)).max()),
        Outcomes(),
        Outcomes(),
    )


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
    at = question.default_at() if at is None else question.values(at)
    index = question.index(at)
    at = question.exactly(at, index)
    if is_natural(instance) and instance.given:
        done: Tensor | None = finite.effect_adjusted(index)
    elif is_natural(instance):
        done = finite.effect_under(finite.natural(index))
    elif instance.given:
        done = None
    else:
        weights = [
            finite.weights_of(r.law, r.layout, r.push)
            for r in question.realized(realization, at)
        ]
        known = [w for w in weights if w is not None]
        done = None
        if len(known) == len(weights):
            done = finite.effect_under(torch.cat(known))
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


def _drawn(
    question: Question,
    realization: Realizing,
    instance: Realization,
    at: Any,
    sampler: Sampler,
    level: float,
) -> ConfoundingReport:
    """By draws of both laws."""
    cut, model = question.cut, question.model[0]
    effect = cut.others["effect"][0]
    if at is None and (question.affine or question.finite):
        at = question.default_at()
    elif at is None:
        question.refuse_vector()
        drawn = sampler.draw(model, [cut.cause])[0].mean(-1)
        question.refuse_nan(drawn)
        levels = torch.tensor(QUANTILES, dtype=torch.float64)
        at = drawn.quantile(levels, interpolation="nearest").unique()
    at = question.values(at)
    natural = not question.common_causes
    seen = _observed(question, sampler, at)
    done = _under(question, sampler, realization, at)
    n, size = len(at), effect.size
    question.refuse_nan(torch.cat([seen.flatten(), done.flatten()]))
    flat = [d.transpose(1, 2).reshape(n * size, -1) for d in (seen, done)]
    test = compare(flat[0], flat[1], level, seed=sampler.seed)
    p_value = test.p_value.reshape(n, size).amin(-1)
    by_theorem = natural and is_natural(instance) and not instance.given
    method = "Monte Carlo"
    detail = (
        f"{seen.shape[1]:,} and {done.shape[1]:,} draws of the laws at each macro "
        "value, permutation test on the energy distance, smallest p-value "
        f"{float(p_value.min()):.2g}, level {level:g} for all together"
    )
    alarm = (p_value <= level).tolist()
    if by_theorem:
        verdicts = [INHIBITING] * n
        method = "exact: Theorem 3.1, no common cause; moments by Monte Carlo"
        detail = f"{done.shape[1]:,} draws of each law at each macro value"
    else:
        verdicts = [INDUCING if seen else UNDECIDED for seen in alarm]
    shape = Size([n]) + effect.shape

    def moments(draws: Tensor) -> tuple[Tensor, Tensor]:
        return draws.mean(1).reshape(shape), draws.var(1).reshape(shape)

    def outcomes(draws: Tensor) -> Outcomes:
        return Outcomes(draws=draws[..., 0] if size == 1 else None)

    mean, variance = moments(seen)
    other_mean, other_variance = moments(done)
    distance = test.distance.reshape(n, size).square().sum(-1).sqrt()
    return ConfoundingReport(
        cause=question.cause.name,
        effect=name_of(question.effect),
        realization=describe(instance),
        at=at,
        observational_mean=mean,
        observational_variance=variance,
        interventional_mean=other_mean,
        interventional_variance=other_variance,
        distance=torch.zeros_like(distance) if by_theorem else distance,
        distance_kind="Wasserstein-2",
        divergence=None,
        verdict=(
            INDUCING
            if INDUCING in verdicts
            else UNDECIDED
            if UNDECIDED in verdicts
            else INHIBITING
        ),
        verdicts=tuple(verdicts),
        method=f"{method} ({detail})",
        tolerance=0.0,
        p_value=None if by_theorem else p_value,
        detectable=None if by_theorem else test.detectable.reshape(n, size).amax(-1),
        num_samples=min(seen.shape[1], done.shape[1]),
        observational=outcomes(seen),
        interventional=outcomes(done),
    )


def _observed(question: Question, sampler: Sampler, at: Tensor) -> Tensor:
    """Draws of the effect given the macro value: ``(n, N, size)``."""
    count = sampler.count
    with sampler.unseen():
        if question.affine is not None:
            law = question.affine.effect_given(question.spread(at))
            noise = torch.randn(len(at), count, law.mean.shape[-1]).to(law.mean)
            return law.mean.unsqueeze(1) + noise @ root(law.covariance)
        if question.finite is not None:
            weights = question.finite.effect_given(question.index(at))
            rows = weights.multinomial(count, replacement=True)
            return question.finite.effects[rows]
    if not question.common_causes:
        return _under(question, sampler, Natural, at)
    found = given_total(sampler, at, question.cut.others["effect"])
    if found is None:
        raise UnsupportedLaw(
            f"{question.what}: hardly any draw could be made of the program given "
            f"these macro values ({at.tolist()}). Choose values that are less rare."
        )
    return found[0]


def _under(
    question: Question, sampler: Sampler, realization: Realizing, at: Tensor
) -> Tensor:
    """Draws of the effect when the macro value is set: ``(n, N, size)``."""
    effect = question.cut.others["effect"]
    states = _from_chains(question, realization, at)
    if states is not None:
        return sampler.under(states, effect[0], len(at))
    fn = macro_do(
        question.model[0],
        {question.cause: question.instance(realization, at, draws=True)},
    )
    if sampler.is_vectorized(fn, len(at)):
        return sampler.draw(fn, effect, grid=len(at))[0]
    parts = []
    for value in at:
        one = question.instance(realization, value, alone=True)
        fn = macro_do(question.model[0], {question.cause: one})
        parts.append(sampler.draw(fn, effect)[0])
    return torch.stack(parts)


def _from_chains(
    question: Question, realization: Realizing, at: Tensor
) -> list[dict[str, Tensor]] | None:
    """Micro states that chains have drawn, for each macro value as many as count.

    A chain's draws depend on one another, and a law that is known by them has no more:
    only so many are taken, evenly, as are worth independent ones.
    """
    instance = question.instance(realization, at)
    if instance.acts_on_natural or instance.given:
        return None
    laws = question.realized(realization, at)
    if not any(isinstance(r.law, SampledLaw) for r in laws):
        return None
    found = []
    least = min(r.law.effective for r in laws)
    for r in laws:
        stored = r.law.draws
        count = max(20, min(len(stored), int(least)))
        chosen = torch.linspace(0, len(stored) - 1, count).round().long()
        law = over_grid(r.law, r.layout, question.cut.depth)
        batch = law.batch_shape
        lead = (count,) + (1,) * (len(batch) - stored.dim() + 2)
        stored = stored[chosen].reshape(*lead, *stored.shape[1:])
        stored = stored.expand(count, *batch, -1)
        for states in stored.movedim(1, 0):
            found.append(r.layout.unstack(r.push(states)))
    return found
