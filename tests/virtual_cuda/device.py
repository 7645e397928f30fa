"""The context manager that makes ``cuda`` the virtual device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from unittest import mock

import torch
import torch._dynamo  # before anything is patched: it notes what it finds in torch.cuda

from virtual_cuda.counts import Counts
from virtual_cuda.cuda_patches import patches
from virtual_cuda.dispatch import VirtualMode, fused_attention, recorder
from virtual_cuda.modules import modules_are_checked
from virtual_cuda.tensor import DeviceMemory, Generator, memory


@dataclass
class VirtualDevice:
    """What a test holds of the device.

    Attributes:
        counts: of everything since it is there.
        memory: what it has and what is held; a test may set `DeviceMemory.capacity` and `DeviceMemory.others`.
    """

    counts: Counts
    memory: DeviceMemory = field(default_factory=lambda: memory)

    @staticmethod
    def counting() -> contextlib.AbstractContextManager[Counts]:
        """Count what happens inside a block."""
        return recorder.counting()

    @staticmethod
    def counted(work: Callable[..., object], *args: object) -> Counts:
        """Return what ``work(*args)`` counts; a custom operation (`torch.library`) is one kernel."""
        with recorder.counting() as counts:
            work(*args)
        return counts


@contextlib.contextmanager
def virtual_cuda(devices: int = 1) -> Iterator[VirtualDevice]:
    """Let ``cuda`` be a virtual GPU inside the block.

    Args:
        devices: how many there are.

    Outside of it nothing is changed; tensors that are kept still refuse what CUDA refuses.
    """
    torch._C._ensureCUDADeviceGuardSet()
    swaps = torch.__future__.get_swap_module_params_on_conversion()
    lifts = torch._C._only_lift_cpu_tensors()
    capacity, others = memory.capacity, memory.others
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor(1, device="cuda")` then comes by the mode
    memory.peak.clear()
    try:
        with (
            mock.patch.multiple(torch.cuda, **patches(devices)),
            mock.patch.object(torch, "Generator", Generator),
            mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", fused_attention),
            # Views of wrapper tensors that were made outside of inference mode cannot be taken inside it.
            mock.patch.object(torch, "inference_mode", lambda mode=True: torch.no_grad()),
            modules_are_checked(),
            recorder.counting() as counts,
            VirtualMode(),
        ):
            yield VirtualDevice(counts)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swaps)
        torch._C._set_only_lift_cpu_tensors(lifts)
        memory.capacity, memory.others = capacity, others
