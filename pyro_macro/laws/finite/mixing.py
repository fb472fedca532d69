# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Mixtures of given distributions that are a wanted one: linear programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

# Below the tolerance of the solver, a gap is no gap; then the mixture is polished
SOLVER = 1e-7

_zeros = partial(torch.zeros, dtype=torch.float64, device="cpu")
_ones = partial(torch.ones, dtype=torch.float64, device="cpu")
_eye = partial(torch.eye, dtype=torch.float64, device="cpu")


@dataclass(frozen=True, eq=False)
class Mixing:
    """What a linear program found.

    :ivar weights: of the closest mixture, shape ``(S,)``.
    :ivar gap: its total variation distance from the wanted distribution; zero where
        there is an exact mixture.
    :ivar certificate: where there is none, a function of the outcome, ``(Y,)``, whose
        mean under the wanted distribution exceeds that under each of the given ones.
    """

    weights: Tensor
    gap: float
    certificate: Tensor | None


def closest_mixture(given: Tensor, wanted: Tensor, start: Tensor) -> Mixing:
    """Weights of given distributions under which their mixture is a wanted one.

    Among all such weights, those closest to ``start`` in total variation.

    :param given: shape ``(S, Y)``.
    :param wanted: shape ``(Y,)``.
    :param start: shape ``(S,)``.
    :raises ImportError: if scipy is missing (``pip install pyro_macro[lp]``).
    """
    s, y = given.shape
    # minimize the sum of u + v, with given' w + u - v = wanted
    costs = torch.cat([_zeros(s), _ones(2 * y)])
    rows = torch.cat([given.mT, _eye(y), -_eye(y)], -1)
    ones = torch.cat([_ones(1, s), _zeros(1, 2 * y)], -1)
    found = _solve(costs, torch.cat([rows, ones]), torch.cat([wanted, _ones(1)]))
    gap = float(found.fun) / 2
    weights = torch.as_tensor(found.x[:s], device="cpu")
    if gap > SOLVER:
        dual = torch.as_tensor(found.eqlin.marginals[:y], device="cpu")
        margin = wanted @ dual - (given @ dual).max()
        return Mixing(weights, gap, dual if float(margin) > 0 else None)
    # minimize the sum of u + v, with w + u - v = start and given' w = wanted
    costs = torch.cat([_zeros(s), _ones(2 * s)])
    rows = torch.cat([_eye(s), _eye(s), -_eye(s)], -1)
    outcomes = torch.cat([given.mT, _zeros(y, 2 * s)], -1)
    found = _solve(costs, torch.cat([rows, outcomes]), torch.cat([start, wanted]))
    if found.x is not None:
        weights = torch.as_tensor(found.x[:s], device="cpu")
    return Mixing(_polished(weights, given, wanted), 0.0, None)


def _polished(weights: Tensor, given: Tensor, wanted: Tensor) -> Tensor:
    """The same weights to machine precision: linear programs stop earlier."""
    weights = weights.clamp(min=0)
    used = weights > SOLVER
    rows = torch.cat([given[used].mT, _ones(1, int(used.sum()))])
    target = torch.cat([wanted, _ones(1)])
    miss = target - rows @ weights[used]
    step = torch.linalg.pinv(rows) @ miss
    better = torch.zeros_like(weights)
    better[used] = (weights[used] + step).clamp(min=0)
    old = (given.mT @ weights - wanted).abs().max()
    new = (given.mT @ better - wanted).abs().max()
    return better if new < old else weights


def _solve(costs: Tensor, rows: Tensor, values: Tensor) -> Any:
    try:
        from scipy.optimize import linprog
    except ImportError as error:
        raise ImportError(
            "inhibiting realizations of finite programs are found by linear programs, "
            "which need scipy: pip install 'pyro_macro[lp]'."
        ) from error
    arrays = (t.double().numpy() for t in (costs, rows, values))
    c, a, b = arrays
    return linprog(c, A_eq=a, b_eq=b, bounds=(0, None), method="highs")
