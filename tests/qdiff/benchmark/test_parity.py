"""Comparing networks with the simulated one: what is measured, what is in the table, and options that do not fit."""

from __future__ import annotations

import copy
import sys
from argparse import Namespace
from dataclasses import asdict

import numpy as np
import pytest
import torch

from qdiff.benchmark import parity
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.checkpoint import save_checkpoint
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options
from qdiff.errors import UserError
from qdiff.evaluation.fidelity import PSNR_CAP
from qdiff.methods import linear
from qdiff.pipeline import Pipeline
from qdiff.quant_model import QuantModel

TIMES = (900.0, 500.0, 100.0)
IMAGES = 3  # a batch of two and one of one
ONE_LEVEL = 1 + 1 / 255
EXACT = 1e-6  # relative, of numbers that float32 rounds
W4A8 = ("--weight_bit", 4, "--quant_act", "--quant_mode", "linear")
DYNAMIC = ("--weight_bit", 4, "--quant_act", "--quant_mode", "dynamic")


class Tiny(Pipeline):
    """A tiny network and a sampler of three steps; image i starts from noise of its own."""

    name, batch_size, input_shape = "tiny", 2, (1, 8, 8)
    calls = len(TIMES)

    def __init__(self, network: torch.nn.Module) -> None:
        self.float_network, self.notes = network, []

    def load(self, device: torch.device) -> None:
        self.network, self.device = copy.deepcopy(self.float_network), device

    def sample(self, network, rows, calibration=False, on_call=None, on_step=None):
        x = torch.stack([torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in rows])
        for time in TIMES:
            x = x - 0.4 * network(x, torch.full((len(x),), time))
        return x.tanh()


@pytest.fixture
def model(tiny_network) -> Tiny:
    return Tiny(tiny_network)


def options(*words: object, checkpoint: object = "w.safetensors", **others: object) -> Namespace:
    parser = Parser(None)
    add_ptq_options(parser)
    chosen = {"images": IMAGES, "runtimes": None, "onnx": None, **others}
    named = [] if checkpoint is None else ["--cali_ckpt", str(checkpoint)]
    return Namespace(**vars(parser.parse_args([*(str(word) for word in words), *named])), **chosen)


@pytest.fixture
def compared(model, tmp_path):
    """``compared(*words, runtimes)``: rows of a network with ranges of a few samples."""

    def made(*words: object, runtimes: str = "torch", images: int = IMAGES) -> dict:
        path = tmp_path / "quantized.safetensors"
        plan, names, _ = parity.resolve(options("--ptq", *words, checkpoint=path, runtimes=runtimes), model)
        qnn = QuantModel(copy.deepcopy(model.float_network), plan.quant)
        x = torch.randn(6, *model.input_shape, generator=torch.Generator().manual_seed(7))
        linear.calibrate(qnn, CalibrationSet((x, torch.arange(6) * 150)), None, CalibrationRun(show_progress=False))
        save_checkpoint(qnn, path)
        return parity.compare(model, plan, names, images, "cpu")

    return made


def quantized(model: Tiny) -> tuple[QuantModel, list[parity.Sampled]]:
    """Return a W4A8 network and what it samples."""
    model.load(torch.device("cpu"))
    plan, *_ = parity.resolve(options("--ptq", *W4A8, runtimes="torch"), model)
    qnn = QuantModel(model.network, plan.quant)
    x = torch.randn(6, *model.input_shape, generator=torch.Generator().manual_seed(7))
    linear.calibrate(qnn, CalibrationSet((x, torch.arange(6) * 150)), None, CalibrationRun(show_progress=False))
    with torch.no_grad():
        return qnn, list(parity._simulated(model, qnn, IMAGES))


# --- What is measured


@pytest.mark.slow
def test_a_network_is_itself(model):
    qnn, batches = quantized(model)
    assert [list(batch.rows) for batch in batches] == [[0, 1], [2]]
    with qnn.quantized():
        found = parity.measure(model, qnn, batches, qnn.trajectory)
    assert found == parity.Parity([0.0] * 3, 0.0, 0.0, PSNR_CAP, IMAGES)


@pytest.mark.slow
def test_the_error_is_relative_to_the_simulated_output(model):
    """Planted: ε one level of 255 too large, which every step and the images show."""
    qnn, batches = quantized(model)
    with qnn.quantized():
        found = parity.measure(model, lambda *inputs: ONE_LEVEL * qnn(*inputs), batches, qnn.trajectory)
    assert found.by_call == pytest.approx([1 / 255] * 3, rel=1e-3)
    assert found.mean == pytest.approx(1 / 255, rel=1e-3) and found.largest == max(found.by_call)
    assert 20 < found.psnr < PSNR_CAP and found.identical < IMAGES


def test_batches_are_weighted_by_their_size(model):
    """Over the norms of all images, not the mean of the batches' errors: one image weighs as much in either."""
    qnn, batches = quantized(model)
    with qnn.quantized():
        found = parity.measure(model, lambda x, t: (1 + (len(x) == 1)) * qnn(x, t), batches, qnn.trajectory)
    squares = [[float(batch.eps[i].double().square().sum()) for batch in batches] for i in range(3)]
    assert found.by_call == pytest.approx([(alone / (both + alone)) ** 0.5 for both, alone in squares], rel=EXACT)


def test_psnr_of_images():
    black, white = np.zeros((2, 4, 4, 1), np.uint8), np.full((2, 4, 4, 1), 255, np.uint8)
    assert parity.image_psnr(black, black).tolist() == [np.inf, np.inf]
    assert parity.image_psnr(black, white).tolist() == [0.0, 0.0]
    black[0, 0, 0] = 255  # one pixel of sixteen
    assert parity.image_psnr(black, np.zeros_like(black)).tolist() == pytest.approx([10 * np.log10(16), np.inf])


@pytest.mark.slow
def test_rows_of_a_comparison(compared):
    found = compared(*W4A8, runtimes="torch-int8,torch")
    assert found["timesteps"] == list(TIMES)
    assert list(found["rows"]) == [parity.FLOAT, parity.LAST_BITS, "torch-int8", "torch"]
    rows = found["rows"]
    assert rows["torch"] == asdict(parity.Parity([0.0] * 3, 0.0, 0.0, PSNR_CAP, IMAGES))  # bit for bit
    # Integer products and last bits move values over the same edges; quantization itself does ten times as much.
    for name in ("torch-int8", parity.LAST_BITS):
        assert 0 < rows[name]["mean"] < rows[parity.FLOAT]["mean"] / 5, name
        assert len(rows[name]["by_call"]) == 3


@torch.no_grad()
def test_last_bits_are_moved_inside_the_block_alone(model):
    qnn, batches = quantized(model)
    x, *rest = batches[0].calls[0]
    # On rounding edges of the first layer, where a last bit decides on every machine.
    delta = qnn.act_quantizers()["conv_in.act_quantizers.0"].delta
    inputs = ((torch.arange(x.numel()).view_as(x) % 9 - 4.5) * delta, *rest)
    with qnn.quantized():
        expected = qnn(*inputs)
        with parity.last_bits_moved(qnn):
            moved = qnn(*inputs)
        assert not torch.equal(moved, expected) and torch.equal(qnn(*inputs), expected)
    qnn.reset_fired()
    with parity.last_bits_moved(qnn):  # in float nothing is rounded to levels, so last bits stay last bits
        assert float((qnn(*inputs) - model.float_network(*inputs)).norm() / expected.norm()) < 1e-5


@pytest.mark.slow
def test_modulated_networks_run_in_trajectories(compared):
    found = compared(*DYNAMIC, "--modulate", runtimes="torch,torch-int8")
    assert found["rows"]["torch"]["by_call"] == [0.0] * 3 and found["rows"]["torch"]["identical"] == IMAGES
    assert found["rows"]["torch-int8"]["by_call"][0] < 1e-5  # the first step is in float
    assert found["rows"][parity.FLOAT]["mean"] > 0.01


def test_the_table():
    rows = {"float": parity.Parity([0.5], 0.5, 0.5, 31.26, 0), "torch": parity.Parity([0.0], 0.0, 0.0, PSNR_CAP, 2)}
    text = parity.markdown({"rows": {name: asdict(row) for name, row in rows.items()}}, 2).splitlines()
    assert text[2:] == ["| float | 5.0e-01 | 5.0e-01 | 31.3 dB | 0 of 2 |", "| torch | 0 | 0 | – | 2 of 2 |"]
    assert len({line.count("|") for line in text}) == 1


# --- Options that do not fit


@pytest.mark.parametrize(
    ("words", "others", "message"),
    [
        ((), {"checkpoint": None}, "this compares a calibrated network; give --ptq and --cali_ckpt PATH"),
        (("--ptq", *W4A8), {"checkpoint": None}, "give --ptq and --cali_ckpt PATH"),
        (("--ptq", *W4A8), {"images": 0}, "--images is 0; give at least 1"),
        (("--ptq", *W4A8), {"runtimes": "torch,tensorrt"}, "--runtimes has no 'tensorrt'; choose from torch, "),
        (("--ptq", *W4A8), {"runtimes": ""}, "--runtimes has no ''"),
        (("--ptq", "--quant_mode", "linear"), {"runtimes": "torch-int8"}, "add --quant_act"),
        (
            ("--ptq", *DYNAMIC, "--act_scale_per", "channel"),
            {"runtimes": "torch-int8"},
            "integer products cannot use one range per channel",
        ),
        (
            ("--ptq", *DYNAMIC, "--modulate", "--modulate_ablation", "cleared-state"),
            {"runtimes": "torch,openvino"},
            "--modulate_ablation cannot be written as ONNX",
        ),
        (("--ptq", *W4A8), {"runtimes": "torch", "onnx": "m.onnx"}, "--onnx needs one of the runtimes onnxruntime and"),
        (("--ptq", *W4A8), {"onnx": "none.onnx"}, "ONNX file none.onnx does not exist; write it with scripts/export"),
    ],
)
def test_bad_options(words, others, message, model):
    for package in ("onnxruntime", "openvino"):
        if package in others.get("runtimes", "") or "onnx" in others:
            pytest.importorskip(package)
    with pytest.raises(UserError) as caught:
        parity.resolve(options(*words, **others), model)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_run_is_left_out_where_nothing_is_named(model):
    plan, names, skipped = parity.resolve(options("--ptq", *DYNAMIC, "--act_scale_per", "channel"), model)
    assert plan.action == "load" and names == ["torch"]
    assert list(skipped) == ["torch-int8", "onnxruntime", "openvino"]
    assert all("\n" not in why for why in skipped.values())
    _, names, skipped = parity.resolve(options("--ptq", "--quant_mode", "linear", runtimes="torch, torch"), model)
    assert names == ["torch"] and skipped == {}


@pytest.mark.parametrize("package", ["openvino", "onnxscript"])
def test_without_the_extra(package, model, monkeypatch):
    for needed in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(needed)
    monkeypatch.setitem(sys.modules, package, None)
    _, names, skipped = parity.resolve(options("--ptq", *W4A8), model)
    assert "openvino" not in names and ("onnxruntime" in names) == (package == "openvino")
    assert skipped["openvino"] == f"{package} is not installed; pip install '.[deploy]'"
    with pytest.raises(UserError, match=f"{package} is not installed"):
        parity.resolve(options("--ptq", *W4A8, runtimes="torch,openvino"), model)
