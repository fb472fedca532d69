# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Readings of a model, kept for its next run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro_macro.intervention import Ahead, Target
from pyro_macro.program.inner import Shared
from pyro_macro.program.unchanged import Snapshot, outside_draws
from pyro_macro.units import Interventions

KEPT = 4  # readings of a model: those of its last kinds of arguments
PATIENCE = 4  # readings in a row that could not be kept, after which none is tried


class Remembered:
    """What interventions make of one model, read again when the model has changed.

    A reading is kept only where all that it depends on can be told
    (:class:`~pyro_macro.program.unchanged.Snapshot`), nothing of it was executed
    visibly (parameters, subsamples, sites that are given), and no random numbers were
    drawn apart.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Snapshot, dict[str, Target]]] = []
        self._failures = 0

    def __reduce__(self) -> Any:
        return Remembered, ()  # copies begin anew

    def targets(
        self,
        interventions: Interventions,
        model: tuple[Callable[..., Any], tuple, dict],
    ) -> tuple[dict[str, Target], dict[str, Shared]]:
        """The target of each micro site, and what was executed ahead of the run."""
        now = None
        if self._failures < PATIENCE:
            now = Snapshot.of(dict(interventions), *model)
        for i, (before, found) in enumerate(self._kept):
            if now is not None and before.is_of_now(now):
                self._kept.append(self._kept.pop(i))
                return _again(found), {}
        kept = None if now is None else now.copied()
        ahead, drawn = Ahead(interventions, model), list[str]()
        with outside_draws(drawn):
            found = ahead.targets()
        lasting = not ahead.shared and all(t.lasts for t in found.values())
        if kept is None or drawn or not lasting:
            self._failures += 1
        else:
            self._failures = 0
            self._kept = [*self._kept, (kept, _again(found))][-KEPT:]
        return found, ahead.shared


def _again(found: dict[str, Target]) -> dict[str, Target]:
    fresh = {target: target.again() for target in dict.fromkeys(found.values())}
    return {name: fresh[target] for name, target in found.items()}
