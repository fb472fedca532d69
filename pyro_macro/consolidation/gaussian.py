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

SMALL = 1e-13  # of a variance that is left of another, relative: it is none


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
    """The joint law of sites that are eliminated, given what is known so far."""

    def __init__(self) -> None:
        self.forms: dict[str, Form] = {}
        self._covariance: dict[tuple[str, str], Tensor] = {}
        self._scale: dict[str, Tensor] = {}

    def extend(self, name: str, site: AffineSite) -> None:
        """Adds a site. Parents that are not live are known."""
        form = Form(site.offset)
        live = {}
        for parent, matrix in site.coefficients.items():
            if parent in self.forms:
                form = form.plus(matrix, self.forms[parent])
                live[parent] = matrix
            else:
                known = form.terms.get(parent)
                form.terms[parent] = matrix if known is None else known + matrix
        covariance, scale = site.covariance, _diagonal(site.covariance)
        for parent, matrix in live.items():
            scale = scale + _times(matrix**2, self._scale[parent])
        for other in self.forms:
            crossed = [m @ self._covariance[p, other] for p, m in live.items()]
            if crossed:
                total = sum(crossed[1:], start=crossed[0])
                self._set(name, other, total)
                if other in live:
                    covariance = covariance + total @ live[other].mT
            else:
                zero = covariance[..., :1] * 0
                size = self.forms[other].const.shape[-1]
                self._set(name, other, zero.expand((*zero.shape[:-1], size)))
        self._covariance[name, name] = (covariance + covariance.mT) / 2
        self._scale[name] = scale
        self.forms[name] = form

    def law(self, name: str) -> GaussianLaw:
        """The law of a site that is live."""
        covariance = self._covariance[name, name]
        small = _diagonal(covariance) <= SMALL * self._scale[name]
        if bool(small.any()):
            keep = (~small).to(covariance)
            covariance = covariance * keep.unsqueeze(-1) * keep.unsqueeze(-2)
        return GaussianLaw(self.forms[name], covariance)

    def is_point(self, name: str) -> bool:
        """Whether a site is a function of what is known."""
        return bool((self.law(name).covariance == 0).all())

    def condition(self, name: str) -> None:
        """From now on a site is known."""
        law = self.law(name)
        inverse = _inverse(law.covariance)
        size = law.mean.const.shape[-1]
        identity = torch.eye(size).to(law.covariance)
        moved = Form(-law.mean.const, {k: -t for k, t in law.mean.terms.items()})
        moved.terms[name] = identity
        others = [n for n in self.forms if n != name]
        gains = {n: self._covariance[n, name] @ inverse for n in others}
        for n in others:
            self.forms[n] = self.forms[n].plus(gains[n], moved)
        for i, n in enumerate(others):
            for m in others[i:]:
                old = self._covariance[n, m]
                new = old - gains[n] @ self._covariance[name, m]
                self._set(n, m, (new + new.mT) / 2 if n == m else new)
        self.forget([name])

    def forget(self, names: Collection[str]) -> None:
        """Drops sites that nothing depends on any more."""
        for name in names:
            self.forms.pop(name, None)
            self._scale.pop(name, None)
            for pair in [p for p in self._covariance if name in p]:
                del self._covariance[pair]

    def _set(self, one: str, other: str, covariance: Tensor) -> None:
        self._covariance[one, other] = covariance
        if one != other:
            self._covariance[other, one] = covariance.mT


def _diagonal(matrix: Tensor) -> Tensor:
    return matrix.diagonal(dim1=-2, dim2=-1)


def _inverse(covariance: Tensor) -> Tensor:
    """The inverse within the span of a covariance."""
    if covariance.shape[-1] == 1:
        safe = torch.where(covariance > 0, covariance, torch.ones_like(covariance))
        return torch.where(covariance > 0, 1 / safe, torch.zeros_like(covariance))
    _, info = torch.linalg.cholesky_ex(covariance)
    if not bool(info.any()):
        return torch.linalg.inv(covariance)
    return torch.linalg.pinv(covariance, hermitian=True, rtol=SMALL * 10)
