# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pyro_macro.laws.fibre import NaturalNormal
from pyro_macro.realizations.base import (
    Given,
    MicroState,
    Realization,
    Realized,
)


@dataclass(frozen=True, eq=False)
class Natural(Realization):
    """The natural micro-realization ``P(X | pi(X) = value)`` (Definition 8).

    The micro state is drawn as it would have been found, had the macro value been
    *seen*: ancestors are integrated out. Where nothing confounds the micro state with
    what is downstream, the macro effect then equals the observational conditional
    (Theorem 3.1).

    With ``given``, the sites or macro-variables ``b`` named there are held at their
    value in the run: ``P(X | value, b)`` (Lemma 11, Theorem 4.1). Parameters and their
    priors belong there.

    The law is exact for jointly affine-Gaussian programs, and refused for others.

    :param value: the macro value: a number, or a tensor that broadcasts against the
        plates that stay (with one more dimension for a vector of macro values).
    :param given: a site or macro-variable, or several. An observed site that the
        micro state depends on is held too; other observations count only if given.
    :raises UnsupportedLaw: when it is used on a program whose law is not Gaussian.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     return x1 + 3 * x2
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> natural = pm.macro_do(shop, {sales: pm.Natural(33.0)})
    >>> trace = pyro.poutine.trace(natural).get_trace()
    >>> trace.nodes["sales__micro"]["fn"].mean
    tensor([12.4000, 20.6000])
    """

    value: float | Tensor
    given: Given = ()
    draws_own_law = True

    def realize(self, state: MicroState) -> Realized:
        law = state.gaussian()
        rows, value, pivots = state.fibre(law, state.tensor(self.value, "value"))
        micro = NaturalNormal(law.loc, law.covariance, rows, value, pivots)
        return Realized(micro.to(state.like.dtype), law.layout)
