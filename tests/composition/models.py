# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Programs, the same programs after an intervention written by hand, and comparisons.

Programs by hand hold the coordinates that remain when the last element of a micro
state is solved for: either under the names of the micro sites, or, stacked, in a site
``<M>__free``.
"""

import functools

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample

import pyro_macro as pm

SALES = pm.MacroVariable("sales", micro=["x1", "x2"])
NATURAL = {SALES: pm.Natural(33.0)}


def under(form, handler, model, what):
    """``handler(model, what)`` as a wrapper, a decorator or a context manager."""
    if form == "wrapper":
        return handler(model, what)
    if form == "decorator":
        return handler(None, what)(model)

    @functools.wraps(model)
    def run(*args, **kwargs):
        with handler(None, what):
            return model(*args, **kwargs)

    return run


# The shop: nothing acts on the micro state


def shop(y=None):
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    w = pyro.sample("w", dist.Normal(1.0, 3.0))
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + w, 0.5), obs=y)


def shop_by_hand(value=33.0, y=None):
    x1 = pyro.sample("x1", dist.Normal(10 + 0.8 * (value - 30), 0.8**0.5))
    x2 = pyro.deterministic("x2", value - x1)
    w = pyro.sample("w", dist.Normal(1.0, 3.0))
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + w, 0.5), obs=y)


# The market: z acts on both parts and on what they act on


def market(y=None):
    z = pyro.sample("z", dist.Normal(1.0, 1.5))
    x1 = pyro.sample("x1", dist.Normal(10 + 2 * z, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20 - z, 1.0))
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + 5 * z, 0.5), obs=y)


def market_by_hand(value=33.0, y=None):
    """Ancestors integrated out: Var X = [[13, -4.5], [-4.5, 3.25]], E X = (12, 19)."""
    z = pyro.sample("z", dist.Normal(1.0, 1.5))
    x1 = pyro.sample(
        "x1", dist.Normal(12 + 8.5 / 7.25 * (value - 31), (13 - 8.5**2 / 7.25) ** 0.5)
    )
    x2 = pyro.deterministic("x2", value - x1)
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + 5 * z, 0.5), obs=y)


def market_by_hand_given_z(value=33.0, y=None):
    z = pyro.sample("z", dist.Normal(1.0, 1.5))
    surprise = value - (10 + 2 * z) - (20 - z)
    x1 = pyro.sample("x1", dist.Normal(10 + 2 * z + 0.8 * surprise, 0.8**0.5))
    x2 = pyro.deterministic("x2", value - x1)
    return pyro.sample("y", dist.Normal(x1 + 3 * x2 + 5 * z, 0.5), obs=y)


# Two macro-variables whose parts share the cause z

A = pm.MacroVariable("A", micro=["a1", "a2"])
B = pm.MacroVariable("B", micro=["b1", "b2"])


def stores():
    z = pyro.sample("z", dist.Normal(0.5, 1.0))
    a1 = pyro.sample("a1", dist.Normal(1 + z, 1.0))
    b1 = pyro.sample("b1", dist.Normal(3 - z, 1.0))
    a2 = pyro.sample("a2", dist.Normal(2 + z, 2.0))
    b2 = pyro.sample("b2", dist.Normal(1 + 3 * z, 1.5))
    pyro.sample("y", dist.Normal(a1 + 2 * a2 + 3 * b1 - b2 + z, 0.5))


def stores_law(z=None):
    """Mean and covariance of (a1, a2, b1, b2), z integrated out or at a value."""
    slope = torch.tensor([1.0, 1.0, -1.0, 3.0])
    own = torch.diag(torch.tensor([1.0, 4.0, 1.0, 2.25]))
    mean = torch.tensor([1.0, 2.0, 3.0, 1.0])
    if z is None:
        return mean + 0.5 * slope, own + torch.outer(slope, slope)
    return mean + z.unsqueeze(-1) * slope, own


def given_total(mean, cov, rows, values):
    """Mean and covariance of ``N(mean, cov)`` given ``rows @ x = values``."""
    rows = torch.as_tensor(rows, dtype=mean.dtype)
    gain = cov @ rows.T @ torch.linalg.inv(rows @ cov @ rows.T)
    miss = torch.as_tensor(values, dtype=mean.dtype) - mean @ rows.T
    return mean + miss @ gain.T, cov - gain @ rows @ cov


def on_fibre(name, mean, cov, value):
    """The first coordinates of a micro state as a site, and the whole of it."""
    free = pyro.sample(
        name + "__free", dist.MultivariateNormal(mean[..., :-1], cov[:-1, :-1])
    )
    return torch.cat([free, (value - free.sum(-1)).unsqueeze(-1)], -1)


# Comparisons


def stochastic(trace):
    return {
        name: node
        for name, node in trace.nodes.items()
        if node["type"] == "sample" and not site_is_subsample(node)
    }


def is_deterministic(node):
    return bool(node["infer"].get("_deterministic"))


def replayed(by_hand, trace):
    """``by_hand`` at the values of a trace of an intervened program."""
    source = poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] != "sample":
            continue
        source.add_node(name, **{**node, "name": name, "is_observed": False})
        if name.endswith("__micro"):
            free = {**node, "value": node["value"][..., :-1], "is_observed": False}
            free_name = name.replace("__micro", "__free")
            source.add_node(free_name, **{**free, "name": free_name})
    return poutine.replay(by_hand, trace=source)


def assert_same_program(intervened, by_hand, *args, macros=("sales",), **kwargs):
    """Same sites, same values, same densities; returns the intervened trace."""
    trace = poutine.trace(intervened).get_trace(*args, **kwargs)
    expected = poutine.trace(replayed(by_hand, trace)).get_trace(*args, **kwargs)
    assert_same_traces(trace, expected, macros)
    return trace


def assert_same_traces(trace, expected, macros=("sales",)):
    trace.compute_log_prob()
    expected.compute_log_prob()
    found, wanted = stochastic(trace), stochastic(expected)
    own = {m + end for m in macros for end in ("", "__micro")}
    free = {m + "__free" for m in macros}
    assert set(found) - own == set(wanted) - free - own
    for name in set(found) - own:
        torch.testing.assert_close(found[name]["value"], wanted[name]["value"])
        if is_deterministic(found[name]):
            assert not found[name]["log_prob"].any(), f"{name} is fixed"
        else:
            # Shapes included: plates, scales and masks have to act alike
            torch.testing.assert_close(
                found[name]["log_prob"], wanted[name]["log_prob"]
            )
    torch.testing.assert_close(trace.log_prob_sum(), expected.log_prob_sum())


def assert_only_added(aggregated, model, totals, *args, **kwargs):
    """``aggregated`` is ``model`` with macro values in the trace, and nothing else.

    :param totals: from a trace to what the macro values have to be, by name.
    """
    traces = []
    for program in (aggregated, model):
        pyro.set_rng_seed(7)
        traces.append(poutine.trace(program).get_trace(*args, **kwargs))
    trace, plain = traces
    totals = totals(plain)
    found, wanted = stochastic(trace), stochastic(plain)
    assert set(found) == set(wanted) | set(totals)
    trace.compute_log_prob()
    plain.compute_log_prob()
    for name, node in wanted.items():
        torch.testing.assert_close(found[name]["value"], node["value"], rtol=0, atol=0)
        torch.testing.assert_close(found[name]["log_prob"], node["log_prob"])
    for name, total in totals.items():
        assert is_deterministic(found[name])
        assert found[name]["is_observed"]
        torch.testing.assert_close(found[name]["value"], total)
    torch.testing.assert_close(trace.log_prob_sum(), plain.log_prob_sum())
    return trace


def sales_total(trace):
    """The macro value of ``SALES``, for :func:`assert_only_added`."""
    return {"sales": trace.nodes["x1"]["value"] + trace.nodes["x2"]["value"]}


def assert_same_gradients(intervened, by_hand, *args, **kwargs):
    """The log densities have equal gradients with respect to all parameters."""
    trace = poutine.trace(intervened).get_trace(*args, **kwargs)
    for node in stochastic(trace).values():
        node["value"] = node["value"].detach()
    gradients = []
    for program in (poutine.replay(intervened, trace=trace), replayed(by_hand, trace)):
        run = poutine.trace(program).get_trace(*args, **kwargs)
        store = pyro.get_param_store()
        params = [store[name].unconstrained() for name in sorted(store.keys())]
        assert params
        gradients.append(torch.autograd.grad(run.log_prob_sum(), params))
    for found, wanted in zip(*gradients, strict=True):
        assert wanted.abs().sum() > 0
        torch.testing.assert_close(found, wanted)
