# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A program with some sites set, as a model of its own.

Unlike an inner run, it is run on purpose, and often: sites that matter are sample
sites for whoever infers them, and all others are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine import runtime
from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_macro.program.inner import (
    Halt,
    Shared,
    Site,
    is_deterministic,
    preserved_random_state,
    replay,
)


@contextmanager
def detached() -> Iterator[None]:
    """Runs inside are not seen by the handlers and plates that are active."""
    dims, enumerated = runtime._DIM_ALLOCATOR, runtime._ENUM_ALLOCATOR
    before = dict(vars(dims)), dict(vars(enumerated))
    with block_messengers(lambda messenger: True):
        vars(dims)["_stack"] = []
        try:
            yield
        finally:
            for allocator, state in zip((dims, enumerated), before, strict=True):
                vars(allocator).clear()
                vars(allocator).update(state)


@contextmanager
def apart(seed: int) -> Iterator[None]:
    """Inference inside leaves nothing behind for the handlers that are running."""
    with detached(), preserved_random_state(), torch.enable_grad():
        with pyro.validation_enabled(False):
            torch.manual_seed(seed)
            yield


class Substituted(Messenger):
    """Runs a program with some sites set, up to the last one that matters.

    :param model: the program, with its arguments.
    :param counted: sites whose log density counts; those that are not set are left
        to handlers outside.
    :param values: values of sites.
    :param shared: statements executed already.
    :param before: sites as another run met them, whose values the rest has.
    """

    def __init__(
        self,
        model: tuple[Callable[..., Any], tuple, dict],
        counted: Collection[str],
        values: Mapping[str, Tensor],
        shared: Mapping[str, Shared],
        before: Mapping[str, Site],
    ) -> None:
        super().__init__()
        self.model, self.counted, self.values = model, set(counted), values
        self.shared, self.before = shared, before
        self.found: dict[str, Tensor] = {}

    def __enter__(self) -> Substituted:
        self._missing, self.found = set(self.counted), {}
        self._passing: dict[int, str] = {}
        super().__enter__()
        return self

    def run(self) -> dict[str, Tensor]:
        """The values of the sites that count."""
        model, args, kwargs = self.model
        with self:
            try:
                model(*args, **kwargs)
            except Halt as halt:
                if halt.run is not self:
                    raise
        return self.found

    def _pyro_sample(self, msg: Message) -> None:
        name = str(msg["name"])
        if site_is_subsample(msg):
            if name in self.shared:
                replay(msg, self.shared[name])
            return
        if site_is_factor(msg):
            msg["stop"] = True
            return
        self._passing[id(msg)] = name
        if name in self.counted and not is_deterministic(msg):
            msg["scale"], msg["mask"] = 1.0, None  # of the law, not of a subsample
            if name in self.values:
                msg["value"], msg["is_observed"] = self.values[name], True
            return
        msg["stop"] = True
        if name in self.values:
            msg["value"], msg["done"] = self.values[name], True
        elif not is_deterministic(msg) and msg["value"] is None:
            msg["value"], msg["done"] = self.before[name].value, True

    def _pyro_param(self, msg: Message) -> None:
        if msg["name"] in self.shared:
            replay(msg, self.shared[str(msg["name"])])

    def _postprocess_message(self, msg: Message) -> None:
        name = self._passing.pop(id(msg), None)
        if name in self._missing:
            self.found[name] = msg["value"]  # type: ignore[assignment, index]
            self._missing.discard(name)
            if not self._missing:
                raise Halt(self)
