# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What a distribution is made of, and how to make it again of something else."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import (
    ExpandedDistribution,
    MaskedDistribution,
)
from pyro.distributions.util import broadcast_shape
from torch import Size, Tensor

from pyro_macro.program.tracking import tensors_in


@dataclass(frozen=True, eq=False)
class Parts:
    """The tensors of a distribution.

    :ivar tensors: its parameters.
    :ivar event_dims: how many of the rightmost dimensions of each are no plates.
    :ivar build: makes such a distribution of other tensors, of any batch shape.
    :ivar kind: equal for distributions of which ``build`` is the same.
    """

    tensors: list[Tensor]
    event_dims: list[int]
    build: Callable[[Sequence[Tensor]], Any]
    kind: Any


@singledispatch
def parts(fn: Any) -> Parts | None:
    """What a distribution is made of, ``None`` if that is not known.

    An open function: a distribution whose constructor does not take the parameters in
    its ``arg_constraints`` registers its parts here.

    >>> found = parts(dist.Normal(torch.zeros(3), 1.0).to_event(1))
    >>> [tuple(t.shape) for t in found.tensors], found.event_dims
    ([(3,), (3,)], [1, 1])
    >>> found.build([torch.ones(5, 3), torch.ones(3)])
    Independent(Normal(loc: torch.Size([5, 3]), scale: torch.Size([5, 3])), 1)
    """
    constraints = getattr(fn, "arg_constraints", None)
    if not constraints or not isinstance(constraints, dict):
        return None
    own = vars(fn)
    kind: Any = type(fn)
    wanted = _arguments(kind)
    names = [n for n in constraints if n in wanted and isinstance(own.get(n), Tensor)]
    if not names:  # they are properties
        names = [n for n in constraints if n in wanted and n != "logits"]
        own = {**own, **{name: getattr(fn, name, None) for name in names}}
        if not all(isinstance(own[name], Tensor) for name in names):
            return None
    if "probs" in names and "logits" in names:
        given = "probs" if own.get("_param") is own["probs"] else "logits"
        names.remove("logits" if given == "probs" else "probs")
    others = {}
    for name, default in wanted.items():
        if name in constraints or name == "validate_args":
            continue
        if name in own:
            others[name] = own[name]
        elif default is inspect.Parameter.empty:
            return None
    required = {
        n for n, default in wanted.items() if default is inspect.Parameter.empty
    }
    if not required <= {*names, *others}:
        return None
    if any(isinstance(other, Tensor) for other in others.values()):
        return None

    def build(tensors: Sequence[Tensor]) -> Any:
        given = dict(zip(names, tensors, strict=True))
        return kind(**given, **others, validate_args=False)

    dims = [_event_dim(constraints[name], own[name], fn) for name in names]
    said = (kind, tuple(names), tuple((n, repr(v)) for n, v in others.items()))
    return Parts([own[name] for name in names], dims, build, said)


@cache
def _arguments(kind: Any) -> dict[str, Any]:
    found = inspect.signature(kind.__init__).parameters
    return {
        name: p.default
        for name, p in found.items()
        if name != "self" and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
    }


def _event_dim(constraint: Any, value: Tensor, fn: Any) -> int:
    return min(int(getattr(constraint, "event_dim", 0)), value.dim())


@parts.register(dist.Delta)
def _delta(fn: Any) -> Parts:
    depth = fn.event_dim
    return Parts(
        [fn.v, fn.log_density],
        [depth, 0],
        lambda tensors: dist.Delta(
            tensors[0], tensors[1], event_dim=depth, validate_args=False
        ),
        (dist.Delta, depth),
    )


@parts.register(torch.distributions.MultivariateNormal)
def _multivariate_normal(fn: Any) -> Parts:
    return Parts(
        [fn.loc, fn._unbroadcasted_scale_tril],
        [1, 2],
        lambda tensors: dist.MultivariateNormal(
            tensors[0], scale_tril=tensors[1], validate_args=False
        ),
        dist.MultivariateNormal,
    )


@parts.register(torch.distributions.LowRankMultivariateNormal)
def _low_rank(fn: Any) -> Parts:
    return Parts(
        [fn.loc, fn._unbroadcasted_cov_factor, fn._unbroadcasted_cov_diag],
        [1, 2, 1],
        lambda tensors: dist.LowRankMultivariateNormal(
            tensors[0], tensors[1], tensors[2], validate_args=False
        ),
        dist.LowRankMultivariateNormal,
    )


@parts.register(torch.distributions.Independent)
def _independent(fn: Any) -> Parts | None:
    base, count = parts(fn.base_dist), fn.reinterpreted_batch_ndims
    if base is None:
        return None
    total = len(fn.batch_shape) + count

    def build(tensors: Sequence[Tensor]) -> Any:
        made = base.build(tensors)
        if len(made.batch_shape) < count:
            made = made.expand(fn.base_dist.batch_shape)
        return made.to_event(count)

    dims = []
    for tensor, dim in zip(base.tensors, base.event_dims, strict=True):
        dims.append(dim + min(count, tensor.dim() - dim, total))
    return Parts(base.tensors, dims, build, ("independent", count, base.kind))


@parts.register(MaskedDistribution)
def _masked(fn: Any) -> Parts | None:
    base, mask = parts(fn.base_dist), fn._mask
    if base is None:
        return None
    if not isinstance(mask, Tensor):
        return Parts(
            base.tensors,
            base.event_dims,
            lambda given: base.build(given).mask(mask),
            ("masked", mask, base.kind),
        )
    return Parts(
        [*base.tensors, mask],
        [*base.event_dims, 0],
        lambda given: base.build(given[:-1]).mask(given[-1]),
        ("masked", base.kind),
    )


@parts.register(ExpandedDistribution)
def _expanded(fn: Any) -> Parts | None:
    base, shape = parts(fn.base_dist), fn.batch_shape
    if base is None:
        return None

    def build(tensors: Sequence[Tensor]) -> Any:
        made = base.build(tensors)
        return made.expand(Size(broadcast_shape(made.batch_shape, shape)))

    return Parts(base.tensors, base.event_dims, build, ("expanded", shape, base.kind))


@parts.register(torch.distributions.TransformedDistribution)
def _transformed(fn: Any) -> Parts | None:
    kind: Any = type(fn)
    if set(_arguments(kind)) - {"base_distribution", "transforms", "validate_args"}:
        return parts.dispatch(object)(fn)  # one with parameters of its own
    base = parts(fn.base_dist)
    if base is None:
        return None
    tensors, dims = list(base.tensors), list(base.event_dims)
    for transform in fn.transforms:
        if isinstance(transform, torch.distributions.AffineTransform):
            for tensor in (transform.loc, transform.scale):
                tensors.append(torch.as_tensor(tensor))
                dims.append(transform.event_dim)
        elif any(True for _ in tensors_in(transform)):
            return None

    def build(given: Sequence[Tensor]) -> Any:
        rest = list(given[len(base.tensors) :])
        transforms = []
        for transform in fn.transforms:
            if isinstance(transform, torch.distributions.AffineTransform):
                transforms.append(
                    torch.distributions.AffineTransform(
                        rest.pop(0), rest.pop(0), event_dim=transform.event_dim
                    )
                )
            else:
                transforms.append(transform)
        made = base.build(given[: len(base.tensors)])
        return dist.TransformedDistribution(made, transforms)

    kinds = tuple(type(transform) for transform in fn.transforms)
    return Parts(tensors, dims, build, ("transformed", kinds, base.kind))
