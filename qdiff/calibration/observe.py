"""Set the activation ranges of one unit from the activations that pass through it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.walk import Walker
from qdiff.modes import leaf_modes
from qdiff.quantizer import calibrated_act_quantizers
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
    and need ranges.

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
    for quantizer in quantizers:
        quantizer.observer = ESTIMATORS[method](momentum)
    try:
        with torch.no_grad(), leaf_modes([unit.module], weights=True, activations=True):
            for part in walker.slices(len(rows)):
                unit.module(*walker.load(unit.inputs, rows[part]))
        for quantizer in quantizers:
            quantizer.settle()
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
