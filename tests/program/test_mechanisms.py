# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The mechanisms of a program: each site as a function of its parents' values.

A mechanism is right if, at any values, it makes the distribution that a run of the
program has there: the program is run, conditioned on these values, and asked.
"""

import random
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.nn import PyroModule, PyroParam
from pyro.poutine.util import site_is_subsample

import pyro_macro as pm
from pyro_macro.program.mechanisms import (
    arguments,
    put_back,
    read_mechanisms,
)
from pyro_macro.program.side_by_side import side_by_side


def base_of(fn):
    while hasattr(fn, "base_dist") and not isinstance(
        fn,
        torch.distributions.Independent | torch.distributions.TransformedDistribution,
    ):
        fn = fn.base_dist
    return fn


def run_at(model, values, args=(), kwargs=None):
    """The sites of a run in which all that is random has the values given."""
    fixed = poutine.condition(model, values)
    return poutine.trace(fixed).get_trace(*args, **(kwargs or {})).nodes


def check(model, seeds=(0, 1, 2), args=(), kwargs=None, read_with=None):
    """All mechanisms, at the values of some runs."""
    kwargs = kwargs or {}
    pyro.set_rng_seed(17)
    found = read_mechanisms(model, *(read_with or (args, kwargs)))
    assert found.trouble is None
    assert {n: m.trouble for n, m in found.of.items() if m.trouble} == {}
    for seed in seeds:
        pyro.set_rng_seed(seed)
        nodes = poutine.trace(model).get_trace(*args, **kwargs).nodes
        leaves = dict(arguments(args, kwargs))
        for name, node in nodes.items():
            if node["type"] == "param":
                leaves["param", name] = node["value"]
            elif node["type"] == "sample" and not site_is_subsample(node):
                leaves["site", name] = node["value"]
            elif node["type"] == "sample":
                leaves["indices", name] = node["value"]
        for name, mechanism in found.of.items():
            node = nodes[name]
            outputs = mechanism.expression(leaves)
            if mechanism.parts is None:
                assert torch.equal(outputs[0], node["value"])
                continue
            made = mechanism.parts.build(outputs)
            probe = base_of(node["fn"]).sample()
            wanted = base_of(node["fn"]).log_prob(probe)
            log_prob = made.log_prob(probe)
            assert torch.allclose(log_prob.expand(wanted.shape), wanted)
    return found


def parents(model, *args, **kwargs):
    found = read_mechanisms(model, args, kwargs)
    return {name: sorted(m.parents) for name, m in found.of.items()}


# Programs that can be taken apart


def chain():
    a = pyro.sample("a", dist.Normal(1.0, 2.0))
    b = pyro.sample("b", dist.Normal(2 * a + 1, 0.5))
    c = pyro.deterministic("c", torch.sin(b) - a)
    pyro.sample("d", dist.Gamma(torch.exp(c), 1 + a**2))


def finite():
    h = pyro.sample("h", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])))
    x = pyro.sample("x", dist.Bernoulli(torch.tensor([0.1, 0.5, 0.9])[h]))
    y = pyro.deterministic("y", (h > 0) & (x > 0))
    pyro.sample("z", dist.Binomial(3, 0.1 + 0.4 * y + 0.2 * x))


def vectors():
    v = pyro.sample("v", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    lower = torch.eye(2) + 0.1 * torch.ones(2, 2).tril()
    mean = v[:2] * v[2]
    w = pyro.sample("w", dist.MultivariateNormal(mean, scale_tril=lower))
    x, y = w
    pyro.sample("x", dist.Normal(x * y, 1 + v.abs().sum()))
    pyro.sample("y", dist.Dirichlet(torch.cat([w.exp(), v.abs()])))


def in_plates():
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    weights = torch.tensor([1.0, -2.0, 0.5])
    with pyro.plate("outer", 3, dim=-1):
        x = pyro.sample("x", dist.Normal(weights * z, weights.abs()))
        with pyro.plate("inner", 2, dim=-2):
            y = pyro.sample("y", dist.Normal(x + torch.tensor([[0.0], [5.0]]), 1.0))
            pyro.sample("u", dist.Normal(0.0, 2.0))
    pyro.sample("s", dist.Normal(y.sum(), 1.0))


def with_names():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    loc = torch.add(input=x, other=torch.tensor(2.0), alpha=3)
    pyro.sample("y", dist.Normal(loc=loc, scale=torch.exp(input=x)))
    pyro.sample("z", dist.Bernoulli(logits=torch.where(x > 0, x, -x)))


def in_place():
    x = pyro.sample("x", dist.Normal(0.0, 1.0))
    y = pyro.sample("y", dist.Normal(0.0, 1.0))
    both = torch.zeros(2)
    both[0] = x
    both[1] = 2 * y
    total = x.clone()
    total += y
    total.mul_(3)
    pyro.sample("u", dist.Normal(both, 1.0).to_event(1))
    pyro.sample("v", dist.Normal(total, 1.0))


def in_loops():
    states = [pyro.sample("s0", dist.Normal(0.0, 1.0))]
    for i in range(1, 5):
        states.append(pyro.sample(f"s{i}", dist.Normal((i + 0.5) * states[-1], i)))
    pyro.sample("y", dist.Normal(torch.stack(states).mean(), 1.0))
    pyro.deterministic("largest", torch.stack(states).max())


def with_handlers():
    with poutine.scale(scale=0.5), poutine.mask(mask=False):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
    b = pyro.sample("b", dist.Normal(a, 1.0).mask(torch.tensor(True)))
    pyro.sample("c", dist.Normal(b, 1.0), obs=torch.tensor(2.0))
    pyro.sample("d", dist.Delta(2 * b))


def with_transforms():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    shift = dist.transforms.AffineTransform(a, 2.0)
    steps = [shift, dist.transforms.ExpTransform()]
    b = pyro.sample("b", dist.TransformedDistribution(dist.Normal(0.0, 1.0), steps))
    pyro.sample("c", dist.LogNormal(torch.log(b), 1.0))
    pyro.sample("d", dist.LogNormal(a.expand(3), 0.5).to_event(1))


PROGRAMS = [
    *(chain, finite, vectors, in_plates, with_names, in_place, in_loops),
    *(with_handlers, with_transforms),
]


@pytest.mark.parametrize("model", PROGRAMS)
def test_mechanisms_are_those_of_the_program(model):
    check(model)


def test_parents():
    assert parents(chain) == {"a": [], "b": ["a"], "c": ["a", "b"], "d": ["a", "c"]}
    assert parents(finite) == {"h": [], "x": ["h"], "y": ["h", "x"], "z": ["x", "y"]}
    assert parents(in_plates) == {
        **{"z": [], "x": ["z"], "y": ["x"], "u": [], "s": ["y"]}
    }
    assert parents(in_place)["u"] == parents(in_place)["v"] == ["x", "y"]
    graph = read_mechanisms(chain).graph()
    edges = {("a", "b"), ("a", "c"), ("b", "c"), ("a", "d"), ("c", "d")}
    assert set(graph.edges) == edges and list(graph) == list("abcd")


def test_what_is_said_about_a_site():
    found = read_mechanisms(with_handlers).of
    assert not found["a"].counts and found["c"].counts
    assert found["c"].site.observed and not found["b"].site.observed
    assert [float(x) for x in found["c"].rest({})] == [2.0]

    def model():
        with poutine.infer_config(config_fn=lambda site: {"enumerate": "parallel"}):
            pyro.sample("a", dist.Bernoulli(0.5), infer={"own": 1})

    assert read_mechanisms(model).of["a"].infer == {"own": 1, "enumerate": "parallel"}


def test_masks_and_scales_that_are_computed():
    def model(mask):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask):
            pyro.sample("b", dist.Normal(a, 1.0))
        with poutine.scale(scale=a.exp()):
            pyro.sample("c", dist.Normal(0.0, 1.0))

    found = read_mechanisms(model, (torch.tensor(True),)).of
    assert [leaf[0] for leaf in found["b"].rest.leaves] == ["argument"]
    assert found["c"].parents == ["a"] and found["c"].expression.parents == []
    a = torch.tensor(0.5)
    assert torch.equal(found["c"].rest({("site", "a"): a})[0], a.exp())


def test_observed_values_that_are_computed():
    def model(y):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(a, 1.0), obs=2 * y)

    found = read_mechanisms(model, (torch.tensor(3.0),)).of["y"]
    assert found.parents == ["a"]
    (leaf,) = found.rest.leaves
    assert torch.equal(found.rest({leaf: torch.tensor(5.0)})[0], torch.tensor(10.0))


def test_factors():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.factor("f", -(a**2))

    found = read_mechanisms(model)
    assert found.factors == {"f"} and found.of["f"].parents == ["a"]
    a = torch.tensor(3.0)
    values = [*found.of["f"].expression({("site", "a"): a})]
    values += found.of["f"].rest({("site", "a"): a})
    assert any(float(v.sum()) == -9.0 for v in values if v.numel() == 1)


# Arguments, parameters, what is captured


def test_arguments_are_leaves():
    def model(x, pair, options=None, count=3):
        a = pyro.sample("a", dist.Normal(x, 1.0))
        b = pyro.sample("b", dist.Normal(a * pair[0] + pair[1]["u"], options["s"]))
        pyro.sample("c", dist.Normal(b * count, 1.0))

    def made(x, first, second, s):
        tensors = [torch.tensor(v) for v in (x, first, second, s)]
        args = (tensors[0], (tensors[1], {"u": tensors[2]}))
        return args, {"options": {"s": tensors[3]}}

    args, kwargs = made(1.0, 2.0, 3.0, 0.5)
    others, named = made(-4.0, 0.3, 9.0, 2.5)
    found = check(model, args=others, kwargs=named, read_with=(args, kwargs))
    leaves = {leaf for leaf in found.of["b"].expression.leaves if leaf[0] != "site"}
    assert leaves == {
        ("argument", (0, 1, 0)),
        ("argument", (0, 1, 1, "u")),
        ("argument", (1, "options", "s")),
    }
    assert not found.by_value


def test_arguments_of_any_shape_are_put_back():
    class Two(tuple):
        _fields = ("one", "two")

        def __new__(cls, one, two):
            return tuple.__new__(cls, (one, two))

    args = (torch.zeros(1), [torch.ones(1), {"a": 3}], Two(torch.zeros(2), "x"), None)
    kwargs = {"k": {"deep": (torch.ones(3),)}, "n": 2}
    leaves = dict(arguments(args, kwargs))
    assert len(leaves) == 4
    doubled = {leaf: 2 * tensor + 1 for leaf, tensor in leaves.items()}
    found, named = put_back(args, kwargs, doubled)
    assert torch.equal(found[0], torch.ones(1))
    assert isinstance(found[1], list) and torch.equal(found[1][0], 3 * torch.ones(1))
    assert found[1][1] == {"a": 3} and found[3] is None
    assert isinstance(found[2], Two) and found[2][1] == "x"
    assert torch.equal(named["k"]["deep"][0], 3 * torch.ones(3)) and named["n"] == 2


def test_programs_that_depend_on_arguments_by_value():
    def model(x, n=2):
        a = pyro.sample("a", dist.Normal(x, 1.0))
        pyro.sample("b", dist.Normal(a if x > 0 else -a, 1.0))

    found = read_mechanisms(model, (torch.tensor(1.0),))
    assert found.by_value
    assert found.of["b"].trouble is None  # for this value it is a function of a
    b = found.of["b"].expression({("site", "a"): torch.tensor(3.0)})
    assert float(b[0]) == 3.0


def test_parameters_are_leaves():
    def model():
        w = pyro.param("w", torch.tensor(2.0))
        s = pyro.param("s", torch.tensor(0.5), constraint=dist.constraints.positive)
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(w * a, s))

    found = read_mechanisms(model)
    assert set(found.params) == {"w", "s"} and len(pyro.get_param_store()) == 0
    leaves = {("param", "w"), ("param", "s"), ("site", "a")}
    assert set(found.of["b"].expression.leaves) == leaves
    w = torch.tensor(5.0, requires_grad=True)
    at = {("param", "w"): w, ("param", "s"): torch.tensor(0.1)}
    loc, scale = found.of["b"].expression(at | {("site", "a"): torch.tensor(3.0)})
    assert float(loc.detach()) == 15.0 and float(scale) == pytest.approx(0.1)
    loc.backward()
    assert float(w.grad) == 3.0
    pyro.clear_param_store()
    check(model)


def test_captured_parameters_have_gradients():
    net = torch.nn.Linear(2, 1)
    weight = net.weight.detach().clone()

    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(net(torch.stack([a, x]))[0], 1.0))

    found = check(model, args=(torch.tensor(2.0),))
    expression = found.of["b"].expression
    assert len(expression.captured) == 2
    assert {id(p) for p in expression.captured.values()} == {
        id(p) for p in net.parameters()
    }
    at = {("site", "a"): torch.tensor(3.0), ("argument", (0, 0)): torch.tensor(-1.0)}
    loc, _ = expression(at)
    loc.backward()
    assert torch.equal(net.weight.grad, torch.tensor([[3.0, -1.0]]))
    assert torch.equal(net.bias.grad, torch.ones(1))
    # A step of an optimizer is seen
    with torch.no_grad():
        net.weight.copy_(weight + 1)
    moved = (expression(at)[0] - loc).detach()
    assert float(moved) == pytest.approx(2.0)


def test_modules():
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.gain = PyroParam(torch.tensor(1.5), dist.constraints.positive)
            self.net = torch.nn.Linear(1, 1)

        def forward(self):
            a = pyro.sample("a", dist.Normal(0.0, 1.0))
            pyro.sample("b", dist.Normal(self.net(a[None])[0], self.gain))

    model = Model()
    found = read_mechanisms(model)
    assert found.of["b"].trouble is None
    assert found.of["b"].parents == ["a"]
    kinds = [kind for kind, _ in found.of["b"].expression.leaves]
    assert kinds.count("site") == 1 and kinds.count("param") >= 1
    assert len(pyro.get_param_store()) == 0


def test_subsampled_plates():
    data = torch.arange(10.0)

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 10, subsample_size=4) as index:
            pyro.sample("x", dist.Normal(z + data[index], 1.0))

    found = check(model)
    assert found.subsampled["plate"][:2] == (10, 4)
    assert ("indices", "plate") in found.of["x"].expression.leaves
    at = {("site", "z"): torch.tensor(1.0), ("indices", "plate"): torch.arange(4)}
    assert torch.equal(found.of["x"].expression(at)[0], torch.arange(1.0, 5.0))


def test_what_is_returned():
    def model(x):
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        b = pyro.deterministic("b", 2 * a)
        return {"sum": a + b * x, "rest": [x, 3]}

    template, expression = read_mechanisms(model, (torch.tensor(1.0),)).output
    assert template["rest"][1] == 3
    x = ("argument", (0, 0))
    at = {("site", "a"): torch.tensor(2.0), ("site", "b"): torch.tensor(5.0)}
    found = expression(at | {x: torch.tensor(10.0)})
    assert [float(v) for v in found] == [52.0, 10.0]
    assert read_mechanisms(chain).output is None


# Side by side


def test_mechanisms_of_a_kind_are_one_group():
    def model():
        s = pyro.sample("s0", dist.Normal(0.0, 1.0))
        for i in range(1, 8):
            s = pyro.sample(f"s{i}", dist.Normal(0.1 * i * s + i, 1.0 + i))

    found = check(model)
    expressions = {n: m.expression for n, m in found.of.items() if n != "s0"}
    (group,) = side_by_side(expressions, found.values)
    assert group.names == list(expressions)
    at = {("site", f"s{i}"): torch.tensor(float(i**2)) for i in range(8)}
    loc, scale = group.outputs(at)
    for i in range(1, 8):
        assert float(loc[i - 1]) == pytest.approx(0.1 * i * (i - 1) ** 2 + i)
        assert float(scale[i - 1]) == 1.0 + i
    kinds = {found.of[name].parts.kind for name in expressions}
    assert len(kinds) == 1


@pytest.mark.parametrize("model", PROGRAMS)
def test_groups_are_right(model):
    found = read_mechanisms(model)
    expressions = {n: m.expression for n, m in found.of.items()}
    at = dict(found.values)
    for group in side_by_side(expressions, at):
        outputs = group.outputs(at)
        for i, name in enumerate(group.names):
            wanted = expressions[name](at)
            assert len(wanted) == len(outputs)
            for one, other in zip(wanted, outputs, strict=True):
                assert torch.equal(one, other[i])


def test_worlds_of_parents():
    """A mechanism at several values of one parent: shape (W, G) and then the site."""
    found = read_mechanisms(in_plates)
    (group,) = side_by_side({"y": found.of["y"].expression}, found.values)
    x = torch.randn(6, 3)
    outputs = group.outputs(found.values | {("site", "x"): x}, {("site", "x")})
    for world in range(6):
        nodes = run_at(in_plates, {"x": x[world]})
        loc = base_of(nodes["y"]["fn"]).loc
        assert torch.allclose(outputs[0][world, 0], loc)


# Other batch shapes


@pytest.mark.parametrize("model", PROGRAMS)
def test_distributions_are_made_again_for_particles(model):
    """Parents with values in several worlds make a distribution of that batch shape."""
    found = read_mechanisms(model)
    worlds, depth = 5, 2 if model is in_plates else 0
    runs = []
    for seed in range(worlds):
        pyro.set_rng_seed(seed)
        runs.append(poutine.trace(model).get_trace().nodes)
    sites = [n for n in found.of if n in runs[0]]
    at = {("site", n): torch.stack([run[n]["value"] for run in runs]) for n in sites}
    for name, mechanism in found.of.items():
        if mechanism.parts is None:
            continue
        (group,) = side_by_side({name: mechanism.expression}, found.values)
        outputs = group.outputs(at, frozenset(at))
        tensors = []
        for tensor, event in zip(outputs, mechanism.parts.event_dims, strict=True):
            wide = worlds if tensor.dim() > event and tensor.shape[0] == worlds else 1
            rest = tensor.shape[2:] if wide == worlds else tensor.shape[1:]
            ones = (1,) * (depth + event - len(rest))
            tensors.append(tensor.reshape((wide, *ones, *rest)))
        made = mechanism.parts.build(tensors)
        for world, run in enumerate(runs):
            value, fn = run[name]["value"], base_of(run[name]["fn"])
            log_prob = made.log_prob(value)
            one = log_prob[world if log_prob.shape[0] == worlds else 0]
            wanted = fn.log_prob(value)
            assert torch.allclose(
                one.expand(torch.broadcast_shapes(one.shape, wanted.shape)), wanted
            )
        assert made.event_shape == fn.event_shape


# Broadcasting


def test_a_scale_of_two_sites_is_no_child_of_the_first():
    """``broadcast_tensors`` gives the scale back as it is: it depends on nothing."""
    scale = torch.tensor([0.5, 1.0, 1.5, 2.0])

    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 4):
            x = pyro.sample("x", dist.Normal(z * torch.ones(4), scale))
            pyro.sample("y", dist.Normal(0.0, scale))
            pyro.sample("w", dist.Normal(x, scale))
            pyro.sample("u", dist.Gamma(scale, 1.0))

    wanted = {"z": [], "x": ["z"], "y": [], "w": ["x"], "u": []}
    assert parents(model) == wanted
    graph = pm.micro_graph(model)
    assert set(graph.edges) == {("z", "x"), ("x", "w")}
    assert set(read_mechanisms(model).graph().edges) == {("z", "x"), ("x", "w")}
    check(model)


def test_a_scale_that_is_computed_is_a_child():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = z.exp() * torch.ones(4)
        with pyro.plate("plate", 4):
            x = pyro.sample("x", dist.Normal(0.0, scale))
            pyro.sample("y", dist.Normal(x, scale))

    assert parents(model) == {"z": [], "x": ["z"], "y": ["x", "z"]}
    assert set(pm.micro_graph(model).edges) == {("z", "x"), ("z", "y"), ("x", "y")}


# Trouble: what is no function of the parents


def by_branch():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(1.0 if a > 0 else 2.0, 1.0))


def by_number():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(2 * a.item(), 1.0))


def by_list():
    a = pyro.sample("a", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("b", dist.Normal(torch.tensor(a.tolist()).sum(), 1.0))


def by_numpy():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(torch.as_tensor(np.sin(a.numpy())), 1.0))


def by_index():
    a = pyro.sample("a", dist.Bernoulli(0.05))
    pyro.sample("b", dist.Normal([1.0, 2.0][int(a)], 1.0))


def by_view():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    x = torch.zeros(2)
    x[1:].add_(a)
    pyro.sample("b", dist.Normal(x.sum(), 1.0))


def by_noise():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(a + torch.randn(()), 1.0))


def by_rare_noise():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(10 * torch.bernoulli(torch.tensor(0.01)), 1.0))


def by_python_noise():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(10.0 * (random.random() < 0.01), 1.0))


def by_numpy_noise():
    pyro.sample("a", dist.Normal(0.0, 1.0))
    pyro.sample("b", dist.Normal(10.0 * (np.random.rand() < 0.01), 1.0))


def by_mixture():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    index = dist.Categorical(torch.ones(2))
    components = dist.Normal(torch.stack([a, -a]), 1.0)
    pyro.sample("b", dist.MixtureSameFamily(index, components))


def by_transform():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    shift = dist.transforms.AffineTransform(a, 2.0)
    steps = [dist.transforms.ComposeTransform([shift])]
    pyro.sample("b", dist.TransformedDistribution(dist.Normal(0.0, 1.0), steps))


def by_inverse():
    a = pyro.sample("a", dist.Normal(0.0, 1.0))
    shift = dist.transforms.AffineTransform(a, 2.0)
    steps = [shift.inv]
    pyro.sample("b", dist.TransformedDistribution(dist.Normal(0.0, 1.0), steps))


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


def double(x: torch.Tensor):
    return x * 2


with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)
    scripted = torch.jit.script(double)


TROUBLED = [
    *(by_branch, by_number, by_list, by_numpy, by_index, by_view, by_noise),
    *(by_rare_noise, by_python_noise, by_numpy_noise, by_mixture),
]


@pytest.mark.parametrize("model", TROUBLED)
def test_trouble_is_told(model):
    found = read_mechanisms(model)
    assert found.trouble or found.of["b"].trouble
    assert found.of["a"].trouble is None


@pytest.mark.parametrize("model", [by_transform, by_inverse])
def test_tensors_in_transforms_are_parents_or_in_trouble(model):
    found = read_mechanisms(model)
    assert found.of["b"].parents == ["a"] or found.of["b"].trouble
    fused = pm.consolidate(model, ["b"])
    assert "a" in fused.sites or "b" in fused.sites
    pyro.set_rng_seed(0)
    b = [poutine.trace(fused).get_trace().nodes["b"]["value"] for _ in range(1500)]
    wanted = 5**0.5 if model is by_transform else (1 / 4 + 1 / 4) ** 0.5
    assert float(torch.stack(b).std()) == pytest.approx(wanted, rel=0.1)


def unseen(kind, law):
    """What depends on a in a way that operations do not show."""

    def model():
        a = pyro.sample("a", law())
        if kind == "view":
            base = torch.zeros(2)
            x = base.view(2)
            base[0] = a
            x = x[0]
        elif kind == "transposed":
            base = torch.zeros(2, 2)
            x = base.T
            base[0, 1] = a
            x = x[1, 0]
        elif kind == "data":
            x = torch.zeros(())
            x.data.copy_(a)
        elif kind == "vmap":
            x = torch.vmap(lambda one: one * 2)(a.expand(2))[0]
        elif kind == "script":
            x = scripted(a)
        else:
            x = Doubled.apply(a)
        pyro.sample("b", dist.Normal(10.0 * x, 1.0))

    return model


@pytest.mark.parametrize(
    "kind", ["view", "transposed", "data", "vmap", "script", "autograd"]
)
@pytest.mark.parametrize(
    "law",
    [
        lambda: dist.Normal(0.0, 1.0),
        lambda: dist.Bernoulli(0.02),
        lambda: dist.Categorical(torch.tensor([0.97, 0.01, 0.02])),
    ],
    ids=["continuous", "rare", "rare of three"],
)
def test_what_is_not_seen_is_in_trouble(kind, law):
    """Also of a parent that has the same value almost always."""
    found = read_mechanisms(unseen(kind, law))
    assert found.of["b"].parents == ["a"] or found.of["b"].trouble


def test_sites_that_are_not_always_there():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        for i in range(int(a.abs() * 100) % 7):
            a = pyro.sample(f"b{i}", dist.Normal(a, 1.0))

    found = read_mechanisms(model)
    assert found.trouble or any(m.trouble for n, m in found.of.items() if n != "a")


def test_values_that_are_no_tensors():
    class Word(dist.Distribution):
        has_enumerate_support = False
        batch_shape = event_shape = torch.Size()

        def __call__(self, *args):
            return "word"

        sample = __call__

        def log_prob(self, value):
            return torch.tensor(0.0)

    def model():
        word = pyro.sample("a", Word())
        pyro.sample("b", dist.Normal(float(len(word)), 1.0))

    try:
        found = read_mechanisms(model)
    except pm.PyroMacroError:
        return
    assert found.of["a"].trouble


def test_modules_that_are_made_in_the_program():
    """Their weights are random numbers, and no sample sites."""

    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        net = torch.nn.Linear(1, 1)
        pyro.sample("b", dist.Normal(net(a[None])[0], 1.0))

    assert read_mechanisms(model).of["b"].trouble


def test_what_a_handler_inside_holds():
    def model():
        a = pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("b", dist.Normal(a, 1.0))

    trace = poutine.trace(model).get_trace()
    found = read_mechanisms(poutine.replay(model, trace))
    assert found.of["a"].trouble


# Nothing is touched


def test_reading_leaves_no_traces():
    def model():
        w = pyro.param("w", lambda: torch.randn(3))
        a = pyro.sample("a", dist.Normal(w.sum(), 1.0))
        pyro.sample("b", dist.Bernoulli(torch.sigmoid(a)))

    pyro.set_rng_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    with poutine.trace() as seen:
        read_mechanisms(model)
    assert not seen.trace.nodes or set(seen.trace.nodes) <= {"_INPUT", "_RETURN"}
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()
    assert (states[2] == np.random.get_state()[1]).all()
    assert len(pyro.get_param_store()) == 0


def test_parameters_keep_their_values():
    def model():
        w = pyro.param("w", torch.tensor(2.0))
        pyro.sample("a", dist.Normal(w, 1.0))

    pyro.param("w", torch.tensor(7.0))
    found = read_mechanisms(model)
    assert float(pyro.param("w").detach()) == 7.0
    assert float(found.values["param", "w"].detach()) == 7.0


def test_arguments_are_not_changed():
    x = torch.ones(3)

    def model(x):
        a = pyro.sample("a", dist.Normal(x, 1.0).to_event(1))
        pyro.sample("b", dist.Normal(a.sum(), 1.0))

    read_mechanisms(model, (x,))
    assert torch.equal(x, torch.ones(3)) and set(vars(x)) == set()
    # Nor do tensors that are closed over remember anything that counts
    scale = torch.ones(4)

    def other():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("plate", 4):
            pyro.sample("x", dist.Normal(z * scale, scale))
            pyro.sample("y", dist.Normal(0.0, scale))

    first, second = parents(other), parents(other)
    assert first == second == {"z": [], "x": ["z"], "y": []}
