# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Refusals: what a run must not do silently, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.constraints import real, real_vector
from pyro.ops.provenance import detach_provenance
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_macro.errors import OffFibre, PyroMacroError, UnsupportedLaw
from pyro_macro.intervention import Target
from pyro_macro.laws.base import tolerance
from pyro_macro.macro import MacroVariable
from pyro_macro.on_the_fly import Pending
from pyro_macro.program.inner import same_parameters, unwrapped
from pyro_macro.realizations import MicroState, Realization

GRID = (
    "A grid of macro values needs a plate of its own: run the intervened model inside "
    "`with pyro.plate('grid', n, dim=d):`, with d left of all plates of the model, and "
    "give the values the shape (n, 1, ..., 1) that puts them there."
)


def checked(
    interventions: Mapping[MacroVariable, Realization] | None,
) -> dict[MacroVariable, Realization]:
    if not isinstance(interventions, Mapping) or not interventions:
        raise PyroMacroError(
            f"macro_do: interventions are {interventions!r}. Expected a dictionary "
            "from MacroVariable to realization, such as {sales: Natural(33.0)}."
        )
    for macro, realization in interventions.items():
        if not isinstance(macro, MacroVariable):
            raise PyroMacroError(
                f"macro_do: {macro!r} is no MacroVariable. To set a single site, use "
                "`pyro.poutine.do`."
            )
        if not isinstance(realization, Realization):
            raise PyroMacroError(
                f"macro_do: {macro.name!r} is set to {realization!r}. Expected a "
                "micro-realization: setting a total does not say what happens to its "
                "parts. Say Natural(value), Allocate(value, shares), "
                "Residual(value, absorb), Proportional(value), Shift(delta) or "
                "Explicit(value, fn)."
            )
    refuse_repeated("macro_do", interventions)
    return dict(interventions)


def refuse_repeated(who: str, macros: Iterable[MacroVariable]) -> None:
    names = [macro.name for macro in macros]
    for name in names:
        if names.count(name) > 1:
            raise PyroMacroError(
                f"{who}: two macro-variables have the name {name!r}. Expected "
                "different names: they name sites of the trace."
            )


def refuse_moved(target: Target, name: str, msg: Message) -> None:
    """A site without parents has the same distribution in the run as when read."""
    site = target.state.program.sites[name]
    if not site.parents and not same_parameters(site.fn, msg["fn"]):
        raise UnsupportedLaw(
            f"{target.what}: micro site {name!r} has no parents, and yet another "
            "distribution in the run than when the program was read. Expected a "
            "function of its arguments and sites: no numbers drawn outside of Pyro "
            "(torch.randn, dropout), no iterators that are used up."
        )


def refuse_mask(target: Target, msg: Message) -> None:
    mask = msg["mask"]
    if not isinstance(mask, Tensor):
        return
    kept = target.realized.layout.batch
    for dim in range(-mask.dim(), 0):
        if mask.shape[dim] > 1 and dim not in kept:
            raise PyroMacroError(
                f"{target.what}: a mask of shape {tuple(mask.shape)} inside covers "
                "some elements of the micro state and not others, which has no meaning "
                "for their total. Mask whole micro states, or outside of macro_do."
            )


def refuse_changed(
    what: str, which: str, value: Tensor, msg: Message, by: str = "macro_do"
) -> None:
    if not _is_same(value, msg):
        raise PyroMacroError(
            f"{what}: {which} is set by {by}, and a handler outside (condition, do or "
            "the like) gave it another value, which its parts would not follow. "
            "Condition or set sites that are random, such as the latent site "
            "'<macro-variable>__micro' of macro_do, or turn the two handlers round."
        )


def refuse_overwritten(what: str, value: Tensor, msg: Message, seen: bool) -> None:
    """The program goes on with the value that a micro site had at the handler.

    Handlers inside have the last word, and may use it after all others have looked.

    :param seen: whether the value was only looked at, and not set.
    """
    if _is_same(value, msg):
        return
    if seen:
        raise PyroMacroError(
            f"{what} got another value from a handler inside, such as a `do`, so that "
            "the value which propagates cannot be seen. Turn the two round: put "
            "aggregate inside."
        )
    raise PyroMacroError(
        f"{what} is set by macro_do, and a handler inside, such as a `do`, gave it "
        "another value, with which the program went on. Both cannot hold: drop one of "
        "the two interventions."
    )


def _is_same(value: Tensor, msg: Message) -> bool:
    if msg["value"] is value:
        return True
    found: Any = detach_provenance(msg["value"])  # type: ignore[type-var]
    known = detach_provenance(value)
    return found is known or (
        # the same tensor behind another object, as inner runs hand out
        isinstance(found, Tensor)
        and not isinstance(known, Pending)
        and (found.shape, found.dtype) == (known.shape, known.dtype)
        and (found.data_ptr() == known.data_ptr() or torch.equal(found, known))
    )


def refuse_unexplained(what: str, value: Tensor, event_dim: int, site: Message) -> None:
    """Each dimension of a macro value has to be that of a plate."""
    batch = value.shape[: value.dim() - event_dim]
    plates = {f.dim: f.size for f in site["cond_indep_stack"] if f.vectorized}
    for dim in range(-len(batch), 0):
        if batch[dim] > 1 and plates.get(dim) != batch[dim]:
            found = f"the plates there are {plates}" if plates else "there is no plate"
            raise PyroMacroError(
                f"{what}: the value has shape {tuple(value.shape)}, and no plate of "
                f"size {batch[dim]} at dim {dim} ({found}). {GRID}"
            )


def refuse_off_fibre(
    what: str, state: MicroState, micro: Tensor, value: Tensor
) -> None:
    total = state.total(micro)
    miss = (total - value).abs()
    if bool((miss <= tolerance(micro) * value.abs()).all()):
        return  # spares a pass over the micro state
    rows = state.weights
    if rows is None:
        size = total.abs() + value.abs()
    else:
        size = state.across(micro.abs() @ rows.abs().mT)
        size = (
            size if value.dim() and state.macro.aggregation.event_dim else size[..., 0]
        )
        size = size + value.abs()
    if not bool((miss <= tolerance(micro) * size).all()):
        worst = miss.nan_to_num(nan=float("inf")).flatten().argmax()
        found = total.flatten()[worst].item()
        raise OffFibre(
            f"{what}: the micro state has macro value {found}. Expected "
            f"{value.expand(miss.shape).flatten()[worst].item()}, the value that was "
            "set, in every draw. Look at the distribution of the realization, or at "
            "what a handler outside does to the latent site."
        )


def refuse_off_support(target: Target, values: Mapping[str, Tensor]) -> None:
    """A micro site gets a value that its own distribution could have."""
    for name, value in values.items():
        fn = target.state.sites[name].fn
        own = unwrapped(fn)
        support = getattr(own, "support", None)
        if isinstance(own, dist.Delta) or support in (real, real_vector, None):
            continue
        inside = fn.support.check(value)
        if not bool(inside.all()):
            depth = value.dim() - inside.dim()
            worst = value.flatten(end_dim=-1 - depth) if depth else value.flatten()
            worst = worst[(~inside).flatten().nonzero()[0, 0]]
            raise OffFibre(
                f"{target.what}: micro site {name!r} gets the value {worst.tolist()}, "
                f"off its support {_shown(support)}{_miss(support, value)}. Choose a "
                "macro value, or a realization, that its distribution can follow."
            )


def _shown(support: Any) -> str:
    """A support without the numbers of large tensors."""
    shown = str(support)
    return shown if len(shown) < 80 else f"{type(support).__name__.strip('_')}(...)"


def _miss(support: Any, value: Tensor) -> str:
    """By how much a value misses an interval, in words."""
    low = torch.as_tensor(getattr(support, "lower_bound", -torch.inf)).to(value)
    high = torch.as_tensor(getattr(support, "upper_bound", torch.inf)).to(value)
    miss = torch.maximum(low - value, value - high).max().item()
    if miss > 0:
        return f", by {miss:g}"
    return ", which has whole numbers only" if support.is_discrete else ""
