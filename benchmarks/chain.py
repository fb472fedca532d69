# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does a query of an affine chain cost once the chain is consolidated?

T affine-Gaussian sites in a row, an intervention in the middle, 10,000 draws of the
last site: from the consolidated model, from the model itself under ``do`` of several
languages, and by hand from the closed form. Then what consolidating costs, in runs of
the model.

    python benchmarks/chain.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from harness import IN_RUNS, Contender, Question, Run, Table
from pyro.infer import Predictive
from torch import Tensor

import pyro_macro as pm

DRAWS = 10_000
RATE, NOISE, SET = 0.99, 0.1, 2.0


@dataclass
class Chain:
    """``s_t ~ N(RATE s_(t-1), NOISE)`` for ``t = 1..length``, the middle one set."""

    length: int

    @property
    def middle(self) -> str:
        return f"s{self.length // 2}"

    @property
    def end(self) -> str:
        return f"s{self.length}"

    @property
    def left(self) -> int:
        """The number of steps after the intervention."""
        return self.length - self.length // 2

    @property
    def mean(self) -> float:
        return RATE**self.left * SET

    @property
    def scale(self) -> float:
        return NOISE * ((1 - RATE ** (2 * self.left)) / (1 - RATE**2)) ** 0.5

    def model(self) -> Tensor:
        s = pyro.sample("s0", dist.Normal(1.0, 1.0))
        for t in range(1, self.length + 1):
            s = pyro.sample(f"s{t}", dist.Normal(RATE * s, NOISE))
        return s

    def consolidated(self) -> Any:
        inner = [f"s{t}" for t in range(self.length)]
        return pm.consolidate(self.model, keep=[self.end], allow=inner)

    def check(self, name: str, drawn: Any) -> None:
        """Mean and spread within 5 standard errors of the closed form."""
        drawn = torch.as_tensor(drawn).double()
        assert drawn.shape == (DRAWS,), (name, drawn.shape)
        assert abs(drawn.mean() - self.mean) < 5 * self.scale / DRAWS**0.5, name
        assert abs(drawn.std() / self.scale - 1) < 5 / (2 * DRAWS) ** 0.5, name


def done(program: Callable[[], Any], chain: Chain) -> Run:
    """Pyro's ``do`` in a plate, of the model or of the consolidated one."""

    def run() -> Tensor:
        with pyro.plate("draws", DRAWS, dim=-1):
            return pyro.poutine.do(program, {chain.middle: SET})()

    return run


def consolidated(chain: Chain) -> Run:
    fused = chain.consolidated()
    traced = pyro.poutine.trace(pyro.poutine.do(fused, {chain.middle: SET}))
    law = traced.get_trace().nodes[chain.end]["fn"]
    assert abs(float(law.mean) - chain.mean) < 1e-9 * (1 + chain.mean)
    assert abs(float(law.stddev) / chain.scale - 1) < 1e-9
    return done(fused, chain)


def plain(chain: Chain) -> Run:
    return done(chain.model, chain)


def predictive(chain: Chain) -> Run:
    program = pyro.poutine.do(chain.model, {chain.middle: SET})
    sites = [chain.end]
    draw = Predictive(program, num_samples=DRAWS, parallel=True, return_sites=sites)
    return lambda: draw()[chain.end]


def chirho(chain: Chain) -> Run:
    from chirho.interventional.handlers import do

    def run() -> Tensor:
        actions = {chain.middle: torch.tensor(SET)}
        with pyro.plate("draws", DRAWS, dim=-1), do(actions=actions):
            return chain.model()

    return run


def dense(chain: Chain) -> Run:
    """The joint of all sites after the intervention, as one product."""
    steps = torch.arange(1.0, chain.left + 1)
    powers = RATE ** (steps.unsqueeze(-1) - steps)
    factor = NOISE * powers.tril()
    mean = SET * RATE**steps
    return lambda: (mean + torch.randn(DRAWS, chain.left) @ factor.mT)[:, -1]


def by_hand(chain: Chain) -> Run:
    return lambda: chain.mean + chain.scale * torch.randn(DRAWS)


OURS = "consolidated"


def contenders(chain: Chain) -> tuple[dict[str, Contender], dict[str, str]]:
    """Those that take part, and why others do not."""
    from chain_elsewhere import elsewhere

    ways: dict[str, Contender] = {
        OURS: partial(consolidated, chain),
        "Pyro do": partial(plain, chain),
        "by hand, fused": partial(by_hand, chain),
    }
    more: dict[str, Contender] = {
        "Pyro Predictive": partial(predictive, chain),
        "ChiRho do": partial(chirho, chain),
        "the joint, T x T": partial(dense, chain),
    }
    others, left_out = elsewhere(chain)
    if chain.length <= 1000:
        return ways | more | others, left_out
    return ways | others, left_out | dict.fromkeys(more, "left out: takes long")


def building(question: Question, lengths: tuple[int, ...]) -> Table:
    table = question.table(
        "What consolidating costs, once", "one run", axis="T", columns=IN_RUNS
    )
    for length in lengths:
        chain = Chain(length)
        ways: dict[str, Contender] = {
            "one run": lambda chain=chain: chain.model,
            "consolidating": lambda chain=chain: chain.consolidated,
        }
        table.compare({"T": length}, ways)
    return table


def main() -> None:
    packages = ("chirho", "dowhy", "pgmpy", "numpyro", "jax", "pymc")
    question = Question("chain", "A query of an affine chain of T sites", packages)
    torch.set_default_dtype(torch.float64)
    lengths = (10, 100, 1000, 10_000)
    table = question.table("10,000 draws of the last site, float64", OURS, axis="T")
    for length in lengths:
        chain = Chain(length)
        ways, left_out = contenders(chain)
        table.compare({"T": length}, ways, chain.check, left_out)
    built = building(question, lengths)
    for other, times in (
        ("Pyro do", 100),
        ("DoWhy", 1000),
        ("pgmpy simulate(do)", 1000),
    ):
        what = f"times as fast as {other}, T = 1000"
        question.target(what, table.ratio(other, OURS, T=1000), at_least=times)
    one, other = (table.cpu(OURS, T=length) for length in (1000, 10))
    question.target(
        "time at T = 1000 over time at T = 10",
        one / other if one and other else None,
        at_most=1.2,
    )
    question.target(
        "runs of the model that consolidating costs, T = 1000",
        built.ratio("consolidating", "one run", T=1000),
        at_most=30,
    )
    question.target(
        "exponent of the cost of consolidating from T = 100",
        built.exponent("consolidating", "T", 100),
        at_most=1.1,
    )
    question.write()


if __name__ == "__main__":
    main()
