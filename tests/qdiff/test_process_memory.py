"""Memory measured in a fresh process: what a task keeps, and what it takes in passing."""

from __future__ import annotations

import pytest

from qdiff.process_memory import measured

SIZE = 80_000_000
# Bytes: what the interpreter itself takes meanwhile.
MEMORY_TOLERANCE = 10_000_000


def keep(kept: int, passing: int) -> bytearray:
    """Hold ``passing`` bytes, then return ``kept`` others; every page is written."""
    temporary = bytearray(b"x" * passing)
    del temporary
    return bytearray(b"y") * kept


def prepared() -> None:
    keep(0, 1_000_000)


def fails() -> None:
    raise ZeroDivisionError("of the task")


def test_kept_and_taken():
    ballast = bytearray(b"z") * (3 * SIZE)  # of this process: no business of the other one
    use = measured(keep, SIZE, 0, prepare=prepared)
    assert abs(use.kept - SIZE) < MEMORY_TOLERANCE and abs(use.taken - SIZE) < MEMORY_TOLERANCE
    del ballast
    passing = measured(keep, 0, SIZE)
    assert abs(passing.before - use.before) < MEMORY_TOLERANCE
    assert passing.kept < MEMORY_TOLERANCE and passing.taken > SIZE - MEMORY_TOLERANCE
    planted = measured(keep, SIZE + 2 * MEMORY_TOLERANCE, 0)
    assert abs(planted.kept - SIZE) > MEMORY_TOLERANCE


def test_errors_of_a_task_come_through():
    with pytest.raises(ZeroDivisionError, match="of the task"):
        measured(fails)
