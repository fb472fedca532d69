# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Free coordinates of fibres: inverses, Jacobians, volumes and densities.

Volumes are compared with the Jacobians of autograd; densities, pushed to the
coordinates, with the density of the total that a convolution gives.
"""

import numpy as np
import pytest
import torch
from scipy import stats

import pyro_macro as pm
from pyro_macro.laws.elements import Elements
from pyro_macro.laws.sampled.coordinates import (
    IntervalTransform,
    PivotTransform,
    PositiveTransform,
    into,
    linear_coordinates,
    out_of,
    slope,
    smooth_coordinates,
)
from pyro_macro.laws.sampled.simplex import SimplexTransform

INF = float("inf")


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def elements(*bounds):
    """Elements with these supports, their centres somewhere inside."""
    low, high = t(*[b[0] for b in bounds]), t(*[b[1] for b in bounds])
    centre = torch.where(
        low.isfinite() & high.isfinite(),
        0.3 * low + 0.7 * high,
        torch.where(
            low.isfinite(),
            low + 1.5,
            torch.where(high.isfinite(), high - 1.5, torch.full_like(low, 0.4)),
        ),
    )
    return Elements(low, high, centre, torch.linspace(0.5, 1.5, len(bounds)))


REAL, POSITIVE, NEGATIVE = (-INF, INF), (0.0, INF), (-INF, 1.0)
UNIT, BOX = (0.0, 1.0), (-1.0, 3.0)


def linear(bounds, weights, value):
    rows = torch.atleast_2d(t(*weights))
    value = torch.as_tensor(value, dtype=torch.float64)
    value = value if len(rows) > 1 else value.unsqueeze(-1)
    return linear_coordinates(elements(*bounds), rows, value, "it"), rows, value


LINEAR = {
    "real": ([REAL] * 3, [1.0, 1.0, 1.0], 2.0, PivotTransform),
    "real, weights": ([REAL] * 4, [1.0, -2.0, 0.5, 0.0], 2.0, PivotTransform),
    "real and others": (
        [POSITIVE, REAL, UNIT, NEGATIVE],
        [1.0, 3.0, -1.0, 2.0],
        -4.0,
        PivotTransform,
    ),
    "two rows": (
        [REAL, POSITIVE, REAL, UNIT, REAL],
        [[1.0, 1.0, 1.0, 1.0, 1.0], [0.5, -1.0, 2.0, 0.0, 3.0]],
        [2.0, -1.0],
        PivotTransform,
    ),
    "positive": ([POSITIVE] * 4, [1.0, 1.0, 1.0, 1.0], 5.0, PositiveTransform),
    "positive, weights": ([POSITIVE] * 3, [1.0, 2.0, 0.5], 5.0, PositiveTransform),
    "box": ([UNIT, UNIT, UNIT], [1.0, 1.0, 1.0], 1.7, IntervalTransform),
    "box, near an end": ([UNIT, BOX, UNIT], [1.0, 1.0, 1.0], 4.99, IntervalTransform),
    "box, weights": ([UNIT, BOX, UNIT, BOX], [1.0, -2.0, 3.0, 0.5], 0.4, None),
    "mixed": ([UNIT, POSITIVE, POSITIVE], [1.0, 2.0, 1.0], 2.5, IntervalTransform),
    "negative and positive": (
        [NEGATIVE, POSITIVE, UNIT],
        [-1.0, 1.0, 1.0],
        2.5,
        IntervalTransform,
    ),
    "unbounded both ways": (
        [POSITIVE, NEGATIVE, UNIT],
        [1.0, 1.0, 1.0],
        0.5,
        IntervalTransform,
    ),
}


@pytest.mark.parametrize("case", LINEAR)
def test_linear_coordinates_are_a_map_onto_the_fibre(case):
    bounds, weights, value, kind = LINEAR[case]
    transform, rows, value = linear(bounds, weights, value)
    assert kind is None or type(transform) is kind
    size = len(bounds)
    z = torch.randn(200, size - len(rows)) * 1.5
    assert transform.forward_shape(z.shape) == (200, size)
    assert transform.inverse_shape((200, size)) == z.shape
    x = transform(z)
    torch.testing.assert_close(x @ rows.mT, value.expand(200, len(rows)))
    parts = elements(*bounds)
    if kind is PivotTransform:  # the pivots are real
        assert ((x >= parts.low) & (x <= parts.high)).all()
    else:
        assert ((x > parts.low) & (x < parts.high)).all()
    torch.testing.assert_close(transform.inv(x), z, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", LINEAR)
def test_linear_coordinates_have_the_volume_of_autograd(case):
    """With respect to the elements but those that are solved for."""
    bounds, weights, value, kind = LINEAR[case]
    transform, rows, _ = linear(bounds, weights, value)
    z = torch.randn(20, len(bounds) - len(rows))
    if isinstance(transform, PivotTransform):
        solved = transform.pivots
    else:
        solved = torch.tensor([len(bounds) - 1])
    kept = [i for i in range(len(bounds)) if i not in solved]
    x = transform(z)
    found = transform.log_abs_det_jacobian(z, x)
    for i in range(20):
        jacobian = torch.autograd.functional.jacobian(transform, z[i])[kept]
        torch.testing.assert_close(found[i], torch.linalg.det(jacobian).abs().log())
    slopes = torch.linalg.det(rows[:, solved]).abs().log()
    torch.testing.assert_close(transform.log_coarea(x).expand(20), -slopes.expand(20))


def total_density(transform, log_density, width=9.0, count=400):
    """The integral over the coordinates of a density and the co-area: that of pi."""
    size = transform.inverse_shape((3,))[0]
    axis = torch.linspace(-width, width, count)
    z = torch.cartesian_prod(*[axis] * size).reshape(-1, size)
    x = transform(z)
    logs = log_density(x) + transform.log_abs_det_jacobian(z, x)
    logs = logs + transform.log_coarea(x)
    return logs.exp().sum().item() * (axis[1] - axis[0]).item() ** size


def test_real_coordinates_integrate_to_the_density_of_the_total():
    fn = torch.distributions.Normal(t(0.3, -1.0, 0.5), t(1.0, 2.0, 0.7))
    w = t(1.0, -2.0, 0.5)
    transform, _, _ = linear([REAL] * 3, w.tolist(), 2.0)
    found = total_density(transform, lambda x: fn.log_prob(x).sum(-1), 12.0, 500)
    scale = float((w * fn.scale).square().sum().sqrt())
    wanted = stats.norm(float(w @ fn.loc), scale).pdf(2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5)], ids=str)
def test_positive_coordinates_integrate_to_the_density_of_the_total(weights):
    w = t(*weights)
    fn = torch.distributions.Gamma(t(1.5, 2.0, 1.2), 0.8 * w)
    transform, _, _ = linear([POSITIVE] * 3, weights, 5.0)
    found = total_density(transform, lambda x: fn.log_prob(x).sum(-1), 25.0, 900)
    wanted = stats.gamma(4.7, scale=1 / 0.8).pdf(5.0)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0.4, 1.5, 2.9])
def test_box_coordinates_integrate_to_the_density_of_the_total(value):
    """The Irwin-Hall density of three uniforms, one of them of length two."""
    transform, _, _ = linear([UNIT, (0.0, 2.0), UNIT], [1.0, 1.0, 1.0], value)
    found = total_density(
        transform, lambda x: torch.full(x.shape[:1], -np.log(2)), 20.0, 500
    )
    unit = (np.arange(2000) + 0.5) / 2000
    rest = value - unit[:, None] - unit
    wanted = ((rest > 0) & (rest < 2)).mean() / 2
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


def test_one_sided_supports_integrate_to_the_density_of_the_total():
    """x0 - x1 of exponentials, and a uniform: the pivot is none of them."""
    transform, _, _ = linear([POSITIVE, NEGATIVE, UNIT], [1.0, 1.0, 1.0], 0.5)

    def density(x):
        return -x[:, 0] - (1 - x[:, 1])

    found = total_density(transform, density, 20.0, 800)
    # x1 = 1 - e; x0 - e is Laplace, and u uniform: P(0.5 - 1 - 1 < L < 0.5 - 1)
    laplace = stats.laplace()
    wanted = laplace.cdf(-0.5) - laplace.cdf(-1.5)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0)


@pytest.mark.parametrize("batch", [(), (5,), (2, 1)])
def test_values_of_their_own_along_a_batch(batch):
    value = torch.rand(batch, dtype=torch.float64) + 1.0
    for bounds, weights in (
        ([REAL] * 3, [1.0, 2.0, 1.0]),
        ([POSITIVE] * 3, [1.0, 2.0, 1.0]),
        ([UNIT] * 3, [1.0, 1.0, 1.0]),
    ):
        transform, rows, _ = linear(bounds, weights, value)
        z = torch.randn(*batch, 2)
        x = transform(z)
        assert x.shape == (*batch, 3)
        torch.testing.assert_close((x @ rows.mT).squeeze(-1), value)
        torch.testing.assert_close(transform.inv(x), z)
        assert transform.log_abs_det_jacobian(z, x).shape == batch
        if isinstance(transform, SimplexTransform):
            assert (transform.inv(x) - z).abs().max() < 1e-9


@pytest.mark.parametrize("low, high", [REAL, POSITIVE, NEGATIVE, UNIT, BOX])
def test_intervals_and_their_slopes(low, high):
    low, high = t(low)[0], t(high)[0]
    z = torch.linspace(-4, 4, 9, requires_grad=True)
    for shift in (0.0, -1.1):
        x = into(z, low, high, shift)
        assert ((x > low) & (x < high)).all()
        torch.testing.assert_close(out_of(x, low, high, shift), z)
        (found,) = torch.autograd.grad(x.sum(), z)
        torch.testing.assert_close(slope(z, low, high, shift), found.abs().log())


def test_gradients_of_intervals_stay_finite_for_all_ends():
    low, high = t(-INF, 0.0, -INF, 0.0), t(INF, INF, 1.0, 1.0)
    z = t(0.1, 700.0, 700.0, 40.0).requires_grad_()
    total = into(z[[0, 3]], low[[0, 3]], high[[0, 3]]).sum() + slope(z, low, high).sum()
    (gradient,) = torch.autograd.grad(total, z)
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    "bounds, weights, value, error, message",
    [
        (
            [UNIT] * 3,
            [1.0, 1.0, 1.0],
            3.5,
            pm.Infeasible,
            "3.5 cannot.*between 0 and 3",
        ),
        ([UNIT] * 3, [1.0, 1.0, -1.0], -1.0, pm.Infeasible, "between -1 and 2"),
        ([POSITIVE] * 2, [1.0, 1.0], -2.0, pm.Infeasible, "between 0 and inf"),
        ([UNIT] * 3, [1.0, 0.0, 1.0], 1.0, pm.UnsupportedLaw, "element 1 has weight z"),
        (
            [UNIT] * 3,
            [[1.0, 1.0, 1.0], [1.0, 2.0, 3.0]],
            [1.5, 3.0],
            pm.UnsupportedLaw,
            "vector of macro values",
        ),
    ],
)
def test_fibres_without_coordinates_say_why(bounds, weights, value, error, message):
    with pytest.raises(error, match=message):
        linear(bounds, weights, value)


# Smooth maps


def smooth(bounds, total, value):
    parts = elements(*bounds)
    generator = torch.Generator().manual_seed(0)
    states = parts.centre + 0.3 * torch.randn(64, len(bounds), generator=generator)
    states = states.maximum(parts.low + 0.01).minimum(parts.high - 0.01)
    return smooth_coordinates(parts, total, t(value)[0], states, "it")


def cubes(x):
    return x[..., 0] + x[..., 0] ** 3 + x[..., 1] ** 2 - x[..., 2].sin()


def product(x):
    return x.prod(-1)


SMOOTH = {
    "cubes": ([REAL] * 3, cubes, 1.3),
    "product": ([POSITIVE] * 3, product, 2.0),
    "log-sum-exp": ([REAL] * 3, lambda x: x.logsumexp(-1), 3.0),
    "falling": ([REAL, UNIT], lambda x: x[..., 1] ** 2 - x[..., 0].sinh(), -4.0),
    "bounded": ([UNIT] * 2, lambda x: x[..., 0] * 3 + x[..., 1] ** 2, 1.4),
}


@pytest.mark.parametrize("case", SMOOTH)
def test_smooth_coordinates_are_on_the_fibre_with_the_volume_of_autograd(case):
    bounds, total, value = SMOOTH[case]
    transform = smooth(bounds, total, value)
    z = torch.randn(400, len(bounds) - 1) * 0.5
    x = transform(z)
    reached = (total(x) - value).abs() < 1e-8
    assert reached.sum() > 10
    # Where nothing solves there is no density
    assert (transform.log_coarea(x[~reached]) == -INF).all()
    z, x = z[reached][:20], x[reached][:20]
    torch.testing.assert_close(transform.inv(x), z, rtol=1e-6, atol=1e-6)
    pivot = int(transform.pivots)
    kept = [i for i in range(len(bounds)) if i != pivot]
    volume = transform.log_abs_det_jacobian(z, x)
    coarea = transform.log_coarea(x)
    for i in range(len(z)):
        jacobian = torch.autograd.functional.jacobian(transform, z[i])
        torch.testing.assert_close(
            volume[i], torch.linalg.det(jacobian[kept]).abs().log()
        )
        # Along the fibre the map does not move: the pivot follows by its derivative
        (gradient,) = torch.autograd.functional.jacobian(total, (x[i],))
        torch.testing.assert_close(
            gradient @ jacobian, torch.zeros(len(bounds) - 1), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(coarea[i], -gradient[pivot].abs().log())


def test_smooth_coordinates_integrate_to_the_density_of_the_value():
    """A product of two log-normals is log-normal: so only with the co-area factor."""
    transform = smooth([POSITIVE] * 2, product, 2.0)
    fn = torch.distributions.LogNormal(t(0.1, -0.2), t(0.5, 0.8))
    axis = torch.linspace(-8, 8, 4000).unsqueeze(-1)
    x = transform(axis)
    logs = fn.log_prob(x).sum(-1) + transform.log_abs_det_jacobian(axis, x)
    step = float(axis[1] - axis[0])
    without = logs.exp().sum().item() * step
    found = (logs + transform.log_coarea(x)).exp().sum().item() * step
    scale = (0.5**2 + 0.8**2) ** 0.5
    wanted = stats.lognorm(scale, scale=np.exp(-0.1)).pdf(2.0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    assert abs(without / wanted - 1) > 0.05


def test_smooth_coordinates_of_a_nonlinear_map_integrate_to_its_density():
    """x0 + x0^3 + x1^2 for normals: the density of the value by one integral."""
    transform = smooth(
        [REAL] * 2, lambda x: x[..., 0] + x[..., 0] ** 3 + x[..., 1] ** 2, 1.3
    )
    fn = torch.distributions.Normal(0.0, 1.0)
    axis = torch.linspace(-8, 8, 4000).unsqueeze(-1)
    x = transform(axis)
    logs = fn.log_prob(x).sum(-1) + transform.log_abs_det_jacobian(axis, x)
    logs = logs + transform.log_coarea(x)
    found = logs.exp().sum().item() * float(axis[1] - axis[0])
    # P(value <= v) = E Phi(g(v - x1^2)), g the inverse of x + x^3, by differences
    x1 = np.linspace(-8, 8, 4001)

    def cdf(v):
        a = v - x1**2
        root = np.array([np.roots([1, 0, 1, -b]) for b in a])
        real = root[np.arange(len(a)), np.abs(root.imag).argmin(1)].real
        return (stats.norm.pdf(x1) * stats.norm.cdf(real)).sum() * (x1[1] - x1[0])

    wanted = (cdf(1.3 + 1e-3) - cdf(1.3 - 1e-3)) / 2e-3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


def test_a_map_that_rises_and_falls_in_every_element_is_refused():
    with pytest.raises(pm.UnsupportedLaw, match="monotone in no element"):
        smooth([REAL] * 2, lambda x: x.square().sum(-1), 2.0)


def test_gradients_flow_through_the_solved_element():
    """d pivot / d free, twice differentiable enough for a sampler: by differences."""
    transform = smooth([REAL] * 3, cubes, 1.3)
    z = t(0.2, -0.3).requires_grad_()

    def potential(z):
        x = transform(z)
        density = -0.5 * x.square().sum(-1)
        volume = transform.log_abs_det_jacobian(z, x) + transform.log_coarea(x)
        return density + volume

    (found,) = torch.autograd.grad(potential(z), z)
    with torch.no_grad():
        for i in range(2):
            move = torch.zeros(2)
            move[i] = 1e-5
            wanted = (potential(z + move) - potential(z - move)) / 2e-5
            torch.testing.assert_close(found[i], wanted, rtol=1e-5, atol=1e-6)
