# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The law of a micro state in a jointly affine-Gaussian program."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import NotAffine, NotAMicroState, UnsupportedLaw
from pyro_macro.laws.gaussian.covariance import Covariance, Explained
from pyro_macro.laws.gaussian.derivatives import (
    agree,
    coupled_plates,
    covariances_by_columns,
    covariances_by_rows,
)
from pyro_macro.laws.gaussian.sharded import ShardedStructure, refuse_apart
from pyro_macro.laws.gaussian.structure import Structure
from pyro_macro.laws.upstream import Evidence, Upstream
from pyro_macro.program.inner import Site, unwrapped
from pyro_macro.program.layout import Layout
from pyro_macro.program.noise import Noise, NoiseRun, NoiseView
from pyro_macro.program.tracking import tensors_in


@dataclass(frozen=True, eq=False)
class GaussianLaw:
    """``X ~ N(loc, covariance)`` for a stacked micro state.

    :ivar loc: the mean, shape ``(..., K)``; it and the covariance are in float64.
    :ivar layout: the order of its elements, and the plates that stay.
    :ivar joint: the plates along which the elements are dependent, so that they had
        to become part of the vector although they are not aggregated over.
    :ivar method: how the law was found, in words.
    """

    loc: Tensor
    covariance: Covariance
    layout: Layout
    joint: tuple[str, ...]
    method: str


class GaussianProgram(Upstream):
    """A program read as an affine function of normal noise, checked to be one."""

    def is_gaussian(
        self, names: Sequence[str], given: Sequence[Evidence], what: str
    ) -> bool:
        """Whether all sites that the law of ``names`` involves are Gaussian."""
        relevant, _ = self.relevant(names, given, what)
        return not relevant & set(self.zero.opaque)

    def _is_differentiable(self, names: Sequence[str], given: list[Evidence]) -> bool:
        """Whether the law depends on parameters or held values that need gradients."""
        probe = self.probes[0]
        tensors = [probe.sites[name].value for name in names]
        tensors += [known.of(probe) for known in given]
        return any(tensor.requires_grad for tensor in tensors)

    def law(
        self,
        names: Sequence[str],
        over: Sequence[str],
        what: str,
        given: Sequence[Evidence] = (),
    ) -> GaussianLaw:
        """The law of the micro state made of ``names``, ancestors integrated out.

        :param over: the plates that are part of the vector.
        :param what: how to call the macro-variable in messages.
        :param given: what is known besides the sites that are held.
        :raises UnsupportedLaw: if it is not a Gaussian, saying why.
        """
        with torch.enable_grad():
            return self._law(names, over, what, given)

    def _law(
        self,
        names: Sequence[str],
        over: Sequence[str],
        what: str,
        given: Sequence[Evidence],
    ) -> GaussianLaw:
        sites = [self.sites[name] for name in names]
        relevant, evidence = self._relevant(names, given, what)
        noises = [n for n in self.zero.noises.values() if n.key[0] in relevant]

        # Without ancestors there is nothing to check: spare the probes
        alone = not evidence and relevant == set(names)
        differentiable = (
            any(t.requires_grad for site in sites for t in tensors_in(site.fn))
            if alone
            else self._is_differentiable(names, evidence)
        )
        base = Layout(sites, over, what)
        if base.shards is not None:
            refuse_apart(evidence, what)
        values = {site.name: site.value for site in sites}
        view = NoiseView(base.stack(values), noises, differentiable)
        known = [NoiseView(e.of(self.zero), noises, False) for e in evidence]
        self._refuse_unexplained(base, view, what)
        things: list[Any] = [*view.noises, *evidence]
        things += [noise for rows in known for noise in rows.noises]
        joint = {
            frame.name
            for frame in base.frames
            if frame.vectorized
            and any(all(f.name != frame.name for f in thing.frames) for thing in things)
        }
        joint |= coupled_plates(view, base.frames, 1)
        for e, rows in zip(evidence, known, strict=True):
            joint |= coupled_plates(rows, base.frames, len(e.event_shape))
        layout = base
        if joint:
            layout = Layout(sites, (*base.over, *sorted(joint)), what)
            view = NoiseView(layout.stack(values), noises, differentiable)

        scale = layout.stack({site.name: self._own_scale(site) for site in sites})
        if not differentiable:
            scale = scale.detach()
        if not alone:
            self._check(layout, view, scale, what)
        # Covariances in float64, whatever the model's dtype: differences of large
        # terms decide how wide a fibre is
        kind = Structure if layout.shards is None else ShardedStructure
        structure = kind(layout, view, scale.double().square())
        loc, covariance = view.output, structure.covariance(what)
        if evidence:
            loc, covariance = self._condition(
                layout, view, covariance, noises, evidence, what
            )
        loc = loc.double()
        if not differentiable:
            loc = loc.detach()
        method = (
            "exact: product of Gaussians"
            if not view.noises
            else "exact: affine-Gaussian"
        )
        return GaussianLaw(loc, covariance, layout, tuple(sorted(joint)), method)

    def _refuse_unexplained(self, base: Layout, view: NoiseView, what: str) -> None:
        """Dimensions that are no plates must come from values that are held."""
        if not view.noises:
            return
        shape, plates = view.output.shape[:-1], base.batch_shape
        shared = self.zero.shared.values()
        for dim in range(-len(shape), 0):
            size = shape[dim]
            inside = -dim <= len(plates) and plates[dim] == size
            if (
                size > 1
                and not inside
                and all(statement.outside.get(dim) != size for statement in shared)
            ):
                raise NotAMicroState(
                    f"{what}: the micro state has batch shape {tuple(shape)}, and no "
                    f"plate of size {size} at dim {dim}. Put the sites "
                    f"{base.names} into `pyro.plate`, or make the dimension an event "
                    "dimension with `.to_event`."
                )

    def _own_scale(self, site: Site) -> Tensor:
        form = self.zero.forms.get(site.name)
        if form is None or form.scale is None:
            return torch.zeros_like(site.value)
        return form.scale

    def _relevant(
        self, names: Sequence[str], given: Sequence[Evidence], what: str
    ) -> tuple[set[str], list[Evidence]]:
        """The sites whose noise matters, and what is known about these noises."""
        zero = self.zero
        relevant, kept = self.relevant(names, given, what)
        self._refuse_tracing(relevant, names, what)
        self._refuse_kinks(relevant, what)
        for name in sorted(relevant & set(zero.opaque)):
            law = type(unwrapped(zero.opaque[name])).__name__
            if name in names:
                raise UnsupportedLaw(
                    f"{what}: micro site {name!r} is {law}. Expected a Gaussian: the "
                    "law of a total is known here for jointly affine-Gaussian "
                    "programs. Use Allocate or Explicit, which need no such law."
                )
            if self.is_fixed(name):
                raise UnsupportedLaw(
                    f"{what}: site {name!r} is held at its value, but it is {law} and "
                    "depends on latent sites that also act on the micro state, so that "
                    f"what it says about them is no Gaussian. Hold its parents too: "
                    f"given={[name, *self.latent_parents(name)]}."
                )
            raise UnsupportedLaw(
                f"{what}: the micro state depends on {name!r}, which is {law}, not "
                "Gaussian, so that its law with the ancestors integrated out is no "
                f"Gaussian. Hold {name!r} at its value: given=[{name!r}]."
            )
        return relevant, kept

    def _refuse_tracing(
        self, relevant: set[str], names: Sequence[str], what: str
    ) -> None:
        above = relevant - set(names)
        derived = above or any(name in relevant for name, _ in self.zero.noises)
        if derived and torch._C._get_tracing_state():
            raise UnsupportedLaw(
                f"{what}: the law of its micro state is found from derivatives of the "
                "program, which torch.jit cannot trace. Run without jit "
                "(jit_compile=False, Trace_ELBO)"
                + (f", or hold the ancestors: given={sorted(above)}." if above else ".")
            )

    def _refuse_kinks(self, relevant: set[str], what: str) -> None:
        for name in sorted(relevant):
            if self.sites[name].kinks:
                raise NotAffine(
                    f"{what}: the program is not jointly affine-Gaussian: {name!r} is "
                    f"computed with {sorted(self.sites[name].kinks)} from random sites "
                    f"({self.latent_parents(name) or 'its ancestors'}). Hold these "
                    "with given=[...], or write the model without."
                )

    def _check(self, layout: Layout, view: NoiseView, scale: Tensor, what: str) -> None:
        """The derivative at zero has to predict two runs under large noise."""
        for probe in self.probes:
            with torch.no_grad():
                own = {
                    name: probe.drawn.get((name, "own"), torch.zeros_like(site.value))
                    for name in layout.names
                    for site in [self.sites[name]]
                }
                move = scale * layout.stack(own)
            found = layout.stack({n: probe.sites[n].value for n in layout.names})
            if not self._predicts(view, probe, found, layout.names, move):
                raise NotAffine(
                    f"{what}: the program is not jointly affine-Gaussian: with larger "
                    "noise, the micro state is not where its derivative says (a "
                    "product of random sites, a scale that varies, a kink, or numbers "
                    "that were drawn outside of Pyro). Hold the sites that make it so "
                    "with given=[...]; its ancestors are "
                    f"{sorted(self.ancestors(layout.names)) or 'none'}."
                )

    def _predicts(
        self,
        view: NoiseView,
        probe: NoiseRun,
        found: Tensor,
        names: Sequence[str],
        *moves: Tensor,
    ) -> bool:
        """Whether derivatives at zero, and other moves, lead to what a probe found."""
        directions = {
            n.key: probe.drawn[n.key].unsqueeze(0)
            for n in view.noises
            if n.key in probe.drawn
        }
        if len(directions) < len(view.noises):
            return False  # the probe did not meet all sites
        moves = (*moves, view.forward(directions)[0])
        return agree(view.output, moves, found, self._precision(names, view))

    def _precision(self, names: Sequence[str], view: NoiseView) -> float:
        """The rounding of the coarsest dtype that takes part."""
        tensors = [self.sites[name].value for name in names]
        tensors += [noise.leaf for noise in view.noises]
        dtypes = {t.dtype for t in tensors if t.is_floating_point()}
        return max(torch.finfo(dtype).eps for dtype in dtypes)

    def _condition(
        self,
        layout: Layout,
        view: NoiseView,
        covariance: Covariance,
        noises: list[Noise],
        evidence: list[Evidence],
        what: str,
    ) -> tuple[Tensor, Covariance]:
        """``P(X | evidence)``, by the rule for jointly normal vectors."""
        inner = {f.name for f in layout.frames}
        stand_ins: list[Any] = [
            SimpleNamespace(
                name=str(i), frames=known.frames, event_shape=known.event_shape
            )
            for i, known in enumerate(evidence)
        ]
        layouts = [
            Layout(
                [s], [f.name for f in s.frames if f.vectorized and f.name not in inner]
            )
            for s in stand_ins
        ]

        def stack(values: Callable[[Evidence], Tensor]) -> Tensor:
            parts = [
                lay.stack({str(i): values(known)})
                for i, (lay, known) in enumerate(zip(layouts, evidence, strict=True))
            ]
            batch = torch.broadcast_shapes(*(p.shape[:-1] for p in parts))
            return torch.cat([p.expand(batch + p.shape[-1:]) for p in parts], -1)

        known = stack(partial(_expression, self.zero))  # (..., r), at noise zero
        value = stack(lambda e: e.value)
        rows = NoiseView(known, noises, view.differentiable)
        if math.prod(known.shape[:-1]) > layout.batch_shape.numel():
            crossed, total = covariances_by_columns(view, rows, layout)
        else:
            crossed, total = covariances_by_rows(view, rows)
        for probe in self.probes:
            found = stack(partial(_expression, probe))
            if not self._predicts(rows, probe, found, layout.names):
                raise NotAffine(
                    f"{what}: what is given ({[e.name for e in evidence]}) is not an "
                    "affine function of normal noise. Hold the sites that make it so."
                )
        cholesky, info = torch.linalg.cholesky_ex(total)
        if info.any():
            raise UnsupportedLaw(
                f"{what}: what is given ({[e.name for e in evidence]}) is redundant: "
                "some of it follows from the rest. Leave that out of `given`."
            )
        surprise = (value - known).to(total).unsqueeze(-1)
        surprise = torch.cholesky_solve(surprise, cholesky)
        loc = view.output + (crossed @ surprise).squeeze(-1)
        factor = torch.linalg.solve_triangular(cholesky, crossed.mT, upper=False).mT
        try:
            return loc, Explained(covariance, factor)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            raise UnsupportedLaw(
                f"{what}: what is given ({[e.name for e in evidence]}) leaves no "
                "freedom in some direction of the micro state."
            ) from None


def _expression(run: NoiseRun, known: Evidence) -> Tensor:
    return known.of(run)
