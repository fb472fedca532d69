# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""The programs of ``docs/distributed.md`` run."""

import re

from launch import ROOT, launch


def test_the_programs_of_the_page_run_on_two_ranks(tmp_path):
    page = (ROOT / "docs" / "distributed.md").read_text()
    blocks = re.findall(r"```py\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    script = tmp_path / "page.py"
    script.write_text("".join(b for b in blocks if "# not run here" not in b))
    done = launch(script, 2)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.startswith("revenue: 4")
