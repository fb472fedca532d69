# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What would have been in a unit that was seen: abduction, action, prediction."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import NotAffine, PyroMacroError, UnsupportedLaw
from pyro_macro.laws.finite.effect import distinct
from pyro_macro.laws.finite.twin import COUPLINGS, FiniteTwin
from pyro_macro.laws.gaussian.twin import Abduction, NormalLaw, affine_law
from pyro_macro.laws.quantity import Thing
from pyro_macro.laws.twin import WHO
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.question import Realizing
from pyro_macro.questions.unit import Asked
from pyro_macro.realizations import Realization
from pyro_macro.reports import CounterfactualReport

FEW = 2  # worlds of a grid that are looked at one by one


def counterfactual(
    model: Callable[..., Any],
    interventions: Mapping[MacroVariable, Realization | Realizing],
    observed: Mapping[str | MacroVariable, Any],
    effect: Thing | Sequence[Thing],
    at: Any = None,
    *,
    noise: str = "independent",
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> CounterfactualReport:
    """What an effect would have been in a unit that was seen, had totals been others.

    Pearl's three steps (*Causality*, Theorem 7.1.7). *Abduction*: the noise of the unit
    given all that was seen of it. *Action*: the micro state is what the realization
    makes of it, as under :func:`~pyro_macro.macro_do`. *Prediction*: what follows from
    it, under the noise of the unit. What the intervention does not act on is as it was.

    What becomes of the unit's own micro state is a matter of the realization:

    * :class:`~pyro_macro.Shift` and :class:`~pyro_macro.Proportional` act on it. What
      is not known of it stays so; ``Proportional`` needs to know it.
    * :class:`~pyro_macro.Natural`, :class:`~pyro_macro.Residual`,
      :class:`~pyro_macro.Allocate`, :class:`~pyro_macro.Explicit` and others replace
      it. By Definitions 4 and 5 the new micro state is cut off from its former parents
      and independent of all that is upstream: it is that of another unit, which knows
      nothing of what was seen in this one. With ``given``, ``Natural`` and ``Residual``
      draw that of a unit which is like this one in what is named there, which has to be
      known.

    The probabilities of a program do not determine its counterfactuals, so that the
    noise has to be stated:

    * A Gaussian site is ``loc + scale * noise``, with the Cholesky factor of the
      covariance for a vector. The program has to be jointly affine in the noise that is
      not known; if all that matters was seen, any location-scale program will do.
    * A finite program with all its noise in sites of its own, and deterministic sites
      behind them, is unambiguous. For a random site that the intervention acts on,
      ``noise`` says how the value that it had and the one that it would have had are
      coupled. ``"independent"``: its responses to different distributions are
      independent, as response functions (*Causality*, section 8.2.2) that are drawn
      one by one. It keeps its value where its distribution is the same, and is drawn
      anew otherwise. ``"monotone"``: both are quantiles of one uniform number, in the
      order of its values. Elements of a plate have noise of their own.

    :param interventions: as for :func:`~pyro_macro.macro_do`. One of them may be a
        function of the macro value, as the class ``Natural`` is; then ``at`` has
        values. Of several, those that act on the unit's own micro state act on what it
        is after the others.
    :param observed: what was seen in the unit: values of sites, by name, and of
        macro-variables. Observations in the program (``obs=``, ``condition``) count,
        too. What is not named was not seen.
    :param effect: a macro-variable or the name of a site, or several.
    :param at: macro values (or shifts) for the realization that is a function, shape
        ``(n,)``.
    :param noise: ``"independent"`` or ``"monotone"``.
    :raises Infeasible: if what was seen cannot be.
    :raises UnsupportedLaw: if the counterfactual is not known exactly: programs that
        are neither affine-Gaussian nor finite, or too large.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> week = {sales: 33.0, "revenue": 76.0}
    >>> report = pm.counterfactual(shop, {sales: pm.Shift(3.0)}, week, "revenue")
    >>> report.mean, report.variance  # 76 + 3 * 1.4
    (tensor([80.2000], dtype=torch.float64), tensor([0.], dtype=torch.float64))
    >>> fresh = pm.counterfactual(shop, {sales: pm.Natural}, week, "revenue", [33.0])
    >>> fresh.mean.round(decimals=3), fresh.variance.round(decimals=3)
    (tensor([74.6290], dtype=torch.float64), tensor([3.9620], dtype=torch.float64))
    """
    asked = Asked(model, interventions, observed, effect, at, model_args, model_kwargs)
    if noise not in COUPLINGS:
        raise PyroMacroError(f"{WHO}: noise is {noise!r}. Expected one of {COUPLINGS}.")
    with asked.unseen():
        trouble = asked.trouble
        if trouble is None:
            return _affine(asked)
        return _finite(asked, noise, trouble)


def _affine(asked: Asked) -> CounterfactualReport:
    unit, values = asked.unit, asked.done.values
    try:
        abduction = Abduction(unit, asked.relevant, asked.kept)
        was = affine_law(abduction, (unit.zero, *unit.probes), asked.effects)
        would = _laws(asked, abduction, values)
    except NotAffine as error:
        said = str(error).removeprefix(f"{WHO}: ").removesuffix(".")
        raise asked.refuse(said) from error
    return asked.report(
        factual_mean=was.mean,
        factual_variance=was.variance,
        mean=would.mean,
        variance=would.variance,
        covariance=would.covariance,
        method="exact: affine-Gaussian",
    )


def _laws(asked: Asked, abduction: Abduction, values: Tensor | None) -> NormalLaw:
    """The laws of the effect, all at once if that says the same as one by one."""
    if values is None or len(values) == 1:
        return _law(asked, abduction, values)
    count, known = len(values), dict[int, NormalLaw]()
    for i in (0, count - 1):
        known[i] = _law(asked, abduction, values[i : i + 1])
    if count > FEW:
        try:
            whole = _law(asked, abduction, values)
            if all(_agree(whole, i, law, abduction.eps) for i, law in known.items()):
                return whole
        except (PyroMacroError, RuntimeError, ValueError, IndexError):
            pass  # a program that is not for many worlds at once
    for i in range(1, count - 1):
        known[i] = _law(asked, abduction, values[i : i + 1])
    laws = [known[i] for i in range(count)]
    covariances = [law.covariance for law in laws if law.covariance is not None]
    return NormalLaw(
        torch.cat([law.mean for law in laws]),
        torch.cat([law.variance for law in laws]),
        torch.cat(covariances) if covariances else None,
    )


def _law(asked: Asked, abduction: Abduction, values: Tensor | None) -> NormalLaw:
    lead = (len(values),) if values is not None and len(values) > 1 else ()
    first = values is None or (not lead and bool((values == asked.at[:1]).all()))
    zero = asked.first if first else asked.world(values)
    runs = [zero, *(asked.world(values, probe, zero.sites) for probe in (1, -1))]
    for run in runs:
        run.refuse_off(asked.done.fixed, lead)
    return affine_law(abduction, runs, asked.effects, lead)


def _agree(whole: NormalLaw, i: int, one: NormalLaw, eps: float) -> bool:
    """Whether one of many worlds is as it is alone."""
    spread = one.variance.sqrt()
    near = (whole.mean[i] - one.mean[0]).abs()
    limit = 1e4 * eps * (one.mean.abs() + spread)[0] + 1e-300
    apart = (whole.variance[i].sqrt() - spread[0]).abs()
    return bool((near <= limit).all() and (apart <= limit).all())


def _finite(asked: Asked, noise: str, trouble: str) -> CounterfactualReport:
    unit, first = asked.unit, asked.first
    if not asked.is_finite():
        raise asked.refuse(trouble)
    if first.moved:
        raise UnsupportedLaw(
            f"{WHO}: {sorted(first.moved)} are to be moved from where another "
            "intervention, upstream, takes them, which in a finite program is not "
            "known. Expected one intervention, or realizations that replace the micro "
            "state."
        )
    known = asked.relevant, asked.kept
    twin = FiniteTwin(unit, *known, asked.coupled, asked.natural, asked.effects, noise)
    parts, values = [twin.as_it_was()], asked.done.values
    with torch.no_grad():
        for value in [None] if values is None else values.split(1):
            model = partial(asked.intervened, value)
            layouts = asked.layouts(value)
            parts.append(
                twin.under(model, first, asked.until, layouts, asked.done.fixed)
            )
    outcomes, index = distinct(torch.cat([rows for rows, _ in parts]))
    table = torch.zeros(len(parts), len(outcomes), dtype=torch.float64, device="cpu")
    places = index.split([len(rows) for rows, _ in parts])
    for row, place, (_, weights) in zip(table, places, parts, strict=True):
        row.index_add_(0, place, weights)
    mean = table @ outcomes
    away = outcomes - mean.unsqueeze(1)  # (1 + n, Y, m)
    covariance = (table.unsqueeze(-1) * away).mT @ away
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    return asked.report(
        factual_mean=mean[0],
        factual_variance=variance[0],
        mean=mean[1:],
        variance=variance[1:],
        covariance=covariance[1:],
        outcomes=outcomes,
        factual_probabilities=table[0],
        probabilities=table[1:],
        method="exact: finite" + f", {noise} responses" * bool(asked.coupled),
    )
