# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What does an exact verdict cost, and a dose-response curve?

K products with a confounder each: are total sales and total revenue confounded? A whole
``confounding`` call beside one run of the program, the closed form by hand for this
very model, and dense linear algebra with K x K matrices: means and variances of total
revenue, seen and set, at 16 totals (``dose_response`` gives those that are set). Then
the same by draws: the interventional side alone, by ``macro_do`` and by DoWhy.

    python benchmarks/verdict.py
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from harness import Contender, Question, Run
from torch import Tensor

import pyro_macro as pm

DRAWS, TOTALS = 1000, 16
SALES = pm.MacroVariable("sales", micro="x", over="products")
REVENUE = pm.MacroVariable("revenue", micro="y", over="products")

Answer = tuple[Tensor, Tensor, Tensor, Tensor]  # means and variances, seen and set


@dataclass
class Problem:
    """Confounders ``z``, sales ``x ~ N(z, sigma)``, revenue ``y ~ N(a x + c z, 1)``."""

    size: int

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a, self.c, self.sigma = (
            1 + torch.rand(self.size, generator=generator) for _ in range(3)
        )
        self.at = torch.linspace(-1, 1, TOTALS) * self.size**0.5

    @cached_property
    def model(self) -> Callable[[], Tensor]:
        size, a, c, sigma = self.size, self.a, self.c, self.sigma

        def model() -> Tensor:
            with pyro.plate("products", size):
                z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0))
                x = pyro.sample("x", dist.Normal(z, sigma))
                return pyro.sample("y", dist.Normal(a * x + c * z, 1.0))

        return model

    def closed_form(self) -> Answer:
        a, c = self.a, self.c
        variance = 1 + self.sigma**2  # of each x, whose covariance with its z is 1
        total = variance.sum()
        through = (a * variance).sum()  # Cov(a.x, sum of x)
        noise = (c**2).sum() + self.size
        seen = through + c.sum()
        whole = (a**2 * variance + 2 * a * c).sum() + noise
        done = (a**2 * variance).sum() - through**2 / total + noise
        each = torch.ones_like(self.at)
        return (
            seen / total * self.at,
            (whole - seen**2 / total) * each,
            through / total * self.at,
            done * each,
        )

    def check(self, name: str, answer: Any) -> None:
        """The closed form, or within 5 standard errors of it."""
        expected = self.closed_form()
        if name == CURVE:
            (found,) = answer.curves
            answer, expected = (found.mean, found.variance), expected[2:]
        if isinstance(answer, tuple):
            for one, other in zip(answer, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
        elif name != RUN:
            drawn = torch.as_tensor(answer)  # (n, DRAWS), n of the totals
            mean, variance = (part[: len(drawn)] for part in expected[2:])
            error = (drawn.mean(-1) - mean).abs()
            assert (error < 5 * (variance / DRAWS).sqrt()).all(), name


def verdict(problem: Problem) -> Run:
    def run() -> Answer:
        report = pm.confounding(problem.model, SALES, REVENUE, at=problem.at)
        assert report.verdict == "inducing"
        return (
            report.observational_mean,
            report.observational_variance,
            report.interventional_mean,
            report.interventional_variance,
        )

    return run


def curve(problem: Problem) -> Run:
    return lambda: pm.dose_response(problem.model, SALES, REVENUE, at=problem.at)


def dense(problem: Problem) -> Run:
    """Matrices of all covariances."""

    def run() -> Answer:
        size, a, c, at = problem.size, problem.a, problem.c, problem.at
        one, eye = torch.ones(size), torch.eye(size)
        x = torch.diag(1 + problem.sigma**2)
        y = torch.diag(a) @ x @ torch.diag(a)
        y = y + torch.diag(2 * a * c + c**2) + eye
        crossed = torch.diag(a) @ x + torch.diag(c)  # Cov(y, x)
        total = one @ x @ one
        seen = one @ crossed @ one
        gain = x @ one / total
        within = x - torch.outer(gain, x @ one)
        done = a @ within @ a + (c**2).sum() + size
        each = torch.ones_like(at)
        return (
            seen / total * at,
            (one @ y @ one - seen**2 / total) * each,
            a @ gain * at,
            done * each,
        )

    return run


def by_draws(problem: Problem) -> Run:
    intervened = pm.macro_do(
        problem.model, {SALES: pm.Natural(problem.at.reshape(-1, 1, 1))}
    )

    def run() -> Tensor:
        grid = pyro.plate("grid", TOTALS, dim=-3)
        with grid, pyro.plate("draws", DRAWS, dim=-2):
            return intervened().sum(-1)

    return run


def dowhy(problem: Problem) -> Run:
    """``gcm.interventional_samples``, of draws by hand, at one total of the 16.

    The draws go in as data: interventions that are callables are called once for each
    draw. One intervention a product that changes nothing has its revenue drawn anew.
    """
    import networkx as nx
    import pandas as pd
    from dowhy import gcm
    from dowhy.gcm.fitting_sampling import PARENTS_DURING_FIT
    from scipy import stats

    a, c, sigma = (t.numpy() for t in (problem.a, problem.c, problem.sigma))
    names = [[f"{kind}{i}" for i in range(problem.size)] for kind in "xyz"]

    class Revenue(gcm.ml.PredictionModel):
        def __init__(self, weights: Any) -> None:
            self.weights = weights

        def fit(self, X: Any, Y: Any) -> None:
            pass

        def predict(self, X: Any) -> Any:
            return X @ self.weights

        def clone(self) -> Any:
            return Revenue(self.weights)

    graph = nx.DiGraph()
    for x, y, z in zip(*names, strict=True):
        graph.add_edges_from([(x, y), (z, y)])  # x is cut off from z: it is set
    model = gcm.StructuralCausalModel(graph)
    normal = gcm.ScipyDistribution(stats.norm, loc=0.0, scale=1.0)
    for i, (x, y, z) in enumerate(zip(*names, strict=True)):
        model.set_causal_mechanism(x, normal)
        model.set_causal_mechanism(z, normal)
        weights = np.array([[a[i]], [c[i]]])
        mechanism = gcm.AdditiveNoiseModel(Revenue(weights), normal)
        model.set_causal_mechanism(y, mechanism)
    for node in graph.nodes:  # what fitting would note
        model.graph.nodes[node][PARENTS_DURING_FIT] = sorted(graph.predecessors(node))
    generator = np.random.default_rng(0)
    variance = 1 + sigma**2
    total, same = float(problem.at[0]), {x: lambda value: value for x in names[0]}

    def run() -> Any:
        shape = (DRAWS, problem.size)
        x = np.sqrt(variance) * generator.standard_normal(shape)
        x += (total - x.sum(-1, keepdims=True)) * variance / variance.sum()
        parts = [x, np.zeros(shape), generator.standard_normal(shape)]
        data = pd.DataFrame(np.hstack(parts), columns=sum(names, []))
        done = gcm.interventional_samples(model, same, observed_data=data)
        return done[names[1]].to_numpy().sum(-1)[None]

    return run


OURS, CURVE, RUN = "confounding", "dose_response", "one run of the model"


def main() -> None:
    packages = ("dowhy", "numpy")
    question = Question("verdict", "Are two totals confounded?", packages)
    torch.set_default_dtype(torch.float64)
    table = question.table(f"K products, {TOTALS} totals, float64", OURS, axis="K")
    for size in (100, 1000, 10_000, 100_000):
        problem = Problem(size)
        contenders: dict[str, Contender] = {
            OURS: partial(verdict, problem),
            CURVE: partial(curve, problem),
            RUN: lambda problem=problem: problem.model,
            "by hand": lambda problem=problem: problem.closed_form,
        }
        slow: dict[str, Contender] = {
            "dense, K x K": partial(dense, problem),
            "macro_do by draws": partial(by_draws, problem),
            "DoWhy by draws": partial(dowhy, problem),
        }
        left_out: dict[str, str] = {}
        if size <= 1000:
            contenders |= slow
        else:
            left_out = dict.fromkeys(slow, "left out: takes long")
        notes = {"DoWhy by draws": "one total, set, not seen"}
        table.compare({"K": size}, contenders, problem.check, left_out, notes)
    for way in (OURS, CURVE):
        found, one = (table.cpu(name, K=1000) for name in (way, RUN))
        question.target(
            f"ms of {way} beside one run of the program, K = 1000",
            found - one if found and one else None,
            at_most=2.0,
        )
    what = "exponent of the cost from K = 10^4"
    question.target(what, table.exponent(OURS, "K", 10**4), at_most=1.1)
    question.write()


if __name__ == "__main__":
    main()
