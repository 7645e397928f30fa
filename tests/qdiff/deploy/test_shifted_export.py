"""Networks in which single channels have finer step sizes, exported: runtimes compute what the simulation does."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from exact_runtimes import require_runtimes
from following import RUNTIMES, Followed
from thorough import thorough_except
from uneven_network import uneven

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.deploy.onnx_export import check_exportable, export_onnx
from qdiff.deploy.onnx_leaves import OnnxLayer
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel

SUM_TOLERANCE, LEVEL_TOLERANCE = 2e-5, 1.5e-3  # relative L2, as in test_onnx_networks.py


@pytest.fixture(scope="module")
def exported(ddim_network, tmp_path_factory):
    """``exported(bits)``: a network with weights of this width, and its file."""
    require_runtimes()
    torch.manual_seed(3)
    data = CalibrationSet((torch.randn(8, 1, 4, 4), torch.arange(8) * 100))
    made = {}

    def export(bits):
        if bits not in made:
            config = QuantConfig(bits, 8, split_shortcut=True, power_of_two_scales=True)
            qnn = QuantModel(uneven(copy.deepcopy(ddim_network)), config)
            qdiff.calibrate(qnn, data, "linear", run=CalibrationRun(show_progress=False))
            path = tmp_path_factory.mktemp("shifted") / "model.onnx"
            export_onnx(qnn, path, (1, 4, 4))
            made[bits] = qnn, path
        return made[bits]

    return export


def shifting(qnn):
    found = [layer for layer in qnn.layers().values() if len(layer.act_quantizers)]
    return [n for n in found if any(q.channel_shifts is not None and q.channel_shifts.any() for q in n.act_quantizers)]


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("runtime", thorough_except(RUNTIMES, "onnxruntime"))
def test_runtimes_compute_what_the_simulation_does(runtime, bits, exported):
    qnn, path = exported(bits)
    torch.manual_seed(4)
    followed, given = Followed(path, runtime), (torch.randn(2, 1, 4, 4), torch.tensor([30, 800]))
    found = followed.differences(qnn, *given)
    assert found.sums() < SUM_TOLERANCE and found.levels() < LEVEL_TOLERANCE
    quantizer = next(q for q in shifting(qnn)[0].act_quantizers if q.channel_shifts.any())
    before = quantizer.channel_shifts.clone()
    quantizer.channel_shifts.zero_()  # planted: all channels have the step size of the tensor
    planted = followed.differences(qnn, *given)
    quantizer.channel_shifts.copy_(before)
    assert max(planted.sums(), planted.levels()) > LEVEL_TOLERANCE


@pytest.mark.parametrize("bits", [4, 8])
def test_shifts_go_into_the_integers_where_these_fit_a_byte(bits, exported):
    from onnx import numpy_helper

    from qdiff.deploy.onnx_network import read_model

    qnn, path = exported(bits)
    layers = shifting(qnn)
    assert layers
    for layer in layers:
        made = OnnxLayer(layer, "x")
        for part, quantizer in zip(made.slices, layer.act_quantizers, strict=True):
            folded = bits == 4 and bool(quantizer.channel_shifts.any())
            assert (part.factor is not None) == (bits == 8 and bool(quantizer.channel_shifts.any()))
            assert bool((part.zero_point == 2 ** (4 + int(quantizer.channel_shifts.max()))).all()) == folded
        assert made.input_scale.flatten().tolist() == [
            float(2**k) for q in layer.act_quantizers for k in q.channel_shifts[0].tolist()
        ]
    widest = max(int(numpy_helper.to_array(t).astype(np.int64).max()) for t in read_model(path).graph.initializer)
    assert widest > 15


def test_ranges_per_timestep_are_refused_by_name():
    with pytest.raises(UserError, match="--act_ranges timestep cannot be written as ONNX"):
        check_exportable(QuantConfig(4, 8, power_of_two_scales=True, act_ranges="timestep"))


@torch.no_grad()
def test_float_weights_are_divided(exported):
    qnn, _ = exported(4)
    layer = copy.deepcopy(shifting(qnn)[0])
    float_weight = layer.float_weight().clone()
    layer.weight_quantizers = torch.nn.ModuleList()
    k = torch.cat([q.channel_shifts[0] for q in layer.act_quantizers]).view(1, -1, 1, 1)
    assert torch.equal(OnnxLayer(layer, "x").weight, float_weight / (1 << k))
