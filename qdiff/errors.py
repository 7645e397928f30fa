"""The exception for input that a user can correct, and helpers for its sentences."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(ValueError):
    """Bad input: the message is one sentence that says what is wrong, where, and what to do.

    Command lines print only the message (no traceback) and exit with code 2.
    """


def first_few(reasons: Mapping[str, str], at_most: int = 3) -> str:
    """Return what is wrong with the first few of many things, by name, and how many more there are."""
    some = "; ".join(f"{name} ({reason})" for name, reason in list(reasons.items())[:at_most])
    return f"{some}; and {len(reasons) - at_most} more" if len(reasons) > at_most else some


def require_at_least(least: int, values: Mapping[str, int | None]) -> None:
    """Raise a `UserError` if a number is below ``least``; None is skipped.

    Args:
        values: numbers by the name that the user knows, e.g. ``--max_images``.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; give {'0 or more' if least == 0 else f'at least {least}'}")


def first_line(error: Exception) -> str:
    """Return the first line of another library's error, to quote in a sentence; its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
