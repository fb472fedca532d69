# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""How much memory a run with a million micro variables takes.

100 draws under ``Natural``, the reading of the program included: the peak of resident
memory beyond what the process has before, over the size of the draws of the micro
state. Each is measured in a process of its own.
"""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm

SIZE, DRAWS = 10**6, 100
STATUS = Path("/proc/self/status")
# The micro state itself, and some 70 MB: parameters, what is read, what torch loads
BOUND = 1.3
# A model whose effect is `(x * a).sum(-1)` makes a product of the size of the draws
PRODUCT = 2.3


def resident(which):
    """Resident memory of this process in bytes: VmRSS now, VmHWM at most."""
    (line,) = (s for s in STATUS.read_text().splitlines() if s.startswith(which))
    return 1024 * int(line.split()[1])


def run(way, size, draws, dtype):
    """Draws from an intervened model; the resident memory before."""
    generator = torch.Generator().manual_seed(0)
    mean, spread, prices = (
        (1 + torch.rand(size, generator=generator)).to(dtype) for _ in range(3)
    )

    def vector():
        x = pyro.sample("x", dist.Normal(mean, spread).to_event(1))
        return pyro.sample("y", dist.Normal(x @ prices, 1.0))

    def plate():
        with pyro.plate("k", size, dim=-1):
            x = pyro.sample("x", dist.Normal(mean, spread))
        return pyro.sample("y", dist.Normal((x @ prices).unsqueeze(-1), 1.0))

    def product():
        with pyro.plate("k", size, dim=-1):
            x = pyro.sample("x", dist.Normal(mean, spread))
        total = (x * prices).sum(-1, keepdim=True)
        return pyro.sample("y", dist.Normal(total, 1.0))

    model = {"vector": vector, "plate": plate, "product": product}[way]
    over, dim = ((), -1) if way == "vector" else ("k", -2)
    total = pm.MacroVariable("total", "x", over=over)
    natural = pm.macro_do(model, {total: pm.Natural(1.01 * mean.sum().item())})
    gc.collect()
    before = resident("VmRSS")
    with pyro.plate("draws", draws, dim=dim):
        y = natural()
    assert y.numel() == draws and bool(y.isfinite().all())
    return before


def measure(way, name):
    """Prints the peak in sizes of the draws."""
    torch.set_num_threads(1)
    dtype = getattr(torch, name)
    run(way, 10, 3, dtype)  # what is loaded and compiled
    before = run(way, SIZE, DRAWS, dtype)
    size = SIZE * DRAWS * torch.finfo(dtype).bits / 8
    print((resident("VmHWM") - before) / size)


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="Linux says how much memory there is")
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    ("way", "bound"), [("vector", BOUND), ("plate", BOUND), ("product", PRODUCT)]
)
def test_peak_in_sizes_of_the_draws(way, bound, dtype):
    root = str(Path(pm.__file__).parents[1])
    paths = [root, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, __file__, way, dtype],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
    )
    assert not done.returncode, done.stderr
    peak = float(done.stdout.splitlines()[-1])
    assert 0.9 <= peak <= bound


if __name__ == "__main__":
    measure(*sys.argv[1:])
