"""Round the weights of a unit's layers one after another in closed form (`qdiff.calibration.column_rounding`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdiff.calibration.column_rounding import Grid, NotPositiveDefinite, Target, round_matrix
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.second_moments import PATCH_BYTES, SecondMoments, columns_of, groups_of
from qdiff.calibration.walk import Walker, leaves_in_execution_order
from qdiff.errors import UserError
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

MOMENT_BYTES = 8  # float64
# K×K matrices held at a time: the sums, H and D, both in order, and the damped matrix, its inverse and factors.
MATRICES = 10


@dataclass(frozen=True)
class ColumnRounding:
    """The numbers of rounding column by column.

    Attributes:
        target: what the rounded weight should reproduce.
        factor: a, how much the difference of the float and the quantized input counts; None takes 1 for ``corrected``
            and 0.25, that of the paper's code, for ``gptaq``.
        damping: added to the diagonal of the second moments, as a share of its mean.
        most_rows: most input rows per layer that the second moments are summed over; None takes all positions of all
            samples.
    """

    target: Target = Target.CORRECTED
    factor: float | None = None
    damping: float = 0.01
    most_rows: int | None = 1 << 16

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "target", Target(self.target))
        except ValueError:
            raise UserError(
                f"target is {self.target}; give --gptq_target one of {', '.join(t.value for t in Target)}"
            ) from None
        if self.factor is not None and not 0 <= self.factor < math.inf:
            raise UserError(f"factor is {self.factor}; give --gptq_factor a finite number of at least 0")
        if self.factor is not None and self.target is Target.PLAIN:
            raise UserError("--gptq_factor has no meaning with --gptq_target plain; leave one of them out")
        if not 0 < self.damping < math.inf:
            raise UserError(f"damping is {self.damping}; give --gptq_damping a finite number above 0")
        if self.most_rows is not None and self.most_rows < 1:
            raise UserError(f"most_rows is {self.most_rows}; give --gptq_rows at least 1")


def rounding_bytes(qnn: QuantModel) -> int:
    """Return an upper bound of what rounding the largest layer holds besides its weights."""
    squares = (
        (groups_of(layer) * 4 + MATRICES) * columns_of(layer) ** 2
        for layer in qnn.layers().values()
        if len(layer.weight_quantizers)
    )
    return max(squares, default=0) * MOMENT_BYTES + 4 * PATCH_BYTES


def round_layers(unit: Unit, walker: Walker, settings: ColumnRounding, activations: bool) -> None:
    """Round the weights of all layers of a unit, each on the inputs that it gets from the ones before it.

    Args:
        activations: quantize activations as well as weights when computing a layer's inputs.
    """
    for name, leaf in leaves_in_execution_order(unit.module, unit.inputs, walker):
        if isinstance(leaf, QuantModule):
            round_layer(unit, name, leaf, walker, settings, activations)


@torch.no_grad()
def round_layer(
    unit: Unit, name: str, layer: QuantModule, walker: Walker, settings: ColumnRounding, activations: bool
) -> None:
    """Round the weight of one layer of a unit in place; a weight without a width stays as it is.

    Layers that run before it must be rounded already, and its activation quantizers must have their ranges.

    Args:
        name: of the layer inside the unit.
        activations: see `round_layers`.

    Raises:
        UserError: the layer's inputs are not finite.
    """
    if len(layer.weight_quantizers) == 0:
        return
    path = ".".join(filter(None, (unit.name, name)))
    samples = len(unit.target)
    moments = SecondMoments(layer, samples, settings.most_rows, settings.target is not Target.PLAIN)
    for first, x, quantized in _inputs(unit, layer, walker, activations):
        moments.add(x, quantized, first)
    inputs, cross = moments.inputs, moments.cross
    if not torch.isfinite(inputs).all() or (cross is not None and not torch.isfinite(cross).all()):
        raise UserError(f"the inputs of {path} are not finite on the calibration set; check the float weights")
    groups = len(inputs)
    delta, zero_point = layer.weight_grid()
    matrices = (t.expand_as(layer.weight).flatten(1).chunk(groups) for t in (layer.float_weight(), delta, zero_point))
    integers = []
    try:
        for group, (weight, *grid) in enumerate(zip(*matrices, strict=True)):
            integers.append(
                round_matrix(
                    weight,
                    Grid(*grid, layer.weight_quantizers[0].bits),
                    inputs[group],
                    None if cross is None else cross[group],
                    target=settings.target,
                    factor=settings.factor,
                    damping=settings.damping,
                )
            )
    except NotPositiveDefinite as error:
        log.warning("%s keeps its rounding to nearest: %s", path, error)
        return
    layer.set_weight_int(torch.cat(integers).view_as(layer.weight))


def _inputs(unit: Unit, layer: QuantModule, walker: Walker, activations: bool) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield a layer's inputs in both networks, batch by batch and call by call: (first sample, x, x̂)."""
    for rows in walker.slices(len(unit.target)):
        with leaf_modes([unit.module], weights=False, activations=False):
            in_float = _taken(unit.module, layer, walker.load(unit.float_inputs, rows))
        with leaf_modes([unit.module], weights=True, activations=activations):
            taken = _taken(unit.module, layer, walker.load(unit.inputs, rows))
            quantized = [layer.quantized_input(x) if layer.acts_quantized else x for x in taken]
        for x, x_hat in zip(in_float, quantized, strict=True):
            yield rows.start, x, x_hat


def _taken(module: nn.Module, layer: QuantModule, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return what a layer takes in each of its calls while a module runs."""
    seen: list[Tensor] = []
    # Cloned, because what runs beside the layer may change its input in place.
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    try:
        module(*inputs)
    finally:
        handle.remove()
    return seen
