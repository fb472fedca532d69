# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix D.1: rows of dominoes, by hand and whatever their length."""

import itertools
import re
import sys

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.utils._python_dispatch import TorchDispatchMode

import pyro_macro as pm

LENGTHS = [5, 50, 1000]
PUSH = 0.4  # probability that the first one is tipped over


def row(n):
    """Each falls if its neighbour does."""

    def model():
        s = pyro.sample("s1", dist.Bernoulli(PUSH))
        for i in range(2, n + 1):
            s = pyro.deterministic(f"s{i}", s)

    return model


def pushed_row(n):
    """The same, the first one being tipped over by whoever runs the program."""

    def model(push):
        s = pyro.deterministic("s1", push)
        for i in range(2, n + 1):
            s = pyro.deterministic(f"s{i}", s)

    return model


def noisy_row(n, fall, slip=0.0):
    """It falls with some probability if its neighbour did, and with another if not."""

    def model():
        s = pyro.sample("s1", dist.Bernoulli(PUSH))
        for i in range(2, n + 1):
            s = pyro.sample(f"s{i}", dist.Bernoulli(slip + (fall - slip) * s))

    return model


def names(n):
    return [f"s{i}" for i in range(1, n + 1)]


def last_of(model, n, **changes):
    return pm.consolidate(model, keep=[f"s{n}"], allow=names(n - 1), **changes)


def under(program, do):
    if not do:
        return program
    data = {f"s{i}": torch.tensor(float(x)) for i, x in do.items()}
    return poutine.do(program, data)


def falls(program, name, do, *args):
    """The probability that a stone falls."""
    trace = poutine.trace(under(program, do)).get_trace(*args)
    assert {n for n, s in trace.nodes.items() if s["type"] == "sample"} == {
        name,
        *(f"s{i}" for i in do if f"s{i}" != name),
    }
    site = trace.nodes[name]
    if site["infer"].get("_deterministic"):
        return float(site["value"])
    return float(site["fn"].log_prob(torch.tensor(1.0)).exp())


def all_interventions(n):
    """Every way to hold or tip over some of the first stones."""
    for states in itertools.product([None, 0, 1], repeat=n):
        yield {i + 1: x for i, x in enumerate(states) if x is not None}


def one_by_one(n, do, first):
    """S_1 is pushed, and S_i := S_{i-1}."""
    s = first
    for i in range(1, n + 1):
        s = do.get(i, s)
    return s


def test_all_interventions_on_a_short_row():
    n = 5
    fused = last_of(row(n), n)
    for do in all_interventions(n - 1):
        by_hand = [one_by_one(n, do, first) for first in (0, 1)]
        expected = (1 - PUSH) * by_hand[0] + PUSH * by_hand[1]
        assert falls(fused, "s5", do) == pytest.approx(expected, abs=1e-8), do


@pytest.mark.parametrize("push", [0.0, 1.0])
def test_all_interventions_on_a_row_that_is_pushed(push):
    n = 4
    push = torch.tensor(push)
    fused = last_of(pushed_row(n), n, model_args=(push,))
    for do in all_interventions(n - 1):
        expected = one_by_one(n, do, float(push))
        assert falls(fused, "s4", do, push) == expected, do
        other = one_by_one(n, do, 1 - float(push))
        assert falls(fused, "s4", do, 1 - push) == other, do


@pytest.mark.parametrize("n", LENGTHS)
def test_the_last_intervention_wins(n):
    fused = last_of(row(n), n)
    rng = np.random.default_rng(n)
    assert falls(fused, f"s{n}", {}) == pytest.approx(PUSH)
    for _ in range(20):
        places = rng.choice(np.arange(1, n), size=min(4, n - 1), replace=False)
        do = {int(i): int(rng.integers(2)) for i in places}
        assert falls(fused, f"s{n}", do) == do[max(do)]


def rule(line):
    """An equation, with the numbers of stones left out."""
    return re.sub(r"\{[^}]*\}", "{...}", re.sub(r"^s\d+", "s", line))


@pytest.mark.parametrize("n", LENGTHS)
def test_the_rule_does_not_depend_on_the_length(n):
    fused = pm.consolidate(row(n), keep=["s1", f"s{n}"], allow=names(n)[1:-1])
    first, last = fused.equations()
    assert first == f"s1 ~ Bernoulli({PUSH})"
    assert rule(last) == "s := v where k is the last of {...} intervened on; else s1"
    listed = re.search(r"\{(.*)\}", last)[1]
    assert listed == ("2, 3, 4" if n == 5 else f"2, 3, ..., {n - 1}")


@pytest.mark.parametrize("n", LENGTHS)
def test_the_rule_when_the_first_stone_is_not_kept(n):
    # S_n := x_k for the last intervention, and S_1 else
    (last,) = last_of(row(n), n).equations()
    expected = "s := v where k is the last of {...} intervened on; else Bernoulli(0.4)"
    assert rule(last) == expected
    (last,) = last_of(pushed_row(n), n, model_args=(torch.tensor(1.0),)).equations()
    assert rule(last) == "s := v where k is the last of {...} intervened on; else push"


@pytest.mark.parametrize("made", [row, lambda n: noisy_row(n, 0.9, 0.05)])
def test_the_cost_does_not_depend_on_the_length(made):
    costs = []
    for n in LENGTHS:
        fused = last_of(made(n), n)
        assert fused.cost.before.equations == n
        costs.append(fused.cost.after)
        assert fused.sites == (f"s{n}",)
    assert costs[0] == costs[1] == costs[2]
    assert costs[0].equations == costs[0].draws == 1
    assert costs[0].numbers == 2  # the probabilities of the two states


class _Operations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def work(program):
    """Operations on tensors and calls of functions that one run takes."""
    program()
    program()
    with _Operations() as operations:
        program()
    calls = 0

    def note(frame, event, arg):
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        program()
    finally:
        sys.setprofile(before)
    return operations.count, calls


@pytest.mark.parametrize("made", [row, lambda n: noisy_row(n, 0.9, 0.05)])
def test_the_work_of_a_run_does_not_depend_on_the_length(made):
    programs = {n: last_of(made(n), n) for n in LENGTHS}
    for count in range(3):
        found = []
        for n, fused in programs.items():
            do = dict.fromkeys([n // 2, 1][:count], 1)
            found.append(work(under(fused, do)))
        (short, few), *longer = found
        for operations, calls in longer:
            assert operations <= short
            assert calls <= few + 20
        assert work(made(100))[0] > short


# Noise


@pytest.mark.parametrize(("fall", "slip"), [(0.9, 0.0), (0.75, 0.125)])
def test_all_interventions_on_a_short_noisy_row(fall, slip):
    n = 4
    fused = last_of(noisy_row(n, fall, slip), n)
    for do in all_interventions(n - 1):
        expected = 0.0
        for states in itertools.product([0, 1], repeat=n):
            p = 1.0
            for i, s in enumerate(states):
                chance = PUSH if i == 0 else (slip, fall)[states[i - 1]]
                if i + 1 in do:
                    p *= s == do[i + 1]
                else:
                    p *= chance if s else 1 - chance
            expected += p * states[-1]
        assert falls(fused, "s4", do) == pytest.approx(expected, abs=1e-8), do


@pytest.mark.parametrize("n", LENGTHS)
def test_a_noisy_row_is_a_power_of_a_table(n):
    fall, slip = 0.999, 0.002
    fused = last_of(noisy_row(n, fall, slip), n)
    table = np.array([[1 - slip, slip], [1 - fall, fall]])
    start = np.array([1 - PUSH, PUSH])
    expected = (start @ np.linalg.matrix_power(table, n - 1))[1]
    assert falls(fused, f"s{n}", {}) == pytest.approx(expected, abs=1e-8)
    for k, x in itertools.product([1, 2, n // 2, n - 1], [0, 1]):
        expected = np.linalg.matrix_power(table, n - k)[x, 1]
        for do in ({k: x}, {k: x, max(k - 1, 1): 1 - x} if k > 1 else {k: x}):
            found = falls(fused, f"s{n}", do)
            assert found == pytest.approx(expected, abs=1e-8), do


@pytest.mark.parametrize("n", [5, 50])
def test_without_slips_it_is_a_power(n):
    fused = last_of(noisy_row(n, 0.9), n)
    assert falls(fused, f"s{n}", {}) == pytest.approx(PUSH * 0.9 ** (n - 1), abs=1e-12)
    for k in (1, n // 2, n - 1):
        expected = 0.9 ** (n - k)
        assert falls(fused, f"s{n}", {k: 1}) == pytest.approx(expected, abs=1e-8)
        assert falls(fused, f"s{n}", {k: 0}) == pytest.approx(0.0, abs=1e-12)


def test_rows_differ_in_what_is_allowed_alone():
    three, four = last_of(row(3), 3), last_of(row(4), 4)
    assert three.allowed.free == {"s1", "s2"}
    assert four.allowed.free == {"s1", "s2", "s3"}
    with pytest.raises(pm.InterventionNotAllowed, match="s2"):
        held = pm.consolidate(row(3), keep=["s3"], allow=["s1"])
        falls(held, "s3", {2: 0})
