# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Continuous fibres: coordinates, chains, flows and random walks on them."""
