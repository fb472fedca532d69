# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Affine-Gaussian mechanisms: their coefficients, found from derivatives."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyro_macro.consolidation.frame import Frame
from pyro_macro.program.inner import Site, unwrapped
from pyro_macro.program.mechanisms import Mechanism
from pyro_macro.program.side_by_side import SideBySide, Values
from pyro_macro.program.tape import SITE, Leaf

_GAUSSIAN = (
    torch.distributions.Normal,
    torch.distributions.MultivariateNormal,
    torch.distributions.LowRankMultivariateNormal,
)


def is_gaussian(mechanism: Mechanism) -> bool:
    """Whether a mechanism is a Gaussian, or deterministic."""
    site = mechanism.site
    if site.deterministic:
        return site.value.is_floating_point()
    return isinstance(unwrapped(site.fn), _GAUSSIAN)


@dataclass(frozen=True, eq=False)
class AffineSite:
    """A site as an affine function of its parents, plus Gaussian noise.

    :ivar coefficients: for each parent, shape ``(..., n, n of the parent)``.
    :ivar offset: shape ``(..., n)``.
    :ivar covariance: of the noise, ``(..., n, n)``.
    """

    coefficients: dict[str, Tensor]
    offset: Tensor
    covariance: Tensor


class AffineGroup:
    """Sites whose mechanisms compute the same, and which parents they are affine in.

    :param mechanisms: the sites.
    :param linear: for each leaf of their expressions whether it counts as linear.
    """

    def __init__(
        self,
        mechanisms: Sequence[Mechanism],
        linear: tuple[bool, ...],
        sites: Mapping[str, Site],
    ) -> None:
        self.mechanisms, self.linear, self.sites = mechanisms, linear, sites
        self.group = SideBySide({m.name: m.expression for m in mechanisms})
        self.slots = [i for i, is_linear in enumerate(linear) if is_linear]
        self.kind = unwrapped(mechanisms[0].site.fn)
        self.deterministic = mechanisms[0].site.deterministic

    @property
    def names(self) -> list[str]:
        return self.group.names

    @property
    def is_static(self) -> bool:
        """Whether all parents are linear: the coefficients are numbers."""
        return all(self.linear)

    def at(
        self,
        values: Values,
        worlds: frozenset[Leaf],
        linear: Mapping[int, Tensor],
    ) -> list[Tensor]:
        """The outputs where the linear leaves have some values."""
        stacked = self.group.values(values, worlds, linear)
        return self.group.outputs(values, worlds, stacked, frozenset(linear))

    @cached_property
    def others(self) -> tuple[tuple[Leaf, ...], ...]:
        """The leaves that are not linear."""
        pairs = zip(self.group.leaves, self.linear, strict=True)
        return tuple(tuple(leaves) for leaves, linear in pairs if not linear)

    def start(self, size: int | None = None) -> dict[int, Tensor]:
        """Zeros for the linear leaves, ``(W, G)`` and then the shape of the site."""
        lead = (len(self.names),) if size is None else (size, len(self.names))
        found = {}
        for slot in self.slots:
            like = self.sites[str(self.group.leaves[slot][0][1])].value
            found[slot] = torch.zeros(
                lead + like.shape, dtype=like.dtype, device=like.device
            ).requires_grad_()
        return found

    def coefficients(
        self,
        values: Values,
        frame: Frame,
        worlds: frozenset[Leaf] = frozenset(),
        size: int | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """What the sites are, as affine functions of their linear parents.

        :param values: of the leaves.
        :param worlds: leaves whose values have worlds in front.
        :param size: the number of worlds, ``None`` where there are none.
        :returns: a matrix for each linear leaf, the offset, and the covariance of the
            noise: ``(W, G) + plates`` and then what :class:`AffineSite` has.
        """
        with torch.inference_mode(False), torch.enable_grad():
            values = {
                x: v.clone() if v.is_inference() else v for x, v in values.items()
            }
            start = self.start(size)
            outputs = self.at(values, worlds, start)
            lead = 1 if size is None else 2
            site = self.mechanisms[0].site
            loc = _elements(outputs[0], site, frame, lead)
            matrices = self._derivatives(loc, start, site, frame, lead)
            loc = loc.double()
            covariance = self._covariance(outputs, loc, site, frame, lead)
        if not self._is_trained(values):
            matrices = [matrix.detach() for matrix in matrices]
            loc, covariance = loc.detach(), covariance.detach()
        return matrices, loc, covariance

    def _is_trained(self, values: Values) -> bool:
        """Whether anybody may ask for derivatives of the coefficients."""
        if not torch.is_grad_enabled():
            return False
        captured = [t for m in self.group.members for t in m.captured.values()]
        given = [values[x] for some in self.others for x in some if x in values]
        return any(t.requires_grad for t in (*captured, *given))

    def _derivatives(
        self,
        loc: Tensor,
        start: Mapping[int, Tensor],
        site: Site,
        frame: Frame,
        lead: int,
    ) -> list[Tensor]:
        found = []
        for slot, zeros in start.items():
            parent = self.sites[str(self.group.leaves[slot][0][1])]
            within = {f.dim for f in parent.frames if f.vectorized}
            if not loc.requires_grad:
                size = loc.shape[-1], frame.size(parent)
                found.append(loc.new_zeros((*loc.shape[:-1], *size)).double())
            elif within >= set(frame.common):
                found.append(self._by_rows(loc, zeros, parent, frame, lead))
            else:
                found.append(self._by_columns(loc, zeros, parent, frame, lead))
        return found

    def _by_rows(
        self, loc: Tensor, zeros: Tensor, parent: Site, frame: Frame, lead: int
    ) -> Tensor:
        size = loc.shape[-1]
        eye = torch.eye(size, dtype=loc.dtype, device=loc.device)
        rows = eye.reshape((size,) + (1,) * (loc.dim() - 1) + (size,))
        (gradient,) = torch.autograd.grad(
            loc,
            zeros,
            rows.expand((size, *loc.shape)),
            create_graph=True,
            is_grads_batched=True,
            allow_unused=True,
        )
        if gradient is None:  # it does not depend on it after all
            gradient = zeros.detach().expand((size, *zeros.shape))
        return _elements(gradient, parent, frame, lead + 1).double().movedim(0, -2)

    def _by_columns(
        self, loc: Tensor, zeros: Tensor, parent: Site, frame: Frame, lead: int
    ) -> Tensor:
        """The same for a parent that all slots of a plate have in common."""
        inner = zeros.shape[lead:]
        cotangent = torch.zeros_like(loc, requires_grad=True)
        (gradient,) = torch.autograd.grad(
            loc, zeros, cotangent, create_graph=True, materialize_grads=True
        )
        if not gradient.requires_grad:
            return loc.new_zeros((*loc.shape, frame.size(parent))).double()
        size = frame.size(parent)
        eye = torch.eye(size, dtype=loc.dtype, device=loc.device)
        own = {f.dim for f in parent.frames if f.vectorized}
        pairs = zip(frame.places, frame.plates, strict=True)
        plates = [length if dim in own else 1 for dim, length in pairs]
        eye = eye.reshape((size,) + (1,) * frame.depth + (size,))
        columns = frame.back(eye.expand((size, *plates, size)), parent)
        columns = columns.reshape((size,) + (1,) * lead + tuple(inner))
        (found,) = torch.autograd.grad(
            gradient,
            cotangent,
            columns.expand((size, *zeros.shape)),
            create_graph=True,
            is_grads_batched=True,
            materialize_grads=True,
        )
        return found.double().movedim(0, -1)

    def _covariance(
        self,
        outputs: Sequence[Tensor],
        loc: Tensor,
        site: Site,
        frame: Frame,
        lead: int,
    ) -> Tensor:
        size = loc.shape[-1]
        if self.deterministic:
            return loc.new_zeros((1,) * (loc.dim() - 1) + (size, size)).double()
        base = self.kind
        if isinstance(base, torch.distributions.Normal):
            scale = outputs[1].double()
            return torch.diag_embed(_elements(scale, site, frame, lead) ** 2)
        if isinstance(base, torch.distributions.MultivariateNormal):
            covariance = outputs[1].double() @ outputs[1].double().mT
        else:
            factor, own = outputs[1].double(), outputs[2].double()
            covariance = factor @ factor.mT + torch.diag_embed(own)
        return self._of_rows(covariance, site, frame, lead)

    def _of_rows(
        self, covariance: Tensor, site: Site, frame: Frame, lead: int
    ) -> Tensor:
        """A covariance within events, as one of all elements."""
        event = len(site.event_shape)
        plates = site.shape[: len(site.shape) - event]
        last = covariance.shape[-1]
        blocks = torch.Size(site.event_shape).numel() // last
        missing = lead + len(plates) + (event - 1) - (covariance.dim() - 2)
        shape = covariance.shape[:lead] + (1,) * missing + covariance.shape[lead:]
        full = (*covariance.shape[:lead], *plates, *site.event_shape[:-1], last, last)
        covariance = covariance.reshape(shape).expand(full)
        covariance = covariance.reshape(
            (*covariance.shape[:lead], *plates, blocks, last, last)
        )
        # Of each block a column of the whole: elements of plates become blocks, too
        columns = []
        for j in range(last):
            column = covariance[..., j].reshape(
                (*covariance.shape[:lead], *plates, *site.event_shape)
            )
            columns.append(_elements(column, site, frame, lead))
        matrix = torch.stack(columns, -1)  # (..., n, last)
        size = matrix.shape[-2]
        matrix = matrix.reshape((*matrix.shape[:-2], size // last, last, last))
        count = size // last
        result = matrix.new_zeros((*matrix.shape[:-3], count, last, count, last))
        index = torch.arange(count, device=matrix.device)
        result[..., index, :, index, :] = matrix.movedim(-3, 0)
        return result.reshape((*matrix.shape[:-3], size, size))

    def is_affine(self, values: Values, frame: Frame) -> bool:
        """Whether the mechanisms are affine in their linear leaves, plates apart.

        Checked at two random states of the parents, and by the operations that are
        applied to them.
        """
        leaves = {self.mechanisms[0].expression.leaves[slot] for slot in self.slots}
        if not self.mechanisms[0].expression.may_be_affine(leaves):
            return False
        try:
            matrices, offset, _ = self.coefficients(values, frame)
            start = self.at(values, frozenset(), self.start())
        except Exception:  # whatever it is: it has no derivatives
            return False
        generator = torch.Generator().manual_seed(0)
        for sign in (1, -1):
            moved = {}
            for slot in self.slots:
                like = self.sites[str(self.group.leaves[slot][0][1])].value
                move = torch.randn(
                    (len(self.names), *like.shape),
                    generator=generator,
                    dtype=torch.float64,
                    device="cpu",
                )
                move = sign * (move + 3 * move.sign())
                moved[slot] = move.to(like) * (1 + like.abs())
            outputs = self.at(values, frozenset(), moved)
            site = self.mechanisms[0].site
            found = _elements(outputs[0], site, frame, 1).double()
            expected, size = offset.detach().double(), offset.detach().double().abs()
            for slot, matrix in zip(self.slots, matrices, strict=True):
                parent = self.sites[str(self.group.leaves[slot][0][1])]
                x = _elements(moved[slot], parent, frame, 1).double().unsqueeze(-1)
                expected = expected + (matrix @ x).squeeze(-1).detach()
                size = size + (matrix.abs() @ x.abs()).squeeze(-1).detach()
            limit = torch.finfo(outputs[0].dtype).eps ** 0.75 * (size + 1e-30)
            if not bool(((found - expected).abs() <= limit).all()):
                return False
            for one, other in zip(outputs[1:], start[1:], strict=True):
                if not torch.equal(one, other):
                    return False
        return True


def _elements(value: Tensor, site: Site, frame: Frame, lead: int) -> Tensor:
    """Elements where some dimensions stand in front, of the depth of the program."""
    inner, full = value.shape[lead:], site.shape
    value = value.reshape(value.shape[:lead] + (1,) * (len(full) - len(inner)) + inner)
    value = value.expand(value.shape[:lead] + full)
    inner, event = full, len(site.event_shape)
    missing = frame.depth - (len(inner) - event)
    value = value.reshape(value.shape[:lead] + (1,) * missing + inner)
    return frame.elements(value, site)


def linear_leaves(mechanism: Mechanism, parents: Collection[str]) -> tuple[bool, ...]:
    """Which leaves of a mechanism are among some parents."""
    leaves = mechanism.expression.leaves
    return tuple(leaf[0] == SITE and leaf[1] in parents for leaf in leaves)
