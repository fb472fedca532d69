# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Pictures of causal graphs, in Graphviz, Mermaid and matplotlib."""

from pyro_macro.drawing.render import render

__all__ = ["render"]
