"""Several ranks decide, count and learn as one process does that sees all their tokens."""

import os
import time

import pytest
import torch.distributed as dist

from ranks import Ranks


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as ranks:
        yield ranks


# ---- the fixture itself --------------------------------------------------------------------------


def fail_on_one_rank():
    assert dist.get_rank() == 0, "rank 1 failed on purpose"


def sleep_on_one_rank(file):
    if dist.get_rank() == 1:
        with open(file, "w") as f:
            f.write(str(os.getpid()))
        time.sleep(1000)


def test_a_rank_that_fails_fails_the_test(ranks):
    begin = time.monotonic()
    with pytest.raises(AssertionError, match="rank 1 failed on purpose"):
        ranks(fail_on_one_rank, 2)
    assert time.monotonic() - begin < 50  # no wait for the timeout of rank 0, which goes on


def test_a_rank_that_hangs_is_killed(ranks, tmp_path):
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"Timeout[^$]*in sleep_on_one_rank"):
        ranks(sleep_on_one_rank, 2, timeout=4, file=str(tmp_path / "pid"))
    assert time.monotonic() - begin < 50
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
