"""Fit a unit: its rounding variables, its activation step sizes, or both at once."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import Enum

import torch
from torch import Tensor, nn

from qdiff.adaptive_rounding import LearnedRounding
from qdiff.calibration.column_rounding import Target
from qdiff.calibration.feeding import Feeding
from qdiff.calibration.objectives import Objective
from qdiff.calibration.reconstruction import FitSettings, RoundingRegulariser, Unit, optimise
from qdiff.calibration.walk import Walker, leaf_inputs_and_output, leaves_in_execution_order
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quantizer import learnable_act_quantizers
from qdiff.ranges.qparams import TINY

# Adam moves a step size by about its learning rate per iteration, however small the step size is. The learning rate is
# therefore capped at this share of the step size; otherwise batch noise decides where small ones (softmax outputs) end.
MAX_STEP_CHANGE = 0.003


class UnitKind(str, Enum):
    """What is reconstructed at a time: a whole block, or one layer after another."""

    BLOCK = "block"
    LAYER = "layer"


class WeightStart(str, Enum):
    """Where learned rounding starts."""

    NEAREST = "nearest"  # at the float weights, which would round to nearest
    GPTQ = "gptq"  # at the integers of `qdiff.calibration.layer_rounding`, towards the float network's output
    GPTAQ = "gptaq"  # the same by GPTAQ's update
    PLAIN_GPTQ = "plain-gptq"  # towards the layer's own output on the quantized input

    @property
    def target(self) -> Target | None:
        """What the columns of a weight are rounded towards before learning; None without it."""
        return {"gptq": Target.CORRECTED, "gptaq": Target.GPTAQ, "plain-gptq": Target.PLAIN}.get(self.value)


def fit_unit(
    unit: Unit,
    objective: Objective,
    settings: FitSettings,
    generator: torch.Generator,
    feeding: Feeding,
    on_iteration: Callable[[], None],
) -> float:
    """Fit a unit in place and return its final error, 0 if it has nothing to learn.

    Args:
        generator: decides the batches and QDrop's masks.
        feeding: where the unit runs, and how its samples get there.
    """
    layers = []
    if settings.lr_rounding is not None:
        layers = [m for m in unit.module.modules() if isinstance(m, QuantModule) and len(m.weight_quantizers)]
    deltas = [q.delta for q in learnable_act_quantizers(unit.module)]
    if settings.lr_act is None:
        deltas = []
    with contextlib.ExitStack() as stack:
        roundings = [stack.enter_context(LearnedRounding(layer, settings.from_integers)) for layer in layers]
        sizes = torch.stack([d.detach() for d in deltas]).tolist() if deltas else []  # one GPU synchronisation
        groups = [
            {"params": [d], "lr": min(settings.lr_act, MAX_STEP_CHANGE * s)} for d, s in zip(deltas, sizes, strict=True)
        ]
        if roundings:
            groups.append({"params": [r.alpha for r in roundings], "lr": settings.lr_rounding})
        if not groups:
            return 0.0
        optimiser = torch.optim.Adam(groups)
        stack.enter_context(_learning(deltas))
        stack.enter_context(leaf_modes([unit.module], weights=True, activations=settings.lr_act is not None))
        error = optimise(
            unit,
            optimiser,
            objective,
            settings,
            generator,
            feeding,
            penalty=_penalty(settings.regulariser, roundings),
            after_step=lambda: _keep_positive(deltas),
            on_iteration=on_iteration,
        )
    for rounding in roundings:
        rounding.harden()
    return error


def parts_of(
    unit: Unit,
    kind: UnitKind,
    walker: Walker,
    activations: bool = False,
    wrap: Callable[[nn.Module], nn.Module] = lambda leaf: leaf,
) -> Iterator[tuple[Unit, float]]:
    """Yield the parts of a step that are fitted in turn, each with its share of the step's iterations (progress bar).

    Args:
        activations: quantize activations as well as weights when computing a layer's inputs.
        wrap: wraps a layer as ``unit.module`` is wrapped (`qdiff.calibration.pairs.PairedCall`).
    """
    if kind is UnitKind.BLOCK:
        yield unit, 1.0
        return
    leaves = leaves_in_execution_order(unit.module, unit.inputs, walker)
    for name, leaf in leaves:
        # Earlier leaves of the block are already fitted, so these are the inputs that this leaf gets in the end.
        with leaf_modes([unit.module], weights=True, activations=activations):
            *inputs, _ = leaf_inputs_and_output(unit.module, leaf, unit.inputs, walker)
        with leaf_modes([unit.module], weights=False, activations=False):
            *float_inputs, target = leaf_inputs_and_output(unit.module, leaf, unit.float_inputs, walker)
        path = ".".join(filter(None, (unit.name, name)))
        part = Unit(path, wrap(leaf), tuple(inputs), target, tuple(float_inputs), timesteps=unit.timesteps)
        yield part, 1 / len(leaves)


def _penalty(
    regulariser: RoundingRegulariser | None, roundings: list[LearnedRounding]
) -> Callable[[float], Tensor | float]:
    if regulariser is None or not roundings:
        return lambda progress: 0.0
    return lambda progress: regulariser(roundings, progress)


@contextlib.contextmanager
def _learning(deltas: list[Tensor]) -> Iterator[None]:
    for delta in deltas:
        delta.requires_grad_(True)
    try:
        yield
    finally:
        for delta in deltas:
            delta.requires_grad_(False)


@torch.no_grad()
def _keep_positive(deltas: list[Tensor]) -> None:
    for delta in deltas:
        delta.clamp_(min=TINY)
