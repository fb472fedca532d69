# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

import pyro
import pyro.poutine.runtime
import pytest
import torch

import pyro_macro as pm

from .models import under


@pytest.fixture(autouse=True)
def clean_run():
    """Double precision, a fixed seed, no parameters, and all of it put back."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    pyro.clear_param_store()
    pyro.set_rng_seed(20)
    yield
    pyro.clear_param_store()
    torch.set_default_dtype(dtype)
    torch.set_num_threads(threads)
    stack = pyro.poutine.runtime._PYRO_STACK
    left, stack[:] = list(stack), []
    assert not left, "a handler was left on Pyro's stack"


@pytest.fixture(params=["wrapper", "decorator", "context"])
def form(request):
    return request.param


@pytest.fixture
def do(form):
    """``macro_do(model, interventions)`` in each of its three forms."""
    return lambda model, interventions: under(form, pm.macro_do, model, interventions)


@pytest.fixture
def add(form):
    """``aggregate(model, macros)`` in each of its three forms."""
    return lambda model, macros: under(form, pm.aggregate, model, macros)
