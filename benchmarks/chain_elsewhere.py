# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The affine chain in PyMC, numpyro, DoWhy and pgmpy."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from harness import Contender, Run

if TYPE_CHECKING:
    from chain import Chain

DRAWS = 10_000
RATE, NOISE, SET = 0.99, 0.1, 2.0


def pymc(chain: Chain) -> Run:
    """``pymc.do``, all draws in one call, compiled before.

    Numba gives the fastest function, but takes minutes to compile a long chain.
    """
    import pymc

    with pymc.Model() as model:
        s = pymc.Normal("s0", 1.0, 1.0, shape=DRAWS)
        for t in range(1, chain.length + 1):
            s = pymc.Normal(f"s{t}", RATE * s, NOISE)
    done = pymc.do(model, {chain.middle: np.full(DRAWS, SET)})
    mode = "NUMBA" if chain.length <= 100 else "FAST_COMPILE"
    return pymc.pytensorf.compile([], done[chain.end], mode=mode, random_seed=0)


def numpyro(chain: Chain) -> Run:
    """``numpyro.handlers.do``, compiled."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from numpyro import plate, sample
    from numpyro.handlers import do, seed

    jax.config.update("jax_enable_x64", True)

    def model() -> Any:
        with plate("draws", DRAWS):
            s = sample("s0", dist.Normal(1.0, 1.0))
            for t in range(1, chain.length + 1):
                s = sample(f"s{t}", dist.Normal(RATE * s, NOISE))
        return s

    done = do(model, {chain.middle: jnp.full(DRAWS, SET)})
    return _with_keys(jax.jit(lambda key: seed(done, key)()))


def numpyro_scan(chain: Chain) -> Run:
    """The steps after the intervention as a scan, written for this very query."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    from numpyro import sample
    from numpyro.contrib.control_flow import scan
    from numpyro.handlers import seed

    jax.config.update("jax_enable_x64", True)

    def step(s: Any, _: Any) -> Any:
        return sample("s", dist.Normal(RATE * s, NOISE)), None

    def rest() -> Any:
        return scan(step, jnp.full(DRAWS, SET), None, length=chain.left)[0]

    return _with_keys(jax.jit(lambda key: seed(rest, key)()))


def _with_keys(run: Any) -> Run:
    import jax

    keys = iter(jax.random.split(jax.random.PRNGKey(0), 100_000))
    return lambda: np.asarray(run(next(keys)))


def dowhy(chain: Chain, drawn_before: bool) -> Run:
    """``gcm.interventional_samples``.

    :param drawn_before: whether it is given data, of which it draws anew what is
        downstream of the intervention, or draws all of them first.
    """
    import networkx as nx
    from dowhy import gcm
    from dowhy.gcm.fitting_sampling import PARENTS_DURING_FIT
    from scipy import stats

    class Step(gcm.ml.PredictionModel):
        def fit(self, X: Any, Y: Any) -> None:
            pass

        def predict(self, X: Any) -> Any:
            return RATE * X

        def clone(self) -> Any:
            return Step()

    names = [f"s{t}" for t in range(chain.length + 1)]
    graph = nx.path_graph(names, create_using=nx.DiGraph)
    model = gcm.StructuralCausalModel(graph)
    noise = gcm.ScipyDistribution(stats.norm, loc=0.0, scale=NOISE)
    for name in names[1:]:
        model.set_causal_mechanism(name, gcm.AdditiveNoiseModel(Step(), noise))
    start = gcm.ScipyDistribution(stats.norm, loc=1.0, scale=1.0)
    model.set_causal_mechanism("s0", start)
    for name in names:  # what fitting would note
        model.graph.nodes[name][PARENTS_DURING_FIT] = list(graph.predecessors(name))
    how: dict[str, Any] = {"num_samples_to_draw": DRAWS}
    if drawn_before:
        how = {"observed_data": gcm.draw_samples(model, DRAWS)}
    actions = {chain.middle: lambda _: SET}

    def run() -> Any:
        return gcm.interventional_samples(model, actions, **how)[chain.end].to_numpy()

    return run


def pgmpy(chain: Chain) -> Run:
    """``simulate(do)``, from the joint distribution."""
    from pgmpy.factors.continuous import LinearGaussianCPD
    from pgmpy.models import LinearGaussianBayesianNetwork

    names = [f"s{t}" for t in range(chain.length + 1)]
    edges = list(zip(names, names[1:], strict=False))
    network = LinearGaussianBayesianNetwork(edges)
    laws = [LinearGaussianCPD(s, [0.0, RATE], NOISE, [r]) for r, s in edges]
    network.add_cpds(LinearGaussianCPD("s0", [1.0], 1.0), *laws)

    def run() -> Any:
        drawn = network.simulate(DRAWS, do={chain.middle: SET}, seed=0)
        return drawn[chain.end].to_numpy()

    return run


def elsewhere(chain: Chain) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that take part, and why others do not."""
    ways: dict[str, Contender] = {"numpyro scan, jit": partial(numpyro_scan, chain)}
    left_out: dict[str, str] = {}
    others: dict[str, Contender] = {
        "DoWhy": partial(dowhy, chain, False),
        "DoWhy, on draws it has": partial(dowhy, chain, True),
        "pgmpy simulate(do)": partial(pgmpy, chain),
        "PyMC do, compiled": partial(pymc, chain),
    }
    if chain.length <= 1000:
        ways |= others
    else:
        left_out |= dict.fromkeys(others, "left out: takes long")
    if chain.length <= 100:
        ways["numpyro do, jit"] = partial(numpyro, chain)
    else:
        left_out["numpyro do, jit"] = "left out: compiles for minutes"
    return ways, left_out
