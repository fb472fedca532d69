# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Confounded or not: ``P(Yb | xb)`` against ``P(Yb | do(xb))``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_macro.errors import PyroMacroError
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.drawn import drawn_report
from pyro_macro.questions.exact import exact_laws
from pyro_macro.questions.question import (
    Question,
    Realizing,
)
from pyro_macro.questions.sampling import Sampler
from pyro_macro.realizations import Natural
from pyro_macro.reports import ConfoundingReport


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
    return drawn_report(question, realization, instance, at, bars, level)
