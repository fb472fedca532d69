# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pytest
import torch


@pytest.fixture(autouse=True)
def clean_slate():
    """Closed forms are compared in float64; each test starts from the same state."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()
