# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Links to public names by where they are defined lead to where they are documented."""

from typing import Any

import pyro_macro


def _found(app: Any, env: Any, node: Any, content: Any) -> Any:
    name = node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in pyro_macro.__all__:
        return None
    domain, target = env.get_domain("py"), f"pyro_macro.{name}"
    return domain.resolve_xref(
        env, node["refdoc"], app.builder, "obj", target, node, content
    )


def setup(app: Any) -> dict[str, bool]:
    app.connect("missing-reference", _found)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
