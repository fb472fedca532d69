# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Draws of the micro state from its conditional covariance, a K x K matrix.

The covariance given the total is singular: methods that want a Cholesky factor need
a jitter, after which the total is not met (``total.py`` says by how much).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyro.distributions as dist
import torch
from harness import Contender, Run
from torch import Tensor

if TYPE_CHECKING:
    from natural import Problem

JITTER = {torch.float32: 1e-3, torch.float64: 1e-9}


def moments(problem: Problem) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the micro state given the total."""
    variance, gain = problem.sigma**2, problem.gain
    mean = problem.mu + gain * (problem.total - problem.mu.sum())
    return mean, torch.diag(variance) - torch.outer(gain, variance)


def jittered(problem: Problem) -> tuple[Tensor, Tensor]:
    mean, covariance = moments(problem)
    covariance.diagonal().add_(JITTER[mean.dtype])
    return mean, covariance


def numpy(problem: Problem, method: str) -> Run:
    mean, covariance = (jittered if method == "cholesky" else moments)(problem)
    generator = np.random.default_rng(0)
    return partial(
        generator.multivariate_normal,
        mean.numpy(),
        covariance.numpy(),
        problem.draws,
        method=method,
    )


def torch_cholesky(problem: Problem, effect: bool = False) -> Run:
    """The product of noise with a Cholesky factor.

    :param effect: whether the effect is drawn too.
    """
    shape, dtype = (problem.draws, len(problem.mu)), problem.mu.dtype

    def run() -> Tensor:
        mean, covariance = jittered(problem)
        factor = torch.linalg.cholesky(covariance)
        x = torch.addmm(mean, torch.randn(shape, dtype=dtype), factor.mT)
        return x @ problem.a + torch.randn(len(x), dtype=dtype) if effect else x

    return run


def pyro_normal(problem: Problem) -> Run:
    """Pyro's ``MultivariateNormal``."""

    def run() -> Tensor:
        return dist.MultivariateNormal(*jittered(problem)).sample((problem.draws,))

    return run


def numpyro_normal(problem: Problem) -> Run:
    """``MultivariateNormal`` of numpyro, compiled."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist

    jax.config.update("jax_enable_x64", problem.mu.dtype == torch.float64)
    mean, covariance = (jnp.asarray(part.numpy()) for part in jittered(problem))

    @jax.jit
    def run(key: Any) -> Any:
        law = dist.MultivariateNormal(mean, covariance)
        return law.sample(key, (problem.draws,))

    keys = iter(jax.random.split(jax.random.PRNGKey(0), 10_000))
    return lambda: np.asarray(run(next(keys)))


def pgmpy(problem: Problem) -> Run:
    """``simulate(evidence)`` on a network in which the total is a node."""
    from pgmpy.factors.continuous import LinearGaussianCPD
    from pgmpy.models import LinearGaussianBayesianNetwork

    names = [f"x{i:05}" for i in range(len(problem.mu))]
    network = LinearGaussianBayesianNetwork([(name, "total") for name in names])
    parts = zip(names, problem.mu.tolist(), problem.sigma.tolist(), strict=True)
    network.add_cpds(*[LinearGaussianCPD(name, [mu], std) for name, mu, std in parts])
    weights = [0.0] + [1.0] * len(names)
    network.add_cpds(LinearGaussianCPD("total", weights, 0.0, names))
    evidence = {"total": problem.total}

    def run() -> Any:
        drawn = network.simulate(problem.draws, evidence=evidence, seed=0)
        return drawn[names].to_numpy()

    return run


def dense(problem: Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that take part in a problem, and why others do not."""
    slow: dict[str, Contender] = {
        "Pyro MultivariateNormal": partial(pyro_normal, problem),
        "numpyro MultivariateNormal, jit": partial(numpyro_normal, problem),
    }
    ways: dict[str, Contender] = {
        "torch, Cholesky": partial(torch_cholesky, problem),
    }
    if problem.mu.dtype == torch.float64:
        ways["numpy, Cholesky"] = partial(numpy, problem, "cholesky")
        slow["numpy, eigh"] = partial(numpy, problem, "eigh")
        slow["numpy, svd"] = partial(numpy, problem, "svd")
        slow["pgmpy simulate(evidence)"] = partial(pgmpy, problem)
    if len(problem.mu) <= 1000:
        return ways | slow, {}
    return ways, dict.fromkeys(slow, "left out: takes minutes")
