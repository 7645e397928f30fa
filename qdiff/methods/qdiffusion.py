"""Q-Diffusion (Li et al., ICCV 2023): timestep-aware calibration data, AdaRound by blocks, learned step sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from qdiff.adaptive_rounding import LearnedRounding
from qdiff.calibration.capture import Walker, leaf_inputs_and_output, leaves_in_execution_order, walk
from qdiff.calibration.fisher import output_gradients
from qdiff.calibration.objectives import Objective, fisher_error, lp_error
from qdiff.calibration.reconstruction import RoundingRegulariser, Unit, optimise
from qdiff.calibration.samples import CalibrationSet
from qdiff.errors import UserError
from qdiff.methods.common import CalibrationRun, assert_all_fired, init_weights
from qdiff.methods.ranges import observe_unit
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel
from qdiff.quantizer import ActQuantizer
from qdiff.range_estimators import TINY

RUNNING_MOMENTUM = 0.95


class WeightObjective(str, Enum):
    """What weight reconstruction minimises."""

    MSE = "mse"
    FISHER = "fisher"


class UnitKind(str, Enum):
    """What is reconstructed at a time."""

    BLOCK = "block"
    LAYER = "layer"


@dataclass(frozen=True)
class QDiffusionConfig:
    """The recipe's numbers; defaults are the paper's.

    Attributes:
        iterations, act_iterations: a unit, for rounding and for step sizes.
        batch_size: samples an iteration.
        lr_rounding: Adam's learning rate for α.
        lr_act: Adam's learning rate for step sizes, decaying to 0 as a cosine.
        p: norm of the activation phase's error.
        range_samples: how many samples decide the first ranges where ``running_stat`` is off.
        running_stat: ranges from an exponential average over all samples instead.
        running_stat_softmax_only: that average for softmax outputs alone (``--rs_sm_only``).
        objective, unit: see the enums.
    """

    iterations: int = 20_000
    act_iterations: int = 5_000
    batch_size: int = 32
    lr_rounding: float = 1e-3
    lr_act: float = 4e-4
    p: float = 2.4
    range_samples: int = 64
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
        if not (self.lr_act > 0 and self.p > 0):
            raise UserError(f"lr_act is {self.lr_act} and p is {self.p}; give --cali_lr and --cali_p above 0")
        object.__setattr__(self, "objective", WeightObjective(self.objective))
        object.__setattr__(self, "unit", UnitKind(self.unit))
        if self.objective is WeightObjective.FISHER and self.unit is UnitKind.LAYER:
            raise UserError(
                "the Fisher objective needs gradients of whole blocks; give --recon_unit block or --objective mse"
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
    activations = qnn.config.act_bits is not None
    count = sum(1 for _ in qnn.model.steps())
    total = count * (weights * config.iterations + activations * config.act_iterations)
    with tqdm(total=total, desc="calibrating", unit="it", disable=not run.show_progress) as bar:
        if weights:
            init_weights(qnn)
            _fit_weights(qnn, data, config, run, bar)
        if activations:
            _fit_activations(qnn, data, config, run, bar)
    assert_all_fired(qnn, data)


def _fit_weights(
    qnn: QuantModel, data: CalibrationSet, config: QDiffusionConfig, run: CalibrationRun, bar: tqdm
) -> None:
    walker = run.walker(qnn)
    final = walker.run(qnn, data.inputs) if config.objective is WeightObjective.FISHER else None
    for index, _, unit, state in walk(qnn.model, data.inputs, walker, weights=True, activations=False):
        bar.set_postfix_str(f"weights of {unit.name}", refresh=False)
        if not any(isinstance(m, QuantModule) for m in unit.module.modules()) or (
            run.journal is not None and run.journal.restore("weights", index, unit.module)
        ):
            bar.update(config.iterations)
            continue
        for part, (small, share) in enumerate(_parts(unit, config, walker)):
            layers = [m for m in small.module.modules() if isinstance(m, QuantModule)]
            objective = lp_error(2.0)
            if final is not None and small is unit:
                objective = fisher_error(output_gradients(qnn.model, index, state, final, walker))
            if layers:
                on_iteration = partial(bar.update, share)
                generator = run.generator(0, index, part)
                error = _learn_rounding(small, layers, objective, config, generator, walker.device, on_iteration)
                run.errors[f"weights {small.name}"] = error
        if run.journal is not None:
            run.journal.record("weights", index, unit.module)


def _fit_activations(
    qnn: QuantModel, data: CalibrationSet, config: QDiffusionConfig, run: CalibrationRun, bar: tqdm
) -> None:
    walker = run.walker(qnn)
    # Shuffled: samples are stored by timestep, and a running average would forget all but the last of them.
    order = torch.randperm(len(data), generator=run.generator(2))
    first = order[: config.range_samples].sort().values
    softmax_only = config.running_stat_softmax_only
    for index, _, unit, _ in walk(qnn.model, data.inputs, walker, weights=True, activations=True):
        bar.set_postfix_str(f"activations of {unit.name}", refresh=False)
        if not any(isinstance(m, ActQuantizer) for m in unit.module.modules()) or (
            run.journal is not None and run.journal.restore("activations", index, unit.module)
        ):
            bar.update(config.act_iterations)
            continue
        if softmax_only or not config.running_stat:
            observe_unit(unit, walker, qnn.config.act_range, first)
        if config.running_stat:
            observe_unit(unit, walker, qnn.config.act_range, order, RUNNING_MOMENTUM, softmax_only)
        for part, (small, share) in enumerate(_parts(unit, config, walker, activations=True)):
            on_iteration = partial(bar.update, share)
            generator = run.generator(1, index, part)
            error = _learn_step_sizes(small, config, generator, walker.device, on_iteration)
            run.errors[f"activations {small.name}"] = error
        if run.journal is not None:
            run.journal.record("activations", index, unit.module)


def _parts(
    unit: Unit, config: QDiffusionConfig, walker: Walker, activations: bool = False
) -> Iterator[tuple[Unit, float]]:
    """Yield what is fitted at a time inside a step, and its share of the step's iterations on the progress bar."""
    if config.unit is UnitKind.BLOCK:
        yield unit, 1.0
        return
    leaves = leaves_in_execution_order(unit.module, unit.inputs, walker)
    for name, leaf in leaves:
        # Earlier leaves of the block are fitted by now, so what this one gets is what it will get.
        with leaf_modes([unit.module], weights=True, activations=activations):
            *inputs, _ = leaf_inputs_and_output(unit.module, leaf, unit.inputs, walker)
        with leaf_modes([unit.module], weights=False, activations=False):
            *float_inputs, target = leaf_inputs_and_output(unit.module, leaf, unit.float_inputs, walker)
        path = ".".join(filter(None, (unit.name, name)))
        yield Unit(path, leaf, tuple(inputs), target, tuple(float_inputs)), 1 / len(leaves)


def _learn_rounding(
    unit: Unit,
    layers: list[QuantModule],
    objective: Objective,
    config: QDiffusionConfig,
    generator: torch.Generator,
    device: torch.device,
    on_iteration,
) -> float:
    roundings = [LearnedRounding(layer) for layer in layers]
    for rounding in roundings:
        rounding.__enter__()
    try:
        with leaf_modes([unit.module], weights=True, activations=False):
            error = optimise(
                unit,
                torch.optim.Adam([r.alpha for r in roundings], lr=config.lr_rounding),
                objective,
                iterations=config.iterations,
                batch_size=config.batch_size,
                generator=generator,
                device=device,
                penalty=lambda progress: config.regulariser(roundings, progress),
                on_iteration=on_iteration,
            )
    finally:
        for rounding in roundings:
            rounding.__exit__()
    for rounding in roundings:
        rounding.harden()
    return error


def _learn_step_sizes(
    unit: Unit, config: QDiffusionConfig, generator: torch.Generator, device: torch.device, on_iteration
) -> float:
    deltas = [m.delta for m in unit.module.modules() if isinstance(m, ActQuantizer)]
    optimiser = torch.optim.Adam([{"params": [d], "lr": config.lr_act} for d in deltas])
    for delta in deltas:
        delta.requires_grad_(True)
    try:
        with leaf_modes([unit.module], weights=True, activations=True):
            return optimise(
                unit,
                optimiser,
                lp_error(config.p),
                iterations=config.act_iterations,
                batch_size=config.batch_size,
                generator=generator,
                device=device,
                after_step=lambda: _keep_positive(deltas),
                scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=config.act_iterations),
                on_iteration=on_iteration,
            )
    finally:
        for delta in deltas:
            delta.requires_grad_(False)


@torch.no_grad()
def _keep_positive(deltas: list[Tensor]) -> None:
    for delta in deltas:
        delta.clamp_(min=TINY)
