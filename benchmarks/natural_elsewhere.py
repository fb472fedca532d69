# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The natural realization of a total in PyMC, numpyro and DoWhy.

None of them derives the draw. Each is given the one that was derived by hand, in the
way that is fastest there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from harness import Contender, Run

if TYPE_CHECKING:
    from natural import Problem


def pymc(problem: Problem) -> Run:
    """``pymc.do`` of a random expression, all draws in one call, compiled before."""
    import pymc
    import pytensor.tensor as pt

    a, mu, sigma, gain = _arrays(problem)
    shape = (problem.draws, len(mu))
    with pymc.Model() as model:
        x = pymc.Normal("x", mu, sigma, shape=shape)
        pymc.Normal("y", pt.dot(x, a), 1.0)
    drawn = pymc.Normal.dist(mu, sigma, shape=shape)
    missing = (problem.total - drawn.sum(-1))[:, None]
    done = pymc.do(model, {"x": drawn + missing * gain})
    return pymc.pytensorf.compile([], done["y"], random_seed=0)


def numpyro(problem: Problem) -> Run:
    """``numpyro.handlers.do`` inside of one compiled function."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from numpyro import plate, sample
    from numpyro.handlers import do, seed

    jax.config.update("jax_enable_x64", problem.mu.dtype == torch.float64)
    a, mu, sigma, gain = map(jnp.asarray, _arrays(problem))

    def model() -> Any:
        with plate("draws", problem.draws):
            x = sample("x", dist.Normal(mu, sigma).to_event(1))
            return sample("y", dist.Normal(x @ a, 1.0))

    @jax.jit
    def run(key: Any) -> Any:
        for_x, for_y = jax.random.split(key)
        x = mu + sigma * jax.random.normal(for_x, (problem.draws, len(mu)), mu.dtype)
        x = x + gain * (problem.total - x.sum(-1, keepdims=True))
        return seed(do(model, {"x": x}), for_y)()

    keys = iter(jax.random.split(jax.random.PRNGKey(0), 10_000))
    return lambda: np.asarray(run(next(keys)))


def dowhy(problem: Problem, a_callable_each: bool) -> Run:
    """``gcm.interventional_samples``, of draws by hand.

    Its interventions are one callable a node, called once for each draw. Faster is to
    hand it the draws as data, and an intervention on one node that changes nothing,
    so that the effect is drawn anew.
    """
    import networkx as nx
    import pandas as pd
    from dowhy import gcm
    from dowhy.gcm.fitting_sampling import PARENTS_DURING_FIT
    from scipy import stats

    a, mu, sigma, gain = _arrays(problem)
    names = [f"x{i:05}" for i in range(len(mu))]  # parents are in alphabetical order

    class Revenue(gcm.ml.PredictionModel):
        def fit(self, X: Any, Y: Any) -> None:
            pass

        def predict(self, X: Any) -> Any:
            return X @ a[:, None]

        def clone(self) -> Any:
            return Revenue()

    model = gcm.StructuralCausalModel(nx.DiGraph([(name, "y") for name in names]))
    for i, name in enumerate(names):
        law = gcm.ScipyDistribution(stats.norm, loc=mu[i], scale=sigma[i])
        model.set_causal_mechanism(name, law)
    noise = gcm.ScipyDistribution(stats.norm, loc=0.0, scale=1.0)
    model.set_causal_mechanism("y", gcm.AdditiveNoiseModel(Revenue(), noise))
    for node in model.graph.nodes:  # what fitting would note
        parents = sorted(model.graph.predecessors(node))
        model.graph.nodes[node][PARENTS_DURING_FIT] = parents
    generator = np.random.default_rng(0)

    def drawn() -> Any:
        x = mu + sigma * generator.standard_normal((problem.draws, len(mu)))
        x += (problem.total - x.sum(-1, keepdims=True)) * gain
        return x

    def from_data() -> Any:
        data = pd.DataFrame(drawn(), columns=names)
        data["y"] = 0.0
        same = {names[0]: lambda value: value}
        return gcm.interventional_samples(model, same, observed_data=data)["y"]

    def from_callables() -> Any:
        x = drawn()
        actions = {
            name: lambda _, values=iter(x[:, i]): next(values)
            for i, name in enumerate(names)
        }
        return gcm.interventional_samples(
            model, actions, num_samples_to_draw=problem.draws
        )["y"]

    run = from_callables if a_callable_each else from_data
    return lambda: run().to_numpy()


def _arrays(problem: Problem) -> tuple[Any, ...]:
    tensors = (problem.a, problem.mu, problem.sigma, problem.gain)
    return tuple(tensor.numpy() for tensor in tensors)


def elsewhere(problem: Problem) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that take part in a problem, and why others do not."""
    ways: dict[str, Contender] = {"numpyro do, jit": partial(numpyro, problem)}
    left_out: dict[str, str] = {}
    if problem.mu.dtype == torch.float64:
        ways["PyMC do, compiled"] = partial(pymc, problem)
        ways["DoWhy, draws as data"] = partial(dowhy, problem, False)
        one_each = "DoWhy, a callable a node"
        if len(problem.mu) <= 1000:
            ways[one_each] = partial(dowhy, problem, True)
        else:
            left_out[one_each] = "left out: in K it is linear, and takes long"
    return ways, left_out
