# Copyright Contributors to the pyro_macro project.
# SPDX-License-Identifier: Apache-2.0

"""A rank that fails ends the job with an error, and soon."""

import pytest
from launch import launch

LONGEST = 60.0  # seconds, of which most are imports on a busy machine


def refused(how, ranks=2):
    done = launch("failing_rank.py", ranks, how, timeout=LONGEST)
    assert done.returncode != 0
    assert "all draws are done" not in done.stdout
    return done.stderr


def test_a_rank_that_is_killed_ends_the_job():
    assert "Signal 9 (SIGKILL)" in refused("killed")


@pytest.mark.slow
def test_a_rank_that_raises_ends_the_job():
    assert "ValueError: this rank fails" in refused("raises", ranks=4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["leaves", "hangs"])
def test_ranks_that_wait_in_vain_say_so(how):
    said = refused(how)
    assert "PyroMacroError: plate 'products' of 11 slots: rank 0 of 2 could not" in said
    assert "one of which has probably ended" in said


@pytest.mark.slow
def test_a_job_without_failures_ends_well():
    done = launch("failing_rank.py", 2, "not at all", timeout=LONGEST)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all draws are done") == 2
