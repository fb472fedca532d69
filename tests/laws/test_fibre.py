# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Fibres, their bijection, and the normal laws on them."""

import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

from pyro_macro.laws.gaussian.covariance import (
    Blocks,
    Dense,
    Diagonal,
    Explained,
    Shared,
    log_normal,
)
from pyro_macro.laws.gaussian.fibre import Fibre, NaturalNormal, ResidualNormal

LOC = torch.tensor([10.0, 20.0, -3.0, 1.0], dtype=torch.float64)
VARIANCE = torch.tensor([4.0, 1.0, 0.5, 2.0], dtype=torch.float64)
ROWS = torch.tensor([[1.0, 2.0, -1.0, 0.5]], dtype=torch.float64)
VALUE = torch.tensor([40.0], dtype=torch.float64)


def covariances():
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    diagonal = Diagonal(VARIANCE)
    square = normal(4, 4)
    dense = Dense(torch.linalg.cholesky(square @ square.mT + torch.eye(4)))
    pair = normal(2, 2, 2)
    blocks = Dense(torch.linalg.cholesky(pair @ pair.mT + torch.eye(2)))
    return {
        "diagonal": diagonal,
        "dense": dense,
        "shared": Shared(diagonal, normal(4, 2)),
        "explained": Explained(diagonal, 0.2 * normal(4, 1)),
        "blocks": Blocks(blocks, outer=2, slots=2, inner=1),
        "nested": Shared(Blocks(blocks, outer=1, slots=2, inner=2), normal(4, 1)),
    }


@pytest.fixture(params=["diagonal", "dense", "shared", "explained", "blocks", "nested"])
def covariance(request):
    return covariances()[request.param]


def test_operations_agree_with_the_matrix(covariance):
    matrix = covariance.dense(LOC)
    torch.testing.assert_close(matrix, matrix.mT)
    probe = torch.randn(3, 4, 2)
    torch.testing.assert_close(covariance.matmul(probe), matrix @ probe)
    torch.testing.assert_close(
        covariance.solve(probe), torch.linalg.solve(matrix, probe)
    )
    torch.testing.assert_close(covariance.logdet(), torch.logdet(matrix))
    torch.testing.assert_close(covariance.diagonal(), matrix.diagonal())
    x = torch.randn(5, 4)
    torch.testing.assert_close(
        log_normal(covariance, x),
        dist.MultivariateNormal(torch.zeros(4), matrix).log_prob(x),
    )


def test_colour_makes_draws_of_the_covariance(covariance):
    """Exactly: the linear map of the noise, times its transpose, is the matrix."""
    linear = covariance.colour(torch.eye(covariance.noise_size)).mT
    torch.testing.assert_close(linear @ linear.mT, covariance.dense(LOC))


def marginal(mean, matrix, x, keep):
    return dist.MultivariateNormal(mean[keep], matrix[keep][:, keep]).log_prob(
        x[..., keep]
    )


def test_natural_density_is_that_of_the_free_elements(covariance):
    law = NaturalNormal(LOC, covariance, ROWS, VALUE)
    x = law.rsample((7,))
    torch.testing.assert_close(x @ ROWS[0], VALUE.expand(7))
    expected = marginal(law.mean, law.covariance_matrix, x, [0, 1, 2])
    torch.testing.assert_close(law.log_prob(x), expected)


@pytest.mark.parametrize("absorb", range(4))
def test_residual_density_is_that_of_the_free_elements(covariance, absorb):
    law = ResidualNormal(LOC, covariance, ROWS, VALUE, absorb=torch.tensor([absorb]))
    x = law.rsample((7,))
    torch.testing.assert_close(x @ ROWS[0], VALUE.expand(7))
    others = [i for i in range(4) if i != absorb]
    matrix = covariance.dense(LOC)
    torch.testing.assert_close(law.mean[others], LOC[others])
    torch.testing.assert_close(law.variance, law.covariance_matrix.diagonal())
    found = law.covariance_matrix[others][:, others]
    torch.testing.assert_close(found, matrix[others][:, others])
    expected = marginal(law.mean, law.covariance_matrix, x, [0, 1, 2])
    torch.testing.assert_close(law.log_prob(x), expected)


def test_densities_integrate_to_one():
    """Two elements: one free coordinate, on a fine grid."""
    for law in (
        NaturalNormal(LOC[:2], Diagonal(VARIANCE[:2]), ROWS[:, :2], VALUE),
        ResidualNormal(
            LOC[:2],
            Diagonal(VARIANCE[:2]),
            ROWS[:, :2],
            VALUE,
            absorb=torch.tensor([0]),
        ),
    ):
        first = torch.linspace(-30.0, 50.0, 20_001)
        second = (VALUE - ROWS[0, 0] * first) / ROWS[0, 1]
        density = law.log_prob(torch.stack([first, second], -1)).exp()
        torch.testing.assert_close(
            torch.trapezoid(density, first), torch.tensor(1.0), rtol=1e-8, atol=1e-8
        )


@pytest.mark.parametrize(
    "rows",
    [
        [[1.0, 1.0, 1.0, 1.0]],
        [[1.0, 2.0, 0.0, 0.0]],
        [[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]],
        [[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0]],
    ],
)
def test_the_bijection_leaves_k_minus_m_free_coordinates(rows):
    rows = torch.tensor(rows)
    m = len(rows)
    value = torch.arange(1.0, 1.0 + m)
    law = NaturalNormal(LOC, Diagonal(VARIANCE), rows, value)
    transform = biject_to(law.support)
    free = torch.randn(5, 4 - m)
    x = transform(free)
    assert x.shape == (5, 4)
    torch.testing.assert_close(x @ rows.mT, value.expand(5, m))
    torch.testing.assert_close(transform.inv(x), free)
    assert transform.forward_shape(free.shape) == x.shape
    assert transform.inverse_shape(x.shape) == free.shape
    assert law.support.check(x).all()
    assert not law.support.check(x + 0.1).any()
    jacobian = torch.autograd.functional.jacobian(transform, free[0])
    kept = [i for i in range(4) if i not in law.pivots]
    torch.testing.assert_close(
        transform.log_abs_det_jacobian(free, x)[0],
        torch.linalg.slogdet(jacobian[kept]).logabsdet,
    )
    torch.testing.assert_close(transform(torch.zeros(4 - m)), law.mean)


def test_without_a_law_the_free_coordinates_are_the_elements():
    fibre = Fibre(ROWS, VALUE, torch.tensor([3]))
    transform = biject_to(fibre)
    free = torch.randn(5, 3)
    x = transform(free)
    torch.testing.assert_close(x[:, :3], free)
    assert fibre.check(x).all()
    assert (transform.log_abs_det_jacobian(free, x) == 0).all()


def test_gradients_of_the_density_by_finite_differences():
    def log_prob(loc, variance, value, free):
        law = NaturalNormal(loc, Diagonal(variance), ROWS, value)
        return law.log_prob(biject_to(Fibre(ROWS, value, law.pivots))(free))

    inputs = [LOC, VARIANCE, VALUE, torch.randn(3, dtype=torch.float64)]
    inputs = [x.clone().requires_grad_() for x in inputs]
    assert torch.autograd.gradcheck(log_prob, inputs)


def test_gradients_of_draws_by_finite_differences():
    def draw(loc, variance, value):
        torch.manual_seed(0)
        return NaturalNormal(loc, Diagonal(variance), ROWS, value).rsample()

    inputs = [x.clone().requires_grad_() for x in (LOC, VARIANCE, VALUE)]
    assert torch.autograd.gradcheck(draw, inputs)


def test_the_sum_is_met_to_one_rounding_in_float32():
    """No jitter: the error is that of adding 5000 floats."""
    loc, variance = torch.full((5000,), 20.0), torch.linspace(0.1, 9.0, 5000)
    law = NaturalNormal(
        loc.float(),
        Diagonal(variance.float()),
        torch.ones(1, 5000, dtype=torch.float32),
        torch.tensor([101_000.0], dtype=torch.float32),
    )
    total = law.sample((100,)).double().sum(-1)
    assert (total / 101_000 - 1).abs().max() < 1e-6
