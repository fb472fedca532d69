# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The same answers from 1, 2 and 4 processes, and from none but this one."""

import os
import re

import pyro
import pyro.distributions as dist
import pytest
import torch
from filelock import FileLock
from launch import launch
from sharded_answers import DRAWS, answers
from sharded_models import MEAN, PRICE, SCALE, SIZE, sharded

RANKS = [1, 2, 4]
DRAWN = ["poisson", "gamma", "beta", "bernoulli", "categorical", "student"]


@pytest.fixture(scope="module")
def alone():
    """This process alone, without a process group."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    found = answers()
    torch.set_default_dtype(dtype)
    return found


@pytest.fixture(scope="module", params=RANKS)
def spread(request, tmp_path_factory):
    """What each of some ranks found."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent  # of all workers, the first of which runs the ranks
    folder = base / f"ranks{request.param}"
    files = [folder / f"rank{i}.pt" for i in range(request.param)]
    with FileLock(f"{folder}.lock"):
        folder.mkdir(exist_ok=True)
        if not all(file.exists() for file in files):
            done = launch("sharded_answers.py", request.param, folder)
            assert done.returncode == 0, done.stderr[-4000:]
    return [torch.load(file) for file in files]


def close(found, expected, name):
    torch.testing.assert_close(
        found, expected, rtol=1e-12, atol=1e-12, msg=lambda text: f"{name}: {text}"
    )


def test_slots_have_the_same_values(alone, spread):
    for name, expected in alone.slots.items():
        parts = [rank["slots"][name] for rank in spread]
        assert all(len(part) for part in parts)
        close(torch.cat(parts), expected, name)


def test_draws_are_the_same_bit_for_bit(alone, spread):
    for name in DRAWN:
        found = torch.cat([rank["slots"][name] for rank in spread])
        assert torch.equal(found, alone.slots[name]), name


def test_what_is_outside_of_the_plate_is_the_same_everywhere(alone, spread):
    for name, expected in alone.everywhere.items():
        for rank in spread:
            assert torch.equal(rank["everywhere"][name], spread[0]["everywhere"][name])
            close(rank["everywhere"][name], expected, name)


def test_averages_over_ranks_are_those_of_the_whole(alone, spread):
    for name, expected in alone.averaged.items():
        parts = [rank["averaged"][name] for rank in spread]
        close(torch.stack(parts).mean(0), expected, name)


def test_a_draw_takes_one_message(spread):
    """For a shift one more, for its direction, and some where something is known."""
    for rank in spread:
        for name, sizes in rank["messages"].items():
            expected = 1 + name.endswith(("Shift", "along"))
            expected += 4 * name.startswith("told Natural")
            expected += 3 * (name == "told Shift")
            assert sizes == ([] if len(spread) == 1 else [34] * expected), name


def test_each_rank_says_what_is_wrong(spread):
    expected = [
        "PyroMacroError: plate 'products' of 11 slots: the ranks are out of step",
        "PyroMacroError: plate 'products' of 11 slots: the ranks are out of step",
        "PyroMacroError: plate 'products' of 10[0123] slots: the ranks are out of step",
        "with [456789] numbers to be summed",
        "with 5[0-9] numbers to be summed",
        "the ranks are out of step",
        "PyroMacroError: sharded_plate 'few': 1 slots cannot be split over",
        "PyroMacroError: sharded_plate 'products': .* create_plates=",
        "UnsupportedLaw: the elements of this latent site lie on several ranks",
        "NotImplementedError: HMC/NUTS does not support model with subsample sites",
        "ValueError: Expected all enumerated sample sites to share a common",
        "ValueError: Shape mismatch inside plate",
    ]
    for rank in spread if len(spread) > 1 else []:
        assert len(rank["refusals"]) == len(expected)
        for found, pattern in zip(rank["refusals"].values(), expected, strict=True):
            assert re.search(pattern, found), (pattern, found)


def test_gradients_of_an_elbo_are_those_of_the_formula(alone):
    """The objective by hand, for the noise that was drawn."""
    values = {"slope": 0.5, "loc": 0.1, "scale": 0.4, "bias": -0.2, "spread": 0.3}
    p = {n: torch.tensor(v, requires_grad=True) for n, v in values.items()}
    pyro.set_rng_seed(7)
    theta = p["loc"] + p["scale"] * dist.Normal(0.0, 1.0).sample()
    noise = sharded().shards.normal(torch.Size([SIZE]), 0, MEAN)
    x = 0.8 * PRICE + p["bias"] + p["spread"] * noise
    elbo = (
        dist.Normal(0.0, 1.0).log_prob(theta)
        + dist.Normal(p["slope"] * MEAN + theta, SCALE).log_prob(x).sum()
        + dist.Normal(x, 0.5).log_prob(PRICE).sum()
        + dist.Normal(x.sum(), 3.0).log_prob(torch.tensor(20.0))
        - dist.Normal(p["loc"], p["scale"]).log_prob(theta)
        - dist.Normal(0.8 * PRICE + p["bias"], p["spread"]).log_prob(x).sum()
    )
    torch.testing.assert_close(alone.averaged["loss"], -elbo)
    (-elbo).backward()
    found = alone.everywhere
    for name in ("slope", "loc", "bias"):
        owner = "model" if name == "slope" else "guide"
        torch.testing.assert_close(
            found[f"gradient of {owner}.{name}"], p[name].grad, msg=name
        )
    for name in ("scale", "spread"):  # on the scale of their logarithm
        torch.testing.assert_close(
            found[f"gradient of guide.{name}_unconstrained"],
            p[name].grad * values[name],
        )


def test_many_draws_meet_their_totals(alone):
    assert alone.slots["many draws"].shape == (SIZE, DRAWS)
    torch.testing.assert_close(
        alone.slots["many draws"].sum(0), alone.everywhere["many draws"].squeeze(-1)
    )
