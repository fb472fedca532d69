# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.laws.base import MicroFibre
from pyro_macro.laws.families.base import GivenSum, Member, member
from pyro_macro.laws.sampled.simplex import SimplexTransform


class ScaledDirichlet(GivenSum):
    """Gamma variables of one rate, given their sum.

    Exponential and chi-squared ones are among them. The log density is with respect
    to the elements without the last one.

    >>> law = ScaledDirichlet(
    ...     torch.ones(2), torch.tensor(1.0), torch.ones(2), torch.tensor(4.0))
    >>> law.log_prob(torch.tensor([1.0, 3.0])).exp()  # uniform on an interval of 4
    tensor(0.2500)
    """

    name = "gamma of one rate given the sum is a scaled Dirichlet"
    is_count = False
    has_rsample = True

    def density(self, size: Tensor, x: Tensor) -> Tensor:
        return torch.xlogy(size - 1, x) - torch.lgamma(size)

    def shared(self) -> Tensor:
        assert self.common is not None
        return torch.xlogy(self.size.sum(-1), self.common) - self.common * self.sum

    def _inside(self, value: Tensor) -> Tensor:
        return value > 0

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> MicroFibre:  # type: ignore[override]
        return self.fibre_around(self)

    def fibre_around(self, law: Any) -> MicroFibre:
        """The fibre, with coordinates that start at the mean of ``law``."""
        scale = self.scale.to(self.dtype)
        shares = (law.mean * scale / self.value.unsqueeze(-1)).detach()
        coordinates = SimplexTransform(self.value, scale, shares)
        return MicroFibre(self._inside, self._total, self.value, coordinates)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        size = self.size.sum(-1, keepdim=True)
        share = self.size / size
        unit = self.sum.unsqueeze(-1) / self.scale
        variance = share * (1 - share) / (size + 1) * unit.square()
        return variance.to(self.dtype).expand(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape + self.event_shape
        size = self.size.expand(shape)
        shares = torch.distributions.Dirichlet(size, validate_args=False).rsample()
        x = (shares * (self.sum.unsqueeze(-1) / self.scale)).to(self.dtype)
        return x.clamp(min=torch.finfo(self.dtype).tiny)


@member.register(torch.distributions.Gamma)
def _gamma(fn: Any) -> Member:
    return Member(ScaledDirichlet, fn.concentration, fn.rate)


@member.register(torch.distributions.Exponential)
def _exponential(fn: Any) -> Member:
    return Member(ScaledDirichlet, torch.ones_like(fn.rate), fn.rate)
