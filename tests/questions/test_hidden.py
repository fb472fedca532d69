# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What acts on the answer and is no sample site: chance, factors, side doors."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])


def shop(z=None, factor=False):
    z = pyro.sample("z", dist.Normal(0.0, 1.0)) if z is None else z()
    x1 = pyro.sample("x1", dist.Normal(z, 2.0))
    x2 = pyro.sample("x2", dist.Normal(-z, 1.0))
    if factor:
        pyro.factor("seen", -((x1 - 1) ** 2))
    pyro.sample("y", dist.Normal(x1 + 3 * x2 + 2 * z, 0.5))


def outside():
    return torch.randn(())


def coins(z):
    x1 = pyro.sample("x1", dist.Bernoulli(0.1 + 0.8 * z()))
    x2 = pyro.sample("x2", dist.Bernoulli(0.1 + 0.8 * z()))
    pyro.sample("y", dist.Bernoulli(0.1 + 0.4 * x1 + 0.2 * x2))


QUESTIONS = [
    lambda model, **kw: pm.confounding(model, SALES, "y", progress=False, **kw),
    lambda model, **kw: pm.can_inhibit(model, SALES, "y", **kw),
    lambda model, **kw: pm.blocks_backdoor(model, SALES, "y", progress=False, **kw),
    lambda model, **kw: pm.structural_coefficient(model, SALES, "y", **kw),
    lambda model, **kw: pm.macro_scm_exists(model, SALES, "y", **kw),
]


@pytest.mark.parametrize("ask", QUESTIONS)
def test_hidden_sites_are_refused(ask):
    with pytest.raises(pm.UnsupportedLaw, match="no sample sites.*poutine.block"):
        ask(poutine.block(shop, hide=["z"]))


@pytest.mark.parametrize("ask", QUESTIONS)
def test_numbers_from_outside_are_refused(ask):
    with pytest.raises(pm.UnsupportedLaw, match="two runs.*torch.randn"):
        ask(shop, model_kwargs={"z": outside})
    with pytest.raises(pm.UnsupportedLaw, match="two runs.*torch.randn"):
        ask(coins, model_args=(lambda: (torch.rand(()) < 0.5).double(),))


@pytest.mark.parametrize("ask", QUESTIONS)
def test_factors_are_refused(ask):
    with pytest.raises(pm.UnsupportedLaw, match="factor 'seen' depends on .*'x1'"):
        ask(shop, model_kwargs={"factor": True})


def test_a_factor_of_something_else_does_not_matter():
    def model():
        shop()
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        pyro.factor("aside", -(w**2))

    mine = pm.confounding(model, SALES, "y", at=[1.0])
    theirs = pm.confounding(shop, SALES, "y", at=[1.0])
    assert torch.equal(mine.observational_mean, theirs.observational_mean)


def test_lemma_10_is_about_chains():
    with pytest.warns(pm.NotAChain, match="no chain, .'z'. act"):
        report = pm.irrelevant_cause(shop, "z", SALES, "y")
    # Given sales, z tells nothing of y here, and yet the realizations differ
    laws = [
        pm.confounding(shop, SALES, "y", realization, at=[1.0]).interventional_variance
        for realization in (pm.Natural, lambda v: pm.Natural(v, given=["z"]))
    ]
    assert report.holds and abs(laws[0] - laws[1]) > 1
