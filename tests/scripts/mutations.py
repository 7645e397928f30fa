"""Damage to files: bytes, tensors, and trees of values, drawn from a seeded generator."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from random import Random
from typing import Any

import torch
from torch import Tensor

DROPPED = object()
HUGE = 10**13  # too much for any memory: it must be refused, not begun
VALUES = (
    *(DROPPED, None, "abc", "", 0, -1, 1, 3, 1.5, -0.5, HUGE, 1e300, math.nan, math.inf, True, False),
    *([], [0], [None], ["abc"], [1, 2, 3], {}, {"abc": 1}),
)


def mutated_bytes(data: bytes, rng: Random) -> bytes:
    """Return bytes with one to twenty of them changed, cut off, overwritten by zeros, or put in."""
    kind = rng.choice(["flip", "flip", "flips", "cut", "cut", "cut early", "zeros", "insert", "double"])
    spot = rng.randrange(len(data))
    if kind == "cut":
        return data[:spot]
    if kind == "cut early":
        return data[: rng.randrange(min(40, len(data)))]
    if kind == "double":
        return data + data[:spot]
    if kind == "insert":
        return data[:spot] + rng.randbytes(rng.randrange(1, 20)) + data[spot:]
    found = bytearray(data)
    if kind == "zeros":
        found[spot : spot + 64] = bytes(len(found[spot : spot + 64]))
        return bytes(found)
    # Headers decide more than values do: half of the spots are in the beginning.
    for _ in range(1 if kind == "flip" else 20):
        found[rng.randrange(len(found) if rng.random() < 0.5 else min(400, len(found)))] ^= 1 << rng.randrange(8)
    return bytes(found)


def mutated_tensors(state: dict[str, Tensor], rng: Random) -> dict[str, Tensor]:
    """Return tensors by name, one of which is gone, renamed, new, or has other values, another type or shape."""
    state = dict(state)
    name = rng.choice(sorted(state))
    value = state[name]
    flat = value.flatten().clone()
    changes = {
        "renamed": lambda: {f"{name}x": value},
        "prefixed": lambda: {f"module.{name}": value},
        "new": lambda: {name: value, "stray.weight": torch.zeros(3)},
        "longer": lambda: {name: torch.cat([flat, flat])},
        "flat": lambda: {name: flat},
        "scalar": lambda: {name: torch.tensor(1.0)},
        "empty": lambda: {name: flat[:0]},
        "turned": lambda: {name: value.movedim(0, -1).contiguous() if value.dim() else value[None]},
        "whole numbers": lambda: {name: value.nan_to_num().long()},
        "truths": lambda: {name: value != 0},
        "double": lambda: {name: value.double()},
        "half": lambda: {name: value.half()},
        "complex": lambda: {name: value.to(torch.complex64)},
        "nan": lambda: {name: _with(value, math.nan)},
        "inf": lambda: {name: _with(value, -math.inf)},
        "zeros": lambda: {name: torch.zeros_like(value)},
        "large": lambda: {name: _with(value, 1e30)},
        "negative": lambda: {name: -value if value.dtype.is_floating_point else value},
        "dropped": lambda: {},
    }
    del state[name]
    return state | changes[rng.choice(list(changes))]()


def _with(value: Tensor, number: float) -> Tensor:
    """Return a tensor with a number in its middle, where its type can hold it."""
    if not value.is_floating_point() or not value.numel():
        return value
    flat = value.flatten().clone()
    flat[len(flat) // 2] = number
    return flat.view_as(value)


def mutated_tree(tree: Any, rng: Random) -> tuple[Any, str]:
    """Return a tree of dicts and lists with one value replaced or left out, and words that say which."""
    tree = copy.deepcopy(tree)
    places = list(_places(tree))
    parent, key, name = rng.choice(places)
    value = rng.choice(VALUES)
    if value is DROPPED:
        del parent[key]
        return tree, f"{name} dropped"
    parent[key] = value
    return tree, f"{name}: {value!r}"


def _places(node: Any, name: str = "") -> Iterator[tuple[Any, Any, str]]:
    """Yield (parent, key, dotted name) of every value below a node."""
    keys = node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ()
    for key in list(keys):
        inner = f"{name}.{key}".strip(".")
        yield node, key, inner
        yield from _places(node[key], inner)
