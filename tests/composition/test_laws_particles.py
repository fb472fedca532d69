# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws that are not Gaussian under particles, ``Predictive`` and ``Importance``."""

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import Importance, Predictive, Trace_ELBO

import pyro_macro as pm

from .laws import (
    EXTREME,
    GAMMA,
    GIVEN,
    POISSON,
    POLYTOPE,
    SAMPLED,
    ByHand,
    every_law,
)

pytestmark = pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")


@every_law
@pytest.mark.parametrize("vectorized", [True, False])
def test_particles_each_have_the_elbo_by_hand(law, vectorized):
    # A guide that draws as the program by hand does: what is left is log p(y | x, w)
    def guide(y):
        poutine.block(law.case.by_hand, expose=["c", "sales__micro", "w"])()

    elbo = Trace_ELBO(
        num_particles=6, vectorize_particles=vectorized, max_plate_nesting=0
    )
    losses = []
    for model in (law.intervened, law.case.by_hand):
        pyro.set_rng_seed(3)
        losses.append(elbo.loss(model, guide, torch.tensor(9.0)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-10)


@every_law
@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_predictive_holds_the_total_in_each_sample(law, parallel):
    n = 12
    out = Predictive(law.intervened, num_samples=n, parallel=parallel)()
    assert {"sales", "sales__micro", "x1", "x2", "w", "y"} <= set(out)
    x = torch.stack([out["x1"].reshape(n), out["x2"].reshape(n)], -1)
    total = law.case.total(x)
    torch.testing.assert_close(total, torch.full((n,), law.case.value))
    assert len(x.unique(dim=0)) > 1
    # What propagates: y is within 5 of its standard deviations of its mean
    mean = x[:, 0] + 3 * x[:, 1] + out["w"].reshape(n)
    mean = mean + (5 * out["c"].reshape(n) if law.case.cause else 0.0)
    assert (out["y"].reshape(n) - mean).abs().max() < 2.5


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_predictive_of_draws_on_the_fibre(parallel):
    model = pm.macro_do(SAMPLED.model, SAMPLED.interventions)
    out = Predictive(model, num_samples=8, parallel=parallel)()
    x = out["sales__micro"].reshape(8, 2)
    torch.testing.assert_close(x.sum(-1), torch.full((8,), 4.0))
    assert len(x.unique(dim=0)) > 4


@pytest.mark.parametrize("parallel", [True, False], ids=["parallel", "sequential"])
def test_predictive_holds_the_given_cause_of_each_posterior_sample(parallel):
    # P(x1 = 1 | 2, c) is 0.538 and 0.757: means, within 4.5 standard errors
    c = torch.tensor([0.0, 1.0]).repeat(400 if parallel else 40)
    model = pm.macro_do(GIVEN.model, GIVEN.interventions)
    out = Predictive(model, posterior_samples={"c": c}, parallel=parallel)()
    x1 = out["x1"].reshape(-1, 2)
    for value in (0, 1):
        chance = GIVEN.log_density(torch.tensor([1.0, 1.0]), torch.tensor(value)).exp()
        error = (chance * (1 - chance) / len(x1)).sqrt()
        assert abs(x1[:, value].mean() - chance) < 4.5 * error


@pytest.mark.parametrize("case", [GAMMA, POISSON, EXTREME, POLYTOPE], ids=repr)
def test_importance_estimates_the_evidence(case):
    def evidence(model):
        pyro.set_rng_seed(11)
        importance = Importance(model, num_samples=40)
        importance.run(torch.tensor(12.0))
        weights = torch.stack([torch.as_tensor(w) for w in importance.log_weights])
        return weights.exp().mean(), weights.exp().var() / 40

    found, error = evidence(pm.macro_do(case.model, case.interventions))
    wanted, other = evidence(case.by_hand)
    assert abs(found - wanted) < 4.5 * (error + other).sqrt()


def test_hand_written_law_can_be_expanded():
    law = ByHand(lambda x: x.sum(-1), lambda s: torch.zeros(*s, 2)).expand([3])
    assert law.sample().shape == (3, 2)
    assert law.log_prob(torch.ones(2)).shape == (3,)
