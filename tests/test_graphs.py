# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Graphs of programs: attributes, projections, errors, and leaving no trace."""

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch
from random_dags import program_of

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
REVENUE = pm.MacroVariable("revenue", micro=["y1", "y2"])


def normal(name, mean=0.0, **kwargs):
    return pyro.sample(name, dist.Normal(mean, 1.0), **kwargs)


def shop():
    z = normal("z")
    for j in (1, 2):
        normal(f"y{j}", normal(f"x{j}", z))


def stores():
    mean = pyro.param("mean", torch.tensor(1.0))
    level = normal("level", mean)
    with pyro.plate("stores", 3, dim=-2):
        effect = normal("effect", level)
        with pyro.plate("products", 4, dim=-1, subsample_size=2):
            x = normal("x", effect)
            total = pyro.deterministic("total", 2 * x)
    for i in pyro.plate("weeks", 2):
        normal(f"week{i}", level)
    pyro.factor("factor", total.sum())
    normal("y", total.sum(), obs=torch.tensor(1.0))


def chain(*edges):
    """A graph of causal edges, as "a b" and so on."""
    return nx.DiGraph([tuple(edge.split()) for edge in edges])


def test_nodes_are_sample_sites_with_their_attributes():
    graph = pm.micro_graph(stores)
    assert list(graph) == ["level", "effect", "x", "total", "week0", "week1", "y"]
    plates = dict(graph.nodes.data("plates"))
    assert plates["level"] == plates["week0"] == ()
    assert plates["effect"] == ("stores",)
    assert plates["x"] == plates["total"] == ("stores", "products")
    assert [n for n, on in graph.nodes.data("observed") if on] == ["y"]
    assert [n for n, on in graph.nodes.data("deterministic") if on] == ["total"]
    assert graph.graph == {"kind": "micro"}
    assert list(graph.edges) == [
        ("level", "effect"),
        ("level", "week0"),
        ("level", "week1"),
        ("effect", "x"),
        ("x", "total"),
        ("total", "y"),
    ]


def test_a_macro_variable_has_the_plates_that_stay():
    whole = pm.MacroVariable("whole", micro=["x", "total"], over=["stores", "products"])
    part = pm.MacroVariable("part", micro=["x", "effect"])
    each = pm.MacroVariable("each", micro="x", over="products")
    graph = pm.amalgamated_graph(stores, [whole, part, each])
    plates = dict(graph.nodes.data("plates"))
    assert plates["whole"] == ()
    assert plates["part"] == plates["each"] == ("stores",)
    assert graph.nodes["whole"]["micro"] == ("x", "total")


def test_a_macro_variable_of_observed_sites_is_observed():
    def model():
        for j in (1, 2):
            y = normal(f"y{j}", normal(f"x{j}"), obs=torch.tensor(1.0))
        pyro.deterministic("last", y)

    nodes = pm.macro_graph(model, [SALES, REVENUE]).nodes
    assert nodes["revenue"]["observed"] and not nodes["sales"]["observed"]
    after = pm.intervention_graph(model, REVENUE, REVENUE).nodes
    assert not after["y1"]["observed"]


def test_arguments_reach_the_model():
    def model(names, *, last):
        for name in [*names, last]:
            normal(name)

    given = {"model_args": (["x1", "x2"],), "model_kwargs": {"last": "y"}}
    assert list(pm.micro_graph(model, **given)) == ["x1", "x2", "y"]
    for graph in (
        pm.amalgamated_graph(model, SALES, **given),
        pm.intervention_graph(model, SALES, SALES, **given),
    ):
        assert list(graph) == ["x1", "x2", "y", "sales"]
    assert list(pm.macro_graph(model, [SALES, "y"], **given)) == ["sales", "y"]


def test_nothing_is_left_behind():
    pyro.set_rng_seed(1)
    expected = torch.rand(3)
    pyro.set_rng_seed(1)
    pm.micro_graph(stores)
    each = pm.MacroVariable("each", micro="x", over="products")
    pm.amalgamated_graph(stores, each)
    pm.intervention_graph(stores, each, each)
    pm.macro_graph(stores, [each, "y"])
    with pyro.poutine.trace() as trace:
        pm.micro_graph(shop)
    assert not trace.trace.nodes.keys() - {"_INPUT", "_RETURN"}
    assert torch.equal(torch.rand(3), expected)
    assert list(pyro.get_param_store().keys()) == []


def test_graphs_of_intervened_programs():
    """Under ``do`` a site is its random half: with parents, and without children."""
    fixed = pyro.poutine.do(shop, {"x1": torch.tensor(1.0)})
    graph = pm.micro_graph(fixed)
    assert set(graph.edges) == {("z", "x1"), ("z", "x2"), ("x2", "y2")}
    after = pm.micro_graph(pm.macro_do(shop, {SALES: pm.Natural(1.0)}))
    assert set(after.predecessors("x1")) == {"sales__micro"}


def test_macro_variables_may_share_sites_in_the_amalgamated_graph():
    both = pm.MacroVariable("both", micro=["x1", "y2"])
    ties = pm.amalgamated_graph(shop, [SALES, both]).edges.data("kind")
    assert {(u, v) for u, v, kind in ties if kind == "aggregation"} == {
        ("x1", "sales"),
        ("x2", "sales"),
        ("x1", "both"),
        ("y2", "both"),
    }
    after = pm.intervention_graph(shop, [SALES, both], on=[SALES, both])
    assert set(after.predecessors("x1")) == {"sales", "both"}
    one = pm.intervention_graph(shop, [SALES, both], on="both")
    assert one.edges["x1", "sales"]["kind"] == "aggregation"
    assert set(one.predecessors("x1")) == {"both"}
    with pytest.raises(
        pm.PyroMacroError, match="'x1' belongs to 'sales' and to 'both'"
    ):
        pm.macro_graph(shop, [SALES, both])
    with pytest.raises(pm.PyroMacroError, match="'x1' belongs to 'sales' and to 'x1'"):
        pm.macro_graph(shop, [SALES, "x1"])


def test_macro_graph_keeps_the_largest_confounders():
    """``a`` is one of all that ``b`` and ``c`` are, ``d`` of others, ``e`` of one."""
    dag = chain("a b", "b x", "b y", "a w", "c x", "c w", "d w", "d v", "e v")
    graph = pm.macro_graph(program_of(dag), ["x", "y", "w", "v"])
    latent = [n for n, kind in graph.nodes.data("kind") if kind == "latent"]
    assert sorted(latent) == ["a", "d"]
    arrows = {"a x", "a y", "a w", "d w", "d v"}
    assert {" ".join(edge) for edge in graph.edges} == arrows


def test_a_deterministic_site_is_no_confounder_of_its_own():
    dag = chain("x m", "m y", "m w")
    noisy = pm.macro_graph(program_of(dag), ["x", "y", "w"])
    assert noisy.nodes["m"]["kind"] == "latent"
    graph = pm.macro_graph(program_of(dag, {"m"}), ["x", "y", "w"])
    assert set(graph.edges) == {("x", "y"), ("x", "w")}
    assert graph.edges["x", "y"]["path"] == ("x", "m", "y")
    assert pm.is_macro_backdoor(graph, "y", "w", "x")
    assert not pm.is_macro_backdoor(noisy, "y", "w", "x")


def test_single_names_and_empty_lists():
    assert list(pm.macro_graph(shop, "z")) == ["z"]
    assert list(pm.macro_graph(shop, SALES)) == ["sales"]
    assert list(pm.macro_graph(shop, [])) == []
    assert not pm.intervention_graph(shop, SALES, []).nodes["sales"]["intervened"]
    assert list(pm.amalgamated_graph(shop, (m for m in [SALES, SALES])))[-1] == "sales"


def test_a_path_between_micro_sites_is_refused():
    def model():
        x1 = normal("x1")
        between = normal("between", x1)
        normal("x2", between)

    message = "'sales': there is a directed path 'x1' -> 'between' -> 'x2'"
    with pytest.raises(pm.NotAMicroState, match=message):
        pm.macro_graph(model, SALES)
    with pytest.raises(pm.NotAMicroState, match=message):
        pm.macro_graph(model, [SALES, "between"])
    with pytest.raises(pm.NotAMicroState, match=message):
        pm.intervention_graph(model, SALES, SALES)
    pm.amalgamated_graph(model, SALES)


def test_a_cycle_of_macro_variables_is_refused():
    def model():
        x1, y2 = normal("x1"), normal("y2")
        m = normal("m", x1)
        normal("y1", m)
        normal("x2", y2)

    with pytest.raises(pm.CyclicPartition) as error:
        pm.macro_graph(model, [SALES, REVENUE])
    message = str(error.value)
    assert "'x1' -> 'm' -> 'y1'" in message and "'y2' -> 'x2'" in message
    assert "'sales' -> 'revenue' -> 'sales'" in message


ANY = [
    lambda macros: pm.amalgamated_graph(shop, macros),
    lambda macros: pm.intervention_graph(shop, macros, []),
    lambda macros: pm.macro_graph(shop, macros),
]


@pytest.mark.parametrize("graph", ANY)
def test_bad_macro_variables(graph):
    with pytest.raises(pm.UnknownSite, match="'sales'.*no site 'x3'. Did you mean 'x"):
        graph(pm.MacroVariable("sales", micro=["x1", "x3"]))
    with pytest.raises(pm.PyroMacroError, match="'z' has the name of a site"):
        graph(pm.MacroVariable("z", micro=["x1", "x2"]))
    with pytest.raises(pm.PyroMacroError, match="two macro-variables have the name"):
        graph([SALES, pm.MacroVariable("sales", micro=["y1", "y2"])])
    with pytest.raises(TypeError, match="macros: 3 is no MacroVariable"):
        graph([3])


def test_the_wrapped_model_is_told_from_the_model():
    with pytest.raises(pm.PyroMacroError, match="without `aggregate`"):
        pm.amalgamated_graph(pm.aggregate(shop, SALES), SALES)


def test_unknown_names():
    with pytest.raises(pm.UnknownSite, match="macros: .*no site 'x3'"):
        pm.macro_graph(shop, [SALES, "x3"])
    with pytest.raises(TypeError, match="macros: 'z' is no MacroVariable"):
        pm.amalgamated_graph(shop, [SALES, "z"])
    with pytest.raises(pm.UnknownSite, match="on: 'revenue' is none.*'sales'"):
        pm.intervention_graph(shop, SALES, on="revenue")
    other = pm.MacroVariable("sales", micro=["x1", "x2"], aggregation=pm.Mean())
    with pytest.raises(pm.UnknownSite, match="on: MacroVariable.*is none"):
        pm.intervention_graph(shop, SALES, on=other)


def test_backdoor_takes_names_and_macro_variables():
    graph = pm.macro_graph(shop, [SALES, REVENUE, "z"])
    assert pm.is_macro_backdoor(graph, SALES, "revenue", ["z"])
    assert pm.is_macro_backdoor(graph, "sales", REVENUE, "z")
    assert not pm.is_macro_backdoor(graph, "z", REVENUE, SALES)
    assert pm.macro_backdoor_sets(graph, SALES, REVENUE) == [set(), {"z"}]


def test_backdoor_works_on_any_graph():
    graph = nx.DiGraph([(0, 1), (0, 2), (1, 2)])
    assert pm.is_macro_backdoor(graph, 1, 2, [0])
    assert pm.macro_backdoor_sets(graph, 1, 2) == [{0}]


@pytest.mark.parametrize(
    "query, message",
    [
        (("x", "q", []), "effect: .*no site 'q'"),
        (("q", "y", []), "cause: .*no site 'q'"),
        (("x", "y", ["zz"]), "adjustment: .*no site 'zz'. Did you mean 'z'"),
        (("x", "y", ["u"]), "adjustment: 'u' is a latent common cause"),
        (("u", "y", []), "cause: 'u' is a latent"),
        (("x", "u", []), "effect: 'u' is a latent"),
        (("x", "x", []), "cause and effect are both 'x'"),
        (("x", "y", ["z", "x"]), "contains 'x', which is the cause"),
        (("x", "y", ["y"]), "contains 'y', which is the effect"),
    ],
)
def test_backdoor_refuses(query, message):
    graph = chain("z x", "z y", "x y", "u x", "u z")
    graph.nodes["u"]["kind"] = "latent"
    with pytest.raises(pm.PyroMacroError, match=message):
        pm.is_macro_backdoor(graph, *query)
    if not query[2]:
        with pytest.raises(pm.PyroMacroError, match=message):
            pm.macro_backdoor_sets(graph, *query[:2])


def test_backdoor_refuses_cycles():
    with pytest.raises(pm.PyroMacroError, match="a cycle through 'y' -> 'x'"):
        pm.is_macro_backdoor(chain("y x", "x y"), "y", "x")


def test_backdoor_on_graphs_with_ties():
    """A tied cause is refused; ties elsewhere are arrows to the macro value."""
    graph = pm.amalgamated_graph(shop, [SALES, REVENUE])
    with pytest.raises(pm.PyroMacroError, match="'sales' is tied to its micro site"):
        pm.is_macro_backdoor(graph, SALES, REVENUE, "z")
    assert pm.is_macro_backdoor(graph, "x1", REVENUE, ["z"])
    assert not pm.is_macro_backdoor(graph, "x1", REVENUE, [SALES])  # below x1
    assert pm.is_macro_backdoor(graph, "x1", REVENUE, ["x2"])
    other = pm.MacroVariable("other", micro=["x2", "z"])
    assert not pm.is_macro_backdoor(
        pm.amalgamated_graph(shop, [other, REVENUE]), "x1", REVENUE, [other]
    )
    after = pm.intervention_graph(shop, [SALES, REVENUE], on=SALES)
    assert pm.is_macro_backdoor(after, SALES, REVENUE)


def test_backdoor_sets_leave_out_latent_nodes_and_descendants():
    graph = chain("u z", "u y", "z x", "x m", "m y", "m w")
    graph.nodes["u"]["kind"] = "latent"
    assert pm.macro_backdoor_sets(graph, "x", "y") == [{"z"}]
    assert pm.macro_backdoor_sets(graph, "x", "y", max_size=0) == []
    assert pm.macro_backdoor_sets(graph, "m", "x") == []


def test_backdoor_sets_refuses_too_many():
    graph = chain("x y", *(f"c{k} y" for k in range(14)))
    with pytest.raises(pm.PyroMacroError, match="14 nodes.*16384 sets.*max_size"):
        pm.macro_backdoor_sets(graph, "x", "y")
    assert len(pm.macro_backdoor_sets(graph, "x", "y", max_size=1)) == 15
    graph.remove_node("c0")
    assert len(pm.macro_backdoor_sets(graph, "x", "y")) == 2**13


def test_a_thousand_sites():
    def model():
        z = normal("z")
        for k in range(500):
            normal(f"y{k}", normal(f"x{k}", z))

    xb = pm.MacroVariable("xb", micro=[f"x{k}" for k in range(500)])
    yb = pm.MacroVariable("yb", micro=[f"y{k}" for k in range(500)])
    assert len(pm.micro_graph(model)) == 1001
    after = pm.intervention_graph(model, [xb, yb], xb)
    assert after.out_degree("z") == 0 and after.out_degree("xb") == 500
    assert set(pm.macro_graph(model, [xb, yb]).edges) == {("xb", "yb")}
