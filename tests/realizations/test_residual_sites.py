# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``Residual`` and ``Shift`` of sites that are not Gaussian.

All elements but one follow their own laws, whatever these are, and that one takes up
the rest; the natural direction of a shift is ``Cov(X, Xb) / Var(Xb)``.
"""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import (
    assert_cdf,
    assert_counts,
    assert_gradient,
    finite_difference,
    law_of,
    run,
    states_of,
)
from pyro import poutine
from scipy import stats
from torch.distributions import biject_to

import pyro_macro as pm

TOTAL = pm.MacroVariable("m", ["x0", "x1", "x2"])


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def weighted(*weights):
    return pm.MacroVariable("m", TOTAL.micro, aggregation=pm.Linear(weights))


def shop():
    pyro.sample("x0", dist.Gamma(2.0, 1.5))
    pyro.sample("x1", dist.StudentT(4.0, 1.0, 2.0))
    pyro.sample("x2", dist.Uniform(-1.0, 2.0))


def test_the_others_follow_their_own_laws_and_one_takes_up_the_rest():
    law = law_of(shop, TOTAL, pm.Residual(5.0, absorb="x1"))
    assert law.method.startswith("exact")
    draws = law.sample((4000,))
    torch.testing.assert_close(draws.sum(-1), torch.full((4000,), 5.0))
    assert_cdf(draws[:, 0], stats.gamma(2, scale=1 / 1.5).cdf)
    assert_cdf(draws[:, 2], stats.uniform(-1, 3).cdf)
    found = law.log_prob(draws[:20])
    wanted = stats.gamma(2, scale=1 / 1.5).logpdf(draws[:20, 0]) - math.log(3)
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_weights_decide_how_much_the_rest_is():
    law = law_of(shop, weighted(2.0, -0.5, 3.0), pm.Residual(5.0, absorb=1))
    draws = law.sample((2000,))
    torch.testing.assert_close(draws @ t(2, -0.5, 3), torch.full((2000,), 5.0))
    assert_cdf(draws[:, 0], stats.gamma(2, scale=1 / 1.5).cdf)


def test_it_is_another_law_than_the_natural_one():
    """P(x0 | total) is a scaled beta; under ``Residual`` it stays a gamma."""

    def model():
        pyro.sample("x0", dist.Gamma(2.0, 1.0))
        pyro.sample("x1", dist.Gamma(3.0, 1.0))

    macro = pm.MacroVariable("m", ["x0", "x1"])
    natural = law_of(model, macro, pm.Natural(50.0)).sample((1000,))
    with pyro.plate("draws", 1000):
        residual = run(model, macro, pm.Residual(50.0, absorb="x1"))
    residual = residual.nodes["m__micro"]["value"]
    assert_cdf(natural[:, 0], stats.beta(2, 3, scale=50).cdf)
    assert_cdf(residual[:, 0], stats.gamma(2).cdf)


def test_a_rest_off_the_support_is_refused_and_not_hidden():
    def model():
        pyro.sample("x0", dist.Gamma(2.0, 1.0))
        pyro.sample("x1", dist.Gamma(3.0, 1.0))

    macro = pm.MacroVariable("m", ["x0", "x1"])
    with pytest.raises(pm.OffFibre, match="'x1' gets the value -.*off its support"):
        law_of(model, macro, pm.Residual(0.001, absorb="x1"))


def test_counts_keep_their_laws_and_stay_whole():
    def model():
        pyro.sample("x0", dist.Poisson(2.0))
        pyro.sample("x1", dist.Categorical(t(0.2, 0.3, 0.5)))
        pyro.sample("x2", dist.NegativeBinomial(5.0, t(0.5)[0]))

    trace = run(model, TOTAL, pm.Residual(40.0, absorb="x2"))
    law = trace.nodes["m__micro"]["fn"]
    assert trace.nodes["x1"]["value"].dtype == torch.long
    draws = law.sample((8000,))
    assert (draws.sum(-1) == 40).all()
    states = states_of(range(15), range(3))
    probs = dist.Poisson(2.0).log_prob(states[:, 0]).exp()
    probs = probs * t(0.2, 0.3, 0.5)[states[:, 1].long()]
    assert_counts(draws[:, :2], states, probs)
    state = t(3.0, 1.0, 36.0)
    wanted = stats.poisson(2).logpmf(3) + math.log(0.3)
    torch.testing.assert_close(law.log_prob(state).item(), wanted)
    # The natural law of the same sites is another one
    natural = law_of(model, TOTAL, pm.Natural(40.0))
    assert natural.sample((500,))[:, 0].mean() > 2.5


def test_plates_that_stay_and_plates_that_are_summed_over():
    rate = t([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    values = t([10.0], [20.0])

    def model():
        with pyro.plate("k", 2, dim=-2), pyro.plate("o", 3, dim=-1):
            pyro.sample("x", dist.Exponential(rate))

    macro = pm.MacroVariable("m", "x", over="o")
    trace = run(model, macro, pm.Residual(values, absorb=1))
    x = trace.nodes["x"]["value"]
    torch.testing.assert_close(x.sum(-1, keepdim=True), values)
    kept = torch.tensor([0, 2])
    wanted = dist.Exponential(rate).log_prob(x)[:, kept].sum(-1, keepdim=True)
    torch.testing.assert_close(trace.nodes["m__micro"]["log_prob"], wanted)
    law = trace.nodes["m__micro"]["fn"]
    assert law.batch_shape == (2, 1)
    draws = law.sample((3000,))
    for i in range(2):
        for k in (0, 2):
            scale = 1 / float(rate[i, k])
            assert_cdf(draws[:, i, 0, k], stats.expon(scale=scale).cdf)


def test_many_draws_of_a_plate_at_once():
    """A law of one micro state over a plate gives many draws, with their densities."""

    def model():
        with pyro.plate("o", 4):
            pyro.sample("x", dist.Exponential(t(1.0, 2.0, 3.0, 4.0)))

    macro = pm.MacroVariable("m", "x", over="o")
    law = law_of(model, macro, pm.Residual(9.0, absorb=3))
    draws = law.sample((50,))
    assert draws.shape == (50, 4)
    torch.testing.assert_close(draws.sum(-1), torch.full((50,), 9.0))
    wanted = dist.Exponential(t(1.0, 2.0, 3.0)).log_prob(draws[:, :3]).sum(-1)
    torch.testing.assert_close(law.log_prob(draws), wanted)


def test_gradients_of_densities_and_draws():
    state = t(1.0, 2.5, 1.5)

    def program(theta):
        def model():
            pyro.sample("x0", dist.Gamma(theta[0], theta[1]))
            pyro.sample("x1", dist.StudentT(4.0, theta[2], 2.0))
            pyro.sample("x2", dist.Laplace(-1.0, 2.0))

        return model

    realization = pm.Residual(5.0, absorb="x2")
    theta = t(2.0, 1.5, 1.0)
    assert_gradient(
        lambda theta: law_of(program(theta), TOTAL, realization).log_prob(state), theta
    )
    # d E[x2] / d theta = -d E[x0 + x1] / d theta
    theta = theta.requires_grad_()
    draws = law_of(program(theta), TOTAL, realization).rsample((40_000,))
    (found,) = torch.autograd.grad(draws[:, 2].mean(), theta)
    wanted = finite_difference(lambda x: 5 - x[0] / x[1] - x[2], theta.detach(), 1e-6)
    torch.testing.assert_close(found, wanted, rtol=0.05, atol=0.01)


def test_coordinates_leave_out_the_element_that_takes_the_rest():
    law = law_of(shop, weighted(2.0, -0.5, 3.0), pm.Residual(5.0, absorb="x1"))
    transform = biject_to(law.support)
    z = torch.randn(30, 2)
    x = transform(z)
    assert law.support.check(x).all()
    torch.testing.assert_close(transform.inv(x), z)
    found = transform.log_abs_det_jacobian(z, x)
    for i in range(5):
        jacobian = torch.autograd.functional.jacobian(transform, z[i])[[0, 2]]
        wanted = torch.linalg.det(jacobian).abs().log()
        torch.testing.assert_close(found[i], wanted)


def test_a_grid_and_an_expanded_law():
    grid = t(4.0, 5.0, 6.0)
    with pyro.plate("grid", 3):
        trace = run(shop, TOTAL, pm.Residual(grid, absorb="x1"))
    x = torch.stack([trace.nodes[f"x{i}"]["value"] for i in range(3)], -1)
    torch.testing.assert_close(x.sum(-1), grid)
    law = trace.nodes["m__micro"]["fn"].expand((200, 3))
    draws = law.sample()
    assert len(draws[..., 0].unique()) == 600
    assert law.log_prob(draws).shape == (200, 3)
    pyro.set_rng_seed(1)
    one = law.sample()
    pyro.set_rng_seed(1)
    torch.testing.assert_close(law.sample(), one, rtol=0, atol=0)


def test_sites_that_are_not_gaussian_below_a_latent_one_are_refused_and_named():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x0", dist.Gamma(2.0, z.exp()))
        pyro.sample("x1", dist.Normal(0.0, 1.0))

    macro = pm.MacroVariable("m", ["x0", "x1"])
    with pytest.raises(pm.UnsupportedLaw, match=r"depend on \['z'\].*given"):
        law_of(model, macro, pm.Residual(3.0, absorb="x1"))
    trace = run(model, macro, pm.Residual(3.0, absorb="x1", given="z"))
    x0, z = trace.nodes["x0"]["value"], trace.nodes["z"]["value"]
    wanted = dist.Gamma(2.0, z.exp()).log_prob(x0)
    torch.testing.assert_close(trace.nodes["m__micro"]["log_prob"], wanted)


# Shift


def by_variance(weights, variances):
    w, v = t(*weights), t(*variances)
    return w * v / (w.square() * v).sum()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, -0.5, 3.0)], ids=str)
def test_the_natural_direction_of_independent_sites_is_by_variance(weights):
    def model():
        pyro.sample("x0", dist.Gamma(2.0, 0.5))
        pyro.sample("x1", dist.Laplace(0.0, 3.0))
        pyro.sample("x2", dist.Gumbel(1.0, 2.0))

    intervened = pm.macro_do(model, {weighted(*weights): pm.Shift(0.5)})
    nodes = poutine.trace(intervened).get_trace().nodes
    natural = nodes["m__micro"]["value"]
    moved = torch.stack([nodes[f"x{i}"]["value"] for i in range(3)])
    variances = (2 / 0.25, 2 * 9.0, math.pi**2 / 6 * 4)
    step = 0.5 * by_variance(weights, variances)
    torch.testing.assert_close(moved - natural, step)
    torch.testing.assert_close(t(*weights) @ (moved - natural), t(0.5)[0])


def test_the_natural_direction_is_the_regression_of_the_parts_on_the_total():
    """Cov(X, Xb) / Var(Xb), of a million draws."""
    n = 1_000_000
    gamma = torch.distributions.Gamma(2.0, 0.5).sample((n,))
    laplace = torch.distributions.Laplace(0.0, 3.0).sample((n,))
    x = torch.stack([gamma, laplace], -1)
    total = x @ t(1.0, 2.0)
    slopes = ((x - x.mean(0)) * (total - total.mean()).unsqueeze(-1)).mean(0)
    slopes = slopes / total.var()
    found = by_variance((1.0, 2.0), (8.0, 18.0))
    torch.testing.assert_close(found, slopes, rtol=0.01, atol=0)


def test_shifts_of_slots_have_directions_of_their_own():
    rate = t([1.0, 0.5], [0.25, 2.0])

    def model():
        with pyro.plate("k", 2, dim=-2), pyro.plate("o", 2, dim=-1):
            pyro.sample("x", dist.Exponential(rate))

    macro = pm.MacroVariable("m", "x", over="o")
    delta = t([1.0], [2.0])
    nodes = run(model, macro, pm.Shift(delta)).nodes
    natural = nodes["m__micro"]["value"].squeeze(-2)
    variance = rate.pow(-2)
    step = delta * variance / variance.sum(-1, keepdim=True)
    torch.testing.assert_close(nodes["x"]["value"] - natural, step)


def test_a_shift_of_sites_without_a_variance_is_refused():
    def model():
        pyro.sample("x0", dist.Cauchy(0.0, 1.0))
        pyro.sample("x1", dist.Normal(0.0, 1.0))

    macro = pm.MacroVariable("m", ["x0", "x1"])
    with pytest.raises(pm.UnsupportedLaw, match="its variance is.*along="):
        law_of(model, macro, pm.Shift(1.0))
    run(model, macro, pm.Shift(1.0, along=[0.5, 0.5]))
