"""Set the activation ranges of one unit from what passes through it."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.calibration.capture import Walker
from qdiff.calibration.reconstruction import Unit
from qdiff.config import RangeMethod
from qdiff.modes import leaf_modes
from qdiff.quantizer import ActQuantizer
from qdiff.range_estimators import RangeObserver


def observe_unit(
    unit: Unit,
    walker: Walker,
    method: RangeMethod,
    rows: Tensor | None = None,
    momentum: float | None = None,
    momentum_softmax_only: bool = False,
) -> None:
    """Choose δ and z of every activation quantizer in a unit, attention's operands included.

    Weights are quantized while observing, the unit's own activations are not.

    Args:
        rows: which samples to look at; None takes all.
        momentum: of a running average over batches; None takes the extremes over everything.
        momentum_softmax_only: the running average is for softmax outputs alone.
    """
    quantizers = [m for m in unit.module.modules() if isinstance(m, ActQuantizer)]
    if not quantizers:
        return
    for quantizer in quantizers:
        averaged = quantizer.unsigned or not momentum_softmax_only
        quantizer.observer = RangeObserver(method, momentum if averaged else None)
    try:
        inputs = unit.inputs if rows is None else tuple(i[rows] for i in unit.inputs)
        with torch.no_grad(), leaf_modes([unit.module], weights=True, activations=True):
            for part in walker.slices(len(inputs[0])):
                unit.module(*walker.load(inputs, part))
        for quantizer in quantizers:
            quantizer.settle()
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
