# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Readings that are kept for the next run, if the program is the same.

``z -> x1`` and ``x2`` are Gaussian, of variance 4 and 1 with ``z`` integrated out, so
that the law of the micro state given its total tells the mean of ``z``. How many ways
there are for a function to change is for ``test_unchanged``; here are those of Pyro.
"""

import contextlib
import copy
import functools
import gc
import pickle
import random
import weakref

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.stats
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.infer.inspect import get_dependencies, get_model_relations
from pyro.infer.reparam import LocScaleReparam
from pyro.nn import PyroModule, PyroParam, PyroSample
from pyro.poutine.runtime import get_plates

import pyro_macro as pm
from pyro_macro import remembered
from pyro_macro.intervention import Ahead

from .models import NATURAL, SALES, stochastic

BEFORE, AFTER = 10.0, 15.0


@pytest.fixture
def reads(monkeypatch):
    """One entry for each time that a program is read."""
    found, targets = [], Ahead.targets

    def counted(self):
        found.append(1)
        return targets(self)

    monkeypatch.setattr(Ahead, "targets", counted)
    return found


def sites(mean):
    mean = torch.as_tensor(mean, dtype=torch.float64)
    z = pyro.sample("z", dist.Normal(mean, 3**0.5))
    pyro.sample("x1", dist.Normal(z, 1.0))
    pyro.sample("x2", dist.Normal(20.0, 1.0).expand(mean.shape))


def program(mean):
    """A model whose mean is what a function returns."""

    def model(*args, **kwargs):
        sites(mean(*args, **kwargs))

    return model


def law(intervened, *args, **kwargs):
    nodes = poutine.trace(intervened).get_trace(*args, **kwargs).nodes
    return nodes["sales__micro"]["fn"]


def wanted(mean, value=33.0):
    """The mean of the micro state, in closed form."""
    mean = torch.as_tensor(mean)
    first = mean + 4 / 5 * (value - 20 - mean)
    return torch.stack([first, value - first], -1)


def assert_mean(intervened, mean, *args, **kwargs):
    found = law(intervened, *args, **kwargs).mean.detach()
    torch.testing.assert_close(found, wanted(mean))


def assert_same_runs(one, other, *args, **kwargs):
    """With the same seed: the same values and densities, bit for bit."""
    traces = []
    for intervened in (one, other):
        pyro.set_rng_seed(5)
        traces.append(poutine.trace(intervened).get_trace(*args, **kwargs))
        traces[-1].compute_log_prob()
    assert list(traces[0].nodes) == list(traces[1].nodes)
    for name, node in stochastic(traces[0]).items():
        for which in ("value", "log_prob"):
            torch.testing.assert_close(
                node[which], traces[1].nodes[name][which], rtol=0, atol=0
            )
    return traces[0]


# What is ordinary is read once

MEANS = torch.tensor([BEFORE, 20.0], dtype=torch.float64)
SCALE = torch.tensor(1.0, dtype=torch.float64)


def over_globals():
    sites(MEANS[0] * SCALE)


def _shifted(mean):
    return mean + _shift()


def _shift():
    return 4 * SCALE


def with_helpers():
    sites(_shifted(torch.tensor(6.0)))


def with_arguments(mean, *, scale=1.0):
    sites(mean * scale)


def over_a_closure():
    mean = torch.tensor(BEFORE)
    return lambda: sites(mean)


class Layer(torch.nn.Module):
    def __init__(self, mean=BEFORE):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False).requires_grad_(False)
        self.layer.weight.fill_(mean)
        self.register_buffer("factor", torch.tensor(1.0))
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self):
        sites(self.factor * self.layer(self.dropout(torch.ones(1)))[0])


def in_plates():
    with pyro.plate("days", 3) as day:
        sites(torch.tensor([BEFORE, AFTER, 20.0])[day])


def parts(mean=MEANS):
    pyro.sample("x1", dist.Normal(mean[0], 2.0))
    pyro.sample("x2", dist.Normal(mean[1], 1.0))


def counts(mean=MEANS):
    pyro.sample("x1", dist.Poisson(mean[0]))
    pyro.sample("x2", dist.Poisson(mean[1]))


def coins(mean=MEANS):
    kind = pyro.sample("kind", dist.Bernoulli(mean[0] / 30))
    pyro.sample("x1", dist.Bernoulli(0.2 + 0.5 * kind))
    pyro.sample("x2", dist.Bernoulli(mean[1] / 30))


MODELS = {
    "globals": lambda: over_globals,
    "helpers": lambda: with_helpers,
    "closure": over_a_closure,
    "default argument": lambda: lambda mean=torch.tensor(BEFORE): sites(mean),
    "partial": lambda: functools.partial(sites, torch.tensor(BEFORE)),
    "module": lambda: Layer().eval(),
    "condition": lambda: poutine.condition(over_globals, {"other": SCALE}),
    "do": lambda: poutine.do(over_globals, {"other": SCALE}),
    "mask": lambda: poutine.mask(over_globals, True),
    "scale": lambda: poutine.scale(over_globals, 2.0),
    "block": lambda: poutine.block(over_globals, hide=["other"]),
    "infer_config": lambda: poutine.infer_config(over_globals, lambda site: {}),
    "aggregate": lambda: pm.aggregate(
        over_globals, [pm.MacroVariable("other", ["z", "x2"])]
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_ordinary_models_are_read_once(name, reads):
    model = MODELS[name]()
    intervened = pm.macro_do(model, NATURAL)
    for _ in range(3):
        assert_mean(intervened, BEFORE)
    assert len(reads) == 1
    assert_same_runs(intervened, pm.macro_do(model, NATURAL))
    assert len(reads) == 2


def test_models_in_whole_plates_are_read_once(reads):
    intervened = pm.macro_do(in_plates, NATURAL)
    for _ in range(3):
        assert_mean(intervened, [BEFORE, AFTER, 20.0])
    assert len(reads) == 1
    assert_same_runs(intervened, pm.macro_do(in_plates, NATURAL))


def test_equal_arguments_are_read_once(reads):
    intervened = pm.macro_do(with_arguments, NATURAL)
    kept = torch.tensor(5.0)
    for _ in range(3):
        assert_mean(intervened, BEFORE, kept, scale=2)
        assert_mean(intervened, AFTER, kept, scale=3)
    assert len(reads) == 2


def _point(total):
    return dist.Delta(total * torch.tensor([0.4, 0.6])).to_event(1)


REALIZATIONS = {
    "Natural": (parts, pm.Natural(33.0)),
    "Natural, counts": (counts, pm.Natural(33)),
    "Natural, mixture": (coins, pm.Natural(1.0)),
    "Residual": (parts, pm.Residual(33.0, "x2")),
    "Shift": (parts, pm.Shift(2.0)),
    "Shift, along": (parts, pm.Shift(2.0, along=[0.5, 0.5])),
    "Proportional": (parts, pm.Proportional(33.0)),
    "Allocate": (parts, pm.Allocate(33.0, [0.4, 0.6])),
    "Explicit": (parts, pm.Explicit(33.0, _point)),
    "MaxEntropy": (coins, pm.MaxEntropy(1.0)),
}


@pytest.fixture(params=list(REALIZATIONS))
def realized(request):
    model, realization = REALIZATIONS[request.param]
    return model, {SALES: realization}


def test_realizations_are_read_once_and_drawn_afresh(realized, reads):
    intervened = pm.macro_do(*realized)
    nodes = [poutine.trace(intervened).get_trace().nodes for _ in range(20)]
    assert len(reads) == 1
    draws = {float(each["x1"]["value"]) for each in nodes}
    assert (len(draws) > 1) == ("sales__micro" in nodes[0])
    assert_same_runs(intervened, pm.macro_do(*realized))


# A changed model has its own law


def _changed(make):
    """A model with a mean that is changed in place."""

    def case():
        mean = torch.tensor(BEFORE)
        return make(mean), functools.partial(mean.fill_, AFTER)

    return case


def _by_site():
    sites(pyro.sample("loc", dist.Normal(0.0, 1.0)))


def _by_parameter():
    sites(pyro.param("loc", torch.tensor(BEFORE)))


def _by_hidden_parameter():
    with poutine.block():
        loc = pyro.param("loc", torch.tensor(BEFORE))
    sites(loc)


def _by_hidden_function(param):
    def model():
        with poutine.block(hide_types=["param"]):
            loc = param("loc", torch.tensor(BEFORE)).detach()
        sites(loc)

    return model


def _stored(model):
    def change():
        pyro.get_param_store()["loc"] = torch.tensor(AFTER)

    return lambda: (model, change)


def _trained():
    def change():
        pyro.param("loc").unconstrained().data.fill_(AFTER)

    return _by_parameter, change


def _array_below_a_tensor():
    array = np.array([1.0, BEFORE])
    tensor = torch.from_numpy(array)
    return program(lambda: tensor[1]), lambda: array.fill(AFTER)


def _code():
    def mean():
        return BEFORE

    change = functools.partial(setattr, mean, "__code__", (lambda: AFTER).__code__)
    return program(mean), change


def _statements():
    names = ["a"]

    def model():
        found = [pyro.deterministic(f"d_{n}", torch.tensor(5.0)) for n in names]
        sites(5.0 + sum(found))

    return model, lambda: names.append("b")


def _size_of_a_plate():
    size = [10]

    def model():
        with pyro.plate("inside", size[0]) as index:
            d = pyro.deterministic("d", torch.ones(len(index)))
        sites(d.sum())

    return model, lambda: size.__setitem__(0, 15)


def _weight(train):
    def case():
        module = Layer().eval()
        module.layer.requires_grad_(train)
        return module, lambda: module.layer.weight.data.fill_(AFTER)

    return case


def _buffer():
    module = Layer().eval()
    return module, lambda: module.factor.fill_(1.5)


def _submodule():
    module = Layer().eval()
    return module, lambda: setattr(module, "layer", Layer(AFTER).layer)


def _distribution():
    normal = dist.Normal(torch.tensor(BEFORE), 3**0.5)

    def model():
        z = pyro.sample("z", normal)
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(20.0, 1.0))

    return model, lambda: setattr(normal, "loc", torch.tensor(AFTER))


def _data(handler):
    def case():
        data = {"loc": torch.tensor(BEFORE)}
        model = handler(_by_site, data)
        return model, lambda: data["loc"].fill_(AFTER)

    return case


def _dictionary():
    data = {"loc": torch.tensor(BEFORE)}
    model = poutine.condition(_by_site, data)
    return model, lambda: data.update(loc=torch.tensor(AFTER))


def _replayed():
    source = poutine.trace(lambda: pyro.sample("loc", dist.Normal(0.0, 1.0)))
    source = source.get_trace()
    source.nodes["loc"]["value"] = torch.tensor(BEFORE)

    def model():
        with poutine.block(), poutine.replay(trace=source):
            loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        sites(loc)

    return model, lambda: source.nodes["loc"]["value"].fill_(AFTER)


def _of_parameter():
    z = pyro.param("z", torch.tensor(0.0))
    pyro.sample("x1", dist.Normal(z, 1.0))
    pyro.sample("x2", dist.Normal(20.0, 1.0))


def _lifted(change):
    def case():
        prior = {"z": dist.Normal(torch.tensor(BEFORE), 3**0.5)}
        model = poutine.lift(_of_parameter, prior=prior)
        return model, lambda: change(prior)

    return case


def _reparametrized():
    mean = torch.tensor(BEFORE)
    config = {"z": LocScaleReparam(0.0)}
    model = poutine.reparam(program(lambda: mean), config)

    def change():
        mean.fill_(AFTER)
        config["z"] = LocScaleReparam(0.5)

    return model, change


def _inside(make):
    """A macro_do inside, which sets what the mean is made of."""
    inner = pm.MacroVariable("inner", ["u1", "u2"])

    def model():
        u1 = pyro.sample("u1", dist.Normal(1.0, 1.0))
        pyro.sample("u2", dist.Normal(2.0, 1.0))
        sites(u1)

    def case():
        realization, change = make()
        return pm.macro_do(model, {inner: realization}), change

    return case


def _inner_value():
    value = torch.tensor(2 * BEFORE)
    return pm.Allocate(value, [0.5, 0.5]), lambda: value.fill_(2 * AFTER)


def _inner_shares():
    shares = torch.tensor([0.5, 0.5])
    change = functools.partial(shares.copy_, torch.tensor([0.75, 0.25]))
    return pm.Allocate(2 * BEFORE, shares), change


def _inner_function():
    held = {"shares": torch.tensor([0.5, 0.5])}

    def point(total):
        return dist.Delta(total * held["shares"]).to_event(1)

    change = functools.partial(held.update, shares=torch.tensor([0.75, 0.25]))
    return pm.Explicit(2 * BEFORE, point), change


class Sampled(PyroModule):
    def __init__(self):
        super().__init__()
        self.mean = PyroParam(torch.tensor(BEFORE))
        self.z = PyroSample(lambda self: dist.Normal(self.mean, 3**0.5))

    def forward(self):
        pyro.sample("x1", dist.Normal(self.z, 1.0))
        pyro.sample("x2", dist.Normal(20.0, 1.0))


def _pyro_module(in_function):
    def case():
        module = Sampled()
        model = (lambda: module()) if in_function else module
        return model, lambda: module.mean.data.fill_(AFTER)

    return case


CHANGES = {
    "a tensor": _changed(lambda mean: program(lambda: mean)),
    "an array below a tensor": _array_below_a_tensor,
    "code": _code,
    "statements": _statements,
    "size of a plate": _size_of_a_plate,
    "observation": _changed(
        lambda mean: lambda: sites(pyro.sample("loc", dist.Normal(0.0, 1.0), obs=mean))
    ),
    "weight": _weight(False),
    "weight that is trained": _weight(True),
    "buffer": _buffer,
    "submodule": _submodule,
    "distribution": _distribution,
    "condition": _data(poutine.condition),
    "condition, dictionary": _dictionary,
    "do": _data(poutine.do),
    "substitute": _changed(
        lambda mean: poutine.substitute(_by_parameter, {"loc": mean})
    ),
    "replay": _replayed,
    "lift": _lifted(lambda p: p.update(z=dist.Normal(torch.tensor(AFTER), 3**0.5))),
    "lift, in place": _lifted(lambda p: p["z"].loc.fill_(AFTER)),
    "reparam": _reparametrized,
    "parameter": _stored(_by_parameter),
    "parameter that is trained": _trained,
    "parameter that is hidden": _stored(_by_hidden_parameter),
    "parameter that is hidden, by a name": _stored(_by_hidden_function(pyro.param)),
    "parameter that is hidden, by a partial": _stored(
        _by_hidden_function(functools.partial(pyro.param, event_dim=0))
    ),
    "PyroModule": _pyro_module(False),
    "PyroModule in a function": _pyro_module(True),
    "macro_do, value": _inside(_inner_value),
    "macro_do, shares": _inside(_inner_shares),
    "macro_do, function": _inside(_inner_function),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_model_has_its_own_law(name):
    model, change = CHANGES[name]()
    intervened = pm.macro_do(model, NATURAL)
    for _ in range(3):
        assert_mean(intervened, BEFORE)
    change()
    for _ in range(2):
        assert_mean(intervened, AFTER)
    assert_same_runs(intervened, pm.macro_do(model, NATURAL))


def test_a_module_in_training_is_another_one():
    module = Layer().eval()
    intervened = pm.macro_do(module, NATURAL)
    for _ in range(2):
        assert_mean(intervened, BEFORE)
    module.train()
    with pytest.raises(pm.PyroMacroError, match="outside of Pyro"):
        for _ in range(20):  # dropout
            intervened()
    module.eval()
    assert_mean(intervened, BEFORE)


# A changed intervention is another one


def _filled(make, value=33.0, other=36.0):
    """An intervention with a tensor that is overwritten."""

    def case():
        tensor = torch.tensor(value)
        change = functools.partial(tensor.copy_, torch.tensor(other))
        return {SALES: make(tensor)}, change

    return case


def _value_of_numpy():
    value = np.array(33.0)
    return {SALES: pm.Natural(value)}, functools.partial(value.fill, 36.0)


def _shares_in_a_list():
    shares = [0.4, 0.6]
    return {SALES: pm.Allocate(33.0, shares)}, shares.reverse


def _absorbed():
    absorb = ["x1"]
    change = functools.partial(absorb.__setitem__, 0, "x2")
    return {SALES: pm.Residual(33.0, absorb)}, change


def _custom():
    factor = {"of": 1.0}
    total = pm.Custom(lambda x: factor["of"] * x.sum(-1))
    macro = pm.MacroVariable("sales", ["x1", "x2"], aggregation=total)
    point = pm.Explicit(33.0, lambda value: _point(value / factor["of"]))
    return {macro: point}, functools.partial(factor.update, of=2.0)


def _of_the_instance():
    class Point:
        factor = 1.0

        def __call__(self, total):
            shares = torch.tensor([0.5, 0.5])
            shares = shares + self.factor * torch.tensor([0.1, -0.1])
            return dist.Delta(total * shares).to_event(1)

    point = Point()
    return {SALES: pm.Explicit(33.0, point)}, lambda: setattr(point, "factor", 2.0)


INTERVENTIONS = {
    "Natural": _filled(pm.Natural),
    "Natural, array": _value_of_numpy,
    "Residual": _filled(lambda value: pm.Residual(value, "x1")),
    "Residual, absorb": _absorbed,
    "Proportional": _filled(pm.Proportional),
    "Shift": _filled(pm.Shift),
    "Shift, along": _filled(lambda a: pm.Shift(2.0, a), [0.4, 0.6], [0.5, 0.5]),
    "Allocate": _filled(lambda value: pm.Allocate(value, [0.4, 0.6])),
    "Allocate, shares": _filled(lambda s: pm.Allocate(2.0, s), [0.4, 0.6], [0.5, 0.5]),
    "Allocate, list": _shares_in_a_list,
    "MaxEntropy": _filled(
        lambda m: pm.MaxEntropy(33.0, dist.MultivariateNormal(m, torch.eye(2))),
        [1.0, 2.0],
        [-5.0, 5.0],
    ),
    "Explicit": _filled(
        lambda s: pm.Explicit(33.0, lambda v: dist.Delta(v * s).to_event(1)),
        [0.4, 0.6],
        [0.5, 0.5],
    ),
    "Explicit, instance": _of_the_instance,
    "Custom": _custom,
}


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_a_changed_intervention_is_another_one(name):
    interventions, change = INTERVENTIONS[name]()
    intervened = pm.macro_do(parts, interventions)
    for _ in range(2):
        before = assert_same_runs(intervened, pm.macro_do(parts, interventions))
    change()
    for _ in range(2):
        after = assert_same_runs(intervened, pm.macro_do(parts, interventions))
    changed = [
        not torch.equal(before.nodes[name]["value"], after.nodes[name]["value"])
        for name in ("x1", "x2")
    ]
    assert any(changed)


@pytest.mark.parametrize("by", ["closure", "parameter", "hidden parameter"])
def test_what_is_downstream_counts_where_the_realization_looks_there(by):
    """Of ``Inhibiting``: the micro state depends on the effect of what confounds it."""
    held = {"strength": torch.tensor(0.5)}

    def strength():
        if by == "closure":
            return held["strength"]
        if by == "parameter":
            return pyro.param("strength", torch.tensor(0.5))
        with poutine.block():
            return pyro.param("strength", torch.tensor(0.5)).detach()

    def model():
        z1 = pyro.sample("z1", dist.Normal(0.0, 1.0))
        z2 = pyro.sample("z2", dist.Normal(0.0, 1.0))
        x1, x2 = pyro.deterministic("x1", z1), pyro.deterministic("x2", z2)
        pyro.deterministic("revenue", x1 + 3 * x2 + (z1 + z2) * strength())

    inhibiting = {SALES: pm.Inhibiting(2.0, "revenue")}
    intervened = pm.macro_do(model, inhibiting)
    for _ in range(2):
        before = assert_same_runs(intervened, pm.macro_do(model, inhibiting))
    held["strength"].fill_(0.25)
    pyro.get_param_store()["strength"] = torch.tensor(0.25)
    for _ in range(2):
        after = assert_same_runs(intervened, pm.macro_do(model, inhibiting))
    assert before.nodes["x1"]["value"] != after.nodes["x1"]["value"]


# What is kept is not the tensors of those who called


@pytest.mark.parametrize("validation", [True, False])
def test_equal_arguments_after_the_first_ones_were_overwritten(realized, validation):
    model, interventions = realized

    def given(mean):
        model(mean)

    intervened = pm.macro_do(given, interventions)
    first = torch.tensor([BEFORE, 20.0])
    with pyro.validation_enabled(validation):
        intervened(first)
        first.copy_(torch.tensor([4.0, 13.0]))
        for mean in (torch.tensor([BEFORE, 20.0]), first) * 2:
            assert_same_runs(intervened, pm.macro_do(given, interventions), mean)


@pytest.mark.parametrize("validation", [True, False])
def test_equal_arguments_on_another_storage(realized, validation):
    model, interventions = realized

    def given(mean):
        model(mean)

    intervened = pm.macro_do(given, interventions)
    mean = torch.tensor([BEFORE, 20.0])
    old = mean.detach()
    with pyro.validation_enabled(validation):
        intervened(mean)
        mean.data = torch.tensor([BEFORE, 20.0])
        old.copy_(torch.tensor([4.0, 13.0]))
        for _ in range(2):
            assert_same_runs(intervened, pm.macro_do(given, interventions), mean)


def test_equal_arguments_after_the_attributes_of_the_first_ones_changed(realized):
    model, interventions = realized

    class Means:
        def __init__(self):
            self.numbers = [BEFORE, 20.0]

    def given(means):
        model(torch.tensor(means.numbers))

    intervened, first = pm.macro_do(given, interventions), Means()
    intervened(first)
    first.numbers = [4.0, 13.0]
    for means in (Means(), first) * 2:
        assert_same_runs(intervened, pm.macro_do(given, interventions), means)


def test_a_law_that_was_made_of_a_tensor_that_was_overwritten():
    held = {"mean": torch.tensor([16.0, 17.0])}

    def normal(total):
        return dist.Normal(held["mean"], 1e-9).to_event(1)

    intervened = pm.macro_do(parts, {SALES: pm.Explicit(33.0, normal)})
    with pyro.validation_enabled(False):
        intervened()
        held["mean"].fill_(0.0)
        held["mean"] = torch.tensor([16.0, 17.0])
        torch.testing.assert_close(law(intervened).mean, torch.tensor([16.0, 17.0]))


def test_writing_to_a_trace_does_not_change_the_next_run(realized):
    intervened = pm.macro_do(*realized)
    for _ in range(3):
        trace = poutine.trace(intervened).get_trace()
        for node in stochastic(trace).values():
            node["value"] *= 0.0
        for name in ("sales", "sales__micro"):
            fn = trace.nodes[name]["fn"] if name in trace.nodes else None
            for attribute in ("mean", "variance", "loc", "v", "probs", "total"):
                with contextlib.suppress(Exception):
                    getattr(fn, attribute).zero_()
    assert_same_runs(intervened, pm.macro_do(*realized))


# Graphs


def test_each_run_has_a_graph_of_its_own():
    mean = torch.tensor(BEFORE)
    intervened = pm.macro_do(program(lambda: mean), NATURAL)
    for _ in range(2):
        assert not law(intervened).mean.requires_grad
    mean.requires_grad_(True)
    for _ in range(3):
        (found,) = torch.autograd.grad(law(intervened).mean[0], mean)
        torch.testing.assert_close(found, torch.tensor(0.2))
        with torch.no_grad():
            assert not law(intervened).mean.requires_grad


def test_a_value_has_a_gradient_in_each_run():
    value = torch.tensor(33.0, requires_grad=True)
    intervened = pm.macro_do(over_globals, {SALES: pm.Natural(value)})
    for _ in range(3):
        (found,) = torch.autograd.grad(law(intervened).mean[0], value)
        torch.testing.assert_close(found, torch.tensor(0.8))


def test_a_leaf_that_the_model_makes_has_a_graph_in_each_run():
    def model():
        mean = torch.tensor(BEFORE, requires_grad=True)
        sites(mean)
        return mean

    intervened = pm.macro_do(model, NATURAL)
    for _ in range(3):
        law(intervened).mean[0].backward()


def test_a_leaf_that_a_transform_holds_has_a_graph_in_each_run():
    def split(total):
        weight = torch.tensor(1.0, requires_grad=True)
        scale = dist.transforms.AffineTransform(0.0, total * weight, event_dim=1)
        return dist.TransformedDistribution(dist.Dirichlet(torch.ones(2)), [scale])

    intervened = pm.macro_do(parts, {SALES: pm.Explicit(33.0, split)})
    for _ in range(3):
        poutine.trace(intervened).get_trace().log_prob_sum().backward()


@pytest.mark.parametrize("requires_grad", [True, False])
def test_a_graph_where_none_is_asked_for_outside(requires_grad):
    weight = torch.tensor(BEFORE, requires_grad=requires_grad)

    def model():
        with torch.enable_grad():
            sites(1.0 * weight)

    intervened = pm.macro_do(model, NATURAL)
    for _ in range(2):
        with torch.no_grad():
            law(intervened)
        weight.requires_grad_(True)
        with torch.no_grad():
            mean = law(intervened).mean
            fresh = law(pm.macro_do(model, NATURAL)).mean
        assert mean.requires_grad == fresh.requires_grad
        if mean.requires_grad:
            mean[0].backward()


def test_what_is_traced_by_torch_is_not_kept():
    intervened = pm.macro_do(with_arguments, NATURAL)
    mean = torch.tensor(BEFORE)

    def first(mean):
        return law(intervened, mean).mean[0]

    for _ in range(2):
        first(mean)
    with pyro.validation_enabled(False), pytest.raises(Exception):  # noqa: B017
        torch.jit.trace(first, mean, check_trace=False)
    for _ in range(2):
        assert_mean(intervened, BEFORE, mean)


# Random numbers, parameters, statements: as in a first run


def test_random_states_are_as_after_a_first_run():
    intervened = pm.macro_do(over_globals, NATURAL)
    states = []
    for _ in range(3):
        pyro.set_rng_seed(3)
        intervened()
        numbers = [torch.rand(3).tolist(), np.random.rand(), random.random()]
        states.append(numbers)
    assert states[0] == states[1] == states[2]


APART = {
    "torch": lambda: torch.randn(()),
    "numpy": lambda: np.random.randn(),
    "scipy": lambda: scipy.stats.norm.rvs(),
    "random": lambda: random.gauss(0.0, 1.0),
}


@pytest.mark.parametrize("name", APART)
def test_numbers_that_are_drawn_apart_are_drawn_in_each_run(name):
    draw = APART[name]

    def model():
        parts([draw(), 20.0])

    intervened, means = pm.macro_do(model, NATURAL), set()
    with pyro.validation_enabled(False):  # which refuses such a model
        for seed in range(4):
            pyro.set_rng_seed(seed)
            draw()  # so that the second of two Gaussian numbers is waiting
            means.add(float(law(intervened).mean[0]))
    assert len(means) == 4


def test_a_seed_inside_gives_the_same_draws_in_each_run():
    model = poutine.seed(over_globals, rng_seed=2)
    intervened = pm.macro_do(model, NATURAL)
    draws = {
        float(poutine.trace(intervened).get_trace().nodes["x1"]["value"])
        for _ in range(3)
    }
    assert len(draws) == 1
    assert_same_runs(intervened, pm.macro_do(model, NATURAL))


def test_parameters_are_as_after_a_first_run():
    def model():
        sites(MEANS[0])
        store()

    def store():
        pyro.module("linear", torch.nn.Linear(1, 1))

    intervened = pm.macro_do(model, NATURAL)
    for _ in range(3):
        pyro.clear_param_store()
        intervened()
        assert set(pyro.get_param_store().keys()) == {
            "linear$$$weight",
            "linear$$$bias",
        }


def test_statements_are_shown_as_in_a_first_run():
    def model():
        with pyro.plate("days", 2):
            sites(MEANS)

    intervened = pm.macro_do(model, NATURAL)
    seen = []

    class Look(poutine.messenger.Messenger):
        def _process_message(self, msg):
            seen.append((msg["type"], msg["name"]))

    for _ in range(3):
        with Look():
            intervened()
    assert len(seen) == len(set(seen)) * 3


# What is around


def test_plates_around_are_each_their_own():
    intervened = pm.macro_do(over_globals, NATURAL)
    for size, dim in ((2, None), (3, None), (2, -2), (2, None)):
        assert_mean(intervened, BEFORE)
        with pyro.plate("outside", size, dim=dim):
            nodes = poutine.trace(intervened).get_trace().nodes
        total = nodes["x1"]["value"] + nodes["x2"]["value"]
        batch = (size,) if dim is None else (size, 1)
        torch.testing.assert_close(total, torch.full(batch, 33.0))


def test_plates_inside_make_room_for_those_around():
    def model():
        with pyro.plate("days", 3):
            parts()

    intervened = pm.macro_do(model, NATURAL)
    for _ in range(2):
        assert poutine.trace(intervened).get_trace().nodes["x1"]["value"].shape == (3,)
        with pyro.plate("outside", 2):
            nodes = poutine.trace(intervened).get_trace().nodes
        assert nodes["x1"]["value"].shape == (3, 2)
        with pyro.plate("outside", 2, dim=-2):
            nodes = poutine.trace(intervened).get_trace().nodes
        assert nodes["x1"]["value"].shape == (2, 3)


def test_indices_of_whole_plates_that_are_set_outside():
    order = torch.tensor([2, 1, 0])
    means = torch.tensor([BEFORE, AFTER, 20.0])
    for first in (True, False):
        intervened = pm.macro_do(in_plates, NATURAL)
        turned = poutine.condition(intervened, {"days": order})
        for turn in (first, not first, first):
            if turn:
                assert_mean(turned, means.flip(0))
            else:
                assert_mean(intervened, means)
    source = poutine.trace(in_plates).get_trace()
    source.nodes["days"]["value"] = order
    for name in ("z", "x1", "x2"):
        source.remove_node(name)
    assert_mean(poutine.replay(intervened, trace=source), means.flip(0))
    assert_mean(intervened, means)


ORDER = torch.tensor([2, 1, 0])


def _in_order():
    with pyro.plate("days", 3, subsample=ORDER) as day:
        sites(torch.tensor([BEFORE, AFTER, 20.0])[day])


@pytest.mark.parametrize(
    "model",
    [
        _in_order,
        poutine.condition(in_plates, {"days": ORDER}),
        poutine.do(in_plates, {"days": ORDER}),
    ],
    ids=["subsample", "condition", "do"],
)
def test_indices_of_whole_plates_that_the_model_sets(model):
    intervened = pm.macro_do(model, NATURAL)
    for _ in range(3):
        assert_mean(intervened, [20.0, AFTER, BEFORE])
    assert_same_runs(intervened, pm.macro_do(model, NATURAL))


DATA = torch.arange(10, dtype=torch.float64)


def _size_around():
    return float(get_plates()[0].size)


def _subsampled_around():
    return pyro.subsample(DATA, event_dim=0).mean()


@pytest.mark.parametrize("ask", [_size_around, _subsampled_around])
def test_plates_around_that_the_model_asks_for(ask):
    intervened = pm.macro_do(program(ask), NATURAL)
    for size in (2, 2, 3, 2):
        with pyro.plate("outside", 10, subsample_size=size) as index:
            mean = DATA[index].mean() if ask is _subsampled_around else float(size)
            assert_mean(intervened, mean * torch.ones(size))


def test_settings_are_those_of_the_run():
    def model():
        z = pyro.sample("z", dist.Normal(torch.tensor(BEFORE), 3**0.5))
        pyro.sample("x1", dist.Normal(z, 1.0))
        pyro.sample("x2", dist.Normal(torch.tensor(20.0), 1.0))

    intervened = pm.macro_do(model, NATURAL)
    for dtype in (torch.float64, torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        for validation in (True, False):
            with pyro.validation_enabled(validation):
                found = law(intervened).mean
                assert found.dtype == dtype
                torch.testing.assert_close(found, wanted(torch.tensor(BEFORE)))


def test_inference_mode_is_that_of_the_run(realized):
    intervened = pm.macro_do(*realized)
    for inference in (True, True, False, False, True):
        with torch.inference_mode(inference):
            trace = poutine.trace(intervened).get_trace()
        assert trace.nodes["x1"]["value"].is_inference() == inference
    assert_same_runs(intervened, pm.macro_do(*realized))


def test_autocast_is_that_of_the_run():
    one = torch.ones(1, 1, dtype=torch.float32)
    mean = torch.full((1, 1), 10.02, dtype=torch.float32)

    def model():
        sites((mean @ one)[0, 0])

    intervened = pm.macro_do(model, NATURAL)
    exact = [law(intervened).mean for _ in range(2)]
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=kind):
            rounded = mean[0, 0].to(kind).double()
            assert rounded != mean[0, 0]
            assert_mean(intervened, rounded)
    torch.testing.assert_close(exact[0], exact[1])


@pytest.mark.parametrize("view", [get_dependencies, get_model_relations])
def test_views_of_the_program_are_those_before_a_run(view):
    intervened = pm.macro_do(over_globals, NATURAL)
    first = view(intervened)
    for _ in range(2):
        assert_mean(intervened, BEFORE)
    assert view(intervened) == first
    assert_mean(intervened, BEFORE)


def test_consolidated_programs_are_those_of_a_model_before_a_run():
    intervened = pm.macro_do(over_globals, NATURAL)
    for _ in range(2):
        assert_mean(intervened, BEFORE)
    fused = pm.consolidate(intervened, keep=["x1", "x2"])
    fresh = pm.consolidate(pm.macro_do(over_globals, NATURAL), keep=["x1", "x2"])
    for _ in range(2):
        assert_same_runs(fused, fresh)
    for _ in range(2):
        assert_mean(intervened, BEFORE)


def test_an_intervention_around_has_the_law_of_the_changed_model():
    """The outer one reads the inner one again and again, under its own values."""
    value = torch.tensor(2 * BEFORE)
    outer, change = _inside(lambda: (pm.Natural(value), None))()
    intervened = pm.macro_do(outer, NATURAL)
    for total in (20.0, 20.0, 30.0, 30.0, 20.0):
        value.fill_(total)
        fresh, _ = _inside(lambda: (pm.Natural(value.clone()), None))()
        assert_same_runs(intervened, pm.macro_do(fresh, NATURAL))
    assert change is None


def test_predictive_has_the_law_of_the_run():
    mean = torch.tensor(BEFORE)
    intervened = pm.macro_do(program(lambda: mean), NATURAL)
    for number, parallel in ((BEFORE, True), (BEFORE, False), (AFTER, True)):
        mean.fill_(number)
        n = 200
        out = Predictive(intervened, num_samples=n, parallel=parallel)()
        # Var = 0.8: a deviation of 5 standard errors
        miss = out["x1"].mean() - wanted(number)[0]
        assert abs(miss) < 5 * (0.8 / n) ** 0.5


# Copies, failures, memory


def test_copies_begin_anew():
    intervened = pm.macro_do(Layer().eval(), NATURAL)
    for _ in range(2):
        assert_mean(intervened, BEFORE)
    other = copy.deepcopy(intervened)
    other.model.layer.weight.fill_(AFTER)
    for _ in range(2):
        assert_mean(other, AFTER)
        assert_mean(intervened, BEFORE)
    handler = pm.macro_do(interventions=NATURAL)
    handler(over_globals)()
    for same in (copy.deepcopy(handler), pickle.loads(pickle.dumps(handler))):
        assert same._remembered._kept == []
        assert_mean(same(over_globals), BEFORE)


def test_a_failure_is_not_kept():
    held = {"mean": None}

    def model():
        if held["mean"] is None:
            raise ValueError("no mean yet")
        sites(held["mean"])

    intervened = pm.macro_do(model, NATURAL)
    for _ in range(2):
        with pytest.raises(ValueError, match="no mean yet"):
            intervened()
        held["mean"] = BEFORE
        for _ in range(2):
            assert_mean(intervened, BEFORE)
        held["mean"] = None


def test_a_failure_of_the_run_itself_does_no_harm(reads):
    held = {"fails": True}

    def model():
        sites(MEANS[0])
        if held["fails"]:
            raise ValueError("later")

    intervened = pm.macro_do(model, NATURAL)
    for _ in range(2):
        with pytest.raises(ValueError, match="later"):
            intervened()
    assert len(reads) == 1
    held["fails"] = False
    assert_mean(intervened, BEFORE)


def test_what_cannot_be_realized_stays_refused():
    value = torch.tensor(3.0)
    intervened = pm.macro_do(coins, {SALES: pm.Natural(value)})
    refused, fine = pytest.raises(pm.Infeasible), contextlib.nullcontext()
    for number in (3.0, 3.0, 1.0, 1.0, 3.0, 1.0):
        value.fill_(number)
        with refused if number == 3.0 else fine:
            intervened()


def test_many_kinds_of_arguments_are_each_right():
    intervened = pm.macro_do(with_arguments, NATURAL)
    for mean in [*range(8)] * 2 + [7, 7, 3]:
        assert_mean(intervened, float(mean), torch.tensor(float(mean)))
    assert remembered.KEPT < 8


def test_models_that_cannot_be_told_are_each_right():
    intervened = pm.macro_do(program(lambda numbers: next(numbers.fresh())), NATURAL)

    class Numbers:
        __slots__ = ("number",)

        def fresh(self):
            yield self.number

    numbers = Numbers()
    for mean in range(10):
        numbers.number = float(mean)
        assert_mean(intervened, float(mean), numbers)


def test_arguments_are_let_go():
    class Data:
        def __init__(self, mean):
            self.mean = torch.tensor(mean)

    intervened = pm.macro_do(program(lambda data: data.mean), NATURAL)
    alive = []
    for i in range(3 * remembered.KEPT):
        data = Data(float(i))
        alive.append(weakref.ref(data))
        assert_mean(intervened, float(i), data)
    del data
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= remembered.KEPT


@pytest.mark.parametrize("fresh", [True, False])
def test_runs_leave_nothing_behind(fresh):
    intervened = pm.macro_do(with_arguments, NATURAL)
    mean, alive = torch.tensor(BEFORE), []
    for _ in range(2):
        for _ in range(2 * remembered.KEPT):
            intervened(mean.clone() if fresh else mean)
        gc.collect()
        things = [each for each in gc.get_objects() if type(each) is torch.Tensor]
        alive.append(len(things))
        del things
    assert alive[0] == alive[1]


def test_a_handler_of_two_models_keeps_them_apart():
    handler = pm.macro_do(interventions=NATURAL)
    one, other = handler(program(lambda: BEFORE)), handler(program(lambda: AFTER))
    for _ in range(3):
        assert_mean(one, BEFORE)
        assert_mean(other, AFTER)


def test_an_intervened_model_may_run_itself():
    def model(depth):
        if depth:
            with poutine.block():
                intervened(depth - 1)
        sites(float(depth))

    intervened = pm.macro_do(model, NATURAL)
    for _ in range(2):
        for depth in range(3):
            assert_mean(intervened, float(depth), depth)
