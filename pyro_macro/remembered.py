# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Readings of a model, kept for its next run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pyro_macro.intervention import Ahead, Target
from pyro_macro.program.inner import Shared
from pyro_macro.program.unchanged import (
    Copied,
    Snapshot,
    outside_draws,
    tensors_held,
)
from pyro_macro.units import Interventions

KEPT = 4  # readings of a model: those of its last kinds of arguments
PATIENCE = 4  # readings in a row that could not be kept, after which none is tried


class Remembered:
    """What interventions make of one model, read again when the model has changed.

    A reading is kept only where all that it depends on can be told
    (:class:`~pyro_macro.program.unchanged.Snapshot`), nothing of it was executed
    visibly but whole plates (no parameters, subsamples, sites that are given), no
    random numbers were drawn apart, and nothing has derivatives.
    """

    def __init__(self) -> None:
        self._kept: list[_Reading] = []
        self._failures = 0

    def __reduce__(self) -> Any:
        return Remembered, ()  # copies begin anew

    def targets(
        self,
        interventions: Interventions,
        model: tuple[Callable[..., Any], tuple, dict],
    ) -> tuple[dict[str, Target], dict[str, Shared]]:
        """The target of each micro site, and what was executed ahead of the run."""
        now, executed = None, dict[str, Shared]()
        if self._failures < PATIENCE:
            now = Snapshot.of(dict(interventions), *model)
        for i, reading in enumerate(self._kept):
            if now is not None and reading.is_of_now(now):
                executed = reading.plates_again()
                if reading.has_plates(executed):
                    self._kept.append(self._kept.pop(i))
                    return reading.targets(), executed
                break
        before = None if now is None else now.copied()
        ahead, drawn = Ahead(interventions, model, executed), list[str]()
        with outside_draws(drawn):
            found = ahead.targets()
        lasting = not drawn and all(shared.again for shared in ahead.shared.values())
        if before is None or not lasting or not all(map(_lasts, found.values())):
            self._failures += 1
        else:
            self._failures = 0
            reading = _Reading(before, found, ahead.shared)
            self._kept = [*self._kept, reading][-KEPT:]
        return found, ahead.shared


class _Reading:
    """What was read, and what it was read of.

    :param plates: the statements of plates, by name.
    """

    def __init__(
        self, before: Copied, found: dict[str, Target], plates: dict[str, Shared]
    ) -> None:
        self._before, self._found, self._plates = before, _again(found), plates
        laws = [target.realized.law for target in found.values()]
        self._held = [(tensor, tensor._version) for tensor in tensors_held(laws)]

    def is_of_now(self, now: Snapshot) -> bool:
        """Whether it is of the model as it is, and nobody wrote to its laws.

        Traces show them.
        """
        return self._before.is_of_now(now) and all(
            tensor._version == version for tensor, version in self._held
        )

    def plates_again(self) -> dict[str, Shared]:
        """Executes the statements of plates: handlers outside see them."""
        return {n: plate.again() for n, plate in self._plates.items() if plate.again}

    def has_plates(self, executed: dict[str, Shared]) -> bool:
        """Whether no handler has given a plate other indices."""
        return all(
            plate.is_observed == executed[name].is_observed
            and torch.equal(plate.value, executed[name].value)
            for name, plate in self._plates.items()
        )

    def targets(self) -> dict[str, Target]:
        return _again(self._found)


def _lasts(target: Target) -> bool:
    """Whether it is of use for more than one run: a graph is not."""
    held = tensors_held([target.realized.law, target.value])
    return target.lasts and not any(t.requires_grad or t.is_inference() for t in held)


def _again(found: dict[str, Target]) -> dict[str, Target]:
    fresh = {target: target.again() for target in dict.fromkeys(found.values())}
    return {name: fresh[target] for name, target in found.items()}
