# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix C: Lemma 14, the noise of new coordinates, and Appendix C.1."""

import pyro
import pytest
import torch
from shop import ALPHA, SALES, VARIANCE, shop

import pyro_macro as pm
from pyro_macro.questions.coordinates import (
    change_of_coordinates,
    coordinate_noise,
    direction_of,
    noise_covariance,
)


def assert_lemma_14(H, direction, rtol=1e-9):
    """The first row is ones, and the first column of the inverse the direction."""
    size = len(direction)
    assert H.shape == (size, size) and H.dtype == torch.float64
    assert torch.equal(H[0], torch.ones(size))
    inverse = torch.linalg.inv(H)
    torch.testing.assert_close(H @ inverse, torch.eye(size), rtol=0, atol=rtol)
    scale = direction.abs().max().item()
    torch.testing.assert_close(inverse[:, 0], direction, rtol=0, atol=rtol * scale)


def test_lemma_14():
    """alpha = (1, 2, 4), c = 7.3; the direction by hand."""
    alpha = torch.tensor([1.0, 2.0, 4.0])
    direction = direction_of(alpha, 7.3)
    # mean 7/3, v = (-4, -1, 5)/3, v.alpha = 14/3
    along = (7.3 - 7 / 3) / (14 / 3)
    expected = [1 / 3 - 4 / 3 * along, 1 / 3 - along / 3, 1 / 3 + 5 / 3 * along]
    assert direction.tolist() == pytest.approx(expected, rel=1e-14)
    H = change_of_coordinates(direction)
    assert_lemma_14(H, direction)
    torch.testing.assert_close(alpha @ torch.linalg.inv(H)[:, 0], torch.tensor(7.3))


@pytest.mark.parametrize("seed", range(20))
def test_lemma_14_random(seed):
    generator = torch.Generator().manual_seed(seed)
    size = int(torch.randint(2, 40, (), generator=generator))
    alpha = torch.randn(size, generator=generator)
    c = 10 * torch.randn((), generator=generator)
    direction = direction_of(alpha, c)
    torch.testing.assert_close(direction.sum(), torch.tensor(1.0))
    torch.testing.assert_close(alpha @ direction, c)
    assert_lemma_14(change_of_coordinates(direction), direction)
    # The shortest of them: that of the pseudo-inverse
    rows = torch.stack([torch.ones(size), alpha])
    shortest = torch.linalg.pinv(rows) @ torch.stack([torch.tensor(1.0), c])
    torch.testing.assert_close(direction, shortest)


@pytest.mark.parametrize(
    "direction",
    [
        [1.0, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        [0.0, 0.0, 1.0],
        [1 / 3, 1 / 3, 1 / 3],
        [-5.0, 3.5, 2.5],
        [-1e-9, 1e-9, 1.0],
        [1.0],
    ],
)
def test_lemma_14_from_a_direction(direction):
    """Moreover: any direction of total one is the first column for some H."""
    assert_lemma_14(change_of_coordinates(direction), torch.tensor(direction))


def test_lemma_14_of_a_thousand_elements():
    alpha = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    direction = direction_of(alpha, -3.0)
    H = change_of_coordinates(direction)
    assert_lemma_14(H, direction)
    others = H[1:]
    torch.testing.assert_close(others @ others.mT, torch.eye(999))
    torch.testing.assert_close(others @ direction, torch.zeros(999))


def test_batches_and_weights():
    generator = torch.Generator().manual_seed(2)
    alpha = torch.randn(5, 1, 4, generator=generator)
    c = torch.randn(3, generator=generator)
    weights = torch.tensor([2.0, -1.0, 0.5, 0.0])
    direction = direction_of(alpha, c, weights)
    assert direction.shape == (5, 3, 4)
    torch.testing.assert_close(direction @ weights, torch.ones(5, 3))
    torch.testing.assert_close((alpha * direction).sum(-1), c.expand(5, 3))
    H = change_of_coordinates(direction, weights)
    inverse = torch.linalg.inv(H)
    torch.testing.assert_close(H[..., 0, :], weights.expand(5, 3, 4))
    torch.testing.assert_close(inverse[..., 0], direction)
    noise = coordinate_noise(alpha, c, weights)
    assert noise.shape == (5, 3, 4)
    factor = torch.randn(4, 4, generator=generator)
    found = noise_covariance(alpha, factor @ factor.mT, c, weights)
    torch.testing.assert_close(found, noise @ (factor @ (factor.mT @ weights)))


@pytest.mark.parametrize("seed", range(10))
def test_appendix_c_the_noise_of_new_coordinates(seed):
    """U_beta is the double sum of the paper, whatever the other coordinates."""
    generator = torch.Generator().manual_seed(seed)
    alpha, beta = torch.randn(4, generator=generator), torch.tensor(0.7)
    direction = direction_of(alpha, beta)
    # another with the same coefficient
    free = torch.randn(4, generator=generator)
    rows = torch.stack([torch.ones(4), alpha])
    other = direction + free - torch.linalg.pinv(rows) @ (rows @ free)
    for delta in (direction, other):
        H = change_of_coordinates(delta)
        inverse = torch.linalg.inv(H)
        double = sum(
            alpha[i] * inverse[i, j] * H[j] for i in range(4) for j in range(1, 4)
        )
        torch.testing.assert_close(coordinate_noise(alpha, beta), double)


def test_item_14_how_confounded_the_aggregate_looks():
    """Zero only at the slope of the regression, and unbounded as beta grows."""
    alpha = torch.tensor([1.0, 2.0, 4.0])
    covariance = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 3.0]])
    micro = torch.linalg.cholesky(covariance)  # X = micro @ independent noise
    total, revenue = micro.sum(0), alpha @ micro
    slope = (total @ revenue / (total @ total)).item()
    beta = [slope, slope + 1, slope - 1, 7.3, 1e6, -1e6]
    found = noise_covariance(alpha, covariance, beta).tolist()
    for one, value in zip(beta, found, strict=True):
        noise = revenue - one * total
        assert value == pytest.approx((total @ noise).item(), rel=1e-12, abs=1e-12)
    assert abs(found[0]) < 1e-13 and min(map(abs, found[1:])) > 1
    assert found[4] < -1e6 and found[5] > 1e6


def test_appendix_c_1_of_the_shop():
    """Delta = (0.8, 0.2), the natural direction, gives 1.4; there nothing is left."""
    natural = VARIANCE / VARIANCE.sum()
    torch.testing.assert_close(direction_of(ALPHA, 1.4), natural)
    torch.testing.assert_close(ALPHA @ torch.tensor([0.8, 0.2]), torch.tensor(1.4))
    covariance = torch.diag(VARIANCE)
    assert noise_covariance(ALPHA, covariance, 1.4).abs() < 1e-14


@pytest.mark.parametrize("coefficient", [1.4, 7.3, -2.0])
def test_appendix_c_1_in_a_run(coefficient):
    """Equation (32): a shift of Xb by 2.5 moves Yb by 2.5 times the coefficient."""
    along = direction_of(ALPHA, coefficient)
    shifted = pm.macro_do(shop, {SALES: pm.Shift(2.5, along=along)})
    nodes = pyro.poutine.trace(shifted).get_trace().nodes
    before = nodes["sales__micro"]["value"]
    after = torch.stack([nodes["x1"]["value"], nodes["x2"]["value"]])
    H = change_of_coordinates(along)
    moved = torch.tensor([2.5, 0.0])  # the other coordinate stays
    torch.testing.assert_close(H @ after - H @ before, moved)
    gap = nodes["revenue"]["value"] - ALPHA @ before
    torch.testing.assert_close(gap.item(), 2.5 * coefficient)


def test_lists_are_read_in_float64():
    torch.set_default_dtype(torch.float32)
    direction = direction_of([1.0, 3.0], 1.4)
    assert direction.tolist() == pytest.approx([0.8, 0.2], abs=1e-15)
    # Rounded to float32, a total is one up to that
    single = torch.rand(1000) - 0.3
    single /= single.sum()
    assert change_of_coordinates(single).shape == (1000, 1000)


def test_alpha_that_is_a_multiple_of_the_weights():
    """Then its coefficient is the multiple in every direction, and the shortest is
    the even one."""
    even = direction_of([0.3, 0.1 + 0.2, 0.3], 0.3)
    assert even.tolist() == pytest.approx([1 / 3] * 3)
    with pytest.raises(pm.Infeasible, match="coefficient is 0.5, and alpha is 0.3 tim"):
        direction_of([0.3, 0.1 + 0.2, 0.3], 0.5)
    with pytest.raises(pm.Infeasible, match="alpha is -2 times"):
        direction_of([-2.0, -4.0], [-2.0, 1.0], weights=[1.0, 2.0])
    with pytest.raises(pm.Infeasible, match="alpha is 0 times"):
        direction_of([0.0, 0.0], 1.0)
    assert direction_of([0.0, 0.0], 0.0).tolist() == [0.5, 0.5]


NAN = float("nan")


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: change_of_coordinates([0.8, 0.1]), pm.OffFibre, "total 0.9. Expected"),
        (
            lambda: change_of_coordinates([[0.8, 0.2], [1.0, 1.0]]),
            pm.OffFibre,
            "total 2. Expected 1",
        ),
        (
            lambda: change_of_coordinates([0.5, 0.5], weights=[2.0, 2.0]),
            pm.OffFibre,
            "total 2",
        ),
        (lambda: change_of_coordinates([0.0, 0.0]), pm.OffFibre, "total 0"),
        (
            lambda: change_of_coordinates([NAN, 1.0]),
            pm.PyroMacroError,
            "direction is .*nan.*finite",
        ),
        (lambda: change_of_coordinates(1.0), pm.PyroMacroError, r"has shape \(\)"),
        (lambda: change_of_coordinates([]), pm.PyroMacroError, r"has shape \(0,\)"),
        (lambda: change_of_coordinates("ab"), pm.PyroMacroError, "'ab'. Expected num"),
        (lambda: direction_of([1.0, NAN], 1.0), pm.PyroMacroError, "alpha is .*nan"),
        (
            lambda: direction_of([1.0, 2.0], float("inf")),
            pm.PyroMacroError,
            "coefficient is inf",
        ),
        (
            lambda: direction_of([1.0, 2.0], 1.0, weights=[1.0]),
            pm.PyroMacroError,
            r"weights are \[1\.0\]. Expected 2",
        ),
        (
            lambda: direction_of([1.0, 2.0], 1.0, weights=[0.0, 0.0]),
            pm.PyroMacroError,
            "not all zero",
        ),
        (
            lambda: noise_covariance([1.0, 2.0], [1.0, 2.0], 1.0),
            pm.PyroMacroError,
            r"covariance has shape \(2,\). Expected \(2, 2\)",
        ),
    ],
)
def test_errors(call, error, words):
    with pytest.raises(error, match=words):
        call()
