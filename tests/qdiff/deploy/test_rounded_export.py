"""Networks whose weights GPTQ or GRIP rounded and whose biases were corrected, exported: runtimes compute the same."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from exact_runtimes import require_runtimes
from following import FREE_STEP_TOLERANCE, RUNTIMES, Followed, opened_network, relative
from thorough import thorough_except

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.deploy.onnx_export import export_onnx
from qdiff.deploy.onnx_network import read_model
from qdiff.deploy.onnx_ranges import BYTE
from qdiff.methods.registry import METHODS
from qdiff.quant_model import QuantModel

pytestmark = pytest.mark.slow

SUM_TOLERANCE, LEVEL_TOLERANCE = 2e-5, 1.5e-3  # relative L2, as in test_onnx_networks.py
SPLIT = "up.0.block.0.nin_shortcut"
# Of q, k and v, which quantize the same tensor, one in bytes: what is followed tells quantizers apart by their inputs.
# Wider inputs are not followed, so a value on a rounding edge may fall to the other side there, by the last bits of the
# CPU: a level of 16 bits is below SUM_TOLERANCE, one of 10 bits is not. So 10 bits are at the end alone.
UNEVEN = {
    **{"conv_in": "W8A16", "conv_out": "W6A10", SPLIT: "W2A7", "up.0.block.0.conv1": "W3A16"},
    **{"mid.block_1.conv1": "W5A6", "mid.block_1.conv2": "W3A8", "mid.attn_1.q": "W7A16", "mid.attn_1.k": "W4A6"},
    "mid.attn_1.v": "W2A16",
}
CONFIGS = {
    "gptq": QuantConfig(4, 8, split_shortcut=True, weight_range="mse"),
    "grip": METHODS["grip"].quant_config(weight_bits=4, act_bits=8, layer_bits=UNEVEN),
}


@pytest.fixture(scope="module")
def exported(ddim_network, tmp_path_factory):
    """``exported(method)``: a network that it calibrated, and its file; each once."""
    require_runtimes()
    torch.manual_seed(3)
    data, made = CalibrationSet((torch.randn(8, 1, 4, 4), torch.arange(8) * 100)), {}

    def export(method):
        if method not in made:
            qnn = QuantModel(copy.deepcopy(ddim_network), CONFIGS[method])
            qdiff.calibrate(qnn, data, method, run=CalibrationRun(show_progress=False))
            path = tmp_path_factory.mktemp(method) / "model.onnx"
            export_onnx(qnn, path, (1, 4, 4))
            made[method] = qnn, path
        return made[method]

    return export


def given():
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(4)), torch.tensor([30, 800])


def differences(followed, qnn):
    """Return `Differences` without what comes to ranges of fewer levels than a byte's, clipped before it is seen."""
    found = followed.differences(qnn, *given())
    found.inputs = {n: d for n, d in found.inputs.items() if not qnn.act_quantizers()[n].bits < BYTE}
    return found


def corrected(qnn):
    layers = {name: layer for name, layer in qnn.layers().items() if layer.float_bias is not None}
    assert len(layers) > 30 and len(layers[SPLIT].slices) == 2
    return layers


@contextmanager
def without_correction(layer):
    """Plant: a layer of the simulated network has the bias of its float weight inside the block."""
    own = layer.bias.detach().clone()
    layer.bias.data.copy_(layer.float_bias)
    yield
    layer.bias.data.copy_(own)


@pytest.mark.parametrize("runtime", thorough_except(RUNTIMES, "onnxruntime"))
@pytest.mark.parametrize("method", CONFIGS)
@torch.no_grad()
def test_runtimes_compute_what_the_simulation_does(method, runtime, exported):
    qnn, path = exported(method)
    followed = Followed(path, runtime)
    found = differences(followed, qnn)
    assert found.sums() < SUM_TOLERANCE and found.levels() < LEVEL_TOLERANCE
    with qnn.quantized():
        assert relative(opened_network(path, runtime)(*given()), qnn(*given())) < FREE_STEP_TOLERANCE
    for name, layer in corrected(qnn).items():
        with without_correction(layer):
            assert differences(followed, qnn).sums() > SUM_TOLERANCE, name
    assert differences(followed, qnn).sums() < SUM_TOLERANCE


@pytest.mark.parametrize("method", CONFIGS)
def test_the_file_holds_corrected_biases_alone(method, exported):
    from onnx import numpy_helper

    qnn, path = exported(method)
    held = {numpy_helper.to_array(tensor).tobytes() for tensor in read_model(path).graph.initializer}
    for name, layer in corrected(qnn).items():
        assert layer.bias.detach().numpy().tobytes() in held, name
        assert layer.float_bias.numpy().tobytes() not in held, name
