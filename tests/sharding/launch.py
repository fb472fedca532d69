# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""Runs a script of this folder on several ranks of this machine."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def launch(script, ranks, *args, timeout=120.0):
    """What ``torchrun`` does; the finished process, with what it said.

    :raises subprocess.TimeoutExpired: if it takes longer than ``timeout`` seconds.
    """
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={ranks}", str(HERE / script), *map(str, args)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=timeout
    )
