# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``config_enumerate`` with ``TraceEnum_ELBO``, and ``pyro.markov``.

Guides put the micro state at a point, so that the ELBO is the log density there with
the discrete sites summed out: a number that can be written by hand.
"""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO, config_enumerate, infer_discrete

import pyro_macro as pm

from .models import NATURAL, SALES, assert_only_added, sales_total

POINT = [13.0, 20.0]
WEIGHTS = [0.3, 0.7]
EFFECT = [-2.0, 5.0]
LOC1, SCALE1 = [8.0, 14.0], [2.0, 1.0]
LOC2, SCALE2 = [20.0, 22.0], [1.0, 3.0]
Y = 70.0


def normal(loc, scale):
    return dist.Normal(torch.as_tensor(loc), torch.as_tensor(scale))


def point_guide(*args):
    pyro.sample("sales__micro", dist.Delta(torch.tensor(POINT), event_dim=1))


def elbo(nesting=0):
    # Nothing is enumerated in the guides here
    return TraceEnum_ELBO(max_plate_nesting=nesting, strict_enumeration_warning=False)


def loss(model, guide=point_guide, nesting=0):
    return torch.tensor(elbo(nesting).loss(model, guide))


def enumerated(where, do, model, interventions):
    """``config_enumerate`` inside or outside of ``macro_do``."""
    if where == "inside":
        return do(config_enumerate(model), interventions)
    return config_enumerate(do(model, interventions))


@pytest.fixture(params=["inside", "outside"])
def where(request):
    return request.param


# A discrete site that does not act on the micro state


def beside():
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    c = pyro.sample("c", dist.Categorical(torch.tensor(WEIGHTS)))
    mean = x1 + 3 * x2 + torch.tensor(EFFECT)[c]
    pyro.sample("y", dist.Normal(mean, 0.5), obs=torch.tensor(Y))


def test_enumerated_site_beside_the_macro_variable_is_summed_out(do, where):
    x1, x2 = POINT
    wanted = normal(12.4, 0.8**0.5).log_prob(torch.tensor(x1)) + torch.logsumexp(
        torch.tensor(WEIGHTS).log()
        + normal(x1 + 3 * x2 + torch.tensor(EFFECT), 0.5).log_prob(torch.tensor(Y)),
        0,
    )
    found = -loss(enumerated(where, do, beside, NATURAL))
    torch.testing.assert_close(found, wanted)


def test_enumerated_site_beside_the_macro_variable_has_the_posterior_by_hand(do, where):
    x1, x2 = POINT
    model = enumerated(where, do, beside, NATURAL)
    marginals = elbo().compute_marginals(model, point_guide)
    joint = torch.tensor(WEIGHTS).log() + normal(
        x1 + 3 * x2 + torch.tensor(EFFECT), 0.5
    ).log_prob(torch.tensor(Y))
    torch.testing.assert_close(marginals["c"].probs, joint.softmax(0))


def test_enumerated_site_before_the_macro_variable_needs_no_given_in_a_wrapper(where):
    def model():
        c = pyro.sample("c", dist.Categorical(torch.tensor(WEIGHTS)))
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        mean = x1 + 3 * x2 + torch.tensor(EFFECT)[c]
        pyro.sample("y", dist.Normal(mean, 0.5), obs=torch.tensor(Y))

    found = loss(enumerated(where, pm.macro_do, model, NATURAL))
    torch.testing.assert_close(
        found, loss(enumerated(where, pm.macro_do, beside, NATURAL))
    )


def test_enumerated_site_leaves_the_latent_site_without_its_dimension(do, where):
    model = enumerated(where, do, beside, NATURAL)
    trace = poutine.trace(poutine.enum(model, first_available_dim=-1)).get_trace()
    assert trace.nodes["c"]["value"].shape == (2,)
    assert trace.nodes["sales__micro"]["fn"].batch_shape == ()


# A discrete site in `given` that acts on the micro state


def mixture():
    c = pyro.sample("c", dist.Categorical(torch.tensor(WEIGHTS)))
    x1 = pyro.sample("x1", dist.Normal(torch.tensor(LOC1)[c], torch.tensor(SCALE1)[c]))
    x2 = pyro.sample("x2", dist.Normal(torch.tensor(LOC2)[c], torch.tensor(SCALE2)[c]))
    mean = x1 + 3 * x2 + torch.tensor(EFFECT)[c]
    pyro.sample("y", dist.Normal(mean, 0.5), obs=torch.tensor(Y))


GIVEN_C = {SALES: pm.Natural(33.0, given=["c"])}


def given_c(c, value=33.0):
    """P(x1 | total, c)."""
    v1, v2 = SCALE1[c] ** 2, SCALE2[c] ** 2
    gain = v1 / (v1 + v2)
    return normal(
        LOC1[c] + gain * (value - LOC1[c] - LOC2[c]), (v1 * v2 / (v1 + v2)) ** 0.5
    )


def joint_by_hand(x1, c, y=Y, value=33.0):
    mean = x1 + 3 * (value - x1) + EFFECT[c]
    return (
        torch.tensor(WEIGHTS[c]).log()
        + given_c(c, value).log_prob(torch.as_tensor(x1))
        + normal(mean, 0.5).log_prob(torch.tensor(y))
    )


def test_given_site_that_is_enumerated_gives_a_mixture(do, where):
    wanted = torch.stack([joint_by_hand(POINT[0], c) for c in range(2)]).logsumexp(0)
    found = -loss(enumerated(where, do, mixture, GIVEN_C))
    torch.testing.assert_close(found, wanted)


def test_given_site_that_is_enumerated_has_the_posterior_by_hand(do, where):
    model = enumerated(where, do, mixture, GIVEN_C)
    marginals = elbo().compute_marginals(model, point_guide)
    joint = torch.stack([joint_by_hand(POINT[0], c) for c in range(2)])
    torch.testing.assert_close(marginals["c"].probs, joint.softmax(0))


def test_given_site_that_is_enumerated_is_on_the_fibre_for_each_of_its_values(
    do, where
):
    model = enumerated(where, do, mixture, GIVEN_C)
    trace = poutine.trace(poutine.enum(model, first_available_dim=-1)).get_trace()
    site = trace.nodes["sales__micro"]
    assert site["fn"].batch_shape == (2,)
    for c in range(2):
        torch.testing.assert_close(site["fn"].mean[c, 0], given_c(c).mean)
        torch.testing.assert_close(site["fn"].variance[c, 0], given_c(c).variance)
    total = trace.nodes["x1"]["value"] + trace.nodes["x2"]["value"]
    torch.testing.assert_close(total, torch.tensor([33.0, 33.0]))


def test_given_site_that_is_enumerated_in_a_plate(do, where):
    y = torch.tensor([60.0, 70.0, 80.0])
    values = torch.tensor([33.0, 30.0, 36.0])

    def model():
        with pyro.plate("n", 3, dim=-1), poutine.condition(data={"y": y}):
            mixture()

    def guide():
        with pyro.plate("n", 3, dim=-1):
            x1 = torch.full((3,), POINT[0])
            x = torch.stack([x1, values - x1], -1)
            pyro.sample("sales__micro", dist.Delta(x, event_dim=1))

    wanted = sum(
        torch.stack(
            [
                joint_by_hand(POINT[0], c, float(y[i]), float(values[i]))
                for c in range(2)
            ]
        ).logsumexp(0)
        for i in range(3)
    )
    realization = {SALES: pm.Natural(values, given=["c"])}
    found = -loss(enumerated(where, do, model, realization), guide, nesting=1)
    torch.testing.assert_close(found, wanted)


def test_given_site_outside_of_a_plate_is_summed_out_over_the_whole_plate(where):
    y = torch.tensor([60.0, 70.0, 80.0])

    def model():
        c = pyro.sample("c", dist.Categorical(torch.tensor(WEIGHTS)))
        with pyro.plate("n", 3, dim=-1):
            loc1, loc2 = torch.tensor(LOC1)[c], torch.tensor(LOC2)[c]
            x1 = pyro.sample("x1", dist.Normal(loc1, torch.tensor(SCALE1)[c]))
            x2 = pyro.sample("x2", dist.Normal(loc2, torch.tensor(SCALE2)[c]))
            mean = x1 + 3 * x2 + torch.tensor(EFFECT)[c]
            pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    def guide():
        with pyro.plate("n", 3, dim=-1):
            x = torch.tensor([POINT, [12.0, 21.0], [10.0, 23.0]])
            pyro.sample("sales__micro", dist.Delta(x, event_dim=1))

    rows = []
    for c in range(2):
        prior = torch.tensor(WEIGHTS[c]).log()
        parts = [
            joint_by_hand(x1, c, float(y[i])) - prior
            for i, x1 in enumerate([POINT[0], 12.0, 10.0])
        ]
        rows.append(prior + sum(parts))
    found = -loss(enumerated(where, pm.macro_do, model, GIVEN_C), guide, nesting=1)
    torch.testing.assert_close(found, torch.stack(rows).logsumexp(0))


def test_given_site_that_is_enumerated_has_the_gradients_by_hand(do, where):
    def model():
        weights = pyro.param("weights", torch.tensor([0.1, 0.4]))
        loc = pyro.param("loc", torch.tensor(LOC1))
        c = pyro.sample("c", dist.Categorical(logits=weights))
        x1 = pyro.sample("x1", dist.Normal(loc[c], torch.tensor(SCALE1)[c]))
        x2 = pyro.sample("x2", dist.Normal(20.0, torch.tensor(SCALE2)[c]))
        mean = x1 + 3 * x2 + torch.tensor(EFFECT)[c]
        pyro.sample("y", dist.Normal(mean, 0.5), obs=torch.tensor(Y))

    def by_hand():
        weights = pyro.param("weights", torch.tensor([0.1, 0.4]))
        loc = pyro.param("loc", torch.tensor(LOC1))
        v1, v2 = torch.tensor(SCALE1).square(), torch.tensor(SCALE2).square()
        mean = loc + v1 / (v1 + v2) * (33 - loc - 20)
        x1 = torch.tensor(POINT[0])
        joint = (
            weights.log_softmax(0)
            + dist.Normal(mean, (v1 * v2 / (v1 + v2)).sqrt()).log_prob(x1)
            + normal(x1 + 3 * (33 - x1) + torch.tensor(EFFECT), 0.5).log_prob(
                torch.tensor(Y)
            )
        )
        return -joint.logsumexp(0)

    gradients = []
    intervened = enumerated(where, do, model, GIVEN_C)
    for compute in (
        lambda: elbo().differentiable_loss(intervened, point_guide),
        by_hand,
    ):
        value = compute()
        store = pyro.get_param_store()
        params = [store[name].unconstrained() for name in ("weights", "loc")]
        gradients.append(torch.autograd.grad(value, params))
    for found, wanted in zip(*gradients, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(found, wanted)


def test_discrete_cause_that_is_not_given_is_summed_out_of_the_law(where):
    """Cut off from the micro state, the cause is enumerated for what is downstream."""
    x1, x2 = POINT
    rows = []
    for c in range(2):
        v1, v2 = SCALE1[c] ** 2, SCALE2[c] ** 2
        total = normal(LOC1[c] + LOC2[c], (v1 + v2) ** 0.5)
        prior = torch.tensor(WEIGHTS[c]).log()
        rows.append(prior + total.log_prob(torch.tensor(33.0)))
    share = torch.stack(rows).log_softmax(0)
    law = share + torch.stack([given_c(c).log_prob(torch.tensor(x1)) for c in range(2)])
    seen = normal(x1 + 3 * x2 + torch.tensor(EFFECT), 0.5).log_prob(torch.tensor(Y))
    wanted = law.logsumexp(0) + (torch.tensor(WEIGHTS).log() + seen).logsumexp(0)
    found = -loss(enumerated(where, pm.macro_do, mixture, NATURAL))
    torch.testing.assert_close(found, wanted)
    # Held, it is another model
    held = -loss(enumerated(where, pm.macro_do, mixture, GIVEN_C))
    assert (held - found).abs() > 0.01


def test_inferred_discrete_site_is_one_of_the_posterior(do, where):
    # At x1 = 13 and y = 70 the second value has all but 1e-9 of the mass
    joint = torch.stack([joint_by_hand(POINT[0], c, y=78.0) for c in range(2)])
    assert joint.softmax(0)[1] > 1 - 1e-6
    model = enumerated(where, do, mixture, GIVEN_C)
    data = {"sales__micro": torch.tensor(POINT), "y": torch.tensor(78.0)}
    inferred = infer_discrete(
        poutine.condition(model, data), first_available_dim=-1, temperature=0
    )
    nodes = poutine.trace(inferred).get_trace().nodes
    assert nodes["c"]["value"] == 1
    assert nodes["x1"]["value"] == POINT[0]


# pyro.markov

START = [0.6, 0.4]
MOVE = [[0.9, 0.1], [0.2, 0.8]]
SEEN = [77.0, 71.0, 76.0, 70.0]


def chain(t, state):
    probs = torch.tensor(START) if t == 0 else torch.tensor(MOVE)[state]
    return pyro.sample(
        f"z_{t}", dist.Categorical(probs), infer={"enumerate": "parallel"}
    )


def path_prior(path):
    p = torch.tensor(START[path[0]])
    for a, b in itertools.pairwise(path):
        p = p * MOVE[a][b]
    return p.log()


def paths(length):
    return itertools.product(range(2), repeat=length)


@pytest.mark.parametrize("history", [1, 2])
def test_markov_chain_beside_the_macro_variable_is_summed_out(do, history):
    def model():
        x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        state = None
        for t in pyro.markov(range(4), history=history):
            state = chain(t, state)
            mean = x1 + 3 * x2 + torch.tensor(EFFECT)[state]
            pyro.sample(f"y_{t}", dist.Normal(mean, 1.0), obs=torch.tensor(SEEN[t]))

    mean = POINT[0] + 3 * POINT[1]
    rows = [
        path_prior(path)
        + sum(
            normal(mean + EFFECT[s], 1.0).log_prob(torch.tensor(SEEN[t]))
            for t, s in enumerate(path)
        )
        for path in paths(4)
    ]
    wanted = torch.stack(rows).logsumexp(0)
    wanted = wanted + normal(12.4, 0.8**0.5).log_prob(torch.tensor(POINT[0]))
    torch.testing.assert_close(-loss(do(model, NATURAL)), wanted)


TOTAL = pm.MacroVariable("sales", micro=["x_0", "x_1", "x_2"])
STATE = [9.0, 13.0, 11.0]


def state_guide():
    pyro.sample("sales__micro", dist.Delta(torch.tensor(STATE), event_dim=1))


def hidden(acts, length=3, steps=pyro.markov):
    """Parts x_t along a chain z_t, which acts on them with slope ``acts``."""

    def model():
        state = None
        for t in steps(range(length)):
            state = chain(t, state)
            loc = 10.0 + t + (acts * state if acts else 0.0)
            x = pyro.sample(f"x_{t}", dist.Normal(loc, 1.0 + t))
            mean = 2 * x + torch.tensor(EFFECT)[state]
            pyro.sample(f"y_{t}", dist.Normal(mean, 3.0), obs=torch.tensor(25.0))

    return model


def hidden_by_hand(acts, length=3):
    x = torch.tensor(STATE[:length])
    rows = []
    for path in paths(length):
        loc = 10 + torch.arange(float(length)) + acts * torch.tensor(path)
        scale = 1.0 + torch.arange(float(length))
        # log P(x | total) with respect to all but the last coordinate
        law = dist.Normal(loc, scale).log_prob(x).sum()
        total = dist.Normal(loc.sum(), scale.square().sum().sqrt()).log_prob(x.sum())
        seen = normal(2 * x + torch.tensor(EFFECT)[list(path)], 3.0)
        seen = seen.log_prob(torch.tensor(25.0)).sum()
        rows.append(path_prior(path) + law - total + seen)
    return torch.stack(rows).logsumexp(0)


def test_micro_sites_along_a_markov_chain_that_does_not_act_on_them():
    model = pm.macro_do(hidden(0.0), {TOTAL: pm.Natural(33.0)})
    torch.testing.assert_close(-loss(model, state_guide), hidden_by_hand(0.0))


def test_micro_sites_in_a_markov_loop_need_a_wrapper():
    with pytest.raises(pm.PyroMacroError, match="'x_0' is used before the last"):
        with pm.macro_do(interventions={TOTAL: pm.Natural(33.0)}):
            hidden(0.0)()


def test_given_chain_in_a_plain_loop_gives_a_mixture():
    # Without pyro.markov every state has a dimension of its own
    given = ["z_0", "z_1", "z_2"]
    model = hidden(2.0, steps=iter)
    found = -loss(
        pm.macro_do(model, {TOTAL: pm.Natural(33.0, given=given)}), state_guide
    )
    torch.testing.assert_close(found, hidden_by_hand(2.0))


def test_given_markov_chain_within_its_history_gives_a_mixture():
    # The latent site stands where the first part does, with both states in scope
    def model():
        state, states = None, []
        for t in pyro.markov(range(2)):
            state = chain(t, state)
            states.append(state)
            if t == 1:
                for i, s in enumerate(states):
                    x = pyro.sample(f"x_{i}", dist.Normal(10.0 + i + 2.0 * s, 1.0 + i))
                    mean = 2 * x + torch.tensor(EFFECT)[s]
                    pyro.sample(
                        f"y_{i}", dist.Normal(mean, 3.0), obs=torch.tensor(25.0)
                    )

    def guide():
        pyro.sample("sales__micro", dist.Delta(torch.tensor(STATE[:2]), event_dim=1))

    two = pm.MacroVariable("sales", micro=["x_0", "x_1"])
    given = {two: pm.Natural(22.0, given=["z_0", "z_1"])}
    found = -loss(pm.macro_do(model, given), guide)
    torch.testing.assert_close(found, hidden_by_hand(2.0, 2))


@pytest.mark.parametrize("loops, length", [("one", 2), ("one", 3), ("two", 3)])
def test_given_markov_chain_out_of_scope_is_an_error_that_names_the_site(loops, length):
    # Of the states that the law depends on, some are not in scope where the latent site
    # stands: later ones, or ones whose dimension is used again. Pyro itself refuses the
    # shape, at the latent site.
    def apart():
        state, states = None, []
        for t in pyro.markov(range(length)):
            state = chain(t, state)
            states.append(state)
        for t, state in enumerate(states):
            pyro.sample(f"x_{t}", dist.Normal(10.0 + t + 2.0 * state, 1.0 + t))

    def guide():
        state = torch.tensor(STATE[:length])
        pyro.sample("sales__micro", dist.Delta(state, event_dim=1))

    steps = range(length)
    parts = pm.MacroVariable("sales", micro=[f"x_{t}" for t in steps])
    given = {parts: pm.Natural(33.0, given=[f"z_{t}" for t in steps])}
    model = hidden(2.0, length) if loops == "one" else apart
    with pytest.raises((pm.PyroMacroError, ValueError), match="sales"):
        loss(pm.macro_do(model, given), guide)


def test_markov_chain_that_acts_on_the_parts_is_summed_out_of_their_law():
    x, steps = torch.tensor(STATE), torch.arange(3.0)
    scale = 1.0 + steps
    joint, total, seen = [], [], []
    for path in paths(3):
        prior, states = path_prior(path), torch.tensor(path)
        loc = 10 + steps + 2.0 * states
        sums = dist.Normal(loc.sum(), scale.square().sum().sqrt())
        joint.append(prior + dist.Normal(loc, scale).log_prob(x).sum())
        total.append(prior + sums.log_prob(x.sum()))
        watched = normal(2 * x + torch.tensor(EFFECT)[states], 3.0)
        seen.append(prior + watched.log_prob(torch.tensor(25.0)).sum())
    law = torch.stack(joint).logsumexp(0) - torch.stack(total).logsumexp(0)
    found = -loss(pm.macro_do(hidden(2.0), {TOTAL: pm.Natural(33.0)}), state_guide)
    torch.testing.assert_close(found, law + torch.stack(seen).logsumexp(0))


# aggregate


def test_aggregate_of_an_enumerated_program_leaves_the_elbo_as_it_was(add, where):
    def guide():
        pyro.sample("x1", dist.Delta(torch.tensor(POINT[0])))
        pyro.sample("x2", dist.Delta(torch.tensor(POINT[1])))

    for model in (beside, mixture):
        if where == "inside":
            aggregated = add(config_enumerate(model), [SALES])
        else:
            aggregated = config_enumerate(add(model, [SALES]))
        wanted = loss(config_enumerate(model), guide)
        torch.testing.assert_close(loss(aggregated, guide), wanted)
        assert_only_added(aggregated, config_enumerate(model), sales_total)


def test_aggregate_along_a_markov_chain_leaves_the_elbo_as_it_was(add):
    def guide():
        for t in range(3):
            pyro.sample(f"x_{t}", dist.Delta(torch.tensor(STATE[t])))

    model = hidden(2.0)
    wanted = loss(model, guide)
    torch.testing.assert_close(loss(add(model, [TOTAL]), guide), wanted)
