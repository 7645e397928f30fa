"""The one exception for input that a user can mend, and what its sentences quote of other errors."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message is one sentence saying what is wrong, where, and how to mend it.

    Command lines print the message alone (no traceback) and exit with code 2.
    """


def first_line(error: Exception) -> str:
    """Return what another library's error says in one line, for a sentence of ours: its type where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
