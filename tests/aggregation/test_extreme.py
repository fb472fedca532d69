# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``Max`` and ``Min`` as maps, and of counts."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from brute_force import assert_counts, assert_is_law, law_of, product_of
from scipy import stats

import pyro_macro as pm


@pytest.mark.parametrize("dtype", [torch.long, torch.float32, torch.float64])
def test_extremes_of_states(dtype):
    state = torch.tensor([[1, 4, 2], [-3, -1, -2]], dtype=dtype)
    assert pm.Max()(state).tolist() == [4, -1]
    assert pm.Min()(state).tolist() == [1, -3]


def test_extremes_compare_by_what_they_compute():
    assert pm.Max() == pm.Max() and pm.Max() != pm.Min()
    assert hash(pm.Max()) == hash(pm.Max())
    assert repr(pm.Min()) == "Min()"
    assert pm.Max().weights(torch.zeros(2)) is None


def poissons():
    for i, rate in enumerate((0.5, 2.0, 1.0)):
        pyro.sample(f"x{i}", dist.Poisson(rate))


def test_the_largest_of_counts_has_a_finite_fibre():
    macro = pm.MacroVariable("m", ["x0", "x1", "x2"], aggregation=pm.Max())
    law = law_of(poissons, macro, pm.Natural(3.0))
    fns = [dist.Poisson(rate) for rate in (0.5, 2.0, 1.0)]
    states, probs, log_total = product_of(fns, [range(4)] * 3, lambda x: x.amax(-1), 3)
    assert_is_law(law, states, probs, log_total)
    assert_counts(law.sample((10_000,)), states, probs)
    one, two, three = (stats.poisson(rate) for rate in (0.5, 2.0, 1.0))
    at_most = [one.cdf(v) * two.cdf(v) * three.cdf(v) for v in (3, 2)]
    torch.testing.assert_close(log_total.exp().item(), at_most[0] - at_most[1])


def test_the_largest_of_counts_is_zero():
    macro = pm.MacroVariable("m", ["x0", "x1", "x2"], aggregation=pm.Max())
    law = law_of(poissons, macro, pm.Natural(0.0))
    assert law.sample((10,)).sum() == 0
    for value in (-1.0, 1.5):
        with pytest.raises(pm.Infeasible, match="cannot be reached"):
            law_of(poissons, macro, pm.Natural(value))


def test_the_smallest_of_counts_has_an_infinite_fibre():
    macro = pm.MacroVariable("m", ["x0", "x1", "x2"], aggregation=pm.Min())
    with pytest.raises(pm.UnsupportedLaw, match="Poisson.*infinitely many"):
        law_of(poissons, macro, pm.Natural(1.0))


def test_negative_values_have_extremes_too():
    """Spins of -1 and 1, made of Bernoullis: the map sees what the program computes."""

    def model():
        with pyro.plate("o", 3):
            pyro.sample("x", dist.Uniform(-2.0, torch.tensor([-0.5, -1.0, 0.5])))

    macro = pm.MacroVariable("m", "x", over="o", aggregation=pm.Max())
    for value in (-1.2, -0.8):
        x = pyro.poutine.trace(pm.macro_do(model, {macro: pm.Natural(value)}))
        x = x.get_trace().nodes["x"]["value"]
        assert x.amax() == value
        assert x[1] <= -1


def test_the_extreme_of_one_element_is_refused():
    def model():
        pyro.sample("x", dist.Normal(0.0, 1.0))

    for aggregation in (pm.Max(), pm.Min()):
        macro = pm.MacroVariable("m", "x", aggregation=aggregation)
        with pytest.raises(pm.NotAMicroState, match="injective"):
            law_of(model, macro, pm.Natural(1.0))


def test_extremes_that_are_not_linear_have_no_residual():
    macro = pm.MacroVariable("m", ["x0", "x1", "x2"], aggregation=pm.Max())
    with pytest.raises(pm.UnsupportedLaw, match="Max.. is not linear"):
        law_of(poissons, macro, pm.Residual(3.0, absorb="x0"))
