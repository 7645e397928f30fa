"""Set the activation ranges of one unit from the activations that pass through it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.walk import Walker
from qdiff.modes import leaf_modes
from qdiff.quantizer import ActQuantizer, calibrated_act_quantizers
from qdiff.ranges.estimators import ESTIMATORS


def observe_unit(
    unit: Unit,
    walker: Walker,
    method: str,
    rows: Tensor | None = None,
    momentum: float | None = None,
    softmax_only: bool = False,
) -> None:
    """Choose δ and z of every activation quantizer in a unit, including those of attention's operands.

    While observing, weights are quantized and the observed activations are not.

    Args:
        method: a name in `qdiff.ranges.estimators.ESTIMATORS`.
        rows: the samples to observe, in this order; None takes all.
        momentum: momentum of a running average over batches; None takes the extremes over all samples.
        softmax_only: observe only softmax outputs; the other quantizers keep the ranges they have.
    """
    quantizers = list(calibrated_act_quantizers(unit.module).values())
    if softmax_only:
        quantizers = [q for q in quantizers if q.unsigned]
    if not quantizers:
        return
    rows = (torch.arange(len(unit.target)) if rows is None else rows).to(unit.target.device)
    modes = leaf_modes([unit.module], weights=True, activations=True)
    with observing(quantizers, method, momentum), torch.no_grad(), modes:
        for part in walker.slices(len(rows)):
            unit.module(*walker.load(unit.inputs, rows[part]))


@contextlib.contextmanager
def observing(quantizers: Sequence[ActQuantizer], method: str, momentum: float | None = None) -> Iterator[None]:
    """Have quantizers observe what passes through them inside the block, and set their ranges at its end.

    Args:
        method, momentum: as in `observe_unit`.
    """
    for quantizer in quantizers:
        quantizer.observer = ESTIMATORS[method](momentum)
    try:
        yield
        for quantizer in quantizers:
            quantizer.settle()
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
