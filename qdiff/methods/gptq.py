"""GPTQ (Frantar et al., ICLR 2023) and GPTAQ (Li et al., ICML 2025): weights rounded in closed form, nothing learned.

The columns of a weight are rounded in turn, and those not yet rounded absorb the error, as the second moments of the
layer's inputs in the quantized network say. By default the rounding aims at the float network's output, on an exact
form of what GPTAQ approximates (`qdiff.calibration.column_rounding`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from qdiff.calibration.bias_correction import correct_bias
from qdiff.calibration.layer_rounding import ColumnRounding, part_name, round_layer
from qdiff.calibration.objectives import lp_error
from qdiff.calibration.observe import observe_unit
from qdiff.calibration.run import CalibrationRun, Phase, assert_all_fired, init_weights, units_to_fit
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.temporal_unit import calibration_steps
from qdiff.calibration.unit_inputs import UnitInputs
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "gptq_target": "target",
        "gptq_factor": "factor",
        "gptq_damping": "damping",
        "gptq_rows": "most_rows",
        "bias_correction": "bias_correction",
        "temporal_unit": "temporal_unit",
    }
)
"""Command-line option → the field of `GptqConfig` that it sets."""


@dataclass(frozen=True)
class GptqConfig(ColumnRounding):
    """The method's numbers.

    Attributes:
        bias_correction: shift each bias so that the layer's mean output is the float one.
        temporal_unit: fit what depends on t alone first, as one unit (TFMQ-DM's; `qdiff.calibration.temporal_unit`).
    """

    bias_correction: bool = True
    temporal_unit: bool = False

    rounds_columns = True


def calibrate(qnn: QuantModel, data: CalibrationSet, config: GptqConfig, run: CalibrationRun) -> None:
    """Set all quantizers in one walk, layer after layer: activation ranges, then the weight, then the bias.

    Args:
        qnn: built with the requested widths.
        data: recorded from the float model.
        config: the method's numbers.
        run: seed, storage, journal, progress, and whether weights are kept.
    """
    weights, activations = run.fits_weights(qnn), qnn.config.calibrates_acts
    if weights:
        init_weights(qnn)  # the grids, which stay; and values for layers that are not rounded yet
    network = calibration_steps(qnn, data.inputs, config.temporal_unit)
    with run.progress(network, 1) as bar:
        for opened in units_to_fit(qnn, network, data.inputs, Phase("gptq", 5, 1, activations), run, bar):
            unit = opened.unit
            inputs = UnitInputs(unit, opened.walker, activations, qnn.config.act_range)
            if activations and inputs.repeats:  # what runs between two calls of a leaf needs some range
                observe_unit(unit, opened.walker, qnn.config.act_range)
            for name, leaf in inputs.leaves:
                if activations:
                    inputs.observe(leaf)
                if not isinstance(leaf, QuantModule):
                    continue
                moments = inputs.moments(leaf, **config.moments, second=weights)
                if weights:
                    round_layer(part_name(unit, name), leaf, moments, config)
                if config.bias_correction:
                    correct_bias(leaf, moments)
            opened.measure(lp_error(2.0))
    assert_all_fired(qnn, data, activations=not qnn.config.calibrates_changes)
