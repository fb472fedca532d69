# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Appendix D.3, step by step: 7 equations become 4."""

import networkx as nx
import pyro
import pytest
import torch
from pyro import poutine
from torch.overrides import TorchFunctionMode

import pyro_macro as pm
from pyro_macro.consolidation.partition import boundary, clusters, restricted

PARTITION = [{"E", "F", "G"}, {"B", "C"}, {"D", "H"}]
KEEP = ["C", "F", "H"]
ALLOWED = [{"D": True}, {"D": False}, {"G": False}]
EDGES = [("A", "B"), ("A", "E"), ("A", "F"), ("B", "C"), ("C", "D"), ("C", "H")]
EDGES += [("E", "G"), ("F", "G"), ("G", "H")]


def model(A):
    with pyro.plate("rows", len(A)):
        B = pyro.deterministic("B", torch.where(A <= 5, 0, 1))
        C = pyro.deterministic("C", (B == 0) | ~((B > 0) & (B <= 10)))
        E = pyro.deterministic("E", A % 5 == 0)
        F = pyro.deterministic("F", A % 10 == 0)
        G = pyro.deterministic("G", E & F)
        pyro.deterministic("D", ~C)
        pyro.deterministic("H", C & G)


def by_hand(a, do):
    """The seven equations for one number, in plain Python."""
    x = {"B": 0 if a <= 5 else 1}
    x["C"] = True if x["B"] == 0 else not 0 < x["B"] <= 10
    x["C"] = do.get("C", x["C"])
    x["D"] = do.get("D", not x["C"])
    x["E"] = a % 5 == 0
    x["F"] = do.get("F", a % 10 == 0)
    x["G"] = do.get("G", x["E"] and x["F"])
    x["H"] = do.get("H", x["C"] and x["G"])
    return x


def numbers(dtype=torch.float64):
    return torch.arange(-20, 60, dtype=dtype)


def consolidated(**changes):
    asked = {"keep": KEEP, "allow": ALLOWED, "partition": PARTITION, **changes}
    return pm.consolidate(model, model_args=(numbers(),), **asked)


def run(program, A, do):
    values = {name: torch.tensor(value) for name, value in do.items()}
    program = poutine.do(program, values) if do else program
    trace = poutine.trace(program).get_trace(A)
    return {n: s["value"] for n, s in trace.nodes.items() if s["type"] == "sample"}


def shown(name, do):
    """The intervention that the trace shows a site under: its natural value."""
    return {n: v for n, v in do.items() if n != name}


@pytest.mark.parametrize("do", [{}, *ALLOWED], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.int64])
def test_it_is_equal_to_the_model(do, dtype):
    A = numbers(dtype)
    fused = consolidated()
    found, original = run(fused, A, do), run(model, A, do)
    assert set(found) == {"C", "F", "G", "H", *do}
    for i, a in enumerate(range(-20, 60)):
        for name in fused.sites:
            expected = by_hand(a, shown(name, do))[name]
            assert bool(found[name][i]) == expected
            assert bool(original[name][i]) == expected


def test_every_number_by_itself():
    fused = consolidated()
    for a in range(-20, 60):
        found = run(fused, torch.tensor([float(a)]), {})
        expected = by_hand(a, {})
        assert {n: bool(v) for n, v in found.items()} == {n: expected[n] for n in found}


@pytest.mark.parametrize("name", KEEP)
@pytest.mark.parametrize("value", [True, False])
@pytest.mark.parametrize("more", [{}, {"G": False}, {"D": True}], ids=str)
def test_what_is_kept_can_be_intervened_on(name, value, more):
    do = {name: value, **more}
    found = run(consolidated(), numbers(), do)
    for i, a in enumerate(range(-20, 60)):
        for site in ("C", "F", "G", "H"):
            assert bool(found[site][i]) == by_hand(a, shown(site, do))[site], site


def test_the_equations():
    assert consolidated().equations() == [
        "C := A <= 5",
        "F := A % 10 == 0",
        "G := F unless do(G = False)",
        "H := C and G",
    ]


def test_the_equations_in_latex():
    lines = consolidated().equations(latex=True)
    assert len(lines) == 4
    for line, name in zip(lines, "CFGH", strict=True):
        assert line.count("{") == line.count("}")
        assert line.startswith(rf"\mathrm{{{name}}} :=")
    assert r"\leq 5" in lines[0]
    assert r"\bmod 10 = 0" in lines[1]
    assert r"\wedge" in lines[3]
    # In formulas spaces between symbols are none: they belong to the words
    assert " unless " in typeset(lines[2])


def typeset(latex):
    """What is read once a formula is set: spaces count in words alone."""
    found, inside = "", False
    for piece in latex.replace(r"\text{", "\0").replace("}", "\1").split("\0"):
        if inside:
            word, _, rest = piece.partition("\1")
            found += word + rest.replace(" ", "")
        else:
            found += piece.replace(" ", "")
        inside = True
    return found.replace("\1", "").replace(r"\mathrm{", "")


def test_seven_equations_become_four():
    cost = consolidated().cost
    assert (cost.before.equations, cost.after.equations) == (7, 4)
    assert (cost.before.draws, cost.after.draws) == (0, 0)
    assert cost.after.operations < cost.before.operations
    # One comparison, a remainder and a comparison, a conjunction, for each number
    assert cost.after.operations == 4 * len(numbers())


class _Counting(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_function__(self, fn, types, args=(), kwargs=None):
        self.names.append(getattr(fn, "__name__", ""))
        return fn(*args, **(kwargs or {}))


def remainders(program):
    program(numbers())
    with _Counting() as counting:
        program(numbers())
    return sum("remainder" in name or "mod" in name for name in counting.names)


def test_E_is_not_computed_any_more():
    assert remainders(model) == 2  # A % 5 and A % 10
    assert remainders(consolidated()) == 1


def test_the_steps_for_the_first_cluster():
    graph = nx.DiGraph(EDGES)
    parts = clusters(graph, PARTITION)
    first = frozenset({"E", "F", "G"})
    assert first in parts and frozenset({"A"}) in parts
    place = {cluster: i for i, cluster in enumerate(parts)}
    assert place[frozenset("A")] < place[first] < place[frozenset("DH")]
    assert place[frozenset("BC")] < place[frozenset("DH")]
    assert first & set(KEEP) == {"F"}  # step 3: E_1
    assert first & {*KEEP, *boundary(graph, parts)} == {"F", "G"}  # step 4: E'_1
    outside = {a for a, b in graph.edges if b in first and a not in first}
    assert outside == {"A"}  # step 5: U_A1
    # Step 6, and the empty one, which the printed example forgets
    assert consolidated().allowed.on(first) == [{}, {"G": False}]
    assert [restricted(one, first) for one in ALLOWED] == [{}, {}, {"G": False}]


def test_interventions_of_the_other_clusters():
    allowed = consolidated().allowed
    assert allowed.on({"B", "C"}) == [{}]
    found = allowed.on({"D", "H"})
    assert sorted(map(str, found)) == sorted(map(str, [{}, *ALLOWED[:2]]))


@pytest.mark.parametrize(
    "do", [{"B": 0}, {"E": True}, {"B": 1, "G": False}, {"D": True, "E": True}]
)
def test_other_interventions_are_errors(do):
    with pytest.raises(pm.InterventionNotAllowed):
        run(consolidated(), numbers(), do)


def test_what_became_of_the_clusters():
    method = consolidated().method
    said = {tuple(sorted(names.split(", "))): how for names, how in method.items()}
    assert said["B", "C"].startswith("exact")
    assert said["E", "F", "G"].startswith("exact")
    assert "another cluster needs it" in said["G",]
    assert "dropped" in said["D",]


def test_the_graph():
    graph = consolidated().graph
    assert isinstance(graph, nx.DiGraph)
    assert set(graph) == {"C", "F", "G", "H"}
    assert set(graph.edges) == {("F", "G"), ("C", "H"), ("G", "H")}


def test_the_figure_shows_both():
    figure = pytest.importorskip("matplotlib.figure")
    plot = consolidated().plot()
    assert isinstance(plot, figure.Figure)
    titles = [axes.get_title() for axes in plot.axes]
    assert any("before" in t and "7" in t for t in titles)
    assert any("after" in t and "4" in t for t in titles)


# Without a partition

ALL_KEPT = [("C", "F", "H"), ("H",), ("G",), ("D", "H"), ("C",)]


@pytest.mark.parametrize("keep", ALL_KEPT, ids=str)
@pytest.mark.parametrize("do", [{}, *ALLOWED], ids=str)
def test_other_sites_of_interest(keep, do):
    fused = consolidated(keep=keep, partition=None)
    assert fused.sites == keep
    found = run(fused, numbers(), do)
    for name in keep:
        for i, a in enumerate(range(-20, 60)):
            assert bool(found[name][i]) == by_hand(a, shown(name, do))[name]


def test_interventions_in_one_equation():
    (line,) = consolidated(keep=["H"], partition=None).equations()
    assert line == "H := A <= 5 and A % 10 == 0 and not do(G = False)"
