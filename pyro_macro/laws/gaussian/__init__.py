# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Jointly affine-Gaussian programs: exact laws without large matrices."""
