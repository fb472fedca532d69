# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What sharded programs answer, computed on each of the ranks there are.

    torchrun --nproc_per_node=4 tests/sharding/sharded_answers.py FOLDER

writes one file a rank. Answers under ``slots`` are those of the slots of the rank,
``everywhere`` are the same on all ranks, ``averaged`` have to be averaged over them.
"""

import sys
from datetime import timedelta
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
import torch.distributed as distributed
from pyro import poutine
from pyro.infer import (
    NUTS,
    Predictive,
    Trace_ELBO,
    TraceEnum_ELBO,
    config_enumerate,
)
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from sharded_models import (
    CASES,
    MEAN,
    PRICE,
    SALES,
    SCALE,
    SIZE,
    WEIGHTS,
    amount,
    pieces,
    sharded,
)
from torch.distributions import biject_to, constraints
from torch.nn.parallel import DistributedDataParallel

import pyro_macro as pm

DRAWS = 40  # more than fit into one message


def traced(model, *args):
    pyro.set_rng_seed(7)
    trace = poutine.trace(model).get_trace(*args)
    trace.compute_log_prob()
    return trace


def mine(tensor):
    return tensor[sharded().slots]


class Answers:
    def __init__(self):
        self.slots, self.everywhere, self.averaged = {}, {}, {}
        self.messages, self.refusals = {}, {}


def answers():
    found = Answers()
    _families(found)
    for name, case in CASES.items():
        _interventions(found, name, case)
    _linear_by_parts(found)
    _many_draws(found)
    _slots_with_totals(found)
    _gradients(found)
    _elbo_gradients(found)
    _autoguide(found)
    _local_parameters(found)
    _predictive(found)
    _enumerated(found)
    if _ranks() > 1:
        _refusals(found)
    return found


def _ranks():
    return distributed.get_world_size() if distributed.is_initialized() else 1


def _families(found):
    trace = traced(pieces, sharded)
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and name not in ("products", "inner"):
            value = node["value"]
            found.slots[name] = value.mT if name == "inside" else value
    found.averaged["families"] = trace.log_prob_sum()


def _interventions(found, name, case):
    value = amount(case)
    shares = case.weights / case.weights.square().sum()
    for realization in (
        pm.Natural(value),
        pm.Proportional(value),
        pm.Shift(0.5),
        pm.Shift(0.5, along=shares),
        pm.Allocate(value, shares),
    ):
        key = f"{name} {type(realization).__name__}"
        key += " along" if getattr(realization, "along", None) is not None else ""
        intervened = pm.macro_do(case.model, {case.macro: realization})
        with _counted() as sizes:
            pyro.set_rng_seed(7)
            intervened(sharded)
        found.messages[key] = list(sizes)
        trace = traced(intervened, sharded)
        for site in (*case.macro.micro, "y"):
            if site in trace.nodes:
                found.slots[f"{key} {site}"] = trace.nodes[site]["value"]
        found.everywhere[f"{key} total"] = trace.nodes["sales"]["value"]
        if "sales__micro" in trace.nodes:
            micro = trace.nodes["sales__micro"]
            found.everywhere[f"{key} density"] = micro["log_prob_sum"]
        found.averaged[f"{key} density of all"] = trace.log_prob_sum()
    trace = traced(pm.aggregate(case.model, [case.macro]), sharded)
    found.everywhere[f"{name} aggregate"] = trace.nodes["sales"]["value"]


class _counted:
    """The sizes of the messages that are sent inside."""

    def __enter__(self):
        self.send, self.sizes = distributed.all_reduce, []

        def send(tensor, **kwargs):
            self.sizes.append(tensor.numel())
            return self.send(tensor, **kwargs)

        distributed.all_reduce = send
        return self.sizes

    def __exit__(self, *exc):
        distributed.all_reduce = self.send


def _linear_by_parts(found):
    """Weights, shares and directions of which each rank has its own alone."""
    case = CASES["linear"]
    macro = pm.MacroVariable("sales", "x", "products", pm.Linear(mine(WEIGHTS)))
    share = mine(WEIGHTS / WEIGHTS.square().sum())
    for realization in (pm.Natural(1.0), pm.Shift(1.0, share), pm.Allocate(1.0, share)):
        key = f"by parts {type(realization).__name__}"
        trace = traced(pm.macro_do(case.model, {macro: realization}), sharded)
        found.slots[key] = trace.nodes["x"]["value"]
        found.everywhere[key] = trace.nodes["sales"]["value"]


def _many_draws(found):
    case = CASES["shocked"]
    values = amount(case) + torch.linspace(0.0, 1.0, DRAWS).unsqueeze(-1)
    intervened = pm.macro_do(case.model, {case.macro: pm.Natural(values)})
    with pyro.plate("draws", DRAWS, dim=-2):
        trace = traced(intervened, sharded)
    found.slots["many draws"] = trace.nodes["x"]["value"].mT
    found.everywhere["many draws"] = trace.nodes["sales"]["value"]
    found.everywhere["many densities"] = trace.nodes["sales__micro"]["log_prob"]


def _slots_with_totals(found):
    case = CASES["vectors"]
    packs = pm.MacroVariable("packs", micro="x")
    values = case.loc.reshape(SIZE, 3).sum(-1) + 1
    trace = traced(pm.macro_do(case.model, {packs: pm.Natural(values)}), sharded)
    found.slots["slots with totals"] = trace.nodes["x"]["value"]
    found.averaged["slots with totals"] = trace.log_prob_sum()


def _gradients(found):
    """Through draws and densities of a natural law, and sums over the plate."""
    theta = torch.tensor([0.3, 0.7], requires_grad=True)

    def model():
        shock = pyro.sample("shock", dist.Normal(theta[0], 1.0))
        products = sharded()
        with products as slots:
            loc = theta[0] * MEAN[slots] + shock
            x = pyro.sample("x", dist.Normal(loc, theta[1] * SCALE[slots]))
        return products.sum(PRICE[slots] * x**2)

    intervened = pm.macro_do(model, {SALES: pm.Natural(10 * theta[1])})
    trace = traced(intervened)
    density = trace.nodes["sales__micro"]["log_prob_sum"]
    for key, scalar in {
        "gradient of a density": density,
        "gradient of an outcome": trace.nodes["_RETURN"]["value"],
    }.items():
        (gradient,) = torch.autograd.grad(scalar, theta, retain_graph=True)
        found.everywhere[key[12:]] = scalar.detach()
        found.averaged[key] = gradient


class Model(PyroModule):
    """Something latent in all products, in each, and data of each and of the sum."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self):
        theta = pyro.sample("theta", dist.Normal(0.0, 1.0))
        products = sharded(-1)
        with products as slots:
            loc = self.slope * MEAN[slots] + theta
            x = pyro.sample("x", dist.Normal(loc, SCALE[slots]))
            pyro.sample("y", dist.Normal(x, 0.5), obs=PRICE[slots])
        total = products.sum(x)
        pyro.sample("total", dist.Normal(total, 3.0), obs=torch.tensor(20.0))


class Guide(PyroModule):
    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.tensor(0.1))
        self.scale = PyroParam(torch.tensor(0.4), constraints.positive)
        self.bias = torch.nn.Parameter(torch.tensor(-0.2))
        self.spread = PyroParam(torch.tensor(0.3), constraints.positive)

    def forward(self):
        pyro.sample("theta", dist.Normal(self.loc, self.scale))
        with sharded(-1) as slots:
            loc = 0.8 * PRICE[slots] + self.bias
            pyro.sample("x", dist.Normal(loc, self.spread))


def replicated(module):
    """As users of several processes wrap a module."""
    return DistributedDataParallel(module) if distributed.is_initialized() else module


def _elbo_gradients(found):
    elbo = Trace_ELBO()(Model(), Guide())
    whole = replicated(elbo)
    pyro.set_rng_seed(7)
    loss = whole()
    loss.backward()
    found.averaged["loss"] = loss.detach()
    for name, parameter in elbo.named_parameters():
        found.everywhere[f"gradient of {name}"] = parameter.grad.clone()


def _autoguide(found):
    """Three steps of stochastic gradient descent, of a guide with parameters a slot."""
    pyro.set_rng_seed(3)
    model = Model()
    guide = AutoNormal(model, create_plates=lambda: sharded(-1))
    guide()
    elbo = replicated(Trace_ELBO()(model, guide))
    for _ in range(3):
        elbo.zero_grad()
        elbo().backward()
        with torch.no_grad():
            for parameter in elbo.parameters():
                parameter -= 1e-3 * parameter.grad
    for name, parameter in guide.named_parameters():
        found.everywhere[f"fitted {name}"] = parameter.detach().clone()


def _local_parameters(found):
    """Each rank has those of its slots, and divides their gradients by the ranks."""
    local = torch.nn.Parameter(mine(PRICE).clone())

    def guide():
        pyro.sample("theta", dist.Normal(0.1, 0.4))
        with sharded(-1):
            pyro.sample("x", dist.Normal(local, 0.3))

    pyro.set_rng_seed(7)
    Trace_ELBO().differentiable_loss(Model(), guide).backward()
    found.slots["gradient of local parameters"] = local.grad / _ranks()


def _predictive(found):
    case = CASES["shocked"]
    intervened = pm.macro_do(case.model, {case.macro: pm.Natural(20.0)})
    for parallel in (True, False):
        pyro.set_rng_seed(7)
        draws = Predictive(intervened, num_samples=3, parallel=parallel)(sharded)
        found.slots[f"predictive {parallel}"] = draws["y"].mT
        found.everywhere[f"predictive {parallel}"] = draws["shock"]


def mixture():
    with sharded() as slots:
        z = pyro.sample("z", dist.Bernoulli(MEAN[slots] - 1))
        pyro.sample("y", dist.Normal(z, SCALE[slots]), obs=PRICE[slots])


def _enumerated(found):
    loss = TraceEnum_ELBO(max_plate_nesting=1).loss
    enumerated = config_enumerate(mixture)
    found.averaged["enumerated"] = torch.tensor(loss(enumerated, lambda: None))


def _refusals(found):
    rank = distributed.get_rank()
    natural = pm.macro_do(CASES["shocked"].model, {SALES: pm.Natural(20.0)})
    model = Model()

    def in_draws(count):
        with pyro.plate("draws", count, dim=-2):
            natural(sharded)

    def seeds():
        pyro.set_rng_seed(rank)
        natural(sharded)

    def draws():
        if rank == 0:
            torch.rand(3)
        case = CASES["independent"]
        share = torch.full((SIZE,), 1 / SIZE)
        pm.macro_do(case.model, {SALES: pm.Allocate(1.0, share)})(sharded)

    def sizes():
        with pm.sharded_plate("products", 100 + rank) as slots:
            pyro.sample("x", dist.Normal(torch.zeros(len(slots)), 1.0))

    def programs():
        products = sharded(-1)
        if rank == 0:
            products.sum(torch.ones(2))
        else:
            pm.sharded_plate("others", SIZE, dim=-1).sum(torch.ones(2))

    def fewer_slots():
        with pm.sharded_plate("few", 1):
            pass

    def autoguide():
        guide = AutoNormal(model)
        guide()
        Trace_ELBO().loss(model, guide)

    def coordinates():
        biject_to(traced(natural, sharded).nodes["sales__micro"]["fn"].support)

    def chains():
        NUTS(CASES["independent"].model).setup(10, sharded)

    def enumerated_outside():
        z = pyro.sample("z", dist.Bernoulli(0.3))
        with sharded(-1) as slots:
            pyro.sample("y", dist.Normal(z, 1.0), obs=PRICE[slots])

    def enumeration():
        model = config_enumerate(enumerated_outside)
        TraceEnum_ELBO(max_plate_nesting=1).loss(model, lambda: None)

    def other_shapes():
        with sharded():
            pyro.sample("x", dist.Normal(MEAN, 1.0))

    for ask in (
        seeds,
        draws,
        lambda: pm.aggregate(sizes, [SALES])(),
        lambda: in_draws(3 + rank),
        lambda: in_draws(50 + rank),
        programs,
        fewer_slots,
        autoguide,
        coordinates,
        chains,
        enumeration,
        other_shapes,
    ):
        pyro.set_rng_seed(0)
        try:
            ask()
        except Exception as error:
            name = type(error).__name__
            found.refusals[len(found.refusals)] = f"{name}: {error}"
        else:
            found.refusals[len(found.refusals)] = "nothing"


if __name__ == "__main__":
    distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    found = answers()
    rank = distributed.get_rank()
    torch.save(vars(found), Path(sys.argv[1]) / f"rank{rank}.pt")
    distributed.destroy_process_group()
