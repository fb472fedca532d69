# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from pyro_macro.aggregation import Aggregation
from pyro_macro.errors import NotAMicroState, OffFibre, PyroMacroError, UnsupportedLaw
from pyro_macro.laws.gaussian.fibre import choose_pivots
from pyro_macro.laws.gaussian.law import GaussianLaw, GaussianProgram
from pyro_macro.laws.upstream import Evidence, refuse_parts
from pyro_macro.macro import MacroVariable
from pyro_macro.program.inner import Shared, Site, shards_of
from pyro_macro.program.layout import Layout
from pyro_macro.sharding.across import fitted


def refuse_subsampled(what: str, macro: MacroVariable, sites: Sequence[Site]) -> None:
    """An error if the macro-variable runs over a part of a plate only."""
    for site in sites:
        for frame in site.frames:
            whole = frame.full_size in (None, frame.size) or shards_of(frame)
            if frame.name in macro.over and not whole:
                raise NotAMicroState(
                    f"{what}: plate {frame.name!r} is subsampled ({frame.size} of "
                    f"{frame.full_size}), and the total of a subsample is not the "
                    "total. Run the plate whole."
                )


def _refuse_weighted_apart(what: str, sites: Sequence[Site]) -> None:
    """An error if the sites, whose density becomes one, do not count the same."""

    def same(one: Any, other: Any) -> bool:
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            return one is other or torch.equal(one, other)
        return type(one) is type(other) and one == other

    for site in sites[1:]:
        for which, one, other in zip(
            ("mask", "scale"), sites[0].weight, site.weight, strict=True
        ):
            if not same(one, other):
                raise PyroMacroError(
                    f"{what}: micro site {sites[0].name!r} has {which} {one}, micro "
                    f"site {site.name!r} has {other}. Expected the same, for their "
                    "joint density has no parts that count differently. Put the "
                    f"{which} around all of them, or outside of macro_do."
                )


def refuse_injective(
    what: str, aggregation: Aggregation, state: Tensor, layout: Layout
) -> None:
    """An error if the map is injective on micro states like this one."""
    if aggregation.is_injective(state):
        plates = [f.name for f in layout.frames if f.vectorized]
        hint = "".join(f" To sum over {p!r}, say over={p!r}." for p in plates[-1:])
        raise NotAMicroState(
            f"{what}: the map is injective on a micro state of {state.shape[-1]} "
            "element(s), so that nothing is aggregated (Definition 2). Aggregate more "
            "sites, an event dimension or a plate (`over`), or use the site itself."
            + hint
        )


def refuse_apart(realization: Realization, state: MicroState) -> None:
    """An error if a realization needs elements that lie on other ranks."""
    if state.is_apart and not realization.spans_ranks:
        raise UnsupportedLaw(
            f"{state.what}: its elements are split over ranks, "
            f"{state.layout.shards!r}, and {type(realization).__name__} needs all of "
            "them in one place. Use Natural, Proportional, Shift or Allocate, or a "
            "plain plate on one process."
        )


def common(values: Sequence[Tensor]) -> Tensor:
    """An empty tensor of the dtype and device that stacked values have."""
    dtype = values[0].dtype
    for value in values[1:]:
        dtype = torch.promote_types(dtype, value.dtype)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    return torch.empty((), dtype=dtype, device=values[0].device)


def as_like(number: Any, like: Tensor) -> Tensor:
    """Numbers in the dtype and on the device of ``like``, by no coarser one.

    ``torch.as_tensor(0.1)`` rounds to the default dtype.
    """
    if isinstance(number, Tensor):
        return number.to(like)
    return torch.as_tensor(number, dtype=like.dtype, device=like.device)


def _same(state: Tensor) -> Tensor:
    return state


def _never(draw: Tensor) -> bool:
    return False


@dataclass(frozen=True, eq=False)
class Realized:
    """What a realization makes of an intervention on one program.

    :ivar law: the distribution of the latent site, event shape ``(size,)``; a
        ``Delta`` where nothing is random.
    :ivar layout: the order of its elements, and the plates that it stays in.
    :ivar push: from a draw of it to the micro state that propagates.
    :ivar met: whether a draw is known to lead to the macro value without looking; to
        look takes a message to the other ranks, if it lies on several.
    """

    law: Any
    layout: Layout
    push: Callable[[Tensor], Tensor] = _same
    met: Callable[[Tensor], bool] = _never


class MicroState:
    """What a realization may know of the program it acts on.

    :ivar macro: the macro-variable.
    :ivar sites: its micro sites. For a realization that acts on the natural value,
        with the distributions they have in this very run.
    :ivar layout: the order of the elements of the micro state.
    :ivar like: a tensor of the micro state's dtype and device.
    """

    def __init__(
        self,
        macro: MacroVariable,
        program: GaussianProgram,
        given: list[Evidence],
        shared: dict[str, Shared],
        sites: dict[str, Site],
    ) -> None:
        self.macro, self.program, self.given = macro, program, given
        self.sites = sites
        self._shared = shared
        self.layout = Layout([sites[n] for n in macro.micro], macro.over, self.what)
        if self.layout.size == 0:
            raise NotAMicroState(
                f"{self.what}: its micro state has 0 elements "
                f"({self.layout.describe()}). Expected sites with some."
            )
        aggregation = fitted(macro.aggregation, self.layout, self.what)
        if aggregation is not macro.aggregation:
            self.macro = MacroVariable(macro.name, macro.micro, macro.over, aggregation)
        micro = [sites[name] for name in macro.micro]
        refuse_subsampled(self.what, macro, micro)
        _refuse_weighted_apart(self.what, micro)
        self.like = common([sites[name].value for name in macro.micro])
        state = self.like.new_zeros(self.layout.size)
        refuse_injective(self.what, aggregation, state, self.layout)

    @property
    def what(self) -> str:
        """How messages begin."""
        return f"macro-variable {self.macro.name!r}"

    @property
    def weights(self) -> Tensor | None:
        """The rows of a linear aggregation, shape ``(m, K)``; ``None`` for others."""
        state = self.like.new_zeros(self.layout.size)
        return self.macro.aggregation.weights(state)

    @property
    def rows(self) -> Tensor:
        """The rows of a linear aggregation; others are refused."""
        rows = self.weights
        if rows is None:
            raise UnsupportedLaw(
                f"{self.what}: {self.macro.aggregation!r} is not linear, and the law "
                "of the micro state given its value is known for linear ones. Use "
                "Explicit, or Allocate where it scales."
            )
        return rows

    def total(self, state: Tensor) -> Tensor:
        """The macro value of a micro state."""
        return self.macro.aggregation(state)

    @property
    def is_apart(self) -> bool:
        """Whether its elements lie on several ranks, those of this one here."""
        return self.layout.shards is not None

    def across(self, contraction: Tensor) -> Tensor:
        """A sum over the elements, from that over those that lie here."""
        shards = self.layout.shards
        return contraction if shards is None else shards.sum(contraction)

    def gaussian(self) -> GaussianLaw:
        """The law of the micro state, ancestors integrated out but for what is given.

        :raises UnsupportedLaw: if it is not a Gaussian.
        """
        return self.program.law(
            self.macro.micro, self.macro.over, self.what, self.given
        )

    def is_gaussian(self) -> bool:
        """Whether all sites that the law involves are Gaussian."""
        return self.program.is_gaussian(self.macro.micro, self.given, self.what)

    def stands_alone(self) -> bool:
        """Whether the micro sites depend on nothing that is random in the run."""
        relevant, known = self.program.relevant(self.macro.micro, self.given, self.what)
        return not known and relevant == set(self.macro.micro)

    def refuse_causes(self, otherwise: str = "or use Natural or Explicit") -> None:
        """An error if sites that are not Gaussian depend on what is random."""
        self.program.refuse_unseen(self.what)
        if self.stands_alone():
            return
        known = self.program.relevant(self.macro.micro, self.given, self.what)[1]
        causes = self.program.causes(self.macro.micro, known) or []
        raise UnsupportedLaw(
            f"{self.what}: its sites depend on {causes}, and are not all Gaussian, so "
            "that their own law with these integrated out is not known. Hold them at "
            f"their values, given={causes}, {otherwise}."
        )

    def tensor(self, number: Any, role: str, event_dim: int | None = None) -> Tensor:
        """A macro value as a tensor that broadcasts against the plates that stay.

        :param role: what it is, for messages.
        :raises PyroMacroError: if it is NaN or infinite, or has a wrong shape.
        """
        event_dim = self.macro.aggregation.event_dim if event_dim is None else event_dim
        if isinstance(number, (str, bytes, bool, complex)) or number is None:
            raise PyroMacroError(
                f"{self.what}: {role} is {number!r}. Expected a number or a tensor."
            )
        tensor = as_like(number, self.like)
        # A tensor that other code traces must not be looked into
        if type(tensor) is Tensor and not torch.isfinite(tensor).all():
            raise PyroMacroError(
                f"{self.what}: {role} is {number}. Expected finite numbers."
            )
        if event_dim:
            m = self.rows.shape[0] if self.weights is not None else None
            if tensor.dim() < 1 or (m is not None and tensor.shape[-1] != m):
                raise PyroMacroError(
                    f"{self.what}: {role} has shape {tuple(tensor.shape)}. Expected "
                    f"{m} values in the rightmost dimension, one for each row."
                )
        for frame in self.layout.frames:
            if not frame.vectorized:
                continue
            dim = frame.dim - event_dim
            if -dim > tensor.dim() or tensor.shape[dim] in (1, frame.size):
                continue
            if tensor.shape[dim] == frame.full_size and frame.name in self._shared:
                indices = self._shared[frame.name].value
                tensor = tensor.index_select(dim, indices.to(tensor.device))
                continue
            raise PyroMacroError(
                f"{self.what}: {role} has shape {tuple(tensor.shape)}. Expected a "
                f"shape that broadcasts against {tuple(self.layout.batch_shape)}, for "
                f"plate {frame.name!r} of size {frame.size} at dim {frame.dim}."
            )
        return tensor

    def unit_state(self, numbers: Any, subject: str, event_dim: int = 0) -> Tensor:
        """A micro state with macro value one, shape ``(..., K)``.

        :param subject: what it is, and a verb, for messages.
        :param event_dim: 1 for one such state, a row, for each of ``m`` macro values.
        :raises PyroMacroError: if it has a wrong shape.
        :raises OffFibre: if it has another macro value.
        """
        return self.unit_total(numbers, subject, event_dim)[0]

    def unit_total(
        self, numbers: Any, subject: str, event_dim: int = 0
    ) -> tuple[Tensor, Tensor]:
        """The same, with its macro value as computed: that of the state, rounded."""
        state, size = as_like(numbers, self.like), self.layout.size
        full = self.layout.full_size
        if state.dim() < 1 + event_dim or state.shape[-1] not in (size, full):
            on_ranks = f", or {full} for those of all ranks" if full != size else ""
            raise PyroMacroError(
                f"{self.what}: {subject} shape {tuple(state.shape)}. Expected "
                f"{size} in the rightmost dimension, for {self.layout.describe()}"
                f"{on_ranks}."
            )
        state = self.layout.mine(state, self.what)
        total = self.total(state)
        one = torch.ones_like(total)
        if event_dim:
            one = torch.eye(total.shape[-1]).to(total)
        # A tensor that other code traces must not be looked into
        if type(total) is Tensor and not torch.allclose(
            total, one, rtol=1e-4, atol=1e-5
        ):
            raise OffFibre(
                f"{self.what}: {subject} macro value {total.tolist()}. Expected "
                f"{one.tolist()}: divide by it."
            )
        return state, total

    def fibre(self, law: GaussianLaw, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The linear equations that a vector in the law's layout has to meet.

        :param value: the macro value, as from :meth:`tensor`.
        :returns: rows ``(m, size)``, values ``(..., m)``, and the indices ``(m,)`` of
            the elements to solve for.
        """
        rows, event_dim = self.rows.to(law.loc), self.macro.aggregation.event_dim
        value = value.to(law.loc)
        value = value if event_dim else value.unsqueeze(-1)
        # On several ranks there is no element that all of them could solve for
        none = torch.empty(0, dtype=torch.long, device=rows.device)
        pivots = none if self.is_apart else choose_pivots(rows)
        if not law.joint:
            return rows, value, pivots
        # The total holds at each place of the joint plates: one equation for each
        coupled = [f for f in self.layout.frames if f.name in law.joint]
        refuse_parts(coupled, self.what)
        places = self._places(law)
        stand_in: Any = SimpleNamespace(
            name="value", frames=self.layout.frames, event_shape=value.shape[-1:]
        )
        values = Layout([stand_in], law.joint).stack({"value": value})
        while values.dim() > law.loc.dim() and values.shape[0] == 1:
            values = values.squeeze(0)  # where plates were that are in the vector now
        count = values.shape[-1] // rows.shape[0]
        slots = torch.arange(count, device=rows.device)
        inside = places[1] == slots.unsqueeze(-1)  # (count, size)
        spread = rows[:, places[0]] * inside.unsqueeze(1).to(rows)  # (count, m, size)
        solved = torch.isin(places[0], pivots).nonzero().squeeze(-1)
        return spread.flatten(0, 1), values, solved

    def place(self, law: GaussianLaw, index: int) -> Tensor:
        """Where one element of the micro state lies in the law's layout."""
        if not law.joint:
            return torch.tensor([index], device=self.like.device)
        return (self._places(law)[0] == index).nonzero().squeeze(-1)

    def _places(self, law: GaussianLaw) -> tuple[Tensor, Tensor]:
        """For each element of the law's vector: its element here, and its slot."""
        elements, slots = self.layout.places(law.layout)
        return elements.to(self.like.device), slots.to(self.like.device)


Given = str | MacroVariable | Sequence[str | MacroVariable]


def _as_given(given: Given) -> tuple[str | MacroVariable, ...]:
    """What is given, as a tuple."""
    if isinstance(given, (str, MacroVariable)):
        return (given,)
    if not isinstance(given, (list, tuple, set, frozenset)) or not all(
        isinstance(thing, (str, MacroVariable)) for thing in given
    ):
        raise PyroMacroError(
            f"given={given!r}: expected names of sites, macro-variables, or a list."
        )
    return tuple(given)


class Realization(ABC):
    """A micro-realization of a macro intervention (Definition 4 of the paper).

    A new one is a short file: it owes :meth:`realize`. Instances are immutable, carry
    the macro value, and can be used on any number of models.

    :ivar given: sites or macro-variables that are held at their value in the run.
    :cvar acts_on_natural: whether it changes the micro state that nature has drawn,
        instead of replacing it.
    :cvar looks_downstream: whether it depends on what follows from the micro state.
    :cvar draws_own_law: whether it draws from the law of the micro state in the
        program, so that it matters what else depends on the same sites.
    :cvar spans_ranks: whether it can be had of a micro state that lies on several
        ranks, each of which knows its own elements alone.
    """

    given: Any = ()
    acts_on_natural: bool = False
    draws_own_law: bool = False
    looks_downstream: bool = False
    spans_ranks: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "given", _as_given(self.given))

    @abstractmethod
    def realize(self, state: MicroState) -> Realized:
        """The distribution of the micro state under the intervention."""

    def macro_value(self, state: MicroState) -> Tensor | None:
        """The macro value that is set; ``None`` if it follows from the micro state."""
        return state.tensor(self.value, "value")  # type: ignore[attr-defined]

    def joined(
        self, others: Sequence[tuple[MacroVariable, Realization]]
    ) -> Realization:
        """One realization of several macro-variables that share micro sites.

        :param others: all of them, this one first, with what they are set to.
        :raises PyroMacroError: if there is no such thing.
        """
        first, second = others[0][0], others[1][0]
        shared = sorted(set(first.micro) & set(second.micro))
        raise PyroMacroError(
            f"macro_do: micro site {shared[0]!r} belongs to both {first.name!r} and "
            f"{second.name!r}. Expected disjoint micro sites, or Natural for both."
        )
