"""The one exception for input that a user can mend, and what its sentences quote of other errors."""

from __future__ import annotations

from collections.abc import Mapping


class UserError(ValueError):
    """Bad input: the message is one sentence saying what is wrong, where, and how to mend it.

    Command lines print the message alone (no traceback) and exit with code 2.
    """


def require_at_least(least: int, values: Mapping[str, int | None]) -> None:
    """Raise a `UserError` where one of some numbers is too small; None is none.

    Args:
        values: by what the user calls them, e.g. ``--max_images``.
    """
    for name, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; give {'0 or more' if least == 0 else f'at least {least}'}")


def first_line(error: Exception) -> str:
    """Return what another library's error says in one line, for a sentence of ours: its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
