"""Memory measured in a fresh process: what a task keeps, and what it takes in passing."""

from __future__ import annotations

import os
import signal

import pytest

from qdiff.benchmark.fresh_process import FreshProcess
from qdiff.errors import UserError

pytestmark = pytest.mark.slow

SIZE = 80_000_000
# Bytes: what the interpreter itself takes meanwhile.
MEMORY_TOLERANCE = 10_000_000


def keep(kept: int, passing: int) -> bytearray:
    """Hold ``passing`` bytes, then return ``kept`` others; every page is written."""
    temporary = bytearray(b"x" * passing)
    del temporary
    return bytearray(b"y") * kept


def length(kept: bytearray, more: int) -> int:
    return len(kept) + more


def fails() -> None:
    raise ZeroDivisionError("of the task")


def dies() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_kept_and_taken():
    ballast = bytearray(b"z") * (3 * SIZE)  # of this process: no business of the other ones
    with FreshProcess() as process:
        process.run(keep, 0, 1_000_000)
        use = process.measured(keep, SIZE, 0)
        assert process.on_kept(length, 1) == SIZE + 1
    assert abs(use.kept - SIZE) < MEMORY_TOLERANCE and abs(use.taken - SIZE) < MEMORY_TOLERANCE
    del ballast
    with FreshProcess() as process:
        passing = process.measured(keep, 0, SIZE)
        planted = process.measured(keep, SIZE + 2 * MEMORY_TOLERANCE, 0)
    assert abs(passing.before - use.before) < MEMORY_TOLERANCE
    assert passing.kept < MEMORY_TOLERANCE and passing.taken > SIZE - MEMORY_TOLERANCE
    assert abs(planted.kept - SIZE) > MEMORY_TOLERANCE


def test_what_was_taken_before_does_not_count():
    try:
        open("/proc/self/clear_refs", "w").close()
    except OSError:
        pytest.skip("this system cannot forget a process's peak")
    with FreshProcess() as process:
        process.run(keep, 0, 2 * SIZE)  # as imports do
        use = process.measured(keep, SIZE // 2, 0)
    assert abs(use.taken - SIZE // 2) < MEMORY_TOLERANCE


def test_errors_of_a_task_come_through_and_the_process_goes_on():
    with FreshProcess() as process:
        with pytest.raises(ZeroDivisionError, match="of the task"):
            process.measured(fails)
        assert process.run(length, b"ab", 1) == 3


def test_a_process_that_is_killed_is_told():
    with FreshProcess() as process, pytest.raises(UserError, match="the process of dies was killed, most likely"):
        process.run(dies)
