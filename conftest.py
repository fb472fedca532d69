# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def examples_start_afresh(request):
    """Examples of docstrings print what they print in a new interpreter."""
    if hasattr(request.node, "dtest"):
        torch.set_default_dtype(torch.float32)
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
