"""The classes that prompts ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence


def asked_classes(prompts: Sequence[str], words: Sequence[str]) -> list[int] | None:
    """Return for each prompt the index of the one word it contains; None if any prompt contains none or several."""
    classes, patterns = [], [re.compile(rf"\b{re.escape(word)}\b", re.IGNORECASE) for word in words]
    for prompt in prompts:
        found = {i for i, pattern in enumerate(patterns) if pattern.search(prompt)}
        if len(found) != 1:
            return None
        classes.append(found.pop())
    return classes
