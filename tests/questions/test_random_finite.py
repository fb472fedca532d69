# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``confounding`` and its kin on random finite programs, against all joint states.

What the library says is compared with tables that are multiplied out by hand: the
observational law, the laws under interventions by the truncated factorization, and all
that is reported of these.
"""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import assert_counts
from finite_programs import Macro, Oracle, explicit, random_question, thing
from scipy import stats

import pyro_macro as pm

PROGRAMS = 200
TOLERANCE = 1e-10


def seeds(start, count):
    """Some for each run of the tests, and more for the slow ones."""
    slow = [
        pytest.param(start + i, marks=pytest.mark.slow) for i in range(count, 4 * count)
    ]
    return [*range(start, start + count), *slow]


def asked(seed, suits=lambda truth: True, **kwargs):
    """The first question from a seed on that suits a test."""
    while True:
        rng, spec, cause, effect, given = random_question(seed, **kwargs)
        truth = Oracle(spec).question(cause, effect, given)
        if suits(truth):
            return rng, spec, cause, effect, given, truth
        seed += 10_000


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
        assert distance > 1e-8 or distance < 1e-12, "neither here nor there"
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


@pytest.mark.parametrize("seed", seeds(1000, 40))
def test_natural_given(seed):
    """Theorem 4.1: ``P(X | xb, b)``, ``b`` being as it is in each case."""
    _, spec, cause, effect, given, truth = asked(seed, lambda t: len(t.given))
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


@pytest.mark.parametrize("seed", seeds(2000, 40))
def test_explicit(seed):
    """Any micro-realization, on states that are likely or not."""
    rng, spec, cause, effect, _, truth = asked(seed)
    at = truth.reachable()
    fibres = [truth.fibre(value) for value in at]
    weights = [rng.dirichlet(np.full(len(f), 0.7)) for f in fibres]
    laws = list(zip(at, zip(fibres, weights, strict=True), strict=True))
    wanted = [truth.done(truth.independent(f, w)) for _, (f, w) in laws]
    report = confounding(spec, cause, effect, explicit(laws), at)
    assert_report(report, truth, wanted)


@pytest.mark.parametrize("seed", seeds(6000, 60))
def test_max_entropy(seed):
    """Uniform on the states whose elements can all have their values."""
    _, spec, cause, effect, _, truth = asked(seed)
    at = truth.reachable()
    wanted = [truth.done(truth.uniform(value)) for value in at]
    report = confounding(spec, cause, effect, pm.MaxEntropy, at)
    assert_report(report, truth, wanted)


def points(truth):
    """Macro values, rows over micro states, and shares, if an allocation suits."""
    cause = truth.cause
    rows = cause.aggregation.weights(torch.zeros(truth.size, dtype=torch.float64))
    if rows is None or cause.is_vector:
        return []
    first = int(np.abs(rows[0].numpy()).argmax())
    shares = np.zeros(truth.size)
    shares[first] = 1 / float(rows[0, first])
    found = []
    for value in truth.reachable():
        states = truth.fibre(value)
        on = np.isclose(states, value * shares).all(-1)
        if on.any():
            row = truth.independent(states, on.astype(float))
            found.append((value, row, shares))
    return found


@pytest.mark.parametrize("seed", seeds(3000, 30))
def test_allocate(seed):
    """A point of each fibre, where it is one of the micro states."""
    _, spec, cause, effect, _, truth = asked(seed, points)
    found = points(truth)
    at = [value for value, _, _ in found]
    wanted = [truth.done(row) for _, row, _ in found]
    shares = found[0][2]
    report = confounding(
        spec, cause, effect, lambda value: pm.Allocate(value, shares.tolist()), at
    )
    assert_report(report, truth, wanted)


@pytest.mark.parametrize("seed", seeds(4000, 30))
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


@pytest.mark.parametrize("seed", seeds(5000, 30))
def test_draws_of_the_intervened_program(seed):
    """What macro_do draws has the law that is reported: a chi-squared test."""

    def suits(truth):
        several = [len(truth.fibre(v, 0)) for v in truth.reachable()]
        return truth.outcomes.shape[1] == 1 and max(several) > 1

    _, spec, cause, effect, _, truth = asked(seed, suits, vectors=False)
    at = truth.reachable()
    value = at[len(at) // 2]
    report = confounding(spec, cause, effect, pm.Natural, [value])
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
    assert_counts(drawn, values.unsqueeze(-1), weights, level=1e-4)


# Programs as people write them

ONE = ([0, 1], (1, 1, 1))
TWO = ([0, 1], (1, 1, 2))  # elements of an event dimension
PLATE = ([0, 1], (1, 2, 1))


def hand(name, micro, over=(), aggregation=None, by_hand=None):
    aggregation = pm.Sum() if aggregation is None else aggregation
    return Macro(name, micro, over, aggregation, by_hand or (lambda x: x.sum(-1)))


PAIR = hand("cause", ("x1", "x2"))
EVENT = hand("cause", ("x",))
OVER = hand("cause", ("x",), ("o",))


def pair(z, low=0.3):
    x1 = pyro.sample("x1", dist.Bernoulli(low + 0.4 * z))
    x2 = pyro.sample("x2", dist.Bernoulli(0.6 - 0.3 * z))
    return x1, x2


def in_a_plate(z):
    with pyro.plate("o", 2, dim=-1):
        return pyro.sample("x", dist.Bernoulli(torch.tensor([0.3, 0.6]) * (0.5 + z)))


def sums_a_plate():
    """The most natural way to write it: the sum of what the plate has returned."""
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x = in_a_plate(0.5 * z)
    pyro.sample("y", dist.Bernoulli(0.1 + 0.3 * x.sum(-1) + 0.2 * z))


def sums_everything():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x = in_a_plate(0.5 * z)
    pyro.sample("y", dist.Bernoulli(0.1 + 0.3 * x.sum() + 0.2 * z))


def averages_everything():
    """Side by side this is a probability, too, and a wrong one."""
    z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.4, 0.7])).to_event(1))
    x = pyro.sample("x", dist.Bernoulli(0.2 + 0.5 * z).to_event(1))
    pyro.sample("y", dist.Bernoulli(0.1 + 0.5 * x.mean() + 0.3 * z.mean()))


def takes_the_largest():
    z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.4, 0.7])).to_event(1))
    x = pyro.sample("x", dist.Bernoulli(0.2 + 0.5 * z).to_event(1))
    pyro.sample("y", dist.Bernoulli(0.1 + 0.5 * x.max() + 0.3 * z.min()))


def turns_a_matrix():
    """``x @ w`` and ``.T`` are fine alone, and something else side by side."""
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x = pyro.sample("x", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
    w = torch.tensor([0.3, 0.2])
    pyro.sample("y", dist.Bernoulli(0.1 + w @ x.T + 0.2 * z))


def normalizes():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x = pyro.sample("x", dist.Bernoulli(0.3 + 0.4 * z.expand(2)).to_event(1))
    share = (1 + x) / (1 + x).sum()
    pyro.sample("y", dist.Categorical(share * (1 - 0.5 * z) + 0.25 * z))


def branches():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x1, x2 = pair(z)
    p = 0.1 if z > 0 else 0.5
    pyro.sample("y", dist.Bernoulli(p + 0.2 * x1 + 0.1 * x2))


def branches_on_a_micro_site():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x1, x2 = pair(z)
    p = 0.1 if x1 > 0 else 0.5
    pyro.sample("y", dist.Bernoulli(p + 0.2 * x2 + 0.2 * z))


def reads_a_number():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x1, x2 = pair(z)
    pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * z.item() + 0.2 * x1 + 0.1 * x2))


def branches_on_all():
    """True for one of sixteen joint values of what is upstream, and never for all."""
    z = pyro.sample("z", dist.Bernoulli(torch.full((4,), 0.7)).to_event(1))
    x1, x2 = pair(z[..., 0])
    p = 0.5 if (z > 0).all() else 0.1
    pyro.sample("y", dist.Bernoulli(p + 0.2 * x1 + 0.1 * x2 + 0.1 * z[..., 0]))


def branches_on_all_micro_sites():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x = pyro.sample(
        "x", dist.Bernoulli(0.3 + 0.4 * z.unsqueeze(-1).expand(4)).to_event(1)
    )
    p = 0.7 if bool((x > 0).all()) else 0.1
    pyro.sample("y", dist.Bernoulli(p + 0.2 * z))


def branches_rarely():
    """On one of 125 joint values, a likely one."""
    values = torch.tensor([0.02] * 4 + [0.92])
    z = pyro.sample("z", dist.Categorical(values.expand(3, 5)).to_event(1))
    x1, x2 = pair((z[..., 0] > 3).double())
    p = 0.6 if (z == 4).all() else 0.1
    pyro.sample("y", dist.Bernoulli(p + 0.2 * x1 + 0.1 * x2))


def indexes():
    z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.5, 0.3])))
    x1, x2 = pair(0.5 * z)
    table = torch.tensor([[0.1, 0.7], [0.4, 0.2], [0.9, 0.5]])
    pyro.sample("y", dist.Bernoulli(table[z.long(), x1.long()] * (1 - 0.3 * x2)))


def indexes_event_values():
    """One row of the table for each element: vectorized over what comes first."""
    table = torch.tensor([[0.1, 0.7], [0.4, 0.2]])
    z = pyro.sample("z", dist.Categorical(torch.tensor([0.2, 0.8])))
    x = pyro.sample("x", dist.Bernoulli(table[z]).to_event(1))
    pyro.sample("y", dist.Bernoulli(0.2 + 0.3 * x[..., 0] * x[..., 1] + 0.2 * z))


def indexes_from_the_left():
    """``x[0]`` is an element alone, and another thing side by side."""
    z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.2, 0.8])).to_event(1))
    x = pyro.sample("x", dist.Bernoulli(0.2 + 0.5 * z).to_event(1))
    pyro.sample("y", dist.Bernoulli(0.1 + 0.4 * x[0] * z[1] + 0.2 * x[1]))


def parameter():
    p = pyro.param("p", torch.tensor(0.4), constraint=dist.constraints.unit_interval)
    z = pyro.sample("z", dist.Bernoulli(p))
    x1, x2 = pair(z)
    pyro.sample("y", dist.Bernoulli(p * (0.5 + 0.3 * x1 * z) + 0.2 * x2))


def single_precision():
    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4, dtype=torch.float32)))
    x1, x2 = pair(z)
    pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * z + 0.2 * x1 + 0.1 * x2))


def by_logits():
    z = pyro.sample("z", dist.Bernoulli(logits=torch.tensor(-0.4)))
    x1, x2 = pair(z)
    pyro.sample("y", dist.Categorical(logits=torch.stack([z, x1, 2 * x2], -1)))


def sequential_plate():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    xs = [
        pyro.sample(f"x{i}", dist.Bernoulli(0.2 * i + 0.3 * z))
        for i in pyro.plate("places", 3)
    ]
    pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * sum(xs) + 0.2 * z))


def has_other_sites():
    """What does not matter may be anything."""
    z = pyro.sample("z", dist.Bernoulli(0.4))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    x1, x2 = pair(z)
    y = pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * z + 0.2 * x1 + 0.1 * x2))
    pyro.sample("w", dist.Normal(y, scale))


def has_an_observation_beside():
    z = pyro.sample("z", dist.Bernoulli(0.4))
    x1, x2 = pair(z)
    pyro.sample("w", dist.Normal(0.0, 1.0), obs=torch.tensor(3.0))
    pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * z + 0.2 * x1 + 0.1 * x2))


THREE = {"z": ([0, 1, 2], (1, 1, 1)), "x1": ONE, "x2": ONE, "y": ONE}
SIMPLE = {"z": ONE, "x1": ONE, "x2": ONE, "y": ONE}
EVENTS = {"z": TWO, "x": TWO, "y": ONE}
WRITTEN = [
    (sums_a_plate, OVER, {"z": ONE, "x": PLATE, "y": ONE}),
    (sums_everything, OVER, {"z": ONE, "x": PLATE, "y": ONE}),
    (averages_everything, EVENT, EVENTS),
    (takes_the_largest, EVENT, EVENTS),
    (turns_a_matrix, EVENT, {"z": ONE, "x": TWO, "y": ONE}),
    (normalizes, EVENT, {"z": ONE, "x": TWO, "y": ONE}),
    (branches, PAIR, SIMPLE),
    (branches_on_a_micro_site, PAIR, SIMPLE),
    (reads_a_number, PAIR, SIMPLE),
    (branches_on_all, PAIR, SIMPLE | {"z": ([0, 1], (1, 1, 4))}),
    (
        branches_on_all_micro_sites,
        EVENT,
        {"z": ONE, "x": ([0, 1], (1, 1, 4)), "y": ONE},
    ),
    (indexes, PAIR, THREE),
    (indexes_event_values, EVENT, {"z": ONE, "x": TWO, "y": ONE}),
    (indexes_from_the_left, EVENT, EVENTS),
    (parameter, PAIR, SIMPLE),
    (single_precision, PAIR, SIMPLE),
    (by_logits, PAIR, SIMPLE | {"y": ([0, 1, 2], (1, 1, 1))}),
    (sequential_plate, hand("cause", ("x0", "x1", "x2")), SIMPLE | {"x0": ONE}),
    (has_other_sites, PAIR, SIMPLE),
    (has_an_observation_beside, PAIR, SIMPLE),
]
SITES = ["z", "x0", "x1", "x2", "x", "y"]


def truth_of(model, cause, sites, given=()):
    ordered = {name: sites[name] for name in SITES if name in sites}
    return Oracle.of_runs(model, ordered).question(cause, "y", given)


def assert_exact(report, truth, wanted, tolerance=TOLERANCE):
    """The report has these laws of an effect that is 0, 1, ...."""
    for i, (value, done) in enumerate(zip(report.at.tolist(), wanted, strict=True)):
        assert report.method == "exact: finite"
        for outcomes, row in [
            (report.observational, truth.seen(value)),
            (report.interventional, done),
        ]:
            np.testing.assert_allclose(outcomes.weights[i], row, atol=tolerance)


@pytest.mark.parametrize("case", WRITTEN, ids=lambda case: case[0].__name__)
def test_programs_as_people_write_them(case):
    """The answer is right, or there is none: never silently wrong."""
    model, cause, sites = case
    truth = truth_of(model, cause, sites)
    single = model is single_precision or model is has_other_sites
    tolerance = 1e-6 if single else TOLERANCE
    report = pm.confounding(model, cause.variable, "y", num_samples=20)
    np.testing.assert_allclose(report.at, truth.reachable())
    assert_exact(report, truth, natural_laws(truth, truth.reachable()), tolerance)
    confounded = any(
        np.abs(truth.seen(v) - truth.done(truth.natural(v))).max() > 1e-6
        for v in truth.reachable()
    )
    assert report.verdict == ("inducing" if confounded else "inhibiting")
    held = truth_of(model, cause, sites, ["z"])
    always = held.reachable_in_all_contexts()
    report = pm.confounding(
        model, cause.variable, "y", lambda value: pm.Natural(value, given=["z"]), always
    )
    assert_exact(report, held, [held.done_given(v) for v in always], tolerance)


def test_a_branch_that_is_rare_and_likely():
    """Right, or refused: a check of some joint values cannot see this."""
    full = 0.92**3
    cause = hand("cause", ("x1", "x2"))
    # By hand: P(y = 1) from the branch alone, at xb = 0
    first = 0.92  # the first element is four
    none_if_four = 0.3 * 0.7  # of x1, x2
    none_else = 0.7 * 0.4
    total = first * none_if_four + (1 - first) * none_else
    wanted = 0.1 + 0.5 * full * none_if_four / total
    try:
        report = pm.confounding(
            branches_rarely, cause.variable, "y", at=[0.0], num_samples=20
        )
    except pm.PyroMacroError:
        return
    assert report.method == "exact: finite"
    assert report.observational_mean.item() == pytest.approx(wanted, abs=1e-9)


def test_residual_of_finite_sites():
    """x2 takes up the rest, which it always can at these values."""

    def model():
        x1 = pyro.sample("x1", dist.Bernoulli(0.3))
        x2 = pyro.sample("x2", dist.Binomial(3, 0.4))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.5 * x1 + 0.1 * x2))

    sites = {"x1": ONE, "x2": ([0, 1, 2, 3], (1, 1, 1)), "y": ONE}
    truth = truth_of(model, PAIR, sites)
    at = [1.0, 2.0, 3.0]
    report = pm.confounding(
        model, PAIR.variable, "y", lambda value: pm.Residual(value, absorb="x2"), at
    )
    wanted = []
    for value in at:
        weights = [{0: 0.7, 1: 0.3}[x1] * (x1 + x2 == value) for x1, x2 in truth.states]
        wanted.append(truth.done(np.array(weights)))
    assert_exact(report, truth, wanted)
    assert report.verdict == "inducing"


def test_macro_values_that_cannot_be_reached():
    def model():
        x1 = pyro.sample("x1", dist.Bernoulli(0.3))
        x2 = pyro.sample("x2", dist.Binomial(2, torch.tensor(0.0)))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.5 * x1 + 0.1 * x2))

    for question in (pm.confounding, pm.can_inhibit, pm.macro_scm_exists):
        for value in (2.0, 0.5, -1.0, 1e9):  # 2 is a state of probability zero
            with pytest.raises(pm.Infeasible, match="cannot be reached") as error:
                question(model, PAIR.variable, "y", at=[1.0, value])
            assert "0.0, 1.0." in str(error.value)
        found = question(model, PAIR.variable, "y")
        assert found.at.tolist() == [0.0, 1.0]
    intervened = pm.macro_do(model, {PAIR.variable: pm.Inhibiting(2.0, "y")})
    with pytest.raises(pm.Infeasible, match="cannot be reached"):
        intervened()


def test_too_many_joint_values():
    """More than 2^22: draws, and the report says so."""

    def model():
        with pyro.plate("o", 23, dim=-1):
            x = pyro.sample("x", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Bernoulli(0.2 + 0.02 * x.sum(-1, keepdim=True)))

    report = pm.confounding(
        model, OVER.variable, "y", at=[5.0, 9.0], num_samples=400, progress=False
    )
    assert "Monte Carlo" in report.method and report.method != "exact: finite"
    assert report.num_samples == 400
    torch.testing.assert_close(
        report.interventional_mean.flatten(),
        torch.tensor([0.3, 0.38]),
        atol=5 * (0.25 / 400) ** 0.5,
        rtol=0,
    )
    for question in (pm.can_inhibit, pm.macro_scm_exists):
        with pytest.raises(pm.UnsupportedLaw, match="joint values"):
            question(model, OVER.variable, "y", at=[5.0])


def test_observed_sites_are_refused():
    def model(at=None):
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x1, x2 = pair(z)
        pyro.sample("seen", dist.Bernoulli(0.2 + 0.6 * z), obs=torch.tensor(1.0))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * x1 + 0.3 * z), obs=at)

    variable = PAIR.variable
    for question in (pm.confounding, pm.can_inhibit, pm.macro_scm_exists):
        with pytest.raises(pm.UnsupportedLaw, match="'seen' is observed"):
            question(model, variable, "y")
        with pytest.raises(pm.UnsupportedLaw, match="is observed"):
            question(model, variable, "y", model_args=(torch.tensor(1.0),))
    with pytest.raises(pm.UnsupportedLaw, match="is observed"):
        pm.macro_adjust(model, variable, "y", ["z"])
    with pytest.raises(pm.UnsupportedLaw, match="is observed"):
        pm.blocks_backdoor(model, variable, "y", ["z"])
    with pytest.raises(pm.UnsupportedLaw, match="is observed"):
        pm.irrelevant_cause(model, "z", variable, "y")
    # Without the observation, and with a condition on what it depends on
    open_model = pyro.poutine.uncondition(model)
    truth = truth_of(open_model, PAIR, SIMPLE | {"seen": ONE})
    assert "seen" not in truth.oracle.probs
    report = pm.confounding(open_model, variable, "y")
    assert_exact(report, truth, natural_laws(truth, truth.reachable()))
    held = pyro.poutine.condition(model, data={"z": torch.tensor(1.0)})
    assert pm.confounding(held, variable, "y").verdict == "inhibiting"


def test_the_parameter_of_a_program_counts_as_it_is():
    """The value in the store, not that at the start; and the store stays as it is."""
    truth = truth_of(parameter, PAIR, SIMPLE)
    pyro.get_param_store()["p"] = torch.tensor(0.9)
    moved = truth_of(parameter, PAIR, SIMPLE)
    assert np.abs(truth.seen(1.0) - moved.seen(1.0)).max() > 0.05
    report = pm.confounding(parameter, PAIR.variable, "y")
    assert_exact(report, moved, natural_laws(moved, moved.reachable()))
    assert not report.observational_mean.requires_grad
    assert list(pyro.get_param_store().keys()) == ["p"]
    pyro.clear_param_store()
    pm.confounding(parameter, PAIR.variable, "y")
    assert not list(pyro.get_param_store().keys())


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    pm.confounding(branches, PAIR.variable, "y")
    pm.can_inhibit(branches, PAIR.variable, "y")
    assert torch.equal(before, torch.get_rng_state())


def test_many_macro_values_are_quantiles():
    """Fifty-one or more: the values at the quantiles of P(xb), each reachable."""

    def model():
        x1 = pyro.sample("x1", dist.Binomial(30, 0.45))
        x2 = pyro.sample("x2", dist.Binomial(29, 0.45))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.01 * x1 + 0.005 * x2))

    report = pm.confounding(model, PAIR.variable, "y")
    wanted = stats.binom(59, 0.45).ppf([0.05, 0.25, 0.5, 0.75, 0.95])
    assert report.at.tolist() == wanted.tolist()
    assert report.verdict == "inhibiting" and report.method == "exact: finite"
    # x1 given the sum is hypergeometric
    mean = 0.1 + (0.01 * 30 + 0.005 * 29) / 59 * report.at
    torch.testing.assert_close(report.observational_mean, mean)
    torch.testing.assert_close(report.interventional_mean, mean)
