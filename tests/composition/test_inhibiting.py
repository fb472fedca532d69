# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``Inhibiting`` among the handlers: the market with an effect that confounds."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta

import pyro_macro as pm

from .models import SALES

VALUE = 3.0
DATA = torch.tensor(4.0)


def market(y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(z, 1.0))
    x2 = pyro.sample("x2", dist.Normal(2 - z, 2.0))
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + 0.5 * z, 0.5), obs=y)


def micro():
    """The law of x1 by hand: y = x1 + 3 x2 + N, N = z / 2 + noise, x2 = VALUE - x1."""
    covariance = torch.tensor([[2.0, -1.0], [-1.0, 5.0]])  # of x1, x2
    alpha, mean = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0])
    crossed = torch.tensor([0.5, -0.5])  # Cov(x, N)
    noise = 0.25 + 0.25
    total = covariance.sum()
    seen = alpha @ covariance.sum(0) + crossed.sum()  # Cov(y, total)
    whole = alpha @ covariance @ alpha + 2 * alpha @ crossed + noise
    mean_y = alpha @ mean + seen / total * (VALUE - mean.sum())
    variance_y = whole - seen**2 / total
    # y = 3 VALUE - 2 x1 + N
    return (3 * VALUE - mean_y) / 2, ((variance_y - noise) / 4).sqrt()


def by_hand(y=None):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    mean, spread = micro()
    x1 = pyro.sample("x1", dist.Normal(mean, spread))
    x2 = pyro.deterministic("x2", VALUE - x1)
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + 0.5 * z, 0.5), obs=y)


INTERVENED = pm.macro_do(market, {SALES: pm.Inhibiting(VALUE, "y")})


def latent(model, *args):
    trace = poutine.trace(model).get_trace(*args)
    return trace.nodes["sales__micro"]["fn"]


def assert_law(law):
    mean, spread = micro()
    torch.testing.assert_close(law.mean[..., 0], mean.expand(law.batch_shape))
    torch.testing.assert_close(law.variance[..., 0].sqrt(), spread.expand_as(mean))


@pytest.mark.parametrize("form", ["wrapper", "decorator"])
def test_law_by_hand(form):
    interventions = {SALES: pm.Inhibiting(VALUE, "y")}
    if form == "wrapper":
        model = pm.macro_do(market, interventions)
    else:
        model = pm.macro_do(interventions=interventions)(market)
    assert_law(latent(model))


def test_a_context_does_not_see_what_follows():
    with pytest.raises(pm.UnsupportedLaw, match="Wrap the model"):
        with pm.macro_do(interventions={SALES: pm.Inhibiting(VALUE, "y")}):
            market()


def test_data_of_the_effect_do_not_count():
    assert_law(latent(INTERVENED, DATA))
    assert_law(latent(poutine.condition(INTERVENED, data={"y": DATA})))
    inside = poutine.condition(market, data={"y": DATA})
    assert_law(latent(pm.macro_do(inside, {SALES: pm.Inhibiting(VALUE, "y")})))


def test_an_observed_cause_is_refused():
    inside = poutine.condition(market, data={"z": torch.tensor(1.0)})
    law = latent(pm.macro_do(inside, {SALES: pm.Inhibiting(VALUE, "y")}))
    assert law.variance[0] > 0  # a root that is held is a constant

    def noisy():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("seen", dist.Normal(z, 1.0), obs=torch.tensor(1.0))
        x1 = pyro.sample("x1", dist.Normal(z, 1.0))
        x2 = pyro.sample("x2", dist.Normal(-z, 1.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + z, 1.0))

    with pytest.raises(pm.UnsupportedLaw, match="'seen' is observed"):
        pm.macro_do(noisy, {SALES: pm.Inhibiting(VALUE, "y")})()


def test_log_joint_by_hand():
    z, x1 = torch.tensor(0.3), torch.tensor(1.2)
    mine = poutine.condition(
        INTERVENED, data={"z": z, "sales__micro": torch.stack([x1, VALUE - x1])}
    )
    theirs = poutine.condition(by_hand, data={"z": z, "x1": x1})
    traces = [poutine.trace(m).get_trace(DATA) for m in (mine, theirs)]
    one, other = (t.log_prob_sum() for t in traces)
    torch.testing.assert_close(one, other)


def test_svi_learns_the_posterior():
    """Of z and x1, jointly normal with y = 3 VALUE - 2 x1 + z / 2 + noise."""
    mean, spread = micro()
    prior = torch.diag(torch.stack([torch.tensor(1.0), spread**2]))
    row = torch.tensor([0.5, -2.0])
    gain = prior @ row / (row @ prior @ row + 0.25)
    prior_mean = torch.stack([torch.tensor(0.0), mean])
    expected = prior_mean + gain * (DATA - 3 * VALUE - row @ prior_mean)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = AutoDelta(poutine.block(INTERVENED, hide=["sales", "x1", "x2"]))
    optimizer = pyro.optim.ClippedAdam({"lr": 0.5, "lrd": 0.01 ** (1 / 250)})
    svi = SVI(INTERVENED, guide, optimizer, Trace_ELBO())
    for _ in range(250):
        svi.step(DATA)
    found = guide.median(DATA)  # the mode, which is the mean
    found = torch.stack([found["z"], found["sales__micro"][0]])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0.0)


def test_predictive_in_parallel():
    drawn = Predictive(INTERVENED, num_samples=4000, parallel=True)()
    x = torch.stack([drawn["x1"], drawn["x2"]], -1)
    torch.testing.assert_close(x.sum(-1), torch.full((4000,), VALUE))
    mean, spread = micro()
    assert abs(x[:, 0].mean() - mean) < 5 * spread / 4000**0.5
    assert abs(x[:, 0].std() / spread - 1) < 5 * (1 / 8000) ** 0.5
