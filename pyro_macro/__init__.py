# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Interventions on aggregated variables, for everyone who writes models in Pyro."""

from pyro_macro.aggregation import (
    Aggregation,
    Coarsen,
    Count,
    Custom,
    Linear,
    Max,
    Mean,
    Min,
    Sum,
)
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
from pyro_macro.laws.sampled.chains import Chains, NotConverged
from pyro_macro.laws.sampled.flow import Flow
from pyro_macro.macro import MacroVariable
from pyro_macro.realizations import (
    Allocate,
    Explicit,
    MaxEntropy,
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
    "Chains",
    "Coarsen",
    "Count",
    "Max",
    "MaxEntropy",
    "Min",
    "Custom",
    "CyclicPartition",
    "Explicit",
    "Flow",
    "Infeasible",
    "InterventionNotAllowed",
    "Linear",
    "MacroVariable",
    "Mean",
    "Natural",
    "NotAMicroState",
    "NotConverged",
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
