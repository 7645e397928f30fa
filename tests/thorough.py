"""Which values of a parametrized test are run by ``make test-all`` alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thorough_except(values: Iterable[Any], *kept: Any) -> list[Any]:
    """Return the values for `pytest.mark.parametrize`, all but the kept ones marked ``thorough``.

    What the marked ones show is a property that the kept ones show too, of another network, family or runtime.
    """
    values = list(values)
    if unknown := [value for value in kept if value not in values]:
        raise ValueError(f"{unknown} are not among the values")
    return [value if value in kept else pytest.param(value, marks=pytest.mark.thorough) for value in values]
