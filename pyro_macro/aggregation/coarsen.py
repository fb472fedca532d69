# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_macro.aggregation.base import Aggregation
from pyro_macro.errors import NotAMicroState


class Coarsen(Aggregation):
    """A table from micro states of finite support to macro values.

    :param mapping: from the value of the micro state (a number; for several elements
        a tuple of numbers, in the order of the micro sites) to a number. Or a nested
        sequence of numbers, one level an element, indexed by their values 0, 1, ....
    :raises NotAMicroState: if the table is empty or injective (Definition 2), or its
        keys have different lengths.

    >>> Coarsen({0: 0, 1: 0, 2: 1})(torch.tensor([2]))
    tensor(1.)
    >>> xor = Coarsen([[0, 1], [1, 0]])
    >>> xor(torch.tensor([[0, 1], [1, 1]]))
    tensor([1., 0.])
    """

    def __init__(self, mapping: Mapping[Any, float] | Sequence[Any] | Tensor) -> None:
        if isinstance(mapping, Mapping):
            keys = [k if isinstance(k, tuple) else (k,) for k in mapping]
            macro = [float(number) for number in mapping.values()]
            if len({len(key) for key in keys}) != 1:
                raise NotAMicroState(
                    "Coarsen: the keys of the table have different lengths, or there "
                    "are none. Expected a number for each element of the micro state."
                )
            self._keys = torch.tensor(keys, dtype=torch.float64, device="cpu")
            self._macro = torch.tensor(macro, dtype=torch.float64, device="cpu")
        else:
            table = torch.as_tensor(mapping, dtype=torch.float64, device="cpu").cpu()
            axes = [
                torch.arange(n, dtype=torch.float64, device="cpu") for n in table.shape
            ]
            self._keys = torch.cartesian_prod(*axes).reshape(-1, table.dim())
            self._macro = table.flatten()
        if not (self._keys.isfinite().all() and self._macro.isfinite().all()):
            raise NotAMicroState("Coarsen: the table contains NaN or infinity.")
        if len(self._macro.unique()) == len(self._macro):
            raise NotAMicroState(
                "Coarsen: the table is injective (or empty), so that nothing is "
                "aggregated (Definition 2). Let several micro states share a macro "
                "value, or use the site itself."
            )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Coarsen)
            and torch.equal(self._keys, other._keys)
            and torch.equal(self._macro, other._macro)
        )

    def __hash__(self) -> int:
        return hash((self._keys.numpy().tobytes(), self._macro.numpy().tobytes()))

    def __repr__(self) -> str:
        states, values = len(self._macro), len(self._macro.unique())
        return f"Coarsen(<{states} micro states to {values} macro values>)"

    def __call__(self, state: Tensor) -> Tensor:
        size = self._keys.shape[-1]
        if state.shape[-1] != size:
            raise NotAMicroState(
                f"{self!r}: the micro state has {state.shape[-1]} element(s), the "
                f"keys of the table have {size}. Give a number for each element."
            )
        keys = self._keys.to(state.device)
        same = (state.unsqueeze(-2).double() == keys).all(-1)  # (..., states)
        if not bool(same.any(-1).all()):
            missing = state.reshape(-1, size)[~same.any(-1).flatten()][0]
            raise NotAMicroState(
                f"{self!r}: there is no entry for the micro state {missing.tolist()}. "
                "Expected one for every state that the sites can have."
            )
        dtype = state.dtype if state.is_floating_point() else torch.float32
        return self._macro.to(state.device, dtype)[same.byte().argmax(-1)]
