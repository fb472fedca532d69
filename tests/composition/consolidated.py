# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Programs to be consolidated, what they are when fused by hand, and their laws.

A program is run without anything fused wherever that gives the answer; otherwise the
answer is linear algebra, or a sum over all states, both written out here.
"""

import itertools
from dataclasses import dataclass, field, replace

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine

import pyro_macro as pm

from .models import is_deterministic, stochastic

TOLERANCE = {"rtol": 1e-8, "atol": 1e-8}


# The market: h is hidden and acts on a, b and m; m is on the way from a to b and y


def market(y=None):
    h = pyro.sample("h", dist.Normal(1.0, 1.5))
    a = pyro.sample("a", dist.Normal(2 * h, 1.0))
    m = pyro.sample("m", dist.Normal(a - h, 0.5))
    b = pyro.sample("b", dist.Normal(0.5 * m + h, 1.2))
    return pyro.sample("y", dist.Normal(b + m + 3, 0.7), obs=y)


@dataclass(frozen=True)
class Linear:
    """A program of Gaussian sites, in closed form."""

    weights: dict
    constants: dict
    scales: dict = field(default_factory=dict)

    def law(self, names, values):
        """Mean ``(..., n)`` and covariance of some sites where others are set.

        What a site that is set would have been is a site like any other.
        """
        count = len(self.scales)
        mean, gain = {}, {}
        for i, (name, scale) in enumerate(self.scales.items()):
            mean[name] = torch.as_tensor(self.constants.get(name, 0.0))
            gain[name] = torch.as_tensor(scale).unsqueeze(-1) * torch.eye(count)[i]
            for parent, weight in self.weights.get(name, {}).items():
                if parent in values:
                    mean[name] = mean[name] + weight * torch.as_tensor(values[parent])
                else:
                    weight = torch.as_tensor(weight)
                    mean[name] = mean[name] + weight * mean[parent]
                    gain[name] = gain[name] + weight.unsqueeze(-1) * gain[parent]
        means = torch.broadcast_tensors(*(mean[n] for n in names))
        gains = torch.stack(torch.broadcast_tensors(*(gain[n] for n in names)), -2)
        return torch.stack(means, -1), gains @ gains.mT

    def fused(self, names, **values):
        """The program that is left where only some sites are."""

        def program(y=None):
            return self.emit(names, values, y)

        return program

    def emit(self, names, values, y=None):
        mean, cov = self.law(names, values)
        found = []
        for i, name in enumerate(names):
            slope = torch.linalg.solve(cov[..., :i, :i], cov[..., :i, i])
            loc = mean[..., i]
            for j, x in enumerate(found):
                loc = loc + slope[..., j] * (x - mean[..., j])
            variance = cov[..., i, i] - (slope * cov[..., :i, i]).sum(-1)
            obs = y if name == "y" else None
            found.append(pyro.sample(name, dist.Normal(loc, variance.sqrt()), obs=obs))
        return found[-1]

    def with_weight(self, child, parent, weight):
        weights = {**self.weights, child: {**self.weights[child], parent: weight}}
        return replace(self, weights=weights)

    def with_scale(self, name, scale):
        return replace(self, scales={**self.scales, name: scale})


MARKET = Linear(
    weights={
        "a": {"h": 2.0},
        "m": {"a": 1.0, "h": -1.0},
        "b": {"m": 0.5, "h": 1.0},
        "y": {"b": 1.0, "m": 1.0},
    },
    constants={"h": 1.0, "y": 3.0},
    scales={"h": 1.5, "a": 1.0, "m": 0.5, "b": 1.2, "y": 0.7},
)
KEPT = ("a", "b", "y")
SETTINGS = [{}, {"m": 1.5}]  # nothing is done, or to a site that is fused


def fused_market(model=market, keep=KEPT, allow=("m",), **kwargs):
    return pm.consolidate(model, keep=keep, allow=allow, **kwargs)


def done(model, values):
    return poutine.do(model, data=values) if values else model


def tensors(values):
    return {name: torch.as_tensor(value) for name, value in values.items()}


# The weather: the same of finite sites


def weather(y=None):
    h = pyro.sample("h", dist.Bernoulli(0.4))
    a = pyro.sample("a", dist.Bernoulli(0.2 + 0.5 * h))
    m = pyro.sample("m", dist.Categorical(torch.tensor(OF_A)[a.long()]))
    b = pyro.sample("b", dist.Bernoulli(0.1 + 0.2 * m + 0.3 * h))
    return pyro.sample("y", dist.Normal(b - m + 0.5, 0.7), obs=y)


OF_A = [[0.2, 0.3, 0.5], [0.6, 0.3, 0.1]]
STATES = {"h": 2, "a": 2, "m": 3, "b": 2}


def weather_joint(values=None):
    """``P(h, a, m, b)`` as a table, where some sites are set."""
    values = values or {}
    joint = torch.zeros(*STATES.values())
    for h, a, m, b in itertools.product(*map(range, STATES.values())):
        at = {"h": h, "a": a, "m": m, "b": b} | values
        first, second = 0.2 + 0.5 * at["h"], 0.1 + 0.2 * at["m"] + 0.3 * at["h"]
        p = 0.4 if h else 0.6
        p *= first if a else 1 - first
        p *= OF_A[at["a"]][m]
        p *= second if b else 1 - second
        joint[h, a, m, b] = p
    return joint


def weather_table(names, values=None):
    """The joint table of some sites."""
    rest = [i for i, name in enumerate(STATES) if name not in names]
    return weather_joint(values).sum(rest) if rest else weather_joint(values)


# Laws, read off a program that is run


def valued(model, values):
    """``model`` with its random sites at some values."""
    source = poutine.Trace()
    for name, value in values.items():
        source.add_node(
            name, name=name, type="sample", is_observed=False, value=value, infer={}
        )
    return poutine.replay(model, trace=source)


def random_sites(trace):
    return [
        name
        for name, node in stochastic(trace).items()
        if not node["is_observed"] and not is_deterministic(node)
    ]


def gaussian_law(model, names, *args):
    """Mean and covariance of sites of a program all of whose sites are Gaussian.

    The mean of each site is read at the origin and at the unit vectors of those before.
    """
    start = poutine.trace(model).get_trace(*args)
    order = random_sites(start)
    shapes = {n: start.nodes[n]["value"].shape for n in order}
    places, count = {}, 0
    for name in order:
        places[name] = slice(count, count + shapes[name].numel())
        count += shapes[name].numel()

    def at(point):
        values = {n: point[places[n]].reshape(shapes[n]) for n in order}
        return poutine.trace(valued(model, values)).get_trace(*args)

    def means(trace):
        found = [trace.nodes[n]["fn"].mean.expand(shapes[n]).reshape(-1) for n in order]
        return torch.cat(found)

    origin = at(torch.zeros(count))
    constant = means(origin)
    columns = [means(at(unit)) - constant for unit in torch.eye(count)]
    inverse = torch.linalg.inv(torch.eye(count) - torch.stack(columns, -1))
    noise = torch.block_diag(*(_covariance(origin.nodes[n]["fn"]) for n in order))
    index = torch.cat([torch.arange(count)[places[n]] for n in names])
    covariance = inverse @ noise @ inverse.T
    return (inverse @ constant)[index], covariance[index][:, index]


def _covariance(fn):
    while isinstance(fn, torch.distributions.Independent) or hasattr(fn, "_mask"):
        fn = fn.base_dist
    if isinstance(fn, dist.MultivariateNormal):
        blocks = fn.covariance_matrix
        return torch.block_diag(*blocks.reshape(-1, *blocks.shape[-2:]))
    return torch.diag(fn.variance.reshape(-1))


def assert_same_law(model, unfused, names, *args):
    """Both are programs of Gaussian sites, and some of them have one joint law."""
    found, wanted = (gaussian_law(m, names, *args) for m in (model, unfused))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    return found


def table_of(model, names, *args, states=None):
    """The joint table of scalar finite sites, of a program that has no others."""
    states = states or STATES
    trace = poutine.trace(model).get_trace(*args)
    order = random_sites(trace)
    dtypes = {n: trace.nodes[n]["value"].dtype for n in order}
    table = torch.zeros(*(states[n] for n in order))
    for state in itertools.product(*(range(states[n]) for n in order)):
        values = {
            n: torch.tensor(i, dtype=dtypes[n])
            for n, i in zip(order, state, strict=True)
        }
        run = poutine.trace(valued(model, values)).get_trace(*args)
        run.compute_log_prob()
        logs = sum(run.nodes[n]["log_prob_sum"] for n in order)
        table[state] = logs.exp()
    rest = [i for i, n in enumerate(order) if n not in names]
    table = table.sum(rest) if rest else table
    left = [n for n in order if n in names]
    return table.permute([left.index(n) for n in names])
