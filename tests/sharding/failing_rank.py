# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A job of which one rank fails, in the way that is asked for, after the first draw.

torchrun --nproc_per_node=2 tests/sharding/failing_rank.py killed
"""

import os
import signal
import sys
import time
from datetime import timedelta

import pyro
import torch
import torch.distributed as distributed
from sharded_models import CASES, SALES, sharded

import pyro_macro as pm


def fail(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raises":
        raise ValueError("this rank fails")
    if how == "leaves":
        sys.exit(0)
    if how == "hangs":
        time.sleep(600)


if __name__ == "__main__":
    distributed.init_process_group("gloo", timeout=timedelta(seconds=5))
    torch.set_default_dtype(torch.float64)
    intervened = pm.macro_do(CASES["shocked"].model, {SALES: pm.Natural(20.0)})
    pyro.set_rng_seed(0)
    for draw in range(100):
        intervened(sharded)
        if draw == 0 and distributed.get_rank() == 1:
            fail(sys.argv[1])
    print("all draws are done")
