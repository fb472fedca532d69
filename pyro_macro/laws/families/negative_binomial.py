# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyro_macro.laws.families.base import CountsGivenSum, Member, member


class DirichletMultinomial(CountsGivenSum):
    """Negative binomial counts of one probability, given their sum.

    Geometric ones have size one: all compositions are then equally likely.

    >>> law = DirichletMultinomial(
    ...     torch.ones(2), torch.tensor(0.0), torch.ones(2), torch.tensor(3.0))
    >>> law.log_prob(torch.tensor([0.0, 3.0])).exp()
    tensor(0.2500)
    """

    name = "negative binomial of one probability given the sum: Dirichlet-multinomial"

    def density(self, size: Tensor, x: Tensor) -> Tensor:
        return torch.lgamma(x + size) - torch.lgamma(size) - torch.lgamma(x + 1)

    def shared(self) -> Tensor:
        # `common` is the logit of the probability that an attempt counts
        assert self.common is not None
        failed = torch.nn.functional.logsigmoid(-self.common)
        counted = torch.nn.functional.logsigmoid(self.common)
        return self.size.sum(-1) * failed + self.sum * counted

    def half(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        one, two = torch._standard_gamma(left), torch._standard_gamma(right)
        share = (one / (one + two)).nan_to_num(nan=0.5)
        share = torch.where(right > 0, share, 1.0)
        return torch.binomial(total, torch.where(left > 0, share, 0.0))


@member.register(torch.distributions.NegativeBinomial)
def _negative_binomial(fn: Any) -> Member:
    return Member(
        DirichletMultinomial, fn.total_count.expand(fn.batch_shape), fn.logits
    )


@member.register(torch.distributions.Geometric)
def _geometric(fn: Any) -> Member:
    return Member(DirichletMultinomial, torch.ones_like(fn.logits), -fn.logits)
