# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The laws of an effect, seen and set, by draws."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.handlers import macro_do
from pyro_macro.laws.cut import over_grid
from pyro_macro.laws.moments import root
from pyro_macro.laws.quantity import Quantity, name_of
from pyro_macro.laws.sampled.chains import SampledLaw
from pyro_macro.questions.conditioning import given_total
from pyro_macro.questions.exact import INDUCING, INHIBITING, UNDECIDED
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


def drawn_report(
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
        levels = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
        at = drawn.quantile(levels, interpolation="nearest").unique()
    at = question.values(at)
    natural = not question.common_causes
    seen = _observed(question, sampler, at)
    done = draws_under(question, sampler, realization, at)
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
        verdicts = [INDUCING if heard else UNDECIDED for heard in alarm]
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
    quantities = question.cut.others["effect"]
    if question.common_causes:
        found = given_total(sampler, at, quantities)
    else:
        found = _if_known(sampler, at, quantities)
        if found is None:
            return draws_under(question, sampler, Natural, at)
    if found is None:
        raise UnsupportedLaw(
            f"{question.what}: hardly any draw could be made of the program given "
            f"these macro values ({at.tolist()}). Choose values that are less rare."
        )
    return found[0]


def _if_known(
    sampler: Sampler, at: Tensor, quantities: Sequence[Quantity]
) -> list[Tensor] | None:
    """Draws given the macro value, where they can be made by acceptance."""
    try:
        return given_total(sampler, at, quantities)
    except UnsupportedLaw:
        return None


def _natural(
    question: Question, sampler: Sampler, at: Tensor
) -> list[dict[str, Tensor]] | None:
    """Micro states given the macro value, for each macro value: ``P(X | xb)``.

    Those of the program given the macro value are that, whatever causes they have.
    """
    found = _if_known(sampler, at, question.cut.micro_sites)
    if found is None:
        return None
    each = zip(*found, strict=True)  # by macro value
    return [question.cut.as_values(parts) for parts in each]


def draws_under(
    question: Question,
    sampler: Sampler,
    realization: Realizing,
    at: Tensor,
    common: bool = False,
) -> Tensor:
    """Draws of the effect when the macro value is set: ``(n, N, size)``.

    :param common: whether random numbers are the same for all macro values, where all
        are drawn in one run.
    """
    effect = question.cut.others["effect"]
    instance = question.instance(realization, at[:1])
    states = None
    if (
        is_natural(instance)
        and not instance.given
        and not (common and _is_exact(question, realization, at))
    ):
        states = _natural(question, sampler, at)
    if states is None:
        states = _from_chains(question, realization, instance, at)
    if states is not None:
        return sampler.under(states, effect[0], len(at))
    with suppress(RuntimeError, ValueError):  # of what is for one value alone
        whole = question.instance(realization, at, draws=True)
        fn = macro_do(question.model[0], {question.cause: whole})
        if sampler.is_vectorized(fn, len(at)):
            return sampler.draw(fn, effect, grid=len(at), common=common)[0]
    parts = []
    for value in at:
        one = question.instance(realization, value, alone=True)
        fn = macro_do(question.model[0], {question.cause: one})
        parts.append(sampler.draw(fn, effect)[0])
    return torch.stack(parts)


def _is_exact(question: Question, realization: Realizing, at: Tensor) -> bool:
    """Whether the natural law of the micro state is known exactly."""

    def unsampled(value: Tensor) -> Realization:
        instance: Any = realization(value)
        return dataclasses.replace(instance, sampler=None)

    try:
        laws = [r.law for r in question.realized(unsampled, at)]
    except UnsupportedLaw:
        return False
    return all(getattr(law, "method", "").startswith("exact") for law in laws)


def _from_chains(
    question: Question, realization: Realizing, instance: Realization, at: Tensor
) -> list[dict[str, Tensor]] | None:
    """Micro states that chains have drawn, for each macro value as many as count.

    A chain's draws depend on one another, and a law that is known by them has no more:
    only so many are taken, evenly, as are worth independent ones.
    """
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
        chosen = torch.linspace(0, len(stored) - 1, count, device="cpu").round().long()
        law = over_grid(r.law, r.layout, question.cut.depth)
        batch = law.batch_shape
        lead = (count,) + (1,) * (len(batch) - stored.dim() + 2)
        stored = stored[chosen].reshape(*lead, *stored.shape[1:])
        stored = stored.expand(count, *batch, -1)
        for states in stored.movedim(1, 0):
            found.append(r.layout.unstack(r.push(states)))
    return found
