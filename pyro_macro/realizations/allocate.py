# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyro.distributions as dist
from torch import Tensor

from pyro_macro.realizations.base import MicroState, Realization, Realized


@dataclass(frozen=True, eq=False)
class Allocate(Realization):
    """The micro state is the point ``value * shares`` (shop C of Appendix D).

    :param value: the macro value.
    :param shares: the micro state for macro value one, ``pi(shares) = 1``: shape
        ``(K,)``, in the order of the micro sites, with any batch dimensions. For a
        vector of ``m`` macro values: shape ``(m, K)``, one row for each. Over a
        sharded plate those of this rank, or of all.
    :raises OffFibre: when the shares turn out not to have macro value one.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     return x1 + 3 * x2
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> pm.macro_do(shop, {sales: pm.Allocate(33.0, shares=[1.0, 0.0])})()
    tensor(33.)
    """

    value: float | Tensor
    shares: Tensor | Sequence[float]
    spans_ranks = True

    def realize(self, state: MicroState) -> Realized:
        value = state.tensor(self.value, "value")
        event_dim = state.macro.aggregation.event_dim
        shares, total = state.unit_total(self.shares, "shares have", event_dim)
        if event_dim:
            point = (value.unsqueeze(-2) @ shares).squeeze(-2)
        else:
            # Exactly on the fibre, also where the shares are rounded
            point = value.unsqueeze(-1) * (shares / total.unsqueeze(-1))
        law = dist.Delta(point, event_dim=1)
        return Realized(law, state.layout, met=lambda _: state.is_apart)
