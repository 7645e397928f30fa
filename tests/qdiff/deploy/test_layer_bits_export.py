"""Networks whose layers have their own widths, as other programs get them; what a format cannot hold is named."""

from __future__ import annotations

import copy

import pytest
import torch
from exact_runtimes import require_runtimes
from following import RUNTIMES, Followed
from linear_networks import LinearNetwork, random_weights
from safetensors.torch import load_file

from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.deploy.comfyui import write_comfyui
from qdiff.deploy.onnx_export import export_onnx
from qdiff.deploy.weight_format import WriteOptions
from qdiff.errors import UserError
from qdiff.methods import linear
from qdiff.quant_model import QuantModel

pytestmark = pytest.mark.slow

SUM_TOLERANCE, LEVEL_TOLERANCE = 2e-5, 1.5e-3  # relative L2, as in test_onnx_networks.py
MIXED = {
    "first": "A16",
    "last": "W8A16",
    "mid.block_1.conv1": "W32",
    "mid.block_1.conv2": "W3A4",
    "mid.attn_1.q": "W2A32",
}

NARROW = "mid.block_1.conv2.act_quantizers.0"


@pytest.fixture(scope="module")
def exported(ddim_network, tmp_path_factory):
    require_runtimes()
    torch.manual_seed(3)
    inputs = torch.randn(8, 1, 4, 4), torch.arange(8) * 100
    qnn = QuantModel(copy.deepcopy(ddim_network), QuantConfig(4, 8, split_shortcut=True, layer_bits=MIXED))
    linear.calibrate(qnn, CalibrationSet(inputs), None, CalibrationRun(show_progress=False))
    path = tmp_path_factory.mktemp("mixed") / "model.onnx"
    export_onnx(qnn, path, (1, 4, 4))
    return qnn, path


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes_compute_every_layer_in_its_width(runtime, exported):
    qnn, path = exported
    torch.manual_seed(4)
    followed, given = Followed(path, runtime), (torch.randn(2, 1, 4, 4), torch.tensor([30, 800]))
    found = followed.differences(qnn, *given)
    clipped = found.inputs.pop(NARROW)  # a range of fewer levels than a byte's is clipped before the node that is seen
    assert found.sums() < SUM_TOLERANCE < clipped and found.levels() < LEVEL_TOLERANCE
    with torch.no_grad():  # planted: one layer of the simulated network a hundredth too large
        qnn.layers()["conv_out"].weight_quantizers[0].delta.mul_(1.01)
    planted = followed.differences(qnn, *given)
    with torch.no_grad():
        qnn.layers()["conv_out"].weight_quantizers[0].delta.div_(1.01)
    assert planted.eps > SUM_TOLERANCE


def test_a_linear_layer_of_each_width(tmp_path):
    qnn = random_weights(LinearNetwork(), weight_bits=4, layer_bits={"first": "W32", "block.1": "W6"})
    written = write_comfyui(qnn, tmp_path / "net.safetensors", WriteOptions(compute_dtype="float32"))
    assert dict(written.encodings) == {"block.1": "int8_tensorwise", "joined": "awq_w4a16"}
    stored = load_file(tmp_path / "net.safetensors")
    assert torch.equal(stored["first.weight"], qnn.layers()["first"].weight)


def test_what_does_not_fit_is_named(tmp_path):
    qnn = random_weights(LinearNetwork(), weight_bits=4, layer_bits={"joined": "W8"})
    with pytest.raises(UserError, match=r"1 of 3 quantized layers do not fit comfyui: joined \(split at"):
        write_comfyui(qnn, tmp_path / "net.safetensors")
    assert not (tmp_path / "net.safetensors").exists()
