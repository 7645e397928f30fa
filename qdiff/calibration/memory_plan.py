"""Divide the machine's memory between stored activations and computation before a calibration begins."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import dataclass

import torch

from qdiff.calibration.footprint import FLOAT, GRADIENT_COPIES, Footprint
from qdiff.calibration.walk import Walker
from qdiff.errors import UserError
from qdiff.machine.memory import available_memory, available_on, resident_memory
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

# Copies of a weight while its unit is fitted: the rounding variable, its gradient, Adam's two moments, the soft weight
# and what autograd saves for it; measured on full-size Stable Diffusion (docs/results.md).
ROUNDING_COPIES = 16
# Bytes for one forward or backward pass: the most, if the budget allows, and the least.
DEFAULT_PASS, SMALLEST_PASS = 2 << 30, 1 << 26
# Share of a GPU's free memory to plan with; the rest is for library workspaces and fragmentation.
GPU_SHARE = 0.85
# Activations are stored on a GPU only if this many times their size would fit: Fisher weights and captured layer
# activations come on top, and a GPU cannot spill to disk.
STORED_MARGIN = 1.3


@dataclass(frozen=True)
class MemoryUse:
    """How a calibration's memory is spent; sizes in bytes.

    Attributes:
        held: RAM that the process uses before calibration begins, including the weights if they are on the CPU.
        unit: dequantized weights and rounding variables of the largest unit, and second moments of the largest layer.
        in_pass: memory for one forward and backward pass.
        in_ram, on_disk, on_gpu: stored activations.
        pass_bytes: the budget for one pass.
        for_storage: the budget for activations stored in RAM.
        footprint: memory per sample.
        gpu: the GPU that holds the network and fits the units; None is the CPU.
        held_on_gpu: GPU memory in use before the calibration begins.
        resident_bytes: GPU memory that the samples of the current unit may occupy.
    """

    held: int
    unit: int
    in_pass: int
    in_ram: int
    on_disk: int
    pass_bytes: int
    for_storage: int
    footprint: Footprint
    gpu: torch.device | None = None
    held_on_gpu: int = 0
    on_gpu: int = 0
    resident_bytes: int = 0

    @property
    def peak(self) -> int:
        """Peak RAM of the process."""
        return self.held + self.in_ram + (self.unit + self.in_pass if self.gpu is None else 0)

    @property
    def gpu_peak(self) -> int:
        """Peak memory on the GPU."""
        if self.gpu is None:
            return 0
        samples = self.on_gpu or min(self.resident_bytes, self.in_ram + self.on_disk)
        return self.held_on_gpu + self.unit + self.in_pass + samples

    def __str__(self) -> str:
        disk = f", and {_gib(self.on_disk)} on disk" if self.on_disk else ""
        work = f"the current unit {_gib(self.unit + self.in_pass)}"
        if self.gpu is None:
            parts = f"{_gib(self.held)} used already, {work}, stored activations {_gib(self.in_ram)}{disk}"
            return f"about {_gib(self.peak)} ({parts})"
        stored = f"stored activations {_gib(self.on_gpu)}" if self.on_gpu else "samples of the unit as they fit"
        ram = f"{_gib(self.held)} used already, stored activations {_gib(self.in_ram)}{disk}"
        return (
            f"about {_gib(self.gpu_peak)} of GPU memory ({_gib(self.held_on_gpu)} used already, {work}, {stored}) and "
            f"{_gib(self.peak)} of RAM ({ram})"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def plan_memory(
    qnn: QuantModel, footprint: Footprint, samples: int, batch_size: int, budget: int | None, rounding: int = 0
) -> MemoryUse:
    """Divide a budget between passes and stored activations.

    With the network on a GPU, passes use the GPU's free memory. All stored activations go there too if they fit;
    otherwise they go to RAM and disk, and the samples of the current unit use what is left on the GPU.

    Args:
        samples: size of the calibration set.
        batch_size: batch size of reconstruction.
        budget: bytes on top of what is used already, for RAM and the GPU each; None takes half of the RAM and 85 % of
            the GPU memory that are free now.
        rounding: bytes that rounding a layer column by column holds (`layer_rounding.rounding_bytes`).

    Raises:
        UserError: the part that goes to disk does not fit there.
    """
    ram = available_memory() // 2 if budget is None else budget
    gpu = None if qnn.device.type in ("cpu", "meta") else qnn.device  # a network without values is planned for the CPU
    # Learned rounding begins after the moments are freed, so the sum is an upper bound.
    unit = _largest_unit(qnn) * FLOAT * (ROUNDING_COPIES + 1) + rounding
    stored = footprint.stored * samples
    if gpu is None:
        allowed = max(SMALLEST_PASS, min(DEFAULT_PASS, ram // 2))
        in_pass = _pass_bytes(footprint, min(batch_size, samples), allowed)
        held_on_gpu = on_gpu = resident = 0
        for_storage = max(0, ram - allowed)
    else:
        free = available_on(gpu)
        room = min(int(free * GPU_SHARE), free if budget is None else budget)
        allowed = max(SMALLEST_PASS, (room - unit) // 2)
        forward = footprint.forward_batch(allowed, Walker.pass_size) * max(footprint.inside.values(), default=0)
        in_pass = max(_pass_bytes(footprint, min(batch_size, samples), allowed), forward)
        resident = max(0, room - unit - in_pass)
        on_gpu = stored if STORED_MARGIN * stored <= resident else 0
        held_on_gpu, for_storage = torch.cuda.memory_allocated(gpu), ram
    in_ram = min(stored - on_gpu, for_storage)
    on_disk = stored - on_gpu - in_ram
    _check_disk(stored, on_disk, for_storage, samples)
    return MemoryUse(
        held=resident_memory(),
        unit=unit,
        in_pass=in_pass,
        in_ram=in_ram,
        on_disk=on_disk,
        pass_bytes=allowed,
        for_storage=for_storage,
        footprint=footprint,
        gpu=gpu,
        held_on_gpu=held_on_gpu,
        on_gpu=on_gpu,
        resident_bytes=resident,
    )


def _largest_unit(qnn: QuantModel) -> int:
    """Return the number of weights in the largest unit."""
    steps = qnn.as_steps(()).steps()
    sizes = (sum(m.weight.numel() for m in step.module.modules() if isinstance(m, QuantModule)) for step in steps)
    return max(sizes, default=0)


def _pass_bytes(footprint: Footprint, batch_size: int, allowed: int) -> int:
    """Return the bytes of a forward and backward pass: of a whole batch if allowed, and of at least one sample."""
    one = max((size * GRADIENT_COPIES for size in footprint.inside.values()), default=0)
    return min(one * batch_size, max(allowed, one))


def _check_disk(stored: int, on_disk: int, for_storage: int, samples: int) -> None:
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if on_disk > free:
        raise UserError(
            f"calibration on {samples} samples stores {_gib(stored)} of activations, of which {_gib(for_storage)} may "
            f"stay in RAM, and {folder} has {_gib(free)} free; lower --cali_n or --cali_st, raise --memory_budget, or "
            "set TMPDIR to a larger disk"
        )
