# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Micro-realizations: how a macro intervention reaches the micro state."""

from pyro_macro.realizations.allocate import Allocate
from pyro_macro.realizations.base import MicroState, Realization, Realized
from pyro_macro.realizations.explicit import Explicit
from pyro_macro.realizations.inhibiting import Inhibiting
from pyro_macro.realizations.maxentropy import MaxEntropy
from pyro_macro.realizations.natural import Natural
from pyro_macro.realizations.proportional import Proportional
from pyro_macro.realizations.residual import Residual
from pyro_macro.realizations.shift import Shift

__all__ = [
    "Allocate",
    "Explicit",
    "Inhibiting",
    "MaxEntropy",
    "MicroState",
    "Natural",
    "Proportional",
    "Realization",
    "Realized",
    "Residual",
    "Shift",
]
