"""Compare the configuration of a run with the one that it started with."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

LONGEST_VALUE = 80  # characters of an option's value in an error
# Entries that decide the number of images; a run may be continued with larger ones.
GROWING = ("max_images", "num_images", "prompts")
# Prompts of the calibration images, used cyclically; by default the run's own.
CYCLED = "calibration_prompts"


def differences(before: dict[str, Any], now: dict[str, Any], is_calibrated: bool) -> list[str]:
    """Return the entries that keep a config from continuing a run, each as ``name: VALUE there, VALUE here``.

    Asking for more images is not a difference.

    Args:
        is_calibrated: the rest of the run no longer depends on its calibration prompts.
    """
    return sorted(_differences(before, _shrunk(now, before, is_calibrated)))


def _differences(a: Any, b: Any, name: str = "") -> Iterator[str]:
    """Yield the entries that differ, with their dotted names.

    An entry that only one side has counts as equal if it is off: a later version may have added it.
    """
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            if (key in a and key in b) or a.get(key) or b.get(key):
                yield from _differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b:
        yield f"{name}: {_short(a)} there, {_short(b)} here"


def _shrunk(config: dict[str, Any], before: dict[str, Any], is_calibrated: bool) -> dict[str, Any]:
    """Return a config with the number of images of an earlier one, if it asks for the same images and more."""
    same = dict(config)
    for key in GROWING:
        here, there = config.get(key), before.get(key)
        more = isinstance(here, int) and isinstance(there, int) and here > there
        if more or _begins_with(here, there):
            same[key] = there
    here, there = config.get(CYCLED), before.get(CYCLED)
    # Repeated prompts grow with the number of images, but calibration uses the same ones.
    if _cycle(here) == _cycle(there) or (is_calibrated and _begins_with(here, there)):
        same[CYCLED] = there
    return same


def _begins_with(here: Any, there: Any) -> bool:
    return isinstance(here, list) and isinstance(there, list) and here[: len(there)] == there


def _cycle(values: Any) -> Any:
    """Return the shortest list whose repetition gives these values."""
    if not isinstance(values, list):
        return values
    count = len(values)
    for length in range(1, count // 2 + 1):
        if count % length == 0 and values[:length] * (count // length) == values:
            return values[:length]
    return values


def _short(value: Any) -> str:
    """Return a value as shown in an error; long ones, such as 10,000 prompts, are cut off."""
    text = str(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
