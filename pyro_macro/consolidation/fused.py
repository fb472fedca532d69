# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The fused program: a Pyro model of the sites that stay."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import networkx as nx
import pyro
import pyro.distributions as dist
import torch
from pyro.poutine import runtime
from pyro.poutine.do_messenger import DoMessenger
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.reparam_messenger import ReparamMessenger
from pyro.poutine.runtime import Message, apply_stack
from torch import Tensor

from pyro_macro.consolidation.allowed import Allow, Allowed, Made, as_value, being_made
from pyro_macro.consolidation.cost import CostReport
from pyro_macro.consolidation.elimination import Eliminating
from pyro_macro.consolidation.equations import Equations
from pyro_macro.consolidation.graph import fused_graph
from pyro_macro.consolidation.known import NATURAL, Known
from pyro_macro.consolidation.prepared import Approximation, Prepared, Request
from pyro_macro.consolidation.relaxed import relax
from pyro_macro.consolidation.structure import Structure
from pyro_macro.errors import PyroMacroError, UnknownSite
from pyro_macro.program.mechanisms import arguments, put_back
from pyro_macro.program.shapes import broadcast_shapes
from pyro_macro.program.tape import ARGUMENT, INDICES, PARAM, SITE, Leaf

PREPARED = 16  # programs for arguments of different shapes, that are remembered


def consolidate(
    model: Callable[..., Any],
    keep: str | Iterable[str],
    allow: Allow = (),
    partition: Sequence[Collection[str]] | None = None,
    *,
    approximate: float | Approximation | None = None,
    model_args: tuple = (),
    model_kwargs: dict[str, Any] | None = None,
) -> Fused:
    """Fuses the mechanisms of a model, and keeps the interventions that are allowed.

    Algorithm 1 of *Do Not Marginalize Mechanisms, Rather Consolidate!*: what comes back
    is a Pyro model of the sites in ``keep``, of observed ones, and of those that could
    not be eliminated. Each has its exact distribution given those before it, so that
    inference, conditioning and the handlers of this library work as on any model, and
    for each allowed intervention the joint distribution is that of ``model`` under the
    same intervention. Nothing is approximated.

    Fused are affine-Gaussian sites (scalars, vectors, in plates), finite sites and
    deterministic ones; coefficients and tables may depend on sites that stay, on
    parameters and on arguments, and are differentiable in them. What is of no such
    kind stays, and :attr:`Fused.method` says why.

    The model is read under ``model_args``. Called with other tensors of the same
    shapes the fused one uses these; with others, it reads the model again. What the
    model closes over is taken as it is when it is read.

    :param model: a callable with Pyro primitives.
    :param keep: names of sites.
    :param allow: the interventions that stay possible: names of sites, to be set to any
        value, alone or together, and explicit ones ``{site: value, ...}``, to be made
        as they are. Sites that are kept can always be intervened on. Without any, what
        is not kept is marginalized.
    :param partition: clusters of sites (Definitions 3 and 4), each fused by itself:
        what another cluster needs stays. By default all can be fused with all.
    :param approximate: whether what cannot be fused is to be learned from draws, and
        how well: the largest Kolmogorov-Smirnov distance that is accepted, or an
        :class:`~pyro_macro.consolidation.relaxed.Approximation`. Sites that would have
        to stay then disappear, those they act on have learned laws, and
        :attr:`Fused.method` says what distance was achieved on fresh draws.
    :param model_args: positional arguments to read the model with.
    :param model_kwargs: keyword arguments.
    :raises UnknownSite: for names that the model does not have.
    :raises CyclicPartition: if clusters need one another.
    :raises Infeasible: if an approximation is worse than was asked for.

    >>> def tool():
    ...     s = pyro.deterministic("s0", torch.tensor(1.0))
    ...     for t in range(1, 37):
    ...         s = pyro.deterministic(f"s{t}", 0.95 * s)
    >>> fused = consolidate(tool, keep=["s36"], allow=["s12", "s24"])
    >>> print(*fused.equations(), sep="\\n")
    s36 := 0.95^(36-k) * v where k is the last of {12, 24} intervened on; else 0.1578
    >>> renewed = pyro.poutine.do(fused, {"s12": 1.0, "s24": 1.0})
    >>> pyro.poutine.trace(renewed).get_trace().nodes["s36"]["value"]
    tensor(0.5404)
    """
    keep = (keep,) if isinstance(keep, str) else tuple(keep)
    parts = None if partition is None else tuple(frozenset(p) for p in partition)
    if isinstance(model, Fused):
        model.refuse_more(keep, allow)
        model = model.unfused
    if not callable(model):
        raise PyroMacroError(f"consolidate: {model!r} is not callable: no model.")
    if approximate is not None and not isinstance(approximate, Approximation):
        approximate = Approximation(float(approximate))
    request = Request(keep, allow, parts, approximate)
    kind = _FusedModule if isinstance(model, torch.nn.Module) else Fused
    return kind(model, request, tuple(model_args), dict(model_kwargs or {}))


class Fused:
    """A Pyro model whose mechanisms are fused. See :func:`consolidate`.

    :ivar unfused: the original model.
    """

    unfused: Callable[..., Any]

    def __init__(
        self,
        model: Callable[..., Any],
        request: Request,
        model_args: tuple,
        model_kwargs: dict[str, Any],
        read: bool = True,
    ) -> None:
        super().__init__()
        self.unfused = model
        if not isinstance(model, torch.nn.Module):
            functools.update_wrapper(self, model, updated=())
        self._request = request
        self._model = (model_args, model_kwargs)
        self._prepared: dict[Any, Prepared] = {}
        if read:
            self._prepared[self._key(model_args, model_kwargs)] = self._first

    @functools.cached_property
    def _first(self) -> Prepared:
        return self._made(*self._model)

    @functools.cached_property
    def _has_plates(self) -> bool:
        sites = [m.site for m in self._first.of.values()]
        return any(frame.vectorized for site in sites for frame in site.frames)

    def __reduce__(self) -> Any:
        # Copies read the model, theirs, when they are first asked for something
        return type(self), (self.unfused, self._request, *self._model, False)

    def __repr__(self) -> str:
        name = getattr(self.unfused, "__name__", type(self.unfused).__name__)
        return f"<{name}, consolidated: {', '.join(self.sites)}>"

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites that are left, in program order."""
        return tuple(self._first.stays)

    @property
    def kept(self) -> tuple[str, ...]:
        """Those of them that were asked for, or are observed."""
        gone = self._first.structure.retained if self._first.structure else {}
        if self._first.relaxed is not None:
            return self.sites
        factors = self._first.mechanisms.factors
        asked = [n for n in self.sites if n not in gone and n not in factors]
        if self._first.structure is None:
            asked = [n for n in asked if n in self._request.keep]
        return tuple(asked)

    def typical(self, name: str) -> Tensor:
        """A value that a site may well have: that of the run which read it."""
        return self._first.of[name].site.value.detach()

    @property
    def allowed(self) -> Allowed:
        """The interventions it was prepared for."""
        return self._first.allowed

    @property
    def method(self) -> dict[str, str]:
        """How each cluster was dealt with: what was fused how, and what stays why."""
        return self._first.method()

    @property
    def cost(self) -> CostReport:
        """What an evaluation costs before and after, in the declared measure.

        The shortest description of a mechanism is not computable; in its place stand
        random numbers, multiplications and additions, and stored numbers
        (:class:`~pyro_macro.consolidation.cost.Cost`).
        """
        return self._first.cost()

    @property
    def graph(self) -> nx.DiGraph:
        """What is left, and what it depends on.

        Nodes are the sites that stay, allowed interventions that act on them
        (``intervened``), and latent common causes of sites whose parents were
        eliminated together: these are correlated beyond what the edges say.
        """
        return fused_graph(self._first)

    def refuse_more(self, keep: Collection[str], allow: Allow) -> None:
        """An error if more is asked of a consolidated model than it has."""
        for name in keep:
            if name not in self.sites:
                raise UnknownSite.named("consolidate, keep", name, self.sites)
        asked = Allowed(allow, self._first.of)
        for name in asked.free - self.allowed.free:
            self.allowed.check({name: "any value"}, self.sites)
        for one in asked.explicit:
            self.allowed.check(one, self.sites)

    def fused_behind(self, names: Collection[str]) -> list[str]:
        """The random sites that were fused away and that some sites depend on."""
        first = self._first
        graph, stays = first.mechanisms.graph(), set(first.stays)
        above = set().union(*(nx.ancestors(graph, n) for n in names if n in graph))
        return [
            n
            for n, m in first.of.items()
            if n in above and n not in stays and not m.site.deterministic
        ]

    def equations(self, latex: bool = False) -> list[str]:
        """One line a site that stays, interventions spelled out.

        :param latex: LaTeX instead of plain text.
        """
        first = self._first
        lines: dict[str, str] = {}
        if first.structure is not None:
            made = (first.eliminations, first.rules, first.allowed, first.names, latex)
            writer = Equations(first.structure, *made)
            lines = dict(zip(first.structure.stays, writer.lines(), strict=True))
        if first.relaxed is not None:
            for name, inputs in first.relaxed.inputs.items():
                given = ", ".join(
                    [*inputs, *(f"do({n})" for n in first.relaxed.allowed)]
                )
                lines[name] = f"{name} ~ learned({given})"
        return [
            lines.get(name, f"{name}: as in the program ({first.trouble})")
            for name in first.stays
        ]

    def plot(self, ax: Any = None) -> Any:
        """The program before and after, side by side, as in Figure 1 of the paper.

        :param ax: two axes of matplotlib to draw on; new ones by default.
        :returns: the figure.
        :raises ImportError: if matplotlib is missing.
        """
        from pyro_macro.consolidation.picture import draw

        return draw(self._first, ax)

    def _key(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Equal for calls under which the program is the same function of tensors."""
        shapes = tuple(
            (leaf, tuple(t.shape), t.dtype, str(t.device))
            for leaf, t in arguments(args, kwargs)
        )
        # Plates inside take the dimensions that those outside leave
        taken = _taken_dims() if self._has_plates else ()
        return shapes, _frozen((args, kwargs)), _frozen(self.unfused), taken

    def _made(self, args: tuple, kwargs: dict[str, Any]) -> Prepared:
        with torch.inference_mode(False):
            prepared = Prepared(self.unfused, self._request, args, kwargs)
        how = self._request.approximate
        if how is not None and prepared.has_rest():
            prepared.relaxed = relax(prepared, (self.unfused, args, kwargs), how)
        return prepared

    def _prepare(self, args: tuple, kwargs: dict[str, Any]) -> Prepared:
        key = self._key(args, kwargs)
        found = self._prepared.get(key)
        if found is None or not found.is_for(args, kwargs):
            if len(self._prepared) >= PREPARED:
                self._prepared.clear()
            found = self._prepared[key] = self._made(args, kwargs)
        return found

    def _run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        prepared = self._prepare(args, kwargs)
        made = being_made(prepared.of)
        if made.taken_apart:
            raise PyroMacroError(
                "consolidate: the model has a consolidated part inside, its sites "
                "correlated without one acting on the other. Consolidate the whole, "
                "with that part unfused."
            )
        if made.values:
            prepared.allowed.check(
                made.values,
                prepared.stays if prepared.structure else self._request.keep,
            )
        if prepared.structure is None and prepared.relaxed is None:
            return self.unfused(*args, **kwargs)
        for name in made.conditioned.difference(prepared.stays):
            raise PyroMacroError(
                f"site {name!r} is conditioned on, but was fused away. Keep it: "
                f"keep=[..., {name!r}]."
            )
        for elimination in prepared.eliminations.values():
            together = sorted(made.unread.intersection(elimination.component.children))
            if len(together) > 1:
                raise PyroMacroError(
                    f"macro_do as a context: the micro sites {together} of a "
                    "consolidated model have causes in common that were fused away, "
                    "which a context cannot know. Wrap the model: "
                    "macro_do(model, interventions)."
                )
        return _Run(prepared, made, args, kwargs).go()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)


class _FusedModule(Fused, torch.nn.Module):
    """A module whose mechanisms are fused, with its parameters."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return torch.nn.Module.__call__(self, *args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(args, kwargs)


class _Natural(Messenger):
    """Sees what a site that is intervened on would have been.

    ``poutine.do`` splits a site in two: its natural half, a copy of the message, stays
    a random site, and shares causes with what comes after.
    """

    value: Tensor | None = None

    def _pyro_post_sample(self, msg: Message) -> None:
        copied = msg.get("_intervener_id") is not None
        if copied and not str(msg["name"]).endswith("__CF") and self.value is None:
            self.value = msg["value"]  # type: ignore[assignment]


class _Run:
    """One run of a fused program."""

    def __init__(
        self, prepared: Prepared, made: Made, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        self.prepared, self.of = prepared, prepared.of
        self.structure = prepared.structure or Structure(
            prepared.mechanisms, prepared.of, {}
        )
        inputs: dict[Leaf, Tensor] = dict(arguments(args, kwargs))
        self.known = Known(self.structure, inputs)
        self.made = made.values
        self.interventions = frozenset((*made.values, *made.replaced))
        self.unseen = frozenset(made.replaced)
        self.runs: dict[int, Eliminating] = {}

    def go(self) -> Any:
        self._ask_inputs()
        stays = self.prepared.stays
        for name, value in self.made.items():
            if name not in stays:
                self._set(name, value)
        for name in stays:
            self._meet(name)
        return self._output()

    def _ask_inputs(self) -> None:
        """Parameters, and indices of plates that draw some."""
        mechanisms = self.prepared.mechanisms
        store = pyro.get_param_store()
        for name, statement in mechanisms.params.items():
            asks = len(statement["args"]) < 2  # for what is there already
            if asks and name not in store and name in mechanisms.trained:
                # As modules do: one tensor, in the module and in the store
                unconstrained, constraint = mechanisms.trained[name]
                store._params[name] = unconstrained
                store._constraints[name] = constraint
                store._param_to_name[unconstrained] = name
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
        hidden = (DoMessenger, ReparamMessenger)
        with block_messengers(lambda m: isinstance(m, hidden)):
            self._emit(name, _certain(tensor, site), tensor, {"_deterministic": True})

    def _meet(self, name: str) -> None:
        """A site that stays."""
        mechanism = self.of[name]
        site = mechanism.site
        run = self._run_of(name)
        relaxed = self.prepared.relaxed
        law: Any
        if relaxed is not None and name in relaxed.laws:
            law = relaxed.law(name, self.known, self.interventions)
        else:
            law = self._own(name) if run is None else run.law(name)
        observed, mask, scale = self._rest(name)
        if isinstance(law, Tensor):
            observed = law
            law = _certain(law, site)
        infer = dict(mechanism.infer)
        if site.deterministic and observed is not None:
            infer["_deterministic"] = True
        with _Natural() as natural:
            value = self._emit(name, law, observed, infer, mask, scale)
        self.known.set(name, value)
        if name in self.interventions and name not in self.unseen:
            seen = natural.value if natural.value is not None else value
            self.known.set(NATURAL + name, seen)
        if run is not None:
            run.observe(name)

    def _own(self, name: str) -> Any:
        """The distribution that a site has by itself; a tensor if it is certain."""
        rule = self.prepared.rules.get(name)
        if rule is not None and not rule.requires & self.interventions:
            like = self.of[name].site
            value = rule.at(self.known).to(like.value.dtype)
            return value.expand(broadcast_shapes(value.shape, like.event_shape))
        outputs = self.known.outputs(name)
        made = self.of[name].parts
        return outputs[0] if made is None else made.build(outputs)

    def _run_of(self, name: str) -> Eliminating | None:
        elimination = self.prepared.eliminations.get(name)
        relaxed = self.prepared.relaxed
        if elimination is None or (relaxed is not None and name in relaxed.laws):
            return None
        if not elimination.covers(self.interventions, self.known):
            return None  # all is known: the program itself says what follows
        key = id(elimination)
        if key not in self.runs:
            self.runs[key] = elimination.start(
                self.interventions, self.unseen, self.known
            )
        return self.runs[key]

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
        batch = broadcast_shapes(fn.batch_shape, shape)
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
        intervened = msg.get("_intervener_id") is not None
        if intervened and name not in self.interventions:
            raise PyroMacroError(
                f"site {name!r}: an intervention reached it under another name, "
                f"{str(msg['name']).removesuffix('__CF')!r}, that a handler in between "
                "gave it. Apply poutine.do to the consolidated model itself."
            )
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


def _frozen(thing: Any) -> Any:
    """Equal for arguments that differ in their tensors alone."""
    if isinstance(thing, Tensor):
        return Tensor
    if isinstance(thing, (tuple, list)):
        return tuple(_frozen(part) for part in thing)
    if isinstance(thing, Mapping):
        return tuple((k, _frozen(v)) for k, v in thing.items())
    if isinstance(thing, torch.nn.Module):
        # What training changes besides parameters
        training = tuple(part.training for part in thing.modules())
        buffers = tuple((id(b), b._version) for b in thing.buffers())
        kinds = tuple((p.dtype, str(p.device)) for p in thing.parameters())
        return id(thing), training, buffers, kinds
    if isinstance(thing, _PLAIN) or thing is None:
        return type(thing), thing
    if callable(thing) and not hasattr(thing, "__array__"):
        return id(thing)
    if type(thing).__module__ == "numpy" and hasattr(thing, "tobytes"):
        return str(thing.dtype), thing.shape, thing.tobytes()
    return object()  # it may change: equal to nothing, itself included later


_PLAIN = (
    *(int, float, complex, str, bytes, type, Enum),
    *(torch.dtype, torch.device, torch.Size),
)


def _taken_dims() -> tuple[bool, ...]:
    """Which dimensions plates outside have taken."""
    return tuple(name is not None for name in runtime._DIM_ALLOCATOR._stack)
