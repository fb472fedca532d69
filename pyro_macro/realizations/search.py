# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Which law a micro state has given its macro value: the first one that is known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_macro.aggregation.extreme import Extreme
from pyro_macro.errors import Infeasible, NotAffine, PyroMacroError, UnsupportedLaw
from pyro_macro.laws.extremes import GivenExtreme, has_cdf
from pyro_macro.laws.families import member, of_one_family
from pyro_macro.laws.finite.configurations import mixing_configurations
from pyro_macro.laws.finite.tables import Fibre, finite_law
from pyro_macro.laws.gaussian.fibre import NaturalNormal
from pyro_macro.laws.gaussian.sharded import ShardedNatural
from pyro_macro.laws.mixture import Mixture
from pyro_macro.laws.sampled.chains import Chains, OnFibre, sampled_law
from pyro_macro.laws.sampled.flow import Flow, FlowLaw, fitted_flow
from pyro_macro.program.inner import Shared, shards_of, unwrapped
from pyro_macro.realizations.base import MicroState, Realized

KEPT = 16  # laws that are known by draws, for each realization

Way = Callable[[MicroState, Tensor], "Realized | None"]


def natural_law(
    state: MicroState,
    value: Tensor,
    sampler: Chains | Flow | None,
    store: dict[str, Any],
) -> Realized:
    """The law of a micro state given its macro value, and how it is known.

    :param value: the macro value, as from :meth:`MicroState.tensor`.
    :param sampler: how to sample where no exact law is known.
    :param store: where draws are kept, by what they depend on.
    :raises Infeasible: if no micro state has the macro value.
    :raises UnsupportedLaw: if there is no way to the law, saying why.
    """
    state.program.refuse_unseen(state.what)
    refuse_spread(state)
    ways = (_apart,) if state.is_apart else WAYS
    for way in ways:
        realized = way(state, value)
        if realized is not None:
            return realized
    return _sampled(state, value, sampler, store)


def refuse_spread(state: MicroState) -> None:
    """An error if a micro state depends on sites of other ranks."""
    own = {frame.name for frame in state.layout.frames} | {*state.layout.over}
    relevant, _ = state.program.relevant(state.macro.micro, state.given, state.what)
    for name in sorted(relevant):
        for frame in state.program.sites[name].frames:
            if shards_of(frame) is not None and frame.name not in own:
                raise UnsupportedLaw(
                    f"{state.what}: its micro sites depend on {name!r}, in plate "
                    f"{frame.name!r}, which is split over ranks. Expected ancestors "
                    f"outside of it, or held at their values: given=[{name!r}]."
                )


def _sampled(
    state: MicroState,
    value: Tensor,
    sampler: Chains | Flow | None,
    store: dict[str, Any],
) -> Realized:
    if sampler is None:
        raise UnsupportedLaw(f"{state.what}: its natural law is not known exactly.")
    fibre = Fibre(state.layout, state.macro.aggregation, value, state.what)
    on_fibre = OnFibre(state.program, fibre, state.given)
    dtype = state.like.dtype
    if isinstance(sampler, Flow):
        return Realized(_amortized(on_fibre, sampler, store, dtype), state.layout)
    key = on_fibre.identity()
    if key not in store:
        _keep(store, key, sampled_law(on_fibre, sampler, dtype))
    return Realized(store[key], state.layout)


def _amortized(
    on_fibre: OnFibre, sampler: Flow, store: dict[str, Any], dtype: torch.dtype
) -> FlowLaw:
    fibre = on_fibre.fibre
    outside = (fibre.value < sampler.low) | (fibre.value > sampler.high)
    if bool(outside.any()):
        raise PyroMacroError(
            f"{fibre.what}: value is {fibre.value[outside].flatten()[0].item():g}, and "
            f"the flow is for values from {sampler.low:g} to {sampler.high:g}. Widen "
            "the range."
        )
    key = on_fibre.identity(with_value=False)
    if key not in store:
        _keep(store, key, fitted_flow(on_fibre, sampler))
    return FlowLaw(store[key], on_fibre.constraint(on_fibre.coordinates()), dtype)


def _keep(store: dict[str, Any], key: str, thing: Any) -> None:
    if len(store) >= KEPT:
        store.pop(next(iter(store)))
    store[key] = thing


def _family(state: MicroState, value: Tensor) -> Realized | None:
    rows = state.weights
    if rows is None or len(rows) != 1 or not state.stands_alone():
        return None
    names = state.macro.micro
    members = [member(unwrapped(state.program.sites[name].fn)) for name in names]
    law = of_one_family(members, rows[0])
    if law is None:
        return None
    value = value.squeeze(-1) if state.macro.aggregation.event_dim else value

    def stacked(parts: list[Tensor | None]) -> Tensor:
        values = dict(zip(names, parts, strict=True))
        return state.layout.stack(values).double()  # type: ignore[arg-type]

    size = stacked([m.size for m in members if m is not None])
    scale, common = rows[0].double(), None
    if members[0] is not None and members[0].common is not None:
        common = stacked([m.common for m in members if m is not None])
        common = common if law.is_count else common / scale
        if not bool(torch.isclose(common, common[..., :1], rtol=1e-6).all()):
            return None
        common = common[..., 0]
    result = law(size, common, scale, value)
    result.refuse(state.what)
    return Realized(result, state.layout)


def _apart(state: MicroState, value: Tensor) -> Realized:
    """Elements on several ranks: what is Gaussian needs nothing but sums over them."""
    law = state.gaussian()
    rows, value, _ = state.fibre(law, value)
    micro = ShardedNatural(law.loc, law.covariance, rows, value)
    micro.method = law.method
    return Realized(micro.to(state.like.dtype), law.layout, met=micro.has_drawn)


def _gaussian(state: MicroState, value: Tensor) -> Realized | None:
    if state.weights is None or not state.is_gaussian():
        return None
    try:
        law = state.gaussian()
    except NotAffine:
        return None
    rows, value, pivots = state.fibre(law, value)
    micro = NaturalNormal(law.loc, law.covariance, rows, value, pivots)
    micro.method = law.method
    return Realized(micro.to(state.like.dtype), law.layout)


def _finite(state: MicroState, value: Tensor) -> Realized | None:
    fibre = Fibre(state.layout, state.macro.aggregation, value, state.what)
    found = finite_law(state.program, fibre, state.given, state.like.dtype)
    return None if found is None else Realized(*found)


def _extreme(state: MicroState, value: Tensor) -> Realized | None:
    aggregation = state.macro.aggregation
    parts = {name: state.program.sites[name].fn for name in state.macro.micro}
    if not isinstance(aggregation, Extreme) or not state.stands_alone():
        return None
    if not all(has_cdf(fn) for fn in parts.values()):
        return None
    law = GivenExtreme(parts, state.layout, value, aggregation.sign)
    if not bool(torch.isfinite(law.log_total).all()):
        raise Infeasible(
            f"{state.what}: the macro value {value.tolist()} cannot be reached: no "
            "site can have it while the others do not lie beyond. Choose one within "
            "the supports of the sites."
        )
    return Realized(law, state.layout)


def _mixture(state: MicroState, value: Tensor) -> Realized | None:
    """Held at each configuration of its finite ancestors, the law may be known."""
    program, layout = state.program, state.layout
    depth = value.dim() - state.macro.aggregation.event_dim
    found = mixing_configurations(program, layout, state.given, state.what, depth)
    if found is None:
        return None
    read, log_weights = found
    dim = -log_weights.dim()
    outside = {dim: len(log_weights)}
    shared = program.shared | {
        name: Shared(value, outside=outside) for name, value in read.values.items()
    }
    held = {**program.held, **read.values}
    known = type(program)(program.model, program.micro, program.until, shared, held)
    given = [e for e in state.given if e.macro is not None]
    sites = {name: known.sites[name] for name in state.macro.micro}
    each = MicroState(state.macro, known, given, shared, sites)
    for way in (_family, _gaussian, _extreme):
        realized = way(each, value)
        if realized is not None:
            if realized.layout.over != layout.over:
                return None  # slots that also share sites of other kinds
            return Realized(Mixture(realized.law, log_weights), layout)
    return None


WAYS: tuple[Way, ...] = (_family, _gaussian, _finite, _extreme, _mixture)
