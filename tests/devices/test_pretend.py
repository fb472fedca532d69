# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The pretended device is one: what would fail or wait on a GPU does here, too."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pretend import Pretend
from pyro.ops.provenance import get_provenance, track_provenance


@pytest.fixture
def pretend():
    with Pretend() as pretend:
        yield pretend


@pytest.fixture
def numbers(pretend):
    return torch.arange(3.0, device=pretend.device)


def test_tensors_are_made_on_the_device(pretend):
    device = pretend.device
    made = [
        torch.zeros(3, device=device),
        torch.randn(3, device=device),
        torch.eye(3, device=device),
        torch.full((3,), 2.0, device=device),
        torch.tensor([1.0, 2.0], device=device),
        torch.ones(3).to(device),
        torch.nn.Linear(2, 2).to(device).weight,
    ]
    assert all(pretend.holds(t) and t.device == device for t in made)
    assert pretend.holds(made[0].new_zeros(2)) and pretend.holds(made[0] + 1)
    assert not pretend.holds(made[0].cpu()) and not pretend.holds(torch.zeros(3))


@pytest.mark.parametrize(
    "mixed",
    [
        lambda there, here: there + here,
        lambda there, here: here * there.sum(),
        lambda there, here: torch.cat([there, here]),
        lambda there, here: torch.where(here > 0, there, there),
        lambda there, here: there @ here,
        lambda there, here: torch.equal(there, here),
        lambda there, here: there.clone().add_(here),
        lambda there, here: torch.stack([there[0], torch.tensor(1.0)]),
        lambda there, here: there.gather(0, here.long()),
        lambda there, here: here[there.long()],
    ],
)
def test_tensors_of_two_devices_are_not_mixed(numbers, mixed):
    with pytest.raises(RuntimeError, match="same device"):
        mixed(numbers, torch.ones(3))


def test_numbers_and_indices_may_be_on_the_cpu(pretend, numbers):
    one = torch.tensor(1.0)
    found = [
        numbers + one,
        torch.where(numbers > 0, numbers, one),
        numbers[torch.tensor([2, 1, 0])],
        numbers.fill_(one),
    ]
    assert all(pretend.holds(t) for t in found)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.equal(x, x),
        lambda x: torch.linalg.cholesky(torch.diag_embed(1 + x)),
        lambda x: torch.linalg.inv(torch.diag_embed(1 + x)),
        lambda x: x.unique(),
        lambda x: torch.ones(3).copy_(x),
        lambda x: torch.normal(x, 1 + x),
    ],
)
def test_waiting_for_the_device_is_noted(pretend, numbers, wait):
    with pretend.watched():
        wait(numbers)
        assert pretend.read and not pretend.written


def test_copies_to_the_device_are_noted(pretend, numbers):
    with pretend.watched():
        torch.tensor(1.0, device=pretend.device)
        torch.ones(3).to(pretend.device)
        numbers.copy_(torch.ones(3))
        assert len(pretend.written) == 3 and not pretend.read


def test_what_stays_on_the_device_is_not_noted(pretend, numbers):
    with pretend.watched():
        x = torch.randn(3, device=pretend.device) + numbers * 2
        x[1:] = 0.0
        x = torch.where(x > 0, x, 1.0).reshape(3, 1).expand(3, 4).sum(-1)
        x.to(pretend.device), numbers.to(x), x.index_select(0, x.argsort())
        assert not pretend.read and not pretend.written


def test_derivatives_are_those_of_the_numbers(pretend):
    x = torch.tensor([1.0, 2.0, 3.0], device=pretend.device, requires_grad=True)
    (slope,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(slope.sum(), x)
    rows = torch.eye(3, device=pretend.device)
    (jacobian,) = torch.autograd.grad(x**2, x, rows, is_grads_batched=True)
    squared = torch.vmap(lambda v: v @ x.detach())(rows)
    assert slope.tolist() == [3.0, 12.0, 27.0] and second.tolist() == [6.0, 12.0, 18.0]
    assert jacobian.diagonal().tolist() == [2.0, 4.0, 6.0]
    assert squared.tolist() == [1.0, 2.0, 3.0]


def test_views_and_changes_in_place_are_of_the_same_numbers(numbers):
    numbers.view(3, 1).mul_(2)
    numbers.unsqueeze_(0)
    assert numbers.shape == (1, 3) and numbers.tolist() == [[0.0, 2.0, 4.0]]
    assert (torch.ones_like(numbers[0]) @ numbers.mT).tolist() == [6.0]


def test_it_has_random_numbers_of_its_own(pretend):
    torch.manual_seed(0)
    here, there = torch.get_rng_state(), torch.cuda.get_rng_state()
    first = torch.randn(3, device=pretend.device)
    assert torch.equal(torch.get_rng_state(), here)
    assert not torch.equal(torch.cuda.get_rng_state(), there)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3, device=pretend.device), first)
    with pytest.raises(RuntimeError, match="generator"):
        torch.randn(3, device=pretend.device, generator=torch.Generator())


def test_pyro_runs_on_it(pretend, numbers):
    def model():
        x = pyro.sample("x", dist.Normal(numbers, 1.0).to_event(1))
        return pyro.sample("y", dist.Normal(x.sum(), numbers[1]))

    trace = pyro.poutine.trace(model).get_trace()
    assert pretend.holds(trace.nodes["x"]["value"])
    assert pretend.holds(trace.log_prob_sum())
    marked = track_provenance(numbers, frozenset({"x"}))
    assert get_provenance(marked + 1) == {"x"} and pretend.holds((marked + 1)._t)


def test_nothing_is_left_behind():
    available = torch.cuda.is_available()
    with Pretend() as pretend:
        torch.ones(3, device=pretend.device)
    assert torch.cuda.is_available() == available
    with pytest.raises(RuntimeError):
        torch.ones(3, device=pretend.device)
    assert torch.nn.Parameter(torch.ones(2)).tolist() == [1.0, 1.0]
