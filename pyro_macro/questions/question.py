# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What a question about a cause and an effect needs: the program, read once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from pyro_macro.errors import (
    Infeasible,
    NotAffine,
    OffFibre,
    PyroMacroError,
    UnsupportedLaw,
)
from pyro_macro.intervention import Ahead
from pyro_macro.laws.cut import Cut, Model, over_grid
from pyro_macro.laws.finite.configurations import EnumeratedRun
from pyro_macro.laws.finite.effect import FiniteEffect
from pyro_macro.laws.finite.joint import TooMany
from pyro_macro.laws.gaussian.effect import AffineEffect
from pyro_macro.laws.quantity import Thing, name_of, names_of
from pyro_macro.laws.sampled.chains import Chains
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import (
    preserved_params,
    preserved_random_state,
    same_parameters,
)
from pyro_macro.program.reading import dependence, structural
from pyro_macro.program.substitution import detached
from pyro_macro.program.tracking import tensors_in
from pyro_macro.realizations import Natural, Realization, Realized
from pyro_macro.realizations.base import refuse_injective, refuse_subsampled

# From a macro value to a realization of it: the class itself, or a function
Realizing = Callable[[Tensor], Realization]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
CHANCES = 12  # runs, which hidden coins would have to survive


class Question:
    """A program, a macro-variable that is set, and an effect that is looked at.

    :param others: what else takes part, by role.
    :raises PyroMacroError: if something is not what it should be, in words.
    """

    progress = True
    single = False  # whether one site may stand for itself

    def __init__(
        self,
        model: Callable[..., Any],
        cause: MacroVariable,
        effect: Thing,
        model_args: tuple = (),
        model_kwargs: dict[str, Any] | None = None,
        **others: Sequence[Thing],
    ) -> None:
        if not callable(model):
            raise PyroMacroError(f"{model!r} is not callable. Expected a Pyro model.")
        if not isinstance(cause, MacroVariable):
            raise PyroMacroError(
                f"cause is {cause!r}. Expected the MacroVariable that is set."
            )
        for role, things in {"effect": (effect,), **others}.items():
            for thing in things:
                if not isinstance(thing, (str, MacroVariable)):
                    raise PyroMacroError(
                        f"{role} is {thing!r}. Expected a MacroVariable, or the name "
                        "of a site."
                    )
        if not isinstance(model_args, (tuple, list)) or not isinstance(
            model_kwargs or {}, dict
        ):
            raise PyroMacroError(
                f"model_args={model_args!r}, model_kwargs={model_kwargs!r}. Expected a "
                "tuple and a dictionary, what the model is called with."
            )
        model = structural(model)
        self.model: Model = (model, tuple(model_args), dict(model_kwargs or {}))
        self.cause, self.effect = cause, effect
        self._why_not = ""
        # Runs that only check need no derivatives: a report has none
        with self.unseen(), torch.no_grad():
            self.cut = Cut(self.model, cause, {"effect": (effect,), **others})
        self.what = self.cut.cause.what
        self.cut.refuse_overlap()
        for things in others.values():
            self._refuse_affected(things)
        self._refuse_parts([cause, effect, *(t for ts in others.values() for t in ts)])
        self.cut.refuse_observed()
        values = [self.cut.sites[n].value.reshape(-1).cpu() for n in self.cut.names]
        self.refuse_nan(torch.cat([value.double() for value in values]))

    @classmethod
    def of(
        cls,
        model: Callable[..., Any],
        cause: MacroVariable,
        effect: Thing,
        realization: Realizing,
        at: Any,
        model_args: tuple,
        model_kwargs: dict[str, Any] | None,
    ) -> tuple[Question, Realization]:
        """A question about a realization, and the realization of some macro values."""
        question = cls(model, cause, effect, model_args, model_kwargs)
        instance = question.instance(realization, question.some(at))
        if instance.given:
            given: Any = tuple(instance.given)
            question = cls(model, cause, effect, model_args, model_kwargs, given=given)
        return question, instance

    def some(self, at: Any) -> Tensor:
        """Some macro value, to see what a realization is."""
        if at is not None:
            return self.values(at)
        return torch.zeros(
            (1,) + tuple(self.cut.cause.shape[-1:]) * self.event, device="cpu"
        )

    def _refuse_parts(self, things: Sequence[Thing]) -> None:
        """An error for what is no aggregate of whole plates."""
        for thing in things:
            if isinstance(thing, MacroVariable):
                sites = [self.cut.sites[n] for n in thing.micro]
                refuse_subsampled(f"macro-variable {thing.name!r}", thing, sites)
        sites = [self.cut.sites[n] for n in self.cause.micro]
        state = torch.zeros(
            self.cut.cause.layout.size, dtype=torch.float64, device="cpu"
        )
        if not state.numel():
            raise PyroMacroError(
                f"{self.what}: its micro state has 0 elements. Expected sites with "
                "some."
            )
        if not self.single:
            aggregation = self.cause.aggregation.within(self.cut.cause.layout)
            refuse_injective(self.what, aggregation, state, self.cut.cause.layout)

    def unseen(self) -> ExitStack:
        """Inside, nothing of the user's changes, and no handler of his sees it."""
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(False))  # derivatives are needed
        stack.enter_context(preserved_params())
        stack.enter_context(detached())
        stack.enter_context(preserved_random_state())
        return stack

    @property
    def precision(self) -> float:
        """The rounding of the coarsest dtype that takes part."""
        sites = [self.cut.sites[n] for n in self.cut.relevant_sites]
        tensors = [t for s in sites for t in (s.value, *tensors_in(s.fn))]
        dtypes = {t.dtype for t in tensors if t.is_floating_point()}
        return max((torch.finfo(d).eps for d in dtypes), default=2.3e-16)

    @cached_property
    def graph(self) -> nx.DiGraph:
        return dependence(self.cut.sites)

    def _refuse_affected(self, things: Sequence[Thing]) -> None:
        """An error if something that is held is an effect of the cause."""
        below = set(self.cause.micro)
        below.update(*(nx.descendants(self.graph, n) for n in self.cause.micro))
        for thing in things:
            hit = set(names_of(thing)) & below
            if hit:
                raise PyroMacroError(
                    f"{self.what}: {name_of(thing)!r} is to be adjusted for, but "
                    f"{min(hit)!r} is a micro site of the cause or downstream of one "
                    "(Definition 12). Adjust for what the cause does not act on."
                )

    @cached_property
    def affine(self) -> AffineEffect | None:
        """The program as an affine-Gaussian one, if it is one."""
        try:
            with self.unseen():
                affine = AffineEffect(self.cut)
                self.refuse_nan(affine.joint().mean)
                return affine
        except NotAffine as error:
            self._why_not = str(error)
            self.refuse_chance()
            return None

    def refuse_chance(self) -> None:
        """An error if the program draws numbers that are no sites.

        Under the same values of all sites it has to say the same, each time.
        """
        values = {n: s.value for n, s in self.cut.sites.items()}
        first: dict[str, Any] = {}
        for seed in range(CHANCES):
            with self.unseen(), torch.no_grad():
                torch.manual_seed(seed)
                run = EnumeratedRun(
                    self.cut, self.cut.names, values, self.cut.cause.sites
                )
                run.run(*self.model)
            first = first or run.sites
            for name, site in first.items():
                if any(bool(t.isnan().any()) for t in tensors_in(site.fn)):
                    continue  # what is wrong with it is said elsewhere
                if not same_parameters(site.fn, run.sites[name].fn):
                    raise UnsupportedLaw(
                        f"{self.what}: site {name!r} differs between two runs at the "
                        "same values of all sites: the program draws numbers that are "
                        "no sample sites (torch.randn, dropout), or hides sites "
                        "(poutine.block). Make them visible sample sites."
                    )

    @cached_property
    def finite(self) -> FiniteEffect | None:
        """The program as tables, if its sites are finite and few enough."""
        if not FiniteEffect.is_finite(self.cut):
            return None
        try:
            with self.unseen(), torch.no_grad():
                return FiniteEffect(self.cut)
        except TooMany as error:
            self._why_not = f"{self.what}: {error}."
            return None

    @cached_property
    def common_causes(self) -> list[str]:
        """Latent sites that act on the micro state, and on the effect beside it."""
        micro = self.cause.micro
        above = self.cut.unfixed(self.cut.ancestors(micro)) - set(micro)
        apart = self.graph.copy()
        apart.remove_edges_from(list(apart.out_edges(micro)))
        reach = set(names_of(self.effect))
        reach.update(*(nx.ancestors(apart, n) for n in names_of(self.effect)))
        sites = self.cut.sites
        return [n for n in sites if n in above & reach and not sites[n].deterministic]

    @property
    def event(self) -> int:
        """How many dimensions a macro value has itself."""
        return self.cause.aggregation.event_dim

    def values(self, at: Any) -> Tensor:
        """Macro values as a tensor of shape ``(n,)``, or ``(n, m)`` for vectors."""
        try:
            tensor = torch.as_tensor(at, dtype=torch.float64, device="cpu")
        except (TypeError, ValueError, RuntimeError) as error:
            raise PyroMacroError(
                f"{self.what}: at is {at!r}. Expected macro values, as numbers."
            ) from error
        tensor = tensor.reshape(1) if tensor.dim() == 0 and not self.event else tensor
        expected = "(n, m)" if self.event else "(n,)"
        if tensor.dim() != 1 + self.event or not tensor.numel():
            raise PyroMacroError(
                f"{self.what}: at has shape {tuple(tensor.shape)}. Expected "
                f"{expected}, one macro value a row."
            )
        if not torch.isfinite(tensor).all():
            raise PyroMacroError(f"{self.what}: at is {at}. Expected finite numbers.")
        m = self.cut.cause.shape[-1] if self.event else 1
        if self.event and tensor.shape[-1] != m:
            raise PyroMacroError(
                f"{self.what}: at has {tensor.shape[-1]} numbers a row. Expected {m}."
            )
        return tensor

    def asked(self, at: Any) -> Tensor:
        """Macro values as a tensor; the default ones where none are given."""
        return self.default_at() if at is None else self.values(at)

    def spread(self, at: Tensor) -> Tensor:
        """Macro values, the same in all slots of the plates that stay: ``(n, b)``."""
        batch = self.cut.cause.shape[: len(self.cut.cause.shape) - self.event]
        middle = (len(at),) + (1,) * len(batch) + tuple(at.shape[1:])
        whole = (len(at), *batch, *at.shape[1:])
        return at.reshape(middle).expand(whole).reshape(len(at), -1)

    def unsupported(self, what: str) -> UnsupportedLaw:
        """An error that says why something is not known exactly."""
        return UnsupportedLaw(
            f"{self._why_not} Expected a jointly affine-Gaussian program, or one of "
            f"finite sites: {what} is known for these."
        )

    def degenerate(self) -> UnsupportedLaw:
        """An error for an effect that the macro value determines."""
        return UnsupportedLaw(
            f"{self.what}: {name_of(self.effect)!r} moves with the macro value alone: "
            "all micro-realizations have the same effect, and there is no noise that "
            "they could keep."
        )

    def default_at(self) -> Tensor:
        """Quantiles of the macro value; all values where there are few."""
        self.refuse_vector()
        levels = torch.tensor(QUANTILES, dtype=torch.float64, device="cpu")
        if self.affine is not None:
            cause = self.affine.joint([0])
            spread = cause.variance.mean().sqrt()
            return cause.mean.mean() + spread * torch.special.ndtri(levels)
        if self.finite is not None:
            return self._finite_values(levels)
        raise NotImplementedError

    def refuse_nan(self, found: Tensor) -> None:
        """An error if what is found is NaN."""
        if bool(found.isnan().any()):
            raise PyroMacroError(
                f"{self.what}: it, or the effect {name_of(self.effect)!r}, is NaN. "
                "Look at the parameters of the program: some value or distribution is "
                "NaN there."
            )

    def refuse_vector(self) -> None:
        if self.event:
            raise PyroMacroError(
                f"{self.what}: it is a vector, and has no quantiles. Give at=[...]."
            )

    def _finite_values(self, levels: Tensor) -> Tensor:
        finite = self.finite
        assert finite is not None
        possible = finite.p_causes > 0
        same = (finite.causes == finite.causes[:, :1]).all(-1)  # in all slots
        values, order = finite.causes[possible & same, 0].sort()
        if len(values) <= 50:
            return values
        total = finite.p_causes[possible & same][order].cumsum(0)
        return values[torch.searchsorted(total / total[-1], levels)].unique()

    def index(self, at: Tensor) -> Tensor:
        """Which macro value each one is, in a finite program."""
        assert self.finite is not None
        index = self.finite.find(self.spread(at))
        if bool((index < 0).any()):
            bad = at[index < 0][0].tolist()
            known = [c for c in self.finite.causes[self.finite.p_causes > 0].tolist()]
            shown = [c[0] if len(c) == 1 else tuple(c) for c in known[:8]]
            more = ", ..." if len(known) > 8 else ""
            raise Infeasible(
                f"{self.what}: the macro value {bad} cannot be reached. Its values "
                f"are {', '.join(map(str, shown))}{more}."
            )
        return index

    def exactly(self, at: Tensor, index: Tensor) -> Tensor:
        """Macro values as they are, where they were given to some digits."""
        assert self.finite is not None
        found = self.finite.causes[index]
        return found[:, : self.cut.cause.shape[-1]] if self.event else found[:, 0]

    def instance(
        self, realization: Any, at: Tensor, draws: bool = False, alone: bool = False
    ) -> Realization:
        """The realization of macro values, along a dimension left of all plates.

        :param draws: whether a dimension for draws is between these.
        :param alone: whether it is one macro value, without a dimension of its own.
        """
        if isinstance(realization, Realization) or not callable(realization):
            raise PyroMacroError(
                f"{self.what}: realization is {realization!r}. Expected a function of "
                "the macro value: Natural, or "
                "lambda value: Residual(value, absorb=...)."
            )
        between = (1,) * (self.cut.depth + draws)
        value = at
        if not alone:
            value = at.reshape((len(at),) + between + tuple(at.shape[1:]))
        try:
            made = realization(value)
        except TypeError as error:
            raise PyroMacroError(
                f"{self.what}: {name_of_kind(realization)} cannot be made from the "
                f"macro value alone ({error}). Say the rest: lambda value: "
                f"{name_of_kind(realization)}(value, ...)."
            ) from error
        if not isinstance(made, Realization):
            raise PyroMacroError(
                f"{self.what}: realization returned {made!r}. Expected a Realization."
            )
        sampler = getattr(made, "sampler", None)
        if isinstance(sampler, Chains) and not self.progress:
            quiet = dataclasses.replace(sampler, progress=False)
            made = dataclasses.replace(made, sampler=quiet)  # type: ignore[type-var]
        if not hasattr(made, "value"):
            raise PyroMacroError(
                f"{self.what}: {type(made).__name__} moves the macro-variable and does "
                "not set it, so that there is no P(effect | do(value)). Expected a "
                "realization that carries a value; shift_confounding is about shifts."
            )
        return made

    def realized(self, realization: Realizing, at: Tensor) -> list[Realized]:
        """The laws of the micro state: one for all macro values, or one for each."""
        with self.unseen(), torch.no_grad():
            with suppress(RuntimeError, ValueError, PyroMacroError):
                whole = self._realized(self.instance(realization, at))
                batch = torch.broadcast_shapes(
                    whole.law.batch_shape, whole.layout.batch_shape
                )
                if len(batch) > self.cut.depth and batch[0] == len(at):
                    self.refuse_off_fibre(whole, at)
                    return [whole]
            # A function of the user's may not be for many values at once
            one = [self.instance(realization, value[None]) for value in at]
            laws = [self._realized(each) for each in one]
            for law, value in zip(laws, at, strict=True):
                self.refuse_off_fibre(law, value[None])
            return laws

    def refuse_off_fibre(self, realized: Realized, at: Tensor) -> None:
        """An error if micro states have other macro values than were asked for."""
        law = over_grid(realized.law, realized.layout, self.cut.depth)
        with self.unseen(), torch.no_grad():
            state = realized.push(law.sample()).cpu()
        values = realized.layout.unstack(state)
        found = self.cut.cause.of(values, (len(state),), self.cut.depth)
        wanted = self.spread(at)
        slack = 1e-3 * torch.finfo(state.dtype).eps ** 0.5
        total = torch.stack([v.abs().sum() for v in values.values()]).sum()
        size = wanted.abs() + total.double()
        if bool(((found - wanted).abs() > slack * size).any()):
            raise OffFibre(
                f"{self.what}: a draw of the micro-realization has the macro value "
                f"{found[0].tolist()}. Expected {wanted[0].tolist()} (Definition 4)."
            )

    def _realized(self, instance: Realization) -> Realized:
        targets = Ahead({self.cause: instance}, self.model).targets()
        return next(iter(targets.values())).realized


def name_of_kind(realization: Any) -> str:
    return getattr(realization, "__name__", type(realization).__name__)


def describe(instance: Realization) -> str:
    """A realization in words, without its value."""
    skipped = {"value", "delta", "sampler", "fn"}
    said = []
    for f in dataclasses.fields(instance):  # type: ignore[arg-type]
        own = getattr(instance, f.name)
        if f.name in skipped or own is None or (isinstance(own, tuple) and not own):
            continue
        if isinstance(own, MacroVariable):
            own = own.name
        if isinstance(own, tuple):
            own = [name_of(o) if isinstance(o, MacroVariable) else o for o in own]
        text = repr(own.tolist() if isinstance(own, Tensor) else own)
        said.append(f"{f.name}={text if len(text) < 40 else '...'}")
    return (
        f"{type(instance).__name__}({', '.join(said)})"
        if said
        else type(instance).__name__
    )


def is_natural(instance: Realization) -> bool:
    return type(instance) is Natural
