# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws that are not Gaussian under mask, scale, block, scope, lift, replay, reparam."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.autoname import scope
from pyro.infer.reparam import LocScaleReparam

import pyro_macro as pm

from .laws import CASES, GAMMA, POISSON, SAMPLED, ByHand, every_law
from .models import SALES, assert_same_gradients, assert_same_program, stochastic

pytestmark = pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
MASK = torch.tensor([True, False, True])


# mask and scale


@every_law
@pytest.mark.parametrize("where", ["inside", "outside"])
@pytest.mark.parametrize("mask", [True, False])
def test_mask_of_a_whole_program(law, where, mask):
    masked = poutine.mask(law.case.by_hand, mask=mask)
    if where == "inside":
        model = law.do(poutine.mask(law.case.model, mask=mask))
    else:
        model = poutine.mask(law.intervened, mask=mask)
    trace = assert_same_program(model, masked)
    density = trace.nodes["sales__micro"]["log_prob_sum"]
    assert mask or density == 0


def in_slots(model, mask=True):
    def run():
        with pyro.plate("slots", 3, dim=-1), poutine.mask(mask=mask):
            return model()

    return run


@every_law
def test_mask_outside_hides_slots_of_the_latent_site(law):
    trace = assert_same_program(
        in_slots(law.intervened, MASK), in_slots(law.case.by_hand, MASK)
    )
    assert not trace.nodes["sales__micro"]["log_prob"][~MASK].any()


@every_law
def test_mask_inside_hides_slots_of_the_latent_site(law):
    model = law.do(in_slots(law.case.model, MASK))
    trace = assert_same_program(model, in_slots(law.case.by_hand, MASK))
    assert not trace.nodes["sales__micro"]["log_prob"][~MASK].any()


@pytest.mark.parametrize("aggregation", [pm.Sum(), pm.Max()], ids=repr)
def test_mask_of_elements_is_an_error_that_says_why(do, aggregation):
    def model():
        with pyro.plate("parts", 3, dim=-1), poutine.mask(mask=MASK):
            pyro.sample("x", dist.Gamma(2.0, 3.0))

    total = pm.MacroVariable("total", "x", "parts", aggregation)
    with pytest.raises(pm.PyroMacroError, match="'total'.*mask of shape"):
        do(model, {total: pm.Natural(2.0)})()


@every_law
@pytest.mark.parametrize("where", ["inside", "outside", "both"])
def test_scale_of_a_whole_program(law, where):
    inner = 0.5 if where in ("inside", "both") else 1.0
    outer = 3.0 if where in ("outside", "both") else 1.0
    model = poutine.scale(law.do(poutine.scale(law.case.model, inner)), outer)
    trace = assert_same_program(model, poutine.scale(law.case.by_hand, inner * outer))
    site = trace.nodes["sales__micro"]
    assert site["scale"] == inner * outer
    torch.testing.assert_close(
        site["log_prob_sum"], site["scale"] * site["fn"].log_prob(site["value"])
    )


# block


@every_law
@pytest.mark.parametrize("name", ["x1", "x2"])
def test_block_inside_that_hides_a_micro_site_is_an_error(law, name):
    with pytest.raises(pm.PyroMacroError, match="no site|is used before the last"):
        law.do(poutine.block(law.case.model, hide=[name]))()


@every_law
def test_block_inside_that_hides_another_site_changes_nothing_else(law):
    trace = poutine.trace(law.do(poutine.block(law.case.model, hide=["w"]))).get_trace()
    assert "w" not in trace.nodes
    x = trace.nodes["sales__micro"]["value"]
    torch.testing.assert_close(law.case.total(x), torch.tensor(law.case.value))


def test_block_inside_that_hides_the_cause_is_never_a_wrong_law():
    # Unseen, it can be neither summed out nor held
    def model():
        with poutine.block(hide=["c"]):
            c = pyro.sample("c", dist.Bernoulli(0.5))
        pyro.sample("x1", dist.Gamma(2.0 + c, 3.0))
        pyro.sample("x2", dist.Gamma(1.5, 3.0))

    intervened = pm.macro_do(model, {SALES: pm.Natural(4.0)})
    with pytest.raises(pm.UnsupportedLaw, match="another distribution in the run"):
        for _ in range(20):  # in most runs both readings of the program are the same
            intervened()


@every_law
@pytest.mark.parametrize("hidden", [["x1"], ["sales__micro"], ["sales"]], ids=str)
def test_block_outside_hides_sites_and_changes_nothing_else(law, hidden):
    pyro.set_rng_seed(5)
    plain = poutine.trace(law.intervened).get_trace()
    pyro.set_rng_seed(5)
    trace = poutine.trace(poutine.block(law.intervened, hide=hidden)).get_trace()
    assert set(stochastic(trace)) == set(stochastic(plain)) - set(hidden)
    for name, node in stochastic(trace).items():
        torch.testing.assert_close(node["value"], plain.nodes[name]["value"])


# scope


def prefixed(model, *apart):
    """Hand-written names under the scope of the program, others as they are."""

    class Rename(poutine.messenger.Messenger):
        def _pyro_sample(self, msg):
            if msg["name"] not in apart:
                msg["name"] = "s/" + msg["name"]

    return Rename()(model)


@every_law
def test_scope_outside_names_all_sites_once(law):
    model = scope(law.intervened, prefix="s")
    trace = assert_same_program(model, prefixed(law.case.by_hand), macros=("s/sales",))
    assert {"s/sales", "s/sales__micro", "s/x1"} <= set(stochastic(trace))


@pytest.mark.parametrize("case", [GAMMA, POISSON], ids=repr)
def test_scope_inside_is_part_of_the_names_of_micro_sites(do, form, case):
    macro = pm.MacroVariable("sales", ["s/x1", "s/x2"], (), case.macro.aggregation)
    model = do(scope(case.model, prefix="s"), {macro: case.realization})
    # A context adds its sites where the program runs, inside of the scope
    own = () if form == "context" else ("sales", "sales__micro")
    name = "s/sales" if form == "context" else "sales"
    assert_same_program(model, prefixed(case.by_hand, *own), macros=(name,))
    with pytest.raises(pm.UnknownSite, match="'x1'.*'s/x1'"):
        do(scope(case.model, prefix="s"), case.interventions)()


# lift


def rated(kind):
    def model():
        a = pyro.param("a", torch.tensor(2.0))
        x1 = pyro.sample("x1", kind(a))
        x2 = pyro.sample("x2", kind(torch.tensor(3.0)))
        pyro.sample("y", dist.Normal(x1 - x2, 1.0))

    return model


def rated_by_hand(case):
    def by_hand():
        a = pyro.param("a", torch.tensor(2.0))
        if case is GAMMA:
            law = dist.Dirichlet(torch.stack([a, torch.tensor(3.0)]))
            own = ByHand(
                lambda x: law.log_prob(x / 4) - torch.tensor(4.0).log(),
                lambda shape: 4 * law.sample(shape),
            )
        else:
            law = dist.Multinomial(5, torch.stack([a, torch.tensor(3.0)]))
            own = ByHand(law.log_prob, law.sample)
        x1, x2 = pyro.sample("sales__micro", own).unbind(-1)
        pyro.deterministic("x1", x1)
        pyro.deterministic("x2", x2)
        pyro.sample("y", dist.Normal(x1 - x2, 1.0))

    return by_hand


def kind_of(case):
    return (lambda a: dist.Gamma(a, 1.0)) if case is GAMMA else dist.Poisson


def lifted(model):
    return poutine.lift(model, prior={"a": dist.Gamma(4.0, 2.0)})


@pytest.mark.parametrize("case", [GAMMA, POISSON], ids=repr)
@pytest.mark.parametrize("where", ["inside, given", "outside"])
def test_lift_holds_a_parameter_at_its_value(do, case, where):
    model, by_hand = rated(kind_of(case)), lifted(rated_by_hand(case))
    if where == "outside":
        model = lifted(do(model, case.interventions))
    else:
        model = do(lifted(model), {SALES: pm.Natural(case.value, given=["a"])})
    trace = assert_same_program(model, by_hand)
    assert "a" in trace.stochastic_nodes


def test_lift_inside_of_a_rate_of_counts_that_is_not_given_is_refused():
    model = lifted(rated(dist.Poisson))
    with pytest.raises(pm.UnsupportedLaw, match="'x1' is Poisson.*'a'.*given="):
        pm.macro_do(model, POISSON.interventions)()


@pytest.mark.parametrize("case", [GAMMA, POISSON], ids=repr)
def test_parameters_have_the_gradients_by_hand(do, case):
    model = do(rated(kind_of(case)), case.interventions)
    assert_same_gradients(model, rated_by_hand(case))


# replay


@every_law
def test_replay_of_a_trace_of_the_intervened_model_repeats_it(law):
    trace = poutine.trace(law.intervened).get_trace()
    again = poutine.trace(poutine.replay(law.intervened, trace=trace)).get_trace()
    for name, node in stochastic(trace).items():
        torch.testing.assert_close(again.nodes[name]["value"], node["value"])
    torch.testing.assert_close(again.log_prob_sum(), trace.log_prob_sum())


@every_law
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_replay_of_a_trace_of_the_unaltered_model_keeps_the_intervention(law, where):
    guide = poutine.trace(law.case.model).get_trace()
    if where == "outside":
        model = poutine.replay(law.intervened, trace=guide)
    else:
        model = law.do(poutine.replay(law.case.model, trace=guide))
    nodes = poutine.trace(model).get_trace().nodes
    x = torch.stack([nodes[name]["value"] for name in ("x1", "x2")], -1)
    torch.testing.assert_close(law.case.total(x), torch.tensor(law.case.value))
    assert nodes["w"]["value"] == guide.nodes["w"]["value"]


@every_law
def test_replay_of_a_latent_site_off_the_fibre_is_an_error(law):
    trace = poutine.trace(law.intervened).get_trace()
    trace.nodes["sales__micro"]["value"] = torch.tensor(law.case.off)
    with pytest.raises(pm.OffFibre, match="'sales'"):
        poutine.replay(law.intervened, trace=trace)()


def test_replay_of_draws_on_the_fibre():
    model = pm.macro_do(SAMPLED.model, SAMPLED.interventions)
    trace = poutine.trace(model).get_trace()
    again = poutine.trace(poutine.replay(model, trace=trace)).get_trace()
    for name, node in stochastic(trace).items():
        torch.testing.assert_close(again.nodes[name]["value"], node["value"])


# reparam


def decentered(model, name):
    return poutine.reparam(model, config={name: LocScaleReparam(0.0)})


@every_law
@pytest.mark.parametrize("where", ["inside", "outside"])
def test_reparam_of_another_site(law, where):
    if where == "inside":
        model = law.do(decentered(law.case.model, "w"))
    else:
        model = decentered(law.intervened, "w")
    trace = assert_same_program(model, decentered(law.case.by_hand, "w"))
    assert "w_decentered" in stochastic(trace)


@every_law
@pytest.mark.parametrize("name", ["x1", "x2"])
def test_reparam_outside_of_a_micro_site_is_an_error_that_says_what_to_do(law, name):
    with pytest.raises(pm.PyroMacroError, match="cannot be reparametrized.*inside"):
        decentered(law.intervened, name)()


@pytest.mark.parametrize("case", CASES, ids=repr)
def test_reparam_outside_of_the_latent_site_is_no_silent_change(case):
    # As Pyro says of every distribution that is no location and scale
    with pytest.raises((AttributeError, NotImplementedError)):
        decentered(pm.macro_do(case.model, case.interventions), "sales__micro")()
