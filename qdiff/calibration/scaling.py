"""Give the layers of a network their input scales before anything is quantized: one walk through the float network."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from qdiff.calibration.input_scales import InputScaling, Scaling, dilated, learned, searched
from qdiff.calibration.run import CalibrationRun, OpenUnit, Phase, units_to_fit
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.unit_inputs import UnitInputs
from qdiff.functional import at_least_single
from qdiff.io.progress import Progress
from qdiff.modes import quantized_layers
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

MOST_SEARCHED = 128  # rows of a layer's inputs on which the search compares outputs


def set_input_scales(qnn: QuantModel, data: CalibrationSet, settings: InputScaling, run: CalibrationRun) -> None:
    """Set the input scale 1/τ of every layer that quantizes anything; a method's `calibrate` follows.

    Args:
        qnn: its float weights are loaded.
        data: recorded from the float network, t [N] the second input.
        settings: how τ is found.
        run: seed, storage, journal, progress.
    """
    if settings.kind is Scaling.NONE:
        return
    if settings.kind is Scaling.DILATE:
        for layer in _scalable(qnn.model):
            layer.set_input_scale(1 / dilated(layer))
        return
    iterations = settings.iterations if settings.kind is Scaling.LEARNED else 1
    phase = Phase("scaling", 6, iterations, False, lambda module: bool(_scalable(module)), weights=False)
    network, t = qnn.as_steps(data.inputs), data.inputs[1].float()
    entries = torch.searchsorted(t.unique(sorted=True), t)
    with run.progress(network, iterations, "scaling inputs") as bar:
        for opened in units_to_fit(qnn, network, data.inputs, phase, run, bar):
            _scale_unit(qnn, opened, entries, settings, run, bar)


def _scalable(module: nn.Module) -> list[QuantModule]:
    layers = quantized_layers(module).values()
    return [layer for layer in layers if len(layer.weight_quantizers) or len(layer.act_quantizers)]


def _scale_unit(
    qnn: QuantModel,
    opened: OpenUnit,
    entries: Tensor,
    settings: InputScaling,
    run: CalibrationRun,
    bar: Progress,
) -> None:
    """Set the scales of one unit's layers.

    Args:
        entries: [N] int64, the timestep that each sample is at, from 0 on.
    """
    taken = UnitInputs(opened.unit, opened.walker, activations=False)
    layers = [layer for _, layer in taken.layers if layer in _scalable(opened.unit.module)]
    for number, layer in enumerate(layers):
        inputs, samples = taken.float_inputs(layer)
        device = qnn.device
        kind = settings.kind if settings.kind is not Scaling.LEARNED else settings.start
        tau = at_least_single(layer.float_weight().new_ones(layer.in_channels))
        if kind is Scaling.DILATE:
            tau = dilated(layer)
        elif kind is Scaling.SEARCH:
            some = inputs[:: -(-len(inputs) // MOST_SEARCHED)].split(opened.walker.pass_size)
            tau = searched(layer, _largest(layer, inputs, opened), [x.to(device) for x in some])
        if settings.kind is Scaling.LEARNED:
            tau = learned(
                layer,
                inputs,
                entries.to(samples.device)[samples],
                tau,
                settings,
                run.generator(6, opened.index, number),
                run.feeding(qnn, opened.unit.name, settings.batch_size),
                partial(bar.update, 1 / len(layers)),
            )
        layer.set_input_scale(1 / tau)


def _largest(layer: QuantModule, inputs: Tensor, opened: OpenUnit) -> Tensor:
    """Return max|x_c| over stored inputs, [C_in] on the network's device."""
    over = [d for d in range(inputs.dim()) if d != layer.channel_dim % inputs.dim()]
    parts = (inputs[rows].to(opened.walker.device) for rows in opened.walker.slices(len(inputs)))
    return torch.stack([part.abs().amax(over) for part in parts]).amax(0)
