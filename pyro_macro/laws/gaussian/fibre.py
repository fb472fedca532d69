# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Fibres of linear maps, and normal laws on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import biject_to, constraints, transform_to
from torch.distributions.transforms import Transform

from pyro_macro.laws.base import MicroLaw, tolerance
from pyro_macro.laws.gaussian.covariance import (
    Covariance,
    Dense,
    add_product,
    log_normal,
    matvec,
    may_overwrite,
)
from pyro_macro.program.noise import NoiseForm, noise_form
from pyro_macro.program.shapes import broadcast_shapes


class Fibre(constraints.Constraint):
    """The micro states with a given macro value: ``{x : rows @ x == value}``.

    Its bijection solves for ``m`` *pivot* elements and leaves the other ``K - m`` free
    and unbounded.

    :param rows: shape ``(m, K)``.
    :param value: shape ``batch + (m,)``.
    :param pivots: the indices of the elements that are solved for, shape ``(m,)``.
    :param law: a distribution on the fibre. The free coordinates are then relative to
        its mean, in its standard deviations: samplers and guides start in the right
        place, on the right scale.
    """

    event_dim = 1
    is_discrete = False

    def __init__(
        self, rows: Tensor, value: Tensor, pivots: Tensor, law: Any = None
    ) -> None:
        self.rows, self.value, self.pivots, self.law = rows, value, pivots, law

    def check(self, value: Tensor) -> Tensor:
        miss = (value @ self.rows.mT - self.value).abs()
        size = value.abs() @ self.rows.abs().mT + self.value.abs()
        return (miss <= tolerance(value) * size).all(-1)

    def __repr__(self) -> str:
        return f"Fibre(K={self.rows.shape[1]}, m={self.rows.shape[0]})"


class FibreTransform(Transform):
    """From free coordinates to the whole micro state on a fibre.

    Free elements keep their order, the pivots are solved for.
    """

    domain = constraints.real_vector
    codomain: constraints.Constraint = constraints.real_vector
    bijective = True

    def __init__(self, fibre: Fibre) -> None:
        super().__init__()
        self.fibre = fibre
        self.codomain = fibre
        rows, pivots = fibre.rows, fibre.pivots
        keep = torch.ones(rows.shape[1], dtype=torch.bool, device=rows.device)
        keep[pivots] = False
        self._free = keep.nonzero().squeeze(-1)
        self._order = torch.cat([self._free, pivots]).argsort()
        self._others = rows[:, self._free]
        self._solve = torch.linalg.inv(rows[:, pivots])
        self._centre: Any = None
        self._spread: Any = None
        if fibre.law is not None:
            self._centre = fibre.law.mean.detach()[..., self._free]
            spread = fibre.law.variance.detach()[..., self._free].sqrt()
            self._spread = torch.where(spread > 0, spread, torch.ones_like(spread))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FibreTransform) and other.fibre is self.fibre

    def _call(self, x: Tensor) -> Tensor:
        if self._spread is not None:
            x = self._centre + self._spread * x
        solved = (self.fibre.value - x @ self._others.mT) @ self._solve.mT
        batch = broadcast_shapes(x.shape[:-1], solved.shape[:-1])
        parts = [part.expand(batch + part.shape[-1:]) for part in (x, solved)]
        return torch.cat(parts, -1)[..., self._order]

    def _inverse(self, y: Tensor) -> Tensor:
        free = y[..., self._free]
        return free if self._spread is None else (free - self._centre) / self._spread

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._spread is None:
            return torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
        shape = broadcast_shapes(x.shape, self._spread.shape)
        return self._spread.expand(shape).log().sum(-1)

    def forward_shape(self, shape: Size) -> Size:
        return Size(shape[:-1]) + Size([shape[-1] + self.fibre.rows.shape[0]])

    def inverse_shape(self, shape: Size) -> Size:
        return Size(shape[:-1]) + Size([shape[-1] - self.fibre.rows.shape[0]])


@biject_to.register(Fibre)
@transform_to.register(Fibre)
def _fibre_bijection(constraint: Fibre) -> FibreTransform:
    return FibreTransform(constraint)


def choose_pivots(rows: Tensor) -> Tensor:
    """The last elements that can be solved for, shape ``(m,)``, ascending."""
    m = rows.shape[0]
    if m == 1:
        return rows[0].nonzero().max().reshape(1)
    # Gauss elimination from the right: the first m independent columns of the
    # reversed matrix are those at which its rank grows.
    reversed_rows = rows.flip(-1)
    ranks = torch.stack(
        [torch.linalg.matrix_rank(reversed_rows[:, : k + 1]) for k in range(m)]
    )
    if int(ranks[-1]) == m:
        return torch.arange(rows.shape[1] - m, rows.shape[1], device=rows.device)
    chosen: list[int] = []
    for k in range(rows.shape[1]):
        trial = chosen + [k]
        if int(torch.linalg.matrix_rank(reversed_rows[:, trial])) == len(trial):
            chosen = trial
        if len(chosen) == m:
            break
    return torch.tensor(
        sorted(rows.shape[1] - 1 - k for k in chosen), device=rows.device
    )


class FibreDistribution(MicroLaw):
    """A normal law moved onto a fibre: the base of those below.

    ``X ~ N(loc, covariance)`` is what the micro state would be, ``rows @ x = value``
    is what it has to meet. The log density is with respect to the elements that remain
    when the pivots (the last ones, where their weights allow) are solved for.

    :param loc: shape ``batch + (K,)``.
    :param covariance: the covariance of ``X``.
    :param rows: shape ``(m, K)``.
    :param value: shape ``batch + (m,)``.
    """

    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        covariance: Covariance,
        rows: Tensor,
        value: Tensor,
        pivots: Tensor | None = None,
    ) -> None:
        self.loc, self.covariance = loc, covariance
        self.rows, self.value = rows, value
        self.pivots = choose_pivots(rows) if pivots is None else pivots
        batch_shape = broadcast_shapes(loc.shape[:-1], value.shape[:-1])
        self._finer: FibreDistribution | None = None  # in a finer dtype
        super().__init__(batch_shape, loc.shape[-1:])

    def to(self, dtype: torch.dtype) -> FibreDistribution:
        """The same with draws in ``dtype``; its densities are computed as before."""
        if dtype == self.loc.dtype:
            return self
        new = self.expand(self.batch_shape)
        for name, part in vars(self).items():
            floating = isinstance(part, Tensor) and part.is_floating_point()
            if floating or isinstance(part, Covariance):
                setattr(new, name, part.to(dtype))
        new._finer = self
        return new

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> Fibre:  # type: ignore[override]
        return self.fibre_around(self)

    def fibre_around(self, law: Any) -> Fibre:
        """The fibre, with coordinates that start where ``law`` lies."""
        return Fibre(self.rows, self.value, self.pivots, law=law)

    @property
    def cost(self) -> str:
        return f"{self.covariance.noise_size} random numbers a draw"

    def rsample(self, sample_shape: Any = Size()) -> Tensor:
        shape = Size(sample_shape) + self.batch_shape
        draw = self.covariance.sample(shape, self.loc)
        own = may_overwrite(draw, self.loc)
        return self._onto(draw.add_(self.loc) if own else draw + self.loc, own)

    def _onto(self, x: Tensor, own: bool = False) -> Tensor:
        """The affine map that takes a draw of ``X`` to the fibre.

        :param own: whether ``x`` may be overwritten.
        """
        raise NotImplementedError

    def _miss(self, x: Tensor) -> Tensor:
        return self.value - x @ self.rows.mT

    @property
    def _exact(self) -> FibreDistribution:
        return self if self._finer is None else self._finer

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        exact = self._exact
        result = exact._log_density(value.to(exact.loc.dtype)).to(value.dtype)
        return result.expand(broadcast_shapes(result.shape, self.batch_shape))

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self._shaped(self._exact._onto(self._exact.loc))

    @property
    def variance(self) -> Tensor:  # type: ignore[override]
        return self._shaped(self._exact._variance().clamp(min=0))

    @property
    def covariance_matrix(self) -> Tensor:
        """The covariance, singular across the fibre, shape ``(..., K, K)``."""
        return self._exact._covariance().to(self.loc.dtype)

    def _shaped(self, moment: Tensor) -> Tensor:
        moment = moment.to(self.loc.dtype)
        return moment.expand(self.batch_shape + self.event_shape)

    def _log_density(self, value: Tensor) -> Tensor:
        raise NotImplementedError

    def _variance(self) -> Tensor:
        raise NotImplementedError

    def _covariance(self) -> Tensor:
        raise NotImplementedError


@noise_form.register(FibreDistribution)
def _fibre_noise(fn: FibreDistribution) -> NoiseForm | None:
    """So that a program under one macro intervention can be read for the next."""

    if fn.covariance.shards is not None:
        return None  # one rank alone cannot take derivatives of the total

    def affine(noise: Tensor | None) -> Tensor:
        assert noise is not None
        return fn._onto(fn.loc + fn.covariance.colour(noise), own=True)

    shape = fn.batch_shape + Size([fn.covariance.noise_size])
    return NoiseForm(affine, like=fn.loc, shape=shape)


class NaturalNormal(FibreDistribution):
    """``P(X | rows @ X = value)``: the natural micro-realization of a Gaussian.

    Theorem 3.1 and Definition 8 of the paper: mean ``loc + G (value - rows loc)``
    with the natural direction ``G = C rows' (rows C rows')^-1``, covariance
    ``C - G rows C``. A draw is ``x + G (value - rows x)`` for ``x ~ N(loc, C)``.

    >>> from pyro_macro.laws.gaussian.covariance import Diagonal
    >>> law = NaturalNormal(
    ...     torch.tensor([10.0, 20.0]), Diagonal(torch.tensor([4.0, 1.0])),
    ...     torch.ones(1, 2), torch.tensor([33.0]))
    >>> law.mean
    tensor([12.4000, 20.6000])
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        crossed = self.covariance.matmul(self.rows.mT)  # Cov(X, rows X): (..., K, m)
        total = self.covariance.across(self.rows @ crossed)
        self.total = Dense(torch.linalg.cholesky(total))
        self.gain = self.total.solve(crossed.mT).mT  # (..., K, m)

    def _onto(self, x: Tensor, own: bool = False) -> Tensor:
        # Twice: the second step takes back the rounding of the first
        for _ in range(2):
            x = add_product(x, self.gain, self._miss(x), own)
        return x

    def _log_density(self, value: Tensor) -> Tensor:
        inside = log_normal(self.covariance, value - self.loc)
        total = log_normal(self.total, self._miss(self.loc))
        return inside - total - self._log_solved()

    def _log_solved(self) -> Tensor:
        """The log determinant of the weights of the pivots."""
        return torch.linalg.det(self.rows[:, self.pivots]).abs().log()

    @property
    def log_total(self) -> Tensor:
        exact: Any = self._exact
        total = log_normal(exact.total, exact._miss(exact.loc))
        return total.expand(broadcast_shapes(total.shape, self.batch_shape))

    def _variance(self) -> Tensor:
        explained = (self.gain @ self.total.cholesky).square().sum(-1)
        return self.covariance.diagonal() - explained

    def _covariance(self) -> Tensor:
        explained = self.gain @ self.total.cholesky
        return self.covariance.dense(self.loc) - explained @ explained.mT


class ResidualNormal(FibreDistribution):
    """All elements but the ``absorb`` ones follow ``N(loc, C)``; those take the rest.

    Equation (3) of the paper.

    :param absorb: the indices of the elements that take up the rest, shape ``(m,)``.
    """

    def __init__(self, *args: Any, absorb: Tensor, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.absorb = absorb
        columns = torch.zeros_like(self.rows.mT)  # (K, m)
        columns[absorb, torch.arange(len(absorb), device=absorb.device)] = 1.0
        self._precision = self.covariance.solve(columns)  # columns of C^-1: (..., K, m)
        # The covariance of the absorbing elements given all others
        self._remaining = torch.linalg.inv(self._precision[..., absorb, :])
        self._taken = torch.linalg.inv(self.rows[:, absorb])  # (m, m)
        self._columns = columns

    def _put(self, x: Tensor, part: Tensor) -> Tensor:
        return x + part @ self._columns.mT

    def _onto(self, x: Tensor, own: bool = False) -> Tensor:
        for _ in range(2):
            x = add_product(x, self._columns, self._miss(x) @ self._taken.mT, own)
        return x

    def _log_density(self, value: Tensor) -> Tensor:
        # With the absorbing elements at their conditional mean, the joint density is
        # that of the others times that of a centred normal at its mode.
        centred = value - self.loc
        centred = self._put(centred, -centred[..., self.absorb])
        pull = matvec(self._precision.mT, centred)  # (..., m)
        at_mode = -matvec(self._remaining, pull)
        centred = self._put(centred, at_mode)
        joint = log_normal(self.covariance, centred)
        mode = log_normal(
            Dense(torch.linalg.cholesky(self._remaining)), torch.zeros_like(pull)
        )
        # From the coordinates without `absorb` to those without the pivots
        change = (
            torch.linalg.det(self.rows[:, self.absorb]).abs().log()
            - torch.linalg.det(self.rows[:, self.pivots]).abs().log()
        )
        return joint - mode + change

    def _variance(self) -> Tensor:
        # An absorbing element is minus the weighted sum of the others
        others = self.rows.clone()
        others[:, self.absorb] = 0.0
        taken = self._taken @ others  # (m, K)
        rest = (self.covariance.matmul(taken.mT) * taken.mT).sum(-2)  # (..., m)
        kept = self.covariance.diagonal() * (1 - self._columns.sum(-1))
        return kept + rest @ self._columns.mT

    def _covariance(self) -> Tensor:
        size = self.rows.shape[1]
        identity = torch.eye(size, dtype=self.loc.dtype, device=self.loc.device)
        linear = identity - self._columns @ (self._taken @ self.rows)
        return linear @ self.covariance.dense(self.loc) @ linear.mT
