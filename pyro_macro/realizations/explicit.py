# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Size, Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.realizations.base import MicroState, Realization, Realized


@dataclass(frozen=True, eq=False)
class Explicit(Realization):
    """Any distribution over the stacked micro state (Definition 4).

    :param value: the macro value.
    :param fn: from the macro value, as a tensor, to a distribution with event shape
        ``(K,)`` whose draws are on the fibre; a draw off it is an
        :class:`~pyro_macro.OffFibre` error.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> def shop():
    ...     x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    ...     x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    ...     return x1 + x2
    >>> sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    >>> def any_split(total):
    ...     shares = dist.Dirichlet(torch.ones(2))
    ...     scale = dist.transforms.AffineTransform(0.0, total, event_dim=1)
    ...     return dist.TransformedDistribution(shares, [scale])
    >>> total = pm.macro_do(shop, {sales: pm.Explicit(33.0, any_split)})()
    >>> bool(torch.isclose(total, torch.tensor(33.0)))
    True
    """

    value: float | Tensor
    fn: Callable[[Tensor], Any]

    def realize(self, state: MicroState) -> Realized:
        law = self.fn(state.tensor(self.value, "value"))
        expected = Size([state.layout.size])
        found = getattr(law, "event_shape", None)
        if found != expected:
            batch = getattr(law, "batch_shape", None)
            hint = (
                " Its elements are in the batch shape: add `.to_event(1)`."
                if found == Size([]) and batch and batch[-1:] == expected
                else ""
            )
            raise PyroMacroError(
                f"{state.what}: fn returned {type(law).__name__} with event shape "
                f"{None if found is None else tuple(found)}. Expected a distribution "
                f"with event shape {tuple(expected)}, for {state.layout.describe()}."
                + hint
            )
        return Realized(law, state.layout)
