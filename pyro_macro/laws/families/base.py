# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, singledispatch
from typing import Any, ClassVar

import torch
from torch import Size, Tensor
from torch.distributions import constraints

from pyro_macro.errors import Infeasible
from pyro_macro.laws.base import ENUMERABLE, EnumerableLaw, MicroFibre, MicroLaw
from pyro_macro.laws.finite.sums import states_on
from pyro_macro.program.shapes import broadcast_shapes


@dataclass(frozen=True, eq=False)
class Member:
    """A site's place in a family of laws whose sums stay in the family.

    :ivar law: the law of the sites given their sum.
    :ivar size: the parameter that adds up.
    :ivar common: the parameter that all sites must share, on a scale where it can be
        compared; ``None`` where there is none. That of ``scale * X`` is
        ``common / scale``.
    """

    law: type[GivenSum]
    size: Tensor
    common: Tensor | None = None


@singledispatch
def member(fn: Any) -> Member | None:
    """The family of a distribution, ``None`` if it is in none.

    An open function: a new family registers its distributions here.
    """
    return None


class GivenSum(MicroLaw):
    """Independent members of a family, given their sum.

    :param size: the parameters that add up, shape ``batch + (K,)``.
    :param common: the parameter that all share, shape ``batch``, or ``None``.
    :param scale: what each element is multiplied with in the sum: shape ``(K,)``.
    :param value: the sum, shape ``batch``.
    :cvar name: of the family, and of the law given the sum.
    :cvar is_count: whether the elements are counts; their scales are then all equal.
    """

    name: ClassVar[str]
    is_count: ClassVar[bool]

    def __init__(
        self, size: Tensor, common: Tensor | None, scale: Tensor, value: Tensor
    ) -> None:
        self.size, self.common, self.scale = size, common, scale
        # What the scaled elements add up to; of counts, the elements themselves
        self.sum = value / scale[0] if self.is_count else value
        self.value = value
        self.dtype = value.dtype
        shape = broadcast_shapes(size.shape[:-1], value.shape)
        super().__init__(shape, size.shape[-1:])

    @property
    def method(self) -> str:  # type: ignore[override]
        return f"exact: {self.name}"

    def refuse(self, what: str) -> None:
        """An error if the sum cannot be reached."""
        possible = self.sum >= 0
        if self.is_count:
            whole = (self.sum - self.sum.round()).abs() < 1e-6 * (1 + self.sum.abs())
            possible = possible & whole & (self.sum.round() <= self._most)
        else:
            possible = self.sum > 0
        if not bool(possible.all()):
            value = self.value.expand(possible.shape)[~possible].flatten()[0].item()
            raise Infeasible(
                f"{what}: the macro value {value:g} cannot be reached. Expected "
                f"{self._expected()}. Choose a value that the sites can add up to."
            )
        if self.is_count:
            self.sum = self.sum.round()

    def _expected(self) -> str:
        if not self.is_count:
            return "a positive number, since all elements are positive"
        step = self.scale[0].item()
        most = self._most.max().item() * step
        unit = "a whole number" if step == 1 else f"a multiple of {step:g}"
        return f"{unit} from 0" + ("" if most == float("inf") else f" to {most:g}")

    @property
    def _most(self) -> Tensor:
        return torch.full_like(self.sum, float("inf"))

    def density(self, size: Tensor, x: Tensor) -> Tensor:
        """The log density of a sum ``x``, but for factors that all states share."""
        raise NotImplementedError

    def shared(self) -> Tensor:
        """What :meth:`density` leaves out, for the sum itself."""
        raise NotImplementedError

    @property
    def log_total(self) -> Tensor:
        return self.density(self.size.sum(-1), self.sum) + self.shared()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        x = value.to(self.size.dtype)
        x = x if self.is_count else x * self.scale
        parts = self.density(self.size, x).sum(-1) + self._change
        result = parts - self.density(self.size.sum(-1), self.sum)
        shape = broadcast_shapes(result.shape, self.batch_shape)
        return result.to(value.dtype).expand(shape)

    @property
    def _change(self) -> Tensor:
        """From scaled elements without the last to the elements themselves."""
        zero = self.scale.new_zeros(())
        return zero if self.is_count else self.scale[:-1].abs().log().sum()

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        share = self.size / self.size.sum(-1, keepdim=True)
        unit = 1.0 if self.is_count else self.scale
        mean = share * self.sum.unsqueeze(-1) / unit
        return mean.to(self.dtype).expand(self.batch_shape + self.event_shape)

    def _inside(self, value: Tensor) -> Tensor:
        whole = value == value.round() if self.is_count else value.isfinite()
        return (value >= 0) & whole

    def _total(self, value: Tensor) -> Tensor:
        return value @ self.scale.to(value)

    @constraints.dependent_property(event_dim=1)
    def support(self) -> MicroFibre:  # type: ignore[override]
        return MicroFibre(
            self._inside,
            self._total,
            self.value,
            "a micro state of counts has no continuous coordinates",
            is_discrete=self.is_count,
        )


class CountsGivenSum(EnumerableLaw, GivenSum):
    """The same for counts: drawn by halving the total again and again."""

    is_count = True

    def half(self, total: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """A draw of what the left of two groups has of their total."""
        raise NotImplementedError

    def sample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        with torch.no_grad():
            count = self.event_shape[0]
            missing = (1 << (count - 1).bit_length()) - count
            sizes = [torch.nn.functional.pad(self.size, (0, missing))]
            while sizes[-1].shape[-1] > 1:
                sizes.append(sizes[-1].unflatten(-1, (-1, 2)).sum(-1))
            now = self.sum.to(self.size.dtype).expand(shape).unsqueeze(-1)
            for level in reversed(sizes[:-1]):
                left, right = level.unflatten(-1, (-1, 2)).unbind(-1)
                mine = self.half(now, left.expand(now.shape), right.expand(now.shape))
                now = torch.stack([mine, now - mine], -1).flatten(-2)
            return now[..., :count].to(self.dtype)

    @property
    def _limits(self) -> Tensor:
        """The largest value of each element, shape ``(K,)``."""
        return self.sum.max().expand(self.event_shape)

    @cached_property
    def _states(self) -> Tensor | None:  # type: ignore[override]
        """All micro states on the fibre; ``None`` if there are too many."""
        total = int(self.sum.flatten()[0])
        if bool((self.sum != total).any()) or self.event_shape[0] > 64 or total > 1e4:
            return None
        sums = torch.arange(total + 1, device=self.sum.device)
        codes = sums.expand(self.event_shape[0], -1)
        codes = torch.where(codes <= self._limits.unsqueeze(-1), codes, -1)
        allowed = sums == total
        return states_on(codes.to(torch.long), allowed, ENUMERABLE)


def of_one_family(
    parts: Sequence[Member | None], scale: Tensor
) -> type[GivenSum] | None:
    """The law that sites have given their weighted sum, ``None`` if it is not known.

    :param parts: the family of each site.
    :param scale: the weight of each element in the sum.
    """
    first = parts[0]
    if first is None or any(p is None or p.law is not first.law for p in parts):
        return None
    if first.law.is_count:
        return first.law if bool((scale == scale[0]).all() & (scale[0] != 0)) else None
    return first.law if bool((scale > 0).all()) else None
