# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.laws.elements import variance_of
from pyro_macro.laws.gaussian.fibre import NaturalNormal
from pyro_macro.laws.gaussian.sharded import ShardedNatural
from pyro_macro.laws.product import StackedSites
from pyro_macro.program.inner import unwrapped
from pyro_macro.realizations.base import (
    Given,
    MicroState,
    Realization,
    Realized,
)


@dataclass(frozen=True, eq=False)
class Shift(Realization):
    """The natural micro state plus ``delta * along`` (Appendices B and C.1).

    The macro value moves by ``delta`` from whatever it naturally is, and the structural
    coefficient is ``alpha . along``. It acts on the natural value: the micro state
    stays dependent on its parents, and the latent site holds the natural state before
    the shift.

    :param delta: by how much the macro value moves.
    :param along: the direction, ``pi(along) = 1``: shape ``(K,)``. By default the
        natural direction ``Cov(X, Xb) / Var(Xb)``, for which the structural
        coefficient is that of the natural realization.
    :param given: what is held when the natural direction is computed, as for
        :class:`~pyro_macro.Natural`; parameters and their priors belong there.
    :raises OffFibre: when ``along`` turns out not to have macro value one.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> shifted = pm.macro_do(shop, {sales: pm.Shift(5.0)})
    >>> nodes = pyro.poutine.trace(shifted).get_trace().nodes
    >>> natural = nodes["sales__micro"]["value"]
    >>> moved = torch.stack([nodes["x1"]["value"], nodes["x2"]["value"]]) - natural
    >>> moved.round(decimals=3)
    tensor([4., 1.])
    """

    delta: float | Tensor
    along: Tensor | Sequence[float] | None = None
    given: Given = ()
    acts_on_natural = True
    spans_ranks = True

    def macro_value(self, state: MicroState) -> None:
        return None

    def realize(self, state: MicroState) -> Realized:
        delta = state.tensor(self.delta, "delta", event_dim=0)
        step = self._step(state, delta)
        parts = {name: state.sites[name].fn for name in state.macro.micro}
        return Realized(
            StackedSites(parts, state.layout),
            state.layout,
            lambda natural: natural + step,
        )

    def _step(self, state: MicroState, delta: Tensor) -> Tensor:
        if state.rows.shape[0] != 1:
            raise PyroMacroError(
                f"{state.what}: a vector of macro values has no single direction to "
                "shift along. Shift one macro-variable for each row."
            )
        if self.along is None and not state.is_gaussian():
            state.refuse_causes("or state a direction, along=...")
            return delta.unsqueeze(-1) * self._by_variance(state)
        if self.along is None:
            law = state.gaussian()
            rows, moved, pivots = state.fibre(law, delta)
            kind = ShardedNatural if state.is_apart else NaturalNormal
            gain = kind(law.loc, law.covariance, rows, moved, pivots).gain
            step = (gain @ moved.unsqueeze(-1)).squeeze(-1)
            return state.layout.stack(law.layout.unstack(step)).to(state.like)
        along = state.unit_state(self.along, "along has")
        return delta.unsqueeze(-1) * along

    @staticmethod
    def _by_variance(state: MicroState) -> Tensor:
        """``Cov(X, Xb) / Var(Xb)`` of independent sites."""
        state.program.refuse_unseen(state.what)
        parts = {}
        for name in state.macro.micro:
            site = state.program.sites[name]
            own = variance_of(unwrapped(site.fn))
            parts[name] = own + torch.zeros_like(site.value, dtype=own.dtype)
        weighted = state.layout.stack(parts).to(state.like) * state.rows[0]
        total = state.across((weighted * state.rows[0]).sum(-1, keepdim=True))
        if not bool((total.isfinite() & (total > 0)).all()):
            raise UnsupportedLaw(
                f"{state.what}: its variance is {total.flatten()[0].item()}, so that "
                "there is no natural direction. State one: Shift(delta, along=...)."
            )
        return weighted / total
