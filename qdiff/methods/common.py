"""What every recipe needs: where calibration runs, what it keeps, and the proof that it reached every quantizer."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from qdiff.calibration.capture import Walker
from qdiff.calibration.feeding import Feeding
from qdiff.calibration.footprint import Footprint
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.memory import DEFAULT_PASS
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.storage import ActivationStorage
from qdiff.config import Ablation
from qdiff.quant_model import QuantModel


@dataclass
class CalibrationRun:
    """The surroundings of one calibration.

    Attributes:
        seed: fixes the result.
        storage: keeps activations within a memory budget.
        journal: finished units on disk; None keeps nothing.
        show_progress: a progress bar with the time left, on stderr.
        errors: the final reconstruction error of every fitted unit, filled in by the recipe.
        footprint, pass_bytes: what a sample takes, and what one pass may take; None has no limit.
        resident_bytes: what a unit's samples may take on a GPU while it is fitted.
    """

    seed: int = 0
    storage: ActivationStorage = field(default_factory=ActivationStorage)
    journal: CalibrationJournal | None = None
    show_progress: bool = True
    errors: dict[str, float] = field(default_factory=dict)
    footprint: Footprint | None = None
    pass_bytes: int = DEFAULT_PASS
    resident_bytes: int = 0

    def walker(self, qnn: QuantModel) -> Walker:
        if self.footprint is None:
            return Walker(self.storage, qnn.device)
        return Walker(self.storage, qnn.device, self.footprint.forward_batch(self.pass_bytes, Walker.batch_size))

    def feeding(self, qnn: QuantModel, step: str, batch_size: int) -> Feeding:
        """Return how the samples of a step come to the network's device, as many at a time as a pass may take."""
        size = batch_size
        if self.footprint is not None:
            size = self.footprint.training_batch(step, self.pass_bytes, batch_size)
        return Feeding(qnn.device, size, self.resident_bytes)

    def generator(self, *place: int) -> torch.Generator:
        """Return a generator for one unit, independent of what ran before it (so resuming changes nothing)."""
        seed = self.seed
        for number in place:
            seed = seed * 1009 + number + 1
        return torch.Generator().manual_seed(seed % (1 << 63))


def init_weights(qnn: QuantModel) -> None:
    """Choose ranges of all weights and round them to nearest; nothing to do where weights stay in float."""
    if qnn.config.weight_bits is None:
        return
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)


@torch.no_grad()
def assert_all_fired(qnn: QuantModel, data: CalibrationSet, batch: int = 4, activations: bool = True) -> None:
    """Prove on a few samples that every quantizer is set and takes part in a forward pass.

    Args:
        activations: False looks at the weights alone: ranges of changes are calibrated after them.

    Raises:
        RuntimeError: naming the quantizers that did nothing (a defect of the network's wrapping, not of the data).
    """
    qnn.reset_fired()
    inputs = tuple(i[:batch].to(qnn.device) for i in data.inputs)
    with qnn.quantized(weights=True, activations=activations), qnn.trajectory():
        output = qnn(*inputs)
        if qnn.config.modulate:  # at the first step there is no change to quantize
            output = qnn(*inputs)
    shows = activations and qnn.config.ablation is not Ablation.CLEARED_STATE  # which is meant to silence them
    silent = qnn.silent_quantizers() if shows else []
    if silent:
        raise RuntimeError(f"{len(silent)} activation quantizers never fired, e.g. {silent[0]}")
    if not torch.isfinite(output).all():
        raise RuntimeError("the quantized network's output is not finite after calibration")
