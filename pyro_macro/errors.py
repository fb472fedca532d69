# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What is refused, and how it is said.

Each message names the site, what was found, what was expected, and what to do.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class PyroMacroError(Exception):
    """Base class of all errors that this library raises on purpose."""


class UnknownSite(PyroMacroError):
    """A name that the program does not have."""

    @classmethod
    def named(cls, role: str, name: str, valid: Iterable[str]) -> "UnknownSite":
        """An error that lists near misses first, then all valid names."""
        names = sorted(valid)
        near = get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        listed = ", ".join(map(repr, names)) or "none"
        return cls(
            f"{role}: the program has no site {name!r}.{hint} Its sites are: {listed}."
        )


class NotAMicroState(PyroMacroError):
    """Sites that do not form a micro state.

    A directed path among the aggregated sites (Assumption 1 of the paper), sites
    that share no common shape, or a map that is injective on them (Definition 2).
    """


class OffFibre(PyroMacroError):
    """A micro state ``x`` with ``pi(x)`` different from the macro value."""


class Infeasible(PyroMacroError):
    """A request that no distribution can meet."""


class InterventionNotAllowed(PyroMacroError):
    """An intervention that this program was not prepared for."""


class CyclicPartition(PyroMacroError):
    """Clusters whose quotient graph has a cycle."""


class UnsupportedLaw(PyroMacroError):
    """A law that is not known exactly, where only an exact one is accepted."""


class NotAffine(UnsupportedLaw):
    """A program of Gaussian sites that is no affine function of their noise."""
