# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What setting a macro-variable does to an effect, along its values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.laws.quantity import name_of
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.drawn import draws_under
from pyro_macro.questions.exact import affine_done, finite_done
from pyro_macro.questions.question import Question, Realizing, describe
from pyro_macro.questions.sampling import Sampler
from pyro_macro.realizations import Natural, Realization
from pyro_macro.reports import Curve, DoseResponse, Outcomes


def dose_response(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    realization: Realizing | Mapping[str, Realizing] = Natural,
    at: Any = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    num_samples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> DoseResponse:
    """The law of an effect along the values that a macro-variable is set to.

    Definition 5 of *Meaningful Causal Aggregation and Paradoxical Confounding*: what
    setting a total does depends on how it is realized below. So a curve belongs to a
    realization, and several can be asked for at once.

    In jointly affine-Gaussian programs, for Gaussian realizations, and in programs of
    finite sites nothing is drawn. Otherwise all macro values are drawn in one run with
    the same random numbers (:class:`~pyro_macro.grid`), so that curves are smooth and
    their differences have little noise; a program that cannot be run for many values
    at once is run for one after the other.

    :param model: the model; it is run on ``model_args`` and ``model_kwargs``.
    :param cause: the macro-variable that is set.
    :param effect: a macro-variable, or the name of a site.
    :param realization: from a macro value to a realization: a class such as
        :class:`~pyro_macro.Natural`, or a function such as
        ``lambda value: Residual(value, absorb="x2")``; or several, by name.
    :param at: the macro values, shape ``(n,)``, or ``(n, m)`` for a vector of them. By
        default quantiles of the macro value, where its law is known exactly.
    :param num_samples: draws for each macro value, where draws are needed.
    :param seed: of the draws; the random state is left as it was.
    :param progress: whether bars are shown where draws take long.
    :raises UnknownSite: if the program lacks a site.
    :raises Infeasible: if a macro value cannot be reached.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     pyro.deterministic("revenue", x1 + 3 * x2)
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> ways = {"natural": pm.Natural, "advertise": lambda v: pm.Residual(v, "x2")}
    >>> pm.dose_response(shop, sales, "revenue", ways, at=[30.0, 33.0])
    What setting sales does to revenue.
    natural: exact: affine-Gaussian.
    advertise: exact: affine-Gaussian.
    realization  sales  mean  variance
        natural     30    70       3.2
        natural     33  74.2       3.2
      advertise     30    70        16
      advertise     33    79        16
    """
    ways = _named(realization)
    if not isinstance(num_samples, int) or num_samples < 20:
        raise PyroMacroError(
            f"dose_response: num_samples={num_samples!r}. Expected at least 20 draws."
        )
    question = Question(model, cause, effect, model_args, model_kwargs)
    question.progress = progress
    known = question.affine is not None or question.finite is not None
    if at is None and not known:
        raise PyroMacroError(
            f"{question.what}: its quantiles are not known exactly in this program. "
            "Say at which macro values: at=[...]."
        )
    values = question.asked(at)
    sampler = Sampler(question.model, question.cut, num_samples, seed, progress)
    curves = tuple(
        _curve(_held(question, way, values), name, way, values, sampler)
        for name, way in ways.items()
    )
    return DoseResponse(question.cause.name, name_of(effect), values, curves)


def _named(realization: Any) -> dict[str, Realizing]:
    if not isinstance(realization, Mapping):
        return {"": realization}
    if not realization or not all(isinstance(name, str) for name in realization):
        raise PyroMacroError(
            f"dose_response: realization is {realization!r}. Expected functions of the "
            "macro value, by name."
        )
    return dict(realization)


def _held(question: Question, way: Realizing, at: Tensor) -> Question:
    """The question, with what a realization is given held."""
    given: Any = tuple(question.instance(way, at[:1]).given)
    if not given:
        return question
    model, args, kwargs = question.model
    return Question(model, question.cause, question.effect, args, kwargs, given=given)


def _curve(
    question: Question, name: str, way: Realizing, at: Tensor, sampler: Sampler
) -> Curve:
    instance = question.instance(way, at[:1])  # the user's may be for one alone
    name = name or describe(instance)
    shape = Size([len(at)]) + question.cut.others["effect"][0].shape

    def curve(
        mean: Tensor, variance: Tensor, method: str, laws: Outcomes | None
    ) -> Curve:
        question.refuse_nan(torch.cat([mean.flatten(), variance.flatten()]))
        mean, variance = mean.reshape(shape), variance.reshape(shape)
        return Curve(name, mean, variance, method, laws)

    done = affine_done(question, way, instance, at)
    if done is not None:
        method = "exact: affine-Gaussian"
        return curve(done.mean, done.variance, method, Outcomes())
    weights = finite_done(question, way, instance, at)
    if weights is not None:
        assert question.finite is not None
        moments = question.finite.moments(weights)
        effects = question.finite.effects
        laws = Outcomes(effects[:, 0], weights) if effects.shape[1] == 1 else None
        return curve(moments.mean, moments.variance, "exact: finite", laws)
    return _drawn(question, sampler, way, instance, at, curve)


def _drawn(
    question: Question,
    sampler: Sampler,
    way: Realizing,
    instance: Realization,
    at: Tensor,
    curve: Callable[..., Curve],
) -> Curve:
    draws = draws_under(question, sampler, way, at, common=True)
    laws = Outcomes(draws=draws[..., 0]) if draws.shape[-1] == 1 else None
    method = f"Monte Carlo: {draws.shape[1]:,} draws at each macro value"
    return curve(draws.mean(1), draws.var(1), method, laws)
