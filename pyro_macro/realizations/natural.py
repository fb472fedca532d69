# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pyro_macro.laws.sampled.chains import Chains
from pyro_macro.laws.sampled.flow import Flow
from pyro_macro.macro import MacroVariable
from pyro_macro.program.shapes import broadcast_shapes
from pyro_macro.realizations.base import (
    Given,
    MicroState,
    Realization,
    Realized,
)
from pyro_macro.realizations.search import natural_law


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

    The law is, in this order: that of a closed family (Poisson, gamma, binomial,
    negative binomial, Gaussian sites); that of a jointly affine-Gaussian program; that
    of sites of finite support; of the largest or smallest of independent sites; a
    mixture of these, over latent sites of finite support; and otherwise, for
    continuous sites, draws by NUTS on the fibre. All but the last are exact, and
    ``macro_do(...).describe()`` says which it is.

    :param value: the macro value: a number, or a tensor that broadcasts against the
        plates that stay (with one more dimension for a vector of macro values).
    :param given: a site or macro-variable, or several. An observed site that the
        micro state depends on is held too; other observations count only if given.
    :param sampler: how to sample where no exact law is known: :class:`Chains`, whose
        draws are kept for the next run, or :class:`Flow`, fitted once for a range of
        macro values.
    :raises Infeasible: if no micro state has the macro value.
    :raises UnsupportedLaw: if there is no way to the law.

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
    sampler: Chains | Flow = Chains()
    draws_own_law = True
    spans_ranks = True
    _store: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_store", {})  # of draws, by what they depend on

    def joined(
        self, others: Sequence[tuple[MacroVariable, Realization]]
    ) -> Realization:
        for macro, realization in others[1:]:
            same = isinstance(realization, Natural) and macro.over == others[0][0].over
            mine: Any = self.given
            if not same or set(realization.given) != set(mine):
                return super().joined([others[0], (macro, realization)])
        values = []
        for macro, realization in others:
            number = realization.value  # type: ignore[attr-defined]
            value = number
            if not isinstance(number, Tensor):
                value = torch.as_tensor(number, dtype=torch.float64)
            value = value if value.is_floating_point() else value.float()
            values.append(value if macro.aggregation.event_dim else value.unsqueeze(-1))
        batch = broadcast_shapes(*(v.shape[:-1] for v in values))
        whole = torch.cat([v.expand(batch + v.shape[-1:]) for v in values], -1)
        return Natural(whole, self.given, self.sampler)

    def realize(self, state: MicroState) -> Realized:
        value = state.tensor(self.value, "value")
        return natural_law(state, value, self.sampler, self._store)
