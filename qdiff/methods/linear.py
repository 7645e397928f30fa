"""The naive baseline of the papers: round weights to nearest, min-max ranges for activations, learn nothing."""

from __future__ import annotations

from qdiff.calibration.capture import walk
from qdiff.calibration.samples import CalibrationSet
from qdiff.methods.common import CalibrationRun, assert_all_fired, init_weights
from qdiff.methods.ranges import observe_unit
from qdiff.quant_model import QuantModel


def calibrate(qnn: QuantModel, data: CalibrationSet, run: CalibrationRun) -> None:
    """Quantize a network without any optimisation.

    Args:
        qnn: built with the widths wanted.
        data: used for the activations' extremes only; untouched where activations stay in float.
        run: seed, storage, progress.
    """
    init_weights(qnn)
    if qnn.config.calibrates_acts:
        walker = run.walker(qnn)
        for _, _, unit, _ in walk(qnn.model, data.inputs, walker, weights=True, activations=True):
            observe_unit(unit, walker, qnn.config.act_range)
    assert_all_fired(qnn, data, activations=not qnn.config.calibrates_changes)
