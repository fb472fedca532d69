# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Whether some micro-realization inhibits the confounding, and which moves least."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import Infeasible, OffFibre, PyroMacroError, UnsupportedLaw
from pyro_macro.laws.gaussian.effect import AffineEffect
from pyro_macro.laws.gaussian.fibre import NaturalNormal
from pyro_macro.laws.gaussian.inhibiting import StretchedNormal
from pyro_macro.laws.moments import Moments, two_wasserstein
from pyro_macro.laws.quantity import name_of
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.question import Question
from pyro_macro.realizations import Inhibiting, Natural
from pyro_macro.reports import FeasibilityReport

DENSE = 1000  # elements, at most, where a covariance is written out


def can_inhibit(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    at: Any = None,
    *,
    levers: Sequence[str | int] | None = None,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> FeasibilityReport:
    """Whether a micro-realization makes ``P(effect | do(value)) = P(effect | value)``.

    Section 3.2.1: with ``Yb = alpha.X + N`` as found in a jointly affine-Gaussian
    program, such a Gaussian exists if and only if ``Var(Yb | xb) >= Var(N)`` (9),
    which is ``|Q(N + alpha.X)| >= |N|`` (10) with the projection ``Q`` on what is
    uncorrelated with ``xb``, and ``alpha`` is no multiple of the weights of the sum
    (unless nothing is confounded). In a program of finite sites a linear program for
    each macro value answers, or certifies that there is none: a function of the effect
    whose mean given the macro value is beyond what any micro state leads to.

    The report tells how far the least intrusive one, :class:`~pyro_macro.Inhibiting`,
    is from the natural realization: in affine-Gaussian programs in Wasserstein-2
    distance, with the Euclidean distance of micro states; in finite ones in total
    variation. With ``levers`` it is how far the levers have to be moved from what they
    would be, given the others and the macro value.

    :param at: macro values; by default quantiles of ``P(xb)``, or all where few.
    :param levers: the micro sites that may be moved; the others follow their own law.
    :raises UnsupportedLaw: for other programs, and effects that are no numbers.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop(price):
    ...     z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
    ...     z2 = pyro.sample("z2", dist.Normal(0.0, 2.0))
    ...     x1, x2 = pyro.deterministic("x1", z1), pyro.deterministic("x2", z2)
    ...     pyro.deterministic("revenue", price * x1 + 3 * x2 + 0.5 * z1 + 0.2 * z2)
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> report = pm.can_inhibit(shop, sales, "revenue", model_args=(1.0,))
    >>> report.feasible, report.observational_variance > report.noise_variance
    (True, True)
    >>> pm.can_inhibit(shop, sales, "revenue", model_args=(3.0,)).feasible
    False
    """
    question = Question(model, cause, effect, model_args, model_kwargs)
    one = question.cut.others["effect"][0].size == 1
    if not one or len(question.cut.cause.shape) > question.event:
        raise UnsupportedLaw(
            f"{question.what}: it has shape {tuple(question.cut.cause.shape)}, the "
            f"effect {tuple(question.cut.others['effect'][0].shape)}. Expected one "
            "macro-variable and one number as its effect: aggregate over their plates."
        )
    if question.affine is not None:
        return _affine(question, question.affine, at, levers)
    if question.finite is not None:
        if levers is not None:
            raise UnsupportedLaw(
                f"{question.what}: levers are for affine-Gaussian programs. Leave them "
                "out."
            )
        return _finite(question, at)
    raise question.unsupported("whether some realization inhibits the confounding")


def _affine(
    question: Question,
    affine: AffineEffect,
    at: Any,
    levers: Sequence[str | int] | None,
) -> FeasibilityReport:
    at = question.asked(at)
    seen = float(affine.effect_given(question.spread(at)).variance[0, 0])
    distance, reason = (
        torch.full((len(at),), torch.nan, dtype=torch.float64, device="cpu"),
        "",
    )
    try:
        laws = question.realized(
            lambda value: Inhibiting(value, question.effect, levers), at
        )
        distance = torch.cat([_moved(question, r.law, at) for r in laws])
    except Infeasible as error:
        reason = str(error)
    feasible = not reason
    return FeasibilityReport(
        cause=question.cause.name,
        effect=name_of(question.effect),
        at=at,
        feasible=feasible,
        feasible_at=(feasible,) * len(at),
        observational_variance=seen,
        noise_variance=float(affine.noise_covariance[0, 0]),
        distance=distance,
        distance_kind="Wasserstein-2",
        levers=None if levers is None else tuple(levers),
        reason=reason,
        method="exact: affine-Gaussian",
    )


def _moved(question: Question, law: Any, at: Tensor) -> Tensor:
    """How far a law is from the natural one, shape ``(n,)``."""
    if isinstance(law, StretchedNormal):
        return law.moved.reshape(-1).expand(len(at)).cpu().double()
    (natural,) = question.realized(Natural, at)
    if isinstance(law, NaturalNormal) and law.rows.shape == natural.law.rows.shape:
        return torch.zeros(
            len(at), dtype=torch.float64, device="cpu"
        )  # it is that, nothing to move
    if law.event_shape[-1] > DENSE:
        return torch.full((len(at),), torch.nan, dtype=torch.float64, device="cpu")
    size = law.event_shape[-1]
    own = getattr(law, "covariance_matrix", law.mean.new_zeros(size, size))
    one = Moments(law.mean.double(), own.double())
    other = Moments(natural.law.mean.double(), natural.law.covariance_matrix.double())
    return two_wasserstein(one, other).reshape(-1).expand(len(at)).cpu()


def _finite(question: Question, at: Any) -> FeasibilityReport:
    finite = question.finite
    assert finite is not None
    at = question.asked(at)
    index = question.index(at)
    natural = finite.natural(index)
    distance, gaps, certificates = [], [], []
    for row, i in enumerate(index.tolist()):
        inside, found = finite.inhibited(i)
        gaps.append(found.gap)
        certificates.append(found.certificate)
        moved = (found.weights - natural[row, inside]).abs().sum() / 2
        distance.append(float("nan") if found.gap else float(moved))
    possible = tuple(gap == 0 for gap in gaps)
    reason = ""
    if not all(possible):
        worst = max(range(len(gaps)), key=gaps.__getitem__)
        reason = (
            f"{question.what}: at {at[worst].tolist()} the mixture of micro states "
            "that comes closest to P(effect | value) is a total variation distance "
            f"of {gaps[worst]:.3g} away."
        )
    return FeasibilityReport(
        cause=question.cause.name,
        effect=name_of(question.effect),
        at=at,
        feasible=all(possible),
        feasible_at=possible,
        observational_variance=None,
        noise_variance=None,
        distance=torch.tensor(distance, dtype=torch.float64, device="cpu"),
        distance_kind="total variation",
        levers=None,
        reason=reason,
        method="exact: finite, linear programs",
        gap=torch.tensor(gaps, dtype=torch.float64, device="cpu"),
        outcomes=finite.effects[:, 0],
        certificates=tuple(certificates),
    )


def structural_coefficient(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    along: Any = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> float | Tensor:
    """What one unit more of the cause does to the effect, ``beta = alpha . Delta``.

    Appendix C.1: moving the macro-variable by one moves the micro state by ``Delta``.
    By default that is the natural direction ``Cov(X, Xb) / Var(Xb)``, for which the
    coefficient is that of the natural realization; without confounders it is the
    regression slope, and for independent sites ``Delta`` is in proportion to their
    variances.

    :param along: the direction ``Delta``, ``pi(along) = 1``, shape ``(K,)``: elements
        in the order of the micro sites.
    :returns: a number; a tensor of the effect's shape if that has one.
    :raises UnsupportedLaw: if the program is not jointly affine-Gaussian.
    :raises OffFibre: if ``along`` has another macro value than one.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     pyro.deterministic("revenue", x1 + 3 * x2)
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> round(pm.structural_coefficient(shop, sales, "revenue"), 6)
    1.4
    >>> pm.structural_coefficient(shop, sales, "revenue", along=[0.0, 1.0])
    3.0
    """
    question = Question(model, cause, effect, model_args, model_kwargs)
    affine = question.affine
    if affine is None:
        raise question.unsupported("the structural coefficient")
    found = coefficient(question, affine, along)
    shape = affine.effect.shape
    return found.reshape(shape) if shape.numel() > 1 or len(shape) else float(found)


def coefficient(question: Question, affine: AffineEffect, along: Any) -> Tensor:
    """``alpha . along`` for each element of the effect, shape ``(e,)``."""
    if affine.cause.size != 1:
        raise PyroMacroError(
            f"{question.what}: it has shape {tuple(affine.cause.shape)}, and what one "
            "unit more does is asked of one number. Aggregate over its plates, or ask "
            "for one row at a time."
        )
    if along is None:
        return affine.natural_coefficient
    size = affine.alpha.shape[-1]
    direction = torch.as_tensor(along, dtype=torch.float64, device="cpu")
    if direction.shape != (size,) or not bool(direction.isfinite().all()):
        raise PyroMacroError(
            f"{question.what}: along has shape {tuple(direction.shape)}. Expected "
            f"({size},) finite numbers, for {affine.cause.layout.describe()}."
        )
    total = float(affine.cause.of(affine.cause.layout.unstack(direction)))
    if abs(total - 1) > 1e-6:
        raise OffFibre(
            f"{question.what}: along has macro value {total:g}. Expected 1: divide by "
            "it."
        )
    return affine.alpha @ affine.by_site(direction)
