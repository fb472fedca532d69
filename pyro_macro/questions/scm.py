# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Whether any causal model of the macro-variables explains both regimes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_macro.laws.quantity import name_of
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.exact import Laws, exact_laws
from pyro_macro.questions.question import Question, Realizing, describe
from pyro_macro.realizations import Natural
from pyro_macro.reports import ScmReport


def macro_scm_exists(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    realization: Realizing = Natural,
    at: Any = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> ScmReport:
    """Whether a causal model of cause and effect explains what is seen and what is set.

    Appendix D of *Meaningful Causal Aggregation and Paradoxical Confounding*. In a
    finite program such a model, confounded as it may be, exists if and only if
    ``P(xb, yb) <= P(yb | do(xb))`` for every pair: whoever is seen with ``xb`` and
    ``yb`` would have ``yb`` under ``do(xb)``. For continuous macro values the same says
    that no outcome that is seen may be impossible under the intervention: there is none
    if ``Var(Yb | do(xb)) = 0 < Var(Yb | xb)``, as for the third shop.

    :param at: macro values; by default all of a finite cause, quantiles otherwise. The
        answer is for these.
    :raises UnsupportedLaw: if the laws are not known exactly.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     pyro.deterministic("revenue", x1 + 3 * x2)
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> only_first = lambda value: pm.Allocate(value, shares=(1.0, 0.0))
    >>> pm.macro_scm_exists(shop, sales, "revenue", only_first).exists
    False
    """
    asked = Question.of(model, cause, effect, realization, at, model_args, model_kwargs)
    question, instance = asked
    laws = exact_laws(question, realization, instance, at)
    if laws is None:
        raise question.unsupported("whether a causal model explains both regimes")
    linear = None
    if question.affine is not None:
        excess = _impossible(laws, question.affine.joint([1]).variance.sum())
        linear = _linear(question, laws)
    else:
        finite, index = question.finite, question.index(laws.at)
        assert finite is not None and laws.interventional.weights is not None
        joint = finite.macro_joint[index]
        excess = (joint - laws.interventional.weights).amax(-1)
    known = tuple((excess <= laws.tolerance).tolist())
    return ScmReport(
        cause=cause.name,
        effect=name_of(effect),
        realization=describe(instance),
        at=laws.at,
        exists=all(known),
        exists_at=known,
        excess=excess.clamp(min=0),
        linear=linear,
        method=laws.method,
    )


def _impossible(laws: Laws, usual: Tensor) -> Tensor:
    """How far what is seen lies where the intervention never leads.

    :param usual: the variance of the effect, beside which rounding is told.
    """
    done, seen = laws.done.covariance, laws.seen.covariance
    values, vectors = torch.linalg.eigh(done)
    total = torch.maximum(usual, values.amax(-1)).unsqueeze(-1)
    never = values <= 1e-12 * total  # directions in which nothing moves
    within = (vectors.mT @ seen @ vectors).diagonal(dim1=-2, dim2=-1)
    within = torch.where(within <= 1e-12 * total, 0.0, within)
    away = ((laws.seen.mean - laws.done.mean).unsqueeze(-2) @ vectors).squeeze(-2)
    return torch.where(never, within.clamp(min=0).sqrt() + away.abs(), 0.0).amax(-1)


def _linear(question: Question, laws: Laws) -> dict[str, float] | None:
    """``Yb = beta xb + U`` with ``U`` correlated with ``xb``, if that is enough."""
    affine = question.affine
    assert affine is not None
    if affine.cause.size != 1 or affine.effect.size != 1 or len(laws.at) < 2:
        return None
    both = affine.joint([0, 1])
    (mean, outcome), at = both.mean, laws.at
    within, slope = both.covariance[0, 0], both.covariance[0, 1]
    slope = slope / within
    first, last = int(at.argmin()), int(at.argmax())
    if first == last or bool(at[first] == at[last]):
        return None
    done = laws.done.mean[:, 0]
    beta = (done[last] - done[first]) / (at[last] - at[first])
    crossed = (slope - beta) * within
    variance = laws.seen.variance[0, 0] + crossed.square() / within
    scale = laws.tolerance + 1e-7 * (1 + variance.sqrt())
    straight = (done - (outcome + beta * (at - mean))).abs() <= scale
    spread = laws.done.variance[:, 0].sqrt() - variance.sqrt()
    if not bool((straight & (spread.abs() <= scale)).all()):
        return None
    rounding = 1e-12 * (within * variance).sqrt()
    return {
        "beta": float(beta),
        "Var(U)": float(variance),
        "Cov(xb, U)": float(crossed) if abs(crossed) > rounding else 0.0,
    }
