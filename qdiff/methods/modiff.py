"""MoDiff (Gao et al., ICML 2025): ranges of the CHANGES of activations from one sampling step to the next.

The modulated inference itself is in `qdiff.modulation`; weights come from another recipe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

from qdiff.calibration.capture import walk
from qdiff.calibration.objectives import lp_error, penalised_outside
from qdiff.calibration.pairs import PairedCall, PairedNetwork, of_second
from qdiff.calibration.samples import CalibrationSet
from qdiff.errors import UserError
from qdiff.methods.common import CalibrationRun, assert_all_fired
from qdiff.methods.fitting import FitSettings, UnitKind, fit_unit, parts_of
from qdiff.methods.ranges import observe_unit
from qdiff.progress import progress_bar
from qdiff.quant_model import QuantModel
from qdiff.quantizer import calibrated_act_quantizers


@dataclass(frozen=True)
class ChangesConfig:
    """How the ranges of changes are calibrated; defaults are the paper's code's.

    Attributes:
        learn: learn step sizes layer by layer; False stops at the first ranges (``--cali_min_max``).
        iterations, batch_size: a layer.
        lr: Adam's learning rate for step sizes, decaying to 0 as a cosine.
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
            raise UserError(f"--out_penalty is {self.out_penalty}; give a finite number from 0")


def calibrate_changes(qnn: QuantModel, pairs: CalibrationSet, config: ChangesConfig, run: CalibrationRun) -> None:
    """Set the ranges of changes in a network whose weights are quantized already.

    A pair is a trajectory of two steps: activations of the first are in float (or as `QuantConfig.rest_bits` says), the
    change to the second is what is calibrated.

    Args:
        qnn: its config has ``modulate`` without ``act_dynamic``.
        pairs: x [N, 2, C, H, W], t [N, 2] and, where conditional, the context [N, 2, L, D]; the step before first.
        config: the recipe.
        run: seed, storage, journal, progress.
    """
    network, walker = PairedNetwork(qnn.model), run.walker(qnn)
    settings = FitSettings(config.iterations, config.batch_size, lr_act=config.lr, decays=True)
    objective = of_second(penalised_outside(lp_error(config.p), config.out_penalty))
    total = sum(1 for _ in network.steps()) * config.iterations
    with progress_bar(total, "calibrating changes", disable=not run.show_progress) as bar:
        for index, _, unit, _ in walk(network, pairs.inputs, walker, weights=True, activations=True):
            bar.set_postfix_str(unit.name, refresh=False)
            before, idle = bar.n, not calibrated_act_quantizers(unit.module)
            if not idle and not (run.journal is not None and run.journal.restore("changes", index, unit.module)):
                observe_unit(unit, walker, qnn.config.act_range)
                parts = parts_of(unit, UnitKind.LAYER, walker, activations=True, wrap=PairedCall)
                for part, (layer, share) in enumerate(parts if config.learn else ()):
                    if not calibrated_act_quantizers(layer.module):  # attention, whose ranges are those at hand
                        continue
                    tick, feeding = partial(bar.update, share), run.feeding(qnn, unit.name, config.batch_size)
                    error = fit_unit(layer, objective, settings, run.generator(4, index, part), feeding, tick)
                    run.errors[f"changes {layer.name.replace('.module', '', 1)}"] = error  # less that of `PairedCall`
                if run.journal is not None:
                    run.journal.record("changes", index, unit.module)
            bar.update(config.iterations - (bar.n - before))  # whatever was not counted one by one
    assert_all_fired(qnn, CalibrationSet(tuple(i[:, 0] for i in pairs.inputs)))
