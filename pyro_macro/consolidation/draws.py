# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Many draws of some sites of a model, under interventions that differ by draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_factor
from torch import Tensor
from tqdm.auto import tqdm

from pyro_macro.program.inner import (
    is_deterministic,
    preserved_params,
    preserved_random_state,
)
from pyro_macro.program.substitution import detached

Model = tuple[Callable[..., Any], tuple, dict[str, Any]]
MANY = 2000  # runs one by one that take a progress bar


class Unobserved(Messenger):
    """Draws what is observed; deterministic sites stay what they are."""

    def _pyro_sample(self, msg: Message) -> None:
        if not msg["is_observed"] or is_deterministic(msg) or site_is_factor(msg):
            return
        msg["is_observed"] = msg["done"] = False
        msg["value"] = None


def drawn(
    model: Model,
    names: Sequence[str],
    count: int,
    settings: Mapping[str, Tensor],
    seed: int,
    what: str = "Drawing",
) -> Tensor:
    """Draws of some sites, side by side if the model allows that.

    Observed sites are drawn, too. The random state is left as it was.

    :param settings: values that sites are set to, shape ``(count,)`` each.
    :returns: shape ``(count, number of elements of all sites)``.
    """
    with detached(), preserved_params(), torch.no_grad():
        with preserved_random_state():
            torch.manual_seed(seed)
            found = _side_by_side(model, names, count, settings)
            if found is None:
                torch.manual_seed(seed)
                found = _one_by_one(model, names, count, settings, what)
    return found


def _run(
    model: Model, names: Sequence[str], settings: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    fn, args, kwargs = model
    done = pyro.poutine.do(Unobserved()(fn), dict(settings))
    nodes: Any = pyro.poutine.trace(done).get_trace(*args, **kwargs).nodes
    return {n: nodes[n]["value"] for n in names}


def _side_by_side(
    model: Model, names: Sequence[str], count: int, settings: Mapping[str, Tensor]
) -> Tensor | None:
    depth = _depth(model)
    place = (count,) + (1,) * depth
    try:
        with pyro.plate("pyro_macro_draws", count, dim=-1 - depth):
            values = _run(
                model, names, {n: v.reshape(place) for n, v in settings.items()}
            )
        first = _run(model, names, {n: v[0] for n, v in settings.items()})
    except Exception:  # whatever it is: it is no model for plates around it
        return None
    columns = []
    for name in names:
        one, many = first[name], values[name]
        if (
            many.dim()
            and many.shape[0] == count
            and many.numel() == count * one.numel()
        ):
            columns.append(many.reshape(count, -1))
        elif many.shape == one.shape and torch.equal(many, one):
            columns.append(many.reshape(1, -1).expand(count, -1))  # a constant
        else:
            return None
    return torch.cat([c.double() for c in columns], -1)


def _depth(model: Model) -> int:
    fn, args, kwargs = model
    trace = pyro.poutine.trace(fn).get_trace(*args, **kwargs)
    dims: list[int] = [
        -frame.dim  # type: ignore[operator]
        for node in trace.nodes.values()
        for frame in node.get("cond_indep_stack", ())
        if frame.vectorized
    ]
    return max(dims, default=0)


def _one_by_one(
    model: Model,
    names: Sequence[str],
    count: int,
    settings: Mapping[str, Tensor],
    what: str,
) -> Tensor:
    rows = []
    for i in tqdm(range(count), desc=what, disable=count < MANY, leave=False):
        values = _run(model, names, {n: v[i] for n, v in settings.items()})
        rows.append(torch.cat([values[n].reshape(-1).double() for n in names]))
    return torch.stack(rows)
