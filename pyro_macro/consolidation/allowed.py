# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Which interventions are allowed, and which are being made."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro.contrib.autoname.scoping import NameCountMessenger, ScopeMessenger
from pyro.poutine.block_messenger import BlockMessenger
from pyro.poutine.condition_messenger import ConditionMessenger
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.equalize_messenger import EqualizeMessenger
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.runtime import Message
from torch import Tensor

from pyro_macro.errors import InterventionNotAllowed, PyroMacroError, UnknownSite
from pyro_macro.program.inner import InnerRun, Site
from pyro_macro.program.shapes import broadcast_shapes

Allow = Collection[Any]


class Allowed:
    """The interventions that a fused program was prepared for: ``I`` of Definition 1.

    Sites that stay may always be intervened on, and none of them is what is asked here.

    :ivar free: sites that may be set to any value, alone or together with others.
    :ivar explicit: interventions that may be made as they are, and in no other
        combination.
    """

    def __init__(self, allow: Allow, sites: Collection[str]) -> None:
        if isinstance(allow, (str, Mapping)):
            allow = [allow]
        free, explicit = [], []
        for one in allow:
            if isinstance(one, Mapping):
                explicit.append({str(k): v for k, v in one.items()})
            elif isinstance(one, str):
                free.append(one)
            else:
                raise PyroMacroError(
                    f"consolidate: allow={one!r} is neither the name of a site nor an "
                    "intervention {site: value}."
                )
        for name in [*free, *(k for one in explicit for k in one)]:
            if name not in sites:
                raise UnknownSite.named("consolidate, allow", name, sites)
        self.free, self.names = frozenset(free), frozenset(sites)
        self.explicit = tuple(explicit)

    def values(self, of: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """The values that explicit interventions set each site to."""
        found: dict[str, list[Tensor]] = {}
        for one in self.explicit:
            for name, value in one.items():
                if isinstance(value, (Tensor, numbers.Number)):
                    like = of[name].site.value
                    found.setdefault(name, []).append(torch.as_tensor(value).to(like))
        return found

    @property
    def sites(self) -> frozenset[str]:
        """All sites that some allowed intervention sets."""
        return self.free.union(*self.explicit) if self.explicit else self.free

    def on(self, names: Collection[str]) -> list[dict[str, Any]]:
        """What allowed interventions do to some sites, none included (``psi``).

        Free sites are set to ``None``, that is to anything.
        """
        found: list[dict[str, Any]] = [{}]
        found += [{n: None} for n in sorted(self.free) if n in names]
        for one in self.explicit:
            part = {n: v for n, v in one.items() if n in names}
            if part and part not in found:
                found.append(part)
        return found

    def check(self, made: Mapping[str, Any], stays: Collection[str]) -> None:
        """Refuses what is not allowed.

        :param made: the values that are set, of sites that stay among them.
        :raises InterventionNotAllowed: naming the sites, and what is allowed.
        """
        rest = {n: v for n, v in made.items() if n not in stays}
        explicit = [
            {n: v for n, v in e.items() if n not in stays} for e in self.explicit
        ]
        free = self.free
        if rest.keys() <= free or any(_is(rest, one, free) for one in explicit):
            return
        for name in rest:
            if name not in self.names:
                raise UnknownSite.named("do", name, self.names)
        what = ", ".join(f"do({n} = {_short(v)})" for n, v in rest.items())
        raise InterventionNotAllowed(
            f"{what}: this program was consolidated without it, so that its effect "
            f"could not be computed. Allowed: {self}. Add it to `allow`, or the site "
            "to `keep`."
        )

    def __str__(self) -> str:
        parts = []
        if self.free:
            names = sorted(self.free)
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            parts.append(f"any values of {shown}, alone or together")
        parts += [
            " and ".join(f"do({n} = {_short(v)})" for n, v in one.items())
            for one in self.explicit[:12]
        ]
        if len(self.explicit) > 12:
            parts.append(f"{len(self.explicit) - 12} more")
        parts.append("any value of the sites that were kept")
        return "; ".join(parts)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(value.tolist()) if value.numel() <= 4 else f"<{tuple(value.shape)}>"
    return str(value)


def _is(made: Mapping[str, Any], one: Mapping[str, Any], free: frozenset[str]) -> bool:
    """Whether an intervention is an explicit one, and else on free sites alone."""
    if not one or not one.keys() <= made.keys() or not made.keys() - one.keys() <= free:
        return False
    try:
        pairs = [(torch.as_tensor(made[n]), torch.as_tensor(v)) for n, v in one.items()]
        return all(bool((found.cpu() == v.cpu()).all()) for found, v in pairs)
    except (TypeError, RuntimeError):  # no numbers, or of other shapes
        return False


@dataclass
class Made:
    """What handlers around a run do to the sites of a program.

    :ivar values: the values that sites are set to by interventions.
    :ivar replaced: sites whose mechanism is replaced by a handler that takes care of
        their values itself.
    :ivar unread: those of them whose handler takes the program as it comes.
    :ivar conditioned: sites that are conditioned on.
    :ivar taken_apart: whether this is a run that reads mechanisms.
    """

    values: dict[str, Any] = field(default_factory=dict)
    replaced: set[str] = field(default_factory=set)
    unread: set[str] = field(default_factory=set)
    conditioned: set[str] = field(default_factory=set)
    taken_apart: bool = False


def being_made(names: Collection[str]) -> Made:
    """The interventions that handlers around a run make.

    Handlers that rename sites, or hide them, are taken into account, whatever the order
    in which they nest. Where two set the same site, the inner one wins, as in Pyro.

    :param names: the sites of the program; of others nothing is said.
    """
    stack: list[Messenger] = []

    def note(messenger: Messenger) -> bool:
        stack.append(messenger)
        return False

    with block_messengers(note):
        pass
    made, prefix = Made(), ""
    hidden: list[BlockMessenger] = []
    inner = counted = False

    def visible(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
        for key in keys:
            name = key[len(prefix) :]
            shown = not any(_hides(block, name) for block in hidden)
            if key.startswith(prefix) and name in names and shown:
                yield key, name

    for messenger in reversed(stack):
        if isinstance(messenger, ScopeMessenger):
            prefix = f"{messenger.prefix}/{prefix}"
        elif isinstance(messenger, NameCountMessenger):
            counted = True
        elif isinstance(messenger, EqualizeMessenger) and not messenger.keep_dist:
            raise PyroMacroError(
                "consolidate: poutine.equalize around a consolidated model sets sites "
                "behind its back. Apply it to the model before it is consolidated."
            )
        elif isinstance(messenger, BlockMessenger):
            hidden.append(messenger)
        elif isinstance(messenger, (DoMessenger, ConditionMessenger)):
            data = messenger.data
            if counted and isinstance(messenger, DoMessenger):
                raise PyroMacroError(
                    "consolidate: poutine.do is outside of a handler that counts names "
                    "(name_count), so that what it sets cannot be told. Apply it to "
                    "the consolidated model itself."
                )
            data = data if isinstance(data, Mapping) else _values_of(data)
            for key, name in visible(k for k, v in data.items() if v is not None):
                if isinstance(messenger, DoMessenger):
                    made.values.setdefault(name, data[key])
                else:
                    made.conditioned.add(name)
        elif not inner:
            made.taken_apart |= getattr(messenger, "takes_apart", False)
            inner = isinstance(messenger, InnerRun)  # it hides what others replace
            replaced = {n for _, n in visible(getattr(messenger, "sets", ()))}
            if inner and replaced:
                raise PyroMacroError(
                    f"consolidate: {sorted(replaced)} are to be cut off from their "
                    "causes, to see what they act on. A consolidated program does not "
                    "tell: its sites are correlated without one acting on the other. "
                    "Ask the program itself, not one that is wrapped in other "
                    "handlers, or its `unfused`."
                )
            made.replaced |= replaced
            if not getattr(messenger, "wrapped", True):
                made.unread |= replaced
    return made


def _values_of(trace: Any) -> dict[str, Any]:
    return {name: node.get("value") for name, node in trace.nodes.items()}


def _hides(block: BlockMessenger, name: str) -> bool:
    msg: Any = Message(type="sample", name=name, infer={}, is_observed=False)
    try:
        return bool(block.hide_fn(msg))
    except Exception:  # it looks at more than the name: it will at the message itself
        return False


def as_value(name: str, value: Any, site: Site) -> Tensor:
    """A value that a site is set to, checked.

    :raises InterventionNotAllowed: if it does not fit the site.
    """
    if not isinstance(value, (Tensor, numbers.Number)):
        raise InterventionNotAllowed(
            f"do({name} = {value!r}): expected a number or a tensor."
        )
    like = site.value
    found = torch.as_tensor(value, device=like.device)
    if isinstance(value, float) and like.is_floating_point():
        found = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    event = tuple(site.event_shape)
    if event and tuple(found.shape[found.dim() - len(event) :]) != event:
        if found.dim():
            raise InterventionNotAllowed(
                f"do({name} = ...): found a value of shape {tuple(found.shape)}, "
                f"expected one that ends in {event}, the event shape of the site."
            )
        found = found.expand(event)
    plates = site.shape[: len(site.shape) - len(event)]
    batch = found.shape[: found.dim() - len(event)]
    try:
        broadcast_shapes(batch, plates)
    except RuntimeError:
        raise InterventionNotAllowed(
            f"do({name} = ...): found a value of shape {tuple(found.shape)}, which "
            f"does not broadcast against {tuple(site.shape)}, that of the site."
        ) from None
    if found.is_floating_point() and bool(found.isnan().any()):
        raise InterventionNotAllowed(f"do({name} = ...): the value is NaN.")
    cast = found.to(like.dtype)
    if not bool((cast == found).all()) and not found.is_floating_point():
        raise InterventionNotAllowed(
            f"do({name} = {_short(value)}): the site's values are {like.dtype}."
        )
    if not like.is_floating_point() and bool((cast.to(found.dtype) != found).any()):
        raise InterventionNotAllowed(
            f"do({name} = {_short(value)}): the site's values are {like.dtype}."
        )
    if not site.deterministic:
        support = getattr(site.fn, "support", None)
        if support is not None:
            inside = support.check(cast)
            if not bool(inside.all()):
                raise InterventionNotAllowed(
                    f"do({name} = {_short(value)}): the value is not in the support of "
                    f"the site, {support}."
                )
    return cast
