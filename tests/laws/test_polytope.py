# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The uniform law on a box cut by a hyperplane: volumes, densities and draws."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import assert_cdf, assert_same_law
from pyro.infer.autoguide import AutoNormal
from scipy import integrate, stats
from torch.distributions import biject_to

import pyro_macro as pm
from pyro_macro.laws.elements import Elements
from pyro_macro.laws.sampled.polytope import UniformOnPolytope, log_sum_density

INF = float("inf")


def t(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def density(at, width):
    """Of a sum of independent uniforms."""
    return log_sum_density(at, width).exp()


def uniform(bounds, weights, value, dtype=torch.float64, steps=None):
    low, high = t(*[b[0] for b in bounds]), t(*[b[1] for b in bounds])
    zero = torch.zeros_like(low)
    value = torch.as_tensor(value, dtype=torch.float64)
    parts = Elements(low, high, zero, zero + 1)
    return UniformOnPolytope(parts, t(*weights), value, dtype, steps)


UNIT, BOX = (0.0, 1.0), (-1.0, 3.0)
CASES = {
    "two": ([UNIT, BOX], [1.0, 1.0], 1.3),
    "two, weights": ([UNIT, BOX], [2.0, -0.5], 0.4),
    "three": ([UNIT, BOX, UNIT], [1.0, 1.0, 1.0], 2.2),
    "three, weights": ([UNIT, BOX, UNIT], [2.0, -1.0, 3.0], 1.0),
    "three, near a corner": ([UNIT, UNIT, UNIT], [1.0, 1.0, 1.0], 2.97),
    "half-lines": ([(0.0, INF), (2.0, INF), (0.0, 1.0)], [1.0, 1.0, 1.0], 4.0),
    "half-lines below": ([(-INF, 0.0), (-INF, 1.0)], [1.0, 2.0], -3.0),
    "signs": ([(-INF, 0.0), (0.0, INF), UNIT], [-1.0, 1.0, 2.0], 3.0),
}


def inside(x, bounds, weights, value):
    """Whether elements but the last leave a rest within its support."""
    rest = (value - x @ weights[:-1]) / weights[-1]
    low, high = bounds[-1]
    return (rest >= low) & (rest <= high), rest


def by_monte_carlo(bounds, weights, value, n=1_000_000):
    """The volume of the elements but the last, and uniform draws, by rejection."""
    ends = []
    for (low, high), w in zip(bounds[:-1], weights, strict=False):
        # In place of an infinite end: far enough
        low, high = max(low, -20.0 / abs(w)), min(high, 20.0 / abs(w))
        ends.append((low, high))
    low, high = t(*[e[0] for e in ends]), t(*[e[1] for e in ends])
    x = low + (high - low) * torch.rand(n, len(ends))
    met, rest = inside(x, bounds, t(*weights), value)
    volume = float(met.double().mean() * (high - low).prod())
    error = volume * float(((1 - met.double().mean()) / met.sum()) ** 0.5)
    return volume, error, torch.cat([x, rest.unsqueeze(-1)], -1)[met]


@pytest.mark.parametrize("case", CASES)
def test_the_volume_is_that_of_monte_carlo(case):
    law = uniform(*CASES[case])
    volume, error, states = by_monte_carlo(*CASES[case])
    assert abs(law.log_volume.exp() - volume) < 4 * error + 1e-9
    x = states[:5]
    torch.testing.assert_close(law.log_prob(x), -law.log_volume.expand(5))


@pytest.mark.parametrize("case", CASES)
def test_draws_are_those_of_rejection(case):
    bounds, weights, value = CASES[case]
    law = uniform(bounds, weights, value)
    draws = law.sample((3000,))
    torch.testing.assert_close(draws @ t(*weights), torch.full((3000,), value))
    low, high = t(*[b[0] for b in bounds]), t(*[b[1] for b in bounds])
    assert (draws >= low - 1e-9).all() and (draws <= high + 1e-9).all()
    assert law.support.check(draws).all()
    _, _, states = by_monte_carlo(bounds, weights, value)
    one, other = draws[:, : len(bounds) - 1], states[:20_000, : len(bounds) - 1]
    assert_same_law(one, other)
    turned = t(*range(1, len(bounds) + 1)).square()  # along another direction
    assert stats.ks_2samp(draws @ turned, states[:20_000] @ turned).pvalue > 1e-3


def test_the_density_integrates_to_one_on_two_and_three_elements():
    law = uniform(*CASES["two, weights"])

    def height(x0):
        x = t(x0, (0.4 - 2 * x0) / -0.5)
        if not law.support.check(x):
            return 0.0
        return law.log_prob(x).exp().item()

    points = [0.2 + 0.25 * -1, 0.2 + 0.25 * 3]
    total, _ = integrate.quad(height, 0, 1, points=points, limit=200)
    assert abs(total - 1) < 1e-6
    bounds, weights, value = CASES["three"]
    law = uniform(bounds, weights, value)
    axis = (torch.arange(1000) + 0.5) / 1000
    x = torch.cartesian_prod(axis, axis * 4 - 1)
    met, rest = inside(x, bounds, t(*weights), value)
    states = torch.cat([x, rest.unsqueeze(-1)], -1)[met]
    total = law.log_prob(states[:1]).exp() * len(states) * 4 / 1e6
    assert abs(total.item() - 1) < 2e-3


def test_the_simplex_has_the_volume_of_the_closed_form():
    for count in (2, 3, 6):
        law = uniform([(0.0, INF)] * count, [1.0] * count, 3.0)
        wanted = (count - 1) * math.log(3) - math.lgamma(count)
        torch.testing.assert_close(law.log_volume.item(), wanted)
    draws = uniform([(0.0, INF)] * 3, [1.0] * 3, 3.0).sample((4000,))
    assert_cdf(draws[:, 0], stats.beta(1, 2, scale=3).cdf)
    assert_cdf(draws[:, 2], stats.beta(1, 2, scale=3).cdf)


def irwin_hall(x, n):
    """The density of the sum of n standard uniforms, in exact arithmetic."""
    from fractions import Fraction

    x = Fraction(x)
    total = sum(
        (-1) ** k * math.comb(n, k) * (x - k) ** (n - 1) for k in range(int(x) + 1)
    )
    return float(total / math.factorial(n - 1))


@pytest.mark.parametrize("count", [2, 3, 7, 12, 13, 20, 40])
def test_sums_of_uniforms_have_the_density_of_irwin_and_hall(count):
    for share in (0.3, 0.5, 0.61):
        x = round(share * count * 8) / 8
        found = density(t(x)[0], torch.ones(count)).item()
        wanted = irwin_hall(x, count)
        assert abs(found / wanted - 1) < 1e-6, f"at {x}: {found}, not {wanted}"


@pytest.mark.parametrize("count", [12, 13, 20])
def test_sums_of_uniforms_have_a_density_far_out(count):
    """One part in a million of the mass and less."""
    for x in (0.0625 * count, 0.125 * count, 0.9375 * count):
        found = density(t(x)[0], torch.ones(count)).item()
        wanted = irwin_hall(x, count)
        assert abs(found / wanted - 1) < 1e-3, f"at {x}: {found}, not {wanted}"


def test_twelve_and_thirteen_elements_are_by_two_formulas_that_agree():
    """A thirteenth element that is very narrow changes little."""
    width = torch.linspace(0.5, 2.0, 12)
    for share in (0.2, 0.5, 0.7):
        at = share * width.sum()
        twelve = density(at, width)
        narrow = torch.cat([width, t(1e-3)])
        thirteen = density(at + 0.5e-3, narrow)
        torch.testing.assert_close(twelve, thirteen, rtol=1e-5, atol=0)
    law = uniform([UNIT] * 13, [1.0] * 13, 5.0)
    torch.testing.assert_close(
        law.log_volume.item(), math.log(irwin_hall(5, 13)), rtol=1e-9, atol=0
    )


def test_densities_of_sums_of_many_widths_are_those_of_a_convolution():
    width = t(0.3, 1.0, 2.5, 0.7)
    step = 1e-3
    known = np.ones(1) / step
    for w in width.tolist():
        known = np.convolve(known, np.ones(round(w / step)) / round(w / step))
    for x in (0.4, 1.7, 3.0, 4.2):
        # The grid's cells are summed at their left ends
        wanted = known[round(x / step) - 2]
        found = density(t(x)[0], width).item()
        assert abs(found / wanted - 1) < 1e-2


def test_many_elements_mix():
    """Twenty uniforms given their sum: marginals by the density of the others."""
    count, value = 20, 6.0
    law = uniform([UNIT] * count, [1.0] * count, value)
    draws = law.sample((2000,))
    x = np.linspace(0, 1, 401)
    p = np.array([irwin_hall(value - v, count - 1) for v in x.tolist()])
    cdf = integrate.cumulative_trapezoid(p, x, initial=0)
    for k in (0, 7, 19):
        assert_cdf(draws[:, k], lambda at: np.interp(at, x, cdf / cdf[-1]))


def test_values_of_their_own_along_a_batch_and_an_expanded_law():
    law = uniform([UNIT] * 3, [1.0] * 3, t(0.5, 1.5, 2.8))
    assert law.batch_shape == (3,)
    for i, value in enumerate((0.5, 1.5, 2.8)):
        torch.testing.assert_close(
            law.log_volume[i].item(), math.log(irwin_hall(value, 3))
        )
    many = law.expand((400, 3))
    torch.manual_seed(1)
    draws = many.sample()
    torch.testing.assert_close(draws.sum(-1), t(0.5, 1.5, 2.8).expand(400, 3))
    assert len(draws[:, 1].unique(dim=0)) == 400
    assert many.log_prob(draws).shape == (400, 3)
    torch.manual_seed(1)
    torch.testing.assert_close(many.sample(), draws, rtol=0, atol=0)


def test_single_precision_draws_meet_the_sum():
    law = uniform([BOX] * 5, [1.0] * 5, 4.0, torch.float32)
    draws = law.sample((200,))
    assert draws.dtype == torch.float32
    assert (draws.sum(-1) - 4).abs().max() < 1e-5
    assert law.support.check(draws).all()
    assert law.log_prob(draws).dtype == torch.float32


def test_states_off_the_polytope_have_no_density():
    law = uniform([UNIT] * 3, [1.0] * 3, 1.5)
    for state in (t(0.5, 0.5, 0.6), t(1.2, 0.1, 0.2), t(-0.5, 1.0, 1.0)):
        assert not law.support.check(state)
        with pytest.raises(ValueError, match="support"):
            law.log_prob(state)


@pytest.mark.parametrize("case", CASES)
def test_coordinates_reach_the_polytope(case):
    bounds, weights, value = CASES[case]
    law = uniform(bounds, weights, value)
    transform = biject_to(law.support)
    z = torch.randn(50, len(bounds) - 1)
    x = transform(z)
    assert law.support.check(x).all()
    torch.testing.assert_close(transform.inv(x), z, rtol=1e-6, atol=1e-6)


def test_corners_of_the_box_are_all_counted():
    """By hand: the volume of {x0 + x1 <= 1.2} in a unit square, and its like."""
    for value in (0.4, 1.2, 1.9, 2.5):
        law = uniform([UNIT] * 3, [1.0] * 3, value)
        area = 0.0
        for i, j in itertools.product(range(500), repeat=2):
            rest = value - (i + 0.5) / 500 - (j + 0.5) / 500
            area += (0 <= rest <= 1) / 250_000
        assert abs(law.log_volume.exp().item() - area) < 2e-3


@pytest.mark.parametrize("narrow", [0.1, 0.01, 1e-3])
@pytest.mark.parametrize("count", [3, 8, 12, 16])
def test_narrow_elements_beside_a_wide_one(count, narrow):
    """In its middle the sum has the density of the wide one."""
    width = torch.full((count,), narrow)
    width[0] = 2.0
    at = t(0.5 * float(width.sum()))[0]
    torch.testing.assert_close(density(at, width).item(), 0.5, rtol=1e-4, atol=0)


def test_slots_of_different_bounds_with_one_value_have_coordinates():
    """A value without a batch, supports with one: as a plate that stays has."""

    def model():
        with pyro.plate("k", 2):
            for name in "abc":
                pyro.sample(name, dist.Uniform(0.0, torch.tensor([1.0, 2.0])))

    macro = pm.MacroVariable("m", ["a", "b", "c"])
    intervened = pm.macro_do(model, {macro: pm.MaxEntropy(1.0)})
    law = pyro.poutine.trace(intervened).get_trace().nodes["m__micro"]["fn"]
    to_fibre = torch.distributions.biject_to(law.support)
    x = torch.tensor([[0.3, -0.4], [1.0, 0.2]])
    state = to_fibre(x)
    assert torch.allclose(state.sum(-1), torch.ones(2))
    assert torch.allclose(to_fibre.inv(state), x)
    volume = to_fibre.log_abs_det_jacobian(x, state)
    for k in range(2):

        def own(z, k=k):
            return to_fibre(torch.stack([z if i == k else x[i] for i in range(2)]))[k]

        jacobian = torch.autograd.functional.jacobian(own, x[k])[:2]
        assert torch.isclose(volume[k], torch.linalg.det(jacobian).abs().log())
    guide = AutoNormal(intervened)
    assert guide()["m__micro"].shape == (2, 3)
