# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Elimination of affine-Gaussian sites: what stays given what stays before it.

Sites are met in program order. Those that are eliminated have, given what stays so
far, a joint Gaussian; a site that stays is predicted from it, and then conditioned on
(as in a Kalman filter), unless it is intervened on.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_macro.consolidation.affine import AffineSite
from pyro_macro.program.shapes import broadcast_shapes

SMALL = 1e-13  # of a standard deviation, relative to what it was: nothing is left


@dataclass(eq=False)
class Form:
    """A vector as an affine function of the values of sites that are known.

    :ivar const: shape ``(..., n)``.
    :ivar terms: a matrix for each site, ``(..., n, size of the site)``.
    """

    const: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)

    def plus(self, matrix: Tensor, other: Form) -> Form:
        """``self + matrix @ other``."""
        terms = dict(self.terms)
        for name, term in other.terms.items():
            moved = matrix @ term
            terms[name] = terms[name] + moved if name in terms else moved
        return Form(self.const + _times(matrix, other.const), terms)

    def at(self, values: Mapping[str, Tensor]) -> Tensor:
        """Its value, given those of the sites as ``(..., size)``."""
        total = self.const
        for name, matrix in self.terms.items():
            total = total + _times(matrix, values[name])
        return total


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    if matrix.shape[-1] == 1:
        return matrix[..., 0] * vector
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True, eq=False)
class GaussianLaw:
    """The law of a site given known ones.

    :ivar mean: as a form in these.
    :ivar covariance: shape ``(..., n, n)``.
    """

    mean: Form
    covariance: Tensor


class GaussianState:
    """The joint law of sites that are eliminated, given what is known so far.

    Each is a form in what is known plus a factor times noise, independent standard
    normal numbers that they share: covariances are never formed, which would square
    the condition of the problem.
    """

    def __init__(self) -> None:
        self.forms: dict[str, Form] = {}
        self._factors: dict[str, Tensor] = {}  # (..., n, number of noises)
        self._scale: dict[str, Tensor] = {}  # variances before anything was known
        self._noises = 0

    def extend(self, name: str, site: AffineSite) -> None:
        """Adds a site. Parents that are not live are known."""
        form = Form(site.offset)
        scale = _diagonal(site.covariance)
        own = root(site.covariance)
        factor = own.new_zeros((*own.shape[:-1], self._noises))
        for parent, matrix in site.coefficients.items():
            if parent in self.forms:
                form = form.plus(matrix, self.forms[parent])
                factor = factor + matrix @ self._padded(parent)
                scale = scale + _times(matrix**2, self._scale[parent])
            else:
                known = form.terms.get(parent)
                form.terms[parent] = matrix if known is None else known + matrix
        if bool(own.any()):
            own = own.expand((*factor.shape[:-2], *own.shape[-2:]))
            factor = torch.cat([factor, own], -1)
            self._noises += own.shape[-1]
        self.forms[name], self._factors[name] = form, factor
        self._scale[name] = scale

    def law(self, name: str) -> GaussianLaw:
        """The law of a site that is live."""
        factor = self._certain(name)
        return GaussianLaw(self.forms[name], factor @ factor.mT)

    def condition(self, name: str, key: str) -> None:
        """From now on a site is known.

        :param key: what its value is called in forms.
        """
        form, factor = self.forms[name], self._certain(name)
        others = [n for n in self.forms if n != name]
        moved = Form(-form.const, {k: -t for k, t in form.terms.items()})
        moved.terms[key] = torch.eye(form.const.shape[-1]).to(factor)
        directions, gain = self._learned(factor, self._scale[name])
        for n in others:
            own = self._padded(n)
            along = own @ directions.mT  # (..., n, rank)
            self.forms[n] = self.forms[n].plus(along @ gain, moved)
            self._factors[n] = own - along @ directions
        self.forget([name])

    def forget(self, names: Collection[str]) -> None:
        """Drops sites that nothing depends on any more."""
        for name in names:
            for table in (self.forms, self._factors, self._scale):
                table.pop(name, None)
        self._compress()

    def _padded(self, name: str) -> Tensor:
        factor = self._factors[name]
        missing = self._noises - factor.shape[-1]
        if not missing:
            return factor
        zeros = factor.new_zeros((*factor.shape[:-1], missing))
        return torch.cat([factor, zeros], -1)

    def _certain(self, name: str) -> Tensor:
        """A factor without what is left of elements that are known but for rounding."""
        factor = self._padded(name)
        small = (factor**2).sum(-1) <= SMALL**2 * self._scale[name]
        return torch.where(small.unsqueeze(-1), torch.zeros_like(factor), factor)

    def _learned(self, factor: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """What a site tells of the noise.

        :returns: orthonormal directions ``(..., r, noises)`` of the noise, and the
            matrix ``(..., r, n)`` that takes the site's surprise to them.
        """
        size, noises = factor.shape[-2:]
        if size == 1:
            length = (factor**2).sum(-1, keepdim=True)
            some = length > 0
            length = torch.where(some, length, torch.ones_like(length)).sqrt()
            gain = torch.where(some, 1 / length, torch.zeros_like(length))
            return factor / length, gain
        if size <= noises:
            unit = scale.sqrt().clamp(min=1e-300).unsqueeze(-1)
            q, r = torch.linalg.qr((factor / unit).mT)
            if bool((_diagonal(r).abs() > SMALL * 1e3).all()):
                gain = torch.linalg.solve_triangular(
                    r.mT, torch.diag_embed(1 / unit.squeeze(-1)), upper=False
                )
                return q.mT, gain
        u, s, v = torch.linalg.svd(factor, full_matrices=False)
        some = s > SMALL * 1e3 * s[..., :1]
        inverse = torch.where(some, 1 / torch.where(some, s, 1.0), 0.0)
        return v * some.unsqueeze(-1), inverse.unsqueeze(-1) * u.mT

    def _compress(self) -> None:
        """As few noises as there are elements, where they have become many."""
        sizes = [f.shape[-2] for f in self._factors.values()]
        if not sizes or self._noises <= 4 * sum(sizes) + 32:
            return
        factors = [self._padded(name) for name in self._factors]
        if any(f.requires_grad for f in factors):
            return
        lead = broadcast_shapes(*(f.shape[:-2] for f in factors))
        whole = torch.cat([f.expand((*lead, *f.shape[-2:])) for f in factors], -2)
        whole = torch.linalg.qr(whole.mT, mode="r").R.mT
        self._noises = whole.shape[-1]
        parts = whole.split(sizes, -2)
        self._factors = dict(zip(self._factors, parts, strict=True))


def root(covariance: Tensor) -> Tensor:
    """A factor ``F`` of a covariance ``F F'``, which may be singular."""
    variance = _diagonal(covariance)
    if covariance.shape[-1] == 1:
        some = covariance > 0
        safe = torch.where(some, covariance, torch.ones_like(covariance))
        return torch.where(some, safe.sqrt(), torch.zeros_like(covariance))
    if not bool((covariance - torch.diag_embed(variance)).any()):
        some = variance > 0
        safe = torch.where(some, variance, torch.ones_like(variance))
        return torch.diag_embed(torch.where(some, safe.sqrt(), 0.0))
    cholesky, info = torch.linalg.cholesky_ex(covariance)
    if not bool(info.any()):
        return cholesky
    values, vectors = torch.linalg.eigh(covariance)
    return vectors * values.clamp(min=0).sqrt().unsqueeze(-2)


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)
