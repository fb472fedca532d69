# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The noise view: a program as a function of standard normal noise.

Each Gaussian site is written as ``loc + factor @ noise + scale * own``. If the
program is jointly affine-Gaussian, every stacked vector of its values is an affine
function of all noises, and reverse mode gives its coefficients: for few rows
directly (:meth:`NoiseView.backward`), for few columns through the derivative of the
derivative (:meth:`NoiseView.forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from pyro.poutine.runtime import Message
from torch import Size, Tensor
from torch.distributions import AffineTransform

from pyro_macro.program.inner import InnerRun, Shared, Site, refuse_fixed
from pyro_macro.program.reading import draw

Key = tuple[str, str]


@dataclass(frozen=True, eq=False)
class NoiseForm:
    """A distribution as an affine map of standard normal noise.

    ``value = affine(noise) + scale * own`` with independent standard normal ``noise``
    and ``own``; ``own`` has the shape of the value.

    :ivar affine: the affine map of ``noise``.
    :ivar shape: the shape of ``noise``; ``None`` where there is none.
    :ivar scale: the scale of the noise that each element has for itself, or ``None``.
    :ivar like: a tensor of the dtype and device of the noise.
    """

    affine: Callable[[Tensor | None], Tensor]
    like: Tensor
    shape: torch.Size | None = None
    scale: Tensor | None = None


@singledispatch
def noise_form(fn: Any) -> NoiseForm | None:
    """The noise form of a distribution, ``None`` if it is not a Gaussian.

    An open function: a new Gaussian family registers its form here.
    """
    return None


@noise_form.register(torch.distributions.Normal)
def _normal(fn: Any) -> NoiseForm:
    return NoiseForm(lambda noise: fn.loc, like=fn.scale, scale=fn.scale)


@noise_form.register(torch.distributions.MultivariateNormal)
def _multivariate_normal(fn: Any) -> NoiseForm:
    def affine(noise: Tensor | None) -> Tensor:
        assert noise is not None
        return fn.loc + (fn.scale_tril @ noise.unsqueeze(-1)).squeeze(-1)

    return NoiseForm(affine, like=fn.loc, shape=fn.batch_shape + fn.event_shape)


@noise_form.register(torch.distributions.LowRankMultivariateNormal)
def _low_rank(fn: Any) -> NoiseForm:
    def affine(noise: Tensor | None) -> Tensor:
        assert noise is not None
        return fn.loc + (fn.cov_factor @ noise.unsqueeze(-1)).squeeze(-1)

    scale = fn.cov_diag.sqrt().expand(fn.batch_shape + fn.event_shape)
    shape = fn.batch_shape + fn.cov_factor.shape[-1:]
    return NoiseForm(affine, like=fn.loc, shape=shape, scale=scale)


@noise_form.register(dist.Delta)
def _delta(fn: Any) -> NoiseForm:
    return NoiseForm(lambda noise: fn.v, like=fn.v)


@noise_form.register(torch.distributions.Independent)
@noise_form.register(dist.torch_distribution.MaskedDistribution)
def _wrapped(fn: Any) -> NoiseForm | None:
    return noise_form(fn.base_dist)


@noise_form.register(torch.distributions.TransformedDistribution)
def _transformed(fn: Any) -> NoiseForm | None:
    base = noise_form(fn.base_dist)
    if base is None or not all(isinstance(t, AffineTransform) for t in fn.transforms):
        return None
    shift, factor = 0.0, 1.0
    for t in fn.transforms:
        shift, factor = t.loc + t.scale * shift, factor * t.scale
    inner, scale = base.affine, base.scale
    return NoiseForm(
        lambda noise: shift + factor * inner(noise),
        base.like,
        base.shape,
        None if scale is None else factor * scale,
    )


@dataclass(frozen=True, eq=False)
class Noise:
    """One group of noises: those of a site, of one kind.

    :ivar key: the site's name, and which of its two noises.
    :ivar leaf: the tensor of zeros at which derivatives are taken.
    :ivar frames: the plates around the site.
    :ivar event_dim: how many of the rightmost dimensions are no plates.
    """

    key: Key
    leaf: Tensor
    frames: tuple[Any, ...]
    event_dim: int


class NoiseView:
    """The derivative of a stacked vector with respect to the noises of a program.

    :param output: a tensor computed from the noises, at noise zero.
    :param noises: the groups of noises that it may depend on.
    :param differentiable: whether the coefficients are to be differentiated again.
    :ivar noises: the groups that it does depend on.
    """

    def __init__(
        self, output: Tensor, noises: list[Noise], differentiable: bool
    ) -> None:
        self.output = output
        self.differentiable = differentiable
        self.noises: list[Noise] = []
        self._adjoint: list[Tensor] = []
        if not noises or not output.requires_grad:
            return
        # The gradient is linear in the cotangent, so that its own derivative along a
        # direction of the noise is the forward derivative of the output.
        self._cotangent = torch.zeros_like(output, requires_grad=True)
        adjoint = torch.autograd.grad(
            output,
            [noise.leaf for noise in noises],
            self._cotangent,
            create_graph=True,
            allow_unused=True,
        )
        for noise, gradient in zip(noises, adjoint, strict=True):
            if gradient is not None and gradient.requires_grad:
                self.noises.append(noise)
                self._adjoint.append(gradient)

    def forward(self, directions: Mapping[Key, Tensor]) -> Tensor:
        """Derivatives of the output along directions of the noises.

        :param directions: for some groups, shape ``(n,)`` and then that of the group.
        :returns: shape ``(n,)`` and then the shape of the output.
        """
        pairs = [
            (adjoint, directions[noise.key])
            for noise, adjoint in zip(self.noises, self._adjoint, strict=True)
            if noise.key in directions
        ]
        if not pairs:
            n = len(next(iter(directions.values()))) if directions else 1
            return self.output.new_zeros((n,) + self.output.shape)
        adjoints, along = zip(*pairs, strict=True)
        (result,) = self._gradients(adjoints, [self._cotangent], along)
        return result

    def _gradients(
        self, outputs: Any, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> list[Tensor]:
        """Derivatives for several cotangents, shape ``(n,)`` in front."""
        single = len(cotangents[0]) == 1  # spares the price of a batch
        found = torch.autograd.grad(
            outputs,
            inputs,
            [c[0] for c in cotangents] if single else cotangents,
            retain_graph=True,
            create_graph=self.differentiable,
            is_grads_batched=not single,
            materialize_grads=True,
        )
        return [gradient.unsqueeze(0) for gradient in found] if single else list(found)

    def backward(self, cotangents: Tensor) -> dict[Key, Tensor]:
        """The coefficients of some rows of the output: ``(n,) + group`` by group.

        :param cotangents: shape ``(n,)`` and then the shape of the output.
        """
        if not self.noises:
            return {}
        leaves = [noise.leaf for noise in self.noises]
        gradients = self._gradients([self.output], leaves, [cotangents])
        return {n.key: g for n, g in zip(self.noises, gradients, strict=True)}


class NoiseRun(InnerRun):
    """An inner run under chosen noise.

    :param until: the sites to see.
    :param shared: what was executed already.
    :param held: sites held at a value; what is computed from them is computed from
        that.
    :param probe: 0 for noise zero, at which derivatives are taken; otherwise the sign
        of large noise, with which they are checked.

    :param before: the sites of the run under noise zero, if this one is a probe.
    :param cut: sites whose values are set: what is computed from them is a function of
        these, and no longer of the noise behind them.
    :param forget: whether observations of what is computed from these do not count.

    :ivar forms: the noise form of each Gaussian site.
    :ivar noises: the groups of noises, by key (only for noise zero).
    :ivar drawn: the noise that was put in, by key.
    :ivar leaves: what the sites in ``cut`` are set to, by name.
    :ivar expressions: for sites that are held, observed or cut, and Gaussian or
        deterministic, what they would have been.
    :ivar below: what is computed from the sites in ``cut``.
    :ivar opaque: sites that are not Gaussian, with their distributions.
    """

    def __init__(
        self,
        until: Collection[str],
        shared: dict[str, Shared],
        held: Mapping[str, Tensor],
        micro: Collection[str],
        probe: int = 0,
        before: Mapping[str, Site] | None = None,
        cut: Collection[str] = (),
        forget: bool = False,
    ) -> None:
        super().__init__(until, shared)
        self.held, self.micro, self.probe, self.cut = held, micro, probe, cut
        self.forget, self.below = forget, set[str]()
        self.leaves: dict[str, Tensor] = {}
        self.before = before or {}
        self.forms: dict[str, NoiseForm] = {}
        self.noises: dict[Key, Noise] = {}
        self.drawn: dict[Key, Tensor] = {}
        self.expressions: dict[str, Tensor] = {}
        self.opaque: dict[str, Any] = {}

    @property
    def sets(self) -> Collection[str]:
        return self.cut

    def choose(self, msg: Message, site: Site) -> Any:
        if site.name in self.micro or site.name in self.cut:
            refuse_fixed(msg, "macro_do")
        if site.parents & (self.below | set(self.cut)):
            self.below.add(site.name)
        value = self._chosen(msg, site)
        if site.name not in self.cut or site.name in self.opaque:
            return value
        self.expressions[site.name] = value = site.expanded(value)
        self.leaves[site.name] = self._leaf(value)
        return self.leaves[site.name]

    def _leaf(self, value: Tensor) -> Tensor:
        """What a site is set to: away from its own value, if this run is a probe."""
        value = value.detach().clone()
        if not self.probe:
            return value.requires_grad_()
        generator = torch.Generator().manual_seed(len(self.leaves) + 1000)
        move = torch.randn(
            value.shape, generator=generator, dtype=torch.float64, device="cpu"
        )
        move = self.probe * (move + 3 * move.sign())
        return value + move.to(value) * (1 + value.abs())

    def _chosen(self, msg: Message, site: Site) -> Any:
        form = noise_form(site.fn)
        seen = site.observed and not self.is_forgotten(site.name)
        fixed = self.held.get(site.name, msg["value"] if seen else None)
        if site.deterministic:
            value: Any = msg["value"]
            if value is None and form is not None:  # a plain `Delta` site
                value = form.affine(None)
            self.expressions[site.name] = value
            return value if fixed is None else fixed
        if form is None:
            self.opaque[site.name] = site.fn
            if fixed is not None:
                return fixed
            # The same in all runs: large noise may leave the domain of its parameters
            before = self.before.get(site.name)
            return draw(site.fn) if before is None else before.value
        self.forms[site.name] = form
        value = self._value(site, form)
        if fixed is None:
            return value
        self.expressions[site.name] = value
        return fixed

    def is_forgotten(self, name: str) -> bool:
        """Whether an observation of a site does not count."""
        return self.forget and name in self.below

    def is_noisy(self, site: Site, from_parents: bool) -> bool:
        if site.name in self.cut:
            return True
        observed = site.observed and not self.is_forgotten(site.name)
        if site.name in self.held or observed:
            return False
        return from_parents if site.deterministic else True

    def is_outside(self, site: Site, dim: int, size: int) -> bool:
        """Whether a dimension comes from held values alone, as posterior samples have.

        Its slots are worlds of their own: each has the same law of its noise, and one
        set of noises serves them all.
        """
        if size == 1 or any(f.dim == dim for f in site.frames):
            return False
        return any(s.outside.get(dim) == size for s in self.shared.values())

    def _value(self, site: Site, form: NoiseForm) -> Tensor:
        factor = None
        if form.shape is not None:
            factor = self._noise(site, "factor", form.shape, form.like)
        value = form.affine(factor)
        if form.scale is None or (site.name in self.micro and not self.probe):
            return value
        # The noise that micro elements have for themselves needs no derivative
        own = self._noise(site, "own", form.scale.shape, form.like)
        return value + form.scale * own

    def _noise(self, site: Site, kind: str, shape: Size, like: Tensor) -> Tensor:
        key = (site.name, kind)
        depth = len(site.fn.batch_shape)
        shape = Size(
            1 if self.is_outside(site, i - depth, size) else size
            for i, size in enumerate(shape[:depth])
        ) + Size(shape[depth:])
        if not self.probe:
            leaf = torch.zeros(
                shape, dtype=like.dtype, device=like.device, requires_grad=True
            )
            event_dim = len(shape) - len(site.fn.batch_shape)
            self.noises[key] = Noise(key, leaf, site.frames, event_dim)
            return leaf
        # Large, and of both signs over two probes, so that kinks show; the global
        # random state is not touched.
        generator = torch.Generator().manual_seed(len(self.drawn))
        draws = torch.randn(
            shape, generator=generator, dtype=torch.float64, device="cpu"
        )
        draws = self.probe * (draws + 3 * draws.sign())
        self.drawn[key] = draws.to(dtype=like.dtype, device=like.device)
        return self.drawn[key]
