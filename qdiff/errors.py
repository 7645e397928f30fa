"""The one exception for input that a user can mend."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input: the message is one sentence saying what is wrong, where, and how to mend it.

    Command lines print the message alone (no traceback) and exit with code 2.
    """
