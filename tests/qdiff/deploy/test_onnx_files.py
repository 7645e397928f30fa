"""Exported files: what is stored, how large it is, that it is written whole; and files that cannot be run."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from deploy_networks import network_inputs
from exact_runtimes import require_runtimes
from following import RUNTIMES
from thorough import thorough_except
from torch import Tensor, nn

from qdiff.checkpoint.native import layout
from qdiff.config import QuantConfig
from qdiff.deploy.onnx_export import FORMAT, METADATA, export_onnx
from qdiff.deploy.onnx_network import OnnxNetwork, properties, read_model
from qdiff.errors import UserError
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod

onnx = pytest.importorskip("onnx")
require_runtimes()

# Bytes of the file against the float32 parameters. What is not weights (the graph, norms, biases, step sizes) weighs
# more in a model as small as the digits one (4.45 MB) than in a full-size one.
W4_FILE = 0.21
W4_WEIGHTS = 0.126  # four bits of 32, and a zero point a channel
W8_WEIGHTS = 0.252


class OneLayer(nn.Module):
    """The least that can be exported."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, width, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.layer(x) + t[:, None, None, None]


SHAPE = (3, 5, 5)


def one_layer(width: int = 6, **config) -> QuantModel:
    torch.manual_seed(0)
    qnn = QuantModel(OneLayer(width), QuantConfig(**{"weight_bits": 4, **config}))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(RangeMethod.MIN_MAX)
    for quantizer in qnn.act_quantizers().values():
        quantizer.set(torch.tensor(0.02), torch.tensor(128))
    return qnn


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A network of one layer, W4, and its file."""
    qnn, path = one_layer(), tmp_path_factory.mktemp("small") / "small.onnx"
    export_onnx(qnn, path, SHAPE, notes={"who": "small"})
    return qnn, path


def initialisers(model) -> dict[str, tuple[int, bytes]]:
    return {t.name: (t.data_type, onnx.numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer}


def weight_bytes(path, kind: int) -> int:
    stored = (t for t in read_model(path).graph.initializer if t.data_type == kind)
    return sum(len(t.raw_data) for t in stored)


# --- What is stored


@pytest.mark.slow
@pytest.mark.parametrize("network", thorough_except(("exported_text", "exported_digits"), "exported_text"))
def test_every_integer_is_in_the_file_as_four_bits(network, request):
    least = {"exported_text": 25, "exported_digits": 40}[network]  # layers
    from qdiff.deploy.onnx_weights import compact, expand

    exported = request.getfixturevalue(network)
    qnn, model = exported.qnn, read_model(exported.path)
    stored = initialisers(model)
    kinds = [kind for kind, _ in stored.values()]
    assert kinds.count(onnx.TensorProto.UINT4) > 2 * least
    expand(model)
    assert onnx.TensorProto.UINT4 not in [kind for kind, _ in initialisers(model).values()]
    # Every slice of every layer is there, to the bit, with its zero points.
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = (node for node in model.graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors)
    there = {tuple(tensors[name].tobytes() for name in (node.input[0], node.input[2])) for node in nodes}
    for name, layer in qnn.layers().items():
        parts = layer.weight_int.split(layer.slices, dim=1)
        for part, quantizer in zip(parts, layer.weight_quantizers, strict=True):
            wanted, zero_points = (
                part.to(torch.uint8, copy=True),
                quantizer.zero_point.to(torch.uint8).numpy().tobytes(),
            )
            assert (wanted.numpy().tobytes(), zero_points) in there, name
            wanted[0, 0] ^= 1  # planted
            assert (wanted.numpy().tobytes(), zero_points) not in there
    compact(model)
    again = initialisers(model)
    assert {
        name: value for name, value in again.items() if value[0] != onnx.TensorProto.UINT4
    }.items() <= stored.items()
    assert sorted(again.values()) == sorted(stored.values())


@pytest.mark.parametrize(
    ("rows", "zero_points", "kind"),
    [
        ([[0, 15, 7], [3, 0, 9], [15, 15, 1]], [8, 0, 15], "UINT4"),  # 9 is odd
        ([[0, 0, 0]], [0], "UINT4"),
        ([[0, 16, 7]], [8], "UINT8"),
        ([[0, 15, 7]], [16], "UINT8"),
        ([[0, 255, 7]], [120], "UINT8"),
    ],
)
def test_four_bits_hold_what_they_can(rows, zero_points, kind):
    from onnx import TensorProto, helper

    from qdiff.deploy.onnx_weights import compact, expand

    values = np.array(rows, dtype=np.uint8)
    tensors = [
        onnx.numpy_helper.from_array(values, "weight"),
        onnx.numpy_helper.from_array(np.full(len(values), 0.1, np.float32), "scale"),
        onnx.numpy_helper.from_array(np.array(zero_points, np.uint8), "zero"),
    ]
    # Two that share everything, as the exporter leaves equal tensors.
    nodes = [helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], [out], axis=0) for out in "ab"]
    outs = [helper.make_tensor_value_info(out, TensorProto.FLOAT, values.shape) for out in "ab"]
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(helper.make_graph(nodes, "two", [], outs, tensors), opset_imports=opset)
    expected = onnx.reference.ReferenceEvaluator(model).run(None, {})
    compact(model)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {kinds[name] for node in model.graph.node for name in node.input[::2]} == {getattr(TensorProto, kind)}
    onnx.checker.check_model(model)
    # Standard ONNX: whoever reads the file as it is gets the same numbers.
    for made, wanted in zip(onnx.reference.ReferenceEvaluator(model).run(None, {}), expected, strict=True):
        assert np.array_equal(made, wanted)
    expand(model)
    assert np.array_equal(onnx.numpy_helper.to_array(model.graph.initializer[0]), values)
    for made, wanted in zip(onnx.reference.ReferenceEvaluator(model).run(None, {}), expected, strict=True):
        assert np.array_equal(made, wanted)


def test_integers_shared_by_other_zero_points_stay_bytes():
    """One weight of 4 bits, one of 8 whose integers happen to be the same."""
    from onnx import TensorProto, helper

    from qdiff.deploy.onnx_weights import compact

    tensors = [
        onnx.numpy_helper.from_array(np.array([[3, 4]], np.uint8), "weight"),
        onnx.numpy_helper.from_array(np.ones(1, np.float32), "scale"),
        onnx.numpy_helper.from_array(np.array([3], np.uint8), "small"),
        onnx.numpy_helper.from_array(np.array([128], np.uint8), "large"),
    ]
    nodes = [
        helper.make_node("DequantizeLinear", ["weight", "scale", z], [z + "_out"], axis=0) for z in ("small", "large")
    ]
    outs = [helper.make_tensor_value_info(z + "_out", TensorProto.FLOAT, (1, 2)) for z in ("small", "large")]
    opset = [helper.make_opsetid("", 21)]
    model = helper.make_model(helper.make_graph(nodes, "two", [], outs, tensors), opset_imports=opset)
    compact(model)
    small, large = onnx.reference.ReferenceEvaluator(model).run(None, {})
    assert small.tolist() == [[0, 1]] and large.tolist() == [[-125, -124]]


@pytest.mark.thorough  # exports the bundled digits model
def test_file_bytes_of_4_bits(exported_digits):
    floats = sum(4 * p.weight.numel() for p in exported_digits.qnn.layers().values())
    assert weight_bytes(exported_digits.path, onnx.TensorProto.UINT4) < W4_WEIGHTS * floats
    assert exported_digits.path.stat().st_size < W4_FILE * _float_bytes(exported_digits.qnn)


def test_file_bytes_of_8_bits(exported_ddim):
    floats = sum(4 * p.weight.numel() for p in exported_ddim.qnn.layers().values())
    stored = weight_bytes(exported_ddim.path, onnx.TensorProto.UINT8)
    assert 0.25 * floats <= stored < W8_WEIGHTS * floats
    assert exported_ddim.path.stat().st_size > stored  # what a W8 file stored as W4 would not have


def _float_bytes(qnn: QuantModel) -> int:
    return 4 * sum(p.numel() for n, p in qnn.model.named_parameters() if not n.endswith(".delta"))


def test_metadata_says_what_it_is(exported_ddim):
    found = properties(read_model(exported_ddim.path))
    assert tuple(found) == METADATA and found["qdiff_format"] == FORMAT
    assert QuantConfig.from_dict(json.loads(found["qdiff_config"])) == exported_ddim.qnn.config
    assert found["qdiff_layout"] == layout(exported_ddim.qnn)
    assert json.loads(found["qdiff_notes"]) == {"planted": "note"}
    model = onnx.load(str(exported_ddim.path))
    assert [i.name for i in model.graph.input] == ["x", "t"] and [o.name for o in model.graph.output] == ["eps"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert not any(node.metadata_props for node in model.graph.node)  # paths of this machine


@pytest.mark.slow
def test_export_does_not_change_the_network(small, tmp_path):
    qnn, path = small
    state = {n: v.clone() for n, v in qnn.state_dict().items()}
    given = network_inputs(SHAPE)(2, 0)
    with qnn.quantized(), torch.no_grad():
        before = qnn(*given)
    export_onnx(qnn, tmp_path / "again.onnx", SHAPE, notes={"who": "small"})
    with qnn.quantized(), torch.no_grad():
        assert torch.equal(qnn(*given), before)
    assert all(torch.equal(v, state[n]) for n, v in qnn.state_dict().items())
    # The same file, to the byte.
    assert (tmp_path / "again.onnx").read_bytes() == path.read_bytes()
    other = one_layer()
    other.layers()["layer"].weight_int[0, 0, 0, 0] ^= 1
    export_onnx(other, tmp_path / "other.onnx", SHAPE, notes={"who": "small"})
    assert (tmp_path / "other.onnx").read_bytes() != path.read_bytes()


@pytest.mark.slow
def test_export_does_not_change_a_network_in_half_precision(tmp_path):
    """Which an exported one is not: the same happens to a network on another device."""
    qnn = one_layer(act_bits=8).half()
    before = {n: (v.dtype, v.clone()) for n, v in qnn.state_dict().items()}
    export_onnx(qnn, tmp_path / "model.onnx", SHAPE)
    after = qnn.state_dict()
    assert {v.dtype for v in after.values()} >= {torch.float16}
    assert all(after[n].dtype == dtype and torch.equal(after[n], v) for n, (dtype, v) in before.items())
    given = network_inputs(SHAPE)(2, 0)
    with qnn.float().quantized(), torch.no_grad():
        expected = qnn(*given)
    assert torch.allclose(OnnxNetwork(tmp_path / "model.onnx", "onnxruntime")(*given), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["save", "checker"])
def test_nothing_half_written_is_left(failing, small, tmp_path, monkeypatch):
    qnn, path = small
    shutil.copy(path, tmp_path / "model.onnx")

    def save(model, file) -> None:
        with open(file, "wb") as half:
            half.write(model.SerializeToString()[:100])
        raise OSError("disk full")

    def check(model) -> None:
        raise ValueError("planted")

    monkeypatch.setattr(onnx, "save", save) if failing == "save" else monkeypatch.setattr(
        onnx.checker, "check_model", check
    )
    with pytest.raises((OSError, ValueError)):
        export_onnx(qnn, tmp_path / "model.onnx", SHAPE)
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_bytes() == path.read_bytes()


# --- What cannot be exported or run


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            {"act_bits": 8, "act_dynamic": True, "act_scale_per": "channel"},
            "per channel .*tensor or sample$",
        ),
        ({"act_bits": 8, "modulate": True, "ablation": "cleared-state"}, "^--modulate_ablation .*; leave it out"),
    ],
)
def test_what_has_no_onnx_form_is_refused(config, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        export_onnx(one_layer(**config), tmp_path / "model.onnx", SHAPE)
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_more_than_a_file_holds_is_refused_before_tracing(tmp_path, monkeypatch):
    from qdiff.deploy import onnx_export, onnx_graph

    size = 3 * 6 * 9 + 4 * (6 + 6)  # one byte per weight, four per bias and step size
    monkeypatch.setattr(onnx_graph, "trace", None)
    monkeypatch.setattr(onnx_export, "PROTOBUF_LIMIT", size - 1)
    with pytest.raises(UserError, match="as ONNX, more than one file holds"):
        export_onnx(one_layer(), tmp_path / "model.onnx", SHAPE)
    monkeypatch.undo()
    monkeypatch.setattr(onnx_export, "PROTOBUF_LIMIT", size)
    export_onnx(one_layer(), tmp_path / "model.onnx", SHAPE)
    monkeypatch.setattr(onnx_export, "PROTOBUF_LIMIT", 4 * (3 * 6 * 9 + 6) - 1)
    with pytest.raises(UserError, match="more than one file holds"):
        export_onnx(QuantModel(OneLayer(), QuantConfig(weight_bits=None)), tmp_path / "float.onnx", SHAPE)


def test_a_network_that_was_not_calibrated_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no range; calibrate"):
        export_onnx(QuantModel(OneLayer(), QuantConfig(8, 8)), tmp_path / "model.onnx", SHAPE)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_export_without_the_extra(missing, small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError, match=rf"^{missing} is not installed; pip install '\.\[deploy\]'$"):
        export_onnx(small[0], tmp_path / "model.onnx", SHAPE)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_is_not_installed(runtime, small, monkeypatch):
    assert OnnxNetwork(small[1], runtime)(*network_inputs(SHAPE)(1, 0)).shape == (1, 6, 5, 5)
    monkeypatch.setitem(sys.modules, runtime, None)
    with pytest.raises(UserError, match=rf"^{runtime} is not installed; pip install '\.\[deploy\]'$"):
        OnnxNetwork(small[1], runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_are_none_of_ours(runtime, small, tmp_path):
    path = tmp_path / "model.onnx"
    with pytest.raises(UserError, match=r"does not exist; write it with scripts/export\.py$"):
        OnnxNetwork(path, runtime)
    content = small[1].read_bytes()
    for damaged in (content[: len(content) // 2], b"\xff" * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"is damaged|is not an ONNX model written by this project"):
            OnnxNetwork(path, runtime)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"is not an ONNX model written by this project \(qdiff-onnx-2\)"):
        OnnxNetwork(path, runtime)
    foreign = onnx.load(str(small[1]))
    del foreign.metadata_props[:]
    onnx.save(foreign, str(path))
    with pytest.raises(UserError, match=r"is not an ONNX model written by this project \(qdiff-onnx-2\)"):
        OnnxNetwork(path, runtime)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_of_other_widths_or_another_network(runtime, small):
    qnn, path = small
    assert OnnxNetwork(path, runtime, qnn=qnn)(*network_inputs(SHAPE)(1, 0)).shape == (1, 6, 5, 5)
    for config, sentence in (
        ({"weight_bits": 3}, "weight_bits 4, this run asks for 3"),
        ({"act_bits": 8}, "act_bits None, this run asks for 8"),
        ({"weight_symmetric": True}, "weight_symmetric False, this run asks for True"),
    ):
        with pytest.raises(UserError, match=f"exported with {sentence}; export it again$"):
            OnnxNetwork(path, runtime, qnn=one_layer(**config))
    with pytest.raises(UserError, match=r"exported from another network; export it again with this model$"):
        OnnxNetwork(path, runtime, qnn=one_layer(width=7))
    other = one_layer()
    other.layers()["layer"].weight_int[0, 0, 0, 0] ^= 1
    with pytest.raises(UserError, match=r"exported with other weights or ranges; export it again with this check"):
        OnnxNetwork(path, runtime, qnn=other)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_for_other_shapes(runtime, small, exported_text):
    OnnxNetwork(small[1], runtime, shapes=(SHAPE, None))
    with pytest.raises(UserError, match=r"for x of shape 3×5×5, this run has 3×7×5; export it again$"):
        OnnxNetwork(small[1], runtime, shapes=((3, 7, 5), None))
    with pytest.raises(UserError, match=r"for context of shape none, this run has 5×12; export it again$"):
        OnnxNetwork(small[1], runtime, shapes=(SHAPE, (5, 12)))
    OnnxNetwork(exported_text.path, runtime, shapes=((4, 4, 4), (5, 12)))
    with pytest.raises(UserError, match=r"for context of shape 5×12, this run has 6×12; export it again$"):
        OnnxNetwork(exported_text.path, runtime, shapes=((4, 4, 4), (6, 12)))


def test_how_ranges_were_chosen_is_no_matter(small):
    """The ranges themselves are in the file."""
    qnn, path = small
    again = one_layer(weight_range="mse", act_range="mse")
    OnnxNetwork(path, "onnxruntime", qnn=again)
    assert torch.equal(again.layers()["layer"].weight_int, qnn.layers()["layer"].weight_int)
