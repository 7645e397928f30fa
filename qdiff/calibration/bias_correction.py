"""Bias correction: a layer's quantized output gets the mean of its float output (Nagel et al., ICCV 2019, 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.calibration.input_moments import InputMoments
from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.unit_inputs import UnitInputs
from qdiff.calibration.walk import Walker
from qdiff.quant_layer import QuantModule


def correct_biases(unit: Unit, walker: Walker, activations: bool) -> None:
    """Correct the biases of a unit's layers in execution order; their rounding must be final.

    Args:
        activations: quantize activations as well as weights.
    """
    inputs = UnitInputs(unit, walker, activations)
    for _, layer in inputs.layers:
        if layer.bias is not None:
            correct_bias(layer, inputs.moments(layer, second=False))


@torch.no_grad()
def correct_bias(layer: QuantModule, moments: InputMoments) -> None:
    """Set the bias of the quantized layer so that its mean output per channel is that of the float layer.

    The means are over samples, positions and calls. A layer without a bias stays as it is; the next layer with one
    corrects the error that it leaves.

    Args:
        moments: of the layer's inputs.
    """
    if layer.bias is None:
        return
    in_float, quantized = moments.means
    weight = layer.weight_to_quantize()
    rounded = layer.dequantized_weight() if len(layer.weight_quantizers) else weight
    own = layer.bias if layer.float_bias is None else layer.float_bias
    shift = _mean_product(layer, weight, in_float) - _mean_product(layer, rounded, quantized)
    layer.set_quantized_bias(own + shift.to(own.dtype))


def _mean_product(layer: QuantModule, weight: Tensor, mean: Tensor) -> Tensor:
    """Return W·mean per output channel, [C_out] in float64, for a mean input [G, K]."""
    by_group = weight.double().flatten(1).unflatten(0, (layer.groups, -1))
    return torch.einsum("grk,gk->gr", by_group, mean).flatten()
