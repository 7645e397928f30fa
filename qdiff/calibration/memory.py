"""How much memory a calibration takes, from one forward of one sample, before it begins."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.interface import AttentionCore, State, SteppedNetwork
from qdiff.quant_attention import QuantAttention
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

FLOAT = 4  # bytes
# What a forward and backward of a quantized unit holds, in multiples of its leaves' inputs and outputs: autograd keeps
# 0.1 to 2.1 of them (counted by its saved-tensor hooks on the bundled class-conditional model), gradients come on top.
GRADIENT_COPIES = 4
# A rounding variable, its gradient and Adam's two moments, the soft weight, and what autograd keeps on the way to it:
# what full-size Stable Diffusion took (docs/results.md).
ROUNDING_COPIES = 16
# Bytes inside one forward or backward pass: at most, where the budget allows them, and at least.
DEFAULT_PASS, SMALLEST_PASS = 2 << 30, 1 << 26


@dataclass(frozen=True)
class Footprint:
    """Bytes that calibration holds for one sample.

    Attributes:
        stored: the largest amount of activations that a walk keeps at a time (two states, inputs, outputs).
        inside: for every step, what goes into its leaves and comes out of them during one forward.
    """

    stored: int
    inside: dict[str, int] = field(default_factory=dict)

    def forward_batch(self, pass_bytes: int, limit: int) -> int:
        """Return how many samples a forward of any step may take."""
        return max(1, min(limit, pass_bytes // max(1, *self.inside.values(), 1)))

    def training_batch(self, step: str, pass_bytes: int, limit: int) -> int:
        """Return how many samples a forward and backward of one step may take at a time."""
        return max(1, min(limit, pass_bytes // max(1, self.inside.get(step, 1) * GRADIENT_COPIES)))


def _bytes(tensors: object) -> int:
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    if isinstance(tensors, list | tuple):
        return sum(_bytes(t) for t in tensors)
    return 0


def _state_bytes(state: State, given: set[int]) -> int:
    """Return the bytes of a state's tensors, each once, without the network's own inputs."""
    flat = [t for v in state.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
    return sum(_bytes(t) for t in {id(t): t for t in flat if id(t) not in given}.values())


@torch.no_grad()
def measure_footprint(network: SteppedNetwork, sample: tuple[Tensor, ...]) -> Footprint:
    """Run one sample through a network, step by step, and count what a calibration walk would hold for it.

    Args:
        sample: the network's inputs with a batch of 1, on its device.
    """
    state = network.start(*sample)
    given = {id(t) for t in sample}
    stored, inside = 0, {}
    for step in network.steps():
        inputs = step.inputs(state)
        with _counted(step.module) as count:
            output = step.module(*inputs)
        inside[step.name] = count[0]
        # `walk` holds a float and a quantized state, the unit's inputs in both, its target and its output.
        stored = max(stored, 2 * (_state_bytes(state, given) + _bytes(inputs) + _bytes(output)))
        step.output(state, output)
    return Footprint(stored + _bytes(sample), inside)


@contextlib.contextmanager
def _counted(module: nn.Module):
    count = [0]

    def add(leaf: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        count[0] += _bytes(inputs) + _bytes(output)
        if isinstance(leaf, AttentionCore | QuantAttention):
            # Quantized attention holds the logits, the softmax output and its quantized form.
            q, k, _ = inputs
            count[0] += 3 * FLOAT * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]

    leaves = [m for m in module.modules() if not list(m.children()) or isinstance(m, QuantModule | QuantAttention)]
    handles = [leaf.register_forward_hook(add) for leaf in leaves]
    try:
        yield count
    finally:
        for handle in handles:
            handle.remove()


def resident_memory() -> int:
    """Return the bytes of RAM that this process holds now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def available_memory() -> int:
    """Return the bytes of RAM that are free now."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class MemoryUse:
    """How a calibration's memory is spent; sizes in bytes.

    Attributes:
        held: what the process holds before it begins, weights included.
        unit: dequantized weights and rounding variables of the largest unit.
        in_pass: what one forward and backward may hold.
        in_ram, on_disk: stored activations.
        pass_bytes, for_storage: what the budget allows a pass and stored activations in RAM.
        footprint: what one sample takes.
    """

    held: int
    unit: int
    in_pass: int
    in_ram: int
    on_disk: int
    pass_bytes: int
    for_storage: int
    footprint: Footprint

    @property
    def peak(self) -> int:
        """Peak memory of the process."""
        return self.held + self.unit + self.in_pass + self.in_ram

    def __str__(self) -> str:
        parts = f"{_gib(self.held)} held already, the unit in work {_gib(self.unit + self.in_pass)}"
        disk = f", and {_gib(self.on_disk)} on disk" if self.on_disk else ""
        return f"about {_gib(self.peak)} ({parts}, stored activations {_gib(self.in_ram)}{disk})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**27 else f"{size / 2**20:.1f} MiB"


def plan_memory(qnn: QuantModel, footprint: Footprint, samples: int, batch_size: int, budget: int | None) -> MemoryUse:
    """Divide a budget between passes and stored activations.

    Args:
        samples: size of the calibration set.
        batch_size: of reconstruction.
        budget: bytes beside what is held already; None takes half of the RAM that is free now.

    Raises:
        UserError: what goes to disk does not fit there.
    """
    budget = available_memory() // 2 if budget is None else budget
    allowed_pass = max(SMALLEST_PASS, min(DEFAULT_PASS, budget // 2))
    for_storage = max(0, budget - allowed_pass)
    stored = footprint.stored * samples
    on_disk = max(0, stored - for_storage)
    folder = tempfile.gettempdir()
    free = shutil.disk_usage(folder).free
    if on_disk > free:
        raise UserError(
            f"calibration on {samples} samples stores {_gib(stored)} of activations; {_gib(for_storage)} of that may "
            f"stay in RAM, and {folder} has {_gib(free)} free; lower --cali_n or --cali_st, raise --memory_budget, or "
            "set TMPDIR to a larger disk"
        )
    largest = max(
        (
            sum(m.weight.numel() for m in step.module.modules() if isinstance(m, QuantModule))
            for step in qnn.model.steps()
        ),
        default=0,
    )
    needed = max((size * GRADIENT_COPIES for size in footprint.inside.values()), default=0) * min(batch_size, samples)
    return MemoryUse(
        held=resident_memory(),
        unit=largest * FLOAT * (ROUNDING_COPIES + 1),
        in_pass=min(needed, max(allowed_pass, needed // max(1, min(batch_size, samples)))),
        in_ram=min(stored, for_storage),
        on_disk=on_disk,
        pass_bytes=allowed_pass,
        for_storage=for_storage,
        footprint=footprint,
    )
