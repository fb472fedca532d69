# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A macro intervention without the program at hand: micro sites as they come."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro.ops.provenance import ProvenanceTensor, extract_provenance
from torch import Tensor

from pyro_macro.errors import PyroMacroError, UnknownSite, UnsupportedLaw
from pyro_macro.intervention import Target, refuse_unfit
from pyro_macro.laws.gaussian.law import GaussianLaw, GaussianProgram
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import Shared, Site, as_program, unwrapped
from pyro_macro.realizations import MicroState
from pyro_macro.units import Unit


class OnTheFly:
    """Collects the micro sites of one intervention while the program runs.

    Without the program at hand, nothing is known of a site before it is met. All but
    the last micro site are :class:`Pending` until then.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.macro, self.realization = unit.macro, unit.realization
        self.sites: dict[str, Site] = {}
        self.pending: dict[str, Pending] = {}

    def meet(self, site: Site) -> bool:
        """Takes note of a micro site; whether it was the last."""
        refuse_unfit(self.macro, site)
        self.sites[site.name] = site
        return len(self.sites) == len(self.macro.micro)

    def target(
        self,
        known: Mapping[str, Tensor],
        latent: Iterable[str],
        shared: dict[str, Shared],
    ) -> Target:
        """The target, once all micro sites are met.

        :param known: the values of the sites met so far, by name.
        :param latent: the names of those among them that are random.
        :param shared: the parameters and subsamples so far.
        """
        if self.realization.looks_downstream:
            raise UnsupportedLaw(
                f"macro-variable {self.macro.name!r}: "
                f"{type(self.realization).__name__} depends on what follows from the "
                "micro state, which macro_do does not see as a context manager. Wrap "
                "the model: macro_do(model, interventions)."
            )
        what = f"macro-variable {self.macro.name!r}: given"
        given = self.realization.given
        for thing in given:
            if thing in shared:
                continue  # parameters are held anyway
            if isinstance(thing, MacroVariable) or thing not in known:
                name = thing.name if isinstance(thing, MacroVariable) else thing
                raise UnknownSite.named(f"{what} (so far in the run)", name, known)
        unheld = sorted(set(latent) - set(given))
        program = _MetSites(self.macro, self.sites, unheld)
        sites = {
            name: replace(self.sites[name], value=program.sites[name].value)
            for name in self.macro.micro
        }
        state = MicroState(self.macro, program, [], shared, sites)
        return Target(state, self.unit)

    def fill(self, values: Mapping[str, Tensor]) -> None:
        """Gives the pending values their content."""
        for name, pending in self.pending.items():
            pending.fill(values[name])


class _MetSites(GaussianProgram):
    """The program that consists of some micro sites, as they were met."""

    def __init__(
        self, macro: MacroVariable, sites: dict[str, Site], unheld: list[str]
    ) -> None:
        self.unheld = unheld

        program = as_program(list(sites.values()))
        super().__init__((program, (), {}), macro.micro, macro.micro, {}, {})

    def is_outside(self, dim: int, size: int) -> bool:
        return True  # plates outside of the context are not known here

    def law(self, names: Any, over: Any, what: str, given: Any = ()) -> GaussianLaw:
        self.refuse_unseen(what)
        return super().law(names, over, what, given)

    def refuse_unseen(self, what: str) -> None:
        if self.unheld:
            raise UnsupportedLaw(
                f"{what}: used as a context manager, macro_do does not see the program "
                f"ahead, and cannot tell how the micro state depends on {self.unheld}. "
                "Wrap the model, macro_do(model, interventions), or hold them with "
                f"given={self.unheld}."
            )


class Pending(Tensor):
    """A value that is not known yet; using it says so.

    As an uninitialized parameter of torch, it becomes an ordinary tensor in the end.
    """

    message: str
    law: Any
    tracked: bool = False  # whether a handler outside wraps it with a provenance

    @staticmethod
    def of(name: str, what: str, law: Any) -> Pending:
        """A pending value of site ``name``.

        :param law: the site's distribution, at an unknown point, to be filled too.
        """
        pending = Tensor._make_subclass(Pending, unwrapped(law).v.clone())
        pending.law = law
        pending.message = (
            f"{what}: the value of micro site {name!r} is used before the last micro "
            "site is drawn. Used as a context manager, macro_do does not see the "
            "program ahead. Wrap the model: macro_do(model, interventions)."
        )
        return pending

    def fill(self, value: Tensor) -> None:
        """Makes it an ordinary tensor with this content, gradients included."""
        plain: Any
        plain, provenance = extract_provenance(value)
        with torch._C.DisableTorchFunctionSubclass():
            if plain.shape == self.shape:
                unwrapped(self.law).v = value
            # Of another shape where there are plates outside
            self.data = torch.empty_like(plain)
            self.__class__ = Tensor  # type: ignore[assignment]
            self.copy_(plain)
            if provenance and not self.tracked:
                self.__class__ = ProvenanceTensor  # type: ignore[assignment]
                self._t, self._provenance = plain, provenance  # type: ignore[attr-defined]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Handlers outside may ask for its shape, nobody for its content
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        message = next((a.message for a in args if isinstance(a, Pending)), "")
        raise PyroMacroError(message or "a pending micro value is used")


_SHAPES = {
    Tensor.shape.__get__,  # type: ignore[attr-defined]
    Tensor.dtype.__get__,  # type: ignore[attr-defined]
    Tensor.device.__get__,  # type: ignore[attr-defined]
    Tensor.requires_grad.__get__,  # type: ignore[attr-defined]
    Tensor.data.__get__,  # type: ignore[attr-defined]
    Tensor.ndim.__get__,  # type: ignore[attr-defined]
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
}
