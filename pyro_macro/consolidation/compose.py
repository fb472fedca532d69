# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Composition of mechanisms: one after another is again a mechanism.

Section 4.1 and Appendix B of *Do Not Marginalize Mechanisms, Rather Consolidate!*: a
chain of mechanisms of one kind fuses to a single one of that kind.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_macro.program.shapes import broadcast_shapes

M = TypeVar("M")


@dataclass(frozen=True, eq=False)
class Affine:
    """``x`` becomes ``matrix @ x + offset``, plus Gaussian noise.

    :ivar matrix: shape ``(..., m, n)``.
    :ivar offset: shape ``(..., m)``.
    :ivar covariance: of the noise, shape ``(..., m, m)``.
    """

    matrix: Tensor
    offset: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class Table:
    """The state ``i`` becomes ``j`` with probability ``probs[..., i, j]``."""

    probs: Tensor


@dataclass(frozen=True, eq=False)
class Point:
    """A value that is set, whatever was before.

    :ivar value: shape ``(..., n)`` as input of :class:`Affine`, ``(...)`` and whole
        as that of :class:`Table`.
    """

    value: Tensor


@singledispatch
def compose(after: Any, before: Any) -> Any:
    """``after`` applied to what ``before`` makes.

    An open generic function: a new kind of mechanism registers how it is composed.
    It is associative, and whatever comes before a :class:`Point` is forgotten: the last
    intervention on a path wins.

    :raises NotImplementedError: for kinds that do not compose.

    >>> double = Affine(torch.tensor([[2.0]]), torch.zeros(1), torch.eye(1))
    >>> both = compose(double, double)
    >>> both.matrix, both.covariance
    (tensor([[4.]]), tensor([[5.]]))
    >>> compose(double, Point(torch.tensor([3.0]))).offset
    tensor([6.])
    """
    raise NotImplementedError(
        f"{type(after).__name__} after {type(before).__name__}: no such composition. "
        "Register one at pyro_macro.consolidation.compose.compose."
    )


@compose.register
def _after_affine(after: Affine, before: Any) -> Affine:
    a = after.matrix
    if isinstance(before, Affine):
        return Affine(
            a @ before.matrix,
            (a @ before.offset.unsqueeze(-1)).squeeze(-1) + after.offset,
            a @ before.covariance @ a.mT + after.covariance,
        )
    if isinstance(before, Point):
        moved = (a @ before.value.unsqueeze(-1)).squeeze(-1)
        return Affine(a[..., :0], moved + after.offset, after.covariance)
    return compose.dispatch(object)(after, before)


@compose.register
def _after_table(after: Table, before: Any) -> Table:
    if isinstance(before, Table):
        return Table(before.probs @ after.probs)
    if isinstance(before, Point):
        # One state, from which it goes on: (..., 1, n)
        index = before.value.long()
        whole = broadcast_shapes(index.shape, after.probs.shape[:-2])
        probs = after.probs.expand(whole + after.probs.shape[-2:])
        index = index.expand(whole)[..., None, None]
        return Table(probs.gather(-2, index.expand((*whole, 1, probs.shape[-1]))))
    return compose.dispatch(object)(after, before)


@compose.register
def _after_point(after: Point, before: Any) -> Point:
    return after


def _mapped(fn: Any, *mechanisms: M) -> M:
    kind: Any = type(mechanisms[0])
    return kind(
        *(
            fn(*parts)
            for parts in zip(*(vars(m).values() for m in mechanisms), strict=True)
        )
    )


def stacked(mechanisms: list[M]) -> M:
    """Mechanisms of one kind and shape as one, along a new first dimension."""
    return _mapped(
        lambda *parts: torch.stack(torch.broadcast_tensors(*parts)), *mechanisms
    )


def taken(links: M, index: Any) -> M:
    """Some of the mechanisms that are stacked along the first dimension."""
    return _mapped(lambda part: part[index], links)


def suffixes(links: Any) -> Any:
    """For each link of a chain, all from there to the end as one mechanism.

    An associative scan: a logarithmic number of compositions, each of all links.

    :param links: mechanisms, stacked along the first dimension in the order in which
        they act.
    """
    count = len(next(iter(vars(links).values())))
    step = 1
    while step < count:
        # Whoever reaches less than to the end goes on from where it ends
        reached = compose(taken(links, slice(step, None)), taken(links, slice(-step)))
        links = _mapped(
            lambda new, old, at=count - step: torch.cat([new, old[at:]]), reached, links
        )
        step *= 2
    return links


def product(links: Any) -> Any:
    """All links of a chain as one mechanism, in a logarithmic number of steps."""
    count = len(next(iter(vars(links).values())))
    while count > 1:
        even = count - count % 2
        pairs = compose(
            taken(links, slice(1, even, 2)), taken(links, slice(0, even, 2))
        )
        if count % 2:
            last = taken(links, slice(-1, None))
            pairs = _mapped(lambda new, old: torch.cat([new, old]), pairs, last)
        links, count = pairs, (count + 1) // 2
    return taken(links, 0)
