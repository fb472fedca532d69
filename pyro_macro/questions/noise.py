# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The noise of a macro model: what a realization has to leave alone (sec. 3.1.2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.handlers import macro_do
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.feasibility import coefficient
from pyro_macro.questions.question import Question
from pyro_macro.questions.sampling import Sampler
from pyro_macro.realizations import Realization


@dataclass(frozen=True, eq=False)
class MacroNoise:
    """``M = P(W <= w | xb)`` for ``W = alpha.X``, equations (5) and (6).

    ``Yb = phi(xb, M) + V`` is a causal model of the macro-variables with the noise
    ``(M, V)``; ``M`` is uniform whatever ``xb``, so that a realization which leaves it
    as it was inhibits the confounding, if nothing confounds the micro state and ``V``.

    :ivar mean: of ``W``.
    :ivar slope: of ``W`` in ``xb``.
    :ivar spread: the standard deviation of ``W`` given ``xb``; not zero.
    """

    question: Question = field(repr=False)
    centre: float
    mean: float
    slope: float
    spread: float

    def __call__(self, cause: Tensor, through: Tensor) -> Tensor:
        """``M`` for macro values and values of ``W``, of the same shape."""
        expected = self.mean + self.slope * (cause - self.centre)
        return torch.special.ndtr((through - expected) / self.spread)

    def inverse(self, cause: Tensor, noise: Tensor) -> Tensor:
        """``phi(xb, M)``: the ``W`` that has some noise."""
        expected = self.mean + self.slope * (cause - self.centre)
        return expected + self.spread * torch.special.ndtri(noise)

    def change(
        self, realization: Realization, num_samples: int = 1000, seed: int = 0
    ) -> Tensor:
        """By how much ``M`` moves in each of some draws, shape ``(num_samples,)``.

        :param realization: one that acts on the natural micro state, such as
            :class:`~pyro_macro.Shift` or :class:`~pyro_macro.Proportional`.
        :raises PyroMacroError: if it draws a new micro state, which has no earlier one.
        """
        question = self.question
        if not isinstance(realization, Realization) or not realization.acts_on_natural:
            raise PyroMacroError(
                f"{question.what}: {realization!r} does not act on the natural micro "
                "state, so that there is no noise before and after. Expected Shift or "
                "Proportional; confounding compares the laws under others."
            )
        fn = macro_do(question.model[0], {question.cause: realization})
        sampler = Sampler(question.model, question.cut, num_samples, seed)
        before, after = sampler.before_and_after(fn)
        affine = question.affine
        assert affine is not None

        def noise(values: dict[str, Tensor]) -> Tensor:
            lead = (num_samples,)
            cause = affine.cause.of(values, lead, sampler.depth)[:, 0]
            parts = [values[n].reshape(num_samples, -1) for n in affine.cause.sites]
            return self(cause, torch.cat(parts, -1).double() @ affine.alpha[0])

        return noise(after) - noise(before)


def macro_noise(
    model: Callable[..., Any],
    cause: MacroVariable,
    effect: MacroVariable | str,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> MacroNoise:
    """The noise of the macro model that makes it unconfounded (section 3.1.2).

    :raises UnsupportedLaw: if the program is not jointly affine-Gaussian, or the effect
        moves with the macro value alone.

    >>> import pyro, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     pyro.deterministic("revenue", x1 + 3 * x2)
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> noise = pm.macro_noise(shop, sales, "revenue")
    >>> noise(torch.tensor(33.0), torch.tensor(74.2))
    tensor(0.5000)
    >>> bool(noise.change(pm.Shift(5.0)).abs().max() < 1e-4)
    True
    """
    question = Question(model, cause, effect, model_args, model_kwargs)
    affine = question.affine
    if affine is None:
        raise question.unsupported("the noise of the macro model")
    if affine.effect.size != 1:
        raise PyroMacroError(
            f"{question.what}: the effect has shape {tuple(affine.effect.shape)}. "
            "Expected one number."
        )
    slope = float(coefficient(question, affine, None))
    through = affine.through()
    spread = float(through.covariance[1, 1] - slope**2 * through.covariance[0, 0])
    if spread <= 1e-12 * float(through.covariance[1, 1]):
        raise question.degenerate()
    return MacroNoise(
        question, float(through.mean[0]), float(through.mean[1]), slope, spread**0.5
    )
