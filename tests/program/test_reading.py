# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Reading a program: sites, plates, parents; and leaving no trace of it."""

import random

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroSample

import pyro_macro as pm
from pyro_macro.program.reading import read


def parents(model, *args):
    return {n: set(s.parents) for n, s in read(model, args).sites.items()}


def test_sites_come_in_order_with_distributions_and_plates():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("outer", 3, dim=-2), pyro.plate("inner", 2):
            pyro.sample("x", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Poisson(2.0), obs=torch.tensor(4.0))

    program = read(model)
    assert list(program.sites) == ["z", "x", "y"]
    assert [f.name for f in program.sites["x"].frames] == ["outer", "inner"]
    assert program.sites["x"].fn.batch_shape == (3, 2)
    assert program.sites["y"].observed and not program.sites["x"].observed


def test_parents_through_deterministic_sites():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.deterministic("x", 2 * z)
        pyro.sample("y", dist.Normal(x, 1.0))

    program = read(model)
    assert {n: set(s.parents) for n, s in program.sites.items()} == {
        "z": set(),
        "x": {"z"},
        "y": {"x"},
    }
    assert program.sites["x"].deterministic
    assert program.ancestors("y") == {"x", "z"}


def index(z):
    return torch.arange(4.0)[z.long().clamp(0, 3)]


def in_place(z):
    y = torch.zeros(3)
    y[1] = z
    return y.sum()


def in_place_on_a_view(z):
    y = torch.zeros(3)
    y[1:].add_(z)
    return y.sum()


def copied(z):
    return torch.tensor(z.item())


def branched(z):
    return torch.tensor(1.0) if z > 0 else torch.tensor(2.0)


def listed(z):
    return torch.tensor(z.reshape(1).tolist()).sum()


def stacked(z):
    return torch.stack([z, torch.ones(())]).max()


def as_numpy(z):
    return torch.as_tensor(z.detach().numpy() * 2)


@pytest.mark.parametrize(
    "way",
    [
        index,
        in_place,
        in_place_on_a_view,
        copied,
        branched,
        listed,
        stacked,
        as_numpy,
    ],
)
def test_parents_however_they_are_used(way):
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(way(z), 1.0))

    assert parents(model)["y"] == {"z"}


def test_what_is_used_in_a_scale_a_mask_or_a_transform_is_a_parent():
    def model():
        z = pyro.sample("z", dist.Gamma(2.0, 2.0))
        pyro.sample("scale", dist.Normal(0.0, z))
        affine = dist.transforms.AffineTransform(0.0, z)
        pyro.sample(
            "moved", dist.TransformedDistribution(dist.Normal(0.0, 1.0), [affine])
        )
        pyro.sample("wrapped", dist.Normal(z, 1.0).expand([2]).to_event(1).mask(True))
        pyro.sample("other", dist.Normal(0.0, 1.0))

    found = parents(model)
    assert found["scale"] == found["moved"] == found["wrapped"] == {"z"}
    assert found["other"] == set()


def test_running_under_given_values():
    def model():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        x = pyro.sample("x", dist.Normal(z, 1.0))
        pyro.sample("y", dist.Normal(x + z, 1.0))

    values = {"z": torch.tensor(3.0), "x": torch.tensor(-1.0)}
    sites = read(model, values=values).sites
    assert sites["x"].fn.loc == 3 and sites["x"].value == -1
    assert sites["y"].fn.loc == 2
    with pytest.raises(pm.UnknownSite, match="'zz'.*Did you mean 'z'"):
        read(model, values={"zz": torch.tensor(0.0)})


def test_reading_is_invisible():
    """No parameter, no random number, no buffer and no handler notices."""
    net = torch.nn.BatchNorm1d(2)

    def model():
        loc = pyro.param("loc", lambda: torch.tensor(1.0))
        net(torch.arange(8.0).reshape(4, 2))
        pyro.sample("z", dist.Poisson(3.0))
        with pyro.plate("p", 10, subsample_size=3):
            pyro.sample("x", dist.Normal(loc, 1.0))

    torch.manual_seed(3)
    random.seed(3)
    states = torch.get_rng_state(), random.getstate()
    with pyro.poutine.trace() as tracer:
        read(model)
    assert not tracer.trace.nodes
    assert len(pyro.get_param_store()) == 0
    assert net.num_batches_tracked == 0 and (net.running_mean == 0).all()
    assert random.getstate() == states[1]
    drawn = torch.get_rng_state()
    # Only the indices of the subsample are drawn: they are executed, not imagined
    torch.set_rng_state(states[0])
    torch.randperm(10)
    assert torch.equal(drawn, torch.get_rng_state())


def test_an_intervened_run_leaves_buffers_as_one_run_does():
    torch.manual_seed(0)

    def model(net):
        scale = net(torch.arange(8.0).reshape(4, 2)).mean()
        pyro.sample("x1", dist.Normal(scale, 1.0))
        pyro.sample("x2", dist.Normal(0.0, 1.0))

    once, intervened = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    model(once)
    sales = pm.MacroVariable("sales", ["x1", "x2"])
    pm.macro_do(model, {sales: pm.Natural(1.0)})(intervened)
    assert intervened.num_batches_tracked == 1
    assert torch.equal(once.running_mean, intervened.running_mean)


def test_a_model_that_fails_leaves_the_handlers_clean():
    def model():
        pyro.sample("x1", dist.Normal(0.0, 1.0))
        raise RuntimeError("mine")

    sales = pm.MacroVariable("sales", ["x1", "x2"])
    with pytest.raises(RuntimeError, match="mine"):
        pm.macro_do(model, {sales: pm.Natural(1.0)})()
    with pytest.raises(RuntimeError, match="mine"):
        read(model)
    assert not pyro.poutine.runtime.am_i_wrapped()
    assert not torch.overrides._get_current_function_mode_stack()


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroSample(dist.Normal(0.0, 1.0))
        self.weight = torch.nn.Parameter(torch.tensor(2.0))

    def forward(self):
        x1 = pyro.sample("x1", dist.Normal(self.loc * self.weight, 1.0))
        x2 = pyro.sample("x2", dist.Normal(self.loc, 1.0))
        return x1 + x2


class Decorated(Bayesian):
    @pm.macro_do(
        interventions={pm.MacroVariable("sales", ["x1", "x2"]): pm.Natural(5.0)}
    )
    def forward(self):
        loc = self.loc
        pyro.sample("x1", dist.Normal(loc * self.weight, 1.0))
        pyro.sample("x2", dist.Normal(loc, 1.0))
        return loc


class Outer(PyroModule):
    def __init__(self):
        super().__init__()
        self.inner = Bayesian()

    def forward(self):
        sales = pm.MacroVariable("sales", ["x1", "x2"])
        pm.macro_do(self.inner, {sales: pm.Natural(5.0)})()
        return self.inner.loc


@pytest.mark.parametrize("module, name", [(Decorated, "loc"), (Outer, "inner.loc")])
def test_a_module_that_is_running_does_not_get_the_values_of_inner_runs(module, name):
    trace = pyro.poutine.trace(module()).get_trace()
    assert trace.nodes[name]["value"] == trace.nodes["_RETURN"]["value"] != 0
    covariance = torch.tensor([[5.0, 2.0], [2.0, 2.0]])
    expected = 5 * covariance.sum(1) / covariance.sum()
    torch.testing.assert_close(trace.nodes["sales__micro"]["fn"].mean, expected)


@pytest.mark.parametrize("given", [(), ("loc",)])
def test_a_pyro_module_samples_each_attribute_once(given):
    module = Bayesian()
    sales = pm.MacroVariable("sales", ["x1", "x2"])
    intervened = pm.macro_do(module, {sales: pm.Natural(5.0, given=given)})
    assert [p is module.weight for p in intervened.parameters()] == [True]
    trace = pyro.poutine.trace(intervened).get_trace()
    names = [n for n, s in trace.nodes.items() if s["type"] == "sample"]
    assert names == ["loc", "sales", "sales__micro", "x1", "x2"]
    mean = trace.nodes["sales__micro"]["fn"].mean
    if given:
        loc = trace.nodes["loc"]["value"]
        expected = torch.stack([2 * loc, loc]) + (5 - 3 * loc) / 2
    else:
        covariance = torch.tensor([[5.0, 2.0], [2.0, 2.0]])
        expected = 5 * covariance.sum(1) / covariance.sum()
    torch.testing.assert_close(mean, expected)
