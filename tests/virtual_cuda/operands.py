"""The tensors among an operation's operands and results: by themselves or in a list, never deeper in a schema.

PyTorch's trees find them too, in as much time as all else that the virtual device does.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from virtual_cuda.tensor import VirtualTensor


def tensors_of(args: tuple, kwargs: dict) -> list[Tensor]:
    """Return all tensors that an operation is given, in order."""
    found = []
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found.extend(each for each in value if isinstance(each, Tensor))
    return found


def inner_of(value: Any) -> Any:
    """Return what the CPU computes with in place of an argument."""
    if isinstance(value, VirtualTensor):
        return value.inner
    if isinstance(value, (list, tuple)):
        return type(value)(inner_of(each) for each in value)
    return value


def on_device(result: Any, device: torch.device) -> Any:
    """Return an operation's result as tensors of a device."""
    if isinstance(result, Tensor):
        return VirtualTensor(result, device)
    if isinstance(result, (list, tuple)):
        return type(result)(on_device(each, device) for each in result)
    return result


@cache
def written_arguments(func) -> tuple[int, ...]:
    """Return which arguments of an operation it writes to, by place."""
    arguments = enumerate(func._schema.arguments)
    return tuple(place for place, a in arguments if a.alias_info is not None and a.alias_info.is_write)


@cache
def returns_what_it_writes(func) -> bool:
    """Whether an operation gives back the tensors that it writes to."""
    returns = func._schema.returns
    return bool(returns) and returns[0].alias_info is not None and returns[0].alias_info.is_write


@cache
def name_of(func) -> str:
    """Return an operation's name without its namespace and overload."""
    return func._schema.name.split("::")[1]
