# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix D.2: the prisoner lives if and only if the captain gives no order, or every
rifleman is held back."""

import itertools
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

ORDERS = torch.tensor([False, True])


def squad(count, together=False):
    """The prisoner dies if any rifleman shoots."""

    def model(order):
        with pyro.plate("orders", len(order)):
            captain = pyro.deterministic("C", order)
            shots = [pyro.deterministic(f"R{i + 1}", captain) for i in range(count)]
            if together:
                dies = torch.stack(shots).any(0)
            else:
                dies = shots[0]
                for shot in shots[1:]:
                    dies = dies | shot
            pyro.deterministic("P", ~dies)

    return model


def riflemen(count):
    return [f"R{i + 1}" for i in range(count)]


def held_back(count):
    """All 2^N ways to hold some of them back, none included."""
    for size in range(count + 1):
        for some in itertools.combinations(riflemen(count), size):
            yield dict.fromkeys(some, False)


def power_set(count):
    return [one for one in held_back(count) if one]


def fused_squad(count, allow, together=False):
    return pm.consolidate(
        squad(count, together), ["C", "P"], allow=allow, model_args=(ORDERS,)
    )


def lives(program, do, order=ORDERS):
    data = {name: torch.tensor(value) for name, value in do.items()}
    trace = poutine.trace(poutine.do(program, data) if do else program)
    found = trace.get_trace(order).nodes["P"]["value"]
    return found.expand(len(order)).tolist()


@pytest.mark.parametrize("count", range(1, 9))
@pytest.mark.parametrize("together", [False, True])
def test_all_interventions(count, together):
    fused = fused_squad(count, riflemen(count), together)
    assert fused.sites == ("C", "P")
    for do in held_back(count):
        assert lives(fused, do) == [True, len(do) == count], do


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_all_of_them_listed_one_by_one(count):
    fused = fused_squad(count, power_set(count))
    for do in held_back(count):
        assert lives(fused, do) == [True, len(do) == count], do
    with pytest.raises(pm.InterventionNotAllowed, match="R1"):
        lives(fused, {"R1": True})  # nobody allowed to make him shoot


@pytest.mark.parametrize("count", [1, 3, 4])
def test_riflemen_may_also_be_made_to_shoot(count):
    fused = fused_squad(count, riflemen(count))
    for states in itertools.product([None, False, True], repeat=count):
        pairs = zip(riflemen(count), states, strict=True)
        do = {name: state for name, state in pairs if state is not None}
        expected = [
            not any(do.get(name, order) for name in riflemen(count))
            for order in (False, True)
        ]
        assert lives(fused, do) == expected, do


@pytest.mark.parametrize("count", [2, 5])
def test_the_captain_can_be_intervened_on(count):
    fused = fused_squad(count, riflemen(count))
    for do in held_back(count):
        assert lives(fused, {**do, "C": False}) == [True, True]
        assert lives(fused, {**do, "C": True}) == [len(do) == count] * 2


def test_a_large_squad():
    count = 60
    fused = fused_squad(count, riflemen(count))
    everyone = dict.fromkeys(riflemen(count), False)
    assert lives(fused, {}) == [True, False]
    assert lives(fused, everyone) == [True, True]
    for one in ("R1", "R30", "R60"):
        rest = {name: False for name in everyone if name != one}
        assert lives(fused, rest) == [True, False]
    assert fused.cost.after.equations == 2
    small = fused_squad(3, riflemen(3))
    assert fused.cost.after == small.cost.after


def as_python(line):
    """The right-hand side, with ``held["R1"]`` for ``do(R1 = False)``."""
    _, _, right = line.partition(":=")
    right = re.sub(r"do\((\w+) = False\)", r'held["\1"]', right.strip())
    return compile(right, line, "eval")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 12])
def test_the_rule_in_one_line(count):
    allow = power_set(count) if count <= 8 else [dict.fromkeys(riflemen(count), False)]
    first, line = fused_squad(count, allow).equations()
    assert first == "C := order"
    assert line.startswith("P := ")
    rule = as_python(line)
    for states in itertools.product([False, True], repeat=count):
        held = dict(zip(riflemen(count), states, strict=True))
        if count > 8 and any(states) != all(states):
            continue
        for captain in (False, True):
            found = eval(rule, {"held": held, "C": captain})
            assert found is (not captain or all(states))
    # No order, or all of them: each is named once
    assert len(re.findall(r"\bC\b", line)) == 1
    assert [len(re.findall(rf"do\({n} ", line)) for n in riflemen(count)] == [1] * count


def test_the_rule_with_any_intervention():
    (_, line) = fused_squad(3, riflemen(3)).equations()
    assert line.startswith("P := ")
    assert all(re.search(rf"\b{name}\b", line) for name in riflemen(3))
    # A line that ends in "else": nobody is held back then
    assert re.search(r"else not C$", line) or "do(" not in line


# Riflemen who miss: any path that is not blocked may do it


@pytest.mark.parametrize("count", [1, 2, 4])
def test_riflemen_who_miss(count):
    aims = [0.9, 0.5, 0.75, 0.25][:count]

    def model():
        order = pyro.sample("C", dist.Bernoulli(0.6))
        survives = torch.tensor(1.0)
        for name, aim in zip(riflemen(count), aims, strict=True):
            hit = pyro.sample(name, dist.Bernoulli(aim * order))
            survives = survives * (1 - hit)
        pyro.deterministic("P", survives)

    fused = pm.consolidate(model, ["C", "P"], allow=riflemen(count))
    for do in held_back(count):
        data = {name: torch.tensor(0.0) for name in do}
        for order in (0.0, 1.0):
            expected = 1.0
            for name, aim in zip(riflemen(count), aims, strict=True):
                expected *= 1 if name in do else 1 - aim * order
            program = poutine.do(fused, data) if do else fused
            program = poutine.condition(program, data={"C": torch.tensor(order)})
            site = poutine.trace(program).get_trace().nodes["P"]
            if site["infer"].get("_deterministic"):
                found = float(site["value"])
            else:
                found = float(site["fn"].log_prob(torch.tensor(1.0)).exp())
            assert found == pytest.approx(expected, abs=1e-8), (do, order)
