# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass

from pyro.poutine.util import is_validation_enabled
from torch import Tensor

from pyro_macro.errors import OffFibre
from pyro_macro.laws.product import StackedSites
from pyro_macro.realizations.base import MicroState, Realization, Realized


@dataclass(frozen=True, eq=False)
class Proportional(Realization):
    """The natural micro state, rescaled to ``value``.

    It keeps the mix, and so the average price ``alpha.X / 1.X``, constant (section
    3.1.2). It acts on the natural value: the micro state stays dependent on its
    parents, and the latent site holds the natural state before it is rescaled.

    :param value: the macro value.
    :raises OffFibre: in a run whose natural macro value is zero.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> scaled = pm.macro_do(shop, {sales: pm.Proportional(33.0)})
    >>> nodes = pyro.poutine.trace(scaled).get_trace().nodes
    >>> natural = nodes["sales__micro"]["value"]
    >>> bool(torch.isclose(nodes["x1"]["value"], 33.0 * natural[0] / natural.sum()))
    True
    """

    value: float | Tensor
    acts_on_natural = True
    spans_ranks = True

    def realize(self, state: MicroState) -> Realized:
        value = state.tensor(self.value, "value", event_dim=0).unsqueeze(-1)
        rows = state.rows  # refuses a map that does not scale
        parts = {name: state.sites[name].fn for name in state.macro.micro}

        def rescale(natural: Tensor) -> Tensor:
            natural = natural.to(rows)
            if state.is_apart:
                total = state.total(natural).unsqueeze(-1)
            else:
                total = natural @ rows.mT
            if is_validation_enabled() and bool((total == 0).any()):
                raise OffFibre(
                    f"{state.what}: its natural value is zero in this run, which no "
                    "factor takes to another. Use Natural, Shift or Allocate."
                )
            return natural * (value / total)

        law = StackedSites(parts, state.layout)
        return Realized(law, state.layout, rescale, met=lambda _: state.is_apart)
