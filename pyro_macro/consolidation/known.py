# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What is known in a run of a fused program: values, of sites and of inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from pyro_macro.consolidation.frame import Frame, Worlds
from pyro_macro.consolidation.structure import Structure
from pyro_macro.program.shapes import broadcast_shapes
from pyro_macro.program.tape import CAPTURED, PARAM, SITE, Expression, Leaf

NATURAL = "\0natural "  # before the name of a site that is intervened on


def plain(name: str) -> str:
    """The site that a natural value is of."""
    return name.removeprefix(NATURAL)


class Known:
    """Values by site, and of parameters, arguments and indices of plates.

    Sites that are computed are evaluated when they are asked for.

    :param structure: the program.
    :param inputs: values of leaves that are no sites.
    """

    def __init__(self, structure: Structure, inputs: Mapping[Leaf, Tensor]) -> None:
        self.structure, self.inputs = structure, inputs
        self.sites: dict[str, Tensor] = {}
        self.frame = structure.frame
        self._elements: dict[tuple[str, int], Tensor] = {}

    def set(self, name: str, value: Tensor) -> None:
        self.sites[name] = value

    def has(self, leaf: Leaf) -> bool:
        """Whether a value is at hand, or can be computed."""
        kind, name = leaf
        if kind != SITE or name in self.sites:
            return True
        return name in self.structure.computed and all(
            n in self.sites for n in self.structure.computed_from(str(name))
        )

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.sites:
            self._compute(name)
        return self.sites[name]

    def seen(self, name: str) -> Tensor:
        """The value that tells of a site's causes: if it is set, its natural one."""
        return self.sites.get(NATURAL + name, self.sites[name])

    def _compute(self, name: str) -> None:
        """Evaluates a deterministic site, and those it is computed from."""
        stack = [name]
        while stack:
            at = stack[-1]
            missing = [p for p in self.structure.of[at].parents if p not in self.sites]
            if missing:
                stack.extend(missing)
            else:
                stack.pop()
                if at not in self.sites:
                    self.sites[at] = self.outputs(at)[0]

    def outputs(self, name: str) -> list[Tensor]:
        """The tensors of a site's mechanism, worlds at their places."""
        mechanism = self.structure.of[name]
        made = mechanism.parts
        event = len(mechanism.site.event_shape)
        dims = [event] if made is None else made.event_dims
        return self.evaluated(mechanism.expression, dims)

    def rest(self, name: str) -> list[Tensor]:
        """A site's value if it is observed, mask and scale if they are tensors."""
        site = self.structure.of[name].site
        dims = [len(site.event_shape)] if site.observed else []
        return self.evaluated(self.structure.of[name].rest, [*dims, 0, 0])

    def evaluated(self, expression: Expression, dims: Sequence[int]) -> list[Tensor]:
        """What an expression comes to.

        :param dims: how many of the rightmost dimensions of each output are no plates.
        """
        worlds = self.worlds(expression.leaves)
        values, wide = self.values([(leaf,) for leaf in expression.leaves], worlds)
        if not wide:
            return expression(values)
        in_dims = tuple(0 if leaf in wide else None for leaf in expression.leaves)

        def one(*given: Tensor) -> tuple[Tensor, ...]:
            return tuple(expression.evaluate(given, expression.constants))

        given = [
            expression.captured[leaf] if leaf[0] == CAPTURED else values[leaf]
            for leaf in expression.leaves
        ]
        found = torch.vmap(one, in_dims=in_dims)(*given)
        return [worlds.behind(t, dim) for t, dim in zip(found, dims, strict=False)]

    def worlds(self, leaves: Iterable[Leaf]) -> Worlds:
        """The dimensions of some values that are no plates of the program."""
        values = []
        for leaf in leaves:
            if leaf[0] == SITE:
                name = str(leaf[1])
                event = len(self.structure.sites[name].event_shape)
                values.append((self[name], event))
            elif leaf[0] == PARAM:  # `poutine.lift` within a plate
                like = self.structure.mechanisms.values[leaf]
                values.append((self.inputs[leaf], like.dim()))
        return Worlds(values, self.frame)

    def values(
        self, leaves: Sequence[Sequence[Leaf]], worlds: Worlds
    ) -> tuple[dict[Leaf, Tensor], frozenset[Leaf]]:
        """Values as expressions take them, those that differ between worlds in front.

        Sites whose values are not known have those of the run that read the program.
        """
        found: dict[Leaf, Tensor] = {}
        wide = set()
        for leaf in {leaf for some in leaves for leaf in some}:
            kind, name = leaf
            if kind == CAPTURED:
                continue
            if kind == PARAM and worlds:
                shape = self.structure.mechanisms.values[leaf].shape
                value = self.inputs[leaf]
                if worlds.has(value, len(shape)):
                    found[leaf] = worlds.front(value, len(shape), shape)
                    wide.add(leaf)
                    continue
            if kind != SITE:
                found[leaf] = self.inputs[leaf]
                continue
            name = str(name)
            site = self.structure.sites[name]
            if not self.has(leaf):
                found[leaf] = self.structure.mechanisms.values[leaf]
                continue
            value = self[name]
            event = len(site.event_shape)
            if worlds and worlds.has(value, event):
                value = self._full(value, name)
                found[leaf] = worlds.front(value, event, site.shape)
                wide.add(leaf)
            else:
                value = self._full(value, name)
                found[leaf] = value.reshape(site.shape)
        return found, frozenset(wide)

    def _full(self, value: Tensor, name: str) -> Tensor:
        """Of the size of the plates around a site, and of its dtype."""
        site = self.structure.sites[name]
        batch = value.shape[: value.dim() - len(site.event_shape)]
        plates = site.shape[: len(site.shape) - len(site.event_shape)]
        shape = broadcast_shapes(batch, plates)
        return value.expand((*shape, *site.event_shape)).to(site.value.dtype)

    def elements(self, name: str, frame: Frame) -> Tensor:
        """The elements of a site's value, as numbers of double precision."""
        key = (name, id(frame))
        if key not in self._elements:
            site = self.structure.sites[plain(name)]
            self._elements[key] = frame.elements(self[name], site).double()
        return self._elements[key]
