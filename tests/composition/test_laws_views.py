# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Laws that are not Gaussian in ``PyroModule``, and in Pyro's views of a program."""

import copy
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.inspect import get_dependencies, get_model_relations, render_model
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import constraints

import pyro_macro as pm

from .laws import (
    EXACT,
    FINITE,
    GAMMA,
    GIVEN,
    POISSON,
    POLYTOPE,
    SAMPLED,
    ByHand,
    every_law,
)
from .models import SALES, assert_same_program, replayed, stochastic

pytestmark = pytest.mark.filterwarnings("ignore::pyro_macro.NotConverged")
Y = {"y": torch.tensor(9.0, dtype=torch.float64)}


# PyroModule


KINDS = {
    "gamma": (GAMMA, lambda a: dist.Gamma(a, 3.0)),
    "Poisson": (POISSON, dist.Poisson),
}


class Shop(PyroModule):
    def __init__(self, kind):
        super().__init__()
        fn = KINDS[kind][1]
        self.size = PyroParam(torch.tensor([2.0, 3.0]), constraints.positive)
        self.x1 = PyroSample(lambda self: fn(self.size[0]))
        self.x2 = PyroSample(lambda self: fn(self.size[1]))
        self.price = PyroSample(dist.Normal(3.0, 0.5))

    def forward(self, y=None):
        mean = self.x1 + self.price * self.x2
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


class ShopByHand(PyroModule):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.size = PyroParam(torch.tensor([2.0, 3.0]), constraints.positive)
        self.price = PyroSample(dist.Normal(3.0, 0.5))

    def forward(self, y=None):
        if self.kind == "gamma":
            law = dist.Dirichlet(self.size)
            own = ByHand(
                lambda x: law.log_prob(x / 4) - torch.tensor(4.0).log(),
                lambda shape: 4 * law.sample(shape),
            )
        else:
            law = dist.Multinomial(5, self.size)
            own = ByHand(law.log_prob, law.sample)
        x1, x2 = pyro.sample("sales__micro", own).unbind(-1)
        pyro.deterministic("x1", x1)
        pyro.deterministic("x2", x2)
        return pyro.sample("y", dist.Normal(x1 + self.price * x2, 0.5), obs=y)


@pytest.mark.parametrize("kind", KINDS)
def test_module_samples_are_micro_sites(kind):
    module = Shop(kind)
    intervened = pm.macro_do(module, KINDS[kind][0].interventions)
    trace = assert_same_program(intervened, ShopByHand(kind))
    assert "price" in trace.stochastic_nodes
    assert {id(p) for p in intervened.parameters()} == {
        id(p) for p in module.parameters()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_module_gradients_are_those_of_the_module_by_hand(kind):
    module, by_hand = Shop(kind), ShopByHand(kind)
    wrapped = pm.macro_do(module, KINDS[kind][0].interventions)
    trace = poutine.trace(wrapped).get_trace(Y["y"])
    for node in stochastic(trace).values():
        node["value"] = node["value"].detach()
    again = poutine.trace(poutine.replay(wrapped, trace=trace)).get_trace(Y["y"])
    again.log_prob_sum().backward()
    poutine.trace(replayed(by_hand, trace)).get_trace(Y["y"]).log_prob_sum().backward()
    for found, wanted in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert wanted.grad.abs().sum() > 0
        torch.testing.assert_close(found.grad, wanted.grad)


class Wrapped(PyroModule):
    """Any of the programs as a module, with a buffer that counts its runs."""

    def __init__(self, case):
        super().__init__()
        self.case = case
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, y=None):
        self.runs += 1
        return self.case.model(y)


@pytest.mark.parametrize("case", EXACT, ids=repr)
def test_module_is_intervened_on_and_its_buffers_are_as_after_one_run(case):
    module = Wrapped(case)
    trace = assert_same_program(pm.macro_do(module, case.interventions), case.by_hand)
    assert "sales__micro" in trace.nodes
    assert module.runs == 1
    copied = copy.deepcopy(pm.macro_do(module, case.interventions))
    assert "sales__micro" in poutine.trace(copied).get_trace().nodes


@every_law
def test_random_state_is_as_after_the_program_by_hand(law):
    # Reading the program takes nothing from the random numbers of the run
    data = {"sales__micro": law.case.draw(torch.Size(), torch.tensor(1.0))}
    after = []
    for model in (law.intervened, law.case.by_hand):
        pyro.set_rng_seed(6)
        poutine.condition(model, data)()
        after.append(torch.rand(()))
    assert after[0] == after[1]


# Views


def parents(model, **kwargs):
    relations = get_model_relations(model, (), kwargs)
    return {name: set(above) for name, above in relations["sample_sample"].items()}


def edges(model, deterministic):
    graph = render_model(model, model_kwargs=Y, render_deterministic=deterministic)
    return set(re.findall(r"^\t(\S+) -> (\S+)$", graph.source, re.MULTILINE))


@pytest.mark.parametrize("case", EXACT, ids=repr)
def test_relations_cut_the_micro_state_off_but_for_what_is_given(case):
    found = parents(pm.macro_do(case.model, case.interventions), **Y)
    assert found["sales__micro"] == ({"c"} if case is GIVEN else set())
    assert found["x1"] == found["x2"] == {"sales__micro"}
    assert found["y"] == {"w", "sales__micro"} | ({"c"} if case.cause else set())


@every_law
@pytest.mark.parametrize("deterministic", [False, True])
def test_rendered_edges_are_those_of_the_intervened_program(law, deterministic):
    found = edges(law.intervened, deterministic)
    fork = {("x1", "y"), ("x2", "y")} if deterministic else {("sales__micro", "y")}
    wanted = fork | {("w", "y"), ("sales__micro", "x1"), ("sales__micro", "x2")}
    wanted |= {("c", "y")} if law.case.cause else set()
    wanted |= {("c", "sales__micro")} if law.case is GIVEN else set()
    assert {e for e in found if e[0] != "sales"} == wanted
    if deterministic:
        assert ("sales", "sales__micro") in found


@pytest.mark.parametrize("case", EXACT, ids=repr)
def test_dependencies_are_those_of_the_program_by_hand(case):
    found = get_dependencies(pm.macro_do(case.model, case.interventions), (), Y)
    wanted = get_dependencies(case.by_hand, (), Y)
    for kind in ("prior_dependencies", "posterior_dependencies"):
        for name in {"w", "y"} & set(wanted[kind]):
            assert found[kind][name] == wanted[kind][name]
    own = set(found["prior_dependencies"]["sales__micro"])
    assert own == {"sales__micro"} | ({"c"} if case is GIVEN else set())


@pytest.mark.parametrize("case", EXACT, ids=repr)
def test_views_leave_parameters_and_random_state_alone(case):
    model = pm.macro_do(case.model, case.interventions)
    state = torch.get_rng_state()
    render_model(model, model_kwargs=Y)
    assert len(pyro.get_param_store()) == 0
    torch.set_rng_state(state)
    first = model()
    torch.set_rng_state(state)
    assert model() == first


@pytest.mark.parametrize("case", [GAMMA, POISSON, FINITE, POLYTOPE], ids=repr)
def test_relations_know_the_plates_of_the_sites_that_are_added(case):
    def model():
        with pyro.plate("regions", 3):
            case.model(Y["y"])

    intervened = pm.macro_do(model, {SALES: case.realization})
    plates = get_model_relations(intervened)["plate_sample"]
    own = {"sales", "sales__micro", "x1", "x2", "w", "y"}
    assert set(plates["regions"]) == own | ({"c"} if case.cause else set())


@pytest.mark.parametrize("view", [get_model_relations, render_model])
def test_relations_of_draws_on_the_fibre_are_an_error_that_says_why(view):
    # Pyro asks for densities to see what depends on what
    model = pm.macro_do(SAMPLED.model, SAMPLED.interventions)
    with pytest.raises(pm.UnsupportedLaw, match="without a normalized density"):
        view(model, model_kwargs=Y)


def test_dependencies_of_draws_on_the_fibre():
    model = pm.macro_do(SAMPLED.model, SAMPLED.interventions)
    found = get_dependencies(model, (), Y)["prior_dependencies"]
    assert set(found["sales__micro"]) == {"sales__micro"}
    assert set(found["y"]) == {"sales__micro", "w", "y"}
