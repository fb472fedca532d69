# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.laws.elements import elements_of
from pyro_macro.laws.families import ScaledDirichlet
from pyro_macro.laws.finite.tables import Fibre, finite_law
from pyro_macro.laws.sampled.chains import Chains
from pyro_macro.laws.sampled.coordinates import linear_coordinates
from pyro_macro.laws.sampled.polytope import UniformOnPolytope
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import Site, as_program
from pyro_macro.realizations.base import MicroState, Realization, Realized
from pyro_macro.realizations.search import natural_law


@dataclass(frozen=True, eq=False)
class MaxEntropy(Realization):
    """The micro state of largest entropy with macro value ``value`` (footnote 2).

    Uniform on the fibre where that is finite (which is the pseudo-inverse of Zennaro
    et al. 2023) or bounded; only the supports of the micro sites matter then. On an
    unbounded fibre entropy is relative to a ``reference``, and the law is the
    reference given the macro value.

    :param value: the macro value.
    :param reference: a distribution over the stacked micro state, event shape
        ``(K,)``.
    :raises Infeasible: if no micro state has the macro value.
    :raises UnsupportedLaw: if the fibre is unbounded and there is no reference.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def dice():
    ...     with pyro.plate("dice", 2):
    ...         pyro.sample("x", dist.Categorical(torch.tensor([1.0, 1.0, 4.0])))
    >>> total = pm.MacroVariable("total", micro="x", over="dice")
    >>> even = pm.macro_do(dice, {total: pm.MaxEntropy(2.0)})
    >>> law = pyro.poutine.trace(even).get_trace().nodes["total__micro"]["fn"]
    >>> law.enumerate_support()
    tensor([[0., 2.],
            [1., 1.],
            [2., 0.]])
    >>> law.log_prob(torch.tensor([0.0, 2.0])).exp()
    tensor(0.3333)
    """

    value: float | Tensor
    reference: Any = None

    def realize(self, state: MicroState) -> Realized:
        value = state.tensor(self.value, "value")
        if self.reference is not None:
            return self._relative(state, value)
        fibre = Fibre(state.layout, state.macro.aggregation, value, state.what)
        found = finite_law(state.program, fibre, (), state.like.dtype, uniform=True)
        if found is not None:
            return Realized(*found)
        return self._bounded(state, fibre)

    def _bounded(self, state: MicroState, fibre: Fibre) -> Realized:
        rows = state.rows.double()
        elements = elements_of(state.program.sites, state.layout, state.what)
        ends = torch.stack([elements.low * rows[0], elements.high * rows[0]])
        low, high = ends.amin(0), ends.amax(0)
        bounded = bool(low.isfinite().all() | high.isfinite().all())
        if len(rows) > 1 or not bounded or bool((rows == 0).any()):
            names = ", ".join(map(repr, state.macro.micro))
            raise UnsupportedLaw(
                f"{state.what}: the micro states of {names} with that value are "
                "unbounded (or there are several values), so that no law is uniform "
                "on them, and entropy needs a reference measure. Give one: "
                "MaxEntropy(value, reference=...), a distribution with event shape "
                f"({state.layout.size},)."
            )
        value = fibre.value.double()
        value = value.squeeze(-1) if state.macro.aggregation.event_dim else value
        linear_coordinates(elements, rows, value.unsqueeze(-1), state.what)  # feasible?
        dtype = state.like.dtype
        if bool(((elements.low == 0) & elements.high.isinf() & (rows[0] > 0)).all()):
            flat, one = torch.ones_like(rows[0]), rows.new_ones(())
            law: Any = ScaledDirichlet(flat, one, rows[0], value.to(dtype))
            law.name = "uniform on the scaled simplex"
        else:
            law = UniformOnPolytope(elements, rows[0], value, dtype)
        return Realized(law, state.layout)

    def _relative(self, state: MicroState, value: Tensor) -> Realized:
        size, found = state.layout.size, getattr(self.reference, "event_shape", None)
        if found != Size([size]):
            raise PyroMacroError(
                f"{state.what}: reference has event shape "
                f"{None if found is None else tuple(found)}. Expected a distribution "
                f"with event shape ({size},), for {state.layout.describe()}."
            )
        like = state.sites[state.macro.micro[0]]
        batch = torch.broadcast_shapes(
            self.reference.batch_shape, state.layout.batch_shape
        )
        fn = self.reference.expand(batch)
        name = f"{state.macro.name}__reference"
        site = replace(
            like, name=name, fn=fn, frames=state.layout.frames, event_shape=found
        )
        macro = MacroVariable(state.macro.name, name, (), state.macro.aggregation)
        law = natural_law(_alone(macro, site, state), value, Chains(), {}).law
        return Realized(law, state.layout)


def _alone(macro: MacroVariable, site: Site, state: MicroState) -> MicroState:
    """A micro state that consists of one site."""
    program = type(state.program)(
        (as_program([site]), (), {}), macro.micro, macro.micro, {}, {}
    )
    return MicroState(macro, program, [], {}, {site.name: program.sites[site.name]})
