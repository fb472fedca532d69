# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures: what is in them, names that mean something to a language, errors."""

import builtins
import re
import shutil
import subprocess

import networkx as nx
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm
from pyro_macro.drawing.layers import layout

matplotlib = pytest.importorskip("matplotlib")

ODD = [
    "a.b/c",
    'he said "x"',
    "$x_1$ and $y",
    "back\\slash",
    "ends in \\",
    "&amp; <b>",
    "#35; `tick`",
    "semi;colon|pipe",
    "end",
    "[x]{y}(z)",
    "%%{init}%%",
    "-->",
    "new\nline",
]


def stores():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("stores", 3, dim=-2):
        a = pyro.sample("a", dist.Normal(z, 1.0))
        with pyro.plate("products", 2):
            x = pyro.sample("x", dist.Normal(a, 1.0))
            y = pyro.deterministic("y", x + z)
    pyro.sample("seen", dist.Normal(y.sum(), 1.0), obs=torch.tensor(1.0))


TOTAL = pm.MacroVariable("total", micro="x", over="products")
BEFORE = pm.amalgamated_graph(stores, TOTAL)
AFTER = pm.intervention_graph(stores, TOTAL, TOTAL)
LATENT = pm.macro_graph(stores, ["x", "y"])


def odd_graph():
    graph = nx.DiGraph()
    nx.add_path(graph, ODD)
    for name in ODD:
        graph.nodes[name].update(kind="micro", plates=(f"plate of {name}",))
    return graph


def line(source, start):
    (found,) = (x.strip() for x in source.splitlines() if x.strip().startswith(start))
    return found


def labels(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def test_dot_says_what_each_node_is():
    source = pm.render(BEFORE, "dot", title="before")
    assert source.startswith("digraph {\n") and 'label="before"' in source
    assert "dashed" in line(source, '"y" [') and "#d3d3d3" in line(source, '"seen" [')
    assert "peripheries=2" in line(source, '"total" [')
    assert "dashed" not in line(source, '"x" [')
    assert "dir=both style=dotted" in line(source, '"x" -> "total"')
    assert "dir=both" not in line(source, '"x" -> "y"')
    after = pm.render(AFTER, "dot")
    assert "dotted" not in after and "#fbe0b5" in line(after, '"total" [')
    latent = pm.render(LATENT, "dot")
    assert "dashed" in line(latent, '"z" [') and "dashed" in line(latent, '"z" -> "x"')


def test_dot_nests_plates():
    lines = [x.strip() for x in pm.render(BEFORE, "dot").splitlines()]
    outer, inner = (
        lines.index("subgraph cluster_0 {"),
        lines.index("subgraph cluster_0_0 {"),
    )
    place = {
        name: lines.index(line("\n".join(lines), f'"{name}" [')) for name in "zaxy"
    }
    assert place["z"] < outer < place["a"] < inner < place["x"] < place["y"]
    assert 'label="stores"' in lines[outer + 1]
    assert 'label="products"' in lines[inner + 1]
    assert outer < lines.index(line("\n".join(lines), '"total" [')) < inner


def test_graphviz_has_the_source_of_dot():
    graphviz = pytest.importorskip("graphviz")
    figure = pm.render(BEFORE, "graphviz")
    assert isinstance(figure, graphviz.Digraph)
    assert figure.source == pm.render(BEFORE, "dot")


def test_mermaid():
    source = pm.render(BEFORE, "mermaid", title='a "title"')
    assert source.startswith('---\ntitle: "a \\"title\\""\n---\nflowchart LR\n')
    ids = dict(reversed(x) for x in re.findall(r'(n\d+)[(\[]+"(\w+)"', source))
    assert set(ids) == set(BEFORE)
    assert f"{ids['x']} <-.-> {ids['total']}" in source
    assert f"{ids['z']} --> {ids['a']}" in source
    assert "dasharray" in line(source, f"style {ids['y']} ")
    assert "bold" in line(source, f"style {ids['total']} ")
    assert 'subgraph p_0 ["stores"]' in source and source.count("end") == 2
    assert "linkStyle" in pm.render(LATENT, "mermaid")


def test_odd_names_in_mermaid():
    source = pm.render(odd_graph(), "mermaid")
    found = re.findall(r'^ *n\d+\(\["(.*)"\]\)$', source, flags=re.MULTILINE)
    decoded = [re.sub(r"#(\d+);", lambda m: chr(int(m[1])), name) for name in found]
    assert decoded == ODD
    for name in found:
        assert not re.search(r'["`<>$&\\|{}%]', name)


def test_odd_names_in_dot():
    source = pm.render(odd_graph(), "dot")
    for name in (
        '"he said \\"x\\""',
        '"back\\\\slash"',
        '"ends in \\\\"',
        '"new\\nline"',
    ):
        assert f"{name} [" in source
    assert '"&amp;amp; <b>"' in source and '"&#37;' in source
    ends = re.findall(
        r'^  "((?:[^"\\]|\\.)*)" -> "((?:[^"\\]|\\.)*)" \[weight', source, re.M
    )
    assert len(ends) == len(ODD) - 1
    assert [b for _, b in ends[:-1]] == [a for a, _ in ends[1:]]


@pytest.mark.skipif(shutil.which("dot") is None, reason="needs the program dot")
def test_odd_names_are_read_by_dot():
    source = pm.render(odd_graph(), "dot")
    result = subprocess.run(
        ["dot", "-Tplain"], input=source, capture_output=True, text=True, check=True
    )
    assert len(re.findall("^node ", result.stdout, re.M)) == len(ODD)
    assert len(re.findall("^edge ", result.stdout, re.M)) == len(ODD) - 1


@pytest.mark.parametrize("graph", [BEFORE, AFTER, LATENT, odd_graph(), nx.DiGraph()])
def test_matplotlib(graph, tmp_path):
    figure = pm.render(graph, "matplotlib", title="$a title")
    assert isinstance(figure, matplotlib.figure.Figure)
    figure.savefig(tmp_path / "figure.png")
    assert {str(name).replace("\n", "\\n") for name in graph} <= set(labels(figure))
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert figure.axes[0].get_title() == "$a title"


def test_matplotlib_leaves_pyplot_alone():
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    pm.render(BEFORE, "matplotlib")
    assert plt.get_fignums() == before


def test_matplotlib_draws_into_axes():
    figure = matplotlib.figure.Figure(figsize=(4, 2))
    left, right = figure.subplots(1, 2)
    assert pm.render(BEFORE, ax=left) is figure
    assert pm.render(AFTER, ax=right) is figure
    assert len(left.texts) and len(right.texts)
    assert left.texts[0].get_fontsize() < 11


def overlap(one, other):
    return (
        one[0] < other[2]
        and other[0] < one[2]
        and one[1] < other[3]
        and other[1] < one[3]
    )


def many():
    z = [pyro.sample(f"z{k}", dist.Normal(0.0, 1.0)) for k in range(3)]
    with pyro.plate("plate", 2):
        x = [pyro.sample(f"a long name {k}", dist.Normal(z[k], 1.0)) for k in range(3)]
    for k in range(4):
        pyro.sample(f"y{k}", dist.Normal(x[k % 3].sum() + z[0], 1.0))


SUMS = [
    pm.MacroVariable("sum of x", micro=[f"a long name {k}" for k in range(3)]),
    pm.MacroVariable("sum of y", micro=["y0", "y1", "y2"]),
    pm.MacroVariable("another sum of y", micro=["y1", "y3"]),
    pm.MacroVariable("both", micro=["a long name 0", "y3"]),
]


@pytest.mark.parametrize("on", [[], SUMS[:1], SUMS[1:3]])
def test_layout_keeps_nodes_apart_and_in_causal_order(on):
    graph = pm.intervention_graph(many, SUMS, on)
    places = layout(graph)
    around = {name: places.around(name) for name in graph}
    for one in graph:
        for other in graph:
            assert one == other or not overlap(around[one], around[other])
    for parent, child, kind in graph.edges.data("kind"):
        if kind == "causal" and graph.nodes[parent]["kind"] == "micro":
            assert places.centre[parent][0] < places.centre[child][0]
    for *box, name in places.boxes:
        for node, data in graph.nodes.items():
            inside = data["kind"] == "micro" and name in data["plates"]
            assert overlap(box, around[node]) == inside
    assert places.noted == {"sum of x": ["plate"]}
    assert [name for *_, name in places.boxes] == ["plate"]
    left, bottom, right, top = places.extent()
    for box in around.values():
        assert left <= box[0] and bottom <= box[1] and box[2] <= right and box[3] <= top


def test_boxes_of_plates_are_nested():
    places = layout(BEFORE)
    boxes = {name: box for *box, name in places.boxes}
    assert list(boxes) == ["stores", "products"]
    outer, inner = boxes.values()
    assert outer[0] < inner[0] and outer[1] < inner[1]
    assert inner[2] < outer[2] and inner[3] < outer[3]
    assert not overlap(outer, places.around("z"))


def test_plates_that_no_box_fits_around_are_named_under_the_node():
    def model():
        first, second = pyro.plate("first", 2, dim=-1), pyro.plate("second", 3, dim=-2)
        third = pyro.plate("third", 2, dim=-3)
        with first:
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with second:
            pyro.sample("b", dist.Normal(0.0, 1.0))
        with third, first:
            pyro.sample("c", dist.Normal(a, 1.0))
        with third, second:
            pyro.sample("d", dist.Normal(0.0, 1.0))

    graph = pm.micro_graph(model)
    figure = pm.render(graph, "matplotlib")
    shown = " ".join(labels(figure))
    for plate in ("first", "second", "third"):
        assert plate in shown
    assert layout(graph).noted


def test_a_thousand_nodes():
    graph = nx.DiGraph()
    nx.add_path(graph, map(str, range(500)))
    graph.add_edges_from(("hub", str(k)) for k in range(500))
    graph.add_edges_from((f"root{k}", "499") for k in range(500))
    for backend in ("dot", "mermaid"):
        assert pm.render(graph, backend)
    figure = pm.render(graph, "matplotlib")
    assert max(figure.get_size_inches()) <= 50


def test_errors():
    with pytest.raises(ValueError, match="backend='gif'. Expected 'graphviz'"):
        pm.render(BEFORE, "gif")
    with pytest.raises(ValueError, match="ax is given, and backend='dot'"):
        pm.render(BEFORE, "dot", ax=object())
    with pytest.raises(pm.PyroMacroError, match="the graph has a cycle"):
        pm.render(nx.DiGraph([(1, 2), (2, 1)]), "matplotlib")
    assert "1" in pm.render(nx.DiGraph([(1, 2), (2, 1)]), "dot")


def without(monkeypatch, *names):
    """As if some packages were missing."""
    real = builtins.__import__

    def fake(name, *args, **kwargs):
        drawing = name == "pyro_macro.drawing.figure" and "matplotlib" in names
        if name.split(".")[0] in names or drawing:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fake)


def test_missing_packages_are_named(monkeypatch):
    without(monkeypatch, "graphviz", "matplotlib")
    with pytest.raises(
        ImportError, match=r"graphviz: pip install 'pyro_macro\[demo\]'"
    ):
        pm.render(BEFORE, "graphviz")
    with pytest.raises(
        ImportError, match=r"matplotlib: pip install 'pyro_macro\[demo\]"
    ):
        pm.render(BEFORE)
    assert pm.render(BEFORE, "dot") and pm.render(BEFORE, "mermaid")


def test_the_default_is_what_is_installed(monkeypatch):
    graphviz = pytest.importorskip("graphviz")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert isinstance(pm.render(BEFORE), graphviz.Digraph)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert isinstance(pm.render(BEFORE), matplotlib.figure.Figure)
    without(monkeypatch, "graphviz")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert isinstance(pm.render(BEFORE), matplotlib.figure.Figure)
