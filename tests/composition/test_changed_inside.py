# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Handlers inside that change a micro value after all others have looked at it.

``poutine.do`` marks what it does; handlers of others, such as ChiRho's ``do``, change
the value of a site on its way back to the program.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])


class Overwrite(Messenger):
    def __init__(self, site, value):
        super().__init__()
        self.site, self.value = site, value

    def _pyro_post_sample(self, msg):
        if msg["name"] == self.site:
            msg["value"] = self.value


def shop():
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    return pyro.deterministic("revenue", x1 + 3.0 * x2)


FIVE = torch.tensor(5.0)
SET = "is set by macro_do, and a handler inside, such as a `do`, gave it another"
SEEN = "got another value from a handler inside"
REALIZATIONS = [pm.Natural(33.0), pm.Allocate(33.0, shares=[0.5, 0.5]), pm.Shift(1.0)]


@pytest.mark.parametrize("site", SALES.micro)
@pytest.mark.parametrize("realization", REALIZATIONS, ids=lambda r: type(r).__name__)
def test_macro_do_refuses_what_overwrites_a_micro_site(site, realization):
    model = pm.macro_do(Overwrite(site, FIVE)(shop), {SALES: realization})
    for _ in range(2):  # also once the reading of the model is remembered
        with pytest.raises(pm.PyroMacroError, match=f"'{site}' {SET}"):
            model()


def test_macro_do_refuses_it_in_a_context():
    allocated = {SALES: pm.Allocate(33.0, shares=[0.5, 0.5])}
    with pytest.raises(pm.PyroMacroError, match=f"'x2' {SET}"):
        with pm.macro_do(interventions=allocated):
            Overwrite("x2", FIVE)(shop)()


@pytest.mark.parametrize("site", SALES.micro)
def test_aggregate_refuses_what_overwrites_a_micro_site(site):
    changed = Overwrite(site, FIVE)(shop)
    with pytest.raises(pm.PyroMacroError, match=f"'{site}' {SEEN}"):
        pm.aggregate(changed, SALES)()


@pytest.mark.parametrize("site", SALES.micro)
def test_the_next_run_in_a_context_finds_it(site):
    with pytest.raises(pm.PyroMacroError, match=f"'{site}' {SEEN}"):
        with pm.aggregate(macros=SALES):
            Overwrite(site, FIVE)(shop)()
            shop()


def test_another_site_may_be_overwritten():
    for model in (
        pm.macro_do(Overwrite("revenue", FIVE)(shop), {SALES: pm.Natural(33.0)}),
        pm.aggregate(Overwrite("revenue", FIVE)(shop), SALES),
    ):
        assert model() == 5.0


def test_outside_of_aggregate_the_value_is_seen():
    changed = Overwrite("x1", FIVE)(pm.aggregate(shop, SALES))
    nodes = poutine.trace(changed).get_trace().nodes
    assert nodes["sales"]["value"] == 5.0 + nodes["x2"]["value"]


def test_the_same_value_may_be_handed_on_in_another_tensor():
    class Copy(Messenger):
        def _pyro_post_sample(self, msg):
            msg["value"] = msg["value"].clone()

    for model in (
        pm.aggregate(Copy()(shop), SALES),
        pm.macro_do(Copy()(shop), {SALES: pm.Natural(33.0)}),
    ):
        nodes = poutine.trace(model).get_trace().nodes
        total = nodes["x1"]["value"] + nodes["x2"]["value"]
        torch.testing.assert_close(nodes["sales"]["value"], total)
