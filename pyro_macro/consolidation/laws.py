# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The distributions of what stays, of the shape the program gave them."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.transforms import ReshapeTransform

from pyro_macro.errors import UnsupportedLaw
from pyro_macro.program.inner import Site, unwrapped


def gaussian(mean: Tensor, covariance: Tensor, site: Site) -> Any:
    """A Gaussian of elements, as the distribution of a site.

    :param mean: shape ``(..., n)``.
    :param covariance: shape ``(..., n, n)``.
    :returns: the distribution; the mean, as a value of the site, if nothing is random.
    """
    event = site.event_shape
    dtype = site.value.dtype
    loc = trimmed(mean, 1, site).to(dtype)
    covariance = trimmed(covariance, 2, site)
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    if not bool((variance > 0).any()):
        return loc.reshape(loc.shape[:-1] + event)
    if bool((variance == 0).any()):
        raise UnsupportedLaw(
            f"site {site.name!r}: given what stays before it, some of its elements are "
            "certain and others are not. No distribution of Pyro is such: keep the "
            "sites that it is computed from, too."
        )
    if not event:
        return dist.Normal(loc[..., 0], variance[..., 0].sqrt().to(dtype))
    off = covariance - torch.diag_embed(variance)
    if not bool(off.any()):
        scale = variance.sqrt().to(dtype)
        scale = scale.reshape(scale.shape[:-1] + event)
        loc = loc.reshape(loc.shape[:-1] + event)
        return dist.Normal(loc, scale).to_event(len(event))
    tril, info = torch.linalg.cholesky_ex(covariance)
    thin = tril.diagonal(dim1=-2, dim2=-1) ** 2 <= 1e-12 * variance
    if bool(info.any()) or bool(thin.any()):
        raise UnsupportedLaw(
            f"site {site.name!r}: given what stays before it, some combinations of its "
            "elements are certain and others are not. No distribution of Pyro is such: "
            "keep the sites that it is computed from, too."
        )
    tril = tril.to(dtype)
    flat = dist.MultivariateNormal(loc, scale_tril=tril)
    if len(event) == 1:
        return flat
    return dist.TransformedDistribution(flat, [ReshapeTransform(loc.shape[-1:], event)])


def trimmed(tensor: Tensor, right: int, site: Site) -> Tensor:
    """Without dimensions of size one to the left of a site's plates."""
    own = len(site.shape) - len(site.event_shape)
    while tensor.dim() - right > own and tensor.shape[0] == 1:
        tensor = tensor.squeeze(0)
    return tensor


class FiniteValues(dist.TorchDistribution):
    """One of some values.

    :param values: shape ``(V,)``.
    :param logits: logarithms of their probabilities, shape ``batch + (V,)``.
    """

    arg_constraints = {"logits": constraints.real_vector}
    has_enumerate_support = True

    def __init__(self, values: Tensor, logits: Tensor) -> None:
        self.values, self.logits = values, logits.log_softmax(-1)
        super().__init__(logits.shape[:-1], validate_args=False)

    @property
    def probs(self) -> Tensor:
        """The probabilities, shape ``batch + (V,)``."""
        return self.logits.exp()

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> _OneOf:  # type: ignore[override]
        return _OneOf(self.values)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FiniteValues:
        shape = torch.Size(batch_shape) + self.logits.shape[-1:]
        return FiniteValues(self.values, self.logits.expand(shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        index = dist.Categorical(logits=self.logits, validate_args=False)
        return self.values[index.sample(torch.Size(sample_shape))]

    def log_prob(self, value: Tensor) -> Tensor:
        hit = value.unsqueeze(-1) == self.values
        logits = torch.where(hit, self.logits, -torch.inf)
        return logits.logsumexp(-1)

    def enumerate_support(self, expand: bool = True) -> Tensor:
        values = self.values.reshape((-1,) + (1,) * len(self.batch_shape))
        return values.expand((-1, *self.batch_shape)) if expand else values


class _OneOf(constraints.Constraint):
    is_discrete = True

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def check(self, value: Tensor) -> Tensor:
        return (value.unsqueeze(-1) == self.values).any(-1)


def within(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """As numbers that a type has: there is no infinity among them."""
    most = torch.finfo(dtype).max / 4
    return logits.clamp(-most, most).to(dtype)


def finite(logits: Tensor, values: Tensor, site: Site) -> Any:
    """Probabilities of values, as the distribution of a site.

    It is of the kind it was, where that is determined by the probabilities.

    :param logits: their logarithms, shape ``(..., V)``.
    :returns: the distribution; a value of the site, if only one is possible.
    """
    logits = trimmed(logits, 1, site)
    base = None if site.deterministic else unwrapped(site.fn)
    given = getattr(base, "_param", None)
    dtype = torch.get_default_dtype()
    if isinstance(given, Tensor) and given.is_floating_point():
        dtype = given.dtype
    if isinstance(base, torch.distributions.Bernoulli):
        return dist.Bernoulli(logits=within(logits[..., 1] - logits[..., 0], dtype))
    if isinstance(base, torch.distributions.Categorical):
        return dist.Categorical(logits=within(logits, dtype))
    probs = logits.exp()
    if site.deterministic and bool(((probs == 0) | (probs == 1)).all()):
        return values[probs.argmax(-1)]
    return FiniteValues(values, within(logits, dtype))
