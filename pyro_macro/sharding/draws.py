# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Distributions whose draws do not depend on how a plate is split over ranks."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Size, Tensor

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.program.inner import preserved_random_state
from pyro_macro.program.noise import NoiseForm, noise_form
from pyro_macro.program.parts import parts
from pyro_macro.sharding.shards import Shards


def by_shards(fn: Any, shards: Shards, dim: int, site: str) -> Any:
    """The same distribution, of the same type, drawn block by block.

    A draw takes one number from the global random state, on all ranks the same.

    :param fn: a distribution; along ``dim`` of its batch it has the slots of this rank.
    :param site: what it is the distribution of, for messages.
    """
    if not isinstance(fn, torch.distributions.Distribution):
        raise UnsupportedLaw(
            f"site {site!r} in {shards!r}: {fn!r} is no distribution. Expected one."
        )
    kind = _kind(_plain_kind(fn))
    new: Any = kind.__new__(kind)
    new.__dict__.update(fn.__dict__)
    new._shards, new._shard_dim, new._shard_site = shards, dim, site
    return new


def _plain_kind(fn: Any) -> type:
    return getattr(type(fn), "_undivided", None) or type(fn)


@cache
def _kind(kind: Any) -> Any:
    class Divided(kind):
        _undivided = kind
        _shards: Shards | None = None  # until a plate has seen it

        def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
            new = super().expand(batch_shape, _instance)
            if self._shards is None:
                return new
            return by_shards(new, self._shards, self._shard_dim, self._shard_site)

        def sample(self, sample_shape: Any = Size()) -> Tensor:
            if self._shards is None:
                return super().sample(sample_shape)
            with torch.no_grad():
                return _draw(self, Size(sample_shape), "sample")

        def rsample(self, sample_shape: Any = Size()) -> Tensor:
            if self._shards is None:
                return super().rsample(sample_shape)
            return _draw(self, Size(sample_shape), "rsample")

    Divided.__name__ = kind.__name__
    Divided.__qualname__ = kind.__qualname__
    return Divided


def _draw(fn: Any, sample_shape: Size, method: str) -> Tensor:
    kind = type(fn)._undivided
    plain: Any = kind.__new__(kind)
    plain.__dict__.update(fn.__dict__)
    if fn.batch_shape[fn._shard_dim] != fn._shards.here:
        raise UnsupportedLaw(
            f"site {fn._shard_site!r}: its batch shape is {tuple(fn.batch_shape)}, and "
            f"{fn._shards!r} has {fn._shards.here} slots at dim {fn._shard_dim}. "
            "Expected one distribution for each slot."
        )
    form = noise_form(plain)
    if form is not None:
        return _of_noise(form, fn, sample_shape)
    return _of_parts(plain, fn, sample_shape, method)


def _of_noise(form: NoiseForm, fn: Any, sample_shape: Size) -> Tensor:
    """A Gaussian, from its noise."""
    axis = len(sample_shape) + len(fn.batch_shape) + fn._shard_dim

    def noise(shape: Size) -> Tensor:
        return fn._shards.normal(sample_shape + shape, axis, form.like)

    value = form.affine(None if form.shape is None else noise(form.shape))
    if form.scale is not None:
        own = noise(Size(form.scale.shape))
        value = value + form.scale * own
    return value.expand(sample_shape + fn.batch_shape + fn.event_shape)


def _of_parts(plain: Any, fn: Any, sample_shape: Size, method: str) -> Tensor:
    """Any other distribution, block by block from its parameters."""
    shards, dim, batch = fn._shards, fn._shard_dim, fn.batch_shape
    found = parts(plain)
    if found is None or not found.tensors:
        raise UnsupportedLaw(
            f"site {fn._shard_site!r}: {type(fn).__name__} in {shards!r} cannot be "
            "drawn block by block, for it is not known what it is made of. Register "
            "its tensors with pyro_macro.program.parts.parts."
        )
    # Split at once: a slice for each block would have gradients of the full size each
    pieces = [
        tensor.split(shards.sizes, dim - depth)
        if tensor.dim() >= depth - dim and tensor.shape[dim - depth] == shards.here
        else [tensor] * len(shards.sizes)
        for tensor, depth in zip(found.tensors, found.event_dims, strict=True)
    ]
    draws, seeds = [], list(shards.seeds())
    with preserved_random_state():
        for seed, size, *given in zip(seeds, shards.sizes, *pieces, strict=True):
            shape = list(batch)
            shape[dim] = size
            block = found.build(given).expand(Size(shape))
            torch.manual_seed(seed)
            draws.append(getattr(block, method)(sample_shape))
    return torch.cat(draws, dim - len(fn.event_shape))
