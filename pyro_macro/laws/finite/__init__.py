# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Sites of finite support: exact laws by sums over configurations."""
