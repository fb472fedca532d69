# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Families that are closed under sums: one file a family."""

from pyro_macro.laws.families.base import GivenSum, Member, member, of_one_family
from pyro_macro.laws.families.binomial import Hypergeometric
from pyro_macro.laws.families.gamma import ScaledDirichlet
from pyro_macro.laws.families.negative_binomial import DirichletMultinomial
from pyro_macro.laws.families.poisson import Multinomial

__all__ = [
    "DirichletMultinomial",
    "GivenSum",
    "Hypergeometric",
    "Member",
    "Multinomial",
    "ScaledDirichlet",
    "member",
    "of_one_family",
]
