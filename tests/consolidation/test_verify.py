# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""verify_consolidation: true of what is right, false of what is slightly wrong."""

import random

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm

AFFINE, FINITE = "exact: affine-Gaussian", "exact: finite"
FEW = {"draws": 300}  # where samples are compared


# Programs with a number that can be changed


def market(slope=2.0, offset=1.0, scale=0.5, above=1.0):
    h = pyro.sample("h", dist.Normal(1.0, 1.5))
    a = pyro.sample("a", dist.Normal(slope * h, above))
    m = pyro.sample("m", dist.Normal(a - h + offset, scale))
    b = pyro.sample("b", dist.Normal(torch.stack([m, h]), 1.2).to_event(1))
    pyro.sample("y", dist.Normal(b.sum() + 3 * m, 0.7))


def shops(slope=2.0):
    w = torch.tensor([1.0, -2.0, 0.5])
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("shops", 3):
        x = pyro.sample("x", dist.Normal(z * w, 1.0))
        m = pyro.sample("m", dist.Normal(slope * x, w.abs()))
        pyro.sample("y", dist.Normal(m + x, 1.0))


def weather(rain=0.4, last=0.1):
    h = pyro.sample("h", dist.Bernoulli(rain))
    a = pyro.sample("a", dist.Bernoulli(0.2 + 0.5 * h))
    table = torch.tensor([[0.2, 0.3, 0.5], [0.6, 0.4 - last, last]])
    m = pyro.sample("m", dist.Categorical(table[a.long()]))
    c = pyro.deterministic("c", (m > 0) & (h > 0))
    pyro.sample("b", dist.Bernoulli(0.1 + 0.2 * m + 0.3 * c))


def streets(p=0.3):
    with pyro.plate("streets", 3):
        h = pyro.sample("h", dist.Bernoulli(torch.tensor([0.2, p, 0.7])))
        m = pyro.sample("m", dist.Bernoulli(0.1 + 0.6 * h))
        pyro.sample("y", dist.Bernoulli(0.3 + 0.4 * m))


def traffic(shape=2.0, slope=1.0, scale=1.0):
    a = pyro.sample("a", dist.Gamma(shape, 1.0))
    b = pyro.sample("b", dist.Normal(slope * a, 0.5))
    c = pyro.sample("c", dist.Normal(0.5 * b, scale))
    pyro.sample("d", dist.Gamma(torch.exp(c / 4), 1.0))


def circuit(a, low=5.0):
    b = pyro.deterministic("B", a > low)
    c = pyro.deterministic("C", ~b | (a > 10))
    pyro.deterministic("H", c & (a % 2 == 0))


CASES = {
    "market": (market, ["a", "b", "y"], ["m"], AFFINE),
    "market, all that is not kept": (market, ["y"], ["h", "a", "m"], AFFINE),
    "market, explicit": (market, ["a", "y"], [{"m": 0.5}, {"m": 1, "h": 2}], AFFINE),
    "shops": (shops, ["z", "y"], ["m"], AFFINE),
    "weather": (weather, ["a", "b"], ["m"], FINITE),
    "weather, deterministic": (weather, ["c", "b"], ["m", "h"], FINITE),
    "streets": (streets, ["y"], ["m"], FINITE),
    "traffic": (traffic, ["c", "d"], ["b"], "Monte Carlo"),
}
CHANGED = {
    "market": [{"slope": 2.001}, {"offset": 1.001}, {"scale": 0.501}],
    "market, all that is not kept": [{"slope": 1.999}, {"above": 1.001}],
    "market, explicit": [{"above": 1.001}, {"offset": 0.999}],
    "shops": [{"slope": 2.001}],
    "weather": [{"rain": 0.401}, {"last": 0.102}],
    "weather, deterministic": [{"rain": 0.399}, {"last": 0.098}],
    "streets": [{"p": 0.302}],
    "traffic": [{"shape": 4.0}, {"slope": 2.0}, {"scale": 2.0}],
}


def fused(case):
    model, keep, allow, _ = CASES[case]
    return pm.consolidate(model, keep, allow)


def changed(case, **numbers):
    model = CASES[case][0]
    return lambda: model(**numbers)


@pytest.mark.parametrize("case", CASES)
def test_what_is_fused_right_is_found_right(case):
    found = pm.verify_consolidation(CASES[case][0], fused(case), **FEW)
    assert found, str(found)
    assert all(check.holds(0.01) for check in found.checks)
    assert {check.method for check in found.checks} == {CASES[case][3]}
    exact = CASES[case][3] != "Monte Carlo"
    assert all((check.p_value is None) == exact for check in found.checks)
    if exact:
        assert max(check.difference for check in found.checks) < 1e-7


@pytest.mark.parametrize(
    "case, numbers",
    [(case, numbers) for case, some in CHANGED.items() for numbers in some],
)
def test_what_is_not_the_original_is_found_out(case, numbers):
    found = pm.verify_consolidation(changed(case, **numbers), fused(case), **FEW)
    assert not found, str(found)
    assert any(not check.holds(0.01) for check in found.checks)
    assert found.summary().endswith("interventions differ.")


def test_arguments_are_those_of_the_model():
    settings = [{"B": True}, {"B": False}]
    made = pm.consolidate(circuit, "H", settings, model_args=(torch.tensor(12.0),))
    a, kwargs = torch.arange(-3.0, 14.0), {"low": 5.0}
    assert pm.verify_consolidation(circuit, made, model_args=(a,), model_kwargs=kwargs)
    found = pm.verify_consolidation(
        lambda a: circuit(a, low=6.5), made, model_args=(a,)
    )
    assert not found
    (none, *others) = found.checks
    assert not none.holds(0.01) and none.intervention == {}
    assert all(check.holds(0.01) for check in others)  # B is set: low has no effect


def test_which_intervention_differs_is_told():
    """Only what is behind the intervention is another."""
    made = fused("market")
    found = pm.verify_consolidation(
        changed("market", scale=0.6), made, [{}, {"m": 1.0}, {"m": -2.0}]
    )
    assert [check.holds(0.01) for check in found.checks] == [False, True, True]
    assert [c.intervention for c in found.checks] == [{}, {"m": 1.0}, {"m": -2.0}]
    assert found.summary() == "1 of 3 interventions differ."


def test_only_an_intervention_shows_the_difference():
    """Observationally the same: h acts through m, or apart from it."""

    def through():
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        m = pyro.sample("m", dist.Normal(h, 1.0))
        pyro.sample("y", dist.Normal(m, 1.0))

    def apart():
        h = pyro.sample("h", dist.Normal(0.0, 1.0))
        m = pyro.sample("m", dist.Normal(h, 1.0))
        # The same covariance with h: 1, the same variance: 3
        pyro.sample("y", dist.Normal(0 * m + h, 2**0.5))

    made = pm.consolidate(through, ["h", "y"], ["m"])
    found = pm.verify_consolidation(apart, made, [{}, {"m": 2.0}])
    assert [check.holds(0.01) for check in found.checks] == [True, False]
    assert not found


def test_by_default_all_that_is_allowed_is_compared():
    made = fused("market, explicit")
    checks = pm.verify_consolidation(market, made).checks
    assert [c.intervention for c in checks] == [{}, {"m": 0.5}, {"m": 1, "h": 2}]
    checks = pm.verify_consolidation(market, fused("market")).checks
    assert [set(c.intervention) for c in checks] == [set(), {"m"}]
    several = fused("market, all that is not kept")
    checks = pm.verify_consolidation(market, several).checks
    singles = [set(c.intervention) for c in checks]
    assert singles[0] == set()
    assert {frozenset(s) for s in singles[1:4]} == {
        frozenset(n) for n in (["h"], ["a"], ["m"])
    }
    assert all(len(s) == 2 for s in singles[4:]) and len(singles) > 4


def test_kept_sites_may_be_set_too():
    made = fused("market")
    settings = [{"a": 1.0}, {"a": -1.0, "m": 2.0}, {"y": 0.0}, {"b": torch.ones(2)}]
    assert pm.verify_consolidation(market, made, settings)
    assert not pm.verify_consolidation(changed("market", offset=2.0), made, settings)


def test_all_kept_sites_may_be_set():
    made = pm.consolidate(market, ["a", "y"], ["m"])
    assert pm.verify_consolidation(market, made, [{"a": 1.0, "y": 2.0}])


@pytest.mark.parametrize(
    "case, intervention",
    [
        ("market", {"h": 1.0}),
        ("market", {"m": 1.0, "h": 1.0}),
        ("market, explicit", {"m": 0.6}),
        ("market, explicit", {"h": 2}),
        ("weather", {"c": True}),
    ],
)
def test_what_is_not_allowed_is_refused(case, intervention):
    made = fused(case)
    with pytest.raises(pm.InterventionNotAllowed) as caught:
        pm.verify_consolidation(CASES[case][0], made, [{}, intervention])
    assert all(name in str(caught.value) for name in intervention)


@pytest.mark.parametrize("thing", [market, None, 3])
def test_what_is_not_consolidated_is_refused(thing):
    with pytest.raises(pm.PyroMacroError, match="no consolidated model"):
        pm.verify_consolidation(market, thing)


# As a report


def test_it_prints_as_a_table():
    found = pm.verify_consolidation(market, fused("market"), [{}, {"m": 1.25}])
    lines = str(found).split("\n")
    assert lines[0] == "All 2 interventions agree."
    columns = ["intervention", "difference", "p-value", "agrees", "method"]
    assert lines[1].split() == columns
    assert lines[2].split()[0] == "none" and "yes" in lines[2]
    assert "do(m = 1.25)" in lines[3] and lines[3].endswith(AFFINE)
    assert repr(found) == str(found)
    shown = found._repr_html_()
    assert shown.count("<tr>") == 3 and "do(m = 1.25)" in shown
    assert "All 2 interventions agree." in shown


def test_a_failure_prints_too():
    tampered = changed("market", scale=0.6)
    found = pm.verify_consolidation(tampered, fused("market"), [{}, {"m": 1.0}])
    lines = str(found).split("\n")
    assert lines[0] == "1 of 2 interventions differ."
    assert " no " in lines[2] and " yes " in lines[3]
    assert "<td>no</td>" in found._repr_html_()


def test_vectors_are_not_printed_in_full():
    setting = [{"b": torch.arange(2.0)}]
    found = pm.verify_consolidation(market, fused("market"), setting)
    assert "do(b = ...)" in str(found)


def test_it_turns_into_pandas():
    pandas = pytest.importorskip("pandas")
    settings = [{}, {"b": 1.0}]
    found = pm.verify_consolidation(traffic, fused("traffic"), settings, **FEW)
    frame = found.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 2
    assert list(frame["intervention"]) == ["none", "do(b = 1)"]
    assert list(frame["agrees"]) == [True, True]
    assert [p for p in frame["p-value"]] == [c.p_value for c in found.checks]
    assert all(0 < p <= 1 for p in frame["p-value"])


# Of samples


def test_the_level_decides_about_samples():
    made, settings = fused("traffic"), [{}, {"b": 1.0}]
    found = pm.verify_consolidation(traffic, made, settings, **FEW)
    highest = max(check.p_value for check in found.checks)
    assert found.level == 0.01 and found
    strict = pm.verify_consolidation(traffic, made, settings, level=highest, **FEW)
    assert not strict
    assert [c.p_value for c in strict.checks] == [c.p_value for c in found.checks]


def test_seeds_reproduce():
    made = fused("traffic")

    def p_values(seed):
        found = pm.verify_consolidation(traffic, made, [{}], seed=seed, draws=100)
        return [(c.p_value, c.difference) for c in found.checks]

    pyro.set_rng_seed(1)
    first = p_values(3)
    pyro.set_rng_seed(2)
    assert p_values(3) == first
    assert p_values(4) != first


def test_samples_of_vectors_are_compared():
    def basket(scale=1.0):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        m = pyro.sample("m", dist.Normal(a * torch.ones(2), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(2 * m, scale).to_event(1))
        pyro.sample("y", dist.Gamma(torch.exp(b.sum() / 8), 1.0))

    made, settings = pm.consolidate(basket, ["b", "y"], ["m"]), [{"m": torch.ones(2)}]
    (check,) = pm.verify_consolidation(basket, made, settings, draws=150).checks
    assert check.method == "Monte Carlo" and check.holds(0.01)
    assert not pm.verify_consolidation(lambda: basket(2.0), made, settings, draws=150)


def test_more_draws_see_more():
    made, other = fused("traffic"), changed("traffic", slope=1.4)
    few = pm.verify_consolidation(other, made, [{}], draws=40)
    assert few and not pm.verify_consolidation(other, made, [{}], draws=1000)


# Nothing is touched


@pytest.mark.parametrize("case", ["market", "weather", "traffic"])
def test_random_state_and_parameters_are_left_alone(case):
    model = CASES[case][0]

    def with_parameters():
        pyro.param("unused", lambda: torch.randn(3))
        model(pyro.param("first", torch.tensor(2.0 if case != "weather" else 0.4)))

    made = pm.consolidate(with_parameters, *CASES[case][1:3])
    pyro.clear_param_store()
    pyro.set_rng_seed(7)
    before = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
    assert pm.verify_consolidation(with_parameters, made, draws=100)
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()
    assert len(pyro.get_param_store()) == 0
    # The values that are in the store count, and stay
    other = torch.tensor(2.5 if case != "weather" else 0.6)
    pyro.get_param_store()["first"] = other
    assert pm.verify_consolidation(with_parameters, made, draws=100)
    assert list(pyro.get_param_store().keys()) == ["first"]
    assert torch.equal(pyro.param("first"), other)


def test_handlers_around_it_see_nothing():
    made = fused("market")
    with pyro.poutine.trace() as trace, pyro.poutine.condition(data={"a": 100.0}):
        found = pm.verify_consolidation(market, made)
    assert found
    assert [n for n in trace.trace.nodes if not n.startswith("_")] == []


def test_under_no_grad():
    with torch.no_grad():
        assert pm.verify_consolidation(market, fused("market"))


def test_observed_sites_are_compared_as_random_ones():
    def seen(scale=0.7):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        m = pyro.sample("m", dist.Normal(2 * a, 1.0))
        pyro.sample("y", dist.Normal(m, scale), obs=torch.tensor(3.0))

    made = pm.consolidate(seen, "a", ["m"])
    found = pm.verify_consolidation(seen, made)
    assert found and {c.method for c in found.checks} == {AFFINE}
    assert not pm.verify_consolidation(lambda: seen(0.71), made)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_the_level_of_samples(seed):
    """What is right is found right, whatever the seed."""
    made = fused("traffic")
    assert pm.verify_consolidation(traffic, made, seed=seed, draws=4000, level=1e-3)


@pytest.mark.slow
def test_models_that_do_not_run_side_by_side():
    def branching(p=0.5):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(2 * a, 1.0))
        pyro.sample("y", dist.Normal(b if b > 0 else p * b, 1.0))

    made = pm.consolidate(branching, ["a", "b", "y"])
    assert pm.verify_consolidation(branching, made, draws=500)
    assert not pm.verify_consolidation(lambda: branching(-1.0), made, draws=500)
