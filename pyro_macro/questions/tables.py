# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Maps and kernels between finite sets, as tables: read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_macro.errors import NotAMicroState, OffFibre, PyroMacroError


def read_map(what: str, table: Any) -> tuple[Tensor, Tensor]:
    """A map from the micro values ``0, 1, ...`` to macro values.

    :param what: how messages begin.
    :returns: the macro values in increasing order, shape ``(m,)``, and which of them
        each micro value has, shape ``(n,)``.
    :raises NotAMicroState: if the map is injective (Definition 2).
    """
    found = table
    if isinstance(table, Mapping):
        if set(table) != set(range(len(table))):
            raise PyroMacroError(
                f"{what} has the keys {list(table)}. Expected the micro values 0 to "
                f"{len(table) - 1}, each with its macro value."
            )
        found = [table[i] for i in range(len(table))]
    values = _table(found)
    if values is None or values.dim() != 1 or not bool(values.isfinite().all()):
        raise PyroMacroError(
            f"{what} is {table!r}. Expected a number, the macro value, for each micro "
            "value 0, 1, ...: a sequence, or a mapping."
        )
    labels, index = values.unique(return_inverse=True)
    if len(labels) == len(values):
        raise NotAMicroState(
            f"{what} is injective: {len(values)} micro value(s), as many macro values "
            "(Definition 2). Let several micro values share one."
        )
    return labels, index


def read_kernel(what: str, given: Any, labels: Tensor, fibre: Tensor) -> Tensor:
    """For each macro value the probabilities of the micro values.

    :param what: how messages begin.
    :param given: a mapping from macro values to vectors, or a matrix.
    :param labels: the macro values in increasing order, shape ``(m,)``.
    :param fibre: which of them each micro value has, shape ``(n,)``.
    :returns: shape ``(m, n)``, rows of sum one.
    :raises OffFibre: if a micro value with another macro value is likely.
    """
    if isinstance(given, Mapping):
        rows = {float(label): row for label, row in given.items()}
        if set(rows) != set(labels.tolist()):
            raise PyroMacroError(
                f"{what} are for the macro values {list(given)}. Expected one for each "
                f"of {labels.tolist()}."
            )
        given = [rows[label] for label in labels.tolist()]
    expected = (len(labels), len(fibre))
    if isinstance(given, (list, tuple)):  # of vectors, which may be tensors
        found = [_table(row) for row in given]
        given = [row.tolist() for row in found if row is not None]
        given = given if len(given) == len(found) else None
    table = _table(given)
    if table is None or table.shape != expected:
        raise PyroMacroError(
            f"{what} do not form a table of shape {expected}. Expected for each of the "
            f"macro values {labels.tolist()} the probabilities of all {len(fibre)} "
            "micro values."
        )
    total = table.sum(-1, keepdim=True)
    if not bool((table >= 0).all() & ((total - 1).abs() < 1e-5).all()):
        raise PyroMacroError(
            f"{what} have the least entry {table.min().item():g}, and sums "
            f"{total[:, 0].tolist()}. Expected probabilities, with sum 1 in each row."
        )
    off = (table > 0) & (fibre != torch.arange(len(labels), device="cpu").unsqueeze(-1))
    if bool(off.any()):
        row, x = off.nonzero()[0].tolist()
        raise OffFibre(
            f"{what}: that of macro value {labels[row].item():g} gives the micro value "
            f"{x} probability {table[row, x].item():g}, whose macro value is "
            f"{labels[fibre[x]].item():g}. Expected 0 off the fibre (Definition 4)."
        )
    return table / total


def _table(numbers: Any) -> Tensor | None:
    """Numbers in float64; ``None`` if they are none."""
    try:
        return torch.as_tensor(numbers, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        return None
