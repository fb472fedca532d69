# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws that are not Gaussian under ``config_enumerate`` and ``pyro.markov``.

Counts and finite micro states are latent sites with a finite support: they are summed
out by ``TraceEnum_ELBO`` too.
"""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import config_enumerate

import pyro_macro as pm

from .laws import (
    EXTREME,
    FINITE,
    GAMMA,
    GIVEN,
    POISSON,
    POLYTOPE,
    SAMPLED,
    STATES,
    elbo,
    every_law,
    evidence,
    log_w,
    w_guide,
)

pytestmark = pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
Y = torch.tensor(9.0, dtype=torch.float64)
CONTINUOUS = [GAMMA, POLYTOPE]
DISCRETE = [POISSON, FINITE, GIVEN]
NO_COORDINATES = [POISSON, FINITE, GIVEN, EXTREME, SAMPLED]


# Enumeration


@pytest.mark.parametrize("where", ["inside", "outside"])
@every_law
def test_enumerated_site_beside_is_summed_out(law, where):
    def beside():
        c = pyro.sample("c", dist.Bernoulli(0.4)) if law.case.cause else None
        x1, x2 = law.case.parts(c)
        w = pyro.sample("w", dist.Bernoulli(0.3))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + 4 * w, 2.0), obs=Y)

    state = law.case.draw(torch.Size(), torch.tensor(1.0))

    def guide():
        if law.case.cause:
            pyro.sample("c", dist.Delta(torch.tensor(1.0)))
        pyro.sample("sales__micro", dist.Delta(state, event_dim=1))

    hide = {"sales__micro", "c"}
    config = {"default": "parallel"}
    if where == "inside":
        model = law.do(config_enumerate(beside, **config))
    else:
        model = config_enumerate(law.do(beside), **config)
    model = poutine.infer_config(
        model, lambda site: {"enumerate": None} if site["name"] in hide else {}
    )
    mean = state[0] + 3 * state[1] + 4 * torch.tensor([0.0, 1.0])
    wanted = law.case.log_density(state, torch.tensor(1.0)) + torch.logsumexp(
        torch.tensor([0.7, 0.3]).log() + dist.Normal(mean, 2.0).log_prob(Y), 0
    )
    wanted = wanted + (torch.tensor(0.4).log() if law.case.cause else 0.0)
    found = -torch.tensor(elbo().loss(model, guide))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("y", [4.0, 9.0, 16.0])
@pytest.mark.parametrize("case", DISCRETE, ids=repr)
def test_enumerated_micro_state_is_summed_out(case, y):
    y = torch.tensor(y)
    model = config_enumerate(pm.macro_do(case.model, case.interventions))
    found = -torch.tensor(elbo().loss(model, w_guide, y))
    torch.testing.assert_close(found, evidence(case, y) + log_w())


def test_enumerated_micro_state_has_the_gradients_by_hand():
    def rates():
        return pyro.param("rates", torch.tensor([2.0, 3.0]))

    def model():
        x1 = pyro.sample("x1", dist.Poisson(rates()[0]))
        x2 = pyro.sample("x2", dist.Poisson(rates()[1]))
        pyro.sample("y", dist.Normal(x1 + 3 * x2, 2.0), obs=Y)

    intervened = config_enumerate(pm.macro_do(model, POISSON.interventions))
    loss = elbo().differentiable_loss(intervened, lambda: None)
    states = torch.tensor(STATES[POISSON])
    law = dist.Multinomial(5, rates() / rates().sum(), validate_args=False)
    seen = dist.Normal(states @ torch.tensor([1.0, 3.0]), 2.0).log_prob(Y)
    wanted = -(law.log_prob(states) + seen).logsumexp(0)
    torch.testing.assert_close(loss, wanted)
    param = pyro.get_param_store()["rates"].unconstrained()
    gradients = [torch.autograd.grad(value, param)[0] for value in (loss, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", [POISSON, FINITE], ids=repr)
def test_enumerated_micro_states_along_a_plate_are_summed_out_each(case):
    y = torch.tensor([9.0, 14.0, 4.0])

    def model():
        with pyro.plate("slots", 3, dim=-1):
            return case.model(y)

    def guide():
        with pyro.plate("slots", 3, dim=-1):
            pyro.sample("w", dist.Delta(torch.ones(3)))

    intervened = config_enumerate(pm.macro_do(model, case.interventions))
    found = -torch.tensor(elbo(1).loss(intervened, guide))
    wanted = sum(evidence(case, value) for value in y) + 3 * log_w()
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("case", [GAMMA, EXTREME, POLYTOPE], ids=repr)
def test_enumeration_leaves_a_continuous_micro_state_alone(case):
    def guide(y):
        poutine.block(case.by_hand, expose=["sales__micro", "w"])()

    losses = []
    for model in (pm.macro_do(case.model, case.interventions), case.by_hand):
        pyro.set_rng_seed(2)
        losses.append(elbo().loss(config_enumerate(model), guide, Y))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


# pyro.markov


START, MOVE = [0.6, 0.4], [[0.9, 0.1], [0.2, 0.8]]


@pytest.mark.parametrize("case", [GAMMA, POISSON, EXTREME, POLYTOPE], ids=repr)
def test_markov_chain_beside_is_summed_out(case):
    seen = torch.tensor([9.0, 7.0, 12.0])

    def model():
        x1, x2 = case.parts(None)
        state = None
        for t in pyro.markov(range(3)):
            probs = torch.tensor(START) if t == 0 else torch.tensor(MOVE)[state]
            state = pyro.sample(
                f"z_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"}
            )
            mean = x1 + 3 * x2 + 4.0 * state
            pyro.sample(f"y_{t}", dist.Normal(mean, 2.0), obs=seen[t])

    x = case.draw(torch.Size(), None)

    def guide():
        pyro.sample("sales__micro", dist.Delta(x, event_dim=1))

    rows = []
    for path in itertools.product(range(2), repeat=3):
        prior = torch.tensor(START[path[0]]).log()
        for a, b in itertools.pairwise(path):
            prior = prior + torch.tensor(MOVE[a][b]).log()
        mean = x[0] + 3 * x[1] + 4 * torch.tensor(path)
        rows.append(prior + dist.Normal(mean, 2.0).log_prob(seen).sum())
    wanted = case.log_density(x, None) + torch.stack(rows).logsumexp(0)
    found = -torch.tensor(elbo().loss(pm.macro_do(model, case.interventions), guide))
    torch.testing.assert_close(found, wanted)


def test_finite_parts_along_a_markov_chain_have_it_summed_out():
    # Each z_t acts on a part; all are summed out of the law of the parts
    total = pm.MacroVariable("sales", micro=["x_0", "x_1", "x_2"])

    def model():
        state = None
        for t in pyro.markov(range(3)):
            probs = torch.tensor(START) if t == 0 else torch.tensor(MOVE)[state]
            state = pyro.sample(f"z_{t}", dist.Categorical(probs))
            pyro.sample(f"x_{t}", dist.Bernoulli(0.2 + 0.5 * state))

    trace = poutine.trace(pm.macro_do(model, {total: pm.Natural(2.0)})).get_trace()

    def joint(x):
        rows = []
        for path in itertools.product(range(2), repeat=3):
            p = torch.tensor(START[path[0]])
            for a, b in itertools.pairwise(path):
                p = p * MOVE[a][b]
            own = dist.Bernoulli(0.2 + 0.5 * torch.tensor(path)).log_prob(x).sum()
            rows.append(p.log() + own)
        return torch.stack(rows).logsumexp(0)

    states = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    wanted = torch.stack([joint(x) for x in states]).log_softmax(0)
    law = trace.nodes["sales__micro"]["fn"]
    torch.testing.assert_close(law.log_prob(states), wanted)
