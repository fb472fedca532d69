# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_macro.laws.families.base import CountsGivenSum, Member, member


class Multinomial(CountsGivenSum):
    """Independent Poisson counts given their sum: multinomial.

    >>> law = Multinomial(
    ...     torch.tensor([1.0, 3.0]), None, torch.ones(2), torch.tensor(2.0))
    >>> law.log_prob(torch.tensor([1.0, 1.0])).exp()
    tensor(0.3750)
    """

    name = "Poisson given the sum is multinomial"

    def density(self, size: Tensor, x: Tensor) -> Tensor:
        # A rate of zero has no logarithm, nor a gradient of it
        none = torch.where(x > 0, -torch.inf, 0.0)
        power = x * torch.where(size > 0, size, 1.0).log()
        return torch.where(size > 0, power, none) - torch.lgamma(x + 1)

    @property
    def _most(self) -> Tensor:
        return torch.where(self.size.sum(-1) > 0, torch.inf, 0.0)

    def shared(self) -> Tensor:
        return -self.size.sum(-1)

    def half(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        share = left / (left + right)
        return torch.binomial(total, torch.where(left > 0, share, 0.0))


@member.register(torch.distributions.Poisson)
def _poisson(fn: Any) -> Member:
    return Member(Multinomial, fn.rate)
