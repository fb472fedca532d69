# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What a micro state depends on, and what is known about it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import networkx as nx
import torch
from torch import Size, Tensor

from pyro_macro.errors import NotAMicroState, UnsupportedLaw
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import Shared, shards_of
from pyro_macro.program.layout import Layout
from pyro_macro.program.noise import NoiseRun
from pyro_macro.program.reading import dependence


@dataclass(frozen=True, eq=False)
class Evidence:
    """Something known about the noises: an expression and the value it has.

    :ivar name: how to call it in messages.
    :ivar of: the value of the expression in a run under noise.
    :ivar value: its value in the real run.
    :ivar sites: the sites that it is computed from.
    :ivar frames: the plates that it varies along.
    :ivar event_shape: its shape within these.
    :ivar macro: the macro-variable that it is the value of, if it is one.
    """

    name: str
    of: Callable[[NoiseRun], Tensor]
    value: Tensor
    sites: tuple[str, ...]
    frames: tuple[Any, ...]
    event_shape: Size
    macro: MacroVariable | None = None

    @classmethod
    def of_macro(cls, macro: MacroVariable, layout: Layout, value: Tensor) -> Evidence:
        """A macro value, as something known.

        :param layout: of its micro state.
        :raises UnsupportedLaw: if that lies on several ranks.
        """
        if layout.shards is not None:
            raise UnsupportedLaw(
                f"macro-variable {macro.name!r} is aggregated over {layout.shards!r}, "
                "which is split over ranks, and what else follows from its value is "
                "not known there. Set it alone, or use a plain plate on one process."
            )
        return cls(
            name=macro.name,
            of=lambda run: macro.aggregation(
                layout.stack({n: run.sites[n].value for n in macro.micro})
            ),
            value=value,
            sites=macro.micro,
            frames=layout.frames,
            event_shape=value.shape[value.dim() - macro.aggregation.event_dim :],
            macro=macro,
        )


def refuse_parts(frames: Sequence[Any], what: str) -> None:
    """An error if plates whose slots are dependent run over a part only."""
    for frame in frames:
        split = shards_of(frame) is not None
        if split or frame.full_size not in (None, frame.size):
            how = "split over ranks" if split else "subsampled"
            raise UnsupportedLaw(
                f"{what}: the micro states along plate {frame.name!r} are dependent, "
                f"through sites outside of it, and the plate is {how}. Hold these "
                "sites with given=[...], or run the plate whole."
            )


class Upstream:
    """A program up to the micro state, as it was read.

    :param model: the program, with its arguments.
    :param micro: the micro sites.
    :param until: all sites to see, micro sites among them.
    :param shared: statements executed already.
    :param held: values of sites that are held.
    :param cut: sites that are set, so that what follows is a function of their values.
    :param forget: whether observations of what follows from these do not count.
    :ivar sites: the sites, each Gaussian one at the centre of its noise.
    """

    def __init__(
        self,
        model: tuple[Callable[..., Any], tuple, dict],
        micro: Sequence[str],
        until: Sequence[str],
        shared: dict[str, Shared],
        held: Mapping[str, Tensor],
        cut: Sequence[str] = (),
        forget: bool = False,
    ) -> None:
        self.model, self.until = model, tuple(until)
        self.micro, self.held, self.shared = tuple(micro), held, shared

        self._how = tuple(cut), forget, torch.is_grad_enabled()
        self._known: dict[Any, tuple[set[str], list[Evidence]]] = {}
        self.zero = self._run(0)
        self.sites = self.zero.sites

    def _run(self, probe: int) -> NoiseRun:
        cut, forget, with_gradients = self._how
        before = self.sites if probe else None
        run = NoiseRun(
            self.until, self.shared, self.held, self.micro, probe, before, cut, forget
        )
        with torch.set_grad_enabled(with_gradients or probe == 0):
            run.run(*self.model)
        return run

    @cached_property
    def probes(self) -> tuple[NoiseRun, NoiseRun]:
        """Runs under large noise of both signs.

        It may leave the domain of a program that is not affine; then the comparison
        with the derivative fails, which is the answer.
        """
        return self._run(1), self._run(-1)

    def refuse_unseen(self, what: str) -> None:
        """An error if the micro state may depend on sites that were not read."""

    def is_outside(self, dim: int, size: int) -> bool:
        """Whether a dimension may come from plates outside of the program."""
        return any(s.outside.get(dim) == size for s in self.shared.values())

    def ancestors(self, names: Sequence[str], through_held: bool = False) -> set[str]:
        """The sites upstream of ``names``; behind a held one nothing is looked for."""
        graph = self._graph if through_held else self._graph_below_held
        parents = set().union(*(self.sites[name].parents for name in names))
        return parents.union(*(nx.ancestors(graph, name) for name in parents))

    @cached_property
    def _graph(self) -> nx.DiGraph:
        return dependence(self.sites)

    @cached_property
    def _graph_below_held(self) -> nx.DiGraph:
        return dependence(self.sites, [n for n in self.sites if self.is_fixed(n)])

    def latent_sources(self, names: Sequence[str]) -> set[str]:
        """The random sites that ``names`` depend on, themselves among them."""
        return set(names) | self.unfixed(self.ancestors(names))

    def unfixed(self, names: Iterable[str]) -> set[str]:
        return {name for name in names if not self.is_fixed(name)}

    def is_fixed(self, name: str) -> bool:
        seen = self.sites[name].observed and not self.zero.is_forgotten(name)
        return name in self.held or seen

    def refuse_paths(self, names: Sequence[str], what: str) -> None:
        """An error if one of the sites is upstream of another (Assumption 1)."""
        for name in names:
            above = self.ancestors([name], through_held=True) & set(names)
            if above:
                raise NotAMicroState(
                    f"{what}: there is a directed path from {min(above)!r} to "
                    f"{name!r}, both aggregated. Assumption 1 of the paper excludes "
                    "that: an intervention on the total would act on its own parts. "
                    "Aggregate the two in separate macro-variables."
                )

    def relevant(
        self, names: Sequence[str], given: Sequence[Evidence], what: str
    ) -> tuple[set[str], list[Evidence]]:
        """The sites that a law involves, and what is known about them."""
        key = (tuple(names), tuple(map(id, given)))
        if key not in self._known:
            self._known[key] = self._relevant_to(names, given, what)
        relevant, kept = self._known[key]
        return set(relevant), list(kept)

    def _relevant_to(
        self, names: Sequence[str], given: Sequence[Evidence], what: str
    ) -> tuple[set[str], list[Evidence]]:
        relevant = self.latent_sources(names)
        # An observed site that the micro state depends on is known, as a held one is.
        # Other observations are no part of P(X | pi(X)) unless they are given.
        upstream = self.ancestors(names)
        candidates = list(given) + [
            self._held_evidence(name)
            for name in self.sites
            if name in self.held or (self.sites[name].observed and name in upstream)
        ]
        kept: list[Evidence] = []
        changed = True
        while changed:
            changed = False
            for known in list(candidates):
                above = self.unfixed(self.latent_sources(known.sites))
                if above & relevant:
                    self._refuse_weighted(known, what)
                    kept.append(known)
                    candidates.remove(known)
                    relevant |= above | set(known.sites)
                    changed = True
        return relevant, kept

    def causes(
        self, names: Sequence[str], known: Sequence[Evidence]
    ) -> list[str] | None:
        """The random sites to be integrated out, in program order.

        The sites of a macro-variable that is known are not among them.

        :param known: as of :meth:`relevant`.
        :returns: ``None`` if such a site is upstream of others.
        """
        parts = {n for e in known if e.macro is not None for n in e.sites}
        targets = {*names, *(n for e in known for n in e.sites)}
        above = self.unfixed(self.ancestors(sorted(targets)))
        if above & parts:
            return None
        return [
            n
            for n in self.sites
            if n in above and n not in names and not self.sites[n].deterministic
        ]

    def _refuse_weighted(self, known: Evidence, what: str) -> None:
        site = self.sites.get(known.name)
        if site is not None and site.observed and not site.known:
            raise UnsupportedLaw(
                f"{what}: the micro state depends on {known.name!r}, which is "
                "observed, but masked out or weighted: it is open what it tells of "
                f"{self.latent_parents(known.name)}. Hold these too, with given=[...]."
            )

    def latent_parents(self, name: str) -> list[str]:
        return sorted(self.unfixed(self.sites[name].parents))

    def _held_evidence(self, name: str) -> Evidence:
        site = self.sites[name]
        return Evidence(
            name=name,
            of=lambda run: run.expressions[name],
            value=site.value,
            sites=(name,),
            frames=site.frames,
            event_shape=site.event_shape,
        )
