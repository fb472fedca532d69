# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of fibres: the densities in them, where they stand, and what is refused."""

import matplotlib
import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_macro as pm
from pyro_macro.questions.fibres import FibreProgram

matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
TOTAL = pm.MacroVariable("total", micro="x", over="parts")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def shop():
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    with pyro.plate("shops", 3), pyro.plate("days", 4):  # deeper than the micro sites
        pyro.sample("revenue", dist.Normal(x1 + 3 * x2, 1.0))


def of_parts(family, *parameters):
    def model():
        tensors = [torch.as_tensor(p) for p in parameters]
        with pyro.plate("parts", len(tensors[0])):
            pyro.sample("x", family(*tensors))

    return model


GAMMAS = of_parts(dist.Gamma, [2.0, 3.0], 1.0)
THREE = of_parts(dist.Gamma, [2.0, 4.0, 3.0], 1.0)


def found(model, macro, realization, count=10_000):
    return FibreProgram((model, (), {}), macro, count, 0).under(realization)


def along(x1, total, weights=(1.0, 1.0)):
    return torch.stack([x1, (total - weights[0] * x1) / weights[1]], -1)


@pytest.mark.parametrize(
    "realization, loc, scale",
    [
        (pm.Natural(33.0), 12.4, 0.8**0.5),  # equation (2) of the paper
        (pm.Residual(33.0, absorb="x2"), 10.0, 2.0),  # equation (3)
    ],
)
def test_gaussian_densities(realization, loc, scale):
    way = found(shop, SALES, realization)
    x1 = torch.linspace(2.0, 18.0, 9)
    expected = dist.Normal(loc, scale).log_prob(x1).exp()
    assert way.exact and way.value == 33.0 and way.states is None
    torch.testing.assert_close(way.density(along(x1, 33.0)), expected)


def test_density_of_shares():
    """Gamma sites of one rate, given their sum, have beta shares; and in any case."""
    x1 = torch.linspace(0.4, 3.6, 9)
    expected = dist.Beta(2.0, 3.0).log_prob(x1 / 4).exp() / 4
    natural = found(GAMMAS, TOTAL, pm.Natural(4.0))
    assert natural.exact
    torch.testing.assert_close(natural.density(along(x1, 4.0)), expected)
    scaled = found(GAMMAS, TOTAL, pm.Proportional(4.0), 40_000)
    assert not scaled.exact
    torch.testing.assert_close(
        scaled.density(along(x1, 4.0)), expected, rtol=0, atol=0.03
    )


def any_split(total):
    scale = dist.transforms.AffineTransform(0.0, total, event_dim=1)
    return dist.TransformedDistribution(dist.Dirichlet(torch.tensor([2.0, 3.0])), scale)


@pytest.mark.parametrize(
    "realization",
    [
        pm.Natural(4.0),
        pm.MaxEntropy(4.0),
        pm.Explicit(4.0, any_split),
        pm.Proportional(4.0),
    ],
    ids=lambda realization: type(realization).__name__,
)
def test_densities_hold_one_in_all_and_nothing_off_the_support(realization):
    way = found(GAMMAS, TOTAL, realization)
    x1 = torch.linspace(-1.0, 5.0, 6001)
    density = way.density(along(x1, 4.0))
    outside = (x1 < 0) | (x1 > 4)
    assert (density[outside] == 0).all()
    mass = torch.trapezoid(density, x1).item()
    scale = mass if isinstance(realization, pm.Explicit) else 1.0  # up to a factor
    assert abs(mass / scale - 1) < 0.03 and mass > 0


def test_weights():
    coins = pm.MacroVariable("coins", "x", "parts", pm.Linear([1.0, 2.0]))
    way = found(of_parts(dist.Normal, [1.0, 2.0], [1.0, 3.0]), coins, pm.Natural(6.0))
    # Cov(x1, total) / Var(total) = 1 / 37
    mean, variance = 1 + 1 / 37, 1 - 1 / 37
    x1 = torch.linspace(-2.0, 4.0, 7)
    expected = dist.Normal(mean, variance**0.5).log_prob(x1).exp()
    density = way.density(along(x1, 6.0, (1.0, 2.0)))
    torch.testing.assert_close(density / density.sum(), expected / expected.sum())


def test_states_with_probabilities():
    way = found(of_parts(dist.Poisson, [2.0, 4.0]), TOTAL, pm.Natural(8.0), 200)
    assert way.exact and way.density is None
    order = way.states[:, 0].argsort()
    counts = torch.arange(9.0)
    torch.testing.assert_close(way.states[order], along(counts, 8.0))
    expected = dist.Binomial(8, torch.tensor(1 / 3)).log_prob(counts).exp()
    torch.testing.assert_close(way.probabilities[order], expected)


def test_a_point():
    way = found(shop, SALES, pm.Allocate(33.0, shares=[0.25, 0.75]))
    assert way.exact and way.probabilities.tolist() == [1.0]
    torch.testing.assert_close(way.states, torch.tensor([[8.25, 24.75]]))


def test_what_is_given_is_averaged_over():
    """The law of one run is not that of the next: it is known by draws."""

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 3.0))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(-z, 1.0))

    way = found(model, SALES, pm.Natural(0.0, given="z"), 40_000)
    assert not way.exact
    x1 = torch.linspace(-6.0, 6.0, 7)
    expected = dist.Normal(0.0, (9 + 0.5) ** 0.5).log_prob(x1).exp()
    torch.testing.assert_close(way.density(along(x1, 0.0)), expected, rtol=0, atol=0.01)


def test_a_ridge_stands_on_its_line():
    ax = pm.plot_fibre(shop, SALES, pm.Natural(33.0))
    lines = {line.get_label(): line.get_xydata() for line in ax.get_lines()}
    fibre = torch.as_tensor(lines["sales = 33"])
    torch.testing.assert_close(fibre.sum(-1), torch.full((len(fibre),), 33.0))
    ridge = torch.as_tensor(lines["Natural"])
    height = (ridge.sum(-1) - 33.0) / 2**0.5  # at right angles, both scales the same
    top = ridge[height.nan_to_num(-1.0).argmax()]
    foot = top - height.nan_to_num(-1.0).max() / 2**0.5
    torch.testing.assert_close(foot, torch.tensor([12.4, 20.6]), rtol=0, atol=0.05)
    assert ax.get_aspect() == 1.0
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("x1", "x2")


def test_several_on_one_picture():
    ways = {
        "A": pm.Natural(33.0),
        "scaled": pm.Proportional(33.0),
        "C": pm.Allocate(30.0, shares=[0.5, 0.5]),
    }
    _, mine = plt.subplots()
    ax = pm.plot_fibre(shop, SALES, ways, mine, labels=["tea, kg", "coffee, kg"])
    assert ax is mine and ax.get_xlabel() == "tea, kg"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    fibres = ["sales = 33", "sales = 30"]
    assert labels == ["the model as it is", *fibres, "A", "scaled (from draws)", "C"]


def test_scales_that_differ():
    """A line that is nearly upright is drawn from end to end."""
    model = of_parts(dist.Normal, [1000.0, 2.0], [50.0, 1.0])
    ax = pm.plot_fibre(model, TOTAL, pm.Natural(1050.0))
    (line,) = [x for x in ax.get_lines() if x.get_label() == "total = 1050"]
    low, high = ax.get_ylim()
    y = line.get_ydata()
    assert y.max() - y.min() > 0.9 * (high - low) and ax.get_aspect() == "auto"


@pytest.fixture
def drawn(monkeypatch):
    """What polygons are drawn, and how."""
    from mpl_toolkits.mplot3d import art3d

    calls = []

    class Recorded(art3d.Poly3DCollection):
        def __init__(self, polygons, **look):
            calls.append((torch.stack([torch.as_tensor(p) for p in polygons]), look))
            super().__init__(polygons, **look)

    monkeypatch.setattr(art3d, "Poly3DCollection", Recorded)
    return calls


def area(triangles):
    """Of triangles in space, together."""
    sides = triangles[:, 1:] - triangles[:, :1]
    return torch.linalg.cross(sides[:, 0], sides[:, 1]).norm(dim=-1).sum() / 2


def test_a_triangle(drawn):
    ax = pm.plot_fibre(THREE, TOTAL, pm.Natural(9.0), labels=["a, h", "b, h", "c, h"])
    assert (ax.get_xlabel(), ax.get_zlabel()) == ("a, h", "c, h")
    assert ax.get_title() == "Natural: total = 9"
    (corners, _), (triangles, look) = drawn
    rounded = {tuple(round(c, 6) + 0.0 for c in p) for p in corners[0].tolist()}
    assert rounded == {(9.0, 0.0, 0.0), (0.0, 9.0, 0.0), (0.0, 0.0, 9.0)}
    torch.testing.assert_close(area(triangles), torch.tensor(81 * 3**0.5 / 2))
    dark = torch.as_tensor(look["facecolors"])[:, :3].sum(-1).argmin()
    mode = 9 * torch.tensor([1.0, 3.0, 2.0]) / 6  # of a Dirichlet (2, 4, 3)
    torch.testing.assert_close(triangles[dark].mean(0), mode, rtol=0, atol=0.5)


def test_a_plane(drawn):
    model = of_parts(dist.Normal, [2.0, 4.0, 3.0], [1.0, 2.0, 1.0])
    pm.plot_fibre(model, TOTAL, pm.Natural(12.0))
    for polygons, _ in drawn:
        on_plane = torch.full(polygons.shape[:-1], 12.0)
        torch.testing.assert_close(polygons.sum(-1), on_plane)
    triangles, look = drawn[-1]
    dark = torch.as_tensor(look["facecolors"])[:, :3].sum(-1).argmin()
    mean = torch.tensor([2.5, 6.0, 3.5])  # the rest, 3, by variances 1, 4 and 1
    torch.testing.assert_close(triangles[dark].mean(0), mean, rtol=0, atol=0.5)


def test_states_on_a_plane():
    mine = plt.figure().add_subplot(projection="3d")
    poisson = of_parts(dist.Poisson, [2.0, 4.0, 3.0])
    assert pm.plot_fibre(poisson, TOTAL, pm.Natural(4.0), mine) is mine
    areas = torch.as_tensor(mine.collections[0].get_sizes())
    assert len(areas) == 15  # ways to split 4 into three
    way = found(poisson, TOTAL, pm.Natural(4.0))
    chances = dist.Multinomial(4, torch.tensor([2.0, 4.0, 3.0])).log_prob(way.states)
    torch.testing.assert_close(way.probabilities, chances.exp())


def test_nothing_of_the_user_s_changes():
    def model(loc):
        scale = pyro.param("scale", torch.tensor(2.0))
        pyro.sample("x1", dist.Normal(loc, scale))
        pyro.sample("x2", dist.Normal(20.0, 1.0))

    before = torch.get_rng_state()
    with pyro.poutine.trace() as seen:
        pm.plot_fibre(model, SALES, pm.Allocate(33.0, [0.5, 0.5]), model_args=(10.0,))
    assert torch.equal(torch.get_rng_state(), before)
    assert not seen.trace.nodes and not len(pyro.get_param_store())


@pytest.mark.parametrize(
    "model, macro, realization, message",
    [
        (
            of_parts(dist.Normal, torch.zeros(4), 1.0),
            TOTAL,
            pm.Natural(1.0),
            "macro-variable 'total' has a micro state of 4 elements. Expected 2 or 3",
        ),
        (
            shop,
            pm.MacroVariable("top", ["x1", "x2"], aggregation=pm.Max()),
            pm.Natural(1.0),
            r"macro-variable 'top' is Max\(\). Expected a weighted sum",
        ),
        (
            shop,
            SALES,
            pm.Shift(3.0),
            "'sales' differs between draws of Shift, so that there is no one fibre",
        ),
        (
            of_parts(dist.Normal, torch.zeros(2, 2), 1.0),
            pm.MacroVariable("rows", "x", "parts"),
            pm.Natural(1.0),
            "macro-variable 'rows' stays in plates",
        ),
        (shop, SALES, 33.0, r"realization is 33.0. Expected a realization with its"),
        (shop, SALES, {}, r"realization is \{\}. Expected"),
        (
            THREE,
            TOTAL,
            {"a": pm.Natural(9.0), "b": pm.MaxEntropy(9.0)},
            "2 realizations of a micro state of 3 elements. Expected one",
        ),
    ],
    ids=["four", "max", "shift", "plates", "number", "none", "two"],
)
def test_what_is_refused(model, macro, realization, message):
    if macro.name == "rows":

        def model():
            with pyro.plate("parts", 2, dim=-1), pyro.plate("rest", 2, dim=-2):
                pyro.sample("x", dist.Normal(torch.zeros(2, 2), 1.0))

    with pytest.raises(pm.PyroMacroError, match=message):
        pm.plot_fibre(model, macro, realization)


def test_labels_and_axes_that_do_not_fit():
    with pytest.raises(pm.PyroMacroError, match="Expected 2, for x1, x2"):
        pm.plot_fibre(shop, SALES, pm.Natural(33.0), labels=["tea"])
    _, flat = plt.subplots()
    with pytest.raises(pm.PyroMacroError, match="ax has two dimensions"):
        pm.plot_fibre(THREE, TOTAL, pm.Natural(9.0), flat)
