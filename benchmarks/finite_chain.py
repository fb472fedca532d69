# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does an exact query of a finite chain cost once the chain is consolidated?

T sites of five states in a row: ``P(x_T | do(x_k = a))``, from the consolidated model
and from tools for exact inference, of a chain that was built before, beside one product
after the other by hand. All answers are compared with a power of the matrix.

    python benchmarks/finite_chain.py
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import IN_RUNS, Contender, Missing, Question, Run
from torch import Tensor

import pyro_macro as pm

STATES, SET = 5, 3


@dataclass
class Chain:
    length: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (STATES, STATES)
        table = torch.rand(shape, generator=generator, dtype=torch.float64)
        self.table = table / table.sum(-1, keepdim=True)
        self.start = torch.full((STATES,), 1 / STATES, dtype=torch.float64)

    @property
    def names(self) -> list[str]:
        return [f"x{t}" for t in range(self.length + 1)]

    @property
    def edges(self) -> list[tuple[str, str]]:
        return list(zip(self.names, self.names[1:], strict=False))

    @property
    def middle(self) -> str:
        return f"x{self.length // 2}"

    @property
    def end(self) -> str:
        return f"x{self.length}"

    @property
    def left(self) -> int:
        return self.length - self.length // 2

    def model(self) -> Tensor:
        x = pyro.sample("x0", dist.Categorical(self.start))
        for t in pyro.markov(range(1, self.length + 1)):
            x = pyro.sample(f"x{t}", dist.Categorical(self.table[x]))
        return x

    def consolidated(self) -> Any:
        return pm.consolidate(self.model, keep=[self.end], allow=self.names[:-1])

    def check(self, name: str, found: Any) -> None:
        exact = torch.linalg.matrix_power(self.table, self.left)[SET]
        found = torch.as_tensor(found)
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12, msg=name)


def consolidated(chain: Chain) -> Run:
    """The law of the last site in a run of the consolidated model."""
    set_to = {chain.middle: torch.tensor(SET)}
    program = pyro.poutine.trace(pyro.poutine.do(chain.consolidated(), set_to))
    return lambda: program.get_trace().nodes[chain.end]["fn"].probs


def step_by_step(chain: Chain) -> Run:
    def run() -> Tensor:
        row = torch.eye(STATES, dtype=torch.float64)[SET]
        for _ in range(chain.left):
            row = row @ chain.table
        return row

    return run


def look_up(chain: Chain) -> Run:
    """All powers of the matrix in a table, by whoever knows what will be asked."""
    powers = [torch.eye(STATES, dtype=torch.float64)]
    for _ in range(chain.length):
        powers.append(powers[-1] @ chain.table)
    table = torch.stack(powers)
    return lambda: table[chain.left, SET]


def _pyagrum_network(chain: Chain) -> Any:
    import pyagrum

    pyagrum.setNumberOfThreads(1)
    network = pyagrum.BayesNet()
    for name in chain.names:
        network.add(pyagrum.LabelizedVariable(name, "", STATES))
    for edge in chain.edges:
        network.addArc(*edge)
    network.cpt("x0").fillWith(chain.start.tolist())
    for name in chain.names[1:]:
        network.cpt(name)[:] = chain.table.numpy()
    return network


def pyagrum_causal(chain: Chain) -> Run:
    """``causalImpact``, which finds the formula and evaluates it."""
    import pyagrum

    model = pyagrum.CausalModel(_pyagrum_network(chain))
    query = {"on": chain.end, "doing": chain.middle, "values": {chain.middle: SET}}
    return lambda: pyagrum.causalImpact(model, **query)[1].toarray()


def pyagrum_reused(chain: Chain) -> Run:
    """One inference object on the cut network, of which only the value changes.

    Another site to intervene on would need another network. The value that was set
    before is another one, or there would be nothing to do.
    """
    import pyagrum

    network = _pyagrum_network(chain)
    network.eraseArc(f"x{chain.length // 2 - 1}", chain.middle)
    network.cpt(chain.middle).fillWith(chain.start.tolist())
    inference = pyagrum.ShaferShenoyInference(network)
    inference.addTarget(chain.end)
    inference.addEvidence(chain.middle, 0)
    inference.makeInference()
    turn = 0

    def run() -> Any:
        nonlocal turn
        turn += 1
        value = SET if turn % 2 else 0
        inference.chgEvidence(chain.middle, value)
        inference.makeInference()
        return inference.posterior(chain.end).toarray()

    return run


def _pgmpy_network(chain: Chain) -> Any:
    from pgmpy.factors.discrete import TabularCPD
    from pgmpy.models import DiscreteBayesianNetwork

    network = DiscreteBayesianNetwork(chain.edges)
    table, start = chain.table.T.numpy(), chain.start.unsqueeze(-1).numpy()
    laws = [TabularCPD(x, STATES, table, [w], [STATES]) for w, x in chain.edges]
    network.add_cpds(TabularCPD("x0", STATES, start), *laws)
    return network


def pgmpy_causal(chain: Chain) -> Run:
    """``CausalInference.query(do)``."""
    from pgmpy.inference import CausalInference

    inference = CausalInference(_pgmpy_network(chain))
    do = {chain.middle: SET}
    return lambda: inference.query([chain.end], do=do, show_progress=False).values


def pgmpy_elimination(chain: Chain) -> Run:
    """Variable elimination on the cut network."""
    from pgmpy.inference import VariableElimination

    inference = VariableElimination(_pgmpy_network(chain).do([chain.middle]))
    seen = {chain.middle: SET}
    return lambda: inference.query([chain.end], seen, show_progress=False).values


def chirho(chain: Chain, at_once: bool) -> Run:
    """ChiRho's ``do`` under Pyro's enumeration.

    :param at_once: by ``compute_marginals``, which gives those of all sites; or the
        probability of each last state, by conditioning on it.
    """
    from chirho.interventional.handlers import do
    from pyro.infer import TraceEnum_ELBO, config_enumerate

    actions = {chain.middle: torch.tensor(SET)}

    def guide() -> None: ...

    def set_model() -> None:
        with do(actions=actions):
            chain.model()

    def marginals() -> Tensor:
        program = config_enumerate(set_model, "parallel")
        elbo = TraceEnum_ELBO(max_plate_nesting=0)
        return elbo.compute_marginals(program, guide)[chain.end].probs

    def probability(state: int) -> float:
        seen = pyro.condition(set_model, {chain.end: torch.tensor(state)})
        program = config_enumerate(seen, "parallel")
        return -TraceEnum_ELBO(max_plate_nesting=0).loss(program, guide)

    def each() -> Tensor:
        logs = [probability(state) for state in range(STATES)]
        return torch.tensor(logs, dtype=torch.float64).exp()

    return marginals if at_once else each


def pyro_do(chain: Chain) -> Run:
    """Pyro's own ``do`` under its enumeration."""
    from pyro.infer import TraceEnum_ELBO, config_enumerate

    set_model = pyro.poutine.do(chain.model, {chain.middle: torch.tensor(SET)})
    program = config_enumerate(set_model, "parallel")
    elbo = TraceEnum_ELBO(max_plate_nesting=0)

    def run() -> Tensor:
        return elbo.compute_marginals(program, lambda: None)[chain.end].probs

    try:
        run()
    except KeyError as error:
        raise Missing(f"fails: KeyError {error} under pyro.markov") from error
    return run


OURS, REUSED = "consolidated", "pyAgrum, reused"


def contenders(chain: Chain) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that take part, and why others do not."""
    ways: dict[str, Contender] = {
        OURS: partial(consolidated, chain),
        "step by step, by hand": partial(step_by_step, chain),
        "looked up, by hand": partial(look_up, chain),
        REUSED: partial(pyagrum_reused, chain),
    }
    slow: dict[str, Contender] = {
        "pyAgrum causalImpact": partial(pyagrum_causal, chain),
        "pgmpy CausalInference": partial(pgmpy_causal, chain),
        "pgmpy, variable elimination": partial(pgmpy_elimination, chain),
        "ChiRho do, state by state": partial(chirho, chain, False),
        "Pyro do, enumeration": partial(pyro_do, chain),
    }
    slower: dict[str, Contender] = {
        "ChiRho do, marginals": partial(chirho, chain, True)
    }
    left_out = dict.fromkeys(slower, "left out: takes 20 s at T = 1000")
    if chain.length <= 100:
        return ways | slow | slower, {}
    if chain.length <= 1000:
        return ways | slow, left_out
    return ways, left_out | dict.fromkeys(slow, "left out: takes long")


def main() -> None:
    packages = ("pyagrum", "pgmpy", "chirho")
    question = Question(
        "finite_chain", "A query of a finite chain of T sites", packages
    )
    torch.set_default_dtype(torch.float64)
    lengths = (10, 100, 1000, 10_000)
    table = question.table("P(x_T | do(x_k = a)), five states", OURS, axis="T")
    for length in lengths:
        chain = Chain(length)
        ways, left_out = contenders(chain)
        table.compare({"T": length}, ways, chain.check, left_out)
    built = question.table(
        "What consolidating costs, once", "one run", axis="T", columns=IN_RUNS
    )
    for length in lengths:
        chain = Chain(length)
        ways = {
            "one run": lambda chain=chain: chain.model,
            "consolidating": lambda chain=chain: chain.consolidated,
        }
        built.compare({"T": length}, ways)
    for other, times in ((REUSED, 20), ("pgmpy CausalInference", 500)):
        what = f"times as fast as {other}, T = 1000"
        question.target(what, table.ratio(other, OURS, T=1000), at_least=times)
    what = "runs of the model that consolidating costs, T = 1000"
    runs = built.ratio("consolidating", "one run", T=1000)
    question.target(what, runs, at_most=30)
    what = "exponent of the cost of consolidating from T = 100"
    question.target(what, built.exponent("consolidating", "T", 100), at_most=1.1)
    question.write()


if __name__ == "__main__":
    main()
