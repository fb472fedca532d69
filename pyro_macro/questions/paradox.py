# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Confounding that is there below and gone above (Theorem 3.2 of the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_macro.aggregation import Coarsen
from pyro_macro.errors import Infeasible
from pyro_macro.laws.finite.listed import ListedLaw
from pyro_macro.macro import MacroVariable
from pyro_macro.questions.tables import read_kernel, read_map
from pyro_macro.realizations import Explicit

DRAWS = 32  # of P(Z) and P(X | Z), of which the one with the largest gap is kept
EXACT = 1e-12  # what may be left of the confounding above
VISIBLE = 1e-6  # what must be there of it below


@dataclass(frozen=True, eq=False, repr=False)
class Paradox:
    """A model ``X -> Y, X <- Z -> Y`` whose confounding cancels in aggregates.

    A Pyro model with the sites ``"z"``, ``"x"`` and ``"y"``, as made by
    :func:`paradox`. Its numbers are in float64.

    :ivar p_z: ``P(Z)``, shape ``(|Z|,)``.
    :ivar p_x: ``P(X | Z)``, shape ``(|Z|, |X|)``.
    :ivar p_y: ``P(Y | X, Z)``, shape ``(|X|, |Z|, |Y|)``.
    :ivar p_do: ``Pdo(X | xb)``, shape ``(|Xb|, |X|)``, in the order of the labels.
    :ivar labels: the macro values of the cause, in increasing order, shape ``(|Xb|,)``.
    :ivar cause: the macro-variable ``Xb`` of ``"x"``.
    :ivar effect: the macro-variable ``Yb`` of ``"y"``.
    :ivar micro_gap: the largest total variation, over ``x``, between ``P(Yb | x)`` and
        ``P(Yb | do(x))``. That of ``Y`` itself is the same.
    :ivar macro_gap: the largest, over ``xb``, between ``P(Yb | xb)`` and
        ``P(Yb | do(xb))``: zero up to rounding.
    """

    p_z: Tensor
    p_x: Tensor
    p_y: Tensor
    p_do: Tensor
    labels: Tensor
    cause: MacroVariable
    effect: MacroVariable
    micro_gap: float
    macro_gap: float

    def __call__(self) -> Tensor:
        z = pyro.sample("z", dist.Categorical(self.p_z))
        x = pyro.sample("x", dist.Categorical(self.p_x[z.long()]))
        return pyro.sample("y", dist.Categorical(self.p_y[x.long(), z.long()]))

    def __repr__(self) -> str:
        n_x, n_z, n_y = self.p_y.shape
        n_yb = len(
            set(
                self.effect.aggregation(
                    torch.arange(n_y, device="cpu")[:, None]
                ).tolist()
            )
        )
        return (
            f"Paradox(<|X| = {n_x}, |Y| = {n_y}, |Z| = {n_z}, |Xb| = "
            f"{len(self.labels)}, |Yb| = {n_yb}: confounded by {self.micro_gap:.2f} in "
            f"total variation below, {self.macro_gap:.0e} above>)"
        )

    def realization(self, value: float | Tensor) -> Explicit:
        """``do(xb := value)``, with the promised ``Pdo`` for micro-realization.

        :param value: a macro value of the cause, or a tensor that broadcasts against
            the plates of the run.
        :raises Infeasible: in the run, if no micro value has the macro value.
        """
        return Explicit(value, self._law)

    def _law(self, value: Tensor) -> ListedLaw:
        same = value.unsqueeze(-1) == self.labels.to(value)  # (..., |Xb|)
        if not bool(same.any(-1).all()):
            odd = value[~same.any(-1)].flatten()[0].item()
            raise Infeasible(
                f"macro-variable {self.cause.name!r}: no value of site 'x' has the "
                f"macro value {odd}. Expected one of {self.labels.tolist()}."
            )
        rows = self.p_do.to(value.device)[same.byte().argmax(-1)]
        states = torch.arange(rows.shape[-1]).to(rows).unsqueeze(-1)
        return ListedLaw(states, rows, value.dtype)


def paradox(
    cause_map: Sequence[float] | Mapping[int, float] | Tensor,
    effect_map: Sequence[float] | Mapping[int, float] | Tensor,
    realizations: Mapping[float, Any] | Sequence[Any] | Tensor,
    *,
    num_confounder_values: int | None = None,
    seed: int = 0,
) -> Paradox:
    """A model that is confounded below and, for given interventions, not above.

    Theorem 3.2: whatever the maps ``X -> Xb``, ``Y -> Yb`` and the micro-realizations
    ``Pdo(X | xb)``, there is a law of ``(X, Y, Z)`` with ``P(Y | x) != P(Y | do(x))``
    and ``P(Yb | x) != P(Yb | do(x))`` for some ``x``, and nevertheless
    ``P(Yb | xb) = P(Yb | do(xb))`` for all ``xb``. ``P(Z)`` and ``P(X | Z)`` are drawn
    at random, ``P(Y | X, Z)`` is made by ``cancelling_kernel``, and of several
    such models that with the largest gap below is returned, after a check.

    :param cause_map: the macro value of each value ``0, 1, ...`` of ``X``.
    :param effect_map: the macro value of each value ``0, 1, ...`` of ``Y``.
    :param realizations: from each macro value of ``X`` to probabilities of the values
        of ``X``, shape ``(|X|,)``, that are zero off its fibre. Or a matrix of shape
        ``(|Xb|, |X|)`` with a row for each macro value in increasing order.
    :param num_confounder_values: ``|Z|``; by default ``|Yb| + 1``, the smallest that
        the theorem allows.
    :param seed: of the draws. The random state of the program is left alone.
    :raises NotAMicroState: if a map is injective (Definition 2).
    :raises OffFibre: if a realization has probability off its fibre.
    :raises Infeasible: unless ``2 <= |Yb| < min(|X|, |Z|)``.

    >>> import pyro_macro as pm
    >>> model = paradox([0, 0, 1, 1], [0, 0, 1, 1], [[1, 0, 0, 0], [0, 0, 0.5, 0.5]])
    >>> model.micro_gap > 0.1, model.macro_gap < 1e-12
    (True, True)
    >>> set_to_one = pm.macro_do(model, {model.cause: model.realization(1.0)})
    >>> pyro.poutine.trace(set_to_one).get_trace().nodes["x"]["value"].item() in (2, 3)
    True
    """
    labels, fibre = read_map("paradox: cause_map", cause_map)
    effects, effect = read_map("paradox: effect_map", effect_map)
    n_x, n_xb, n_yb = len(fibre), len(labels), len(effects)
    n_z = n_yb + 1 if num_confounder_values is None else num_confounder_values
    if not 2 <= n_yb < min(n_x, n_z):
        raise Infeasible(
            f"paradox: the effect has |Yb| = {n_yb} macro value(s), the cause |X| = "
            f"{n_x} values, the confounder |Z| = {n_z}. Expected 2 <= |Yb| < "
            "min(|X|, |Z|), as in Theorem 3.2: change effect_map, or give another "
            "num_confounder_values."
        )
    p_do = read_kernel("paradox: realizations", realizations, labels, fibre)
    own = p_do[fibre, torch.arange(n_x, device="cpu")]  # (|X|,): each x is in one fibre
    cause_variable, effect_variable = (
        MacroVariable(name, micro=site, aggregation=Coarsen(values))
        for name, site, values in [
            ("cause", "x", labels[fibre]),
            ("effect", "y", effects[effect]),
        ]
    )
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        """Random probability vectors, inside the simplex."""
        weights = torch.empty(shape, dtype=torch.float64, device="cpu")
        weights.exponential_(generator=generator)
        return 0.98 * weights / weights.sum(-1, keepdim=True) + 0.02 / shape[-1]

    best = None
    for _ in range(DRAWS):
        p_z, p_x, start = draw(n_z), draw(n_z, n_x), draw(n_x, n_z, n_yb)
        joint = (p_z.unsqueeze(-1) * p_x).mT  # P(x, z), shape (|X|, |Z|)
        p_z_given_x = joint / joint.sum(-1, keepdim=True)
        total = joint.new_zeros(n_xb).index_add(0, fibre, joint.sum(-1))
        natural = joint.sum(-1) / total[fibre]  # P(x | xb)
        u = p_z_given_x - p_z
        v = p_z_given_x * natural.unsqueeze(-1) - p_z * own.unsqueeze(-1)
        p_y = (cancelling_kernel(v, u, fibre, start) / effect.bincount())[..., effect]
        # What is there, from the tables themselves
        p_yb = torch.zeros_like(start).index_add(-1, effect, p_y)
        micro = torch.einsum("xz,xzk->xk", u, p_yb)
        macro = torch.einsum("xz,xzk->xk", v, p_yb)
        macro = macro.new_zeros(n_xb, n_yb).index_add(0, fibre, macro)
        gaps = [gap.abs().sum(-1).max().item() / 2 for gap in (micro, macro)]
        is_natural = bool(((natural - own).abs() < VISIBLE).all())
        if gaps[1] > EXACT or gaps[0] < VISIBLE or is_natural:
            continue
        if best is None or gaps[0] > best.micro_gap:
            variables = cause_variable, effect_variable
            best = Paradox(p_z, p_x, p_y, p_do, labels, *variables, *gaps)
    if best is None:
        raise Infeasible(
            f"paradox: none of {DRAWS} draws of P(Z) and P(X | Z) gave confounding of "
            f"more than {VISIBLE:g} below and less than {EXACT:g} above. Give another "
            "seed, or a smaller num_confounder_values."
        )
    return best


def cancelling_kernel(v: Tensor, u: Tensor, fibre: Tensor, start: Tensor) -> Tensor:
    """``P(Yb | X, Z)`` that maps ``v`` to zero and ``u`` not (Lemma 5).

    :param v: what has to cancel, shape ``(|X|, |Z|)``: ``sum_xz P(yb | x, z) v_xz``
        becomes zero in each fibre of ``X`` (not at each ``x``, as printed).
    :param u: what must not, shape ``(|X|, |Z|)``: ``sum_z P(yb | x, z) u_xz`` differs
        from zero at each ``x`` where ``u_x`` is no multiple of ``v_x``.
    :param fibre: which fibre ``0, 1, ...`` each ``x`` is in, shape ``(|X|,)``. In each
        the sum of ``v`` is zero.
    :param start: probability vectors, shape ``(|X|, |Z|, |Yb|)``, all positive.
    :returns: probability vectors of the same shape.
    """
    size, n_yb = int(fibre.max()) + 1, start.shape[-1]
    # Cells with v > 0 keep their vector, those with v < 0 get the mean of these. Cells
    # with v = 0 are free: it is the step along `d` that makes them matter for u.
    positive = v.clamp(min=0)
    total = v.new_zeros(size).index_add(0, fibre, positive.sum(-1))  # S
    weighted = torch.einsum("xz,xzk->xk", positive, start)
    mean = v.new_zeros(size, n_yb).index_add(0, fibre, weighted) / total.unsqueeze(-1)
    mean = torch.where(total.unsqueeze(-1) > 0, mean, 1 / n_yb)
    kernel = torch.where((v < 0).unsqueeze(-1), mean[fibre].unsqueeze(1), start)
    # Row by row as far along d as the vectors stay positive: d is the part of u that
    # is orthogonal to v; half of the macro values gain what the other half lose.
    square = v.square().sum(-1, keepdim=True)
    d = u
    for _ in range(2):  # once more, for what rounding has left
        d = d - v * (d * v).sum(-1, keepdim=True) / square.clamp(min=1e-300)
    sides = v.new_zeros(n_yb)
    sides[: n_yb // 2], sides[n_yb - n_yb // 2 :] = 1.0, -1.0
    already = torch.einsum("xz,xzk,k->x", u, kernel, sides)
    d = torch.where(already < 0, -1.0, 1.0).unsqueeze(-1) * d
    step = d.unsqueeze(-1) * sides
    room = torch.where(step < 0, kernel / step.abs(), torch.inf).amin((-1, -2))
    # Where u is a multiple of v, as in a fibre of one x, d is nothing but rounding
    free = d.norm(dim=-1) > 1e-8 * u.norm(dim=-1)
    return kernel + torch.where(free, 0.9 * room, 0.0)[:, None, None] * step
