# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Coordinates of the positive micro states with a given weighted sum."""

from __future__ import annotations

import torch
from torch import Size, Tensor
from torch.distributions import constraints
from torch.distributions.transforms import StickBreakingTransform, Transform


class SimplexTransform(Transform):
    """From ``K - 1`` free coordinates to ``{x > 0 : scale @ x = value}``.

    :param value: shape ``batch``, positive.
    :param scale: shape ``(K,)``, positive.
    :param centre: shares, shape ``batch + (K,)``, where the free coordinates are
        zero: samplers and guides start there.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, value: Tensor, scale: Tensor, centre: Tensor) -> None:
        super().__init__()
        self.value, self.scale = value, scale
        self._stick = StickBreakingTransform()
        tiny = torch.finfo(centre.dtype).tiny ** 0.5
        self._origin = self._stick.inv(centre.clamp(min=tiny))

    def __eq__(self, other: object) -> bool:
        return self is other

    def _call(self, x: Tensor) -> Tensor:
        return self._stick(x + self._origin) * (self.value.unsqueeze(-1) / self.scale)

    def _inverse(self, y: Tensor) -> Tensor:
        shares = y * self.scale / self.value.unsqueeze(-1)
        return self._stick.inv(shares) - self._origin

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        shares = y * self.scale / self.value.unsqueeze(-1)
        stick = self._stick.log_abs_det_jacobian(x + self._origin, shares)
        stretch = (self.value.unsqueeze(-1) / self.scale[:-1]).log().sum(-1)
        return stick + stretch

    def forward_shape(self, shape: Size) -> Size:
        return Size(shape[:-1]) + Size([shape[-1] + 1])

    def inverse_shape(self, shape: Size) -> Size:
        return Size(shape[:-1]) + Size([shape[-1] - 1])
