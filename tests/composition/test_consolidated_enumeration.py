# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated programs under ``config_enumerate`` and within ``pyro.markov``.

What is enumerated is what is kept; what is fused is summed out beforehand, so that the
evidence is the same number.
"""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate, infer_discrete

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    OF_A,
    SETTINGS,
    TOLERANCE,
    assert_same_law,
    done,
    fused_market,
    tensors,
    weather,
    weather_joint,
)
from .models import assert_same_program

WHERE = pytest.mark.parametrize("where", ["inside", "outside"])
DATA = 0.3


def elbo(nesting=0):
    # Nothing is enumerated in the guides here
    return TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False)


def evidence(model, *args, nesting=0):
    return torch.tensor(-elbo(nesting).loss(model, lambda *args: None, *args))


def enumerated(where, model, keep, allow=(), **kwargs):
    if where == "inside":
        return pm.consolidate(config_enumerate(model), keep, allow, **kwargs)
    return config_enumerate(pm.consolidate(model, keep, allow, **kwargs))


def weather_evidence(values, y=DATA, given=None):
    """``log P(y)``, and ``log P(a, y)`` for each a."""
    joint = weather_joint(values)
    m = torch.arange(3.0)[:, None] if "m" not in values else torch.tensor(values["m"])
    b = torch.arange(2.0)[None, :] if "b" not in values else torch.tensor(values["b"])
    density = dist.Normal(b - m + 0.5, 0.7).log_prob(torch.tensor(y)).exp()
    whole = (joint * density.expand(3, 2)).sum((0, 2, 3))
    return whole.sum().log(), whole.log()


KEEPS = [["a", "b"], ["a"], ["b", "m"], ["a", "m", "b"], []]


@WHERE
@pytest.mark.parametrize("keep", KEEPS, ids=str)
@pytest.mark.parametrize("values", [{}, {"m": 2}, {"a": 1}, {"b": 0}], ids=str)
def test_enumeration_of_what_is_kept_has_the_evidence(where, keep, values):
    """Of a kept site that is set, what it would have been is summed out."""
    allow = {"a", "m", "b"} - set(keep)
    model = enumerated(where, weather, [*keep, "y"], allow)
    model = done(model, tensors(values))
    wanted, _ = weather_evidence(values)
    found = evidence(model, torch.tensor(DATA))
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@WHERE
@pytest.mark.parametrize("values", [{}, {"m": 2}, {"h": 1}, {"b": 1}], ids=str)
def test_enumeration_has_the_posterior_by_hand(where, values):
    model = enumerated(where, weather, ["a", "b", "y"], ["m", "h"])
    model = done(model, tensors(values))
    y = torch.tensor(DATA)
    marginals = elbo().compute_marginals(model, lambda y: None, y)
    _, logs = weather_evidence(values)
    found = marginals["a"].probs if hasattr(marginals["a"], "probs") else None
    torch.testing.assert_close(found, logs.softmax(0)[1], **TOLERANCE)


@pytest.mark.parametrize("values", [{}, {"m": 1}], ids=str)
def test_enumerated_sites_have_their_own_dimensions(values):
    fused = done(pm.consolidate(weather, ["a", "b", "y"], ["m"]), tensors(values))
    model = poutine.enum(config_enumerate(fused), first_available_dim=-1)
    trace = poutine.trace(model).get_trace(torch.tensor(DATA))
    assert trace.nodes["a"]["value"].shape == (2,)
    assert trace.nodes["b"]["value"].shape == (2, 1)
    # P(a, b, y) in each cell
    trace.compute_log_prob()
    logs = [trace.nodes[n]["log_prob"] for n in ("a", "b", "y")]
    found = sum(torch.broadcast_tensors(*logs)).exp()
    m = torch.arange(3.0)[:, None] if not values else torch.tensor(values["m"])
    density = dist.Normal(torch.arange(2.0) - m + 0.5, 0.7).log_prob(torch.tensor(DATA))
    wanted = (weather_joint(values).sum(0) * density.exp().expand(3, 2)).sum(1)
    torch.testing.assert_close(found, wanted.T, **TOLERANCE)


def in_plate(model, size=None):
    def run(y):
        with pyro.plate("n", 3, subsample_size=size, dim=-1) as i:
            model(y[i])

    return run


@WHERE
@pytest.mark.parametrize("plate", ["inside", "outside"])
@pytest.mark.parametrize("values", [{}, {"m": 2}], ids=str)
def test_enumeration_in_a_plate_has_the_evidence_of_each_slot(where, plate, values):
    y = torch.tensor([DATA, 1.0, -2.0])
    if plate == "inside":
        model = enumerated(
            where, in_plate(weather), ["a", "b", "y"], ["m"], model_args=(y,)
        )
        model = done(model, tensors(values))
    else:
        model = enumerated(where, weather, ["a", "b", "y"], ["m"])
        model = in_plate(done(model, tensors(values)))
    wanted = sum(weather_evidence(values, float(v))[0] for v in y)
    found = evidence(model, y, nesting=1)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


def switched(y=None):
    """A continuous site that is kept and sampled, beside finite ones."""
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    h = pyro.sample("h", dist.Bernoulli(torch.sigmoid(t)))
    a = pyro.sample("a", dist.Bernoulli(0.2 + 0.5 * h))
    pyro.sample("y", dist.Normal(a + h, 0.7), obs=y)


def switched_joint(t, y):
    """``log P(t, y)``."""
    p = torch.sigmoid(t)
    cells = [
        (p if h else 1 - p)
        * (0.2 + 0.5 * h if a else 0.8 - 0.5 * h)
        * dist.Normal(float(a + h), 0.7).log_prob(y).exp()
        for h in (0, 1)
        for a in (0, 1)
    ]
    return dist.Normal(0.0, 1.0).log_prob(t) + sum(cells).log()


@WHERE
@pytest.mark.parametrize("vectorized", [True, False])
def test_enumeration_with_particles_that_each_have_a_table(where, vectorized):
    y, particles = torch.tensor(DATA), torch.tensor([0.8, -1.0, 3.0])
    left = list(particles)

    def guide(y):
        t = particles if vectorized else left.pop()
        pyro.sample("t", dist.Delta(t))

    model = enumerated(where, switched, ["t", "a", "y"])
    bound = TraceEnum_ELBO(
        num_particles=3,
        vectorize_particles=vectorized,
        max_plate_nesting=0,
        strict_enumeration_warning=False,
    )
    found = torch.tensor(-bound.loss(model, guide, y))
    wanted = switched_joint(particles, y).mean()
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@WHERE
def test_enumeration_has_the_gradients_of_the_evidence(where):
    def model(y=None):
        p = pyro.param("p", torch.tensor(0.4))
        h = pyro.sample("h", dist.Bernoulli(p))
        a = pyro.sample("a", dist.Bernoulli(0.2 + 0.5 * h))
        m = pyro.sample("m", dist.Categorical(torch.tensor(OF_A)[a.long()]))
        pyro.sample("y", dist.Normal(m + h, 0.7), obs=y)

    y = torch.tensor(DATA)
    gradients = []
    for program in (config_enumerate(model), enumerated(where, model, ["a", "y"])):
        pyro.clear_param_store()
        loss = elbo().differentiable_loss(program, lambda y: None, y)
        (gradient,) = torch.autograd.grad(loss, pyro.get_param_store()["p"])
        gradients.append(gradient)
    assert gradients[0] != 0
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_enumeration_of_data_given_inside():
    """What is said to inference of one site stays with it."""

    def model(y=None):
        h = pyro.sample("h", dist.Bernoulli(0.4))
        a = pyro.sample(
            "a", dist.Bernoulli(0.2 + 0.5 * h), infer={"enumerate": "parallel"}
        )
        pyro.sample("y", dist.Normal(a + h, 0.7), obs=y)

    fused = pm.consolidate(model, ["a", "y"])
    y = torch.tensor(DATA)
    found = evidence(fused, y)
    wanted = evidence(config_enumerate(model), y)
    torch.testing.assert_close(found, wanted, **TOLERANCE)


@pytest.mark.parametrize("temperature", [0, 1])
def test_infer_discrete_of_what_is_kept(temperature):
    fused = config_enumerate(pm.consolidate(weather, ["a", "y"]))
    serving = infer_discrete(fused, first_available_dim=-1, temperature=temperature)
    y = torch.tensor(-1.8)
    _, logs = weather_evidence({}, float(y))
    draws = [
        poutine.trace(serving).get_trace(y).nodes["a"]["value"].item()
        for _ in range(1 if temperature == 0 else 60)
    ]
    if temperature == 0:
        assert draws[0] == logs.argmax()
    else:
        p = logs.softmax(0)[1]
        error = abs(sum(draws) / 60 - p)
        assert error < 5 * (p * (1 - p) / 60).sqrt()


# markov

MOVE = torch.tensor([[0.8, 0.2], [0.3, 0.7]], dtype=torch.float64)


def hidden_markov(y=None):
    """A chain, of which odd states are fused away; each one is seen with noise."""
    x = pyro.sample("x0", dist.Bernoulli(0.4))
    for t in pyro.markov(range(1, 6)):
        x = pyro.sample(f"x{t}", dist.Bernoulli(MOVE[x.long(), 1]))
        if t % 2 == 0:
            obs = None if y is None else y[t // 2 - 1]
            pyro.sample(f"y{t}", dist.Normal(x, 1.0), obs=obs)


CHAIN = [f"x{t}" for t in (0, 2, 4)] + ["y2", "y4"]


def chain_evidence(y, values=None):
    values, total = values or {}, torch.zeros(())
    for states in itertools.product((0, 1), repeat=5):
        at = {f"x{t}": s for t, s in enumerate(states)} | values
        p = torch.tensor(0.4 if states[0] else 0.6)
        for t in range(1, 5):
            p = p * MOVE[at[f"x{t - 1}"], states[t]]
        for t in (2, 4):
            p = p * dist.Normal(float(at[f"x{t}"]), 1.0).log_prob(y[t // 2 - 1]).exp()
        total = total + p
    return total.log()


@WHERE
@pytest.mark.parametrize("values", [{}, {"x1": 1}, {"x1": 0, "x3": 1}], ids=str)
def test_markov_chain_that_is_fused_in_part(where, values):
    y = torch.tensor([0.7, -0.2])
    model = enumerated(where, hidden_markov, CHAIN, ["x1", "x3"])
    model = done(model, tensors(values))
    found = evidence(model, y)
    torch.testing.assert_close(found, chain_evidence(y, values), **TOLERANCE)


def test_markov_chain_that_is_fused_as_a_whole():
    y = torch.tensor([0.7, -0.2])
    fused = pm.consolidate(hidden_markov, ["y2", "y4"])
    found = evidence(fused, y)
    torch.testing.assert_close(found, chain_evidence(y), **TOLERANCE)


def test_markov_chain_around_consolidated_steps():
    """Each step is a consolidated program of its own, with the last state given."""

    def step(x, y):
        h = pyro.sample("h", dist.Bernoulli(MOVE[x.long(), 1]))
        x = pyro.sample("x", dist.Bernoulli(MOVE[h.long(), 1]))
        pyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return x

    fused = pm.consolidate(
        step, ["x", "y"], model_args=(torch.tensor(0.0), torch.tensor(0.0))
    )

    def chain(inner):
        def model(y):
            x = pyro.sample("x0", dist.Bernoulli(0.4))
            for t in pyro.markov(range(2)):
                with Numbered(t):
                    x = inner(x, y[t])

        return config_enumerate(model)

    y = torch.tensor([0.7, -0.2])
    wanted = evidence(chain(step), y)
    torch.testing.assert_close(wanted, chain_evidence(y), **TOLERANCE)
    torch.testing.assert_close(evidence(chain(fused), y), wanted, **TOLERANCE)


class Numbered(poutine.messenger.Messenger):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def _pyro_sample(self, msg):
        msg["name"] = f"{msg['name']}_{self.number}"


def test_markov_chain_of_gaussians():
    def model():
        x = pyro.sample("x0", dist.Normal(0.0, 1.0))
        for t in pyro.markov(range(1, 6)):
            x = pyro.sample(f"x{t}", dist.Normal(0.9 * x, 0.5))

    fused = pm.consolidate(model, ["x0", "x2", "x5"], ["x3", "x4"])
    for values in ({}, {"x3": 1.0}, {"x3": 1.0, "x4": 2.0}, {"x2": 4.0}):
        names = [n for n in ("x0", "x2", "x5") if n not in values]
        data = tensors(values)
        assert_same_law(done(fused, data), done(model, data), names)


@pytest.mark.parametrize("values", SETTINGS, ids=str)
def test_enumeration_leaves_continuous_sites_alone(values):
    model = done(config_enumerate(fused_market()), tensors(values))
    assert_same_program(model, MARKET.fused(KEPT, **values), macros=("m",))


def test_evidence_by_hand_is_that_of_the_program():
    """The comparison itself: nothing fused, and all enumerated."""
    y = torch.tensor(DATA)
    found = evidence(config_enumerate(weather), y)
    torch.testing.assert_close(found, weather_evidence({})[0], **TOLERANCE)
    data = torch.tensor([0.7, -0.2])
    found = evidence(config_enumerate(hidden_markov), data)
    torch.testing.assert_close(found, chain_evidence(data), **TOLERANCE)
