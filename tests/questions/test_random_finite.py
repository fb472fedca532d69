# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``confounding`` and its kin on random finite programs, against all joint states.

What the library says is compared with tables that are multiplied out by hand: the
observational law, the laws under interventions by the truncated factorization, and all
that is reported of these.
"""

import numpy as np
import pyro
import pytest
import torch
from finite_programs import (
    Oracle,
    explicit,
    random_question,
    thing,
)

import pyro_macro as pm

PROGRAMS = 200
TOLERANCE = 1e-10


def asked(seed, **kwargs):
    rng, spec, cause, effect, given = random_question(seed, **kwargs)
    truth = Oracle(spec).question(cause, effect, given)
    return rng, spec, cause, effect, given, truth


def confounding(spec, cause, effect, realization, at=None):
    return pm.confounding(
        spec.model, cause.variable, thing(effect), realization, at, num_samples=20
    )


def assert_report(report, truth, wanted):
    """Everything in a report, by tables: ``wanted`` has the laws under ``do``."""
    assert report.method == "exact: finite", report.method
    at = report.at.tolist()
    assert len(at) == len(wanted)
    for i, (value, done) in enumerate(zip(at, wanted, strict=True)):
        seen = truth.seen(value)
        assert done.sum() == pytest.approx(1)
        tables = [(report.observational, seen), (report.interventional, done)]
        for outcomes, row in tables:
            found = outcomes.weights[i].numpy()
            assert found.sum() == pytest.approx(1, abs=TOLERANCE)
            if truth.outcomes.shape[1] == 1:
                assert_same_table(outcomes.values.numpy(), found, truth, row)
            else:
                assert outcomes.values is None
                np.testing.assert_allclose(
                    np.sort(found[found > 1e-14]),
                    np.sort(row[row > 1e-14]),
                    atol=TOLERANCE,
                )
        named = [
            (report.observational_mean, report.observational_variance, seen),
            (report.interventional_mean, report.interventional_variance, done),
        ]
        for mean, variance, row in named:
            wanted_mean, wanted_variance = truth.moments(row)
            flat = mean[i].numpy().reshape(-1), variance[i].numpy().reshape(-1)
            np.testing.assert_allclose(flat[0], wanted_mean, atol=TOLERANCE)
            np.testing.assert_allclose(flat[1], wanted_variance, atol=TOLERANCE)
        distance = np.abs(seen - done).sum() / 2
        assert report.distance[i].item() == pytest.approx(distance, abs=TOLERANCE)
        assert_divergence(report.divergence[i].item(), seen, done)
        verdict = "inhibiting" if distance < 1e-8 else "inducing"
        assert 1e-8 < distance or distance < 1e-12, "neither here nor there"
        assert report.verdicts[i] == verdict
    all_same = set(report.verdicts) == {"inhibiting"}
    assert report.verdict == ("inhibiting" if all_same else "inducing")


def assert_same_table(values, found, truth, row):
    """Probabilities of numbers, those that cannot be left out or not."""
    table = dict(zip(np.round(truth.outcomes[:, 0], 9).tolist(), row, strict=True))
    named = dict(zip(np.round(values, 9).tolist(), found.tolist(), strict=True))
    for value in table.keys() | named.keys():
        wanted = table.get(value, 0.0)
        assert named.get(value, 0.0) == pytest.approx(wanted, abs=TOLERANCE)


def assert_divergence(found, seen, done):
    if ((seen <= 0) & (done > 1e-14)).any():
        assert found == np.inf
        return
    on = done > 0
    wanted = (done[on] * np.log(done[on] / seen[on])).sum()
    assert found == pytest.approx(wanted, abs=1e-9)


def natural_laws(truth, at):
    return [truth.done(truth.natural(value)) for value in at]


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_natural(seed):
    """Definitions 6 to 8; by default at all macro values that there are."""
    _, spec, cause, effect, _, truth = asked(seed)
    reachable = truth.reachable()
    at = reachable if cause.is_vector else None
    report = confounding(spec, cause, effect, pm.Natural, at)
    np.testing.assert_allclose(report.at.numpy(), reachable, atol=1e-12)
    assert_report(report, truth, natural_laws(truth, reachable))


@pytest.mark.parametrize("seed", range(1000, 1000 + PROGRAMS // 2))
def test_natural_given(seed):
    """Theorem 4.1: ``P(X | xb, b)``, ``b`` being as it is in each case."""
    _, spec, cause, effect, given, truth = asked(seed)
    if not given:
        pytest.skip("nothing to be held")
    named = [thing(g) for g in given]

    def realization(value):
        return pm.Natural(value, given=named)

    always = truth.reachable_in_all_contexts()
    sometimes = [v for v in truth.reachable() if not has(always, v)]
    if always:
        report = confounding(spec, cause, effect, realization, always)
        assert_report(report, truth, [truth.done_given(v) for v in always])
    if sometimes:
        with pytest.raises(pm.Infeasible):
            confounding(spec, cause, effect, realization, sometimes[:1])


def has(values, value):
    return any(np.allclose(value, v) for v in values)


@pytest.mark.parametrize("seed", range(2000, 2000 + PROGRAMS // 2))
def test_explicit_and_max_entropy(seed):
    """Any micro-realization; and the uniform one, whatever is likely."""
    rng, spec, cause, effect, _, truth = asked(seed)
    at = truth.reachable()
    fibres = [truth.fibre(value) for value in at]
    weights = [rng.dirichlet(np.full(len(f), 0.7)) for f in fibres]
    flat = [np.full(len(f), 1 / len(f)) for f in fibres]
    laws = list(zip(at, zip(fibres, weights, strict=True), strict=True))
    wanted, uniform = (
        [
            truth.done(truth.independent(f, w))
            for f, w in zip(fibres, kind, strict=True)
        ]
        for kind in (weights, flat)
    )
    report = confounding(spec, cause, effect, explicit(laws), at)
    assert_report(report, truth, wanted)
    report = confounding(spec, cause, effect, pm.MaxEntropy, at)
    assert_report(report, truth, uniform)


@pytest.mark.parametrize("seed", range(3000, 3000 + PROGRAMS // 2))
def test_allocate(seed):
    """A point of each fibre, where it is one of the micro states."""
    _, spec, cause, effect, _, truth = asked(seed)
    rows = cause.aggregation.weights(torch.zeros(truth.size, dtype=torch.float64))
    if rows is None or cause.is_vector:
        pytest.skip("not linear")
    first = int(np.abs(rows[0].numpy()).argmax())
    shares = np.zeros(truth.size)
    shares[first] = 1 / float(rows[0, first])
    at, wanted = [], []
    for value in truth.reachable():
        states = truth.fibre(value)
        on = np.isclose(states, value * shares).all(-1)
        if on.any():
            at.append(value)
            wanted.append(truth.done(truth.independent(states, on.astype(float))))
    if not at:
        pytest.skip("no point in the support")
    report = confounding(
        spec, cause, effect, lambda value: pm.Allocate(value, shares.tolist()), at
    )
    assert_report(report, truth, wanted)


@pytest.mark.parametrize("seed", range(4000, 4000 + PROGRAMS // 4))
def test_macro_scm_exists(seed):
    """Appendix D: whether ``P(xb, yb) <= P(yb | do(xb))``, by tables."""
    rng, spec, cause, effect, _, truth = asked(seed)
    at = truth.reachable()
    fibres = [truth.fibre(value) for value in at]
    points = [np.eye(len(f))[rng.integers(len(f))] for f in fibres]
    laws = list(zip(at, zip(fibres, points, strict=True), strict=True))
    done = [
        truth.done(truth.independent(f, w)) for f, w in zip(fibres, points, strict=True)
    ]
    report = pm.macro_scm_exists(
        spec.model, cause.variable, thing(effect), explicit(laws), at
    )
    excess = [
        (truth.seen(v) * (truth.joint * truth.inside(v)).sum() - row).max()
        for v, row in zip(at, done, strict=True)
    ]
    np.testing.assert_allclose(report.excess, np.clip(excess, 0, None), atol=TOLERANCE)
    assert report.exists_at == tuple(e < 1e-8 for e in excess)
    assert report.exists == all(report.exists_at)
    assert report.linear is None and report.method == "exact: finite"


@pytest.mark.parametrize("seed", range(5000, 5000 + PROGRAMS // 4))
def test_draws_of_the_intervened_program(seed):
    """What macro_do draws has the law that is reported: a chi-squared test."""
    _, spec, cause, effect, _, truth = asked(seed, vectors=False)
    at = truth.reachable()
    value = at[len(at) // 2]
    report = confounding(spec, cause, effect, pm.Natural, [value])
    if truth.outcomes.shape[1] > 1:
        pytest.skip("an effect that is a vector")
    model = pm.macro_do(spec.model, {cause.variable: pm.Natural(float(value))})
    if not isinstance(effect, str):
        model = pm.aggregate(model, [effect.variable])
    name = effect if isinstance(effect, str) else effect.name
    with pyro.plate("draws", 4000, dim=-3):
        trace = pyro.poutine.trace(model).get_trace()
    drawn = trace.nodes[name]["value"].double().reshape(-1)
    if len(drawn) == 1:
        drawn = drawn.expand(4000)
    values = report.interventional.values
    weights = report.interventional.weights[0]
    from brute_force import assert_counts

    assert_counts(drawn, values.unsqueeze(-1), weights, level=1e-4)
