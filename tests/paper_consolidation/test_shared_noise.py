# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix C: noise that two equations have in common is drawn once."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

P = 0.3
DRAWS = 500
STATES = (0.0, 1.0)


def copies(p=P):
    """``M1``: B is random, C and D copy it."""

    def model():
        b = pyro.sample("B", dist.Bernoulli(p))
        pyro.deterministic("C", b)
        pyro.deterministic("D", b)

    return model


def many_copies():
    with pyro.plate("draws", DRAWS):
        a = pyro.sample("A", dist.Beta(2.0, 2.0))
        b = pyro.sample("B", dist.Bernoulli(a))
        pyro.deterministic("C", b)
        pyro.deterministic("D", b)


def explicit_noise():
    """``M2``: R is drawn, and B = [R < A] is not."""
    with pyro.plate("draws", DRAWS):
        a = pyro.sample("A", dist.Beta(2.0, 2.0))
        r = pyro.sample("R", dist.Uniform(0.0, 1.0))
        b = pyro.deterministic("B", (r < a).double())
        pyro.deterministic("C", b)
        pyro.deterministic("D", b)


def values(program, do=None):
    data = {name: torch.as_tensor(value) for name, value in (do or {}).items()}
    trace = poutine.trace(poutine.do(program, data) if data else program).get_trace()
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}


def chance(site, value):
    """The probability of a value, of a site that may be certain."""
    if site["infer"].get("_deterministic"):
        return float(site["value"] == value)
    return float(site["fn"].log_prob(torch.tensor(value)).exp())


def joint(program, names, do=None):
    """Probabilities of the joint states of two binary sites, the second given the
    first."""
    data = {name: torch.as_tensor(value) for name, value in (do or {}).items()}
    program = poutine.do(program, data) if data else program
    one, other = names
    found = {}
    for first in STATES:
        p = chance(poutine.trace(program).get_trace().nodes[one], first)
        found |= {(first, second): 0.0 for second in STATES}
        if p > 0:
            given = poutine.condition(program, data={one: torch.tensor(first)})
            site = poutine.trace(given).get_trace().nodes[other]
            found |= {(first, s): p * chance(site, s) for s in STATES}
    return found


@pytest.mark.parametrize("allow", [(), ("B",)])
@pytest.mark.parametrize("p", [0.1, 0.3, 0.5])
def test_copies_are_always_equal(p, allow):
    fused = pm.consolidate(copies(p), keep=["C", "D"], allow=allow)
    assert set(fused.sites) == {"C", "D"}
    found = joint(fused, ("C", "D"))
    expected = {(0.0, 0.0): 1 - p, (0.0, 1.0): 0.0, (1.0, 0.0): 0.0, (1.0, 1.0): p}
    for pair, probability in expected.items():
        assert found[pair] == pytest.approx(probability, abs=1e-8)
    # Independent copies would differ this often
    assert found[0.0, 1.0] + found[1.0, 0.0] < 2 * p * (1 - p)


@pytest.mark.parametrize("program", [many_copies, explicit_noise])
@pytest.mark.parametrize("keep", [["A", "C", "D"], ["C", "D"], ["D", "C", "A"]])
def test_every_draw_agrees(program, keep):
    fused = pm.consolidate(program, keep=keep, allow=["B"])
    pyro.set_rng_seed(1)
    found = values(fused)
    assert torch.equal(found["C"], found["D"])
    assert 0 < int(found["C"].sum()) < DRAWS
    for b in STATES:
        found = values(fused, {"B": b})
        for name in ("C", "D"):
            assert bool((found[name] == b).all())
    per_draw = (torch.arange(DRAWS) % 2).double()
    found = values(fused, {"B": per_draw})
    assert torch.equal(found["C"], per_draw) and torch.equal(found["D"], per_draw)


@pytest.mark.parametrize("program", [many_copies, explicit_noise])
def test_the_noise_is_below_A(program):
    """B = [R < A] is one with probability A; the printed A < R, with 1 - A."""
    fused = pm.consolidate(program, keep=["A", "C", "D"])
    a = torch.linspace(0.02, 0.98, DRAWS)
    means = []
    for seed in range(20):
        pyro.set_rng_seed(seed)
        found = values(poutine.condition(fused, data={"A": a}))
        means.append([float(found["C"] @ x) / DRAWS for x in (a, 1 - a)])
    slope, flipped = np.mean(means, 0)
    # E[C A] and E[C (1 - A)] for C ~ Bernoulli(A)
    assert slope == pytest.approx(float(a.square().mean()), abs=0.02)
    assert flipped == pytest.approx(float((a * (1 - a)).mean()), abs=0.02)


def test_intervening_on_one_copy_leaves_the_other():
    def model():
        with pyro.plate("draws", 4000):
            copies()()

    fused = pm.consolidate(model, keep=["C", "D"], allow=["B"])
    for value in STATES:
        found = values(fused, {"C": value})
        # What C would have been is what D is
        assert torch.equal(found["C"], found["D"])
        assert float(found["D"].mean()) == pytest.approx(P, abs=0.03)
        for b in STATES:
            found = values(fused, {"C": value, "B": b})
            assert bool((found["D"] == b).all())


# Noisy children of the same noise


def children(p=P):
    def model():
        b = pyro.sample("B", dist.Bernoulli(p))
        pyro.sample("C", dist.Bernoulli(0.1 + 0.8 * b))
        pyro.sample("D", dist.Bernoulli(0.7 - 0.5 * b))

    return model


def enumerated(do, p=P):
    found = dict.fromkeys(itertools.product(STATES, repeat=2), 0.0)
    for b in STATES:
        weight = float(b == do["B"]) if "B" in do else (p if b else 1 - p)
        for c, d in found:
            pc, pd = 0.1 + 0.8 * b, 0.7 - 0.5 * b
            found[c, d] += weight * (pc if c else 1 - pc) * (pd if d else 1 - pd)
    return found


@pytest.mark.parametrize("do", [{}, {"B": 0.0}, {"B": 1.0}], ids=str)
@pytest.mark.parametrize("order", [("C", "D"), ("D", "C")])
def test_noisy_children_stay_dependent(do, order):
    fused = pm.consolidate(children(), keep=order, allow=["B"])
    assert fused.sites == ("C", "D")
    found, expected = joint(fused, ("C", "D"), do), enumerated(do)
    for pair, probability in expected.items():
        assert found[pair] == pytest.approx(probability, abs=1e-8)
    margin = (expected[1, 0] + expected[1, 1]) * (expected[0, 1] + expected[1, 1])
    independent = abs(expected[1, 1] - margin) < 1e-12
    assert independent == bool(do)


def test_gaussian_noise_is_shared():
    def model():
        b = pyro.sample("B", dist.Normal(1.0, 2.0))
        pyro.sample("C", dist.Normal(b, 0.5))
        pyro.sample("D", dist.Normal(3 - b, 1.0))

    fused = pm.consolidate(model, keep=["C", "D"], allow=["B"])
    for do in ({}, {"B": 0.7}):
        b, spread = do.get("B", 1.0), 0.0 if do else 4.0
        mean = np.array([b, 3 - b])
        cov = np.array([[spread + 0.25, -spread], [-spread, spread + 1.0]])
        for point in ((0.0, 0.0), (1.5, -1.0), (-2.0, 4.0)):
            data = dict(zip("CD", map(torch.tensor, point), strict=True))
            under = {n: torch.tensor(v) for n, v in do.items()}
            program = poutine.do(fused, under) if do else fused
            program = poutine.condition(program, data=data)
            found = float(poutine.trace(program).get_trace().log_prob_sum())
            off = np.array(point) - mean
            expected = -0.5 * off @ np.linalg.solve(cov, off)
            expected -= 0.5 * math.log(np.linalg.det(2 * np.pi * cov))
            assert found == pytest.approx(expected, abs=1e-8)


def test_gaussian_copies_are_equal():
    def model():
        b = pyro.sample("B", dist.Normal(1.0, 2.0))
        pyro.deterministic("C", 2 * b)
        pyro.deterministic("D", 1 - b)

    fused = pm.consolidate(model, keep=["C", "D"], allow=["B"])
    drawn = []
    for seed in range(50):
        pyro.set_rng_seed(seed)
        found = values(fused)
        assert float(found["D"]) == pytest.approx(1 - float(found["C"]) / 2, abs=1e-8)
        drawn.append(float(found["C"]))
    assert np.std(drawn) > 1
    found = values(fused, {"B": 0.25})
    assert (float(found["C"]), float(found["D"])) == pytest.approx((0.5, 0.75))


# What is said of it


def test_the_graph_shows_one_latent_cause():
    fused = pm.consolidate(children(), keep=["C", "D"])
    graph = fused.graph
    latent = [n for n, kind in graph.nodes(data="kind") if kind == "latent"]
    assert len(latent) == 1
    assert set(graph.successors(latent[0])) == {"C", "D"}
    alone = pm.consolidate(children(), keep=["C"]).graph
    assert [n for n, kind in alone.nodes(data="kind") if kind == "latent"] == []


@pytest.mark.parametrize(
    "program", [copies(), children(), many_copies, explicit_noise], ids=range(4)
)
@pytest.mark.parametrize("allow", [(), ("B",)])
def test_it_is_not_drawn_more_often(program, allow):
    names = ["C", "D"] if program is not many_copies else ["A", "C", "D"]
    cost = pm.consolidate(program, keep=names, allow=allow).cost
    assert not cost.after.exceeds(cost.before)
    assert cost.after.equations <= cost.before.equations


def test_copies_take_one_draw():
    cost = pm.consolidate(copies(), keep=["C", "D"]).cost
    assert (cost.before.equations, cost.after.equations) == (3, 2)
    assert (cost.before.draws, cost.after.draws) == (1, 1)


def test_the_equations_of_copies():
    fused = pm.consolidate(copies(), keep=["C", "D"])
    assert fused.equations() == ["C := Bernoulli(0.3)", "D := C"]


def test_an_intervention_on_the_noise_in_the_equations():
    """Under do(B) both are B, whatever they would have been."""
    fused = pm.consolidate(copies(), keep=["C", "D"], allow=["B"])
    c, d = fused.equations()
    assert c == "C := B under do(B); else Bernoulli(0.3)"
    assert d in ("D := B under do(B); else C", "D := C under do(B); else C", "D := C")
