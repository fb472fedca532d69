# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Reading a Pyro program: sites, parents, plates, and its noise view."""
