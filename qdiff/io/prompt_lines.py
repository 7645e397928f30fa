"""The prompts of a text: one per line."""

from __future__ import annotations

import re


def prompt_lines(text: str) -> list[str]:
    """Return the non-empty lines, without surrounding spaces.

    Only newlines end a line: other characters at which `str.splitlines` splits (U+2028, form feed) occur inside
        captions.
    """
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]
