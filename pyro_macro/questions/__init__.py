# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Confounding between macro-variables: where it comes from, and where it goes."""
