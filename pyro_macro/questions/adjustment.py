# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Back-door adjustment for macro-variables."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.laws.finite.effect import FiniteEffect
from pyro_macro.laws.gaussian.effect import AffineEffect
from pyro_macro.laws.moments import Moments, inverse
from pyro_macro.laws.quantity import Thing, name_of
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.conditions import Draws, adjusting, by_context, condition_15
from pyro_macro.reports import AdjustmentReport


class NotAdjusted(UserWarning):
    """An adjustment whose condition does not hold."""


def macro_adjust(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    adjustment: Sequence[Thing] | Thing,
    at: Any = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> AdjustmentReport:
    """The effect of a macro-variable by back-door adjustment.

    Theorem 4.1: ``P(Yb | do(xb)) = sum_b P(Yb | xb, b) P(b)`` with respect to the
    micro-realization ``P(X | xb, b)``, which is ``Natural(xb, given=adjustment)``, if
    condition (15) holds. That is checked; a :class:`NotAdjusted` warning is given where
    it does not hold, and the report holds both sides.

    :param adjustment: macro-variables or sites that the cause does not act on.
    :param at: macro values; by default quantiles of ``P(xb)``, or all where few.
    :raises UnsupportedLaw: if the program is neither affine-Gaussian nor finite.
    :raises PyroMacroError: if something in the adjustment is downstream of the cause.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     z = pyro.sample("z", dist.Normal(0.0, 1.0))
    ...     x1 = pyro.sample("x1", dist.Normal(z, 1.0))
    ...     x2 = pyro.sample("x2", dist.Normal(z, 1.0))
    ...     pyro.sample("revenue", dist.Normal(x1 + x2 - 3 * z, 1.0))
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> report = pm.macro_adjust(shop, sales, "revenue", ["z"], at=[0.0, 1.0])
    >>> report.condition.holds, report.mean.round(decimals=6)
    (True, tensor([0., 1.], dtype=torch.float64))
    >>> report.observational_mean.abs().max() < 1e-6
    tensor(True)
    """
    question = adjusting(model, cause, effect, adjustment, model_args, model_kwargs)
    if not question.cut.others["given"]:
        raise PyroMacroError(
            f"{question.what}: nothing is adjusted for. Expected macro-variables or "
            "sites that the cause does not act on; confounding is about none."
        )
    if question.affine is None and question.finite is None:
        raise question.unsupported("the adjusted effect")
    at = question.asked(at)
    if question.affine is not None:
        laws, method = (
            _affine_laws(question.affine, question.spread(at)),
            "affine-Gaussian",
        )
    else:
        assert question.finite is not None
        laws, method = _finite_laws(question.finite, question.index(at)), "finite"
    condition = condition_15(question, Draws(question))
    if not condition.holds:
        warnings.warn(
            f"{question.what}: it is not the case that {condition.statement} "
            f"(deviation {condition.deviation:.2g}), so that the adjusted effect is "
            "not that of Natural(value, given=adjustment). Adjust for more, or compare "
            "with interventional_mean in the report.",
            NotAdjusted,
            stacklevel=2,
        )
    shape = Size([len(at)]) + question.cut.others["effect"][0].shape
    adjusted, seen, done = laws
    return AdjustmentReport(
        cause=cause.name,
        effect=name_of(effect),
        adjustment=tuple(q.name for q in question.cut.others["given"]),
        at=at,
        mean=adjusted.mean.reshape(shape),
        variance=adjusted.variance.reshape(shape),
        observational_mean=seen.mean.reshape(shape),
        observational_variance=seen.variance.reshape(shape),
        interventional_mean=done.mean.reshape(shape),
        interventional_variance=done.variance.reshape(shape),
        condition=condition,
        method=f"exact: {method}",
    )


def _affine_laws(
    affine: AffineEffect, value: Tensor
) -> tuple[Moments, Moments, Moments]:
    """The adjusted, the observational and the interventional law of the effect."""
    b, e = affine.cause.size, affine.effect.size
    joint = affine.joint()
    known = [*range(b), *range(b + e, len(joint.mean))]
    context = joint.mean[b + e :].expand(len(value), -1)
    left = joint.given(known, torch.cat([value, context], -1))
    within = joint.covariance[known][:, known]
    slopes = joint.covariance[b : b + e][:, known] @ inverse(within)
    others = slopes[:, b:]
    more = others @ joint.covariance[b + e :, b + e :] @ others.mT
    adjusted = Moments(left.mean, left.covariance + more)
    return adjusted, affine.effect_given(value), affine.effect_adjusted(value)


def _finite_laws(
    finite: FiniteEffect, index: Tensor
) -> tuple[Moments, Moments, Moments]:
    table = by_context(finite)[:, index]  # (C, n, Y)
    p_context = torch.zeros(len(table), dtype=torch.float64, device="cpu")
    p_context.index_add_(0, finite.contexts[1], finite.before.exp())
    done = finite.effect_adjusted(index)  # refuses what no context allows
    given = table / table.sum(-1, keepdim=True).clamp(min=1e-300)
    adjusted = torch.einsum("c,cny->ny", p_context, given)
    laws = (adjusted, finite.effect_given(index), done)
    one, other, third = (finite.moments(law) for law in laws)
    return one, other, third
