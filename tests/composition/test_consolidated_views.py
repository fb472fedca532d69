# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Consolidated modules, copies of consolidated programs, and views of them.

Views are ``render_model``, ``get_dependencies`` and ``get_model_relations``, which run
a program on tensors that carry their provenance, without validation.
"""

import copy
import io
import pickle
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.infer.inspect import get_dependencies, get_model_relations, render_model
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import constraints

import pyro_macro as pm

from .consolidated import (
    KEPT,
    MARKET,
    SETTINGS,
    TOLERANCE,
    assert_same_law,
    done,
    fused_market,
    gaussian_law,
    tensors,
    weather,
    weather_table,
)
from .models import assert_same_program, replayed, stochastic

Y = {"y": torch.tensor(6.0, dtype=torch.float64)}
VALUES = pytest.mark.parametrize("values", SETTINGS, ids=str)


# Modules


class Market(PyroModule):
    """The market, its numbers as parameters; sites are samples of the module."""

    def __init__(self):
        super().__init__()
        self.weight = PyroParam(torch.tensor(2.0))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
        self.h = PyroSample(dist.Normal(1.0, 1.5))
        self.a = PyroSample(lambda self: dist.Normal(self.weight * self.h, 1.0))
        self.m = PyroSample(lambda self: dist.Normal(self.a - self.h, self.scale))

    def forward(self, y=None):
        b = pyro.sample("b", dist.Normal(0.5 * self.m + self.h, 1.2))
        return pyro.sample("y", dist.Normal(b + self.m + 3, 0.7), obs=y)


class Network(torch.nn.Module):
    """A module of torch: what it learns is no Pyro parameter."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(1, 1).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, y=None):
        self.calls += 1
        weight = self.linear(torch.ones(1)).squeeze()
        h = pyro.sample("h", dist.Normal(1.0, 1.5))
        a = pyro.sample("a", dist.Normal(weight * h, 1.0))
        m = pyro.sample("m", dist.Normal(a - h, 0.5))
        b = pyro.sample("b", dist.Normal(0.5 * m + h, 1.2))
        return pyro.sample("y", dist.Normal(b + m + 3, 0.7), obs=y)


def weight_of(module):
    if isinstance(module, Network):
        return module.linear(torch.ones(1)).squeeze()
    return module.weight


def by_hand(module, values=None):
    """The module's program fused by hand, with the parameters of the module."""

    def program(y=None):
        law = MARKET.with_weight("a", "h", weight_of(module))
        if isinstance(module, Market):
            law = law.with_scale("m", module.scale)
        return law.emit(KEPT, values or {}, y)

    return program


@pytest.fixture(params=[Market, Network], ids=["PyroModule", "Module"])
def module(request):
    return request.param()


@VALUES
def test_module_is_fused(module, values):
    fused = fused_market(module)
    assert fused.sites == KEPT
    assert fused.unfused is module
    model = done(fused, tensors(values))
    assert_same_program(model, by_hand(module, values), macros=("m",))
    y = torch.tensor(6.0)
    assert_same_program(model, by_hand(module, values), y, macros=("m",))


def test_module_exposes_its_parameters(module):
    fused = fused_market(module)
    assert isinstance(fused, torch.nn.Module)
    found = {id(p) for p in fused.parameters()}
    assert found == {id(p) for p in module.parameters()} != set()
    names = {name.split(".")[-1] for name, _ in fused.named_parameters()}
    assert names == {name.split(".")[-1] for name, _ in module.named_parameters()}


def test_module_passes_mode_dtype_and_state_on(module):
    fused = fused_market(module)
    fused.eval()
    assert not module.training
    fused.train()
    assert module.training
    state = copy.deepcopy(fused.state_dict())
    before = weight_of(module).item()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(1.0)
    assert weight_of(module).item() != before
    fused.load_state_dict(state)
    assert weight_of(module).item() == before
    found = gaussian_law(fused, KEPT)
    torch.testing.assert_close(found, gaussian_law(by_hand(module), KEPT), **TOLERANCE)


@VALUES
def test_module_follows_its_parameters(module, values):
    """They may be trained, loaded or set after the program was fused."""
    fused = done(fused_market(module), tensors(values))
    for step in (0.0, 1.0, -3.0):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(step)
        found = gaussian_law(fused, KEPT)
        wanted = gaussian_law(by_hand(module, values), KEPT)
        torch.testing.assert_close(found, wanted, **TOLERANCE)


@VALUES
def test_module_has_the_gradients_of_the_module_by_hand(module, values):
    y = torch.tensor(6.0)
    model = done(fused_market(module), tensors(values))
    trace = poutine.trace(model).get_trace(y)
    for node in stochastic(trace).values():
        node["value"] = node["value"].detach()
    gradients = []
    for program in (
        poutine.replay(model, trace=trace),
        replayed(by_hand(module, values), trace),
    ):
        module.zero_grad()
        poutine.trace(program).get_trace(y).log_prob_sum().backward()
        # Where m is set, its scale does not matter
        grads = [p.grad for p in module.parameters()]
        gradients.append([0.0 if g is None else g.item() for g in grads])
    assert any(gradients[1])
    assert all(gradients[1]) or values
    torch.testing.assert_close(*gradients, **TOLERANCE)


def test_module_is_trained_by_an_optimizer_of_torch(module):
    fused = pm.consolidate(module, ["y"])
    y = torch.tensor(6.0)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.01)
    elbo, losses = Trace_ELBO(), []
    for _ in range(5):
        optimizer.zero_grad()
        loss = elbo.differentiable_loss(fused, lambda y: None, y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1]


def test_module_is_trained_by_svi():
    module = Market()
    fused = fused_market(module)
    guide = AutoNormal(fused)
    before = module.weight.detach().clone()
    svi = SVI(fused, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(torch.tensor(6.0))
    assert not torch.equal(module.weight.detach(), before)


def test_module_leaves_in_the_param_store_what_it_always_does():
    Market()()
    wanted = set(pyro.get_param_store().keys())
    pyro.clear_param_store()
    fused = fused_market(Market())
    assert not set(pyro.get_param_store().keys())
    fused()
    found = {name.removeprefix("unfused.") for name in pyro.get_param_store()}
    assert found in (wanted, set())


def test_module_that_is_registered_in_the_program():
    linear = torch.nn.Linear(1, 1).double()

    def model():
        net = pyro.module("net", linear)
        h = pyro.sample("h", dist.Normal(net(torch.ones(1)).squeeze(), 1.0))
        pyro.sample("a", dist.Normal(h, 1.0))

    def wanted():
        net = pyro.module("net", linear)
        mean = net(torch.ones(1)).squeeze()
        pyro.sample("a", dist.Normal(mean, 2.0**0.5))

    fused = pm.consolidate(model, "a")
    assert not set(pyro.get_param_store().keys())
    fused()
    assert set(pyro.get_param_store().keys()) == {"net$$$weight", "net$$$bias"}
    assert_same_program(fused, wanted)
    svi = SVI(
        poutine.condition(fused, {"a": torch.tensor(5.0)}),
        lambda: None,
        pyro.optim.Adam({"lr": 0.1}),
        Trace_ELBO(),
    )
    before = linear.bias.detach().clone()
    svi.step()
    assert linear.bias > before
    assert_same_program(fused, wanted)


def test_module_in_a_module_is_consolidated_as_a_part():
    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = fused_market(Market())

        def forward(self, y=None):
            return self.inner(y)

    outer = Outer()
    assert len(list(outer.parameters())) == 2
    for values in SETTINGS:
        model = done(outer, tensors(values))
        trace = poutine.trace(model).get_trace()
        names = [n for n in stochastic(trace) if n not in values]
        assert [n.split(".")[-1] for n in names] == list(KEPT)
        found = gaussian_law(model, names)
        torch.testing.assert_close(found, MARKET.law(KEPT, values), **TOLERANCE)
    with pytest.raises(pm.InterventionNotAllowed, match="do\\(h"):
        poutine.do(outer, data=tensors({"h": 1.0}))()


def test_module_with_a_module_inside_is_consolidated_as_a_whole():
    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = Market()

        def forward(self, y=None):
            return self.inner(y)

    # Samples of an inner module have its name in front; sites of its call do not
    keep = ["inner.a", "b", "y"]
    outer = Outer()
    fused = pm.consolidate(outer, keep, allow=["inner.m"])
    assert list(fused.sites) == keep
    for values in SETTINGS:
        data = {f"inner.{n}": torch.tensor(v) for n, v in values.items()}
        found = gaussian_law(done(fused, data), keep)
        torch.testing.assert_close(found, MARKET.law(KEPT, values), **TOLERANCE)


def test_module_buffers_are_as_if_it_had_not_been_read():
    module = Network()
    fused = fused_market(module)
    assert module.calls == 0
    fused()
    assert module.calls <= 1


class Normed(torch.nn.Module):
    """In training the statistics are those of the batch, afterwards running ones."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(1)
        self.linear = torch.nn.Linear(1, 1)
        self.register_buffer("level", torch.zeros(()))

    def forward(self, x):
        loc = self.norm(self.linear(x)).square().mean() + self.level
        h = pyro.sample("h", dist.Normal(loc, torch.ones_like(loc)))
        pyro.sample("a", dist.Normal(h, torch.ones_like(loc)))


def test_module_follows_its_mode_and_its_buffers():
    module, x = Normed(), torch.tensor([[1.0], [2.0], [6.0]])
    fused = pm.consolidate(module, "a", model_args=(x,))

    def agree():
        found = poutine.trace(fused).get_trace(x).nodes["a"]["fn"].mean
        wanted = poutine.trace(module).get_trace(x).nodes["h"]["fn"].mean
        torch.testing.assert_close(found, wanted, **TOLERANCE)

    agree()
    fused.eval()
    agree()
    module.level.fill_(3.0)
    agree()
    module.norm.running_mean.add_(1.0)
    agree()
    state = {k: v + 1 for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    agree()
    module.train()
    agree()


def test_module_follows_its_dtype():
    class Level(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.level = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self):
            one = torch.ones((), dtype=self.level.dtype)
            h = pyro.sample("h", dist.Normal(self.level * one, one))
            pyro.sample("a", dist.Normal(h * one, one))

    fused = pm.consolidate(Level(), "a")
    for dtype in (torch.float64, torch.float32, torch.float64):
        fused.to(dtype)
        node = poutine.trace(fused).get_trace().nodes["a"]
        assert node["value"].dtype == dtype
        assert node["fn"].mean == 2.0


def test_module_under_predictive_and_do():
    fused = fused_market(Market())
    out = Predictive(poutine.do(fused, data=tensors({"m": 1.5})), num_samples=6)()
    assert set(out) == {*KEPT, "m"}
    assert (out["m"] == 1.5).all()


def test_parameters_that_are_no_pyro_parameters_are_followed():
    """A model closes over a tensor that is trained elsewhere."""
    weight = torch.tensor(2.0, requires_grad=True)

    def model():
        h = pyro.sample("h", dist.Normal(1.0, 1.5))
        a = pyro.sample("a", dist.Normal(weight * h, 1.0))
        pyro.sample("b", dist.Normal(a + h, 1.0))

    fused = pm.consolidate(model, ["a", "b"])
    for value in (2.0, -1.0, 0.0):
        with torch.no_grad():
            weight.fill_(value)
        assert_same_law(fused, model, ["a", "b"])
    data = poutine.condition(fused, tensors({"a": 1.0, "b": 2.0}))
    found = poutine.trace(data).get_trace().log_prob_sum()
    (gradient,) = torch.autograd.grad(found, weight)
    assert gradient != 0


# Copies


@VALUES
@pytest.mark.parametrize("how", ["copy", "deepcopy", "pickle", "torch"])
def test_copy_is_the_same_program(how, values):
    """As models that are functions of a module can be."""
    fused = fused_market()
    if how == "copy":
        other = copy.copy(fused)
    elif how == "deepcopy":
        other = copy.deepcopy(fused)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fused))
    else:
        buffer = io.BytesIO()
        torch.save(fused, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    for run in (other, fused):
        model = done(run, tensors(values))
        assert_same_program(model, MARKET.fused(KEPT, **values), macros=("m",))
        with pytest.raises(pm.InterventionNotAllowed):
            poutine.do(run, data=tensors({"h": 1.0}))()
    assert other.sites == fused.sites


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copy_of_a_finite_program(how):
    fused = pm.consolidate(weather, ["a", "b"], ["m"])
    fused()
    other = copy.deepcopy(fused) if how == "deepcopy" else None
    other = other or pickle.loads(pickle.dumps(fused))
    for values in ({}, {"m": 2}):
        draw = poutine.trace(done(other, tensors(values))).get_trace()
        a = int(draw.nodes["a"]["value"])
        table = weather_table(["a", "b"], values)
        found = draw.nodes["b"]["fn"].probs
        torch.testing.assert_close(found, table[a, 1] / table[a].sum(), **TOLERANCE)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("run_before", [False, True])
def test_copy_of_a_module_has_parameters_of_its_own(how, run_before):
    module = Network()
    fused = fused_market(module)
    if run_before:
        fused()
    if how == "deepcopy":
        other = copy.deepcopy(fused)
    else:
        other = pickle.loads(pickle.dumps(fused))
    pairs = zip(fused.parameters(), other.parameters(), strict=True)
    for mine, yours in pairs:
        assert mine is not yours
        assert torch.equal(mine, yours)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    copied = other.unfused
    for run, of in ((other, copied), (fused, module)):
        found = gaussian_law(run, KEPT)
        torch.testing.assert_close(found, gaussian_law(by_hand(of), KEPT), **TOLERANCE)


def test_copy_of_a_pyro_module_shares_the_param_store_as_in_pyro():
    """Of one name there is one parameter: the store ties a module and its copies."""
    fused = fused_market(Market())
    other = copy.deepcopy(fused)
    other()
    with torch.no_grad():
        other.unfused.weight_unconstrained.fill_(-1.0)
    law = MARKET.with_weight("a", "h", -1.0)
    for run in (other, fused):
        found = gaussian_law(run, KEPT)
        torch.testing.assert_close(found, law.law(KEPT, {}), **TOLERANCE)


# Views


def parents(model, **kwargs):
    relations = get_model_relations(model, (), kwargs)
    return {name: set(above) for name, above in relations["sample_sample"].items()}


def edges(model, deterministic=False):
    graph = render_model(model, model_kwargs=Y, render_deterministic=deterministic)
    return set(re.findall(r"^\t(\S+) -> (\S+)$", graph.source, re.MULTILINE))


def test_relations_are_those_of_what_is_left():
    assert parents(fused_market(), **Y) == {"a": set(), "b": {"a"}, "y": {"a", "b"}}


def test_relations_of_a_fused_site_that_is_set():
    """It has no causes; a tells nothing of y any more that b does not."""
    found = parents(poutine.do(fused_market(), data=tensors({"m": 1.5})), **Y)
    assert {name: above - {"m"} for name, above in found.items()} == {
        "m": set(),
        "a": set(),
        "b": {"a"},
        "y": {"b"},
    }


def test_relations_show_what_a_kept_site_that_is_set_cuts_off():
    fused = pm.consolidate(chain, ["a", "b", "y"])
    assert parents(fused, **Y) == {"a": set(), "b": {"a"}, "y": {"b"}}
    found = parents(poutine.do(fused, data=tensors({"b": 1.0})), **Y)
    assert found["y"] == set()


def test_relations_of_a_finite_program():
    fused = pm.consolidate(weather, ["a", "b", "y"])
    assert parents(fused, **Y) == {"a": set(), "b": {"a"}, "y": {"a", "b"}}


def test_relations_of_a_program_with_parameters():
    fused = fused_market(Market())
    found = parents(fused, **Y)
    assert found == {"a": set(), "b": {"a"}, "y": {"a", "b"}}


def chain(y=None):
    """Given the middle of it, its ends are independent."""
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    h = pyro.sample("h", dist.Normal(a, 1.0))
    b = pyro.sample("b", dist.Normal(h, 1.0))
    m = pyro.sample("m", dist.Normal(b, 1.0))
    pyro.sample("y", dist.Normal(m, 1.0), obs=y)


def test_rendered_edges_are_those_of_what_is_left():
    fused = pm.consolidate(chain, ["a", "b", "y"], ["m"])
    assert edges(chain) == {("a", "h"), ("h", "b"), ("b", "m"), ("m", "y")}
    assert edges(fused) == {("a", "b"), ("b", "y")}
    assert edges(fused_market()) == {("a", "b"), ("a", "y"), ("b", "y")}


def test_rendered_edges_of_a_program_with_a_plate():
    def model(y=None):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with pyro.plate("n", 3, dim=-1):
            h = pyro.sample("h", dist.Normal(t, 1.0))
            pyro.sample("y", dist.Normal(h, 1.0), obs=y)

    fused = pm.consolidate(model, ["t", "y"])
    graph = render_model(fused, model_kwargs={"y": torch.zeros(3)})
    assert "t -> y" in graph.source
    assert "cluster_n" in graph.source
    assert "label=n" in graph.source


def test_rendering_shows_parameters():
    def model():
        loc = pyro.param("loc", torch.tensor(0.0))
        h = pyro.sample("h", dist.Normal(loc, 1.0))
        pyro.sample("a", dist.Normal(h, 1.0))

    fused = pm.consolidate(model, "a")
    source = render_model(fused, render_params=True).source
    assert "loc" in source
    assert "loc -> a" in source


@VALUES
def test_dependencies_are_those_of_what_is_left(values):
    """That of y on a is through h and m: where m is set, nothing is left of it."""
    model = done(fused_market(), tensors(values))
    found = get_dependencies(model, model_kwargs=Y)
    rows = {
        kind: {
            name: set(above) - set(values)
            for name, above in found[kind].items()
            if name not in values
        }
        for kind in ("prior_dependencies", "posterior_dependencies")
    }
    y = {"b", "y"} if values else {"a", "b", "y"}
    assert rows["prior_dependencies"] == {"a": {"a"}, "b": {"a", "b"}, "y": y}
    a = {"a", "b"} if values else {"a", "b", "y"}
    assert rows["posterior_dependencies"] == {"a": a, "b": {"b", "y"}}


def test_dependencies_of_a_chain():
    fused = pm.consolidate(chain, ["a", "b", "y"])
    found = get_dependencies(fused, model_kwargs=Y)["prior_dependencies"]
    assert {n: set(above) for n, above in found.items()} == {
        "a": {"a"},
        "b": {"a", "b"},
        "y": {"b", "y"},
    }


def test_views_leave_the_program_as_it_was():
    """What they run on must not stay behind in tables that are remembered."""
    fused = fused_market(allow=["m", "h"])
    render_model(fused, model_kwargs=Y)
    render_model(poutine.do(fused, data=tensors({"m": 1.5})), model_kwargs=Y)
    get_dependencies(fused, model_kwargs=Y)
    for values in ({}, {"m": 1.5}, {"h": 0.0}):
        found = gaussian_law(done(fused, tensors(values)), KEPT)
        torch.testing.assert_close(found, MARKET.law(KEPT, values), **TOLERANCE)
    trace = poutine.trace(fused).get_trace()
    assert type(trace.nodes["y"]["value"]) is torch.Tensor


def test_views_of_a_program_that_is_consolidated_within_them():
    def model(y=None):
        return fused_market()(y)

    assert edges(model) == {("a", "b"), ("a", "y"), ("b", "y")}
