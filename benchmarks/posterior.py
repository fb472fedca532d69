# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does consolidation do for inference?

NUTS on the rate of a chain of 50 sites of which only the end is seen: effective samples
of the rate a second, of the plain model with its latent sites in between and of the
consolidated one. The posterior means are compared with the exact posterior, on a grid.

    python benchmarks/posterior.py
"""

from __future__ import annotations

import time
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from natural import begin
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

import pyro_macro as pm

LENGTH, MACHINES, NOISE = 50, 1, 0.02
TRUE = 0.97


def model(seen: Tensor) -> None:
    rate = pyro.sample("rate", dist.Uniform(0.8, 1.0))
    with pyro.plate("machines", MACHINES):
        s = torch.ones(MACHINES)
        for t in range(1, LENGTH):
            s = pyro.sample(f"s{t}", dist.Normal(rate * s, NOISE))
        pyro.sample(f"s{LENGTH}", dist.Normal(rate * s, NOISE), obs=seen)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    s = torch.ones(MACHINES)
    for _ in range(LENGTH):
        s = TRUE * s + NOISE * torch.randn(MACHINES, generator=generator)
    return s


def exact(seen: Tensor) -> tuple[float, float]:
    """Posterior mean and standard deviation, on a grid of rates."""
    rate = torch.linspace(0.8, 1.0, 20_001)[1:-1]
    scale = NOISE * ((1 - rate ** (2 * LENGTH)) / (1 - rate**2)).sqrt()
    law = dist.Normal((rate**LENGTH).unsqueeze(-1), scale.unsqueeze(-1))
    weights = law.log_prob(seen).sum(-1).softmax(0)
    mean = float(weights @ rate)
    return mean, float(weights @ (rate - mean) ** 2) ** 0.5


def infer(program: Any, seen: Tensor, warmup: int, draws: int) -> tuple[Tensor, float]:
    """Draws of the rate, and CPU seconds of sampling and warm-up together."""
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(program), draws, warmup, disable_progbar=True)
    start = time.process_time()
    mcmc.run(seen)
    return mcmc.get_samples()["rate"], time.process_time() - start


def main() -> None:
    begin(f"NUTS, a chain of {LENGTH} sites")
    seen = data()
    fused = pm.consolidate(model, keep=["rate"], model_args=(seen,))
    mean, spread = exact(seen)
    speeds = {}
    for name, program, warmup, draws in (
        ("consolidated", fused, 200, 1000),
        ("plain Pyro", model, 40, 60),
    ):
        rate, seconds = infer(program, seen, warmup, draws)
        size = float(effective_sample_size(rate.unsqueeze(0)))
        off = abs(float(rate.mean()) - mean) / spread
        # The plain one is far from having converged in the time there is
        assert name == "plain Pyro" or off < 5 / size**0.5 + 0.05, off
        speeds[name] = size / seconds
        print(
            f"{name:<14}{draws} draws in {seconds:6.1f} s, {size:6.0f} effective, "
            f"{speeds[name]:8.2f} a second, mean {off:.2f} sd off the exact one"
        )
    print(f"ratio {speeds['consolidated'] / speeds['plain Pyro']:.0f}")


if __name__ == "__main__":
    main()
