# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Plates whose slots are spread over the ranks of ``torch.distributed``."""
