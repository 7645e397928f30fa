"""Bias correction: a layer's quantized output gets the mean of its float output (Nagel et al., ICCV 2019, 4.2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qdiff.calibration.reconstruction import Unit
from qdiff.calibration.walk import Walker, leaves_in_execution_order
from qdiff.modes import leaf_modes
from qdiff.quant_layer import QuantModule


def correct_biases(unit: Unit, walker: Walker, activations: bool) -> None:
    """Correct the biases of a unit's layers in execution order; their rounding must be final.

    Args:
        activations: quantize activations as well as weights.
    """
    for _, leaf in leaves_in_execution_order(unit.module, unit.inputs, walker):
        if isinstance(leaf, QuantModule):
            correct_bias(unit, leaf, walker, activations)


@torch.no_grad()
def correct_bias(unit: Unit, layer: QuantModule, walker: Walker, activations: bool) -> None:
    """Shift the bias of one layer by the difference of its mean outputs, per output channel.

    The means are over samples, positions and calls, of the float network and of the network as quantized so far. A
    layer without a bias stays as it is; the next layer with one corrects what it leaves.

    Args:
        activations: see `correct_biases`.
    """
    if layer.bias is None:
        return
    with leaf_modes([unit.module], weights=False, activations=False):
        wanted = _mean_output(unit.module, layer, unit.float_inputs, walker)
    with leaf_modes([unit.module], weights=True, activations=activations):
        found = _mean_output(unit.module, layer, unit.inputs, walker)
    layer.set_quantized_bias(layer.bias + (wanted - found).to(layer.bias.dtype))


def _mean_output(module: nn.Module, layer: QuantModule, inputs: tuple[Tensor, ...], walker: Walker) -> Tensor:
    """Return the mean of a layer's output per channel, [C_out] in float64."""
    total, count = torch.zeros(len(layer.weight), dtype=torch.float64, device=layer.weight.device), 0

    def add(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal count
        by_channel = output.double().movedim(layer.channel_dim, -1).flatten(0, -2)
        total.add_(by_channel.sum(dim=0))
        count += len(by_channel)

    handle = layer.register_forward_hook(add)
    try:
        for rows in walker.slices(len(inputs[0])):
            module(*walker.load(inputs, rows))
    finally:
        handle.remove()
    return total / max(1, count)
