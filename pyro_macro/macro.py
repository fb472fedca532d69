# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Macro-variables: which sites, and which map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyro_macro.aggregation import Aggregation, Sum


@dataclass(frozen=True, init=False)
class MacroVariable:
    """An aggregate of sample sites (Definition 2 of the paper).

    Without ``over``, plates that enclose every micro site stay batch dimensions, and
    the aggregation runs over the sites and their event dimensions. With ``over`` it
    also runs over those plates, and only those.

    :param name: the name of the macro value in traces.
    :param micro: the name of a sample site, or several.
    :param over: the name of a plate to aggregate over, or several.
    :param aggregation: the map, :class:`~pyro_macro.Sum` by default.

    >>> sales = MacroVariable("sales", micro=["x1", "x2"])
    >>> sales
    MacroVariable('sales', micro=['x1', 'x2'], aggregation=Sum())
    >>> sales == MacroVariable("sales", micro=["x1", "x2"]), len({sales, sales})
    (True, 1)
    """

    name: str
    micro: tuple[str, ...]
    over: tuple[str, ...] = ()
    aggregation: Aggregation = field(default_factory=Sum)

    def __init__(
        self,
        name: str,
        micro: str | Sequence[str],
        over: str | Sequence[str] = (),
        aggregation: Aggregation | None = None,
    ) -> None:
        if not isinstance(name, str) or not name:
            raise TypeError(f"MacroVariable: name is {name!r}. Expected a string.")
        micro = _names(f"MacroVariable {name!r}: micro", micro)
        if not micro:
            raise TypeError(f"MacroVariable {name!r}: micro names no site.")
        if name in micro:
            raise TypeError(
                f"MacroVariable {name!r} has the name of one of its micro sites. Give "
                "it a name of its own."
            )
        aggregation = Sum() if aggregation is None else aggregation
        if not isinstance(aggregation, Aggregation):
            raise TypeError(
                f"MacroVariable {name!r}: aggregation is {aggregation!r}. Expected an "
                "instance such as Sum(), Mean(), Linear(weights) or Custom(fn)."
            )
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "micro", micro)
        object.__setattr__(self, "over", _names(f"MacroVariable {name!r}: over", over))
        object.__setattr__(self, "aggregation", aggregation)

    def __repr__(self) -> str:
        micro = self.micro[0] if len(self.micro) == 1 else list(self.micro)
        over = self.over[0] if len(self.over) == 1 else list(self.over)
        shown = f", over={over!r}" if self.over else ""
        return (
            f"MacroVariable({self.name!r}, micro={micro!r}{shown}, "
            f"aggregation={self.aggregation!r})"
        )


def _names(what: str, names: str | Sequence[str]) -> tuple[str, ...]:
    result = (names,) if isinstance(names, str) else tuple(names)
    for name in result:
        if not isinstance(name, str):
            raise TypeError(f"{what} has {name!r}. Expected names of sites or plates.")
    if len(set(result)) < len(result):
        raise TypeError(f"{what} names one of {list(result)} twice.")
    return result
