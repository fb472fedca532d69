# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Interventions on aggregated variables, for everyone who writes models in Pyro."""

from pyro_macro.aggregation import Aggregation, Custom, Linear, Mean, Sum
from pyro_macro.errors import (
    CyclicPartition,
    Infeasible,
    InterventionNotAllowed,
    NotAMicroState,
    OffFibre,
    PyroMacroError,
    UnknownSite,
    UnsupportedLaw,
)
from pyro_macro.handlers import aggregate, macro_do
from pyro_macro.macro import MacroVariable
from pyro_macro.realizations import (
    Allocate,
    Explicit,
    Natural,
    Proportional,
    Realization,
    Residual,
    Shift,
)

__version__ = "0.1.0"

__all__ = [
    "Aggregation",
    "Allocate",
    "Custom",
    "CyclicPartition",
    "Explicit",
    "Infeasible",
    "InterventionNotAllowed",
    "Linear",
    "MacroVariable",
    "Mean",
    "Natural",
    "NotAMicroState",
    "OffFibre",
    "Proportional",
    "PyroMacroError",
    "Realization",
    "Residual",
    "Shift",
    "Sum",
    "UnknownSite",
    "UnsupportedLaw",
    "aggregate",
    "macro_do",
]
