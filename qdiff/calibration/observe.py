"""Set the activation ranges of one unit from the activations that pass through it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.walk import Walker
from qdiff.modes import leaf_modes
from qdiff.quantizer import TimestepActQuantizer, calibrated_act_quantizers
from qdiff.ranges.estimators import ESTIMATORS


def observe_unit(
    unit: Unit,
    walker: Walker,
    method: str,
    rows: Tensor | None = None,
    momentum: float | None = None,
    softmax_only: bool = False,
    part: nn.Module | None = None,
) -> None:
    """Choose δ and z of every activation quantizer in a unit, including those of attention's operands.

    While observing, weights are quantized and the observed activations are not. Quantizers outside of ``part`` quantize
    and need ranges. Quantizers with ranges per timestep see the samples of one timestep after another, and take each
    range from those.

    Args:
        method: a name in `qdiff.ranges.estimators.ESTIMATORS`.
        rows: the samples to observe, in this order; None takes all.
        momentum: momentum of a running average over batches; None takes the extremes over all samples.
        softmax_only: observe only softmax outputs; the other quantizers keep the ranges they have.
        part: observe only the quantizers of this module inside the unit; None takes all.
    """
    quantizers = list(calibrated_act_quantizers(unit.module if part is None else part).values())
    if softmax_only:
        quantizers = [q for q in quantizers if q.unsigned]
    if not quantizers:
        return
    rows = (torch.arange(len(unit.target)) if rows is None else rows).to(unit.target.device)
    if ESTIMATORS[method].averages:
        # Samples are stored by timestep, and an average would mostly reflect the last ones.
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(len(rows))).to(rows.device)]
    by_timestep = [q for q in quantizers if isinstance(q, TimestepActQuantizer)]
    shared = [q for q in quantizers if not isinstance(q, TimestepActQuantizer)]
    groups = walker.timesteps.groups(rows) if by_timestep else [(0, rows)]
    try:
        for quantizer in shared:
            quantizer.observer = ESTIMATORS[method](momentum)
        for entry, some in groups:
            for quantizer in by_timestep:
                quantizer.observer = ESTIMATORS[method](momentum)
            with torch.no_grad(), leaf_modes([unit.module], weights=True, activations=True):
                for batch in walker.slices(len(some)):
                    unit.module(*walker.load(unit.inputs, some[batch]))
            for quantizer in by_timestep:
                quantizer.settle_entry(entry)
        for quantizer in shared:
            quantizer.settle()
        for quantizer in by_timestep:
            quantizer.finish()
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
