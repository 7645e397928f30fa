"""Parameters and buffers that were left on the CPU, which CUDA lets pass where they are single numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from virtual_cuda.checks import DeviceMismatch
from virtual_cuda.tensor import VirtualTensor


def left_behind(module: nn.Module) -> list[str]:
    """Return the names of the module's parameters and buffers that are on the CPU."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return [name for name, value in named if value.device.type == "cpu"]


def moves_itself(module: nn.Module) -> bool:
    """Whether accelerate moves a module at the start of its forward; its parts are looked at then."""
    return hasattr(module, "_hf_hook")


@contextlib.contextmanager
def modules_are_checked() -> Iterator[None]:
    """A module that is called with a tensor of the device has all its parameters and buffers there, or an error."""
    depth = 0

    def before(module: nn.Module, args: Any) -> None:
        nonlocal depth
        if moves_itself(module):
            return
        if depth == 0:  # inside another module's call it was looked at already
            on_device = any(isinstance(a, VirtualTensor) for a in tree_leaves(args))
            if on_device and (names := left_behind(module)):
                raise DeviceMismatch(
                    f"{type(module).__name__} runs on the device, but {', '.join(names[:3])} is on the CPU"
                )
        depth += 1

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal depth
        if not moves_itself(module):
            depth = max(0, depth - 1)

    handles = [register_module_forward_pre_hook(before), register_module_forward_hook(after, always_call=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
