"""The classes that prompts ask for."""

from __future__ import annotations

import re
from collections.abc import Sequence


def asked_classes(prompts: Sequence[str], words: Sequence[str]) -> list[int] | None:
    """Return the number of the one word that each prompt holds; None if some prompt holds none, or several."""
    classes = []
    for prompt in prompts:
        found = {i for i, word in enumerate(words) if re.search(rf"\b{re.escape(word)}\b", prompt, re.IGNORECASE)}
        if len(found) != 1:
            return None
        classes.append(found.pop())
    return classes
