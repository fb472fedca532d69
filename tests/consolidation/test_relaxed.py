# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Relaxed consolidation: what is learned is as close as it says, or refused.

Distances are measured here once more, on draws of the original program and of the
fused one, by the distance of Kolmogorov and Smirnov.
"""

import functools
import math
import re

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive

import pyro_macro as pm

N = 20_000  # draws to compare with
CHANCE = 1.95 * (2 / N) ** 0.5  # of two samples, at level 0.001
SMALL = {"draws": 4000, "steps": 300}
TINY = {"draws": 500, "steps": 30, "width": 16, "components": 4}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# A small program: the wear a of a mill is neither Gaussian nor finite


def mill():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Normal(torch.sin(a) + x, 0.5))
    k = pyro.sample("k", dist.Bernoulli(torch.sigmoid(a - 2 + b)))
    pyro.sample("g", dist.Gamma(2 + a, torch.exp(b / 4 - k / 2)))


EPSILON = 0.1


@functools.cache
def fused_mill():
    how = pm.Approximation(EPSILON, **SMALL)
    return pm.consolidate(mill, ["x", "k", "g"], ["b"], approximate=how)


def draws(model, names, made=None, given=None, seed=5, count=N):
    """Draws of some sites, all at once, as arrays."""
    made = {n: torch.as_tensor(v) for n, v in (made or {}).items()}
    given = {n: torch.as_tensor(v) for n, v in (given or {}).items()}
    pyro.set_rng_seed(seed)
    model = poutine.condition(poutine.do(model, made), given)
    with pyro.plate("draws", count), torch.no_grad():
        nodes = poutine.trace(model).get_trace().nodes
    return {n: nodes[n]["value"].expand(count).double().numpy() for n in names}


def distance(one, other):
    """The largest one between two distribution functions."""
    points = np.concatenate([one, other])
    below = [
        np.searchsorted(np.sort(x), points, side="right") / len(x) for x in (one, other)
    ]
    return np.abs(below[0] - below[1]).max()


def largest_distance(one, other, seed=0):
    """Of each site, and of combinations of all of them."""
    rng = np.random.default_rng(seed)
    names = list(one)
    found = [distance(one[n], other[n]) for n in names]
    scale = {n: one[n].std() + 1e-9 for n in names}
    for _ in range(8):
        weights = rng.normal(size=len(names))
        sums = [
            sum(w * x[n] / scale[n] for w, n in zip(weights, names, strict=True))
            for x in (one, other)
        ]
        found.append(distance(*sums))
    return max(found)


def check(model, fused, names, made=None, epsilon=EPSILON):
    one, other = draws(model, names, made), draws(fused, names, made, seed=6)
    found = largest_distance(one, other)
    assert found <= epsilon + CHANCE, found


@pytest.mark.parametrize("made", [{}, {"b": 1.0}, {"b": -1.0}])
def test_the_distance_is_kept(made):
    check(mill, fused_mill(), ["x", "k", "g"], made)


@pytest.mark.parametrize("x", [-1.0, 1.0])
def test_do_on_a_kept_site_without_causes(x):
    """What it tells is what it does; the distance is one of all x together."""
    check(mill, fused_mill(), ["k", "g"], {"x": x}, 2 * EPSILON)


def test_the_comparison_sees_what_is_not_right():
    names = ["x", "k", "g"]
    true = draws(mill, names, seed=6)
    for other in ({"b": 1.0}, {"b": -1.0}, {"x": 1.0}, {"a": 1.0}):
        assert largest_distance(true, draws(mill, names, other)) > EPSILON + CHANCE
    assert largest_distance(true, draws(mill, names)) < CHANCE


def test_sites_are_gone():
    fused = fused_mill()
    assert fused.sites == fused.kept == ("x", "k", "g")
    nodes = poutine.trace(fused).get_trace().nodes
    assert [n for n in nodes if not n.startswith("_")] == ["x", "k", "g"]
    nodes = poutine.trace(poutine.do(fused, {"b": torch.tensor(1.0)})).get_trace().nodes
    sites = {n for n in nodes if not n.startswith("_")}
    assert sites == {"x", "b", "k", "g"}
    assert nodes["b"]["value"] == 1.0
    assert set(fused.graph) == {"x", "b", "k", "g"} or "a" not in fused.graph


def test_the_distance_is_reported():
    fused = fused_mill()
    (said,) = [how for names, how in fused.method.items() if "k" in names.split(", ")]
    found = re.search(r"Kolmogorov-Smirnov distance (\d\S*)", said)
    assert found and 0 < float(found[1]) <= EPSILON
    names = next(n for n, how in fused.method.items() if how == said)
    assert set(names.split(", ")) == {"k", "g"}


def test_the_lines_say_what_is_learned():
    x, k, g = fused_mill().equations()
    assert x == "x ~ Normal(0, 1)"
    assert k == "k ~ learned(x, do(b))"
    assert g == "g ~ learned(x, k, do(b))"


def test_the_cost_counts_what_is_left():
    cost = fused_mill().cost
    assert (cost.before.equations, cost.before.draws) == (5, 5)
    assert (cost.after.equations, cost.after.draws) == (3, 3)


def test_supports_are_those_of_the_sites():
    nodes = poutine.trace(poutine.condition(fused_mill(), {"k": torch.tensor(1.0)}))
    nodes = nodes.get_trace().nodes
    assert nodes["k"]["fn"].support is dist.constraints.boolean
    g = nodes["g"]["fn"]
    assert bool((g.sample((1000,)) > 0).all())
    inside = torch.tensor([1e-3, 1.0, 50.0], requires_grad=True)
    log_prob = g.log_prob(inside)
    assert bool(torch.isfinite(log_prob).all())
    log_prob.sum().backward()
    assert bool(torch.isfinite(inside.grad).all())
    for name in "xkg":
        assert nodes[name]["value"].dtype == torch.get_default_dtype()


@pytest.mark.parametrize("made", [{}, {"b": 1.0}])
def test_densities_integrate_to_one(made):
    fused = poutine.do(fused_mill(), {n: torch.tensor(v) for n, v in made.items()})
    given = {"x": torch.tensor(0.5), "k": torch.tensor(0.0)}
    g = poutine.trace(poutine.condition(fused, given)).get_trace().nodes["g"]["fn"]
    grid = torch.linspace(-8.0, 6.0, 4001).exp()
    total = torch.trapezoid(g.log_prob(grid).exp(), grid)
    assert float(total) == pytest.approx(1.0, abs=1e-3)


def test_what_is_known_counts():
    """Given k and x, g is as in the program: by drawing what fits."""
    true = draws(mill, ["x", "k", "g"], count=20 * N)
    for k, low, high in ((0, -1.25, -0.75), (1, 0.75, 1.25)):
        fits = (true["k"] == k) & (true["x"] > low) & (true["x"] < high)
        given = {"k": float(k), "x": (low + high) / 2}
        found = draws(fused_mill(), ["g"], given=given)["g"]
        assert fits.sum() > 2000
        wanted = np.log(true["g"][fits])
        assert np.log(found).mean() == pytest.approx(wanted.mean(), abs=0.1)
        assert np.log(found).std() == pytest.approx(wanted.std(), abs=0.1)


def test_plates_of_particles():
    fused = fused_mill()
    with pyro.plate("outer", 4, dim=-2), pyro.plate("inner", 3, dim=-1):
        made = poutine.do(fused, {"b": torch.randn(4, 1)})
        trace = poutine.trace(made).get_trace()
    for name in "xkg":
        assert trace.nodes[name]["value"].shape == (4, 3)
        assert trace.nodes[name]["value"].unique().numel() > 1
    trace.compute_log_prob()
    assert trace.nodes["g"]["log_prob"].shape == (4, 3)


def test_interventions_that_differ_by_particle():
    b = torch.tensor([-2.0, 2.0]).repeat(N // 2)
    found = draws(fused_mill(), ["k", "g"], {"b": b})
    wanted = draws(mill, ["k", "g"], {"b": b})
    for half in (slice(0, None, 2), slice(1, None, 2)):
        for name in ("k", "g"):
            gap = distance(found[name][half], wanted[name][half])
            assert gap < EPSILON + 1.5 * CHANCE


@pytest.mark.parametrize("parallel", [True, False])
def test_predictive(parallel):
    made = poutine.do(fused_mill(), {"b": torch.tensor(1.0)})
    found = Predictive(made, num_samples=20, parallel=parallel)()
    assert {"x", "k", "g"} <= set(found)
    assert all(found[n].reshape(-1).shape == (20,) for n in "xkg")


def test_what_is_not_allowed_is_refused():
    fused = fused_mill()
    with pytest.raises(pm.InterventionNotAllowed, match="'?a"):
        poutine.do(fused, {"a": torch.tensor(1.0)})()
    with pytest.raises(pm.PyroMacroError, match="b"):
        poutine.condition(fused, {"b": torch.tensor(1.0)})()


def test_it_is_verified():
    settings = [{}, {"b": 1.0}]
    few = {"draws": 150, "level": 1e-3}
    assert pm.verify_consolidation(mill, fused_mill(), settings, **few)
    shifted = poutine.do(mill, {"b": torch.tensor(3.0)})
    assert not pm.verify_consolidation(shifted, fused_mill(), [{}], **few)


# Other programs


def wear():
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    pyro.sample("g", dist.Gamma(2.0 + a, 1.0))


def test_seeds_reproduce_and_nothing_is_touched():
    def law(seed, state):
        how = pm.Approximation(0.9, **TINY, seed=seed)
        pyro.set_rng_seed(state)
        before = torch.get_rng_state()
        fused = pm.consolidate(wear, ["g"], ["a"], approximate=how)
        assert torch.equal(before, torch.get_rng_state())
        assert not len(pyro.get_param_store())
        g = poutine.trace(fused).get_trace().nodes["g"]["fn"]
        return g.log_prob(torch.tensor([0.5, 1.0, 4.0])), dict(fused.method)

    first, said = law(0, 1)
    again, said_again = law(0, 2)
    other, _ = law(1, 1)
    assert torch.equal(first, again) and said == said_again
    assert not torch.allclose(first, other)


def test_too_much_is_infeasible():
    how = pm.Approximation(1e-4, **TINY)
    with pytest.raises(pm.Infeasible) as caught:
        pm.consolidate(wear, ["g"], ["a"], approximate=how)
    message = str(caught.value)
    assert "0.0001" in message and "Kolmogorov-Smirnov" in message
    assert "under" in message and "Approximation" in message
    assert re.search(r"is 0\.\d+ away", message)


def test_marginalization():
    how = pm.Approximation(0.15, draws=2000, steps=150)
    fused = pm.consolidate(wear, ["g"], approximate=how)
    assert fused.sites == ("g",)
    check(wear, fused, ["g"], epsilon=0.15)
    with pytest.raises(pm.InterventionNotAllowed):
        poutine.do(fused, {"a": torch.tensor(1.0)})()


def test_explicit_interventions():
    how = pm.Approximation(0.15, draws=2000, steps=150)
    fused = pm.consolidate(wear, ["g"], [{"a": 5.0}], approximate=how)
    check(wear, fused, ["g"], {"a": 5.0}, 0.15)
    check(wear, fused, ["g"], {}, 0.15)
    with pytest.raises(pm.InterventionNotAllowed):
        poutine.do(fused, {"a": torch.tensor(4.0)})()


def test_what_can_be_fused_is_not_learned():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(2 * a, 1.0))
        pyro.sample("c", dist.Normal(b, 1.0))

    fused = pm.consolidate(model, ["a", "c"], ["b"], approximate=1e-9)
    assert not any("learned" in how for how in fused.method.values())
    c = poutine.trace(poutine.condition(fused, {"a": torch.tensor(3.0)}))
    c = c.get_trace().nodes["c"]["fn"]
    assert float(c.mean) == pytest.approx(6.0) and float(c.variance) == pytest.approx(2)


def test_exact_laws_stay_exact():
    """Only what depends on sites that are gone is learned."""

    def model():
        x = pyro.sample("x", dist.Normal(1.0, 1.0))
        m = pyro.sample("m", dist.Normal(2 * x, 1.0))
        pyro.sample("y", dist.Normal(3 * m, 2.0))
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("g", dist.Gamma(2.0 + a, 1.0))

    how = pm.Approximation(0.9, **TINY)
    fused = pm.consolidate(model, ["x", "y", "g"], ["m"], approximate=how)
    assert fused.sites == ("x", "y", "g")
    y = poutine.trace(poutine.condition(fused, {"x": torch.tensor(3.0)}))
    y = y.get_trace().nodes["y"]["fn"]
    assert float(y.mean) == pytest.approx(18.0, 1e-9)
    assert float(y.variance) == pytest.approx(13.0, 1e-9)
    learned = [names for names, how in fused.method.items() if "learned" in how]
    assert learned == ["g"]


def test_categories():
    def model():
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        c = pyro.sample(
            "c", dist.Categorical(logits=torch.stack([a, 2 - a, 0 * a], -1))
        )
        pyro.sample("y", dist.Normal(torch.log(a) * c, 0.5))

    how = pm.Approximation(0.15, draws=2000, steps=150)
    fused = pm.consolidate(model, ["c", "y"], ["a"], approximate=how)
    nodes = poutine.trace(fused).get_trace().nodes
    assert nodes["c"]["value"].dtype == torch.long
    assert nodes["c"]["fn"].enumerate_support().tolist() == [0, 1, 2]
    check(model, fused, ["c", "y"], {}, 0.15)
    check(model, fused, ["c", "y"], {"a": 3.0}, 0.15)


def test_observed_sites_have_their_density():
    """Against the integral over what is gone."""

    def model(y=None):
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(a, 0.7), obs=y)

    seen = {"y": torch.tensor(1.5)}
    how = pm.Approximation(0.1, **SMALL)
    fused = pm.consolidate(model, [], ["a"], approximate=how, model_kwargs=seen)
    assert fused.sites == ("y",)
    grid = torch.linspace(1e-4, 25.0, 20_001)
    prior = dist.Gamma(2.0, 1.0).log_prob(grid)
    for y in (0.5, 1.5, 4.0):
        found = poutine.trace(fused).get_trace(y=torch.tensor(y))
        found.compute_log_prob()
        assert found.nodes["y"]["is_observed"] and found.nodes["y"]["value"] == y
        joint = prior + dist.Normal(grid, 0.7).log_prob(torch.tensor(y))
        wanted = torch.trapezoid(joint.exp(), grid)
        density = math.exp(float(found.nodes["y"]["log_prob"]))
        assert density == pytest.approx(float(wanted), rel=0.2)


def test_a_program_that_branches():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.sample("b", dist.Normal(1.0, 0.5) if a > 0 else dist.Normal(-a, 0.3))
        pyro.sample("c", dist.Normal(a + b, 0.5))

    how = pm.Approximation(0.2, draws=600, steps=150)
    fused = pm.consolidate(model, ["c"], approximate=how)
    assert fused.sites == ("c",)
    pyro.set_rng_seed(3)
    true = [
        float(poutine.trace(model).get_trace().nodes["c"]["value"]) for _ in range(1000)
    ]
    found = draws(fused, ["c"])["c"]
    assert distance(np.array(true), found) < 0.2 + 1.95 * 1000**-0.5


# Sites that are gone may have acted on several that are kept


def confounded():
    """h acts on both; x does not act on y."""
    h = pyro.sample("h", dist.Uniform(-2.0, 2.0))
    pyro.sample("x", dist.Normal(h + h**3 / 8, 0.3))
    pyro.sample("y", dist.Normal(2 * torch.tanh(h), 0.3))


@functools.cache
def fused_confounded():
    how = pm.Approximation(0.15, draws=3000, steps=200)
    return pm.consolidate(confounded, ["x", "y"], ["h"], approximate=how)


def test_common_causes_that_are_gone_correlate():
    check(confounded, fused_confounded(), ["x", "y"], epsilon=0.15)
    check(confounded, fused_confounded(), ["x", "y"], {"h": 1.0}, 0.15)


def test_do_on_a_kept_site_is_right_or_refused():
    """It tells nothing of its causes."""
    try:
        found = draws(fused_confounded(), ["y"], {"x": 2.0})["y"]
    except pm.PyroMacroError:
        return
    wanted = draws(confounded, ["y"], {"x": 2.0})["y"]
    assert distance(found, wanted) < 0.15 + CHANCE


# What is learned was learned once


@pytest.mark.parametrize("kind", ["argument", "parameter"])
def test_what_is_learned_holds_for_what_it_was_learned_with(kind):
    """Of other arguments and parameters it is learned anew, or refused."""

    def model(t):
        shift = t if kind == "argument" else pyro.param("shift", t)
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(torch.sin(a) + shift, 0.5))

    how = pm.Approximation(0.2, draws=1000, steps=100)
    try:
        args = (torch.tensor(0.0),)
        fused = pm.consolidate(model, ["y"], approximate=how, model_args=args)
        if kind == "parameter":
            pyro.clear_param_store()
            pyro.param("shift", torch.tensor(5.0))
        pyro.set_rng_seed(0)
        with pyro.plate("draws", 2000), torch.no_grad():
            y = poutine.trace(fused).get_trace(torch.tensor(5.0)).nodes["y"]["value"]
    except pm.PyroMacroError:
        return
    assert float(y.mean()) == pytest.approx(5.5, abs=0.4)


# What cannot be learned


def test_vectors_are_refused():
    def model():
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        pyro.sample("y", dist.Normal(a * torch.ones(2), 1.0).to_event(1))

    with pytest.raises(pm.UnsupportedLaw, match="'y' has 2 elements"):
        pm.consolidate(model, ["y"], approximate=0.1)


def test_plates_of_the_program_are_refused():
    def model():
        with pyro.plate("plate", 3):
            a = pyro.sample("a", dist.Gamma(2.0, 1.0))
            pyro.sample("y", dist.Normal(torch.sin(a), 1.0))

    with pytest.raises(pm.UnsupportedLaw, match="'y' has 3 elements"):
        pm.consolidate(model, ["y"], ["a"], approximate=0.1)


@pytest.mark.parametrize("kind", ["counts", "truth", "whole", "moving support"])
def test_other_supports_are_refused(kind):
    def model():
        a = pyro.sample("a", dist.Gamma(2.0, 1.0))
        if kind == "counts":
            pyro.sample("y", dist.Poisson(a))
        elif kind == "truth":
            pyro.deterministic("y", a > 1.0)
        elif kind == "whole":
            pyro.deterministic("y", a.long())
        else:
            pyro.sample("y", dist.Uniform(-a, 1.0))

    how = pm.Approximation(0.5, **TINY)
    try:
        fused = pm.consolidate(model, ["y"], ["a"], approximate=how)
    except pm.UnsupportedLaw as error:
        assert "'y'" in str(error)
        return
    names = ["y"]
    values = draws(fused, names)["y"]
    if kind != "moving support":
        assert set(values) <= set(draws(model, names)["y"])
    check(model, fused, names, {}, 0.5)
    # Where the support moves, all of it has to be possible
    assert values.min() < -2.5 or kind != "moving support"


# At full size


@pytest.mark.slow
def test_the_default_size():
    fused = pm.consolidate(mill, ["x", "k", "g"], ["b"], approximate=0.05)
    for made in ({}, {"b": 1.0}, {"b": -1.0}):
        check(mill, fused, ["x", "k", "g"], made, 0.05)
    for x in (-1.0, 1.0):
        check(mill, fused, ["k", "g"], {"x": x}, 0.08)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_other_seeds(seed):
    how = pm.Approximation(0.15, draws=10_000, steps=1000, seed=seed)
    fused = pm.consolidate(mill, ["k", "g"], ["a", "b"], approximate=how)
    assert fused.sites == ("k", "g")
    for made in ({}, {"a": 1.0}, {"b": 1.0}, {"a": 3.0, "b": -1.0}):
        check(mill, fused, ["k", "g"], made, 0.15 + 0.05 * (len(made) > 1))
