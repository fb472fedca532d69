# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Links that lead elsewhere in the repository than on the site."""

from typing import Any

from sphinx.addnodes import pending_xref

import pyro_macro

PAGES = {
    "benchmarks/README.md": "benchmarks",
    "CHANGELOG.md": "changes",
    "CONTRIBUTING.md": "contributing",
}


def _redirect(app: Any, doctree: Any) -> None:
    """Links of the README, which is the first page here, to pages made of files."""
    for node in doctree.findall(pending_xref):
        if node["reftype"] == "myst" and node["reftarget"] in PAGES:
            node["refdomain"], node["reftargetid"] = "doc", None
            node["reftarget"] = PAGES[node["reftarget"]]


def _found(app: Any, env: Any, node: Any, content: Any) -> Any:
    """What is linked to by where it is defined is documented at the front door."""
    name = node.get("reftarget", "").rpartition(".")[2]
    if node.get("refdomain") != "py" or name not in pyro_macro.__all__:
        return None
    domain, target, here = env.get_domain("py"), f"pyro_macro.{name}", node["refdoc"]
    return domain.resolve_xref(env, here, app.builder, "obj", target, node, content)


def setup(app: Any) -> dict[str, bool]:
    app.connect("doctree-read", _redirect)
    app.connect("missing-reference", _found)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
