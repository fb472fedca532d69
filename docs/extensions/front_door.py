# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Links that lead elsewhere in the repository than on the site."""

from typing import Any

from sphinx.util.nodes import make_refnode

import pyro_macro

PAGES = {
    "benchmarks/README.md": "benchmarks",
    "CHANGELOG.md": "changes",
    "CONTRIBUTING.md": "contributing",
}


def _found(app: Any, env: Any, node: Any, content: Any) -> Any:
    target, where = node.get("reftarget", ""), node.get("refdoc", "")
    if target in PAGES:  # of the README, which is the first page here
        return make_refnode(app.builder, where, PAGES[target], "", content)
    name = target.rpartition(".")[2]
    if node.get("refdomain") == "py" and name in pyro_macro.__all__:
        # By where it is defined; it is documented at the front door
        domain, public = env.get_domain("py"), f"pyro_macro.{name}"
        return domain.resolve_xref(
            env, where, app.builder, "obj", public, node, content
        )
    return None


def setup(app: Any) -> dict[str, bool]:
    app.connect("missing-reference", _found)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
