# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What reports look like: as text, in notebooks, in pandas, and as pictures."""

import dataclasses
import sys

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm
from pyro_macro import reports

matplotlib.use("Agg")
pd = pytest.importorskip("pandas")
plt = pytest.importorskip("matplotlib.pyplot")

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def shop():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    x1 = pyro.sample("x1", dist.Normal(10 + z, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20 - z, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2 + z, 1.0))


def shops():
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    prices = torch.tensor([[1.0, 2.0, 3.0], [0.0, 1.0, 0.0]])
    pyro.sample("revenue", dist.Normal(x1 + prices * x2, 1.0).to_event(2))


def gamma_shop():
    x1 = pyro.sample("x1", dist.Gamma(2.0, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(3.0, 1.0))
    pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def gamma_shops():
    x1 = pyro.sample("x1", dist.Gamma(2.0, 1.0))
    x2 = pyro.sample("x2", dist.Gamma(3.0, 1.0))
    with pyro.plate("shops", 3):
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def coins():
    z = pyro.sample("z", dist.Bernoulli(0.5))
    x1 = pyro.sample("x1", dist.Bernoulli(0.2 + 0.6 * z))
    x2 = pyro.sample("x2", dist.Bernoulli(0.6))
    y = pyro.sample("y", dist.Bernoulli(0.1 + 0.2 * x1 + 0.1 * x2 + 0.5 * z))
    pyro.deterministic("revenue", x1 + 2 * y)


def coin_pair():
    x1 = pyro.sample("x1", dist.Bernoulli(0.3))
    x2 = pyro.sample("x2", dist.Bernoulli(0.6))
    p = torch.stack([0.1 + 0.2 * x1, 0.3 + 0.2 * x2], -1)
    pyro.sample("revenue", dist.Bernoulli(p).to_event(1))


def half(value):
    return pm.Allocate(value, (0.5, 0.5))


def drawn(model=gamma_shop, realization=half, at=(3.0, 6.0), **options):
    settings = {"num_samples": 100, "progress": False} | options
    return pm.confounding(model, SALES, "revenue", realization, at=list(at), **settings)


def ask(model, *args, **options):
    return pm.confounding(model, SALES, "revenue", *args, **options)


MAKERS = {
    "confounding, Gaussian": lambda: ask(shop, at=[30.0, 33.0]),
    "confounding, finite": lambda: ask(coins),
    "confounding, drawn": drawn,
    "confounding, theorem": lambda: drawn(realization=pm.Natural),
    "confounding, one value": lambda: ask(shop, at=30.0),
    "shifts": lambda: pm.shift_confounding(shop, SALES, "revenue", 1.0, at=[30.0]),
    "feasible": lambda: pm.can_inhibit(shop, SALES, "revenue", at=[30.0, 33.0]),
    "feasible, finite": lambda: pm.can_inhibit(coins, SALES, "revenue"),
    "scm": lambda: pm.macro_scm_exists(shop, SALES, "revenue", at=[30.0, 33.0]),
    "scm, finite": lambda: pm.macro_scm_exists(coins, SALES, "revenue"),
    "independence": lambda: pm.blocks_backdoor(shop, SALES, "revenue", ["z"]),
    "adjustment": lambda: pm.macro_adjust(shop, SALES, "revenue", ["z"], [30.0, 33.0]),
    "adjustment, finite": lambda: pm.macro_adjust(coins, SALES, "revenue", ["z"]),
    "effect": lambda: pm.atomic_from_shifts(shop, SALES, "revenue", at=[30.0, 33.0]),
    "effect of shifts": lambda: pm.shift_from_atomics(shop, SALES, "revenue", [1.0, 2]),
    "descriptions": lambda: pm.macro_do(shop, {SALES: pm.Natural(33.0)}).describe(),
}
every_report = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@every_report
def test_text(make):
    report = make()
    assert str(report) == repr(report) != ""
    assert "tensor(" not in str(report) and "object at" not in str(report)
    assert not any(line != line.rstrip() for line in str(report).splitlines())


@every_report
def test_table_lines_up(make):
    report = make()
    if isinstance(report, reports.Descriptions):
        return
    lines = str(report).splitlines()
    table = lines[-len(report.rows()) - 1 :]
    assert len({len(line) for line in table}) == 1
    for name in report.rows()[0]:
        assert name in table[0]


@every_report
def test_html(make):
    text = make()._repr_html_()
    assert text.count("<table>") == text.count("</table>") == 1
    assert text.count("<tr>") == text.count("</tr>") == len(make().rows()) + 1
    assert text.count("<td>") == text.count("</td>")
    assert "tensor(" not in text


@every_report
def test_pandas(make):
    report = make()
    frame = report.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert len(frame) == len(report.rows())
    assert list(frame.columns) == list(report.rows()[0])
    at = getattr(report, "at", None)
    if at is not None:  # a row a macro value
        assert frame[report.cause].tolist() == at.tolist()


@every_report
def test_frozen(make):
    report = make()
    for item in report if isinstance(report, reports.Descriptions) else [report]:
        for field in dataclasses.fields(item):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(item, field.name, None)


@every_report
def test_numbers_are_in_float64_and_detached(make):
    report = make()
    if isinstance(report, reports.Descriptions):
        return
    for field in dataclasses.fields(report):
        value = getattr(report, field.name)
        if isinstance(value, torch.Tensor):
            assert value.dtype == torch.float64 and not value.requires_grad, field.name


def test_values_in_pandas():
    report = ask(shop, at=[30.0, 33.0])
    frame = report.to_pandas()
    assert frame["mean given"].tolist() == report.observational_mean.tolist()
    assert (
        frame["variance under do"].tolist() == report.interventional_variance.tolist()
    )
    assert frame["verdict"].tolist() == list(report.verdicts)
    drew = drawn()
    assert drew.to_pandas()["p-value"].tolist() == drew.p_value.tolist()


def test_verdict_in_words():
    said = {
        "inhibiting": "sales and revenue are not confounded under Natural: inhibiting",
        "inducing": "sales and revenue are confounded under Allocate",
        "undecided": "whether sales and revenue are confounded under Proportional is "
        "undecided",
    }
    for report in (
        drawn(realization=pm.Natural),
        drawn(),
        drawn(realization=pm.Proportional),
    ):
        assert str(report).startswith(said.pop(report.verdict))
        assert f"Method: {report.method}" in str(report)
    assert not said


@pytest.mark.parametrize(
    "model, options",
    [
        (shops, {"at": [30.0, 33.0]}),
        (shops, {"at": [30.0, 33.0], "realization": half}),
        (coin_pair, {}),
        (gamma_shops, {"at": [3.0, 6.0], "num_samples": 100, "realization": half}),
        (gamma_shops, {"at": [3.0, 6.0], "num_samples": 100}),
    ],
    ids=["Gaussian", "Gaussian, half", "finite", "drawn", "theorem"],
)
def test_vector_effect(model, options):
    """A row for each macro value and each element."""
    report = ask(model, **options)
    shape = report.observational_mean.shape
    frame = report.to_pandas()
    assert len(frame) == shape.numel() > len(report.at)
    assert "element" in frame.columns
    assert frame["mean given"].tolist() == report.observational_mean.flatten().tolist()
    first = frame[frame["sales"] == frame["sales"][0]]
    assert first["element"].nunique() == len(first)
    column = f"{report.distance_kind} distance"
    assert first[column].nunique() == 1
    assert str(report) and report._repr_html_().count("<tr>") == len(frame) + 1


def test_elements_of_a_matrix():
    frame = ask(shops, at=[30.0]).to_pandas()
    assert frame["element"].tolist() == [(i, j) for i in range(2) for j in range(3)]


def test_vector_cause():
    macro = pm.MacroVariable("sales", ["x1", "x2"], aggregation=pm.Linear([[1.0, 1.0]]))
    report = pm.confounding(shop, macro, "revenue", at=[[30.0], [33.0]])
    assert report.to_pandas()["sales"].tolist() == [(30.0,), (33.0,)]
    assert "(30)" in str(report)


def test_names_are_escaped():
    """Names of sites are the user's: nothing of them is markup."""
    evil = "a<script>alert('&')</script>"

    def model():
        x1 = pyro.sample("x1", dist.Normal(0.0, 1.0))
        x2 = pyro.sample("x2", dist.Normal(0.0, 1.0))
        z = pyro.sample("z<b>z</b>", dist.Normal(0.0, 1.0))
        pyro.sample(evil, dist.Normal(x1 + 3 * x2 + z, 1.0))

    macro = pm.MacroVariable("s<i>s</i>", ["x1", "x2"])
    for report in (
        pm.confounding(model, macro, evil),
        pm.can_inhibit(model, macro, evil),
        pm.macro_scm_exists(model, macro, evil),
        pm.macro_adjust(model, macro, evil, ["z<b>z</b>"]),
        pm.blocks_backdoor(model, macro, evil, ["z<b>z</b>"]),
        pm.atomic_from_shifts(model, macro, evil),
        pm.macro_do(model, {macro: pm.Natural(0.0)}).describe(),
    ):
        text = report._repr_html_()
        for tag in ("<script>", "<i>", "<b>"):
            assert tag not in text
        assert "&lt;" in text


def test_names_that_begin_like_markup():
    """A name is a name, whatever it begins with."""

    def model():
        z = pyro.sample("<z>", dist.Normal(0.0, 1.0))
        x1 = pyro.sample("x1", dist.Normal(z, 1.0))
        x2 = pyro.sample("x2", dist.Normal(0.0, 1.0))
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2 + z, 1.0))

    assert ask(model, at=[1.0]).method == "exact: affine-Gaussian"


def test_independence_that_is_not_rejected():
    """It is neither true nor false, and says so when asked."""
    report = reports.IndependenceReport("a of b", None, 0.1, "Monte Carlo", 0.4)
    with pytest.raises(ValueError, match="does not show"):
        bool(report)
    assert "not rejected" in str(report)
    assert report.to_pandas()["p-value"].tolist() == [0.4]
    held = reports.IndependenceReport("a of b", True, 0.0, "exact")
    assert bool(held) and "p-value" not in held.to_pandas()


def test_sides_of_equation_10():
    report = pm.can_inhibit(shop, SALES, "revenue")
    left, right = report.norms
    assert left**2 == pytest.approx(report.observational_variance)
    assert right**2 == pytest.approx(report.noise_variance)
    assert pm.can_inhibit(coins, SALES, "revenue").norms is None


# -- Pictures ----------------------------------------------------------------------

PICTURES = {
    "Gaussian, one": lambda: ask(shop, half, at=[33.0]),
    "Gaussian, many": lambda: ask(shop, half),
    "Gaussian, point": lambda: ask(
        lambda: pyro.deterministic(
            "revenue",
            pyro.sample("x1", dist.Normal(0.0, 1.0))
            + 3 * pyro.sample("x2", dist.Normal(0.0, 1.0)),
        ),
        half,
        at=[1.0],
    ),
    "finite, one": lambda: ask(coins, at=[1.0]),
    "finite, many": lambda: ask(coins),
    "drawn, one": lambda: drawn(at=[5.0], num_samples=1000),
    "drawn, many": lambda: drawn(at=[2.0, 4.0, 8.0]),
    "theorem, one": lambda: drawn(at=[5.0], realization=pm.Natural),
}


@pytest.mark.parametrize("make", PICTURES.values(), ids=PICTURES)
def test_picture_of_confounding(make):
    report = make()
    ax = report.plot()
    many = len(report.at) > 1
    assert ax.get_xlabel() == ("sales" if many else "revenue")
    one = "density" if report.observational.weights is None else "probability"
    assert ax.get_ylabel() == ("revenue" if many else one)
    assert report.verdict in ax.get_title()
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["seen: P(revenue | sales)", "set: P(revenue | do(sales))"]
    ax.figure.canvas.draw()
    _, mine = plt.subplots()
    assert report.plot(ax=mine) is mine and report.plot(mine) is mine
    assert report.plot().figure is not mine.figure


def test_values_in_a_picture():
    """In ascending order, whatever the order asked for."""
    report = ask(shop, half, at=[33.0, 27.0, 30.0])
    ax = report.plot()
    seen, done = ax.get_lines()
    assert seen.get_xdata().tolist() == [27.0, 30.0, 33.0]
    order = report.at.argsort()
    assert done.get_ydata().tolist() == report.interventional_mean[order].tolist()


def test_weights_in_a_picture():
    report = ask(coins, at=[1.0])
    seen = report.plot().containers[0]
    heights = [bar.get_height() for bar in seen]
    assert heights == report.observational.weights[0].tolist()


@pytest.mark.parametrize("adjustment", [["z"], ["w"]])
@pytest.mark.filterwarnings("ignore::pyro_macro.NotAdjusted")
def test_picture_of_adjustment(adjustment):
    def model():
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        z = pyro.sample("z", dist.Normal(w, 1.0))
        x1 = pyro.sample("x1", dist.Normal(10 + z, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20 + z, 1.0))
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2 - 3 * z, 1.0))

    report = pm.macro_adjust(model, SALES, "revenue", adjustment)
    ax = report.plot()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sales", "revenue")
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    expected = ["seen: P(revenue | sales)", f"adjusted for {adjustment[0]}"]
    if not report.condition.holds:
        expected.append(f"set: Natural(value, given={adjustment[0]})")
        assert "(15) does not hold" in ax.get_title()
    assert labels == expected
    assert report.condition.holds == (adjustment == ["z"])
    _, mine = plt.subplots()
    assert report.plot(ax=mine) is mine


def test_picture_of_a_vector_is_refused():
    for report in (ask(shops, at=[30.0, 33.0]), ask(shops, at=[30.0])):
        with pytest.raises(pm.PyroMacroError, match="one number against one number"):
            report.plot()
    assert plt.get_fignums() == []


@pytest.mark.parametrize("what", ["pandas", "matplotlib"])
def test_what_is_missing_is_named(what, monkeypatch):
    report = ask(shop, at=[33.0])
    monkeypatch.setitem(sys.modules, what, None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    do = report.to_pandas if what == "pandas" else report.plot
    with pytest.raises(ImportError, match=f"{what}.*pip install .*pyro_macro.demo"):
        do()
    assert str(report)


def test_picture_of_an_effect():
    report = pm.atomic_from_shifts(shop, SALES, "revenue")
    ax = report.plot()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("sales", "revenue")
    (line,) = ax.get_lines()
    assert line.get_ydata().tolist() == report.mean.tolist()


def test_picture_of_both_sides():
    report = pm.can_inhibit(shop, SALES, "revenue")
    widths = [bar.get_width() for bar in report.plot().containers[0]]
    assert widths == [report.noise_variance, report.observational_variance]


def test_picture_of_what_is_left():
    report = pm.can_inhibit(coins, SALES, "revenue")
    ax = report.plot()
    assert [bar.get_height() for bar in ax.containers[0]] == report.gap.tolist()
    assert "inhibits" in ax.get_title()


def test_a_report_without_a_picture_says_so():
    with pytest.raises(NotImplementedError, match="ScmReport has no picture"):
        pm.macro_scm_exists(shop, SALES, "revenue").plot()
