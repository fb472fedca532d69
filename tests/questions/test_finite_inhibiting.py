# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``Inhibiting`` and ``can_inhibit`` in finite programs: linear programs, by others."""

import builtins

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import assert_counts
from finite_programs import Macro, Oracle, random_question, thing
from pyro.infer import TraceEnum_ELBO, config_enumerate
from scipy.optimize import linprog

import pyro_macro as pm

PROGRAMS = 60
PAIR = Macro("cause", ("x1", "x2"), (), pm.Sum(), lambda x: x.sum(-1))
ONE = ([0, 1], (1, 1, 1))


def asked(seed):
    """A random question about one number each."""
    while True:
        _, spec, cause, effect, _ = random_question(seed, vectors=False, plain=True)
        truth = Oracle(spec).question(cause, effect)
        if truth.outcomes.shape[1] == 1:
            return spec, cause, effect, truth
        seed += 10_000


def problem(truth, value):
    """Kernels of the states on a fibre, what is wanted, and the natural weights."""
    on = np.isclose(cause_of(truth), value)
    # A micro state can be set if each of its sites can have its value
    own = [p for m, p in truth.oracle.probs.items() if m in truth.cause.micro]
    likely = np.bincount(truth.state, np.prod(own, axis=0), len(truth.states)) > 0
    inside = on & likely
    return inside, truth.kernel[inside], truth.seen(value), truth.natural(value)[inside]


def cause_of(truth):
    return truth.cause.by_hand(truth.states).reshape(-1)


def gap_by_another_program(kernel, wanted):
    """The least total variation, as the dual: a function between zero and one."""
    s, y = kernel.shape
    # maximize f.wanted - t with f.kernel_x <= t and 0 <= f <= 1
    costs = np.concatenate([-wanted, [1.0]])
    rows = np.concatenate([kernel, -np.ones((s, 1))], -1)
    bounds = [(0, 1)] * y + [(None, None)]
    found = linprog(costs, A_ub=rows, b_ub=np.zeros(s), bounds=bounds)
    return max(0.0, -found.fun)


def least_distance(kernel, wanted, start):
    """Of exact mixtures from the natural one: only what is added is counted."""
    s, y = kernel.shape
    costs = np.concatenate([np.zeros(s), np.ones(s)])
    rows = np.concatenate([np.eye(s), -np.eye(s)], -1)  # w - start <= u
    equal = np.concatenate([kernel.T, np.zeros((y, s))], -1)
    found = linprog(costs, A_ub=rows, b_ub=start, A_eq=equal, b_eq=wanted)
    assert found.success, found.message
    return found.fun


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_can_inhibit(seed):
    """Feasibility, the gap, certificates and distances, at all macro values."""
    spec, cause, effect, truth = asked(seed)
    report = pm.can_inhibit(spec.model, cause.variable, thing(effect))
    np.testing.assert_allclose(report.at, truth.reachable(), atol=1e-12)
    assert report.method == "exact: finite, linear programs"
    assert report.observational_variance is None and report.norms is None
    for i, value in enumerate(truth.reachable()):
        _, kernel, wanted, start = problem(truth, value)
        gap = gap_by_another_program(kernel, wanted)
        assert not 1e-9 < gap < 1e-6, "neither here nor there"
        assert report.gap[i].item() == pytest.approx(gap, abs=1e-7)
        assert report.feasible_at[i] == (gap < 1e-8)
        certificate = report.certificates[i]
        if gap > 1e-8:
            assert torch.isnan(report.distance[i])
            assert_certificate(certificate, report.outcomes, truth, kernel, wanted)
        else:
            assert certificate is None and report.gap[i] == 0
            distance = least_distance(kernel, wanted, start)
            assert report.distance[i].item() == pytest.approx(distance, abs=1e-7)
    assert report.feasible == all(report.feasible_at)
    assert bool(report.reason) != report.feasible


def assert_certificate(certificate, outcomes, truth, kernel, wanted):
    """``E[f | xb]`` is beyond ``E[f | do(x)]`` for each micro state."""
    place = {round(v, 9): i for i, v in enumerate(truth.outcomes[:, 0].tolist())}
    f = np.zeros(len(truth.outcomes))
    for value, number in zip(outcomes.tolist(), certificate.tolist(), strict=True):
        if round(value, 9) in place:
            f[place[round(value, 9)]] = number
    assert f @ wanted > (kernel @ f).max() + 1e-9


@pytest.mark.parametrize("seed", range(PROGRAMS))
def test_inhibiting(seed):
    """Where there is one, setting the cause has the effect that seeing it has."""
    spec, cause, effect, truth = asked(seed)
    variable, named = cause.variable, thing(effect)
    found = pm.can_inhibit(spec.model, variable, named)
    feasible = [
        v for v, f in zip(found.at.tolist(), found.feasible_at, strict=True) if f
    ]
    for value in set(found.at.tolist()) - set(feasible):
        with pytest.raises(pm.Infeasible, match="total variation distance of"):
            pm.macro_do(spec.model, {variable: pm.Inhibiting(value, named)})()
    if not feasible:
        return
    report = pm.confounding(
        spec.model, variable, named, lambda v: pm.Inhibiting(v, named), feasible
    )
    assert report.method == "exact: finite" and report.verdict == "inhibiting"
    assert report.distance.max() < 1e-9
    for i, value in enumerate(feasible):
        row = truth.seen(value)
        np.testing.assert_allclose(
            report.interventional_mean[i], truth.moments(row)[0][0], atol=1e-9
        )
        law = law_of(spec.model, variable, pm.Inhibiting(value, named))
        inside, kernel, wanted, start = problem(truth, value)
        weights = law.log_prob(torch.tensor(truth.states[inside])).exp().numpy()
        assert weights.sum() == pytest.approx(1, abs=1e-12)
        np.testing.assert_allclose(weights @ kernel, wanted, atol=1e-9)
        distance = np.abs(weights - start).sum() / 2
        assert distance == pytest.approx(
            least_distance(kernel, wanted, start), abs=1e-7
        )


def law_of(model, variable, realization):
    intervened = pm.macro_do(model, {variable: realization})
    node = pyro.poutine.trace(intervened).get_trace().nodes["cause__micro"]
    return getattr(node["fn"], "base_dist", node["fn"])


def by_levels(p_y, p_x=(0.3, 0.7)):
    """z acts on x1, x2 and y; ``p_y`` is indexed by x1, x2, z."""
    table = torch.tensor(p_y, dtype=torch.float64)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        p = torch.tensor(p_x, dtype=torch.float64)[z.long()]
        x1 = pyro.sample("x1", dist.Bernoulli(p))
        x2 = pyro.sample("x2", dist.Bernoulli(1 - 0.9 * p))
        return pyro.sample("y", dist.Bernoulli(table[x1.long(), x2.long(), z.long()]))

    return model


# x2 does much, x1 does little, z does some: mixtures of (0, 1) and (1, 0) reach far
FEASIBLE = by_levels([[[0.2, 0.2], [0.9, 0.8]], [[0.1, 0.15], [0.6, 0.6]]])
# z does everything, the micro state nothing
INFEASIBLE = by_levels([[[0.1, 0.9], [0.1, 0.9]], [[0.1, 0.9], [0.1, 0.9]]])


def tables(model, names=("z", "x1", "x2", "y")):
    return Oracle.of_runs(model, dict.fromkeys(names, ONE)).question(PAIR, "y")


def test_by_hand():
    """One value of y, two states: the weight of (0, 1) solves a linear equation."""
    truth = tables(FEASIBLE)
    seen = truth.seen(1.0)[1]
    one, other = (truth.kernel[i, 1] for i in (1, 2))  # (0, 1) and (1, 0)
    weight = (seen - other) / (one - other)
    assert 0 < weight < 1 and abs(weight - truth.natural(1.0)[1]) > 0.01
    law = law_of(FEASIBLE, PAIR.variable, pm.Inhibiting(1.0, "y"))
    states = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    found = law.log_prob(states).exp()
    torch.testing.assert_close(found, torch.tensor([weight, 1 - weight]))
    report = pm.can_inhibit(FEASIBLE, PAIR.variable, "y", at=[1.0])
    moved = abs(weight - truth.natural(1.0)[1])
    assert report.feasible and report.distance.item() == pytest.approx(moved, abs=1e-9)


def test_draws_of_the_intervened_program():
    """A chi-squared test of (x1, x2), and of y against ``P(y | xb)``."""
    truth = tables(FEASIBLE)
    model = pm.macro_do(FEASIBLE, {PAIR.variable: pm.Inhibiting(1.0, "y")})
    with pyro.plate("draws", 20_000):
        nodes = pyro.poutine.trace(model).get_trace().nodes
    y = nodes["y"]["value"]
    seen = torch.tensor(truth.seen(1.0))
    assert_counts(y, torch.tensor([[0.0], [1.0]]), seen)
    natural = torch.tensor(truth.done(truth.natural(1.0)))
    with pytest.raises(AssertionError, match="chi-squared"):  # which would be told
        assert_counts(y, torch.tensor([[0.0], [1.0]]), natural)
    law = nodes["cause__micro"]["fn"]
    law = getattr(law, "base_dist", law)
    states = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    drawn = torch.stack([nodes["x1"]["value"], nodes["x2"]["value"]], -1)
    assert_counts(drawn, states, law.log_prob(states.unsqueeze(1))[..., 0].exp())
    assert (nodes["cause"]["value"] == 1).all()


def test_no_micro_state_does_anything():
    """The certificate says so in one number: the seen mean is beyond all others."""
    report = pm.can_inhibit(INFEASIBLE, PAIR.variable, "y", at=[0.0, 1.0, 2.0])
    truth = tables(INFEASIBLE)
    assert not report.feasible and "total variation distance of" in report.reason
    for i, value in enumerate((0.0, 1.0, 2.0)):
        # All micro states lead to 0.1 * 0.6 + 0.9 * 0.4 = 0.42
        gap = abs(truth.seen(value)[1] - 0.42)
        assert report.feasible_at[i] == (gap < 1e-9)
        assert report.gap[i].item() == pytest.approx(gap, abs=1e-9)
    assert "No micro-realization" in report.summary()
    assert [row["feasible"] for row in report.rows()] == list(report.feasible_at)


def test_singleton_fibres():
    """Values 0 and 2 have one micro state: feasible only where nothing confounds."""
    report = pm.can_inhibit(FEASIBLE, PAIR.variable, "y")
    truth = tables(FEASIBLE)
    assert report.at.tolist() == [0.0, 1.0, 2.0]
    for i, value in [(0, 0.0), (2, 2.0)]:
        gap = np.abs(truth.seen(value) - truth.done(truth.natural(value))).sum() / 2
        assert report.gap[i].item() == pytest.approx(gap, abs=1e-9)
        assert report.feasible_at[i] == (gap < 1e-9)


def test_without_confounding_the_natural_one_is_found():
    """Theorem 3.1: then nothing has to be moved."""

    def model():
        x1 = pyro.sample("x1", dist.Bernoulli(0.3))
        x2 = pyro.sample("x2", dist.Binomial(2, 0.4))
        pyro.sample("y", dist.Binomial(2, 0.1 + 0.3 * x1 + 0.2 * x2))

    report = pm.can_inhibit(model, PAIR.variable, "y")
    assert report.feasible and report.distance.max() < 1e-9
    law = law_of(model, PAIR.variable, pm.Inhibiting(1.0, "y"))
    natural = law_of(model, PAIR.variable, pm.Natural(1.0))
    states = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(law.log_prob(states), natural.log_prob(states))


def test_unreachable_micro_states():
    """A state that its sites never have is not used, however well it would do."""

    def model(last):
        z = pyro.sample("z", dist.Bernoulli(0.5))
        p = torch.tensor([0.7 - last, 0.3, last])
        x1 = pyro.sample("x1", dist.Categorical(p))
        pyro.sample("x2", dist.Bernoulli(0.2 + 0.6 * z))
        # Only x1 = 2 makes y certain
        pyro.sample("y", dist.Bernoulli((0.2 + 0.5 * z) * (x1 < 2) + 1.0 * (x1 == 2)))

    cause = pm.MacroVariable("cause", ["x1", "x2"], aggregation=pm.Count(1.0))
    never = pm.can_inhibit(model, cause, "y", model_args=(0.0,))
    rarely = pm.can_inhibit(model, cause, "y", model_args=(1e-3,))
    assert never.at.tolist() == rarely.at.tolist() == [0.0, 1.0, 2.0]
    # Seen with one: x2 = 1 tells of z = 1, and y is likelier than under do. With
    # x1 = 2 some weight makes up for that; without it nothing does.
    assert never.feasible_at[1] is False
    assert rarely.feasible_at[1] is True
    law = law_of(lambda: model(1e-3), cause, pm.Inhibiting(1.0, "y"))
    assert law.log_prob(torch.tensor([2.0, 1.0])) > -10
    with pytest.raises(pm.Infeasible):
        pm.macro_do(lambda: model(0.0), {cause: pm.Inhibiting(1.0, "y")})()


def test_without_scipy(monkeypatch):
    """The message names the extra."""
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ImportError("No module named 'scipy'")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    words = r"pip install 'pyro_macro\[lp\]'"
    with pytest.raises(ImportError, match=words):
        pm.can_inhibit(FEASIBLE, PAIR.variable, "y", at=[1.0])
    with pytest.raises(ImportError, match=words):
        pm.macro_do(FEASIBLE, {PAIR.variable: pm.Inhibiting(1.0, "y")})()
    # Nothing else needs it
    assert pm.confounding(FEASIBLE, PAIR.variable, "y").verdict == "inducing"
    assert not pm.macro_adjust(FEASIBLE, PAIR.variable, "y", "z").condition.p_value


# The law


def test_the_law():
    law = law_of(FEASIBLE, PAIR.variable, pm.Inhibiting(1.0, "y"))
    assert law.event_shape == (2,) and law.has_enumerate_support
    assert law.method == "exact: finite, a linear program"
    support = law.enumerate_support(expand=False)
    assert sorted(support.tolist()) == [[0.0, 1.0], [1.0, 0.0]]
    torch.testing.assert_close(law.log_prob(support).exp().sum().item(), 1.0)
    off = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    assert law.log_prob(off[0]) == -torch.inf
    assert not law.support.check(off[1]) and law.support.check(support).all()
    with pytest.raises(ValueError, match="support"):
        law.log_prob(off[1])
    drawn = law.sample((7, 3))
    assert drawn.shape == (7, 3, 2) and law.support.check(drawn).all()
    wide = law.expand((4, 3))
    assert wide.batch_shape == (4, 3) and wide.sample((2,)).shape == (2, 4, 3, 2)
    assert wide.log_prob(support[0]).shape == (4, 3)
    assert wide.enumerate_support().shape == (2, 4, 3, 2)
    weights = law.log_prob(support).exp()
    torch.testing.assert_close(law.mean, weights @ support)
    draws = law.sample((20_000,))
    assert_counts(draws, support, weights)


def test_a_grid_of_macro_values():
    """One run for several values; rows have the law of each."""
    truth = tables(FEASIBLE)
    values = [v for v in (0.0, 1.0, 2.0)]
    report = pm.can_inhibit(FEASIBLE, PAIR.variable, "y", at=values)
    values = [v for v, f in zip(values, report.feasible_at, strict=True) if f]
    grid = torch.tensor(values).unsqueeze(-1)
    model = pm.macro_do(FEASIBLE, {PAIR.variable: pm.Inhibiting(grid, "y")})
    with pyro.plate("grid", len(values), dim=-2), pyro.plate("draws", 8000, dim=-1):
        nodes = pyro.poutine.trace(model).get_trace().nodes
    drawn = nodes["y"]["value"]
    assert drawn.shape == (len(values), 8000)
    for row, value in zip(drawn, values, strict=True):
        states = torch.tensor([[0.0], [1.0]])
        assert_counts(row, states, torch.tensor(truth.seen(value)))
    assert torch.equal(
        nodes["x1"]["value"] + nodes["x2"]["value"], grid.expand(-1, 8000)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_enumerated_in_trace_enum_elbo(dtype):
    """``-loss`` of the enumerated program is ``log P(y | xb)``."""
    torch.set_default_dtype(dtype)

    def model():
        z = pyro.sample("z", dist.Bernoulli(0.4))
        x1 = pyro.sample("x1", dist.Bernoulli(0.3 + 0.4 * z))
        x2 = pyro.sample("x2", dist.Bernoulli(0.7 - 0.3 * z))
        pyro.sample("y", dist.Bernoulli(0.1 + 0.6 * x2 + 0.1 * x1 + 0.1 * z))

    with_double = torch.get_default_dtype() == torch.float64
    truth = tables(model)
    intervened = pm.macro_do(model, {PAIR.variable: pm.Inhibiting(1.0, "y")})
    for y in (0.0, 1.0):
        held = pyro.poutine.condition(intervened, {"y": torch.tensor(y)})
        elbo = TraceEnum_ELBO(max_plate_nesting=0)
        loss = elbo.loss(config_enumerate(held), lambda: None)
        wanted = np.log(truth.seen(1.0)[int(y)])
        assert -loss == pytest.approx(wanted, abs=1e-9 if with_double else 1e-5)


def test_levers_and_vectors_are_refused():
    with pytest.raises(pm.UnsupportedLaw, match="levers are for affine-Gaussian"):
        pm.can_inhibit(FEASIBLE, PAIR.variable, "y", levers=["x1"])
    realization = pm.Inhibiting(1.0, "y", levers=["x1"])
    with pytest.raises(pm.UnsupportedLaw, match="levers are for affine-Gaussian"):
        pm.macro_do(FEASIBLE, {PAIR.variable: realization})()

    def model():
        x = pyro.sample("x", dist.Bernoulli(torch.tensor([0.3, 0.6])).to_event(1))
        pyro.sample("y", dist.Bernoulli(0.2 + 0.5 * x).to_event(1))

    cause = pm.MacroVariable("cause", "x")
    with pytest.raises(pm.UnsupportedLaw, match="one number as its effect"):
        pm.can_inhibit(model, cause, "y")
    with pytest.raises(pm.UnsupportedLaw, match="one number as its effect"):
        pm.macro_do(model, {cause: pm.Inhibiting(1.0, "y")})()
    total = pm.MacroVariable("total", "y")
    assert pm.can_inhibit(model, cause, total).feasible
