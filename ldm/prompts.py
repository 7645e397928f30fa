"""The classes that prompts ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence


def asked_classes(prompts: Sequence[str], words: Sequence[str]) -> list[int] | None:
    """Return for each prompt the index of the one word it contains; None if any prompt contains none or several."""
    classes = []
    for prompt in prompts:
        found = {i for i, word in enumerate(words) if re.search(rf"\b{re.escape(word)}\b", prompt, re.IGNORECASE)}
        if len(found) != 1:
            return None
        classes.append(found.pop())
    return classes
