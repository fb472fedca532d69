# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What is independent of what: Lemma 10, and conditions (14) and (15)."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.laws.finite.effect import FiniteEffect
from pyro_macro.laws.quantity import Quantity, Thing, name_of
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.conditioning import Split, given_total
from pyro_macro.questions.dependence import independence
from pyro_macro.questions.question import Question
from pyro_macro.questions.sampling import Sampler
from pyro_macro.reports import IndependenceReport

MOST = 2000  # numbers that are adjusted for
EXACT = 1e-9  # a conditional correlation or a distance below this is rounding


class NotAChain(UserWarning):
    """A question about chains, of a program that is none."""


def irrelevant_cause(
    model: Callable[..., Any],
    earlier: MacroVariable | str,
    cause: MacroVariable,
    effect: MacroVariable | str,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    num_samples: int = 300,
    level: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> IndependenceReport:
    """Whether it does not matter what an earlier macro-variable was.

    Lemma 10 (irrelevance of causes of causes): in a chain ``X -> Y -> Z`` the
    realizations ``P(Y | yb)`` and ``P(Y | yb, xb)`` have the same effect on ``Zb`` if
    and only if ``Xb`` is independent of ``Zb`` given ``Yb`` (12). Otherwise the chain
    of the macro-variables needs an arrow from ``Xb`` to ``Zb``.

    :param earlier: ``Xb``: not downstream of the cause.
    :param cause: ``Yb``.
    :param effect: ``Zb``.
    :param num_samples: in other programs than affine-Gaussian and finite ones, where
        the criterion is tested: by a permutation test on distance correlation, with
        draws given each of some values of the cause.
    :param level: of that test; not being rejected does not show that it holds.
    :raises UnsupportedLaw: if such draws cannot be made.
    :warns NotAChain: if something acts on both ``Y`` and ``Zb``: then the lemma does
        not apply, and the report is about (12) alone.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def chain(spread):
    ...     x = pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     y = pyro.sample("y", dist.Normal(x, torch.tensor(spread)).to_event(1))
    ...     pyro.sample("z", dist.Normal(y @ torch.tensor([1.0, 3.0]), 1.0))
    >>> xb, yb = pm.MacroVariable("xb", "x"), pm.MacroVariable("yb", "y")
    >>> pm.irrelevant_cause(chain, xb, yb, "z", model_args=([1.0, 1.0],)).holds
    True
    >>> pm.irrelevant_cause(chain, xb, yb, "z", model_args=([1.0, 2.0],)).holds
    False
    """
    question = Question(
        model, cause, effect, model_args, model_kwargs, given=(earlier,)
    )
    beside = question.common_causes
    if beside:
        warnings.warn(
            f"{question.what}: the program is no chain, {beside} act on the effect "
            f"{name_of(effect)!r} beside the micro state, too. Lemma 10 is about "
            "chains: the independence that is reported does not say that "
            f"realizations agree. Use blocks_backdoor, or compare them by confounding.",
            NotAChain,
            stacklevel=2,
        )
    drawn = Draws(question, num_samples, level, seed, progress)
    statement = (
        f"{name_of(earlier)} is independent of {name_of(effect)} given {cause.name}"
    )
    if question.affine is not None:
        b = question.affine.cause.size
        joint = question.affine.joint()
        left = joint.given(slice(0, b), joint.mean[:b])
        e = question.affine.effect.size
        crossed = left.covariance[:e, e:]
        # What the cause determines has no spread left
        usual = joint.variance[b:].sqrt()
        spread = torch.maximum(left.variance.sqrt(), 1e-6 * usual)
        scale = spread[:e, None] * spread[None, e:]
        return _affine_report(statement, crossed, scale, question)
    if question.finite is not None:
        table = by_context(question.finite)  # (C, B, Y)
        return _finite_report(statement, _from_product(table.transpose(0, 1)), question)
    earlier_one, effect_one = (
        question.cut.others[role][0] for role in ("given", "effect")
    )
    at = drawn.quantiles(question.cut.cause)
    return drawn.test(statement, at, question.cut.cause, [earlier_one], effect_one)


def blocks_backdoor(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    adjustment: Sequence[Thing] | Thing = (),
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
    num_samples: int = 300,
    level: float = 0.01,
    seed: int = 0,
    progress: bool = True,
) -> IndependenceReport:
    """Whether adjusting for something deconfounds the micro state and the effect.

    Conditions (14) and (15), of Lemma 11 and Theorem 4.1: the effect with the micro
    state *set* is independent of the micro state as it *would have been*, given the
    adjustment. Then ``P(Yb | do(xb), b) = P(Yb | xb, b)`` under the micro-realization
    ``P(X | xb, b)``.

    :param adjustment: macro-variables or sites that the cause does not act on.
    :param num_samples: in other programs than affine-Gaussian and finite ones, where
        the condition is tested: by a permutation test on distance correlation, with
        draws given each of some values of the adjustment, at some micro states.
    :param level: of that test; not being rejected does not show that it holds.
    :raises UnsupportedLaw: if such draws cannot be made.
    """
    question = adjusting(model, cause, effect, adjustment, model_args, model_kwargs)
    return condition_15(question, Draws(question, num_samples, level, seed, progress))


def adjusting(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    adjustment: Sequence[Thing] | Thing,
    model_args: tuple,
    model_kwargs: dict[str, Any] | None,
) -> Question:
    single = isinstance(adjustment, (str, MacroVariable))
    listed: Any = (adjustment,) if single else adjustment
    if not isinstance(listed, (tuple, list, set, frozenset)):
        raise PyroMacroError(
            f"adjustment is {adjustment!r}. Expected macro-variables and names of "
            "sites."
        )
    things = tuple(listed)
    question = Question(model, cause, effect, model_args, model_kwargs, given=things)
    size = sum(q.size for q in question.cut.others["given"])
    if size > MOST:
        raise UnsupportedLaw(
            f"{question.what}: the adjustment has {size:,} numbers. Expected at most "
            f"{MOST:,}: adjust for aggregates, such as a MacroVariable over their "
            "plates."
        )
    return question


def condition_15(question: Question, drawn: Draws) -> IndependenceReport:
    names = [q.name for q in question.cut.others["given"]]
    given = f" given {names}" if names else ""
    statement = (
        f"{name_of(question.effect)}, with the micro state of {question.cause.name} "
        f"set, is independent of that state{given} (15)"
    )
    if question.affine is not None:
        crossed, scale = question.affine.crossed_given_others()
        return _affine_report(statement, crossed, scale, question)
    if question.finite is not None:
        return _finite_report(
            statement, _set_against_natural(question.finite), question
        )
    effect, adjusted = question.cut.others["effect"][0], question.cut.others["given"]
    if len(adjusted) > 1 or any(q.size > 1 for q in adjusted):
        raise question.unsupported("condition (15) for more than one number")
    known = adjusted[0] if adjusted else None
    at = None if known is None else drawn.quantiles(known)
    state = question.cut.micro_sites
    return drawn.test(statement, at, known, state, effect, split=True)


@dataclass(frozen=True, eq=False)
class Draws:
    """How an independence is tested where it is not known exactly."""

    question: Question
    num_samples: int = 300
    level: float = 0.01
    seed: int = 0
    progress: bool = True

    @cached_property
    def sampler(self) -> Sampler:
        question = self.question
        return Sampler(
            question.model, question.cut, self.num_samples, self.seed, self.progress
        )

    def quantiles(self, of: Quantity) -> Tensor:
        """Some values that a quantity usually has, shape ``(n,)``."""
        drawn = self.sampler.draw(self.question.model[0], [of])[0].mean(-1)
        levels = torch.tensor((0.25, 0.5, 0.75), dtype=torch.float64, device="cpu")
        return drawn.quantile(levels, interpolation="nearest").unique()

    def test(
        self,
        statement: str,
        at: Tensor | None,
        known: Quantity | None,
        one: Sequence[Quantity],
        other: Quantity,
        split: bool = False,
    ) -> IndependenceReport:
        """Whether ``one`` and ``other`` are independent, given ``known == at``.

        :param split: whether ``one``, the micro sites, are set for what follows.
        """
        pairs = []
        for values in self._settings() if split else [None]:
            fn = self.question.model[0]
            if at is None or known is None:
                fn = fn if values is None else Split(values)(fn)
                drawn = self.sampler.draw(fn, [*one, other])
                drawn = [part.unsqueeze(0) for part in drawn]
            else:
                found = given_total(self.sampler, at, [*one, other], known, values)
                if found is None:
                    raise self.question.unsupported(f"{statement!r}")
                drawn = found
            pairs.append((torch.cat(drawn[:-1], -1), drawn[-1]))
        mine, yours = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        correlation, p = independence(mine, yours, seed=self.seed)
        return IndependenceReport(
            statement,
            False if p <= self.level else None,
            correlation,
            f"Monte Carlo ({self.num_samples:,} draws, permutation test on distance "
            f"correlation, p-value {p:.2g}, level {self.level:g})",
            p,
        )

    def _settings(self) -> list[dict[str, Tensor]]:
        """Some micro states, as they occur."""
        cut = self.question.cut
        drawn = self.sampler.draw(self.question.model[0], cut.micro_sites, count=3)
        return [cut.as_values(parts) for parts in zip(*drawn, strict=True)]


def _affine_report(
    statement: str, crossed: Tensor, scale: Tensor, question: Question
) -> IndependenceReport:
    ratio = crossed.abs() / scale.clamp(min=1e-300)
    deviation = float(torch.where(scale > 0, ratio, 0.0).max()) if len(ratio) else 0.0
    limit = max(EXACT, 100 * question.precision)
    return IndependenceReport(
        statement, deviation <= limit, deviation, "exact: affine-Gaussian"
    )


def _finite_report(
    statement: str, deviation: float, question: Question
) -> IndependenceReport:
    limit = max(EXACT, 100 * question.precision)
    return IndependenceReport(statement, deviation <= limit, deviation, "exact: finite")


def by_context(finite: FiniteEffect) -> Tensor:
    """``P(c, xb, yb)`` for the values ``c`` of the other quantities: ``(C, B, Y)``."""
    _, context_of = finite.contexts
    parts = []
    for c in range(int(context_of.max()) + 1):
        inside = (context_of == c).double().log()
        weight = finite.before + inside
        parts.append(finite.macro(finite.summed(weight[:, None] + finite.state)))
    return torch.stack(parts)


def _from_product(table: Tensor) -> float:
    """How far slices of a table are from products, ``(slices, A, B)``."""
    total = table.sum((-1, -2), keepdim=True)
    table = table / total.clamp(min=1e-300)
    product = table.sum(-1, keepdim=True) * table.sum(-2, keepdim=True)
    apart = (table - product).abs().sum((-1, -2)) / 2
    return float(torch.where(total[:, 0, 0] > 0, apart, 0.0).max())


def _set_against_natural(finite: FiniteEffect) -> float:
    """The deviation from (15): over contexts, and states that are set."""
    _, context_of = finite.contexts
    worst = 0.0
    for c in range(int(context_of.max()) + 1):
        inside = context_of == c
        before = finite.before[inside].exp()
        natural = (before[:, None] * finite.state[inside].exp()).mT  # (X', U)
        for x in range(len(finite.states)):
            effect = finite.by_context[inside, x]  # (U, Y)
            worst = max(worst, _from_product((natural @ effect).unsqueeze(0)))
    return worst
