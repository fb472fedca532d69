# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``macro_do(...).describe()``: which law, exact or not, at what cost."""

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm

TOTAL = pm.MacroVariable("total", ["a", "b", "c"])


def program(*fns):
    def model():
        for name, fn in zip("abc", fns, strict=True):
            pyro.sample(name, fn)

    return model


NORMAL = program(*[dist.Normal(1.0, 2.0)] * 3)
POSITIVE = program(dist.Gamma(2.0, 1.0), dist.Gamma(1.0, 3.0), dist.LogNormal(0.0, 1.0))
COUNTS = program(dist.Poisson(1.0), dist.Poisson(2.0), dist.Poisson(3.0))
FINITE = program(dist.Bernoulli(0.2), dist.Binomial(3, 0.4), dist.Bernoulli(0.5))
BOX = program(*[dist.Uniform(0.0, 2.0)] * 3)
QUICK = pm.Chains(num_samples=20, warmup_steps=20, num_chains=1, progress=False)


@pytest.mark.parametrize(
    "model, realization, law, exact, method, free",
    [
        (NORMAL, pm.Natural(3.0), "NaturalNormal", True, "product of Gaussians", 2),
        (NORMAL, pm.Residual(3.0, "a"), "ResidualNormal", True, "product", 2),
        (NORMAL, pm.Allocate(3.0, [1.0, 0.0, 0.0]), "Delta", True, "a point", 0),
        (NORMAL, pm.Shift(1.0), "StackedSites", True, "own laws", 3),
        (COUNTS, pm.Natural(4.0), "Multinomial", True, "Poisson", 0),
        (FINITE, pm.Natural(2.0), "FiniteLaw", True, "dynamic programming", 0),
        (FINITE, pm.MaxEntropy(2.0), "FiniteLaw", True, "uniform", 0),
        (BOX, pm.MaxEntropy(2.0), "UniformOnPolytope", False, "hit and run", 2),
        (POSITIVE, pm.Residual(9.0, "b"), "ResidualSites", True, "takes up", 2),
    ],
)
def test_a_description_says_which_law(model, realization, law, exact, method, free):
    (found,) = pm.macro_do(model, {TOTAL: realization}).describe()
    assert found.macro == "total" and found.elements == 3
    assert found.realization == type(realization).__name__
    assert (found.law, found.exact, found.free) == (law, exact, free)
    assert method in found.method
    assert found.cost


@pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
def test_a_sampled_law_is_not_called_exact():
    model = pm.macro_do(POSITIVE, {TOTAL: pm.Natural(3.0, sampler=QUICK)})
    (found,) = model.describe()
    assert not found.exact and "NUTS on the fibre, 20 draws, R-hat" in found.method


def test_a_description_leaves_nothing_behind():
    def model(scale):
        weight = pyro.param("weight", torch.tensor(1.0))
        pyro.sample("a", dist.Normal(weight, scale))
        pyro.sample("b", dist.Normal(0.0, scale))
        pyro.sample("c", dist.Normal(0.0, scale))

    state = torch.get_rng_state()
    with pyro.poutine.trace() as trace:
        pm.macro_do(model, {TOTAL: pm.Natural(3.0)}).describe(2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert not list(pyro.get_param_store().keys())
    assert not [n for n in trace.trace.nodes if n not in ("_INPUT", "_RETURN")]


def test_descriptions_of_several_interventions_are_a_table():
    def model():
        NORMAL()
        pyro.sample("d", dist.Normal(0.0, 1.0))
        pyro.sample("e", dist.Normal(0.0, 1.0))

    other = pm.MacroVariable("other", ["d", "e"])
    both = pm.macro_do(model, {TOTAL: pm.Natural(3.0), other: pm.Natural(1.0)})
    found = both.describe()
    assert [item.macro for item in found] == ["total", "other"]
    assert "NaturalNormal" in str(found) and "<table>" in found._repr_html_()
    frame = found.to_pandas()
    assert list(frame["macro"]) == ["total", "other"] and frame["exact"].all()


def test_modules_are_described_too():
    class Model(torch.nn.Module):
        def forward(self):
            return NORMAL()

    (found,) = pm.macro_do(Model(), {TOTAL: pm.Natural(3.0)}).describe()
    assert found.law == "NaturalNormal"
