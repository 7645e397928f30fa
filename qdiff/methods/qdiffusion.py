"""Q-Diffusion (Li et al., ICCV 2023): timestep-aware calibration data, AdaRound per block, learned step sizes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import torch
from torch import nn

from qdiff.calibration.bias_correction import correct_biases
from qdiff.calibration.fisher import output_gradients
from qdiff.calibration.fitting import UnitKind, WeightStart
from qdiff.calibration.layer_rounding import ColumnRounding, round_layers
from qdiff.calibration.objectives import fisher_weights, lp_error, weighted_error
from qdiff.calibration.observe import observe_unit
from qdiff.calibration.reconstruction import FitSettings, RoundingRegulariser
from qdiff.calibration.run import CalibrationRun, Phase, assert_all_fired, init_weights, units_to_fit
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.temporal_unit import calibration_steps
from qdiff.errors import UserError
from qdiff.interface import SteppedNetwork
from qdiff.io.progress import Progress
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer, learnable_act_quantizers
from qdiff.ranges.estimators import ESTIMATORS

RUNNING_MOMENTUM = 0.95
ALPHA_REACH = 20.0  # learning rate × iterations in the paper, i.e. how far Adam can move α
FASTEST_ROUNDING = 0.1  # above this rate, a few iterations make roundings jump at random


class WeightObjective(str, Enum):
    """What weight reconstruction minimises."""

    MSE = "mse"
    FISHER = "fisher"


@dataclass(frozen=True)
class QDiffusionConfig:
    """The method's numbers; the defaults are the paper's.

    Attributes:
        iterations, act_iterations: iterations per unit for rounding and for step sizes.
        batch_size: samples per iteration.
        lr_rounding: Adam's learning rate for α; None is 1e-3, or more if few iterations would leave h(α) unsaturated.
        lr_act: Adam's learning rate for step sizes, falling to 0 along a cosine.
        p: norm of the activation phase's error.
        range_samples: number of samples that the first ranges come from if ``running_stat`` is off; None takes all.
            (The paper takes one batch of 64; the tails of x_T that it misses are clipped, which puts white dots into
            images.)
        running_stat: take ranges from an exponential average over all samples instead.
        running_stat_softmax_only: use that average for softmax outputs only (``--rs_sm_only``).
        objective, unit: see the enums.
        start: where rounding starts (not in the paper).
        bias_correction: shift each bias so that the layer's mean output is the float one (not in the paper).
        temporal_unit: fit what depends on t alone first, as one unit (TFMQ-DM's; `qdiff.calibration.temporal_unit`).
    """

    iterations: int = 20_000
    act_iterations: int = 5_000
    batch_size: int = 32
    lr_rounding: float | None = None
    lr_act: float = 4e-4
    p: float = 2.4
    range_samples: int | None = None
    running_stat: bool = False
    running_stat_softmax_only: bool = False
    regulariser: RoundingRegulariser = field(default_factory=RoundingRegulariser)
    objective: WeightObjective = WeightObjective.MSE
    unit: UnitKind = UnitKind.BLOCK
    start: WeightStart = WeightStart.NEAREST
    bias_correction: bool = False
    temporal_unit: bool = False

    def __post_init__(self) -> None:
        for name, option in (
            ("iterations", "--cali_iters"),
            ("act_iterations", "--cali_iters_a"),
            ("batch_size", "--cali_batch_size"),
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give {option} at least 1")
        if self.lr_rounding is not None and not 0 < self.lr_rounding < math.inf:
            raise UserError(f"lr_rounding is {self.lr_rounding}; give --cali_lr_w a finite number above 0")
        if not (0 < self.lr_act < math.inf and 0 < self.p < math.inf):
            raise UserError(f"lr_act is {self.lr_act} and p is {self.p}; give --cali_lr and --cali_p numbers above 0")
        object.__setattr__(self, "objective", WeightObjective(self.objective))
        object.__setattr__(self, "unit", UnitKind(self.unit))
        object.__setattr__(self, "start", WeightStart(self.start))
        if self.objective is WeightObjective.FISHER and self.unit is UnitKind.LAYER:
            raise UserError(
                "the Fisher objective needs gradients of whole blocks; give --recon_unit block or --objective mse"
            )

    learns_step_sizes: ClassVar[bool] = True
    """Whether step sizes of activations are learned, where one serves all timesteps."""

    @property
    def rounds_columns(self) -> bool:
        """Whether weights are rounded column by column first."""
        return self.start.target is not None

    @property
    def rounding_rate(self) -> float:
        """The paper's 1e-3 for 20,000 iterations; higher for fewer, so that Adam can still move α as far.

        h(α) saturates at |α| ≈ 2.4. 500 iterations at 1e-3 leave most roundings undecided, and hardening then changes
        them in ways that the loss never saw.
        """
        return (
            self.lr_rounding
            if self.lr_rounding is not None
            else min(max(1e-3, ALPHA_REACH / self.iterations), FASTEST_ROUNDING)
        )


def calibrate(qnn: QuantModel, data: CalibrationSet, config: QDiffusionConfig, run: CalibrationRun) -> None:
    """Fit all quantizers: weights first with activations in float, then activation step sizes.

    Args:
        qnn: built with the requested widths.
        data: recorded from the float model.
        config: the method's numbers.
        run: seed, storage, journal, progress, and whether weights are kept.
    """
    weights, activations = run.fits_weights(qnn), qnn.config.calibrates_acts
    network = calibration_steps(qnn, data.inputs, config.temporal_unit)
    with run.progress(network, weights * config.iterations + activations * config.act_iterations) as bar:
        if weights:
            init_weights(qnn)
            fit_weights(qnn, network, data, config, run, bar)
        if activations:
            _fit_activations(qnn, network, data, config, run, bar)
    assert_all_fired(qnn, data, activations=not qnn.config.calibrates_changes)


def contains(kind: type[nn.Module]) -> Callable[[nn.Module], bool]:
    """Return a function that says whether a module has one of a kind inside."""
    return lambda module: any(isinstance(m, kind) for m in module.modules())


def fit_weights(
    qnn: QuantModel,
    network: SteppedNetwork,
    data: CalibrationSet,
    config: QDiffusionConfig,
    run: CalibrationRun,
    bar: Progress,
) -> None:
    """Learn the roundings of all weights, whose ranges are set, with activations in float.

    Args:
        network: the steps to walk over.
    """
    walker = run.walker(qnn, data.inputs)
    final = walker.run(qnn, data.inputs) if config.objective is WeightObjective.FISHER else None
    settings = FitSettings(
        config.iterations,
        config.batch_size,
        lr_rounding=config.rounding_rate,
        regulariser=config.regulariser,
        from_integers=config.rounds_columns,
    )
    # Attention has no weights, so only modules with layers have work.
    phase = Phase("weights", 0, config.iterations, False, contains(QuantModule), label="weights ")
    for opened in units_to_fit(qnn, network, data.inputs, phase, run, bar):
        if config.rounds_columns:
            round_layers(opened.unit, walker, ColumnRounding(config.start.target), activations=False)
        for part in opened.parts(config.unit):
            objective = lp_error(2.0)
            if final is not None:
                objective = weighted_error
                part.weights = fisher_weights(output_gradients(network, opened.index, opened.state, final, walker))
            opened.fit(part, objective, settings)
        if config.bias_correction:
            correct_biases(opened.unit, walker, activations=False)


def _fit_activations(
    qnn: QuantModel,
    network: SteppedNetwork,
    data: CalibrationSet,
    config: QDiffusionConfig,
    run: CalibrationRun,
    bar: Progress,
) -> None:
    # Shuffled, because samples are stored by timestep and a running average would mostly reflect the last timesteps.
    order = torch.randperm(len(data), generator=run.generator(2))
    first = order[: config.range_samples]
    if not ESTIMATORS[qnn.config.act_range].averages:
        first = first.sort().values
    softmax_only = config.running_stat_softmax_only
    settings = FitSettings(config.act_iterations, config.batch_size, lr_act=config.lr_act, decays=True)
    phase = Phase("activations", 1, config.act_iterations, True, contains(ActQuantizer), label="activations ")
    for opened in units_to_fit(qnn, network, data.inputs, phase, run, bar):
        if softmax_only or not config.running_stat:
            observe_unit(opened.unit, opened.walker, qnn.config.act_range, first)
        if config.running_stat:
            observe_unit(opened.unit, opened.walker, qnn.config.act_range, order, RUNNING_MOMENTUM, softmax_only)
        if config.learns_step_sizes and learnable_act_quantizers(opened.unit.module):
            for part in opened.parts(config.unit):
                opened.fit(part, lp_error(config.p), settings)
        else:  # ranges per timestep are never learned
            opened.measure(lp_error(config.p))
        if config.bias_correction:
            correct_biases(opened.unit, opened.walker, activations=True)
