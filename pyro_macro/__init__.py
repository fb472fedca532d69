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
from pyro_macro.backdoor import is_macro_backdoor, macro_backdoor_sets
from pyro_macro.consolidation.fused import Fused, consolidate
from pyro_macro.consolidation.prepared import Approximation
from pyro_macro.consolidation.verify import verify_consolidation
from pyro_macro.drawing import render
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
from pyro_macro.graphs import (
    amalgamated_graph,
    intervention_graph,
    macro_graph,
    micro_graph,
)
from pyro_macro.grid import grid
from pyro_macro.handlers import aggregate, macro_do
from pyro_macro.laws.sampled.chains import Chains, NotConverged
from pyro_macro.laws.sampled.flow import Flow
from pyro_macro.macro import MacroVariable
from pyro_macro.plots import (
    plot_adjustment,
    plot_confounding,
    plot_dose_response,
)
from pyro_macro.plots_fibre import plot_fibre
from pyro_macro.questions.adjustment import NotAdjusted, macro_adjust
from pyro_macro.questions.conditions import (
    NotAChain,
    blocks_backdoor,
    irrelevant_cause,
)
from pyro_macro.questions.coordinates import (
    change_of_coordinates,
    direction_of,
)
from pyro_macro.questions.counterfactual import counterfactual
from pyro_macro.questions.feasibility import can_inhibit, structural_coefficient
from pyro_macro.questions.noise import macro_noise
from pyro_macro.questions.paradox import paradox
from pyro_macro.questions.response import dose_response
from pyro_macro.questions.scm import macro_scm_exists
from pyro_macro.questions.shifts import (
    atomic_from_shifts,
    shift_confounding,
    shift_from_atomics,
)
from pyro_macro.questions.verdict import confounding
from pyro_macro.realizations import (
    Allocate,
    Explicit,
    Inhibiting,
    MaxEntropy,
    Natural,
    Proportional,
    Realization,
    Residual,
    Shift,
)
from pyro_macro.sharding.plate import sharded_plate

__version__ = "0.1.0"

__all__ = [
    "Aggregation",
    "Allocate",
    "Approximation",
    "Chains",
    "Coarsen",
    "Count",
    "Custom",
    "CyclicPartition",
    "Explicit",
    "Fused",
    "Flow",
    "Infeasible",
    "Inhibiting",
    "InterventionNotAllowed",
    "Linear",
    "MacroVariable",
    "Max",
    "MaxEntropy",
    "Mean",
    "Min",
    "Natural",
    "NotAChain",
    "NotAMicroState",
    "NotAdjusted",
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
    "amalgamated_graph",
    "atomic_from_shifts",
    "blocks_backdoor",
    "can_inhibit",
    "change_of_coordinates",
    "confounding",
    "consolidate",
    "counterfactual",
    "direction_of",
    "dose_response",
    "grid",
    "intervention_graph",
    "irrelevant_cause",
    "is_macro_backdoor",
    "macro_adjust",
    "macro_backdoor_sets",
    "macro_do",
    "macro_graph",
    "macro_noise",
    "macro_scm_exists",
    "micro_graph",
    "paradox",
    "plot_adjustment",
    "plot_confounding",
    "plot_dose_response",
    "plot_fibre",
    "render",
    "sharded_plate",
    "shift_confounding",
    "shift_from_atomics",
    "structural_coefficient",
    "verify_consolidation",
]
