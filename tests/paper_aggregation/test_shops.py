# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Equations (2) to (6), (33) to (36), Theorem 3.1, sections 3.1.1 and 3.1.2."""

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from shop import ALPHA, MU, QUERY, SALES, VARIANCE, condition, law, shop

import pyro_macro as pm


def test_equation_2_shop_a():
    micro = law(pm.macro_do(shop, {SALES: pm.Natural(QUERY)}))
    swap = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(micro.mean, torch.tensor([12.4, 20.6]))
    torch.testing.assert_close(micro.covariance_matrix, 0.8 * swap)
    torch.testing.assert_close(micro.variance, torch.tensor([0.8, 0.8]))
    torch.testing.assert_close(ALPHA @ micro.mean, torch.tensor(74.2))
    zero, one = (
        ALPHA @ law(pm.macro_do(shop, {SALES: pm.Natural(v)})).mean for v in (0.0, 1.0)
    )
    torch.testing.assert_close(one - zero, torch.tensor(1.4))
    torch.testing.assert_close(zero, torch.tensor(28.0))


def test_equations_3_and_4_shop_b():
    micro = law(pm.macro_do(shop, {SALES: pm.Residual(QUERY, absorb="x2")}))
    swap = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    torch.testing.assert_close(micro.mean, torch.tensor([10.0, 23.0]))
    torch.testing.assert_close(micro.covariance_matrix, 4.0 * swap)
    torch.testing.assert_close(micro.variance, torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(ALPHA @ micro.mean, torch.tensor(79.0))
    # Noise N~ = (alpha1 - alpha2) X1 is correlated with Xb under P
    torch.testing.assert_close((ALPHA[0] - ALPHA[1]) * VARIANCE[0], torch.tensor(-8.0))


def test_equations_33_to_36_shop_c():
    trace = pyro.poutine.trace(
        pm.macro_do(shop, {SALES: pm.Allocate(QUERY, shares=[1.0, 0.0])})
    ).get_trace()
    assert "sales__micro" not in trace
    assert trace.nodes["x1"]["value"] == QUERY
    assert trace.nodes["x2"]["value"] == 0
    assert trace.nodes["revenue"]["value"] == 33
    assert trace.log_prob_sum() == 0


@pytest.mark.parametrize(
    "realization, mean, variance",
    [
        (pm.Natural(QUERY), 74.2, 3.2),
        (pm.Residual(QUERY, absorb="x2"), 79.0, 16.0),
        (pm.Residual(QUERY, absorb="x1"), 73.0, 4.0),
    ],
)
def test_draws_follow_the_law(realization, mean, variance):
    """100,000 draws: means within 5 standard errors, a false alarm in 10^6 runs."""
    n = 100_000
    with pyro.plate("draws", n):
        revenue = pm.macro_do(shop, {SALES: realization})()
    assert abs(revenue.mean() - mean) < 5 * (variance / n) ** 0.5
    assert abs(revenue.var() / variance - 1) < 5 * (2 / n) ** 0.5


@pytest.mark.parametrize("seed", range(10))
def test_theorem_3_1_natural_kernel_of_a_gaussian(seed):
    """Mean mu + S1 (xb - 1.mu)/(1.S1), covariance S - S11'S/(1'S1), any S."""
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(2, 7, (), generator=generator))
    factor = torch.randn(size, size, generator=generator)
    covariance = factor @ factor.mT + 0.1 * torch.eye(size)
    mu = torch.randn(size, generator=generator)

    def model():
        pyro.sample("x", dist.MultivariateNormal(mu, covariance))

    total = pm.MacroVariable("total", micro="x")
    micro = law(pm.macro_do(model, {total: pm.Natural(2.0)}), "total__micro")
    mean, within = condition(mu, covariance, torch.ones(1, size), torch.tensor([2.0]))
    torch.testing.assert_close(micro.mean, mean)
    torch.testing.assert_close(micro.covariance_matrix, within)


def test_definition_8_depends_on_the_context():
    """Other variances of the same sites, another kernel."""

    def other():
        pyro.sample("x1", dist.Normal(10.0, 1.0))
        pyro.sample("x2", dist.Normal(20.0, 2.0))

    micro = law(pm.macro_do(other, {SALES: pm.Natural(QUERY)}))
    torch.testing.assert_close(micro.mean, torch.tensor([10.6, 22.4]))


class _Points(dist.TorchDistribution):
    """A finite distribution on some micro states."""

    arg_constraints = {}  # noqa: RUF012
    support = dist.constraints.real_vector

    def __init__(self, points, probs):
        self.points, self.probs = points, probs
        super().__init__(event_shape=points.shape[-1:], validate_args=False)

    def sample(self, sample_shape=()):
        return self.points[torch.multinomial(self.probs, 1).squeeze(-1)]

    def log_prob(self, value):
        hit = (self.points == value).all(-1)
        return (self.probs * hit).sum().log()


@pytest.mark.parametrize("seed", range(20))
def test_theorem_3_1_finite(seed):
    """Unconfounded X -> Y: P(Yb | do(xb)) = P(Yb | xb) by enumeration, and only then.

    The natural kernel is given by enumeration too: what is tested is that the
    intervened program computes the effect of a kernel.
    """
    torch.manual_seed(seed)
    p1, p2 = torch.rand(3).softmax(-1), torch.rand(2).softmax(-1)
    effect = torch.rand(3, 2, 4).softmax(-1)  # P(y | x1, x2)

    def model():
        x1 = pyro.sample("x1", dist.Categorical(p1))
        x2 = pyro.sample("x2", dist.Categorical(p2))
        pyro.sample("y", dist.Categorical(effect[x1.long(), x2.long()]))

    joint = p1[:, None, None] * p2[:, None] * effect  # P(x1, x2, y)
    for value in range(4):
        cells = [c for c in itertools.product(range(3), range(2)) if sum(c) == value]
        weights = torch.stack([p1[a] * p2[b] for a, b in cells])
        kernel = _Points(
            torch.tensor(cells, dtype=torch.float64), weights / weights.sum()
        )
        intervened = pm.macro_do(
            model, {SALES: pm.Explicit(value, lambda _, kernel=kernel: kernel)}
        )
        found = torch.zeros(4)
        for cell in cells:
            point = {"sales__micro": torch.tensor(cell, dtype=torch.float64)}
            trace = pyro.poutine.trace(
                pyro.poutine.condition(intervened, point)
            ).get_trace()
            trace.compute_log_prob()
            weight = trace.nodes["sales__micro"]["log_prob"].exp()
            found += weight * trace.nodes["y"]["fn"].probs
        seen = torch.stack([joint[a, b] for a, b in cells]).sum(0)
        torch.testing.assert_close(found, seen / seen.sum())


def quantile(x):
    """M = P(W <= w | Xb = xb) for W = alpha.X, section 3.1.2."""
    total, crossed = VARIANCE.sum(), (ALPHA * VARIANCE).sum()
    mean = ALPHA @ MU + crossed / total * (x.sum(-1) - MU.sum())
    spread = ((ALPHA**2 * VARIANCE).sum() - crossed**2 / total).sqrt()
    return dist.Normal(mean, spread).cdf(x @ ALPHA)


def test_section_3_1_2_a_natural_shift_keeps_the_noise_constant():
    n = 20_000
    with pyro.plate("draws", n):
        nodes = (
            pyro.poutine.trace(pm.macro_do(shop, {SALES: pm.Shift(5.0)}))
            .get_trace()
            .nodes
        )
    natural = nodes["sales__micro"]["value"]
    shifted = torch.stack([nodes["x1"]["value"], nodes["x2"]["value"]], -1)
    step = (shifted - natural).mean(0)
    torch.testing.assert_close(step, 5 * torch.tensor([0.8, 0.2]))
    torch.testing.assert_close(nodes["sales"]["value"], natural.sum(-1) + 5)
    noise = quantile(natural)
    assert (quantile(shifted) - noise).abs().max() < 1e-12
    # M is uniform (Kolmogorov-Smirnov at level 1e-3) and uncorrelated with Xb
    ordered = noise.sort().values
    grid = torch.arange(1, n + 1) / n
    assert (ordered - grid).abs().max() < 1.95 / n**0.5
    correlation = torch.corrcoef(torch.stack([noise, natural.sum(-1)]))[0, 1]
    assert correlation.abs() < 4 / n**0.5


def test_section_3_1_2_proportional_keeps_the_average_price():
    n = 200_000
    with pyro.plate("draws", n):
        nodes = (
            pyro.poutine.trace(pm.macro_do(shop, {SALES: pm.Proportional(QUERY)}))
            .get_trace()
            .nodes
        )
    natural = nodes["sales__micro"]["value"]
    price = natural @ ALPHA / natural.sum(-1)
    torch.testing.assert_close(nodes["revenue"]["value"], QUERY * price)
    # With that noise, the average price, Xb looks confounded
    correlation = torch.corrcoef(torch.stack([price, natural.sum(-1)]))[0, 1]
    assert correlation == pytest.approx(-0.76, abs=0.01)
    assert price.mean() == pytest.approx(2.339, abs=0.002)
    # Inducing: P(Yb | xb) is N(74.2, 3.2)
    assert nodes["revenue"]["value"].mean() == pytest.approx(33 * 2.339, abs=0.1)
