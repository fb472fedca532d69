# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Section 5: retail with thousands of products, and its confounded variant."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from shop import condition, law

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro="x", over="products")
REVENUE = pm.MacroVariable("revenue", micro="y", over="products")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_five_thousand_products(dtype):
    """1000 draws: the sum is met, and Yb has the mean and variance of the formula."""
    size, n = 5000, 1000
    generator = torch.Generator().manual_seed(1)
    alpha, mu, sigma, noise = (
        low + high * torch.rand(size, generator=generator, dtype=torch.float64)
        for low, high in [(1, 9), (5, 20), (0.5, 3), (0.1, 1)]
    )

    def model():
        with pyro.plate("products", size):
            x = pyro.sample("x", dist.Normal(mu.to(dtype), sigma.to(dtype)))
            pyro.sample("y", dist.Normal(alpha.to(dtype) * x, noise.to(dtype)))

    value = mu.sum().item() * 1.02
    intervened = pm.aggregate(pm.macro_do(model, {SALES: pm.Natural(value)}), [REVENUE])
    with pyro.plate("draws", n, dim=-2):
        nodes = pyro.poutine.trace(intervened).get_trace().nodes
    x = nodes["x"]["value"]
    assert x.shape == (n, size) and x.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    assert (x.sum(-1) / value - 1).abs().max() < limit
    variance = sigma**2
    direction = variance / variance.sum()
    mean = alpha @ (mu + direction * (value - mu.sum()))
    within = (alpha**2 * variance).sum() - (
        alpha * variance
    ).sum() ** 2 / variance.sum()
    total = within + (noise**2).sum()
    revenue = nodes["revenue"]["value"].to(torch.float64)
    assert abs(revenue.mean() - mean) < 5 * (total / n) ** 0.5
    assert abs(revenue.var() / total - 1) < 5 * (2 / n) ** 0.5


def test_no_matrix_of_the_size_of_the_state():
    """K = 10^6 with a confounder each: a K x K matrix would take 8 terabytes."""
    size = 1_000_000

    def model():
        with pyro.plate("products", size):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(2 * z, 1.0))

    trace = pyro.poutine.trace(
        pm.macro_do(model, {SALES: pm.Natural(10.0)})
    ).get_trace()
    assert trace.nodes["x"]["value"].sum().item() == pytest.approx(10.0, abs=1e-7)
    assert torch.isfinite(trace.log_prob_sum())


ALPHA = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
VARIANCE = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
CROSSED = torch.tensor(
    [0.5, -0.4, 0.9], dtype=torch.float64
)  # Cov(X_i, N_i), Var N = 1


def confounded():
    with pyro.plate("products", 3):
        n = pyro.sample("n", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(CROSSED * n, (VARIANCE - CROSSED**2).sqrt()))
        pyro.deterministic("y", ALPHA * x + n, event_dim=0)


def slope(realization):
    """The change of E[alpha.X | do(xb)] with xb; N is not moved by do(xb)."""
    means = [
        law(pm.macro_do(confounded, {SALES: realization(v)})).mean for v in (0.0, 1.0)
    ]
    return ALPHA @ (means[1] - means[0])


def test_confounded_retail():
    # Observational: Cov(Xb, Yb) / Var Xb
    observed = ((ALPHA * VARIANCE).sum() + CROSSED.sum()) / VARIANCE.sum()
    torch.testing.assert_close(observed, torch.tensor(3.0))
    torch.testing.assert_close(slope(pm.Natural), torch.tensor(17 / 6))


def test_confounded_retail_adjusted_for_the_total_noise():
    """Back-door adjustment: P(X | xb, Nb) with Nb at its value in the run."""
    total_noise = pm.MacroVariable("total_noise", micro="n", over="products")
    noise = {"n": torch.tensor([0.3, -0.2, 1.5])}
    adjusted = pyro.poutine.condition(
        pm.macro_do(confounded, {SALES: pm.Natural(1.0, given=[total_noise])}), noise
    )
    other = pyro.poutine.condition(
        pm.macro_do(confounded, {SALES: pm.Natural(0.0, given=[total_noise])}), noise
    )
    one, zero = law(adjusted), law(other)
    torch.testing.assert_close(ALPHA @ (one.mean - zero.mean), torch.tensor(477 / 170))
    joint = torch.zeros(4, 4)  # (X1, X2, X3, Nb)
    joint[:3, :3] = torch.diag(VARIANCE)
    joint[:3, 3] = joint[3, :3] = CROSSED
    joint[3, 3] = 3.0
    rows = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    value = torch.tensor([1.0, noise["n"].sum()])
    mean, within = condition(torch.zeros(4), joint, rows, value)
    torch.testing.assert_close(one.mean, mean[:3])
    torch.testing.assert_close(one.covariance_matrix, within[:3, :3])
