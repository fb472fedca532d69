# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws that are known given some latent sites of finite support, mixed over these."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.laws.base import MicroLaw


class Mixture(MicroLaw):
    """``P(X | pi(X) = value) = sum_c P(c | value) P(X | value, c)``.

    :param part: the law given each configuration ``c``: batch shape ``(C, 1)`` and
        then that of the mixture. It knows its ``log_total``.
    :param log_weights: ``log P(c)``, broadcasting against that.
    """

    def __init__(self, part: Any, log_weights: Tensor) -> None:
        joint = part.log_total + log_weights
        self._depth = joint.dim() - 2
        if part.batch_shape != joint.shape:
            part = part.expand(joint.shape)
        self.part = part
        self._log_total = torch.logsumexp(joint, -2 - self._depth).squeeze(
            -1 - self._depth
        )
        self.log_share = joint - torch.logsumexp(joint, -2 - self._depth, True)
        super().__init__(self._log_total.shape, part.event_shape)

    @property
    def method(self) -> str:  # type: ignore[override]
        of = self.part.method.removeprefix("exact: ")
        return f"exact: mixture of {self.log_share.shape[0]}, each: {of}"

    @property
    def log_total(self) -> Tensor:
        return self._log_total

    def _mixed(self, moment: Tensor) -> Tensor:
        """The average of something over the configurations."""
        at = -3 - self._depth
        share = self.log_share.exp().unsqueeze(-1).to(moment.dtype)
        return (share * moment).sum(at).squeeze(at + 1)

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        mean = self._mixed(self.part.mean)
        return mean.expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        square = self._mixed(self.part.variance + self.part.mean.square())
        return (square - self.mean.square()).clamp(min=0)

    @cached_property
    def _fibre(self) -> Any:
        return self.part.fibre_around(self)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Any:  # type: ignore[override]
        return self._fibre

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            share = self.log_share.squeeze(1).movedim(0, -1).expand(shape + (-1,))
            which = torch.distributions.Categorical(logits=share).sample()
            drawn = self._drawn(shape)  # (..., C, K)
            index = which[..., None, None].expand(shape + (1,) + self.event_shape)
            return drawn.gather(-2, index).squeeze(-2)

    def _drawn(self, shape: Size) -> Tensor:
        """Draws of all parts, anew wherever the batch was expanded."""
        own, ahead = self._log_total.shape, len(shape) - self._depth
        fresh = [i for i, n in enumerate(shape) if i < ahead or own[i - ahead] != n]
        sizes = Size(shape[i] for i in fresh)
        drawn = self.part.sample(Size([sizes.numel()]))
        drawn = drawn.reshape(sizes + drawn.shape[1:])
        kept = {i: len(fresh) + 2 + i - ahead for i in range(ahead, len(shape))}
        order = [fresh.index(i) if i in fresh else kept[i] for i in range(len(shape))]
        rest = [d for d in range(drawn.dim() - 1) if d not in order]
        drawn = drawn.permute(*order, *rest, -1)
        return drawn.reshape(shape + self.log_share.shape[:1] + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        shape = torch.broadcast_shapes(value.shape[:-1], self.batch_shape)
        value = value.expand(shape + self.event_shape)
        at = value.dim() - 1 - self._depth
        parts = self.part.log_prob(value.unsqueeze(at).unsqueeze(at))
        joint = parts + self.log_share.to(parts.dtype)
        result = torch.logsumexp(joint, -2 - self._depth).squeeze(-1 - self._depth)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))
