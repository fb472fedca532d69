# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs of random shape under random handlers, nested in any order.

The answer is a closed form: the joint density of what is kept, at the values of a
trace, in each slot of the plates around.
"""

import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope

import pyro_macro as pm

from .consolidated import TOLERANCE, Linear, table_of

FAST, SLOW = range(8), range(8, 120)
SEEDS = [*FAST, *(pytest.param(s, marks=pytest.mark.slow) for s in SLOW)]


def random_linear(rng):
    """A program of Gaussian sites, each with up to three causes among the others."""
    names = [f"x{i}" for i in range(rng.randint(3, 7))]
    weights, constants, scales = {}, {}, {}
    for i, name in enumerate(names):
        causes = rng.sample(names[:i], min(i, rng.randint(0, 3)))
        weights[name] = {cause: rng.uniform(-1.5, 1.5) for cause in causes}
        constants[name] = rng.uniform(-2, 2)
        scales[name] = rng.uniform(0.3, 2)
    return Linear(weights, constants, scales)


def program(linear):
    def model():
        values = {}
        for name, scale in linear.scales.items():
            loc = torch.tensor(linear.constants[name])
            for cause, weight in linear.weights[name].items():
                loc = loc + weight * values[cause]
            values[name] = pyro.sample(name, dist.Normal(loc, scale))

    return model


class Nesting:
    """Handlers around a model, one after another, and what they come to.

    :ivar values: the sites that are set, by their own names.
    :ivar seen: those that are observed.
    """

    def __init__(self, rng, model):
        self.rng, self.model = rng, model
        self.values, self.seen = {}, {}
        self.prefix, self.scale, self.plates = "", 1.0, 0

    def add(self, kept, allowed):
        rng = self.rng
        kind = rng.choice(
            ["do", "do", "condition", "plate", "scope", "scale", "mask", "seed"]
            + ["context", "block", "infer_config", "trace", "replay"]
        )
        if kind == "do":
            # To what a kept site would have been, Pyro applies what is inside twice
            plain = not self.prefix and self.scale == 1
            sites = (*kept, *allowed) if plain else allowed
            free = [n for n in sites if n not in self.values]
            names = rng.sample(free, min(len(free), rng.randint(1, 2)))
            data = {name: rng.uniform(-3, 3) for name in names}
            self.values |= data
            self.do(data)
        elif kind == "condition":
            free = [n for n in kept if n not in self.seen]
            names = rng.sample(free, min(len(free), 1))
            data = {name: rng.uniform(-3, 3) for name in names}
            self.seen |= data
            self.model = poutine.condition(self.model, self.named(data))
        elif kind == "plate" and self.plates < 2:
            self.plates += 1
            self.model = in_plate(self.model, f"n{self.plates}", rng.randint(2, 3))
        elif kind == "scope":
            prefix = rng.choice("st")
            self.model = scope(self.model, prefix=prefix)
            self.prefix = f"{prefix}/{self.prefix}"
        elif kind == "scale":
            self.scale *= 0.5
            self.model = poutine.scale(self.model, scale=0.5)
        elif kind == "mask":
            self.model = poutine.mask(self.model, mask=True)
        elif kind == "seed":
            self.model = poutine.seed(self.model, rng_seed=rng.randint(0, 99))
        elif kind == "context":
            self.model = in_context(self.model)
        elif kind == "block":
            self.model = poutine.block(self.model, hide=["nothing of this name"])
        elif kind == "infer_config":
            self.model = poutine.infer_config(self.model, config_fn=lambda site: {})
        elif kind == "trace":
            self.model = poutine.trace(self.model)
        elif kind == "replay":
            self.model = poutine.replay(self.model, trace=poutine.Trace())

    def named(self, data):
        return {self.prefix + name: torch.tensor(v) for name, v in data.items()}

    def do(self, data):
        self.model = poutine.do(self.model, data=self.named(data))


def in_plate(model, name, size):
    def run():
        with pyro.plate(name, size):
            return model()

    return run


def in_context(model):
    def run():
        with poutine.mask(mask=True), poutine.do(data={"none": torch.zeros(())}):
            return model()

    return run


def split(rng, linear):
    names = list(linear.scales)
    kept = sorted(rng.sample(names, rng.randint(1, len(names) - 1)))
    rest = [name for name in names if name not in kept]
    allowed = rng.sample(rest, rng.randint(0, len(rest)))
    return kept, allowed


@pytest.mark.parametrize("seed", SEEDS)
def test_handlers_in_any_order_have_the_density_in_closed_form(seed):
    rng = random.Random(seed)
    linear = random_linear(rng)
    kept, allowed = split(rng, linear)
    fused = pm.consolidate(program(linear), kept, allowed)
    assert list(fused.sites) == kept
    for _ in range(4):
        nesting = Nesting(rng, fused)
        for _ in range(rng.randint(1, 6)):
            nesting.add(kept, allowed)
        trace = poutine.trace(nesting.model).get_trace()
        trace.compute_log_prob()
        nodes = [trace.nodes[nesting.prefix + name] for name in kept]
        for name, node in zip(kept, nodes, strict=True):
            assert node["is_observed"] == (name in nesting.seen)
            if name in nesting.seen:
                assert (node["value"] == nesting.seen[name]).all()
        shape = nodes[0]["log_prob"].shape
        assert len(shape) == nesting.plates
        values = [node["value"].expand(shape) for node in nodes]
        law = dist.MultivariateNormal(*linear.law(kept, nesting.values))
        wanted = nesting.scale * law.log_prob(torch.stack(values, -1)).sum()
        torch.testing.assert_close(trace.log_prob_sum(), wanted, **TOLERANCE)


@pytest.mark.parametrize("seed", SEEDS)
def test_handlers_in_any_order_do_not_hide_a_forbidden_do(seed):
    rng = random.Random(seed)
    linear = random_linear(rng)
    kept, allowed = split(rng, linear)
    rest = [n for n in linear.scales if n not in (*kept, *allowed)]
    fused = pm.consolidate(program(linear), kept, allowed)
    for _ in range(4 if rest else 0):
        nesting = Nesting(rng, fused)
        for place in range(count := rng.randint(1, 5)):
            if place == count // 2:
                nesting.do({rng.choice(rest): 1.0})
            nesting.add(kept, allowed)
        with pytest.raises(pm.InterventionNotAllowed):
            nesting.model()


# The same of finite programs


def random_tables(rng):
    names = [f"x{i}" for i in range(rng.randint(3, 5))]
    generator = torch.Generator().manual_seed(rng.randint(0, 10**6))
    states = {name: rng.randint(2, 3) for name in names}
    causes, tables = {}, {}
    for i, name in enumerate(names):
        causes[name] = rng.sample(names[:i], min(i, rng.randint(0, 2)))
        shape = [states[n] for n in (*causes[name], name)]
        table = torch.rand(shape, generator=generator, dtype=torch.float64) + 0.05
        tables[name] = table / table.sum(-1, keepdim=True)
    return states, causes, tables


def finite_program(causes, tables):
    def model():
        values = {}
        for name, table in tables.items():
            index = tuple(values[cause].long() for cause in causes[name])
            probs = table[index] if index else table
            values[name] = pyro.sample(name, dist.Categorical(probs))

    return model


def finite_joint(states, causes, tables, values):
    """What sites would have been, where some are set: all of their joint table."""
    names = list(states)
    joint = torch.ones([states[n] for n in names])
    for name, table in tables.items():
        axes = []
        for cause in causes[name]:
            if cause in values:
                table = table.select(len(axes), values[cause])
            else:
                axes.append(cause)
        axes.append(name)
        order = sorted(range(len(axes)), key=lambda i: names.index(axes[i]))
        shape = [states[n] if n in axes else 1 for n in names]
        joint = joint * table.permute(order).reshape(shape)
    return joint


@pytest.mark.parametrize("seed", SEEDS)
def test_finite_programs_have_the_table_by_hand_under_do(seed):
    rng = random.Random(seed)
    states, causes, tables = random_tables(rng)
    names = list(states)
    kept = sorted(rng.sample(names, rng.randint(1, 2)))
    rest = [name for name in names if name not in kept]
    fused = pm.consolidate(finite_program(causes, tables), kept, rest)
    assert list(fused.sites) == kept
    for _ in range(3):
        chosen = rng.sample(names, rng.randint(0, 3))
        values = {name: rng.randrange(states[name]) for name in chosen}
        data = {name: torch.tensor(value) for name, value in values.items()}
        model = poutine.do(fused, data=data)
        joint = finite_joint(states, causes, tables, values)
        wanted = joint.sum([i for i, n in enumerate(names) if n not in kept])
        found = table_of(model, kept, states=states)
        torch.testing.assert_close(found, wanted, **TOLERANCE)
