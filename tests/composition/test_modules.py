# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""``pyro.nn.PyroModule``: parameters, samples, buffers and the param store."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch.distributions import constraints

import pyro_macro as pm

from .models import NATURAL, SALES, assert_same_program, replayed, stochastic


class Shop(PyroModule):
    """Parts and prices as attributes, and a network that turns a batch into means."""

    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor([10.0, 20.0]))
        self.scale = PyroParam(
            torch.tensor([2.0, 1.0]), constraint=constraints.positive
        )
        self.x1 = PyroSample(lambda self: dist.Normal(self.loc[0], self.scale[0]))
        self.x2 = PyroSample(lambda self: dist.Normal(self.loc[1], self.scale[1]))
        self.price = PyroSample(dist.Normal(3.0, 0.5))

    def forward(self, y=None):
        mean = self.x1 + self.price * self.x2
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


class ShopByHand(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = PyroParam(torch.tensor([10.0, 20.0]))
        self.scale = PyroParam(
            torch.tensor([2.0, 1.0]), constraint=constraints.positive
        )
        self.price = PyroSample(dist.Normal(3.0, 0.5))

    def forward(self, y=None):
        v1, v2 = self.scale.square().unbind(-1)
        mean = self.loc[0] + v1 / (v1 + v2) * (33 - self.loc.sum())
        x1 = pyro.sample("x1", dist.Normal(mean, (v1 * v2 / (v1 + v2)).sqrt()))
        x2 = pyro.deterministic("x2", 33 - x1)
        mean = x1 + self.price * x2
        return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)


HANDLERS = {
    "macro_do": lambda model: pm.macro_do(model, NATURAL),
    "decorator": lambda model: pm.macro_do(interventions=NATURAL)(model),
    "aggregate": lambda model: pm.aggregate(model, [SALES]),
}


@pytest.fixture(params=list(HANDLERS))
def wrap(request):
    return HANDLERS[request.param]


def test_wrapped_module_exposes_its_parameters(wrap):
    module = Shop()
    wrapped = wrap(module)
    assert isinstance(wrapped, torch.nn.Module)
    found = {id(p) for p in wrapped.parameters()}
    assert found == {id(p) for p in module.parameters()} != set()
    names = {name.split(".")[-1] for name, _ in wrapped.named_parameters()}
    assert names == {"loc_unconstrained", "scale_unconstrained"}


def test_wrapped_module_passes_mode_dtype_and_state_on(wrap):
    module = Shop()
    wrapped = wrap(module)
    wrapped.eval()
    assert not module.training
    wrapped.train()
    assert module.training
    wrapped.to(torch.float32)
    assert module.loc.dtype == torch.float32
    wrapped.to(torch.float64)
    state = copy.deepcopy(wrapped.state_dict())
    with torch.no_grad():
        module.loc.add_(1.0)
    wrapped.load_state_dict(state)
    torch.testing.assert_close(module.loc.detach(), torch.tensor([10.0, 20.0]))


def test_wrapped_module_can_be_copied(wrap):
    wrapped = copy.deepcopy(wrap(Shop()))
    trace = poutine.trace(wrapped).get_trace()
    assert {"sales", "x1", "x2", "price", "y"} <= set(stochastic(trace))


def test_module_samples_are_micro_sites():
    """PyroSample and PyroParam inside, against the module by hand."""
    module = Shop()

    def model(y=None):
        return module(y)

    for intervened in (pm.macro_do(module, NATURAL), pm.macro_do(model, NATURAL)):
        trace = assert_same_program(intervened, ShopByHand())
        assert "price" in trace.stochastic_nodes
        total = trace.nodes["x1"]["value"] + trace.nodes["x2"]["value"]
        torch.testing.assert_close(total, torch.tensor(33.0))


def test_module_samples_are_used_as_they_are_in_the_trace():
    class Twice(Shop):
        def forward(self):
            # Within one call, a PyroSample has one value
            return self.x1, self.x2, self.x1 + self.x2, self.x1

    x1, x2, total, again = pm.macro_do(Twice(), NATURAL)()
    assert x1 == again
    torch.testing.assert_close(total, torch.tensor(33.0))


def test_module_samples_in_a_context(do):
    module = Shop()

    def model(y=None):
        return module(y)

    # The price is drawn between the parts, and a context needs it in `given`
    assert_same_program(
        do(model, {SALES: pm.Natural(33.0, given="price")}), ShopByHand()
    )


def test_module_samples_that_are_used_too_early_are_refused_by_a_context():
    class Early(Shop):
        def forward(self):
            return 2 * self.x1 + self.x2

    with pytest.raises(pm.PyroMacroError, match="'x1' is used before the last"):
        with pm.macro_do(interventions=NATURAL):
            Early()()


def test_module_parts_that_are_drawn_first_work_in_a_context():
    class Drawn(Shop):
        def forward(self, y=None):
            x1, x2 = self.x1, self.x2
            return pyro.sample("y", dist.Normal(x1 + self.price * x2, 0.5), obs=y)

    module = Drawn()

    def run(y=None):
        with pm.macro_do(interventions=NATURAL):
            return module(y)

    assert_same_program(run, ShopByHand())


def test_module_in_a_module_keeps_the_intervention():
    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = Shop()

        def forward(self, y=None):
            return self.inner(y)

    micro = pm.MacroVariable("sales", micro=["inner.x1", "inner.x2"])
    trace = poutine.trace(pm.macro_do(Outer(), {micro: pm.Natural(33.0)})).get_trace()
    total = trace.nodes["inner.x1"]["value"] + trace.nodes["inner.x2"]["value"]
    torch.testing.assert_close(total, torch.tensor(33.0))


def test_wrapped_module_as_part_of_a_module_keeps_the_intervention():
    class Outer(PyroModule):
        def __init__(self):
            super().__init__()
            self.inner = pm.macro_do(Shop(), NATURAL)

        def forward(self, y=None):
            return self.inner(y)

    outer = Outer()
    assert len(list(outer.parameters())) == 2
    trace = poutine.trace(outer).get_trace()
    total = trace.nodes["x1"]["value"] + trace.nodes["x2"]["value"]
    torch.testing.assert_close(total, torch.tensor(33.0))
    torch.testing.assert_close(trace.nodes["sales"]["value"], torch.tensor(33.0))


def test_intervention_within_the_forward_of_a_module():
    # The samples of a module are kept for the length of its call: a reading inside of
    # it must not leave its own draws there
    class Outer(Shop):
        def parts(self):
            return self.price, self.x1, self.x2

        def forward(self, y=None):
            given_price = {SALES: pm.Natural(33.0, given=["price"])}
            price, x1, x2 = pm.macro_do(self.parts, given_price)()
            mean = x1 + price * x2
            return pyro.sample("y", dist.Normal(mean, 0.5), obs=y)

    assert_same_program(Outer(), ShopByHand())


def test_module_gradients_are_those_of_the_module_by_hand():
    module, by_hand = Shop(), ShopByHand()
    wrapped = pm.macro_do(module, NATURAL)
    y = torch.tensor(70.0)
    trace = poutine.trace(wrapped).get_trace(y)
    for node in stochastic(trace).values():
        node["value"] = node["value"].detach()
    again = poutine.trace(poutine.replay(wrapped, trace=trace)).get_trace(y)
    again.log_prob_sum().backward()
    expected = poutine.trace(replayed(by_hand, trace)).get_trace(y)
    expected.log_prob_sum().backward()
    for found, wanted in zip(module.parameters(), by_hand.parameters(), strict=True):
        assert wanted.grad.abs().sum() > 0
        torch.testing.assert_close(found.grad, wanted.grad)


def test_module_is_trained_through_the_wrapper():
    module = Shop()
    wrapped = pm.macro_do(module, NATURAL)
    guide = AutoNormal(wrapped)
    before = module.loc.detach().clone()
    svi = SVI(wrapped, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(torch.tensor(70.0))
    assert not torch.equal(module.loc.detach(), before)


def test_module_is_trained_by_an_optimizer_of_torch():
    wrapped = pm.macro_do(Shop(), NATURAL)
    guide = AutoNormal(wrapped)
    y = torch.tensor(70.0)
    guide(y)
    optimizer = torch.optim.SGD([*wrapped.parameters(), *guide.parameters()], lr=0.01)
    before = [p.detach().clone() for p in wrapped.parameters()]
    Trace_ELBO().differentiable_loss(wrapped, guide, y).backward()
    optimizer.step()
    for old, new in zip(before, wrapped.parameters(), strict=True):
        assert not torch.equal(old, new)


def test_module_under_predictive_holds_the_total(wrap):
    out = Predictive(wrap(Shop()), num_samples=6, return_sites=["x1", "x2", "sales"])()
    total = (out["x1"] + out["x2"]).reshape(6)
    torch.testing.assert_close(out["sales"].reshape(-1).expand(6), total)


# Buffers


class Normed(torch.nn.Module):
    """The batch norm's output is the mean of x1; dropout would draw noise."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, data):
        self.calls += 1
        mean = self.norm(data).square().mean()
        x1 = pyro.sample("x1", dist.Normal(mean, 2.0))
        x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
        w = pyro.sample("w", dist.Normal(x1 + x2, 1.0))
        return w


DATA = torch.tensor([[1.0, 2.0], [5.0, 3.0], [0.0, 4.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    "handler",
    [
        *HANDLERS.values(),
        lambda model: pm.macro_do(model, {SALES: pm.Proportional(33.0)}),
    ],
    ids=[*HANDLERS, "natural state"],
)
def test_buffers_are_as_after_exactly_one_run(handler):
    plain, module = Normed(), Normed()
    plain(DATA)
    handler(module)(DATA)
    assert module.norm.num_batches_tracked == 1
    assert module.calls == 1
    for name, wanted in plain.state_dict().items():
        torch.testing.assert_close(module.state_dict()[name], wanted, rtol=0, atol=0)


def test_buffers_in_a_context_are_as_after_exactly_one_run():
    module = Normed()
    with pm.macro_do(interventions=NATURAL):
        module(DATA)
    assert module.norm.num_batches_tracked == 1
    assert module.calls == 1


def test_buffers_in_a_function_are_as_after_exactly_one_run(do):
    module = Normed()
    do(lambda: module(DATA), NATURAL)()
    assert module.norm.num_batches_tracked == 1


def test_buffers_after_a_run_that_failed_are_as_they_were():
    module = Normed()
    before = copy.deepcopy(module.state_dict())
    unknown = pm.MacroVariable("sales", micro=["x1", "x3"])
    with pytest.raises(pm.UnknownSite):
        pm.macro_do(module, {unknown: pm.Natural(33.0)})(DATA)
    for name, wanted in before.items():
        torch.testing.assert_close(module.state_dict()[name], wanted)


def test_buffers_of_two_nested_handlers_are_as_after_exactly_one_run():
    class Two(Normed):
        def forward(self, data):
            super().forward(data)
            pyro.sample("u1", dist.Normal(0.0, 1.0))
            pyro.sample("u2", dist.Normal(0.0, 1.0))

    other = pm.MacroVariable("other", micro=["u1", "u2"])
    module = Two()
    inner = pm.macro_do(module, NATURAL)
    pm.macro_do(inner, {other: pm.Natural(1.0)})(DATA)
    assert module.norm.num_batches_tracked == 1
    assert module.calls == 1


# The param store


def with_params():
    loc = pyro.param("loc", torch.tensor([10.0, 20.0]))
    linear = pyro.module("linear", LINEAR)
    mean = linear(torch.ones(1)).squeeze()
    x1 = pyro.sample("x1", dist.Normal(loc[0] + mean, 2.0))
    x2 = pyro.sample("x2", dist.Normal(loc[1], 1.0))
    pyro.param("late", torch.tensor(1.0))
    return x1 + x2


LINEAR = torch.nn.Linear(1, 1).double()


def test_param_store_holds_what_a_plain_run_leaves_there(do):
    with_params()
    wanted = set(pyro.get_param_store().keys())
    assert "late" in wanted
    pyro.clear_param_store()
    do(with_params_drawn, NATURAL)()
    assert set(pyro.get_param_store().keys()) == wanted


def with_params_drawn():
    loc = pyro.param("loc", torch.tensor([10.0, 20.0]))
    linear = pyro.module("linear", LINEAR)
    mean = linear(torch.ones(1)).squeeze()
    pyro.sample("x1", dist.Normal(loc[0] + mean, 2.0))
    pyro.sample("x2", dist.Normal(loc[1], 1.0))
    pyro.param("late", torch.tensor(1.0))


def test_param_store_holds_what_a_plain_run_of_a_module_leaves_there(wrap):
    Shop()()
    wanted = set(pyro.get_param_store().keys())
    pyro.clear_param_store()
    wrap(Shop())()
    found = {name.removeprefix("model.") for name in pyro.get_param_store()}
    assert found == wanted


def test_params_are_initialized_once(do):
    calls = []

    def start():
        calls.append(1)
        return torch.randn(())

    def model():
        loc = pyro.param("loc", start)
        pyro.sample("x1", dist.Normal(loc, 2.0))
        pyro.sample("x2", dist.Normal(20.0, 1.0))

    trace = poutine.trace(do(model, NATURAL)).get_trace()
    assert len(calls) == 1
    loc = pyro.param("loc").detach()
    torch.testing.assert_close(
        trace.nodes["sales__micro"]["fn"].mean[0].detach(), loc + 0.8 * (13 - loc)
    )


def test_statements_are_shown_once_to_handlers_outside(do):
    seen = []

    class Count(poutine.messenger.Messenger):
        def _process_message(self, msg):
            seen.append((msg["type"], msg["name"]))

    given = {SALES: pm.Natural(33.0, given=["z"])}

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        with_params_drawn()

    with Count():
        do(model, given)()
    assert len(seen) == len(set(seen))
    samples = {name for kind, name in seen if kind == "sample"}
    assert samples == {"z", "sales", "sales__micro", "x1", "x2"}
    assert {("param", "loc"), ("param", "late")} <= set(seen)
