"""Latent networks under the calibration engine: the walk, both recipes, and their checkpoints."""

from __future__ import annotations

import pytest
import torch
from thorough import thorough_except

from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker, walk
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.config import QuantConfig
from qdiff.methods import linear, qdiffusion
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quant_model import QuantModel

W4A8 = {"weight_bits": 4, "act_bits": 8, "act_symmetric": True, "split_shortcut": True, "softmax_bits": 16}
# Relative L2: batches of 5 and of 12 take other kernels, which sum in another order.
BATCH_TOLERANCE = 1e-5
# What Q-Diffusion's error may be of the linear baseline's, with few iterations (0.5 to 0.75 were seen).
GAIN = 0.9


@pytest.fixture
def run_quantized():
    @torch.no_grad()
    def run(qnn, inputs, **modes):
        with qnn.quantized(**modes):
            return qnn(*inputs)

    return run


def quiet():
    return CalibrationRun(show_progress=False)


@torch.no_grad()
def test_the_walk_is_the_forward(kind, make_unet, unet_inputs, run_quantized, relative):
    """Float targets and quantized inputs, batch by batch, against whole forwards seen by hooks."""
    qnn = QuantModel(make_unet(kind), QuantConfig(weight_bits=4, split_shortcut=True))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    inputs = unet_inputs(qnn.model, count=12)
    seen = {}
    for step in list(qnn.model.steps()):
        step.module.register_forward_hook(lambda m, args, out, name=step.name: seen.update({name: (args, out)}))
    run_quantized(qnn, inputs)
    quantized = dict(seen)
    qnn(*inputs)
    in_float = dict(seen)

    walker = Walker(ActivationStorage(), torch.device("cpu"), batch_size=5)
    names = []
    for _, step, unit, _ in walk(qnn.model, inputs, walker, weights=True, activations=False):
        names.append(step.name)
        assert relative(unit.target, in_float[step.name][1]) < BATCH_TOLERANCE, step.name
        for made, expected in zip(unit.inputs, quantized[step.name][0], strict=True):
            assert relative(made, expected) < BATCH_TOLERANCE, step.name
    assert names == list(in_float)
    # Planted: past the first layer, quantized inputs are not those of the float network.
    assert relative(quantized["out.2"][0][0], in_float["out.2"][0][0]) > BATCH_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("kind", thorough_except(("church", "sd"), "sd"))
def test_calibrated_networks(kind, make_unet, unet_inputs, run_quantized, relative, tmp_path):
    errors, held_out = {}, None
    # Symmetric, the published softmax of transformer blocks has half the levels.
    config = QuantConfig(**{**W4A8, "act_symmetric": kind != "sd"})
    for method in ("linear", "qdiffusion"):
        qnn = QuantModel(make_unet(kind), config)
        data, held_out = CalibrationSet(unet_inputs(qnn.model, 8)), unet_inputs(qnn.model, 8, seed=5)
        with torch.no_grad():
            expected = qnn(*held_out)
        if method == "linear":
            linear.calibrate(qnn, data, None, quiet())
        else:
            recipe = QDiffusionConfig(iterations=15, act_iterations=4, batch_size=8, lr_rounding=0.04)
            qdiffusion.calibrate(qnn, data, recipe, quiet())
        out = run_quantized(qnn, held_out)
        errors[method] = relative(out, expected)
        for format in ("native", "published"):
            save_checkpoint(qnn, tmp_path / "q", format=format)
            target = QuantModel(make_unet(kind), config)
            load_checkpoint(target, tmp_path / "q")
            assert torch.equal(run_quantized(target, held_out), out), format
    assert 0 < errors["linear"] < 1
    assert errors["qdiffusion"] < GAIN * errors["linear"], errors
