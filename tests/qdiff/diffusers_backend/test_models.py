"""Every architecture: quantized, saved, and loaded by plain ``from_pretrained`` with the same outputs."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch
from components import quantized, read_inputs, run
from tiny_models import MODELS
from torch import nn

from qdiff.config import QuantConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.modes import quantized_layers
from qdiff.quant_model import QuantModel
from qdiff.weight_forms import WeightForm

# Relative L2 in float64: sums in another order.
TOLERANCE = 1e-9
LINEAR_ATTENTION = {f"transformer_blocks.{i}.attn1": "it multiplies two activations by itself" for i in (0, 1)}
# The others have the blocks of one of these.
UNLIKE = ("LSUN", "SDXL", "with ControlNet", "DiT", "PixArt", "SD3", "FLUX", "Sana")
RECIPES = {
    "W8A8": (QuantConfig(8, 8), "linear", None),
    "W4A8": (QuantConfig(4, 8), "qdiff", QDiffusionConfig(iterations=1, act_iterations=1, batch_size=4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("widths", RECIPES)
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name, widths, tmp_path, relative):
    torch.manual_seed(0)
    network = MODELS[name].make()
    inputs = MODELS[name].inputs(4)
    call, samples = read_inputs(network, inputs)
    in_float = run(call, network, samples)
    qnn = quantized(network, *RECIPES[widths], call, samples)
    assert qnn.left_in_float == (LINEAR_ATTENTION if name == "Sana" else {})
    assert not qnn.silent_quantizers()
    before = run(call, network, samples)
    assert 0 < relative(before, in_float) < (0.05 if widths == "W8A8" else 0.5)
    network.save_pretrained(tmp_path)
    loaded = type(network).from_pretrained(tmp_path)
    assert torch.equal(run(call, loaded, samples), before)
    assert {layer.form for layer in quantized_layers(loaded).values()} == {WeightForm.PACKED}
    assert quantized_layers(loaded).keys() == quantized_layers(network).keys()


@pytest.mark.parametrize("name", UNLIKE)
def test_in_float_and_step_by_step_nothing_changes(name, relative):
    """Layers and attention are replaced, and the forward is replayed from stored outputs."""
    torch.manual_seed(0)
    network, inputs = MODELS[name].make(), MODELS[name].inputs(2)
    nn.Module.double(network)  # diffusers' own warns
    call, samples = read_inputs(network, inputs)
    samples = tuple(i.double() if i.is_floating_point() else i for i in samples)
    expected = run(call, network, samples)
    qnn = QuantModel(network, QuantConfig(4, 8), samples, call=call)
    with torch.no_grad():
        steps = qnn.as_steps(samples)(*samples)
    for output in (run(call, network, samples), steps):
        assert relative(output, expected) < TOLERANCE < relative(output * (1 + 1e-8), expected)
