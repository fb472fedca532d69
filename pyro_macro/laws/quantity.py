# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What questions are asked about: a macro-variable, or a site as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Size, Tensor

from pyro_macro.errors import UnknownSite
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import Site
from pyro_macro.program.layout import Layout

Thing = MacroVariable | str


def names_of(thing: Thing) -> tuple[str, ...]:
    """The sites that something is computed from."""
    return (thing,) if isinstance(thing, str) else thing.micro


def name_of(thing: Thing) -> str:
    return thing if isinstance(thing, str) else thing.name


class Quantity:
    """A macro-variable or a site of a program, as a vector of numbers.

    :param thing: the macro-variable, or the name of a site.
    :param sites: the sites of the program.
    :param role: what it is asked as, for messages.
    :raises UnknownSite: if the program lacks a site.
    :ivar shape: of its value: the plates that stay, and what it has itself.
    :ivar size: how many numbers that are.
    """

    def __init__(self, thing: Thing, sites: Mapping[str, Site], role: str) -> None:
        self.thing, self.name, self.sites = thing, name_of(thing), names_of(thing)
        self.what = f"{role} {self.name!r}"
        for name in self.sites:
            if name not in sites:
                raise UnknownSite.named(self.what, name, sites)
        over = () if isinstance(thing, str) else thing.over
        self.layout = Layout([sites[n] for n in self.sites], over, self.what)
        batch = self.layout.batch_shape
        if isinstance(thing, str):
            self._map = None
            self.shape = batch + sites[thing].event_shape
            own = Size([self.layout.size])
        else:
            self._map = thing.aggregation.within(self.layout)
            state = sites[self.sites[0]].value.new_zeros(self.layout.size).double()
            own = self._map(state).shape
            self.shape = batch + own
        self._stacked = batch + own
        self.size = self._stacked.numel()

    def of(
        self, values: Mapping[str, Tensor], lead: Sequence[int] = (), depth: int = 0
    ) -> Tensor:
        """Its value, given those of the sites: shape ``lead + (size,)``.

        :param lead: sizes of the dimensions to the left of all plates.
        :param depth: where these begin, if there are any.
        """
        result = self.layout.stack(values)
        result = result if self._map is None else self._map(result.double())
        between = depth - len(self.layout.batch_shape)
        shape = tuple(lead) + (1,) * between * bool(lead) + self._stacked
        while result.dim() > len(shape):
            result = result.squeeze(0)  # where plates were that are in the vector
        return result.double().expand(shape).reshape(tuple(lead) + (self.size,))
