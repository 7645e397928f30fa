"""Networks that do not quantize the first token of a context, exported: a constant joined to what runtimes compute."""

from __future__ import annotations

import pytest
import torch
from exact_runtimes import require_runtimes
from following import RUNTIMES, Followed
from text_network import READERS, other_texts, text_data, texts, wrapped

import qdiff
from qdiff.calibration.run import CalibrationRun
from qdiff.deploy.onnx_export import export_onnx
from qdiff.deploy.onnx_network import OnnxNetwork, check_config, read_model
from qdiff.errors import UserError

pytestmark = pytest.mark.slow
SUM_TOLERANCE, LEVEL_TOLERANCE = 2e-5, 1.5e-3  # relative L2, as in test_onnx_networks.py


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    require_runtimes()
    qnn = wrapped(weight_bits=8)
    qdiff.calibrate(qnn, text_data(), "linear", run=CalibrationRun(show_progress=False))
    path = tmp_path_factory.mktemp("text") / "model.onnx"
    export_onnx(qnn, path, (2, 4, 4), (5, 8))
    return qnn, path


@torch.no_grad()
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_runtimes_compute_what_the_simulation_does(runtime, exported):
    qnn, path = exported
    followed, given = Followed(path, runtime), texts(count=3, seed=5)
    found = followed.differences(qnn, *given)
    assert found.sums() < SUM_TOLERANCE and found.levels() < LEVEL_TOLERANCE
    output = qnn.layers()[READERS[1]].first_token.output
    output *= 1.5  # planted
    planted = followed.differences(qnn, *given)
    output /= 1.5
    assert max(planted.sums(), planted.levels()) > LEVEL_TOLERANCE


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_another_token_is_an_error(runtime, exported):
    network = OnnxNetwork(exported[1], runtime)
    assert network(*texts(seed=6)).isfinite().all()
    with pytest.raises(UserError, match="begins with another token than in calibration"):
        network(*other_texts(seed=6))


def test_the_file_says_so(exported):
    qnn, path = exported
    check_config(path, read_model(path), qnn.config)
    with pytest.raises(UserError, match="was exported with bos_aware True, this run asks for False"):
        check_config(path, read_model(path), wrapped(weight_bits=8, bos_aware=False).config)
    other = wrapped(weight_bits=8)
    qdiff.calibrate(other, text_data(), "linear", run=CalibrationRun(show_progress=False))
    other.layers()[READERS[0]].first_token.output += 1
    with pytest.raises(UserError, match="other weights or ranges"):
        OnnxNetwork(path, "onnxruntime", qnn=other)
