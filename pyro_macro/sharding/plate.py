# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A plate whose slots are spread over processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.poutine.indep_messenger import CondIndepStackFrame
from pyro.poutine.runtime import Message
from pyro.poutine.util import site_is_factor, site_is_subsample
from torch import Tensor

from pyro_macro.errors import PyroMacroError
from pyro_macro.program.inner import is_deterministic, shards_of
from pyro_macro.sharding.draws import by_shards
from pyro_macro.sharding.ranks import Ranks
from pyro_macro.sharding.shards import Shards


class ShardedFrame(CondIndepStackFrame):
    """What a site knows of a sharded plate around it."""

    shards: Shards

    @classmethod
    def of(cls, frame: CondIndepStackFrame, shards: Shards) -> ShardedFrame:
        new = cls(*frame)
        new.shards = shards
        return new


class sharded_plate(pyro.plate):
    """A plate of ``size`` slots, of which each process runs some.

    Without an initialized ``torch.distributed`` process group there is one process,
    which runs them all; nothing else changes. On several ranks (processes of the
    group), each runs the same program, seeded alike, with the slots that are its own:
    all sites outside of the plate are the same on all ranks, and draws inside do not
    depend on how many ranks there are.

    Inside, log densities are scaled by the number of ranks: the *average* over ranks of
    an ELBO, and of its gradients, as ``DistributedDataParallel`` takes it, is that of
    the whole model. That holds for parts of unequal size, and for losses that are
    linear in the log densities (``Trace_ELBO``, ``TraceMeanField_ELBO``).

    A sum over a tensor of the plate inside the model, ``x.sum(-1)``, is over this
    rank's slots; :meth:`sum` is over all. Macro-variables ``over`` the plate are
    aggregated over all of them, for ``aggregate``, and for ``macro_do`` with
    ``Natural`` (jointly affine-Gaussian), ``Proportional``, ``Shift`` and ``Allocate``.

    :param name: of the plate.
    :param size: the number of its slots on all ranks together.
    :param group: the process group, by default that of all processes.
    :param dim: as for ``pyro.plate``.
    :param device: of the indices.
    :raises PyroMacroError: if there are more ranks than blocks of slots, or if a guide
        has another plate of that name.
    :ivar slots: this rank's slots, as a slice.

    >>> import pyro, torch, pyro.distributions as dist, pyro_macro as pm
    >>> price, mean = torch.tensor([1.0, 3.0]), torch.tensor([10.0, 20.0])
    >>> def shop():
    ...     products = pm.sharded_plate("products", 2)
    ...     with products as mine:
    ...         x = pyro.sample("x", dist.Normal(mean[mine], 2.0))
    ...     return products.sum(price[mine] * x)
    >>> sales = pm.MacroVariable("sales", micro="x", over="products")
    >>> pm.macro_do(shop, {sales: pm.Allocate(30.0, shares=[0.5, 0.5])})()
    tensor(60.)
    """

    def __init__(
        self,
        name: str,
        size: int,
        group: Any = None,
        dim: int | None = None,
        device: str | torch.device | None = None,
    ) -> None:
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise PyroMacroError(
                f"sharded_plate {name!r}: size is {size!r}. Expected a positive whole "
                "number, of slots on all ranks together."
            )
        self.shards = Shards(name, size, Ranks(group))
        self._params: set[int] = set()  # statements that are under way
        mine = self.shards.indices(device)
        why = (
            f"sharded_plate {name!r}: its slots on rank {self.shards.ranks.rank} are "
            f"{self.shards.start} to {self.shards.stop - 1}, and a handler outside "
            "(the replay of a guide's trace) says otherwise. Expected the same sharded "
            "plate in the guide; autoguides take "
            "create_plates=lambda *args: sharded_plate(name, size, dim=...)."
        )
        try:
            super().__init__(name, size, len(mine), mine, dim, device=device)  # type: ignore[arg-type]
        except ValueError as error:
            raise PyroMacroError(why) from error
        given = self._indices
        if given is not mine and not torch.equal(given, mine):  # type: ignore[arg-type]
            raise PyroMacroError(why)

    @property
    def slots(self) -> slice:
        return slice(self.shards.start, self.shards.stop)

    def sum(
        self, tensor: Tensor, dim: int | None = None, keepdim: bool = False
    ) -> Tensor:
        """The sum over the plate, on all ranks; differentiable.

        One all-reduce, of the size of the result. All ranks have to take part.

        :param tensor: of this rank's slots.
        :param dim: the dimension to sum over, by default that of the plate.
        :param keepdim: whether it stays, with size one.
        """
        dim = self.dim if dim is None else dim
        if dim is None:
            raise PyroMacroError(
                f"sharded_plate {self.name!r}: its dimension is not known before it "
                "is entered. Give dim=..., or sum behind `with`."
            )
        return self.shards.sum(tensor.sum(dim, keepdim=keepdim))

    def __iter__(self) -> Iterator[int | float]:
        raise PyroMacroError(
            f"sharded_plate {self.name!r} cannot be iterated over. Use it in `with`."
        )

    def _process_message(self, msg: Message) -> None:
        scale = msg["scale"]
        if any(shards_of(frame) is not None for frame in msg["cond_indep_stack"]):
            raise PyroMacroError(
                f"site {msg['name']!r} is in two sharded plates, one of them "
                f"{self.name!r}. Expected one: make the other a plain plate."
            )
        super()._process_message(msg)
        frame, *others = msg["cond_indep_stack"]
        frames = (ShardedFrame.of(frame, self.shards), *others)
        msg["cond_indep_stack"] = frames
        msg["scale"] = scale * self.shards.ranks.count
        if msg["type"] == "param":
            self._params.add(id(msg))
        if (
            msg["type"] != "sample"
            or site_is_subsample(msg)
            or site_is_factor(msg)
            or is_deterministic(msg)
        ):
            return
        # Observed sites too: handlers outside may forget the observation
        assert self.dim is not None
        msg["fn"] = by_shards(msg["fn"], self.shards, self.dim, str(msg["name"]))

    def _postprocess_message(self, msg: Message) -> None:
        lifted = id(msg) in self._params and msg["type"] == "sample"
        self._params.discard(id(msg))
        if lifted:
            raise PyroMacroError(
                f"parameter {msg['name']!r} is in sharded plate {self.name!r}, and "
                "`poutine.lift` makes it random: it would be drawn on each rank alone. "
                "Make it a sample site, or move it out of the plate."
            )
        super()._postprocess_message(msg)
