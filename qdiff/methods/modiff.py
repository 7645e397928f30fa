"""MoDiff (Gao et al., ICML 2025): ranges of the CHANGES of activations from one sampling step to the next.

The modulated inference itself is in `qdiff.modulation`; weights come from another method.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from qdiff.calibration.fitting import UnitKind
from qdiff.calibration.objectives import lp_error, penalised_outside
from qdiff.calibration.observe import observe_unit
from qdiff.calibration.pairs import PairedCall, PairedNetwork, of_second
from qdiff.calibration.reconstruction import FitSettings
from qdiff.calibration.run import CalibrationRun, Phase, assert_all_fired, units_to_fit
from qdiff.calibration.samples import CalibrationSet
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel
from qdiff.quantizer import calibrated_act_quantizers


@dataclass(frozen=True)
class ChangesConfig:
    """How the ranges of changes are calibrated; the defaults are those of the paper's code.

    Attributes:
        learn: learn step sizes layer by layer; False keeps the first ranges (``--cali_min_max``).
        iterations, batch_size: of the loop over each layer.
        lr: Adam's learning rate for step sizes, falling to 0 along a cosine.
        p: norm of the error of a layer's output.
        out_penalty: weight of Σ|target − output| over targets outside the range of the outputs (``--out_penalty``).
    """

    learn: bool = True
    iterations: int = 5_000
    batch_size: int = 32
    lr: float = 4e-4
    p: float = 2.4
    out_penalty: float = 0.0

    def __post_init__(self) -> None:
        for name, option in (("iterations", "--cali_iters_a"), ("batch_size", "--cali_batch_size")):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give {option} at least 1")
        if not (self.lr > 0 and self.p > 0):
            raise UserError(f"lr is {self.lr} and p is {self.p}; give --cali_lr and --cali_p above 0")
        if not 0 <= self.out_penalty < math.inf:
            raise UserError(f"--out_penalty is {self.out_penalty}; give a finite number of at least 0")


def calibrate_changes(qnn: QuantModel, pairs: CalibrationSet, config: ChangesConfig, run: CalibrationRun) -> None:
    """Set the ranges of changes in a network whose weights are already quantized.

    A pair is a trajectory of two steps: activations of the first are in float (or have `QuantConfig.rest_bits`), and
        the change to the second is calibrated.

    Args:
        qnn: its config has ``modulate`` without ``act_dynamic``.
        pairs: x [N, 2, C, H, W], t [N, 2] and, if conditional, the context [N, 2, L, D]; the earlier step first.
        config: the method's numbers.
        run: seed, storage, journal, progress.
    """
    network = PairedNetwork(qnn.as_steps(tuple(i.flatten(0, 1) for i in pairs.inputs)))
    settings = FitSettings(config.iterations, config.batch_size, lr_act=config.lr, decays=True)
    objective = of_second(penalised_outside(lp_error(config.p), config.out_penalty))
    phase = Phase("changes", 4, config.iterations, True, _has_ranges, label="changes ")
    with run.progress(network, config.iterations, "calibrating changes") as bar:
        for opened in units_to_fit(qnn, network, pairs.inputs, phase, run, bar):
            observe_unit(opened.unit, opened.walker, qnn.config.act_range)
            for layer in opened.parts(UnitKind.LAYER, wrap=PairedCall) if config.learn else ():
                layer.name = layer.name.replace(".module", "", 1)  # added by `PairedCall`
                opened.fit(layer, objective, settings)
    assert_all_fired(qnn, CalibrationSet(tuple(i[:, 0] for i in pairs.inputs)))


def _has_ranges(module: nn.Module) -> bool:
    """Whether a module has ranges to calibrate; attention has none, because its ranges are dynamic."""
    return bool(calibrated_act_quantizers(module))
