"""Q-Diffusion (Li et al., ICCV 2023): timestep-aware calibration data, AdaRound by blocks, learned step sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Literal

import torch

from qdiff.calibration.capture import walk
from qdiff.calibration.fisher import output_gradients
from qdiff.calibration.objectives import fisher_weights, lp_error, weighted_error
from qdiff.calibration.reconstruction import RoundingRegulariser, Unit
from qdiff.calibration.samples import CalibrationSet
from qdiff.errors import UserError
from qdiff.interface import State
from qdiff.methods.common import CalibrationRun, assert_all_fired, init_weights
from qdiff.methods.fitting import FitSettings, UnitKind, fit_unit, parts_of
from qdiff.methods.ranges import observe_unit
from qdiff.progress import Progress, progress_bar
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer

RUNNING_MOMENTUM = 0.95
ALPHA_REACH = 20.0  # learning rate × iterations of the paper's recipe: how far Adam can move α
FASTEST_ROUNDING = 0.1  # beyond it a handful of iterations would throw roundings about


class WeightObjective(str, Enum):
    """What weight reconstruction minimises."""

    MSE = "mse"
    FISHER = "fisher"


@dataclass(frozen=True)
class QDiffusionConfig:
    """The recipe's numbers; defaults are the paper's.

    Attributes:
        iterations, act_iterations: a unit, for rounding and for step sizes.
        batch_size: samples an iteration.
        lr_rounding: Adam's learning rate for α; None is 1e-3, more where so few iterations could not saturate h(α).
        lr_act: Adam's learning rate for step sizes, decaying to 0 as a cosine.
        p: norm of the activation phase's error.
        range_samples: how many samples decide the first ranges where ``running_stat`` is off; None takes all. (The
            paper takes one batch of 64; the tails of x_T that it misses are clipped, and an image gets white dots.)
        running_stat: ranges from an exponential average over all samples instead.
        running_stat_softmax_only: that average for softmax outputs alone (``--rs_sm_only``).
        objective, unit: see the enums.
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

    def __post_init__(self) -> None:
        for name, option in (
            ("iterations", "--cali_iters"),
            ("act_iterations", "--cali_iters_a"),
            ("batch_size", "--cali_batch_size"),
        ):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}; give {option} at least 1")
        if self.lr_rounding is not None and not self.lr_rounding > 0:
            raise UserError(f"lr_rounding is {self.lr_rounding}; give --cali_lr_w above 0")
        if not (self.lr_act > 0 and self.p > 0):
            raise UserError(f"lr_act is {self.lr_act} and p is {self.p}; give --cali_lr and --cali_p above 0")
        object.__setattr__(self, "objective", WeightObjective(self.objective))
        object.__setattr__(self, "unit", UnitKind(self.unit))
        if self.objective is WeightObjective.FISHER and self.unit is UnitKind.LAYER:
            raise UserError(
                "the Fisher objective needs gradients of whole blocks; give --recon_unit block or --objective mse"
            )

    @property
    def rounding_rate(self) -> float:
        """The paper's 1e-3 for 20,000 iterations; with fewer, more, so that Adam can still move α as far.

        h(α) saturates at |α| ≈ 2.4. 500 iterations of 1e-3 leave most roundings undecided, and what hardening then
        does to them was never part of the loss.
        """
        return (
            self.lr_rounding
            if self.lr_rounding is not None
            else min(max(1e-3, ALPHA_REACH / self.iterations), FASTEST_ROUNDING)
        )


def calibrate(
    qnn: QuantModel,
    data: CalibrationSet,
    config: QDiffusionConfig,
    run: CalibrationRun,
    weights: bool = True,
) -> None:
    """Fit all quantizers: weights first with activations in float, then activation step sizes.

    Args:
        qnn: built with the widths wanted.
        data: recorded from the float model.
        config: the recipe.
        run: seed, storage, journal, progress.
        weights: False keeps the weights as they are (loaded: ``--resume_w``) and fits activations only.
    """
    weights = weights and qnn.config.weight_bits is not None
    activations = qnn.config.calibrates_acts
    count = sum(1 for _ in qnn.model.steps())
    total = count * (weights * config.iterations + activations * config.act_iterations)
    with progress_bar(total, "calibrating", disable=not run.show_progress) as bar:
        if weights:
            init_weights(qnn)
            _fit_weights(qnn, data, config, run, bar)
        if activations:
            _fit_activations(qnn, data, config, run, bar)
    assert_all_fired(qnn, data, activations=not qnn.config.calibrates_changes)


def _unfinished(
    phase: Literal["weights", "activations"],
    qnn: QuantModel,
    data: CalibrationSet,
    config: QDiffusionConfig,
    run: CalibrationRun,
    bar: Progress,
) -> Iterator[tuple[int, Unit, State]]:
    """Walk over the network and yield (index, unit, state before it) where there is something left to fit.

    Units that the journal has are restored instead; a unit is recorded when control returns.
    """
    on_activations = phase == "activations"
    leaf = ActQuantizer if on_activations else QuantModule
    iterations = config.act_iterations if on_activations else config.iterations
    steps = walk(qnn.model, data.inputs, run.walker(qnn), weights=True, activations=on_activations)
    for index, _, unit, state in steps:
        bar.set_postfix_str(f"{phase} of {unit.name}", refresh=False)
        before = bar.n
        idle = not any(isinstance(m, leaf) for m in unit.module.modules())
        if not idle and not (run.journal is not None and run.journal.restore(phase, index, unit.module)):
            yield index, unit, state
            if run.journal is not None:
                run.journal.record(phase, index, unit.module)
        bar.update(iterations - (bar.n - before))  # whatever was not counted one by one


def _fit_weights(
    qnn: QuantModel, data: CalibrationSet, config: QDiffusionConfig, run: CalibrationRun, bar: Progress
) -> None:
    walker = run.walker(qnn)
    final = walker.run(qnn, data.inputs) if config.objective is WeightObjective.FISHER else None
    settings = FitSettings(
        config.iterations, config.batch_size, lr_rounding=config.rounding_rate, regulariser=config.regulariser
    )
    for index, unit, state in _unfinished("weights", qnn, data, config, run, bar):
        for part, (small, share) in enumerate(parts_of(unit, config.unit, walker)):
            if not any(isinstance(m, QuantModule) for m in small.module.modules()):  # attention cores have no weights
                continue
            objective = lp_error(2.0)
            if final is not None:
                objective = weighted_error
                small.weights = fisher_weights(output_gradients(qnn.model, index, state, final, walker))
            tick, feeding = partial(bar.update, share), run.feeding(qnn, unit.name, config.batch_size)
            error = fit_unit(small, objective, settings, run.generator(0, index, part), feeding, tick)
            run.errors[f"weights {small.name}"] = error


def _fit_activations(
    qnn: QuantModel, data: CalibrationSet, config: QDiffusionConfig, run: CalibrationRun, bar: Progress
) -> None:
    walker = run.walker(qnn)
    # Shuffled: samples are stored by timestep, and a running average would forget all but the last of them.
    order = torch.randperm(len(data), generator=run.generator(2))
    first = order[: config.range_samples].sort().values
    softmax_only = config.running_stat_softmax_only
    settings = FitSettings(config.act_iterations, config.batch_size, lr_act=config.lr_act, decays=True)
    for index, unit, _ in _unfinished("activations", qnn, data, config, run, bar):
        if softmax_only or not config.running_stat:
            observe_unit(unit, walker, qnn.config.act_range, first)
        if config.running_stat:
            observe_unit(unit, walker, qnn.config.act_range, order, RUNNING_MOMENTUM, softmax_only)
        for part, (small, share) in enumerate(parts_of(unit, config.unit, walker, activations=True)):
            tick, feeding = partial(bar.update, share), run.feeding(qnn, unit.name, config.batch_size)
            error = fit_unit(small, lp_error(config.p), settings, run.generator(1, index, part), feeding, tick)
            run.errors[f"activations {small.name}"] = error
