"""Set the activation ranges of one unit from the activations that pass through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import TypeVar

import torch
from torch import Tensor

from qdiff.calibration.power_of_two import vote
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.walk import Walker
from qdiff.modes import leaf_modes
from qdiff.quantizer import ActQuantizer, TimestepActQuantizer, calibrated_act_quantizers
from qdiff.ranges.estimators import ESTIMATORS

Samples = TypeVar("Samples")


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
        rows: the samples to observe, in this order; None takes all, in random order where batches count unequally.
        momentum: momentum of a running average over batches; None takes the extremes over all samples.
        softmax_only: observe only softmax outputs; the other quantizers keep the ranges they have.
    """
    quantizers = list(calibrated_act_quantizers(unit.module).values())
    if softmax_only:
        quantizers = [q for q in quantizers if q.unsigned]
    if not quantizers:
        return

    def show(some: Tensor) -> None:
        with torch.no_grad(), leaf_modes([unit.module], weights=True, activations=True):
            for batch, share in walker.passes(len(some)):
                announce(quantizers, share)
                unit.module(*walker.load(unit.inputs, some[batch]))

    rows = all_rows(unit, method) if rows is None else rows.to(unit.target.device)
    observe(quantizers, method, by_entry(walker, rows), show, momentum)


def all_rows(unit: Unit, method: str) -> Tensor:
    """Return all samples: in random order if ranges by this method depend on the order, else as they are stored."""
    count, device = len(unit.target), unit.target.device
    if ESTIMATORS[method].averages:
        # Samples are stored by timestep, and an average would mostly reflect the last ones.
        return torch.randperm(count, generator=torch.Generator().manual_seed(count)).to(device)
    return torch.arange(count, device=device)


def by_entry(walker: Walker, rows: Tensor) -> list[tuple[int, Tensor]]:
    """Return samples by entry of the tables of ranges per timestep; without such ranges, all belong to entry 0."""
    return [(0, rows)] if walker.timesteps is None else list(walker.timesteps.groups(rows))


def announce(quantizers: Iterable[ActQuantizer], share: Fraction) -> None:
    """Tell observers which share of a batch the next tensors are."""
    for quantizer in quantizers:
        if quantizer.observer is not None:
            quantizer.observer.share = share


def observe(
    quantizers: Sequence[ActQuantizer],
    method: str,
    groups: Sequence[tuple[int, Samples]],
    show: Callable[[Samples], None],
    momentum: float | None = None,
) -> None:
    """Have quantizers observe samples and set their ranges; those with ranges per timestep set one for each group.

    Where channels may have finer step sizes, the samples then vote on these.

    Args:
        method, momentum: as in `observe_unit`.
        groups: samples by entry, as `by_entry` gives them.
        show: runs the samples of a group through the quantizers, and announces parts of batches.
    """
    by_timestep = [q for q in quantizers if isinstance(q, TimestepActQuantizer)]
    shared = [q for q in quantizers if not isinstance(q, TimestepActQuantizer)]
    try:
        for quantizer in shared:
            quantizer.observer = ESTIMATORS[method](momentum)
        for entry, some in groups:
            for quantizer in by_timestep:
                quantizer.observer = ESTIMATORS[method](momentum)
            show(some)
            for quantizer in by_timestep:
                quantizer.settle_entry(entry)
        for quantizer in shared:
            quantizer.settle()
        for quantizer in by_timestep:
            quantizer.finish()
        vote(quantizers, groups, show)
    finally:
        for quantizer in quantizers:
            quantizer.observer = None
