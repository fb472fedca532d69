# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The fused program: a Pyro model of the sites that stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import block_messengers
from pyro.poutine.runtime import Message, apply_stack
from torch import Tensor

from pyro_macro.consolidation.affine_component import AffineComponent
from pyro_macro.consolidation.allowed import Allow, Allowed, Made, as_value, being_made
from pyro_macro.consolidation.finite_component import FiniteComponent
from pyro_macro.consolidation.known import Known
from pyro_macro.consolidation.partition import boundary, clusters
from pyro_macro.consolidation.structure import AFFINE, Structure
from pyro_macro.errors import PyroMacroError, UnknownSite
from pyro_macro.program.mechanisms import (
    arguments,
    put_back,
    read_mechanisms,
)
from pyro_macro.program.tape import ARGUMENT, INDICES, PARAM, SITE, Leaf

PREPARED = 16  # programs for arguments of different shapes, that are remembered


@dataclass(frozen=True, eq=False)
class Request:
    """What was asked for."""

    keep: tuple[str, ...]
    allow: Allow
    partition: tuple[frozenset[str], ...] | None


class Prepared:
    """A program, consolidated for arguments of some shape.

    :ivar mechanisms: the program as it was read.
    :ivar structure: what stays and what is eliminated; ``None`` if the program could
        not be taken apart, and is run as it is.
    :ivar trouble: why not.
    """

    def __init__(
        self, model: Callable[..., Any], request: Request, args: tuple, kwargs: dict
    ) -> None:
        self.mechanisms = read_mechanisms(model, args, kwargs)
        self.model = model
        of = self.mechanisms.of
        for name in request.keep:
            if name not in of:
                raise UnknownSite.named("consolidate, keep", name, of)
        self.allowed = Allowed(request.allow, of)
        self.names = frozenset(of)
        kept = {*request.keep, *self.mechanisms.factors}
        kept |= {name for name, m in of.items() if m.site.observed}
        why: dict[str, str] = {}
        self.clusters = None
        if request.partition is not None:
            graph = self.mechanisms.graph()
            self.clusters = clusters(graph, request.partition)
            for name in boundary(graph, self.clusters):
                if name not in kept:
                    why[name] = "another cluster needs it"
        self.trouble = self.mechanisms.trouble
        self.structure: Structure | None = None
        self.components: dict[str, AffineComponent | FiniteComponent] = {}
        if self.trouble is None:
            self._take_apart(kept, why)

    def _take_apart(self, kept: set[str], why: dict[str, str]) -> None:
        structure = Structure(self.mechanisms, kept, why)
        needed = [n for n in self.mechanisms.of if n not in structure.dropped]
        for name in needed:
            trouble = self.mechanisms.of[name].trouble
            if trouble is not None:
                self.trouble = f"site {name!r}: {trouble}"
                return
        self.structure = structure
        for component in structure.components:
            kind = AffineComponent if component.kind == AFFINE else FiniteComponent
            made = kind(component, structure)
            for name in component.children:
                self.components[name] = made


class Fused:
    """A Pyro model whose mechanisms are fused. See :func:`consolidate`."""

    def __init__(
        self,
        model: Callable[..., Any],
        request: Request,
        model_args: tuple,
        model_kwargs: dict[str, Any],
    ) -> None:
        self.unfused = model
        self._request = request
        self._prepared: dict[Any, Prepared] = {}
        self._args, self._kwargs = model_args, model_kwargs
        functools.update_wrapper(self, model, updated=())
        self._first = self._prepare(model_args, model_kwargs)

    def __repr__(self) -> str:
        name = getattr(self.unfused, "__name__", type(self.unfused).__name__)
        stays = ", ".join(self.sites)
        return f"consolidate({name}: {stays})"

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites that are left, in program order."""
        first = self._first
        if first.structure is None:
            return tuple(first.mechanisms.of)
        return tuple(first.structure.stays)

    @property
    def allowed(self) -> Allowed:
        """The interventions it was prepared for."""
        return self._first.allowed

    def _prepare(self, args: tuple, kwargs: dict[str, Any]) -> Prepared:
        key = _signature(args, kwargs)
        first = getattr(self, "_first", None)
        if first is not None and any(
            f.vectorized for m in first.mechanisms.of.values() for f in m.site.frames
        ):
            # Plates inside take the dimensions that those outside leave
            key = (key, _taken_dims())
        elif first is None:
            self._prepared[key, _taken_dims()] = self._prepared[key] = Prepared(
                self.unfused, self._request, args, kwargs
            )
        if key not in self._prepared:
            if len(self._prepared) >= PREPARED:
                self._prepared.clear()
            self._prepared[key] = Prepared(self.unfused, self._request, args, kwargs)
        return self._prepared[key]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        prepared = self._prepare(args, kwargs)
        made = being_made(prepared.names)
        if prepared.structure is None:
            if made.values:
                prepared.allowed.check(made.values, self._request.keep)
            return self.unfused(*args, **kwargs)
        stays = set(prepared.structure.stays)
        for name in made.conditioned:
            if name not in stays:
                raise PyroMacroError(
                    f"site {name!r} is conditioned on, but was fused away: keep it, "
                    f"keep=[..., {name!r}]."
                )
        if made.values:
            prepared.allowed.check(made.values, stays)
        return _Run(prepared, made, args, kwargs).go()


class _Run:
    """One run of a fused program."""

    def __init__(
        self,
        prepared: Prepared,
        made: Made,
        args: tuple,
        kwargs: dict[str, Any],
    ) -> None:
        assert prepared.structure is not None
        self.prepared, self.structure = prepared, prepared.structure
        self.of = prepared.mechanisms.of
        inputs: dict[Leaf, Tensor] = dict(arguments(args, kwargs))
        self.known = Known(self.structure, inputs)
        self.stays = self.structure.stays
        self.made = made.values
        self.interventions = frozenset((*made.values, *made.replaced))
        self.runs: dict[int, Any] = {}

    def go(self) -> Any:
        self._ask_inputs()
        stays = set(self.stays)
        for name, value in self.made.items():
            if name not in stays:
                self._set(name, value)
        for name in self.stays:
            self._meet(name)
        return self._output()

    def _ask_inputs(self) -> None:
        """Parameters, and indices of plates that draw some."""
        mechanisms = self.prepared.mechanisms
        for name, statement in mechanisms.params.items():
            msg = statement.copy()
            apply_stack(msg)
            self.known.inputs[PARAM, name] = msg["value"]  # type: ignore[index]
        for name, (size, count, dim) in mechanisms.subsampled.items():
            plate = pyro.plate(name, size, count, dim=dim)
            self.known.inputs[INDICES, name] = plate._indices  # type: ignore[index]

    def _set(self, name: str, value: Any) -> None:
        """An intervention on a site that is not computed any more."""
        site = self.of[name].site
        tensor = as_value(name, value, site)
        self.known.set(name, tensor)
        with block_messengers(lambda m: isinstance(m, DoMessenger)):
            self._emit(name, _certain(tensor, site), tensor, {"_deterministic": True})

    def _meet(self, name: str) -> None:
        mechanism = self.of[name]
        site = mechanism.site
        run = self._run_of(name) if name not in self.interventions else None
        law: Any
        if run is not None:
            law = run.law(name)
        elif name in self.prepared.components:
            law = self._natural(name)
        else:
            outputs = self.known.outputs(name)
            made = mechanism.parts
            law = outputs[0] if made is None else made.build(outputs)
        observed, mask, scale = self._rest(name)
        if isinstance(law, Tensor):
            observed = law
            law = _certain(law, site)
        infer = dict(mechanism.infer)
        if site.deterministic and observed is not None:
            infer["_deterministic"] = True
        value = self._emit(name, law, observed, infer, mask, scale)
        self.known.set(name, value)
        if run is not None:
            run.observe(name)

    def _run_of(self, name: str) -> Any:
        component = self.prepared.components.get(name)
        if component is None:
            return None
        key = id(component)
        if key not in self.runs:
            self.runs[key] = component.start(self.interventions, self.known)
        return self.runs[key]

    def _natural(self, name: str) -> Any:
        """What a site that is intervened on would have been.

        Handlers see it, as they do in a program that is not fused.
        """
        component = self.prepared.components[name]
        run = component.start(self.interventions - {name}, self.known)
        for child in component.component.children:
            if child == name:
                break
            if child not in self.interventions:
                run.law(child)
                run.observe(child)
        return run.law(name)

    def _rest(self, name: str) -> tuple[Tensor | None, Any, Any]:
        """A site's value if it is observed, its mask and its scale."""
        site = self.of[name].site
        mask, scale = site.weight
        if not site.observed and not any(isinstance(w, Tensor) for w in site.weight):
            return None, mask, scale
        rest = self.known.rest(name)
        value = rest.pop(0) if site.observed else None
        mask = rest.pop(0) if isinstance(mask, Tensor) else mask
        return value, mask, rest.pop(0) if isinstance(scale, Tensor) else scale

    def _emit(
        self,
        name: str,
        fn: Any,
        value: Tensor | None,
        infer: dict[str, Any],
        mask: Any = None,
        scale: Any = 1.0,
    ) -> Tensor:
        frames = self.of[name].site.frames
        plates = {f.dim: f.size for f in frames if f.vectorized}
        depth = max((-dim for dim in plates), default=0)
        shape = torch.Size(plates.get(dim, 1) for dim in range(-depth, 0))
        batch = torch.broadcast_shapes(fn.batch_shape, shape)
        if batch != fn.batch_shape:
            fn = fn.expand(batch)
        msg = Message(
            type="sample",
            name=name,
            fn=fn,
            is_observed=value is not None,
            args=(),
            kwargs={},
            value=value,
            infer=infer,  # type: ignore[typeddict-item]
            scale=scale,
            mask=mask,
            cond_indep_stack=frames,
            done=False,
            stop=False,
            continuation=None,
        )
        apply_stack(msg)
        return msg["value"]  # type: ignore[return-value]

    def _output(self) -> Any:
        """What the model returns, if it can be told from what stays."""
        if self.prepared.mechanisms.output is None:
            return None
        template, expression = self.prepared.mechanisms.output
        if expression.trouble or not all(self.known.has(x) for x in expression.leaves):
            return None
        leaves = [leaf for leaf, _ in arguments((template,), {})]
        values = {}
        for leaf in expression.leaves:
            if leaf[0] == SITE:
                values[leaf] = self.known[str(leaf[1])]
            elif leaf[0] in (PARAM, ARGUMENT, INDICES):
                values[leaf] = self.known.inputs[leaf]
        found = dict(zip(leaves, expression(values), strict=True))
        return put_back((template,), {}, found)[0][0]


def _certain(value: Tensor, site: Any) -> Any:
    return dist.Delta(value, event_dim=len(site.event_shape)).mask(False)


def _signature(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Equal for arguments under which a program is the same function of tensors."""
    shapes = tuple(
        (leaf, tuple(t.shape), t.dtype, str(t.device))
        for leaf, t in arguments(args, kwargs)
    )
    return shapes, _frozen((args, dict(kwargs)))


def _frozen(thing: Any) -> Any:
    if isinstance(thing, Tensor):
        return Tensor
    if isinstance(thing, (tuple, list)):
        return tuple(_frozen(part) for part in thing)
    if isinstance(thing, dict):
        return tuple((k, _frozen(v)) for k, v in thing.items())
    try:
        hash(thing)
    except TypeError:
        return id(thing)
    return type(thing), thing


def _taken_dims() -> tuple[bool, ...]:
    """Which dimensions plates outside have taken."""
    from pyro.poutine import runtime

    return tuple(name is not None for name in runtime._DIM_ALLOCATOR._stack)


def consolidate(
    model: Callable[..., Any],
    keep: str | Iterable[str],
    allow: Allow = (),
    partition: Sequence[Collection[str]] | None = None,
    *,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> Fused:
    """Fuses mechanisms."""
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    parts = None if partition is None else tuple(frozenset(p) for p in partition)
    request = Request(keep, allow, parts)
    return Fused(model, request, model_args, model_kwargs or {})
