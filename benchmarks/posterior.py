# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does consolidation do for inference?

NUTS on the rate of a chain of 50 sites of which only the end is seen: effective samples
of the rate a second, of the plain model with its latent sites in between, of the
consolidated one, of the marginal derived by hand, and of the plain model in numpyro,
whose compiled NUTS is the fastest way to sample latent sites. Posterior means are
compared with the exact posterior, on a grid.

    python benchmarks/posterior.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from harness import Clock, Missing, Question
from pyro.infer import MCMC, NUTS
from pyro.ops.stats import effective_sample_size
from torch import Tensor

import pyro_macro as pm

LENGTH, NOISE, TRUE = 50, 0.02, 0.97
LOW, HIGH = 0.8, 1.0


def model(seen: Tensor) -> None:
    rate = pyro.sample("rate", dist.Uniform(LOW, HIGH))
    s = torch.ones(())
    for t in range(1, LENGTH):
        s = pyro.sample(f"s{t}", dist.Normal(rate * s, NOISE))
    pyro.sample(f"s{LENGTH}", dist.Normal(rate * s, NOISE), obs=seen)


def marginal(seen: Tensor) -> None:
    """The same without what lies between, by whoever sums the series."""
    rate = pyro.sample("rate", dist.Uniform(LOW, HIGH))
    pyro.sample(f"s{LENGTH}", end(rate), obs=seen)


def end(rate: Tensor) -> Any:
    scale = NOISE * ((1 - rate ** (2 * LENGTH)) / (1 - rate**2)).sqrt()
    return dist.Normal(rate**LENGTH, scale)


def data() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    s = torch.ones(())
    for _ in range(LENGTH):
        s = TRUE * s + NOISE * torch.randn((), generator=generator)
    return s


def exact(seen: Tensor) -> tuple[float, float]:
    """Posterior mean and standard deviation, on a grid of rates."""
    rate = torch.linspace(LOW, HIGH, 20_001)[1:-1]
    weights = end(rate).log_prob(seen).softmax(0)
    mean = float(weights @ rate)
    return mean, float(weights @ (rate - mean) ** 2) ** 0.5


Sampler = Callable[[Tensor], Tensor]  # from what is seen to draws of the rate


def nuts(program: Any, warmup: int, draws: int) -> Sampler:
    def run(seen: Tensor) -> Tensor:
        pyro.set_rng_seed(0)
        mcmc = MCMC(NUTS(program), draws, warmup, disable_progbar=True)
        mcmc.run(seen)
        return mcmc.get_samples()["rate"]

    return run


def consolidated(warmup: int, draws: int) -> Sampler:
    def run(seen: Tensor) -> Tensor:
        fused = pm.consolidate(model, keep=["rate"], model_args=(seen,))
        return nuts(fused, warmup, draws)(seen)

    return run


def numpyro(warmup: int, draws: int) -> Sampler:
    """The plain model, its steps in a loop, compiled."""

    def run(seen: Tensor) -> Tensor:
        try:
            import jax
            import numpyro as npyro
            import numpyro.distributions as law
        except ImportError as error:
            raise Missing(f"{error.name} is not installed") from error
        jax.config.update("jax_enable_x64", True)

        def program() -> None:
            rate = npyro.sample("rate", law.Uniform(LOW, HIGH))
            s = 1.0
            for t in range(1, LENGTH):
                s = npyro.sample(f"s{t}", law.Normal(rate * s, NOISE))
            npyro.sample("end", law.Normal(rate * s, NOISE), obs=float(seen))

        kernel = npyro.infer.NUTS(program)
        mcmc = npyro.infer.MCMC(
            kernel, num_warmup=warmup, num_samples=draws, progress_bar=False
        )
        mcmc.run(jax.random.PRNGKey(0))
        return torch.as_tensor(np.array(mcmc.get_samples()["rate"]))

    return run


OURS, PLAIN = "consolidated", "Pyro, all sites"


def main() -> None:
    question = Question("posterior", "NUTS on a chain of 50 sites", ("numpyro", "jax"))
    torch.set_default_dtype(torch.float64)
    seen = data()
    mean, spread = exact(seen)
    columns = {
        "draws": "draws",
        "cpu": "CPU s",
        "effective": "effective draws",
        "rate": "effective a second",
        "off": "mean off by (sd)",
    }
    title = "Effective draws of the rate, building and warm-up counted"
    table = question.table(title, OURS, columns=columns)
    samplers: dict[str, tuple[Any, int, int]] = {
        OURS: (consolidated, 200, 1000),
        "Pyro, marginal by hand": (lambda *n: nuts(marginal, *n), 200, 1000),
        PLAIN: (lambda *n: nuts(model, *n), 40, 60),
        "numpyro, all sites": (numpyro, 500, 1000),
    }
    speeds: dict[str, float] = {}
    for name, (sampler, warmup, draws) in samplers.items():
        row: dict[str, Any] = {"way": name, "draws": draws}
        clock = Clock()
        try:
            rate = sampler(warmup, draws)(seen)
        except Missing as error:
            table.add({"way": name, "note": str(error)})
            continue
        row["cpu"] = clock.seconds()[0]
        row["effective"] = float(effective_sample_size(rate.unsqueeze(0)))
        speeds[name] = row["rate"] = row["effective"] / row["cpu"]
        row["off"] = abs(float(rate.mean()) - mean) / spread
        if name == PLAIN:
            row["note"] = "has not converged in its time"
        else:
            assert row["off"] < 5 / row["effective"] ** 0.5, (name, row)
        table.add(row)
    question.target(
        "times the effective draws a second of plain Pyro",
        speeds[OURS] / speeds[PLAIN],
        at_least=50,
    )
    question.write()


if __name__ == "__main__":
    main()
