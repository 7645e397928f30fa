"""Round the weights of a unit's layers one after another in closed form (`qdiff.calibration.column_rounding`)."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from qdiff.calibration.column_rounding import Grid, NotPositiveDefinite, Target, ordered_factors, round_matrix
from qdiff.calibration.input_moments import PATCH_BYTES, InputMoments, columns_of
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.unit_inputs import UnitInputs
from qdiff.calibration.walk import Walker
from qdiff.errors import UserError
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

log = logging.getLogger("qdiff")

MOMENT_BYTES = 8  # float64
# K×K matrices held at a time: for every group the sums, H and D, and H in order and its factor; and D in order, the
# damped matrix, its inverse and factors.
OF_GROUPS, MATRICES = 6, 8


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
    most_rows: int | None = 1 << 14

    @property
    def moments(self) -> dict[str, Any]:
        """What `InputMoments` collects for it."""
        return {"most_rows": self.most_rows, "cross": self.target is not Target.PLAIN}

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
        (layer.groups * OF_GROUPS + MATRICES) * columns_of(layer) ** 2
        for layer in qnn.layers().values()
        if len(layer.weight_quantizers)
    )
    return max(squares, default=0) * MOMENT_BYTES + 4 * PATCH_BYTES


def round_layers(unit: Unit, walker: Walker, settings: ColumnRounding, activations: bool) -> None:
    """Round the weights of all layers of a unit, each on the inputs that it gets from the ones before it.

    Args:
        activations: quantize activations as well as weights when computing a layer's inputs.
    """
    inputs = UnitInputs(unit, walker, activations)
    for name, layer in inputs.layers:
        if len(layer.weight_quantizers):
            round_layer(part_name(unit, name), layer, inputs.moments(layer, **settings.moments), settings)


@torch.no_grad()
def round_layer(name: str, layer: QuantModule, moments: InputMoments, settings: ColumnRounding) -> None:
    """Round the weight of one layer in place, on its grid; a weight without a width stays as it is.

    Args:
        name: of the layer, for messages.
        moments: of the layer's inputs, with what ``settings.moments`` asks for.

    Raises:
        UserError: the layer's inputs are not finite.
    """
    if len(layer.weight_quantizers) == 0:
        return
    inputs, cross = moments.inputs, moments.cross
    # A GPU is waited for twice in a layer: here, and in `ordered_factors`, which tells whether there are factors.
    if not torch.stack([torch.isfinite(t).all() for t in (inputs, cross) if t is not None]).all():
        raise UserError(f"the inputs of {name} are not finite on the calibration set; check the float weights")
    groups = len(inputs)
    tensors = (layer.weight_to_quantize(), *layer.weight_grid())
    matrices = (t.expand_as(layer.weight).flatten(1).chunk(groups) for t in tensors)
    integers = []
    try:
        factors = ordered_factors(inputs.unbind(), settings.damping)
        for group, (weight, *grid) in enumerate(zip(*matrices, strict=True)):
            q = round_matrix(
                weight,
                Grid(*grid, layer.weight_quantizers[0].bits),
                inputs[group],
                None if cross is None else cross[group],
                target=settings.target,
                factor=settings.factor,
                damping=settings.damping,
                ordered=factors[group],
            )
            integers.append(q)
    except NotPositiveDefinite as error:
        log.warning("%s keeps its rounding to nearest: %s", name, error)
        return
    layer.set_weight_int(torch.cat(integers).view_as(layer.weight))


def part_name(unit: Unit, name: str) -> str:
    """Return the path of a layer of a unit in the network."""
    return ".".join(filter(None, (unit.name, name)))
