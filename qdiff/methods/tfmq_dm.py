"""TFMQ-DM (Huang et al., CVPR 2024, arXiv 2311.16503): temporal features first, and activation ranges per timestep.

What depends on t alone is reconstructed as one unit; the other blocks follow as in BRECQ, with activations in float.
Then every quantizer observes its ranges, which are those of one timestep each where the config says so
(`qdiff.config.ActRanges.TIMESTEP`); no step size is learned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qdiff.calibration.bias_correction import correct_biases
from qdiff.calibration.objectives import lp_error
from qdiff.calibration.observe import observe_unit
from qdiff.calibration.run import CalibrationRun, Phase, assert_all_fired, init_weights, units_to_fit
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.temporal_unit import calibration_steps
from qdiff.errors import UserError
from qdiff.methods.qdiffusion import QDiffusionConfig, contains, fit_weights
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer


@dataclass(frozen=True)
class TfmqDmConfig(QDiffusionConfig):
    """The method's numbers: those of Q-Diffusion's weights, of which none for step sizes are used.

    Attributes:
        every: k; weights are fitted on the samples of every k-th calibrated timestep, from the noisiest on, and ranges
            are observed on all. (The paper: 5 of 100 steps on CIFAR-10, 10 of 200 for bedrooms, 25 of 400 for churches,
            1 for ImageNet and Stable Diffusion.)
    """

    temporal_unit: bool = True
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.every < 1:
            raise UserError(f"every is {self.every}; give --tfmq_every at least 1")


def calibrate(qnn: QuantModel, data: CalibrationSet, config: TfmqDmConfig, run: CalibrationRun) -> None:
    """Fit all weights, the temporal unit first, and then observe the ranges of all activations.

    Args:
        qnn: built with the requested widths, and with ranges per timestep for the published method.
        data: recorded from the float model.
        config: the method's numbers.
        run: seed, storage, journal, progress, and whether weights are kept.
    """
    weights, activations = run.fits_weights(qnn), qnn.config.calibrates_acts
    network = calibration_steps(qnn, data.inputs, config.temporal_unit)
    with run.progress(network, weights * config.iterations + activations) as bar:
        if weights:
            init_weights(qnn)
            fit_weights(qnn, network, every_timestep(data, config.every), config, run, bar)
        phase = Phase("activations", 1, 1, True, contains(ActQuantizer), label="activations ")
        for opened in units_to_fit(qnn, network, data.inputs, phase, run, bar) if activations else ():
            observe_unit(opened.unit, opened.walker, qnn.config.act_range)
            if config.bias_correction:
                correct_biases(opened.unit, opened.walker, activations=True)
            opened.measure(lp_error(2.0))
    assert_all_fired(qnn, data, activations=not qnn.config.calibrates_changes)


def every_timestep(data: CalibrationSet, every: int) -> CalibrationSet:
    """Return the samples of every k-th timestep of a calibration set, from the noisiest on."""
    if every == 1:
        return data
    t = data.inputs[1]
    kept = torch.isin(t, t.unique().flip(0)[::every])
    return CalibrationSet(tuple(part[kept] for part in data.inputs))
