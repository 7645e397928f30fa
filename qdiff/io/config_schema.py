"""Check a section of a YAML config against the keys that its reader knows: a key that nobody reads is an error."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qdiff.errors import UserError

_SENTENCES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text"}


@dataclasses.dataclass(frozen=True)
class Key:
    """What a key of a config may hold.

    Attributes:
        kind: a type hint of int, float, bool, str, Mapping, a Sequence of them, a union of such, or Any.
        required: a config without it is refused.
        least: of numbers, and of the numbers of a sequence.
        choices: the only values; None allows all of the kind.
        because: why no other value, for the error.
    """

    kind: Any = Any
    required: bool = False
    least: float | None = None
    choices: tuple[Any, ...] | None = None
    because: str = ""


def check_section(values: Any, keys: Mapping[str, Key], where: str, origin: str) -> None:
    """Check one mapping of a config.

    Args:
        values: the mapping as read from YAML.
        keys: every key that it may have.
        where: dotted name of the mapping in the file; "" is the file itself.
        origin: what the file is called in errors, e.g. ``config file x.yml``.

    Raises:
        UserError: not a mapping, a key that is missing or unknown, or a value that is not of the key's kind.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(values, Mapping):
        raise UserError(f"{origin} has {where} {_shown(values)}; it must be a mapping")
    for name in values:
        if name not in keys:
            near = difflib.get_close_matches(str(name), keys, 1)
            hint = f"did you mean {near[0]}?" if near else "correct or delete it"
            raise UserError(f"{origin} has {prefix}{name}, which is not understood here; {hint}")
    for name, key in keys.items():
        if name not in values:
            if key.required:
                raise UserError(f"{origin} lacks {prefix}{name}; add it")
            continue
        _check_value(values[name], key, f"{origin} has {prefix}{name}")


def _check_value(value: Any, key: Key, subject: str) -> None:
    if key.choices is not None:
        if not any(value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in key.choices):
            because = f" ({key.because})" if key.because else ""
            wanted = " or ".join(_shown(choice) for choice in key.choices)
            raise UserError(f"{subject} {_shown(value)}; only {wanted} can be used here{because}")
        return
    if not _matches(value, key.kind):
        raise UserError(f"{subject} {_shown(value)}; it must be {_sentence(key.kind)}")
    numbers = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    if key.least is not None and any(n < key.least for n in numbers if n is not None):
        raise UserError(f"{subject} {_shown(value)}; give at least {key.least:g}")


def keys_of(function: Callable[..., Any]) -> dict[str, Key] | None:
    """Return the keys that a constructor takes by name, with the types of its signature; None where it takes any."""
    hints = typing.get_type_hints(function.__init__ if inspect.isclass(function) else function)
    parameters = inspect.signature(function).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: Key(hints.get(p.name, Any), required=p.default is p.empty) for p in parameters}


def _matches(value: Any, kind: Any) -> bool:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, one) for one in arguments)
    if kind is type(None):
        return value is None
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if origin is Sequence:
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        return listed and all(_matches(one, arguments[0]) for one in value)
    return isinstance(value, origin or kind)


def _sentence(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return " or ".join("null" if one is type(None) else _sentence(one) for one in arguments)
    if origin is Sequence:
        return f"a list, each entry {_sentence(arguments[0])}"
    return _SENTENCES.get(kind, "a mapping")


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
