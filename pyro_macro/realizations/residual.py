# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError, UnknownSite
from pyro_macro.laws.elements import elements_of
from pyro_macro.laws.gaussian.fibre import ResidualNormal
from pyro_macro.laws.rest import ResidualSites
from pyro_macro.realizations.base import (
    Given,
    MicroState,
    Realization,
    Realized,
)


@dataclass(frozen=True, eq=False)
class Residual(Realization):
    """All elements but one follow their own law; that one takes up the rest.

    Shop B of the paper, equation (3). Their own law is that of the program with the
    ancestors integrated out, exact for jointly affine-Gaussian programs; sites of
    other kinds must not depend on random sites that are not given.

    :param value: the macro value.
    :param absorb: what takes up the rest: the name of a site with one element, or the
        index of an element of the micro state, from 0. For a vector of ``m`` macro
        values: ``m`` of these.
    :param given: sites or macro-variables held at their value in the run, as for
        :class:`~pyro_macro.Natural`; parameters and their priors belong there.
    :raises UnsupportedLaw: when the law of the others is not known.
    :raises OffFibre: when the rest lies off the support of the site that takes it.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     return x1 + 3 * x2
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> shop_b = pm.macro_do(shop, {sales: pm.Residual(33.0, absorb="x2")})
    >>> pyro.poutine.trace(shop_b).get_trace().nodes["sales__micro"]["fn"].mean
    tensor([10., 23.])
    """

    value: float | Tensor
    absorb: str | int | Sequence[str | int]
    given: Given = ()
    draws_own_law = True

    def __post_init__(self) -> None:
        super().__post_init__()
        single = isinstance(self.absorb, (str, int))
        names: Any = [self.absorb] if single else self.absorb
        if not isinstance(names, (list, tuple)) or not all(
            isinstance(name, (str, int)) for name in names
        ):
            raise PyroMacroError(
                f"Residual: absorb={self.absorb!r}. Expected the name of a micro site, "
                "the index of an element, or a list of these."
            )

    def realize(self, state: MicroState) -> Realized:
        value = state.tensor(self.value, "value")
        indices = self._indices(state)
        if not state.is_gaussian() and len(indices) == 1:
            state.refuse_causes()
            return self._of_sites(state, value, indices[0])
        law = state.gaussian()
        rows, value, pivots = state.fibre(law, value)
        places = torch.stack([state.place(law, index) for index in indices], -1)
        micro = ResidualNormal(
            law.loc, law.covariance, rows, value, pivots, absorb=places.flatten()
        )
        micro.method = law.method
        return Realized(micro.to(state.like.dtype), law.layout)

    def _of_sites(self, state: MicroState, value: Tensor, absorb: int) -> Realized:
        """Sites of any kind, that depend on nothing random."""
        state.program.refuse_unseen(state.what)
        parts = {name: state.program.sites[name].fn for name in state.macro.micro}
        value = value.squeeze(-1) if state.macro.aggregation.event_dim else value
        elements = elements_of(state.program.sites, state.layout, state.what)
        weights = state.rows[0]
        law = ResidualSites(parts, state.layout, elements, weights, value, absorb)
        return Realized(law, state.layout)

    def _indices(self, state: MicroState) -> list[int]:
        """The elements that take up the rest, one for each macro value."""
        single = isinstance(self.absorb, (str, int))
        names: Any = [self.absorb] if single else self.absorb
        indices = [self._index(name, state) for name in names]
        weights = state.rows
        if len(indices) != weights.shape[0]:
            raise PyroMacroError(
                f"{state.what}: absorb={self.absorb!r} names {len(indices)} elements. "
                f"Expected {weights.shape[0]}, one for each macro value."
            )
        if torch.linalg.matrix_rank(weights[:, indices]) < len(indices):
            raise PyroMacroError(
                f"{state.what}: absorb={self.absorb!r} cannot take up the rest, its "
                "weight in the macro value is zero. Name an element that counts."
            )
        return indices

    def _index(self, name: str | int, state: MicroState) -> int:
        layout = state.layout
        if isinstance(name, str):
            if name not in layout.names:
                raise UnknownSite.named(f"{state.what}: absorb", name, layout.names)
            place = layout.place(name)
            if len(place) > 1:
                raise PyroMacroError(
                    f"{state.what}: absorb={name!r} has {len(place)} elements, and it "
                    "is open which of them takes up the rest. Give the index of one: "
                    f"absorb={place[0]} to {place[-1]}."
                )
            return place[0]
        if not -layout.size <= name < layout.size:
            raise PyroMacroError(
                f"{state.what}: absorb={name} is no element of a micro state of "
                f"{layout.size}. Expected 0 to {layout.size - 1}."
            )
        return name % layout.size
