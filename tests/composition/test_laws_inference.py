# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws that are not Gaussian under enumeration, autoguides and NUTS.

Counts and finite micro states are latent sites with a finite support: they are summed
out by ``TraceEnum_ELBO`` and ``NUTS``. Continuous ones have ``K - 1`` free coordinates.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, config_enumerate
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from pyro.infer.mcmc.util import initialize_model
from torch.distributions import biject_to

import pyro_macro as pm

from .laws import (
    CASES,
    EXTREME,
    FINITE,
    GAMMA,
    GIVEN,
    POISSON,
    POLYTOPE,
    SAMPLED,
    elbo,
    evidence,
    shares,
)
from .models import SALES

pytestmark = pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
Y = torch.tensor(9.0, dtype=torch.float64)
CONTINUOUS = [GAMMA, POLYTOPE]
DISCRETE = [POISSON, FINITE, GIVEN]
NO_COORDINATES = [POISSON, FINITE, GIVEN, EXTREME, SAMPLED]


# Autoguides


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("case", CONTINUOUS, ids=repr)
def test_autoguide_draws_on_the_fibre_in_one_coordinate_less(case, kind):
    model = pm.macro_do(case.model, case.interventions)
    guide = kind(model)
    for _ in range(3):
        x = guide(Y)["sales__micro"]
        torch.testing.assert_close(x.sum(-1), torch.tensor(case.value))
        assert biject_to(guide.prototype_trace.nodes["sales__micro"]["fn"].support)
        assert case.log_density(x, None).isfinite(), "within the supports"
    if kind is AutoNormal:
        assert guide.locs.sales__micro.shape == (1,)
    else:
        assert guide.latent_dim == 2  # one of the micro state, one of w
    torch.testing.assert_close(
        guide.median(Y)["sales__micro"].sum(-1), torch.tensor(case.value)
    )


@pytest.mark.parametrize("case", CONTINUOUS, ids=repr)
def test_autoguide_has_the_elbo_by_hand(case):
    # The guide's draws in turn as a point: densities and Jacobian belong together
    model = pm.macro_do(case.model, case.interventions)
    guide = AutoMultivariateNormal(model, init_scale=0.3)
    guide(Y)
    for seed in range(3):
        pyro.set_rng_seed(seed)
        drawn = poutine.trace(guide).get_trace(Y)
        trace = poutine.trace(poutine.replay(model, trace=drawn)).get_trace(Y)
        x, w = (drawn.nodes[name]["value"] for name in ("sales__micro", "w"))
        site = guide.prototype_trace.nodes["sales__micro"]["fn"]
        transform = biject_to(site.support)
        z = transform.inv(x.detach()).requires_grad_()
        (slope,) = torch.autograd.grad(transform(z)[0], z)
        free = torch.cat([z.detach(), w.detach().reshape(1)])
        own = guide.get_posterior().log_prob(free) - slope.abs().log().sum()
        mean = x[0] + 3 * x[1] + w
        wanted = (
            case.log_density(x, None)
            + dist.Normal(1.0, 3.0).log_prob(w)
            + dist.Normal(mean, 0.5).log_prob(Y)
        )
        torch.testing.assert_close(trace.log_prob_sum(), wanted)
        torch.testing.assert_close(drawn.log_prob_sum(), own)


@pytest.mark.parametrize("kind", [AutoNormal, AutoMultivariateNormal])
@pytest.mark.parametrize("case", NO_COORDINATES, ids=repr)
def test_autoguide_of_what_has_no_coordinates_is_an_error_that_says_why(case, kind):
    hide = ["c"] if case.cause else []
    model = poutine.block(pm.macro_do(case.model, case.interventions), hide=hide)
    with pytest.raises((pm.UnsupportedLaw, NotImplementedError), match=case.why):
        kind(model)(Y)


def test_autoguide_beside_an_enumerated_micro_state_learns_the_posterior_by_hand():
    # q(w) at the mode of its marginal posterior, the counts summed out
    model = config_enumerate(pm.macro_do(POISSON.model, POISSON.interventions))
    guide = AutoDelta(poutine.block(model, hide=["sales__micro"]))
    optimizer = pyro.optim.Adam({"lr": 0.1})
    svi = pyro.infer.SVI(model, guide, optimizer, elbo())
    for _ in range(150):
        svi.step(Y)
    grid = torch.linspace(-8, 8, 3201)
    density = evidence(POISSON, Y, w=grid) + dist.Normal(1.0, 3.0).log_prob(grid)
    slope = density.diff().sign().diff()
    modes = grid[1:-1][slope < 0]
    assert (modes - guide.median()["w"]).abs().min() < 0.02


# NUTS


@pytest.mark.parametrize("case", CONTINUOUS, ids=repr)
def test_nuts_sees_the_free_coordinate_and_the_density_by_hand(case):
    model = pm.macro_do(case.model, case.interventions)
    initial, potential, transforms, _ = initialize_model(model, model_args=(Y,))
    assert initial["sales__micro"].shape == (1,)
    transform = transforms["sales__micro"].inv
    for free in (torch.tensor([-1.3]), torch.tensor([0.4])):
        free = free.requires_grad_()
        x = transform(free)
        torch.testing.assert_close(x.sum(), torch.tensor(case.value))
        (slope,) = torch.autograd.grad(x[0], free, create_graph=True)
        w = torch.tensor(2.0)
        wanted = -(
            case.log_density(x, None)
            + dist.Normal(1.0, 3.0).log_prob(w)
            + dist.Normal(x[0] + 3 * x[1] + w, 0.5).log_prob(Y)
            + slope.abs().log().sum()
        )
        found = potential({"sales__micro": free, "w": w})
        torch.testing.assert_close(found, wanted)
        gradients = [torch.autograd.grad(v, free)[0] for v in (found, wanted)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("case", CONTINUOUS, ids=repr)
def test_nuts_in_a_short_run_stays_on_the_fibre(case):
    model = pm.macro_do(case.model, case.interventions)
    kernel = NUTS(model, max_tree_depth=2)
    mcmc = MCMC(kernel, num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run(Y)
    x = mcmc.get_samples()["sales__micro"]
    torch.testing.assert_close(x.sum(-1), torch.full((5,), case.value))
    assert len(x[:, 0].unique()) > 1


@pytest.mark.parametrize("case", DISCRETE, ids=repr)
def test_nuts_sums_a_discrete_micro_state_out(case):
    model = config_enumerate(pm.macro_do(case.model, case.interventions))
    initial, potential, *_ = initialize_model(
        model, model_args=(Y,), max_plate_nesting=0
    )
    assert set(initial) == {"w"}
    for w in (-2.0, 1.0, 3.0):
        wanted = evidence(case, Y, w=w) + dist.Normal(1.0, 3.0).log_prob(
            torch.tensor(w)
        )
        torch.testing.assert_close(potential({"w": torch.tensor(w)}), -wanted)


@pytest.mark.parametrize("case", [EXTREME, SAMPLED], ids=repr)
def test_nuts_of_what_has_no_coordinates_is_an_error_that_says_why(case):
    model = pm.macro_do(case.model, case.interventions)
    with pytest.raises(pm.UnsupportedLaw, match=case.why):
        initialize_model(model, model_args=(Y,))


@pytest.mark.parametrize("case", [*DISCRETE, EXTREME, SAMPLED], ids=repr)
def test_reason_why_there_are_no_coordinates_is_given(case):
    trace = poutine.trace(pm.macro_do(case.model, case.interventions)).get_trace()
    with pytest.raises((pm.UnsupportedLaw, NotImplementedError), match=case.why):
        biject_to(trace.nodes["sales__micro"]["fn"].support)


def test_sampled_law_needs_a_density_in_an_elbo():
    model = pm.macro_do(SAMPLED.model, SAMPLED.interventions)

    def guide(y):
        poutine.block(model, expose=["sales__micro", "w"])()

    with pytest.raises(pm.UnsupportedLaw, match="without a normalized density"):
        elbo().loss(model, guide, Y)


def test_every_case_is_of_one_kind():
    assert set(CASES) == {*CONTINUOUS, *NO_COORDINATES}
    assert shares().event_shape == (2,) and SALES.name == "sales"
