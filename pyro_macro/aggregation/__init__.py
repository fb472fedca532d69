# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Aggregation maps: from micro states to macro values."""

from pyro_macro.aggregation.base import Aggregation
from pyro_macro.aggregation.coarsen import Coarsen
from pyro_macro.aggregation.count import Count
from pyro_macro.aggregation.custom import Custom
from pyro_macro.aggregation.extreme import Max, Min
from pyro_macro.aggregation.linear import Linear, Mean, Sum

__all__ = ["Aggregation", "Coarsen", "Count", "Custom", "Linear", "Max", "Mean", "Min"]
__all__ += ["Sum"]
