# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Theorem 3.1, Definitions 8 and 9: the natural realization, without confounding."""

import networkx as nx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from finite_programs import Macro, Oracle, explicit, random_question, thing

import pyro_macro as pm
from pyro_macro.questions.paradox import paradox

PROGRAMS = 40


def is_confounded(spec, cause, effect):
    """Whether anything acts on the micro state, and on the effect beside it."""
    graph = spec.graph
    above = set().union(*(nx.ancestors(graph, m) for m in cause.micro))
    graph.remove_edges_from(list(graph.out_edges(cause.micro)))
    names = [effect] if isinstance(effect, str) else effect.micro
    reach = set(names).union(*(nx.ancestors(graph, n) for n in names))
    return bool(above & reach)


def questions(confounded):
    """Random ones, with or without an arrow past the micro state."""
    found, seed = [], 0
    while len(found) < PROGRAMS:
        seed += 1
        _, spec, cause, effect, _ = random_question(seed, vectors=False)
        same_side = is_confounded(spec, cause, effect) == confounded
        if same_side and acts(spec, cause, effect):
            found.append(seed)
    return found


def acts(spec, cause, effect):
    names = {effect} if isinstance(effect, str) else set(effect.micro)
    return bool(
        names & set().union(*(nx.descendants(spec.graph, m) for m in cause.micro))
    )


@pytest.mark.parametrize("seed", questions(False))
def test_theorem_3_1(seed):
    """P(Yb | do(xb)) = P(Yb | xb), exactly, in the report and by the tables."""
    _, spec, cause, effect, _ = random_question(seed, vectors=False)
    truth = Oracle(spec).question(cause, effect)
    for value in truth.reachable():
        seen, done = truth.seen(value), truth.done(truth.natural(value))
        np.testing.assert_allclose(seen, done, atol=1e-12)
    report = pm.confounding(spec.model, cause.variable, thing(effect))
    assert report.verdict == "inhibiting" and report.method == "exact: finite"
    assert report.distance.max() < 1e-12 and report.divergence.max() < 1e-12


def test_generic_confounded_programs():
    """With an arrow past the micro state, generically inducing; as the tables say."""
    verdicts = []
    for seed in questions(True):
        _, spec, cause, effect, _ = random_question(seed, vectors=False)
        truth = Oracle(spec).question(cause, effect)
        gap = max(
            np.abs(truth.seen(v) - truth.done(truth.natural(v))).sum() / 2
            for v in truth.reachable()
        )
        report = pm.confounding(spec.model, cause.variable, thing(effect))
        assert report.distance.max().item() == pytest.approx(gap, abs=1e-10)
        assert report.verdict == ("inducing" if gap > 1e-8 else "inhibiting")
        verdicts.append(report.verdict)
    assert verdicts.count("inducing") > PROGRAMS / 2


CAUSE = Macro("cause", ("x1", "x2"), (), pm.Sum(), lambda x: x.sum(-1))
SITES = {
    "x1": ([0, 1, 2], (1, 1, 1)),
    "x2": ([0, 1], (1, 1, 1)),
    "y": ([0, 1], (1, 1, 1)),
}


def shop(p1, p2):
    x1 = pyro.sample("x1", dist.Binomial(2, torch.tensor(p1)))
    x2 = pyro.sample("x2", dist.Bernoulli(p2))
    pyro.sample("y", dist.Bernoulli(0.1 + 0.1 * x1 + 0.6 * x2))


@pytest.mark.parametrize("other", [(0.8, 0.5), (0.3, 0.1)])
def test_definition_9_context_dependence(other):
    """Another P(X), another kernel; and the kernel of one context induces elsewhere."""
    contexts = [(0.3, 0.5), other]
    truths = [
        Oracle.of_runs(lambda p=p: shop(*p), SITES).question(CAUSE, "y")
        for p in contexts
    ]
    here, there = truths
    assert np.abs(here.natural(1.0) - there.natural(1.0)).max() > 0.1
    at = here.reachable()
    laws = [(v, (here.states, here.natural(v))) for v in at]
    for p, verdict in zip(contexts, ["inhibiting", "inducing"], strict=True):
        report = pm.confounding(
            shop, CAUSE.variable, "y", explicit(laws), at, model_args=p
        )
        assert report.verdict == verdict
        natural = pm.confounding(shop, CAUSE.variable, "y", model_args=p)
        assert natural.verdict == "inhibiting" and natural.distance.max() < 1e-12
    law = {}
    for p in contexts:
        model = pm.macro_do(shop, {CAUSE.variable: pm.Natural(1.0)})
        law[p] = pyro.poutine.trace(model).get_trace(*p).nodes["cause__micro"]["fn"]
    for p, truth in zip(contexts, truths, strict=True):
        on = truth.natural(1.0) > 0
        weights = law[p].log_prob(torch.tensor(truth.states[on])).exp()
        np.testing.assert_allclose(weights, truth.natural(1.0)[on], atol=1e-12)


def test_definition_9_the_effect_does_not_matter():
    """The natural kernel is P(X | xb), whatever follows and whatever confounds."""

    def model(strength):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x1 = pyro.sample("x1", dist.Bernoulli(0.2 + 0.5 * z))
        pyro.sample("x2", dist.Bernoulli(0.9 - 0.5 * z))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.3 * x1 + strength * z))

    laws = []
    for strength in (0.0, 0.5):
        intervened = pm.macro_do(model, {CAUSE.variable: pm.Natural(1.0)})
        nodes = pyro.poutine.trace(intervened).get_trace(strength).nodes
        states = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
        laws.append(nodes["cause__micro"]["fn"].log_prob(states))
    torch.testing.assert_close(*laws)


PARADOXES = [
    ([0, 0, 1, 1], [0, 0, 1, 1], [[0.3, 0.7, 0, 0], [0, 0, 0.9, 0.1]]),
    ([0, 0, 0, 1], [0, 1, 1], [[0.2, 0.5, 0.3, 0], [0, 0, 0, 1]]),
    ([2, 2, 2, 5, 5], [0, 1, 2, 2], [[0.0, 1.0, 0, 0, 0], [0, 0, 0, 0.5, 0.5]]),
]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("maps", PARADOXES)
def test_theorem_3_2_by_confounding(maps, seed):
    """(Xb, Yb) is not confounded; (X, Yb) is, (X, Y) is, and so is the natural pair."""
    model = paradox(*maps, seed=seed)
    report = pm.confounding(model, model.cause, model.effect, model.realization)
    assert report.verdict == "inhibiting" and report.distance.max() < 1e-12
    assert report.at.tolist() == sorted(set(maps[0]))
    assert report.method == "exact: finite"

    def with_a_coin():
        model()
        pyro.sample("coin", dist.Bernoulli(0.5))

    # The micro state itself, made an aggregate by a coin that counts for nothing
    micro = pm.MacroVariable("micro", ["x", "coin"], aggregation=pm.Linear([1.0, 0.0]))
    for effect in (model.effect, "y"):
        below = pm.confounding(with_a_coin, micro, effect)
        assert below.verdict == "inducing"
        assert below.distance.max().item() == pytest.approx(model.micro_gap, abs=1e-10)
    other = pm.confounding(model, model.cause, model.effect)
    assert other.verdict == "inducing"
