# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""How the documentation is built. It loads nothing from the network, then or later."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent)]

import pyro_macro  # noqa: E402

# Notebooks are shown as they are stored; `make notebooks` executes them afresh
shutil.copytree(
    HERE.parent / "tutorials",
    HERE / "tutorials",
    ignore=lambda folder, names: [n for n in names if not n.endswith(".ipynb")],
    dirs_exist_ok=True,
)

project = "pyro_macro"
copyright = "Contributors to the pyro_macro project"
version = release = pyro_macro.__version__

extensions = ["sphinx.ext.autodoc", "myst_nb", "mathml", "front_door"]
exclude_patterns = ["build"]
source_suffix = {".md": "myst-nb", ".rst": "restructuredtext", ".ipynb": "myst-nb"}
nitpicky = True
nitpick_ignore_regex = [  # what other projects document
    (r"py:.*", r"(torch|pyro|networkx|nx|matplotlib|pandas|graphviz)\b.*|Tensor"),
    (
        r"py:.*",
        r"pyro_macro\.handlers\.(Aggregate|Intervened|MacroDo|F|R)|P",
    ),  # overloads
    (r"py:.*", r"(collections|typing)\b.*|Any|Ellipsis|optional"),
]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_default_options = {"exclude-members": "__init__, __new__"}
python_maximum_signature_line_length = 88

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # there are none

html_theme = "furo"
html_title = f"pyro_macro {version}"
html_theme_options = {"navigation_with_keys": True}
html_copy_source = False
html_static_path = ["static"]
html_css_files = ["site.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"
