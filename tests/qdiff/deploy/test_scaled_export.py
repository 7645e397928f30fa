"""Networks whose layers scale their input's channels, exported: runtimes compute what the simulation does."""

from __future__ import annotations

import copy

import pytest
import torch
from exact_runtimes import require_runtimes
from following import RUNTIMES, Followed

import qdiff
from qdiff.calibration.input_scales import InputScaling
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.deploy.onnx_export import export_onnx
from qdiff.quant_model import QuantModel

pytestmark = pytest.mark.slow

SUM_TOLERANCE, LEVEL_TOLERANCE = 2e-5, 1.5e-3  # relative L2, as in test_onnx_networks.py


@pytest.fixture(scope="module")
def exported(ddim_network, tmp_path_factory):
    require_runtimes()
    torch.manual_seed(3)
    data = CalibrationSet((torch.randn(8, 1, 4, 4), torch.arange(8) * 100))
    qnn = QuantModel(copy.deepcopy(ddim_network), QuantConfig(4, 8, split_shortcut=True))
    run = CalibrationRun(show_progress=False)
    qdiff.calibrate(qnn, data, "linear", run=run, scaling=InputScaling("search"))
    assert any(layer.input_scale is not None for layer in qnn.layers().values())
    path = tmp_path_factory.mktemp("scaled") / "model.onnx"
    export_onnx(qnn, path, (1, 4, 4))
    return qnn, path


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes_compute_what_the_simulation_does(runtime, exported):
    qnn, path = exported
    torch.manual_seed(4)
    followed, given = Followed(path, runtime), (torch.randn(2, 1, 4, 4), torch.tensor([30, 800]))
    found = followed.differences(qnn, *given)
    assert found.sums() < SUM_TOLERANCE and found.levels() < LEVEL_TOLERANCE
    layer = next(layer for layer in qnn.layers().values() if layer.input_scale is not None)
    with torch.no_grad():  # planted: one channel of one layer's scale is off
        layer.input_scale[0] *= 1.5
    planted = followed.differences(qnn, *given)
    with torch.no_grad():
        layer.input_scale[0] /= 1.5
    assert max(planted.sums(), planted.levels()) > LEVEL_TOLERANCE
