# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What the library says about a model: small records that print as tables."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Description:
    """How one macro intervention is realized in a program.

    :ivar macro: the name of the macro-variable.
    :ivar realization: the kind of realization.
    :ivar law: the distribution of the micro state.
    :ivar exact: whether it is known exactly.
    :ivar method: how it is known.
    :ivar elements: the number of elements of the micro state.
    :ivar free: the number of free coordinates on the fibre; zero where the law is
        discrete or a point.
    :ivar cost: of a run, in words.
    """

    macro: str
    realization: str
    law: str
    exact: bool
    method: str
    elements: int
    free: int
    cost: str


class Descriptions(Sequence[Description]):
    """The descriptions of several interventions; prints as a table."""

    def __init__(self, items: Sequence[Description]) -> None:
        self._items = tuple(items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __len__(self) -> int:
        return len(self._items)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        names = [field.name for field in fields(Description)]
        rows = [[str(getattr(item, name)) for name in names] for item in self]
        return names, rows

    def __str__(self) -> str:
        names, rows = self._table()
        lines = []
        for row in rows:
            width = max(map(len, names))
            pairs = zip(names, row, strict=True)
            lines.append("\n".join(f"{name:>{width}}  {cell}" for name, cell in pairs))
        return "\n\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        names, rows = self._table()

        def line(cells: list[str], tag: str) -> str:
            return "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells)

        body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
        return f"<table><tr>{line(names, 'th')}</tr>{body}</table>"

    def to_pandas(self) -> Any:
        """A data frame, one row an intervention.

        :raises ImportError: if pandas is missing (``pip install pyro_macro[demo]``).
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "to_pandas needs pandas: pip install 'pyro_macro[demo]'."
            ) from error
        return pandas.DataFrame([asdict(item) for item in self])
