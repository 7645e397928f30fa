"""The papers' naive baseline: weights rounded to nearest, min-max ranges for activations, nothing learned."""

from __future__ import annotations

from qdiff.calibration.observe import observe_unit
from qdiff.calibration.run import CalibrationRun, assert_all_fired, init_weights
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.walk import walk
from qdiff.quant_model import QuantModel


def calibrate(qnn: QuantModel, data: CalibrationSet, config: None, run: CalibrationRun) -> None:
    """Quantize a network without any optimisation.

    Args:
        qnn: built with the requested widths.
        data: used only for the activations' extremes; unused if activations stay in float.
        config: None; this method has no settings.
        run: seed, storage, progress.
    """
    if run.weights:
        init_weights(qnn)
    if qnn.config.calibrates_acts:
        walker = run.walker(qnn, data.inputs)
        for _, _, unit, _ in walk(qnn.as_steps(data.inputs), data.inputs, walker, weights=True, activations=True):
            observe_unit(unit, walker, qnn.config.act_range)
    assert_all_fired(qnn, data, activations=not qnn.config.calibrates_changes)
