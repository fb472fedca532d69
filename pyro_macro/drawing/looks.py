# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""What the nodes of a causal graph look like, whatever draws them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GREY, BLUE, INK = "#8a8a8a", "#2f5d8c", "#222222"
FILLS = {
    ("micro", False): "#ffffff",
    ("micro", True): "#d3d3d3",
    ("macro", False): "#dbe8f6",
    ("macro", True): "#b9c9da",
}
INTERVENED = "#fbe0b5"


@dataclass(frozen=True)
class Look:
    """How a node is drawn.

    :ivar fill: the colour inside.
    :ivar border: the colour of the border.
    :ivar ink: the colour of the label.
    :ivar dashed: whether the border is.
    :ivar macro: a macro-variable: double border, bold label.
    :ivar latent: a latent common cause.
    """

    fill: str
    border: str
    ink: str = INK
    dashed: bool = False
    macro: bool = False
    latent: bool = False

    @classmethod
    def of(cls, data: dict[str, Any]) -> Look:
        kind = data.get("kind", "micro")
        if kind == "latent":
            return cls("#ffffff", GREY, GREY, dashed=True, latent=True)
        macro = kind == "macro"
        fill = FILLS["macro" if macro else "micro", bool(data.get("observed"))]
        return cls(
            fill=INTERVENED if data.get("intervened") else fill,
            border=BLUE if macro else INK,
            dashed=bool(data.get("deterministic")),
            macro=macro,
        )
