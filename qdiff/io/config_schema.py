"""Check a section of a YAML config against the keys that its reader knows: an unknown key is an error."""

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

_SENTENCES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string"}


@dataclasses.dataclass(frozen=True)
class Key:
    """The values that a config key may have.

    Attributes:
        kind: a type hint: int, float, bool, str, Mapping, a Sequence of them, a union of them, or Any.
        required: a config without the key is refused.
        least: smallest allowed number, also for the numbers of a sequence.
        choices: the only allowed values; None allows all values of the kind.
        because: why other values are not allowed, for the error message.
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
        origin: name of the file in error messages, e.g. ``config file x.yml``.

    Raises:
        UserError: the section is not a mapping, a key is missing or unknown, or a value is not of its key's kind.
    """
    prefix = f"{where}." if where else ""
    if not isinstance(values, Mapping):
        raise UserError(f"{origin} has {where} {_shown(values)}; it must be a mapping")
    for name in values:
        if name not in keys:
            near = difflib.get_close_matches(str(name), keys, 1)
            hint = f"did you mean {near[0]}?" if near else "correct or remove it"
            raise UserError(f"{origin} has the unknown key {prefix}{name}; {hint}")
    for name, key in keys.items():
        if name not in values:
            if key.required:
                raise UserError(f"{origin} has no {prefix}{name}; add it")
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
    """Return the keyword arguments of a constructor as keys with their types; None if it accepts any keyword."""
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
