# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Section 4 in finite programs: Lemma 10, Lemma 11, Theorem 4.1, by joint states."""

import warnings

import networkx as nx
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from finite_programs import Macro, Oracle, random_question, thing

import pyro_macro as pm

PROGRAMS = 60
ONE = ([0, 1], (1, 1, 1))


# Lemma 10


def chain(seed, kind):
    """X -> Y -> Z, four values each; ``kind`` says why (12) holds, if it does."""
    rng = np.random.default_rng(seed)
    p_x, p_y, p_z = (rng.dirichlet(np.ones(4), n) for n in [(1,), (4,), (4,)])
    labels = np.array([0, 0, 1, 1])
    if kind == "Z depends on Yb":
        p_z = p_z[[0, 0, 2, 2]]
    elif kind == "X depends on Y through Yb":
        to_yb = rng.dirichlet(np.ones(2), 4)
        within = rng.dirichlet(np.ones(2), 2)
        p_y = np.concatenate([to_yb[:, :1] * within[0], to_yb[:, 1:] * within[1]], 1)
    elif kind == "Xb does not act":
        p_y = p_y[[0, 1, 0, 1]]
        p_x = np.outer([0.3, 0.7], [0.4, 0.6]).reshape(1, 4)
    elif kind == "Zb is coarse":
        mass = np.array([[0.2, 0.8]] * 2 + [[0.6, 0.4]] * 2)
        shares = rng.dirichlet(np.ones(2), (4, 2))
        p_z = (mass[..., None] * shares).reshape(4, 4)
    tables = [torch.tensor(t) for t in (p_x[0], p_y, p_z)]

    def model():
        x = pyro.sample("x", dist.Categorical(tables[0]))
        y = pyro.sample("y", dist.Categorical(tables[1][x]))
        pyro.sample("z", dist.Categorical(tables[2][y]))

    def by_hand(state):
        return labels[state[..., 0].astype(int)]

    def macro(name, site):
        return Macro(name, (site,), (), pm.Coarsen([0, 0, 1, 1]), by_hand)

    sites = {name: (range(4), (1, 1, 1)) for name in "xyz"}
    macros = macro("xb", "x"), macro("yb", "y"), macro("zb", "z")
    return model, macros, Oracle.of_runs(model, sites)


HOLDS = [
    "Z depends on Yb",
    "X depends on Y through Yb",
    "Xb does not act",
    "Zb is coarse",
]


def realized_both_ways(oracle, xb, yb, zb):
    """How far the effects of ``P(Y | yb)`` and ``P(Y | yb, xb)`` are apart."""
    truth = oracle.question(yb, zb, [xb])
    worst = 0.0
    for value in truth.reachable():
        one = truth.done(truth.natural(value))
        for c in set(truth.context):
            inside = truth.context == c
            if (truth.joint * truth.inside(value) * inside).sum() > 0:
                other = truth.done(truth.natural(value, inside))
                worst = max(worst, np.abs(one - other).sum() / 2)
    return worst


def dependence(oracle, xb, yb, zb):
    """The largest total variation of P(xb, zb | yb) from the product."""
    truth = oracle.question(yb, zb, [xb])
    worst = 0.0
    for value in truth.reachable():
        weight = truth.joint * truth.inside(value)
        table = truth._table(truth.context, truth.outcome, weight)
        table /= table.sum()
        product = table.sum(1, keepdims=True) * table.sum(0, keepdims=True)
        worst = max(worst, np.abs(table - product).sum() / 2)
    return worst


@pytest.mark.parametrize("kind", ["any", *HOLDS])
@pytest.mark.parametrize("seed", range(4))
def test_lemma_10(seed, kind):
    """Both realizations of yb have the same effect if and only if (12) holds."""
    model, (xb, yb, zb), oracle = chain(seed, kind)
    report = pm.irrelevant_cause(model, xb.variable, yb.variable, zb.variable)
    apart = realized_both_ways(oracle, xb, yb, zb)
    assert report.holds == bool(report) == (apart < 1e-9) == (kind != "any")
    assert report.method == "exact: finite" and report.p_value is None
    assert report.deviation == pytest.approx(dependence(oracle, xb, yb, zb), abs=1e-12)
    # The same by questions about effects
    seen, held = (
        pm.confounding(model, yb.variable, zb.variable, realization)
        for realization in (
            pm.Natural,
            lambda value: pm.Natural(value, given=[xb.variable]),
        )
    )
    assert seen.verdict == "inhibiting"
    truth = oracle.question(yb, zb, [xb])
    for i, value in enumerate(truth.reachable()):
        np.testing.assert_allclose(
            held.interventional.weights[i], truth.done_given(value), atol=1e-12
        )
    if kind != "any":
        assert held.verdict == "inhibiting"


# Lemma 11 and Theorem 4.1


def counterfactual(truth, effect_states=None):
    """(15) by what is upstream: how far the effect under set ``x`` tells of ``x'``.

    In each configuration ``u`` of what the micro state does not act on, the natural
    micro state and the effect under a micro state that is set are independent: their
    noises are different ones. Mixed over the ``u`` with one ``b`` they may not be.
    """
    oracle, cause = truth.oracle, truth.cause
    graph = oracle.spec.graph
    below = set().union(*(nx.descendants(graph, m) for m in cause.micro))
    upstream = [n for n in graph if n not in below and n not in cause.micro]
    n = len(truth.joint)
    rows = [oracle.of(name) for name in upstream] + [np.zeros((n, 1))]
    u = np.unique(np.concatenate(rows, -1), axis=0, return_inverse=True)[1].reshape(-1)
    product = {
        part: np.prod(
            [oracle.probs[m] for m in names if m in oracle.probs] + [np.ones(n)], axis=0
        )
        for part, names in [
            ("before", upstream),
            ("state", cause.micro),
            ("after", below),
        ]
    }
    size = u.max() + 1, len(truth.states), len(truth.outcomes)
    before, context = np.zeros(size[0]), np.zeros(size[0], dtype=int)
    before[u], context[u] = product["before"], truth.context
    state = np.zeros(size[:2])
    state[u, truth.state] = product["state"]
    effect = np.zeros(size)
    np.add.at(effect, (u, truth.state, truth.outcome), product["after"])
    worst = 0.0
    for c in set(context):
        inside = context == c
        weight = before[inside] / max(before[inside].sum(), 1e-300)
        for x in range(size[1]):
            joint = np.einsum("u,us,uy->sy", weight, state[inside], effect[inside, x])
            if joint.sum() > 0:
                away = joint - joint.sum(1, keepdims=True) * joint.sum(0)
                worst = max(worst, np.abs(away).sum() / 2)
    return worst


def adjusted(truth, value):
    """``sum_b P(b) P(yb | xb, b)``."""
    result = np.zeros(len(truth.outcomes))
    for c in set(truth.context):
        weight = truth.joint * truth.inside(value) * (truth.context == c)
        p = truth.cut_of(c)
        if p > 0:
            row = np.bincount(truth.outcome, weight, len(truth.outcomes))
            result += p * row / row.sum()
    return result


def asked(seed):
    while True:
        _, spec, cause, effect, given = random_question(seed, vectors=False)
        if given:
            return spec, cause, effect, given
        seed += 10_000


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_theorem_4_1(seed):
    """(15), both sides of the adjustment formula, and the warning where it fails."""
    spec, cause, effect, given = asked(seed)
    truth = Oracle(spec).question(cause, effect, given)
    wanted = counterfactual(truth)
    named = [thing(g) for g in given]
    arguments = (spec.model, cause.variable, thing(effect))
    condition = pm.blocks_backdoor(*arguments, named)
    assert condition.deviation == pytest.approx(wanted, abs=1e-10)
    assert condition.holds == (wanted < 1e-9) and condition.method == "exact: finite"
    at = truth.reachable_in_all_contexts()
    if not at:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = pm.macro_adjust(*arguments, named, at)
    told = any(issubclass(w.category, pm.NotAdjusted) for w in caught)
    assert told == (not condition.holds)
    assert report.condition.deviation == condition.deviation
    for i, value in enumerate(at):
        rows = adjusted(truth, value), truth.seen(value), truth.done_given(value)
        found = [
            (report.mean, report.variance),
            (report.observational_mean, report.observational_variance),
            (report.interventional_mean, report.interventional_variance),
        ]
        for (mean, variance), row in zip(found, rows, strict=True):
            flat = mean[i].reshape(-1), variance[i].reshape(-1)
            np.testing.assert_allclose(flat[0], truth.moments(row)[0], atol=1e-10)
            np.testing.assert_allclose(flat[1], truth.moments(row)[1], atol=1e-10)
        if condition.holds:  # Theorem 4.1
            np.testing.assert_allclose(rows[0], rows[2], atol=1e-10)


def test_random_programs_of_both_kinds():
    """The test above sees adjustments that hold and that do not."""
    found = []
    for seed in range(PROGRAMS):
        spec, cause, effect, given = asked(seed)
        truth = Oracle(spec).question(cause, effect, given)
        found.append(counterfactual(truth) < 1e-9)
    assert 5 < sum(found) < PROGRAMS - 5


@pytest.mark.parametrize("seed", range(20))
def test_without_adjustment(seed):
    """(15) given nothing: natural and set micro states, with all that is upstream."""
    _, spec, cause, effect, _ = random_question(seed, vectors=False)
    truth = Oracle(spec).question(cause, effect)
    condition = pm.blocks_backdoor(spec.model, cause.variable, thing(effect))
    assert condition.deviation == pytest.approx(counterfactual(truth), abs=1e-10)
    if condition.holds:
        report = pm.confounding(spec.model, cause.variable, thing(effect))
        assert report.verdict == "inhibiting"


SALES = pm.MacroVariable("sales", ["x1", "x2"])


def by_a_path(direct=0.0):
    """a -> b -> X and a -> y: both a and b are valid, c is a collider."""
    a = pyro.sample("a", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    p_b = torch.tensor([0.1, 0.6, 0.8])[a.long()]
    b = pyro.sample("b", dist.Bernoulli(p_b))
    x1 = pyro.sample("x1", dist.Bernoulli(0.2 + 0.5 * b))
    x2 = pyro.sample("x2", dist.Bernoulli(0.7 - 0.4 * b))
    pyro.sample("c", dist.Bernoulli(0.1 + 0.2 * a + 0.3 * b))
    pyro.sample("y", dist.Bernoulli(0.05 + 0.2 * x1 * x2 + 0.2 * a + direct * b))


def test_two_valid_adjustment_sets():
    """The same effect of the same micro-intervention: from ``P(X | xb, b)`` at hand.

    b alone, and a with b, are valid and have the same micro-realization. a alone is
    valid, too, but the micro-realization P(X | xb, a) is another one.
    """
    reports = {
        given: pm.macro_adjust(by_a_path, SALES, "y", list(given))
        for given in [("b",), ("a", "b"), ("a",)]
    }
    for report in reports.values():
        assert report.condition.holds
        torch.testing.assert_close(report.mean, report.interventional_mean)
        torch.testing.assert_close(report.variance, report.interventional_variance)
        torch.testing.assert_close(report.mean, reports["b",].mean)
        assert (report.mean - report.observational_mean).abs().max() > 0.01


def test_adjustments_that_fail():
    with pytest.warns(pm.NotAdjusted, match=r"not the case.*\(15\).*Adjust for more"):
        report = pm.macro_adjust(by_a_path, SALES, "y", "c")
    assert not report.condition.holds and report.condition.deviation > 0.01
    assert (report.mean - report.interventional_mean).abs().max() > 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error", pm.NotAdjusted)
        pm.macro_adjust(by_a_path, SALES, "y", ["b", "c"])
    # With an arrow from b to y, a is not enough
    assert pm.blocks_backdoor(by_a_path, SALES, "y", "a", model_args=(0.0,))
    assert not pm.blocks_backdoor(by_a_path, SALES, "y", "a", model_args=(0.1,))
    assert pm.blocks_backdoor(by_a_path, SALES, "y", "b", model_args=(0.1,))
    # A macro-variable that loses what counts
    coarse = pm.MacroVariable("coarse", ["a", "b"], aggregation=pm.Max())
    assert not pm.blocks_backdoor(by_a_path, SALES, "y", [coarse])


def test_lemma_11_means_agree_and_laws_do_not():
    """(14) fails, and yet (13) holds of the mean: the report has both moments."""

    def model():
        x = pyro.sample("x", dist.Bernoulli(torch.tensor([0.5, 0.5])).to_event(1))
        y1 = pyro.sample("y1", dist.Bernoulli(0.1 + 0.8 * x[..., 0]))
        y2 = pyro.sample("y2", dist.Bernoulli(0.1 + 0.8 * x[..., 1]))
        pyro.sample("z", dist.Binomial(4, 0.1 + 0.1 * (y1 + 3 * y2) + 0.4 * x[..., 0]))

    xb = pm.MacroVariable("xb", "x")
    yb = pm.MacroVariable("yb", ["y1", "y2"])
    with pytest.warns(pm.NotAdjusted):
        report = pm.macro_adjust(model, yb, "z", xb)
    assert not report.condition.holds
    sites = {"x": ([0, 1], (1, 1, 2)), "y1": ONE, "y2": ONE, "z": (range(5), (1, 1, 1))}
    truth = Oracle.of_runs(model, sites).question(
        Macro("yb", ("y1", "y2"), (), pm.Sum(), lambda s: s.sum(-1)),
        "z",
        [Macro("xb", ("x",), (), pm.Sum(), lambda s: s.sum(-1))],
    )
    for i, value in enumerate(truth.reachable()):
        row = adjusted(truth, value)
        assert report.mean[i].item() == pytest.approx(truth.moments(row)[0][0])
        done = truth.done_given(value)
        variance = report.interventional_variance[i].item()
        assert variance == pytest.approx(truth.moments(done)[1][0])
    assert pm.blocks_backdoor(model, yb, "z", "x")


def test_what_the_cause_acts_on_is_refused():
    """Definition 12 (i)."""

    def model():
        a = pyro.sample("a", dist.Bernoulli(0.4))
        x1 = pyro.sample("x1", dist.Bernoulli(0.2 + 0.5 * a))
        pyro.sample("x2", dist.Bernoulli(0.2 + 0.5 * a))
        m = pyro.sample("m", dist.Bernoulli(0.2 + 0.5 * x1))
        pyro.sample("y", dist.Bernoulli(0.2 + 0.3 * m + 0.3 * a))

    for ask in (pm.macro_adjust, pm.blocks_backdoor):
        for bad in ("m", "x1"):
            with pytest.raises(
                pm.PyroMacroError, match="downstream of one|Definition 12"
            ):
                ask(model, SALES, "y", ["a", bad])
    with pytest.raises(pm.PyroMacroError, match="nothing is adjusted for"):
        pm.macro_adjust(model, SALES, "y", [])
    with pytest.raises(pm.PyroMacroError, match="Definition 12"):
        pm.irrelevant_cause(model, "m", SALES, "y")


def test_a_context_that_excludes_a_macro_value():
    def model():
        a = pyro.sample("a", dist.Bernoulli(0.4))
        x1 = pyro.sample("x1", dist.Bernoulli(a))
        x2 = pyro.sample("x2", dist.Bernoulli(0.2 + 0.5 * a))
        pyro.sample("y", dist.Bernoulli(0.2 + 0.2 * x1 + 0.2 * x2 + 0.2 * a))

    with pytest.raises(pm.Infeasible, match=r"where \['a'\] is \[0.0\]"):
        pm.macro_adjust(model, SALES, "y", "a", at=[2.0])
    report = pm.macro_adjust(model, SALES, "y", "a", at=[1.0])
    # With a = 1 the state is (1, 0), with a = 0 it is (0, 1)
    wanted = 0.6 * (0.2 + 0.2) + 0.4 * (0.2 + 0.2 + 0.2)
    torch.testing.assert_close(report.mean, torch.tensor([wanted]))
