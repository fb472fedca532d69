# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix D.4: the policy of a platformer agent, revealed by consolidation."""

import functools
import math
import signal
from contextlib import contextmanager

import networkx as nx
import pyro
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

THINGS = ("coin", "powerup", "enemy", "flag")
COUNT = 64  # games side by side
FINISHED, COIN, POWERUP, ENEMY, FLAG = range(5)
CODES = {"coin": COIN, "powerup": POWERUP, "enemy": ENEMY, "flag": FLAG}
REWARDS = {"coin": 3.0, "powerup": 1.0, "enemy": 9.0, "flag": 2.0}
PLAN = [f"plan_{i}" for i in range(1, 5)]
DISTANCES = [f"distance_{x}" for x in THINGS]
LEVERS = [{"powered_up": True}, {"target_coin": False}, {"target_flag": False}]


def rivals(thing, mended):
    if thing == "enemy" and not mended:
        return ("enemy", "powerup", "flag")  # itself among them, as printed
    return tuple(x for x in THINGS if x != thing)


def agent(mended):
    """The equations as printed, or without their two slips."""

    def model(positions, rewards):
        set_to = pyro.deterministic
        with pyro.plate("games", len(positions["player"][0])):
            x0, y0 = positions["player"]
            far, near, cost, target, towards = {}, {}, {}, {}, {}
            for thing in THINGS:
                x, y = positions[thing]
                far[thing] = set_to(
                    f"distance_{thing}", ((x - x0) ** 2 + (y - y0) ** 2).sqrt()
                )
                near[thing] = set_to(f"near_{thing}", far[thing] < 3.0)
                cost[thing] = set_to(f"targeting_cost_{thing}", 1 + 0.5 * far[thing])
            limit = rewards["coin" if mended else "enemy"]
            target["coin"] = set_to("target_coin", cost["coin"] < limit)
            target["powerup"] = set_to(
                "target_powerup", cost["powerup"] < rewards["powerup"]
            )
            powered_up = set_to("powered_up", target["powerup"])
            target["enemy"] = set_to(
                "target_enemy", (cost["enemy"] < rewards["enemy"]) & powered_up
            )
            target["flag"] = set_to("target_flag", torch.tensor(True))
            for thing in THINGS:
                # Rewards are positive: 0 stands for that of nothing
                offers = [
                    torch.where(target[x], rewards[x], 0.0)
                    for x in rivals(thing, mended)
                ]
                best = functools.reduce(torch.maximum, offers)
                towards[thing] = set_to(
                    f"towards_{thing}", target[thing] & (rewards[thing] > best)
                )
            set_to("jump", near["enemy"] & powered_up)
            plan = []
            for name in PLAN:
                had = {
                    x: functools.reduce(
                        torch.bitwise_or,
                        [step == code for step in plan],
                        torch.tensor(False),
                    )
                    for x, code in CODES.items()
                }
                step = torch.tensor(float(FINISHED))
                for x in reversed(THINGS):
                    step = torch.where(towards[x] & ~had[x], float(CODES[x]), step)
                step = torch.where(towards["flag"] & had["flag"], 0.0, step)
                plan.append(set_to(name, step))

    return model


def by_hand(positions, rewards, mended, do):
    """One game in plain Python."""
    far = {x: math.dist(positions["player"], positions[x]) for x in THINGS}
    cost = {x: 1 + 0.5 * far[x] for x in THINGS}
    target = {
        "coin": cost["coin"] < rewards["coin" if mended else "enemy"],
        "powerup": cost["powerup"] < rewards["powerup"],
    }
    target["coin"] = do.get("target_coin", target["coin"])
    powered_up = do.get("powered_up", target["powerup"])
    target["enemy"] = cost["enemy"] < rewards["enemy"] and powered_up
    target["flag"] = do.get("target_flag", True)
    towards = {}
    for x in THINGS:
        offers = [rewards[o] for o in rivals(x, mended) if target[o]]
        towards[x] = target[x] and rewards[x] > max(offers, default=-math.inf)
    plan = []
    for _ in PLAN:
        if towards["flag"] and FLAG in plan:
            plan.append(FINISHED)
            continue
        wanted = [CODES[x] for x in THINGS if towards[x] and CODES[x] not in plan]
        plan.append(wanted[0] if wanted else FINISHED)
    return plan


def games(count, size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    made = {}
    for x in ("player", *THINGS):
        made[x] = tuple(size * torch.rand(2, count, generator=generator))
    return made


def one_game(positions, i):
    return {x: (float(a[i]), float(b[i])) for x, (a, b) in positions.items()}


@functools.cache
def consolidated(mended, keep):
    return pm.consolidate(
        agent(mended), keep, allow=LEVERS, model_args=(games(COUNT, 1.0), REWARDS)
    )


def plans(program, positions, do, rewards=REWARDS):
    data = {name: torch.tensor(value) for name, value in do.items()}
    program = poutine.do(program, data) if do else program
    nodes = poutine.trace(program).get_trace(positions, rewards).nodes
    count = len(positions["player"][0])
    steps = [nodes[name]["value"].expand(count) for name in PLAN]
    return torch.stack(steps, -1).tolist()


TO_PLAN, WITH_DISTANCES = tuple(PLAN), (*DISTANCES, *PLAN)


def test_the_plan_as_printed_is_always_the_same():
    positions = games(COUNT, 1.0)
    fused = consolidated(False, TO_PLAN)
    assert fused.sites == TO_PLAN
    assert plans(fused, positions, {}) == [[COIN, FINISHED, FINISHED, FINISHED]] * COUNT
    nodes = poutine.trace(agent(False)).get_trace(positions, REWARDS).nodes
    assert all(bool(nodes[f"near_{x}"]["value"].all()) for x in THINGS)
    assert not bool(nodes["target_powerup"]["value"].any())


def test_corners_of_the_square():
    corners = [0.0, 1.0]
    grid = torch.cartesian_prod(*[torch.tensor(corners)] * 4).T.repeat(1, COUNT // 16)
    positions = {"player": (grid[0], grid[1])}
    positions.update({x: (grid[2], grid[3]) for x in THINGS})
    found = plans(consolidated(False, TO_PLAN), positions, {})
    assert found == [[COIN, FINISHED, FINISHED, FINISHED]] * COUNT


@pytest.mark.parametrize("do", [{}, *LEVERS], ids=str)
@pytest.mark.parametrize(
    ("mended", "keep"), [(False, TO_PLAN), (True, WITH_DISTANCES)], ids=str
)
def test_the_plan_is_that_of_plain_python(mended, keep, do):
    positions = games(COUNT, 25.0, seed=1)
    fused = consolidated(mended, keep)
    found = plans(fused, positions, do)
    expected = [
        by_hand(one_game(positions, i), REWARDS, mended, do) for i in range(COUNT)
    ]
    assert found == expected
    if not do:
        assert len(set(map(tuple, expected))) > 1


def test_the_slips_matter():
    """With the enemy's reward in place of the coin's it walks too far for a coin."""
    positions = games(COUNT, 12.0, seed=2)
    printed, mended = (
        plans(consolidated(False, TO_PLAN), positions, {}),
        plans(consolidated(True, WITH_DISTANCES), positions, {}),
    )
    assert {p[0] for p in printed} == {COIN}
    assert {p[0] for p in mended} == {COIN, FLAG}
    # As printed the enemy is compared with itself, and never walked to
    up = {"powered_up": True}
    printed = plans(consolidated(False, TO_PLAN), positions, up)
    mended = plans(consolidated(True, WITH_DISTANCES), positions, up)
    assert ENEMY not in {p[0] for p in printed}
    assert ENEMY in {p[0] for p in mended}


def rule(text):
    """A rule of the form ``1 if ... else 4 if ...``, in Python."""
    cases = text.count(" if ") - text.count(" else ")
    return compile(text + " else None" * cases, text, "eval")


def parts(line):
    """What a line says without interventions (``None``), and under each of them."""
    name, _, right = line.partition(" := ")
    found = {}
    for piece in right.split("; "):
        text, _, do = piece.partition(" under do(")
        found[do.rstrip(")").partition(" = ")[0] or None] = text.removeprefix("else ")
    return name, found


@functools.cache
def plan_lines():
    lines = consolidated(True, WITH_DISTANCES).equations()
    return dict(parts(line) for line in lines if line.startswith("plan"))


def test_the_policy_is_rules_over_distances():
    lines = plan_lines()
    assert tuple(lines) == TO_PLAN
    first = lines["plan_1"][None]
    assert "distance_coin < 4" in first
    assert "target" not in first and "f(" not in first
    # What would be too long to be read names what it is computed from instead
    short = {
        name: found[None] for name, found in lines.items() if "f(" not in found[None]
    }
    rules = {name: rule(line) for name, line in short.items()}
    positions = games(COUNT, 25.0, seed=3)
    for i in range(COUNT):
        game = one_game(positions, i)
        values = {f"distance_{x}": math.dist(game["player"], game[x]) for x in THINGS}
        expected = by_hand(game, REWARDS, True, {})
        for name, step in zip(PLAN, expected, strict=True):
            if name in rules:
                assert eval(rules[name], {}, values) == step
            values[name] = step


@pytest.mark.parametrize("lever", LEVERS, ids=str)
def test_the_levers_are_in_the_rules(lever):
    ((name, value),) = lever.items()
    found = plan_lines()["plan_1"]
    assert name in found
    if "f(" in found[name]:
        assert name in found[name]
        return
    positions = games(COUNT, 25.0, seed=6)
    steps = set()
    for i in range(COUNT):
        game = one_game(positions, i)
        values = {f"distance_{x}": math.dist(game["player"], game[x]) for x in THINGS}
        step = eval(rule(found[name]), {}, {**values, name: value})
        assert step == by_hand(game, REWARDS, True, lever)[0]
        steps.add(step)
    assert steps != {FINISHED}


def test_what_it_costs():
    for fused, before, after in (
        (consolidated(False, TO_PLAN), 26, 26),
        (consolidated(True, WITH_DISTANCES), 26, 26),
    ):
        assert fused.cost.before.equations == before
        assert fused.cost.after.equations < after
        assert fused.cost.after.operations < fused.cost.before.operations


def test_what_the_plan_depends_on():
    graph = consolidated(True, WITH_DISTANCES).graph
    assert set(WITH_DISTANCES) <= set(graph)
    assert graph.has_edge("distance_coin", "plan_1")
    for name in ("powered_up", "target_coin", "target_flag"):
        assert nx.has_path(graph, name, "plan_1")
    # Nothing acts on what the player meets
    for name in DISTANCES:
        assert list(graph.predecessors(name)) == []


@pytest.mark.parametrize("name", PLAN)
def test_steps_of_the_plan_can_be_intervened_on(name):
    positions = games(COUNT, 12.0, seed=4)
    for code in (COIN, FLAG, ENEMY):
        do = {name: float(code)}
        expected = plans(agent(True), positions, do)
        assert plans(consolidated(True, WITH_DISTANCES), positions, do) == expected


def test_other_interventions_are_errors():
    fused = consolidated(True, WITH_DISTANCES)
    for do in ({"powered_up": False}, {"target_enemy": True}, {"near_coin": True}):
        with pytest.raises(pm.InterventionNotAllowed):
            plans(fused, games(COUNT, 1.0), do)


@contextmanager
def at_most(seconds):
    """An error instead of a test that hangs."""

    def stop(signum, frame):
        raise TimeoutError(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_rewards_may_be_arguments():
    """No simple formula then, but a model all the same, and not only in the end."""
    rewards = {x: torch.tensor(v) for x, v in REWARDS.items()}
    positions = games(COUNT, 12.0, seed=5)
    with at_most(8):
        fused = pm.consolidate(
            agent(True), PLAN, allow=LEVERS, model_args=(positions, rewards)
        )
    other = {"coin": 2.0, "powerup": 4.5, "enemy": 9.0, "flag": 1.0}
    for values in (REWARDS, other):
        given = {x: torch.tensor(v) for x, v in values.items()}
        for do in ({}, *LEVERS):
            found = plans(fused, positions, do, given)
            expected = [
                by_hand(one_game(positions, i), values, True, do) for i in range(COUNT)
            ]
            assert found == expected
