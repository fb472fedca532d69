# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Tests run on a device that is pretended, and on a GPU where there is one."""

from contextlib import contextmanager

import pytest
import torch
from pretend import Pretend

GPU = pytest.param(
    "cuda",
    marks=[
        pytest.mark.cuda,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
    ],
)


class Place:
    """A device, and numbers on it.

    :ivar device: what tensors on it say.
    :ivar dtype: that of its numbers; the default dtype is the other one.
    """

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype

    def __call__(self, *numbers):
        found = numbers if len(numbers) > 1 else numbers[0]
        return torch.tensor(found, device=self.device, dtype=self.dtype)

    def on_cpu(self):
        """The same numbers on the CPU."""
        return Place(torch.device("cpu"), self.dtype)

    def holds(self, tensor):
        return tensor.device == self.device

    def random_state(self):
        return torch.cuda.get_rng_state()

    @contextmanager
    def no_round_trip(self):
        """Nothing inside waits for the device, and nothing is copied to it."""
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class PretendedPlace(Place):
    def __init__(self, pretend, dtype):
        super().__init__(pretend.device, dtype)
        self.pretend = pretend

    def holds(self, tensor):
        return self.pretend.holds(tensor)

    @contextmanager
    def no_round_trip(self):
        with self.pretend.watched():
            yield
            assert not self.pretend.read
            assert not self.pretend.written


@pytest.fixture(params=["pretended", GPU])
def place_of(request):
    """From a dtype to a place."""
    if request.param == "cuda":
        yield lambda dtype: Place(torch.device("cuda", 0), dtype)
        return
    with Pretend() as pretend:
        yield lambda dtype: PretendedPlace(pretend, dtype)
        assert not pretend.refused  # nor by who tries something else then


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def place(place_of, request):
    default = {torch.float32: torch.float64, torch.float64: torch.float32}
    torch.set_default_dtype(default[request.param])
    return place_of(request.param)


@pytest.fixture
def fine(place_of):
    """In float64, as comparisons with closed forms need."""
    return place_of(torch.float64)
