# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``get_model_relations``, ``render_model`` and ``get_dependencies``.

Pyro runs the program on tensors that carry their provenance, without validation.
"""

import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.inspect import get_dependencies, get_model_relations, render_model

import pyro_macro as pm

from .models import (
    NATURAL,
    SALES,
    A,
    B,
    market,
    market_by_hand,
    market_by_hand_given_z,
    shop,
    shop_by_hand,
    stores,
)

Y = {"y": torch.tensor(70.0, dtype=torch.float64)}
GIVEN_Z = {SALES: pm.Natural(33.0, given=["z"])}


def parents(model, **kwargs):
    relations = get_model_relations(model, (), kwargs)
    return {name: set(above) for name, above in relations["sample_sample"].items()}


def edges(model, deterministic):
    graph = render_model(model, model_kwargs=Y, render_deterministic=deterministic)
    return set(re.findall(r"^\t(\S+) -> (\S+)$", graph.source, re.MULTILINE))


def halves(value):
    return dist.Delta(value / 2 * torch.ones(2), event_dim=1)


def renamed(dependencies):
    """Those of the program by hand, in the names of the intervened one."""
    name = {"x1": "sales__micro"}
    return {
        kind: {
            name.get(site, site): {name.get(n, n): v for n, v in above.items()}
            for site, above in sites.items()
        }
        for kind, sites in dependencies.items()
    }


def test_relations_cut_the_micro_state_off():
    assert parents(market, **Y)["x1"] == {"z"}, "before"
    assert parents(pm.macro_do(market, NATURAL), **Y) == {
        "z": set(),
        "sales": set(),
        "sales__micro": set(),
        "x1": {"sales__micro"},
        "x2": {"sales__micro"},
        "y": {"z", "sales__micro"},
    }


def test_relations_keep_what_is_given_as_a_cause(do):
    found = parents(do(market, GIVEN_Z), **Y)
    assert found["sales__micro"] == {"z"}
    assert found["x1"] == found["x2"] == {"sales__micro"}
    assert found["y"] == {"z", "sales__micro"}


def test_relations_of_an_unconfounded_program(do):
    found = parents(do(shop, NATURAL), **Y)
    assert found["sales__micro"] == set()
    assert found["y"] == {"sales__micro", "w"}


@pytest.mark.parametrize(
    "realization, latent",
    [
        (pm.Residual(33.0, absorb="x2"), {"sales__micro"}),
        (pm.Allocate(33.0, [0.5, 0.5]), set()),
        (
            pm.Explicit(33.0, lambda v: dist.Delta(v / 2 * torch.ones(2), event_dim=1)),
            set(),
        ),
    ],
    ids=["Residual", "Allocate", "Explicit"],
)
def test_relations_of_other_realizations_cut_the_micro_state_off(realization, latent):
    found = parents(pm.macro_do(market, {SALES: realization}), **Y)
    assert found["x1"] == found["x2"] == latent
    assert found["y"] == {"z"} | latent


@pytest.mark.parametrize("realization", [pm.Proportional(33.0), pm.Shift(5.0)])
def test_relations_of_what_acts_on_the_natural_state_keep_its_causes(realization):
    found = parents(pm.macro_do(market, {SALES: realization}), **Y)
    assert found["sales__micro"] == {"z"}
    assert found["x1"] == found["x2"] == {"sales__micro"}


def test_relations_of_two_macro_variables():
    realizations = {
        A: pm.Natural(5.0, given=["z"]),
        B: pm.Natural(6.0, given=["z"]),
    }
    found = parents(pm.macro_do(stores, realizations))
    assert found["A__micro"] == found["B__micro"] == {"z"}
    assert found["y"] == {"z", "A__micro", "B__micro"}


def test_relations_of_a_given_macro_variable_show_no_cause_of_it():
    # P(b | B = 6, A = 5) has z integrated out, and A is a number
    realizations = {A: pm.Natural(5.0), B: pm.Natural(6.0, given=[A])}
    found = parents(pm.macro_do(stores, realizations))
    assert found["B__micro"] == set()


def test_relations_of_aggregate_show_the_parts_of_the_macro_value(add):
    found = parents(add(market, [SALES]), **Y)
    assert found["sales"] == {"x1", "x2"}
    del found["sales"]
    assert found == parents(market, **Y)


def test_relations_know_the_plates_of_the_sites_that_are_added(do, add):
    def model():
        with pyro.plate("regions", 3):
            shop(**Y)

    plates = get_model_relations(do(model, NATURAL))["plate_sample"]
    assert set(plates["regions"]) == {"sales", "sales__micro", "x1", "x2", "w", "y"}
    plates = get_model_relations(add(model, [SALES]))["plate_sample"]
    assert set(plates["regions"]) == {"sales", "x1", "x2", "w", "y"}


def test_relations_know_the_parameters_of_the_law():
    def model():
        loc = pyro.param("loc", torch.tensor(10.0))
        x1 = pyro.sample("x1", dist.Normal(loc, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        pyro.sample("y", dist.Normal(x1 + x2, 1.0))

    relations = get_model_relations(pm.macro_do(model, NATURAL))
    assert set(relations["sample_param"]["sales__micro"]) == {"loc"}
    assert set(relations["sample_param"]["y"]) == set()


@pytest.mark.parametrize("deterministic", [False, True])
def test_rendered_edges_are_those_of_the_intervened_program(deterministic):
    assert ("z", "x1") in edges(market, deterministic)
    fork = {("x1", "y"), ("x2", "y")} if deterministic else {("sales__micro", "y")}
    wanted = fork | {("z", "y"), ("sales__micro", "x1"), ("sales__micro", "x2")}
    found = edges(pm.macro_do(market, NATURAL), deterministic)
    assert {e for e in found if e[0] != "sales"} == wanted
    found = edges(pm.macro_do(market, GIVEN_Z), deterministic)
    assert {e for e in found if e[0] != "sales"} == wanted | {("z", "sales__micro")}


@pytest.mark.parametrize("deterministic", [False, True])
def test_rendered_edges_in_every_form(do, deterministic):
    found = edges(do(shop, NATURAL), deterministic)
    fork = {("x1", "y"), ("x2", "y")} if deterministic else {("sales__micro", "y")}
    wanted = fork | {("w", "y"), ("sales__micro", "x1"), ("sales__micro", "x2")}
    assert {e for e in found if e[0] != "sales"} == wanted


def test_rendered_macro_value_is_the_cause_of_the_micro_state():
    # Definition 5: the edge from the macro-variable to the micro state appears

    def by_hand():
        # The program that the documentation of macro_do says it is equivalent to
        value = pyro.deterministic("sales", torch.tensor(33.0))
        loc = torch.stack([12.4 + 0.8 * (value - 33), 20.6 + 0.2 * (value - 33)])
        x = pyro.sample("sales__micro", dist.Normal(loc, 1.0).to_event(1))
        x1 = pyro.deterministic("x1", x[0])
        x2 = pyro.deterministic("x2", x[1])
        w = pyro.sample("w", dist.Normal(1.0, 3.0))
        pyro.sample("y", dist.Normal(x1 + 3 * x2 + w, 0.5), obs=Y["y"])

    wanted = set(
        re.findall(
            r"^\t(\S+) -> (\S+)$",
            render_model(by_hand, render_deterministic=True).source,
            re.MULTILINE,
        )
    )
    assert ("sales", "sales__micro") in wanted
    assert edges(pm.macro_do(shop, NATURAL), True) == wanted


def test_rendered_edges_of_aggregate(add):
    found = edges(add(market, [SALES]), True)
    assert {("x1", "sales"), ("x2", "sales")} <= found
    assert found - {("x1", "sales"), ("x2", "sales")} == edges(market, True)
    assert not any(source == "sales" for source, _ in found)


def test_rendering_leaves_parameters_and_random_state_alone(do):
    state = torch.get_rng_state()
    render_model(do(shop, NATURAL), model_kwargs=Y)
    assert len(pyro.get_param_store()) == 0
    torch.set_rng_state(state)
    first = do(shop, NATURAL)()
    torch.set_rng_state(state)
    assert do(shop, NATURAL)() == first


@pytest.mark.parametrize(
    "by_hand, interventions",
    [(market_by_hand, NATURAL), (market_by_hand_given_z, GIVEN_Z)],
    ids=["natural", "given"],
)
def test_dependencies_are_those_of_the_program_by_hand(by_hand, interventions):
    found = get_dependencies(pm.macro_do(market, interventions), (), Y)
    wanted = get_dependencies(by_hand, (), Y)

    assert found == renamed(wanted)


def test_dependencies_in_every_form(do):
    found = get_dependencies(do(shop, NATURAL), (), Y)
    assert found["prior_dependencies"] == {
        "sales__micro": {"sales__micro": set()},
        "w": {"w": set()},
        "y": {"y": set(), "w": set(), "sales__micro": set()},
    }
    assert found == renamed(get_dependencies(shop_by_hand, (), Y))


def test_dependencies_of_a_batch_are_within_its_slots(do):
    def model():
        with pyro.plate("regions", 3):
            shop(**Y)

    def by_hand():
        with pyro.plate("regions", 3):
            shop_by_hand(**Y)

    found = get_dependencies(do(model, NATURAL))["prior_dependencies"]
    wanted = get_dependencies(by_hand)["prior_dependencies"]
    assert found["sales__micro"] == {"sales__micro": wanted["x1"]["x1"]}
    assert found["y"]["sales__micro"] == wanted["y"]["x1"]


def test_dependencies_of_aggregate_are_those_of_the_program(add):
    assert get_dependencies(add(market, [SALES]), (), Y) == get_dependencies(
        market, (), Y
    )
