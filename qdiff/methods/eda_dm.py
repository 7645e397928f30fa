"""EDA-DM (Liu et al., arXiv 2401.04585): samples where the network changes most, fine-grained reconstruction.

PTQ4DM (Shang et al., CVPR 2023) runs the same recipe here, with its own choice of timesteps and without the layers'
errors, so the two differ only in what their papers say.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from qdiff.calibration.bias_correction import correct_biases
from qdiff.calibration.fitting import UnitKind, WeightStart
from qdiff.calibration.layer_rounding import ColumnRounding, round_layers
from qdiff.calibration.objectives import lp_error
from qdiff.calibration.observe import observe_unit
from qdiff.calibration.reconstruction import FitSettings
from qdiff.calibration.run import CalibrationRun, Phase, assert_all_fired, init_weights, units_to_fit
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.temporal_unit import calibration_steps
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel


@dataclass(frozen=True)
class EdaDmConfig:
    """The method's numbers; the defaults are those of the published scripts' options, without FBR.

    The papers' values for each model and width, which commands begin with, are in ``configs/eda-dm/``.

    Attributes:
        reconstruct: False keeps the first ranges and rounding to nearest.
        iterations, batch_size: of the loop over each unit; weights and step sizes are learned together.
        lr_rounding, lr_act: Adam's learning rates for α and for step sizes; both fall to 0 along a cosine.
        layer_weight: γ, weight of the layers' own errors (FBR); 0 is plain block reconstruction.
        drop: probability that an element stays in float while a unit is fitted (QDrop).
        unit: block or layer.
        start: where rounding starts (not in the paper).
        bias_correction: shift each bias so that the layer's mean output is the float one (not in the paper).
        temporal_unit: fit what depends on t alone first, as one unit (TFMQ-DM's; `qdiff.calibration.temporal_unit`).
    """

    reconstruct: bool = True
    iterations: int = 5_000
    batch_size: int = 32
    lr_rounding: float = 0.5
    lr_act: float = 1e-3
    layer_weight: float = 0.0
    drop: float = 0.5
    unit: UnitKind = UnitKind.BLOCK
    start: WeightStart = WeightStart.NEAREST
    bias_correction: bool = False
    temporal_unit: bool = False

    def __post_init__(self) -> None:
        for name, option in (("iterations", "--cali_iters"), ("batch_size", "--cali_batch_size")):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give {option} at least 1")
        for name, option in (("lr_rounding", "--lr_w"), ("lr_act", "--lr_a")):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}; give {option} a finite number above 0")
        if not 0 <= self.layer_weight < math.inf:
            raise UserError(f"layer_weight is {self.layer_weight}; give --add_loss a finite number of at least 0")
        if not 0 <= self.drop < 1:
            raise UserError(f"drop is {self.drop}; give --qdrop from 0 to below 1")
        object.__setattr__(self, "unit", UnitKind(self.unit))
        object.__setattr__(self, "start", WeightStart(self.start))

    @property
    def rounds_columns(self) -> bool:
        """Whether weights are rounded column by column first."""
        return self.start.target is not None


def calibrate(qnn: QuantModel, data: CalibrationSet, config: EdaDmConfig, run: CalibrationRun) -> None:
    """Fit all quantizers, unit by unit: ranges first, then roundings and step sizes together.

    Args:
        qnn: built with the requested widths.
        data: recorded from the float model.
        config: the method's numbers.
        run: seed, storage, journal, progress, and whether weights are kept.
    """
    weights, activations = run.fits_weights(qnn), qnn.config.calibrates_acts
    if weights:
        init_weights(qnn)
    settings = FitSettings(
        config.iterations,
        config.batch_size,
        lr_rounding=config.lr_rounding if weights else None,
        lr_act=config.lr_act if activations else None,
        decays=True,
        drop=config.drop,
        layer_weight=config.layer_weight,
        from_integers=config.rounds_columns,
    )
    # Shuffled, because samples are stored by timestep and a running average would mostly reflect the last timesteps.
    order = torch.randperm(len(data), generator=run.generator(2))
    phase = Phase("joint", 3, config.iterations, activations)
    network = calibration_steps(qnn, data.inputs, config.temporal_unit)
    with run.progress(network, config.iterations) as bar:
        for opened in units_to_fit(qnn, network, data.inputs, phase, run, bar):
            if activations:
                observe_unit(opened.unit, opened.walker, qnn.config.act_range, order)
            if weights and config.rounds_columns:
                round_layers(opened.unit, opened.walker, ColumnRounding(config.start.target), activations)
            for part in opened.parts(config.unit) if config.reconstruct else ():
                opened.fit(part, lp_error(2.0), settings)
            if config.bias_correction:
                correct_biases(opened.unit, opened.walker, activations)
    assert_all_fired(qnn, data, activations=not qnn.config.calibrates_changes)
