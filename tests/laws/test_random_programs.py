# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Random affine-Gaussian programs, against the dense covariance of all their sites.

A program has up to three latent sites and one or two micro sites, scattered over two
plates; parents outside of a site's plates enter as weighted sums. The reference runs
the program under standard normal noise of its own and takes the whole Jacobian.
"""

import random
from contextlib import ExitStack

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch.autograd.functional import jacobian

import pyro_macro as pm

PLATES = {"rows": (-2, 3), "columns": (-1, 2)}


class UnderNoise(Messenger):
    """Writes each Gaussian site as an affine function of given noise."""

    def __init__(self, noise):
        super().__init__()
        self.noise = iter(noise)

    def _pyro_sample(self, msg):
        if site_is_subsample(msg):
            return
        fn = msg["fn"]
        shape = fn.batch_shape + fn.event_shape
        noise = torch.stack([next(self.noise) for _ in range(shape.numel())])
        noise = noise.reshape(shape)
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if isinstance(fn, torch.distributions.Normal):
            msg["value"] = fn.loc + fn.scale * noise
        else:
            factor = torch.linalg.cholesky(fn.covariance_matrix)
            msg["value"] = fn.loc + (factor @ noise.unsqueeze(-1)).squeeze(-1)
        msg["done"] = True


def batch_shape(plates):
    """The shape inside some plates, as Pyro has it."""
    sizes = {PLATES[p][0]: PLATES[p][1] for p in plates}
    depth = max((-dim for dim in sizes), default=0)
    return tuple(sizes.get(dim, 1) for dim in range(-depth, 0))


def random_program(seed):
    """A program, its macro-variable, and names of sites to hold."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    def some(things, chance=0.5):
        return [thing for thing in things if rng.random() < chance]

    over = some(PLATES)
    staying = some([p for p in PLATES if p not in over])
    sites = []

    def add(name, plates, events):
        shape = batch_shape(plates)
        size = rng.choice(events)
        kind = rng.choice(["normal", "full", "low rank"]) if size else "scalar"
        scale = 10 ** rng.uniform(-2, 2)
        width = size or 1
        square = normal(width, width)
        laws = {
            "scalar": lambda loc: dist.Normal(loc[..., 0], scale),
            "normal": lambda loc: dist.Normal(loc, scale).to_event(1),
            "full": lambda loc: dist.MultivariateNormal(
                loc, scale**2 * (square @ square.mT + torch.eye(width))
            ),
            "low rank": lambda loc: dist.LowRankMultivariateNormal(
                loc, scale * square[:, :1], scale**2 * (0.5 + square[:, 0] ** 2)
            ),
        }
        parents = [
            (
                parent,
                normal(width, parent[2]),
                normal(*shape, 1) if rng.random() < 0.5 else torch.ones(1),
                {p: normal(PLATES[p][1]) for p in parent[1] if p not in plates},
            )
            for parent in some([s for s in sites if s[0].startswith("z")], 0.7)
        ]
        centre = normal(*shape, width)
        sites.append((name, plates, width, laws[kind], parents, centre, bool(size)))

    for i in range(rng.randrange(4)):
        add(f"z{i}", some(PLATES), [0, 0, 2])
    micro = ["x0", "x1"][: rng.choice([1, 2, 2])]
    for name in micro:
        inside = over if name == "x0" else some(over)
        add(name, staying + inside, [2, 3] if len(micro) == 1 else [0, 2, 3])

    def program():
        plates = {n: pyro.plate(n, size, dim=d) for n, (d, size) in PLATES.items()}
        values = {}
        for name, inside, _, law, parents, loc, vector in sites:
            for parent, matrix, slots, sums in parents:
                value = values[parent[0]]  # (..., width of the parent)
                for plate, weights in sums.items():
                    dim = PLATES[plate][0] - 1
                    along = weights.reshape([-1] + [1] * (-dim - 1))
                    value = (value * along).sum(dim, keepdim=True)
                while value.dim() > len(batch_shape(inside)) + 1:
                    value = value.squeeze(0)
                loc = loc + slots * (value @ matrix.mT)
            with ExitStack() as stack:
                for plate in inside:
                    stack.enter_context(plates[plate])
                value = pyro.sample(name, law(loc))
            values[name] = value if vector else value.unsqueeze(-1)

    macro = pm.MacroVariable("total", micro, over)
    given = some([site[0] for site in sites if site[0].startswith("z")], 0.3)
    return program, macro, staying, given


def dense(program):
    """Names, shapes, mean and covariance of all sites, stacked."""
    trace = pyro.poutine.trace(program).get_trace()
    nodes = [
        node
        for node in trace.nodes.values()
        if node["type"] == "sample" and not site_is_subsample(node)
    ]
    shapes = {node["name"]: node["value"].shape for node in nodes}

    def run(noise):
        with UnderNoise(noise):
            found = pyro.poutine.trace(program).get_trace().nodes
        return torch.cat([found[name]["value"].reshape(-1) for name in shapes])

    zero = torch.zeros(sum(shape.numel() for shape in shapes.values()))
    linear = jacobian(run, zero)
    return shapes, run(zero), linear @ linear.mT


def condition(mean, covariance, rows, value):
    crossed = covariance @ rows.mT
    gain = torch.linalg.solve(rows @ crossed, crossed.mT).mT
    return mean + gain @ (value - rows @ mean), covariance - gain @ crossed.mT


def check(seed):
    pyro.set_rng_seed(seed)
    program, macro, staying, given = random_program(seed)
    shapes, mean, covariance = dense(program)
    places, start = {}, 0
    for name, shape in shapes.items():
        places[name] = torch.arange(start, start + shape.numel()).reshape(shape)
        start += shape.numel()

    # The slot of each micro element, by writing slot numbers into its dimensions
    shape = batch_shape(staying)
    slots = torch.arange(max(1, torch.Size(shape).numel())).reshape(shape)
    rows = torch.zeros(slots.numel(), start)
    for name in macro.micro:
        own = slots
        event = places[name].dim() - len(batch_shape_of(places[name], macro, staying))
        own = own.reshape(own.shape + (1,) * event) if event else own
        for slot, place in zip(
            own.expand(places[name].shape).reshape(-1).tolist(),
            places[name].reshape(-1).tolist(),
            strict=True,
        ):
            rows[slot, place] = 1
    value = torch.randn(shape) * 5
    intervened = pm.macro_do(program, {macro: pm.Natural(value, given=given)})
    trace = pyro.poutine.trace(intervened).get_trace()

    held = torch.cat(
        [places[name].reshape(-1) for name in given] or [torch.zeros(0).long()]
    )
    known = torch.zeros(len(held), start)
    known[torch.arange(len(held)), held] = 1
    seen = [trace.nodes[name]["value"].reshape(-1) for name in given]
    if given:
        mean, covariance = condition(mean, covariance, known, torch.cat(seen))
    micro = torch.cat([places[name].reshape(-1) for name in macro.micro])
    mean, covariance = mean[micro], covariance[micro][:, micro]
    spread = covariance.diagonal().sqrt()
    rows = rows[:, micro]
    mean, covariance = condition(mean, covariance, rows, value.reshape(-1))

    # Draws differ: they tell which element of the law is which of the sites
    latent = trace.nodes["total__micro"]["value"].reshape(-1)
    values = torch.cat([trace.nodes[n]["value"].reshape(-1) for n in macro.micro])
    torch.testing.assert_close(rows @ values, value.reshape(-1), rtol=1e-9, atol=1e-7)
    order = (latent[:, None] - values).abs().argmin(1)
    assert order.unique().numel() == len(values)
    law = trace.nodes["total__micro"]["fn"]
    shape = trace.nodes["total__micro"]["value"].shape
    found = law.mean.expand(shape).reshape(-1)
    scale = spread[order]
    assert ((found - mean[order]).abs() / (scale + found.abs())).max() < 1e-7
    blocks = law.covariance_matrix.expand(shape + shape[-1:])
    blocks = torch.block_diag(*blocks.reshape(-1, shape[-1], shape[-1]))
    error = (blocks - covariance[order][:, order]) / (scale[:, None] * scale)
    assert error.abs().max() < 1e-7


def batch_shape_of(place, macro, staying):
    """The batch dimensions of a micro site, from those of its plates it can have."""
    for inside in (macro.over, macro.over[:1], macro.over[1:], ()):
        shape = batch_shape([*staying, *inside])
        if place.shape[: len(shape)] == shape and place.dim() - len(shape) <= 1:
            return shape
    raise AssertionError("a micro site outside of its plates")


@pytest.mark.parametrize("seed", range(60))
def test_natural_law_of_a_random_program(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60, 500))
def test_natural_law_of_many_random_programs(seed):
    check(seed)
