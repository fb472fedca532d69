# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The amortized law: a conditional flow, fitted once for a range of macro values."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoNormal

import pyro_macro as pm

TOTAL = pm.MacroVariable("total", ["a", "b"])
PARAMETERS = torch.tensor([[0.0, 0.5], [1.0, 0.3]], dtype=torch.float64)
A, B = (dist.LogNormal(loc, scale) for loc, scale in PARAMETERS)


def model():
    return pyro.sample("a", A) + 2 * pyro.sample("b", B)


def flow(**options):
    options = {"num_draws": 4000, "steps": 150, "progress": False, **options}
    return pm.Flow(2.0, 6.0, **options)


@pytest.fixture(scope="module")
def natural():
    return pm.Natural(3.0, sampler=flow())


def law_of(realization):
    intervened = pm.macro_do(model, {TOTAL: realization})
    return pyro.poutine.trace(intervened).get_trace().nodes["total__micro"]["fn"]


def expected(value, at):
    """The density of ``a`` on the fibre, normalized numerically."""
    density = (A.log_prob(at) + B.log_prob(value - at)).exp()
    return density / torch.trapezoid(density, at)


def test_density_integrates_to_one_and_is_near_that_of_the_fibre(natural):
    law = law_of(natural)
    at = torch.linspace(1e-3, 3 - 1e-3, 3001)
    found = law.log_prob(torch.stack([at, 3 - at], -1)).exp()
    assert abs(torch.trapezoid(found, at) - 1) < 1e-3
    apart = torch.trapezoid((found - expected(3.0, at)).abs(), at) / 2
    assert apart < 0.1


def test_draws_are_on_the_fibre_and_follow_the_density(natural):
    law = law_of(natural)
    x = law.sample((4000,))
    assert torch.allclose(x.sum(-1), torch.tensor(3.0)) and (x > 0).all()
    at = torch.linspace(1e-3, 3 - 1e-3, 3001)
    cdf = law.log_prob(torch.stack([at, 3 - at], -1)).exp().cumsum(0) * (at[1] - at[0])
    ranks = torch.bucketize(x[:, 0].sort().values, at).clamp(max=3000)
    steps = torch.arange(1, 4001) / 4000
    assert (cdf[ranks] - steps).abs().max() < 1.95 / 4000**0.5 + 0.002  # level 1e-3


def test_it_says_how_far_off_it_is(natural):
    (found,) = pm.macro_do(model, {TOTAL: natural}).describe()
    assert not found.exact and found.free == 1
    off = law_of(natural).fitted.off
    assert 0 < off < 0.15 and f"off by {off:.3f}" in found.method
    assert "800 held-out draws" in found.method


def test_a_worse_fit_is_further_off(natural):
    poor = law_of(pm.Natural(3.0, sampler=flow(steps=2)))
    assert poor.fitted.off > 1.5 * law_of(natural).fitted.off


def test_one_fit_serves_a_grid_and_later_runs(natural, monkeypatch):
    law_of(natural)
    values = torch.linspace(2.5, 5.5, 4)
    grid = pm.Natural(values, sampler=natural.sampler)
    grid._store.update(natural._store)
    monkeypatch.setattr(torch.optim, "Adam", None)  # nothing can be fitted any more
    with pyro.plate("grid", 4, dim=-1):
        nodes = pyro.poutine.trace(pm.macro_do(model, {TOTAL: grid})).get_trace().nodes
    assert torch.allclose(nodes["a"]["value"] + nodes["b"]["value"], values)
    law_of(natural)


def test_svi_runs_on_its_density(natural):
    intervened = pm.macro_do(model, {TOTAL: natural})

    def seen():
        pyro.sample("y", dist.Normal(intervened(), 0.1), obs=torch.tensor(5.0))

    guide = AutoNormal(seen)
    svi = SVI(seen, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(200):
        svi.step()
    a, b = guide.median()["total__micro"]
    assert torch.isclose(a + b, torch.tensor(3.0))
    assert abs(a + 2 * b - 5.0) < 0.2


def test_the_random_state_stays_and_seeds_reproduce():
    pyro.set_rng_seed(3)
    state = torch.get_rng_state()
    one = pm.Natural(3.0, sampler=flow(steps=5))
    pm.macro_do(model, {TOTAL: one}).describe()
    assert torch.equal(torch.get_rng_state(), state)
    other = pm.Natural(3.0, sampler=flow(steps=5))
    x = torch.tensor([1.0, 2.0])
    assert law_of(one).log_prob(x) == law_of(other).log_prob(x)


def test_values_out_of_its_range_are_refused(natural):
    far = pm.Natural(7.0, sampler=natural.sampler)
    with pytest.raises(pm.PyroMacroError, match="value is 7.*from 2 to 6. Widen"):
        law_of(far)
    with pytest.raises(pm.PyroMacroError, match="low below high"):
        pm.Flow(3.0, 3.0)
    with pytest.raises(pm.UnsupportedLaw, match="Choose a range where it is found"):
        law_of(pm.Natural(2e6, sampler=pm.Flow(1e6, 3e6, 100, 5, False)))


def test_plates_that_stay_are_refused():
    def plated():
        with pyro.plate("p", 2):
            model()

    with pytest.raises(pm.UnsupportedLaw, match="one micro state at a time"):
        pm.macro_do(plated, {TOTAL: pm.Natural(3.0, sampler=flow())})()
