# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Whether the library works where it is installed, with what it asks for alone.

Run by `make dist`, as ``python -I tests/installed.py``, which does not see the sources.
"""

import sys
from importlib.metadata import version
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch

import pyro_macro as pm


def shop() -> None:
    x1 = pyro.sample("x1", dist.Normal(10.0, 2.0))
    x2 = pyro.sample("x2", dist.Normal(20.0, 1.0))
    pyro.deterministic("revenue", x1 + 3 * x2)


def main() -> None:
    here = Path(pm.__file__).resolve().parent
    assert Path(sys.prefix).resolve() in here.parents, f"{here} is not installed"
    assert (here / "py.typed").exists()
    assert version("pyro_macro") == pm.__version__
    sales = pm.MacroVariable("sales", micro=["x1", "x2"])
    natural = pm.macro_do(shop, {sales: pm.Natural(33.0)})
    trace = pyro.poutine.trace(natural).get_trace()
    mean = trace.nodes["sales__micro"]["fn"].mean
    assert torch.allclose(mean, torch.tensor([12.4, 20.6]))
    assert pm.confounding(shop, sales, "revenue", at=[33.0]).verdict == "inhibiting"
    fused = pm.consolidate(shop, keep=["revenue"], allow=["x1"])
    assert fused.sites == ("revenue",) and bool(pm.verify_consolidation(shop, fused))
    print(f"pyro_macro {pm.__version__} works in {here}")


if __name__ == "__main__":
    main()
