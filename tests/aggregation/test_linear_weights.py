# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``Linear`` holds its weights in double precision, whatever the default."""

import pyro
import pyro.distributions as dist
import torch
from brute_force import run

import pyro_macro as pm


def test_weights_that_are_python_numbers_keep_their_digits():
    torch.set_default_dtype(torch.float32)
    single = pm.Linear([1 / 3, 0.1])
    torch.set_default_dtype(torch.float64)
    assert single.weights(torch.zeros(2)).tolist() == [[1 / 3, 0.1]]
    assert single == pm.Linear([1 / 3, 0.1])


def test_a_macro_variable_that_is_defined_before_double_precision_is_asked_for():
    torch.set_default_dtype(torch.float32)
    macro = pm.MacroVariable("m", ["x0", "x1"], aggregation=pm.Linear([1 / 3, 1 / 3]))
    torch.set_default_dtype(torch.float64)

    def model():
        pyro.sample("x0", dist.Binomial(4, torch.tensor(0.3)))
        pyro.sample("x1", dist.Binomial(4, torch.tensor(0.6)))

    nodes = run(model, macro, pm.Natural(4 / 3)).nodes
    assert nodes["x0"]["value"] + nodes["x1"]["value"] == 4
