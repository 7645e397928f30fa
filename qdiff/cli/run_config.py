"""Compare the configuration of a run with the one that it began with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LONGEST_VALUE = 80  # characters of an option's value in an error
# Entries that say how many images there are: a run is continued with more of them.
GROWING = ("max_images", "num_images", "prompts")
# Prompts of the calibration images, taken in turn: the run's own where none were given.
CYCLED = "calibration_prompts"


def differences(before: dict[str, Any], now: dict[str, Any], is_calibrated: bool) -> list[str]:
    """Return the entries by which a config does not continue a run, each as ``name: there, here``.

    A config that asks for more images continues it.

    Args:
        is_calibrated: nothing of the run depends on its calibration prompts any more.
    """
    return sorted(_differences(before, _shrunk(now, before, is_calibrated)))


def _differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of entries that differ.

    An entry that only one side has counts as equal where it is off: a later version may have brought it.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            if (key in a and key in b) or a.get(key) or b.get(key):
                yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield f"{name}: {_short(a)} there, {_short(b)} here"


def _shrunk(config: dict[str, Any], before: dict[str, Any], is_calibrated: bool) -> dict[str, Any]:
    """Return a config with as many images as one before it had, where it asks for the same ones and more."""
    same = dict(config)
    for key in GROWING:
        here, there = config.get(key), before.get(key)
        more = isinstance(here, int) and isinstance(there, int) and here > there
        if more or _begins_with(here, there):
            same[key] = there
    here, there = config.get(CYCLED), before.get(CYCLED)
    # Prompts that repeat are as many as the run has images, but its calibration sees the same ones.
    if _cycle(here) == _cycle(there) or (is_calibrated and _begins_with(here, there)):
        same[CYCLED] = there
    return same


def _begins_with(here: Any, there: Any) -> bool:
    return isinstance(here, list) and isinstance(there, list) and here[: len(there)] == there


def _cycle(values: Any) -> Any:
    """Return the shortest list that gives the same values when it is gone through again and again."""
    if not isinstance(values, list):
        return values
    count = len(values)
    for length in range(1, count // 2 + 1):
        if count % length == 0 and values[:length] * (count // length) == values:
            return values[:length]
    return values


def _short(value: Any) -> str:
    """A value as an error shows it: a list of 10,000 prompts by its beginning."""
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
