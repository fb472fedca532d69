# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Aggregation maps: from micro states to macro values."""

from pyro_macro.aggregation.base import Aggregation
from pyro_macro.aggregation.custom import Custom
from pyro_macro.aggregation.linear import Linear, Mean, Sum

__all__ = ["Aggregation", "Custom", "Linear", "Mean", "Sum"]
