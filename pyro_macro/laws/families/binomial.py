# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.laws.families.base import CountsGivenSum, Member, member
from pyro_macro.laws.finite.sums import NEVER, SumTree


def _log_choose(n: Tensor, k: Tensor) -> Tensor:
    return torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)


class Hypergeometric(CountsGivenSum):
    """Binomial (and Bernoulli) counts of one probability, given their sum.

    Multivariate hypergeometric: of all trials, those that succeeded are any.

    >>> law = Hypergeometric(
    ...     torch.tensor([1.0, 3.0]), torch.tensor(0.0), torch.ones(2),
    ...     torch.tensor(2.0))
    >>> law.log_prob(torch.tensor([1.0, 1.0])).exp()
    tensor(0.5000)
    """

    name = "binomial of one probability given the sum: multivariate hypergeometric"

    @property
    def _most(self) -> Tensor:
        return self.size.sum(-1)

    @property
    def _limits(self) -> Tensor:
        return self.size.reshape(-1, self.event_shape[0]).amax(0)

    def _inside(self, value: Tensor) -> Tensor:
        return super()._inside(value) & (value <= self.size)

    def density(self, size: Tensor, x: Tensor) -> Tensor:
        return _log_choose(size, x)

    def shared(self) -> Tensor:
        assert self.common is not None
        failed = torch.nn.functional.logsigmoid(-self.common)
        return self.size.sum(-1) * failed + self.sum * self.common

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            most = int(self.size.max())
            x = torch.arange(most + 1, dtype=self.size.dtype, device=self.size.device)
            n = self.size.reshape(-1, self.event_shape[0], 1)
            parts = torch.where(x <= n, _log_choose(n, x.minimum(n)), NEVER)
            tree = SumTree(parts, int(self.sum.max()))
            rows = self._rows(self.size.shape[:-1], shape, self.size)
            sums = self.sum.expand(shape).flatten().to(torch.long)
            drawn = tree.split(rows, sums)
        return drawn.reshape(shape + self.event_shape).to(self.dtype)


def _is_certain(fn: Any) -> bool:
    """Whether a probability is zero or one: logits do not tell that."""
    probs = vars(fn).get("probs")
    return probs is not None and bool(((probs == 0) | (probs == 1)).any())


@member.register(torch.distributions.Bernoulli)
def _bernoulli(fn: Any) -> Member | None:
    if _is_certain(fn):
        return None
    return Member(Hypergeometric, torch.ones_like(fn.logits), fn.logits)


@member.register(torch.distributions.Binomial)
def _binomial(fn: Any) -> Member | None:
    if _is_certain(fn):
        return None
    return Member(Hypergeometric, fn.total_count.expand(fn.batch_shape), fn.logits)
