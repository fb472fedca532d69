# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A program whose micro sites are set, as questions about it need it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import PyroMacroError, UnsupportedLaw
from pyro_macro.laws.quantity import Quantity, Thing, names_of
from pyro_macro.laws.upstream import Upstream
from pyro_macro.program.inner import Shared
from pyro_macro.program.layout import Layout
from pyro_macro.program.reading import refuse_sharded
from pyro_macro.program.shapes import broadcast_shapes

Model = tuple[Callable[..., Any], tuple, dict]


class Cut(Upstream):
    """A program read up to some quantities, its micro sites being set.

    :param model: the program, with its arguments.
    :param cause: the macro-variable that is intervened on.
    :param others: the effect, and what else is asked about.
    :param shared: statements executed already.
    :param forget: whether observations of what follows from the micro state do not
        count; otherwise they are refused.
    :raises NotAMicroState: if one micro site is upstream of another.
    :raises UnknownSite: if the program lacks a site.
    """

    def __init__(
        self,
        model: Model,
        cause: Thing,
        others: Mapping[str, Sequence[Thing]],
        shared: dict[str, Shared] | None = None,
        forget: bool = False,
    ) -> None:
        micro = names_of(cause)
        things = [thing for group in others.values() for thing in group]
        until = [*micro, *(n for thing in things for n in names_of(thing))]
        known = {} if shared is None else shared
        super().__init__(model, (), until, known, {}, micro, forget)
        refuse_sharded(self.sites.values(), "what follows from a micro state")
        self.cause = Quantity(cause, self.sites, "macro-variable")
        self.refuse_paths(micro, self.cause.what)
        self.others = {
            role: [Quantity(thing, self.sites, role) for thing in group]
            for role, group in others.items()
        }

    @cached_property
    def micro_sites(self) -> list[Quantity]:
        """The micro sites of the cause, each as it is."""
        return [Quantity(name, self.sites, "site") for name in self.cause.sites]

    def as_values(self, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """What each micro site is, from its quantity, shape ``(..., size)``."""
        return {
            q.name: part.reshape(part.shape[:-1] + self.sites[q.name].shape)
            for q, part in zip(self.micro_sites, parts, strict=True)
        }

    @property
    def names(self) -> list[str]:
        """All sites that are asked about."""
        others = [q for group in self.others.values() for q in group]
        return list(dict.fromkeys(n for q in [self.cause, *others] for n in q.sites))

    @property
    def depth(self) -> int:
        """The number of dimensions to the left of which new ones may stand."""
        sites = self.sites.values()
        return max(
            [s.value.dim() - len(s.event_shape) for s in sites]
            + [-(f.dim or 0) for s in sites for f in s.frames]
        )

    @cached_property
    def relevant_sites(self) -> set[str]:
        """The random sites that these depend on, themselves among them."""
        return self.latent_sources(self.names)

    def is_differentiable(self) -> bool:
        """Whether anything that is asked about depends on parameters with gradients."""
        if not torch.is_grad_enabled():
            return False
        probe = self.probes[0]
        # What is set is a leaf; what it would have been may have derivatives
        found = {n: s.value for n, s in probe.sites.items()} | probe.expressions
        return any(found[name].requires_grad for name in self.names)

    def _refuse_factors(self) -> None:
        """An error if factors weigh what is asked about: they are observations."""
        for name, parents in self.zero.factors.items():
            above = self.latent_sources(sorted(parents & set(self.sites)))
            hit = self.unfixed(above) & self.relevant_sites
            if hit:
                raise UnsupportedLaw(
                    f"{self.cause.what}: factor {name!r} depends on {sorted(hit)}, and "
                    "the question is about the program before it has seen anything. "
                    "Leave the factor out."
                )

    def refuse_overlap(self) -> None:
        """An error if cause and effect share sites."""
        for quantity in self.others["effect"]:
            shared = set(quantity.sites) & set(self.cause.sites)
            if shared:
                raise PyroMacroError(
                    f"{self.cause.what}: {min(shared)!r} belongs to the effect "
                    f"{quantity.name!r} as well. Expected an effect apart from the "
                    "cause."
                )

    def refuse_observed(self) -> None:
        """An error if observations, or factors, tell of what is asked about."""
        self._refuse_factors()
        for name, site in self.sites.items():
            if not site.observed or self.zero.is_forgotten(name):
                continue
            latent = self.unfixed(self.ancestors([name])) & self.relevant_sites
            if name in self.names or latent:
                found = f", which depends on {sorted(latent)}" if latent else ""
                raise UnsupportedLaw(
                    f"{self.cause.what}: site {name!r} is observed{found}, and the "
                    "question is about the program before it has seen anything. "
                    "Leave the observation out (no `obs=`, `poutine.uncondition`), or "
                    "hold what it depends on with `poutine.condition`."
                )


def over_grid(law: Any, layout: Layout, depth: int) -> Any:
    """A law of a micro state, with a dimension for macro values left of all plates.

    :param law: a distribution with that dimension, or for one macro value.
    :param layout: of its vector.
    :param depth: the number of dimensions that plates may take.
    """
    batch = broadcast_shapes(law.batch_shape, layout.batch_shape)
    batch = torch.Size((1,) * (depth + 1 - len(batch))) + batch
    return law if batch == law.batch_shape else law.expand(batch)
