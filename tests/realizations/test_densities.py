# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``log_prob_sum`` of the intervened model is that of the one written by hand.

At random points, and with its gradient, for each realization: the model has a latent
parameter ``b`` and a confounder ``z`` upstream, and a likelihood downstream.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm

SALES = pm.MacroVariable("sales", ["x1", "x2", "x3"])
VALUE = 7.0
SHARES = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
Y = torch.tensor(4.0, dtype=torch.float64)


def model():
    spread = pyro.param("spread", torch.tensor(1.3))
    b = pyro.sample("b", dist.Normal(1.0, 2.0))
    z = pyro.sample("z", dist.Normal(b, 1.5))
    x1 = pyro.sample("x1", dist.Normal(z + b, spread))
    x2 = pyro.sample("x2", dist.Normal(2 * z, 1.0))
    x3 = pyro.sample("x3", dist.Normal(1.0, 0.5))
    downstream(b, z, torch.stack([x1, x2, x3]))


def downstream(b, z, x):
    pyro.sample("y", dist.Normal(b * x[0] + x[1] - x[2] ** 2 + z, 0.7), obs=Y)


def moments(spread, b=None):
    """Mean and covariance of X with z integrated out, and b too if it is not held."""
    variance = torch.stack([spread**2, torch.ones(()), torch.full((), 0.25)])
    z = torch.tensor([1.0, 2.0, 0.0])
    if b is not None:
        mean = b * torch.tensor([2.0, 2.0, 0.0]) + torch.tensor([0.0, 0.0, 1.0])
        return mean, torch.diag(variance) + 2.25 * torch.outer(z, z)
    through_b = torch.tensor([2.0, 2.0, 0.0])
    mean = through_b + torch.tensor([0.0, 0.0, 1.0])
    covariance = 2.25 * torch.outer(z, z) + 4 * torch.outer(through_b, through_b)
    return mean, torch.diag(variance) + covariance


def natural(spread, b, z, x):
    """log p(x1, x2 | x1 + x2 + x3 = VALUE), from (x1, x2, total)."""
    mean, covariance = moments(spread, b)
    change = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    joint = dist.MultivariateNormal(change @ mean, change @ covariance @ change.mT)
    total = dist.Normal(mean.sum(), covariance.sum().sqrt())
    return joint.log_prob(change @ x) - total.log_prob(torch.tensor(VALUE))


def residual(spread, b, z, x):
    """x1 and x3 follow their own law; x2 takes the rest."""
    mean, covariance = moments(spread, b)
    keep = torch.tensor([0, 2])
    law = dist.MultivariateNormal(mean[keep], covariance[keep][:, keep])
    return law.log_prob(x[keep])


def own(spread, b, z, x):
    """The natural value, given its parents in this run."""
    loc = torch.stack([z + b, 2 * z, torch.ones(())])
    scale = torch.stack([spread, torch.ones(()), torch.full((), 0.5)])
    return dist.Normal(loc, scale).log_prob(x).sum()


def none(spread, b, z, x):
    return torch.zeros(())


def without_b(density):
    return lambda spread, b, z, x: density(spread, None, z, x)


def keep(x):
    return x


CASES = {
    "natural": (pm.Natural(VALUE), without_b(natural), keep),
    "natural given b": (pm.Natural(VALUE, given="b"), natural, keep),
    "residual": (pm.Residual(VALUE, "x2"), without_b(residual), keep),
    "residual given b": (pm.Residual(VALUE, "x2", given="b"), residual, keep),
    "allocate": (pm.Allocate(VALUE, SHARES), none, lambda x: VALUE * SHARES),
    "proportional": (pm.Proportional(VALUE), own, lambda x: x * VALUE / x.sum()),
    "shift along": (pm.Shift(2.0, SHARES), own, lambda x: x + 2 * SHARES),
    "explicit": (
        pm.Explicit(VALUE, lambda v: dist.Delta(v * SHARES, event_dim=1)),
        none,
        lambda x: VALUE * SHARES,
    ),
}


def direction(spread, b):
    _, covariance = moments(spread, b)
    return covariance.sum(1) / covariance.sum()


@pytest.mark.parametrize("case", [*CASES, "natural shift", "natural shift given b"])
@pytest.mark.parametrize("seed", range(3))
def test_log_density_and_gradient(case, seed):
    torch.manual_seed(seed)
    free = torch.randn(4)
    point = {
        "b": torch.randn(()),
        "z": torch.randn(()),
        "x": torch.cat([free[:2], VALUE - free[:2].sum().reshape(1)]),
        "spread": 0.5 + torch.rand(()),
    }

    def expected(spread, b, z, x):
        if case.startswith("natural shift"):
            along = direction(spread, b if case.endswith("given b") else None)
            state, density = x + 2 * along, own
        else:
            _, density, push = CASES[case]
            state = push(x)
        total = density(spread, b, z, x)
        total = total + dist.Normal(1.0, 2.0).log_prob(b)
        total = total + dist.Normal(b, 1.5).log_prob(z)
        loc = b * state[0] + state[1] - state[2] ** 2 + z
        return total + dist.Normal(loc, 0.7).log_prob(Y)

    if case.startswith("natural shift"):
        realization = pm.Shift(2.0, given="b" if case.endswith("given b") else ())
    else:
        realization = CASES[case][0]
    intervened = pm.macro_do(model, {SALES: realization})

    def found(spread, b, z, x):
        pyro.get_param_store().clear()
        held = {"b": b, "z": z, "sales__micro": x}
        conditioned = pyro.poutine.condition(intervened, held)
        # The parameter at a value of its own, and no part of the density
        fixed = pyro.poutine.lift(
            conditioned, {"spread": dist.Delta(spread).mask(False)}
        )
        return pyro.poutine.trace(fixed).get_trace().log_prob_sum()

    inputs = [point[n].clone().requires_grad_() for n in ("spread", "b", "z", "x")]
    values = expected(*inputs), found(*inputs)
    torch.testing.assert_close(values[1], values[0])
    gradients = [
        torch.autograd.grad(v, inputs, materialize_grads=True, allow_unused=True)
        for v in values
    ]
    for i, name in enumerate(("spread", "b", "z", "x")):
        first, second = gradients[0][i], gradients[1][i]
        if name == "x":  # off the fibre there is no density: compare along it
            first, second = first[:2] - first[2], second[:2] - second[2]
        torch.testing.assert_close(second, first)


def test_a_model_with_its_own_param_learns_through_the_law():
    """The gradient of a parameter flows through the law of the latent site."""
    intervened = pm.macro_do(model, {SALES: pm.Natural(VALUE)})
    x = torch.tensor([1.0, 2.0, 4.0])
    held = {"b": torch.tensor(0.5), "z": torch.tensor(-0.3), "sales__micro": x}
    trace = pyro.poutine.trace(pyro.poutine.condition(intervened, held)).get_trace()
    trace.log_prob_sum().backward()
    spread = torch.tensor(1.3, requires_grad=True)
    natural(spread, None, None, x).backward()
    found = pyro.get_param_store()._params["spread"].grad
    torch.testing.assert_close(found, spread.grad)
