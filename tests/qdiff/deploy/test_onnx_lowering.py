"""What runtimes are given computes what the file says, in every geometry, with the kernels that were meant."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")

from exact_runtimes import SPLIT  # noqa: E402
from onnx import TensorProto, helper, numpy_helper  # noqa: E402
from onnx.reference.op_run import OpRun  # noqa: E402

from qdiff.deploy.onnx_lowering import ProductLimits, lower  # noqa: E402
from qdiff.deploy.runtimes import RUNTIMES, onnx_runtimes  # noqa: E402

# Relative to the largest value: float32 sums in another order.
TOLERANCE = 1e-6
BATCH, INPUTS, OUTPUTS = 2, 3, 5
SCALE, ZERO_POINT = 0.05, 118  # of the input

GEOMETRIES = {
    "3x3": ((3, 3), {"pads": [1, 1, 1, 1]}, (6, 7)),
    "3x3_strided": ((3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}, (7, 6)),
    "3x3_strided_unpadded": ((3, 3), {"strides": [2, 2]}, (7, 8)),
    "3x3_one_sided": ((3, 3), {"pads": [0, 1, 2, 0]}, (6, 6)),
    "1x1": ((1, 1), {}, (4, 5)),
    "1x1_strided": ((1, 1), {"strides": [2, 2]}, (5, 4)),
    "5x3": ((5, 3), {"pads": [2, 1, 2, 1]}, (6, 6)),
    "1d": ((1,), {}, (9,)),
    "1d_wide": ((3,), {"pads": [1, 1], "strides": [3]}, (9,)),
}
BITS = (8, 4)
# With VNNI and without; the reference here computes both.
LIMITS = {"plain": ProductLimits(), "split": SPLIT}
LOWERINGS = [("onnxruntime", "plain"), ("openvino", "plain"), ("openvino", "split")]


def weight(kernel: tuple[int, ...], bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Integers that use the whole width, δ and zero points that differ by channel, beside the middle."""
    generator = np.random.default_rng(bits)
    integers = generator.integers(0, 2**bits, (OUTPUTS, INPUTS, *kernel)).astype(np.uint8)
    integers[:, 0, ...], integers[:, 1, ...] = 0, 2**bits - 1
    zero_points = (2 ** (bits - 1) - 2 + np.arange(OUTPUTS)).astype(np.uint8)
    return integers, (0.01 * (1 + np.arange(OUTPUTS))).astype(np.float32), zero_points


def model_of(product: str, kernel: tuple[int, ...], attributes: dict, shape: tuple[int, ...], bits: int, bias: bool):
    """x → quantized → product with a quantized weight → y."""
    integers, scales, zero_points = weight(kernel, bits)
    tensors = {
        "scale": np.float32(SCALE),
        "zero_point": np.uint8(ZERO_POINT),
        "integers": integers,
        "scales": scales,
        "zero_points": zero_points,
        "bias": np.linspace(-1, 1, OUTPUTS, dtype=np.float32),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["d"]),
        helper.make_node("DequantizeLinear", ["integers", "scales", "zero_points"], ["w"], axis=0),
    ]
    operand = "w"
    if product == "MatMul":
        nodes.append(helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]))
        operand = "wt"
    nodes.append(helper.make_node(product, ["d", operand, *(["bias"] if bias else [])], ["y"], **attributes))
    graph = helper.make_graph(
        nodes,
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * (len(shape) + 1))],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


CASES = {
    **{
        f"{name}{'' if bias else '_plain'}": ("Conv", kernel, attributes, (INPUTS, *shape), bias)
        for name, (kernel, attributes, shape) in GEOMETRIES.items()
        for bias in ((True, False) if name == "3x3" else (True,))
    },
    "gemm": ("Gemm", (), {"transB": 1}, (INPUTS,), True),
    "gemm_plain": ("Gemm", (), {"transB": 1}, (INPUTS,), False),
    "matmul": ("MatMul", (), {}, (4, INPUTS), False),
}


def given(shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((BATCH, *shape)).astype(np.float32)
    x.reshape(-1)[:2] = 30, -30  # saturate
    return {"x": x}


class MatMulIntegerToFloat(OpRun):
    """ONNX Runtime's own operation, as its documentation has it."""

    op_domain = "com.microsoft"

    def _run(self, a, b, a_scale, b_scale, a_zero=None, b_zero=None, bias=None):
        a_zero, b_zero = (0 if zero is None else zero.astype(np.int64) for zero in (a_zero, b_zero))
        product = (a.astype(np.int64) - a_zero) @ (b.astype(np.int64) - b_zero) * (a_scale * b_scale)
        return ((product if bias is None else product + bias).astype(np.float32),)


def run(model, feed: dict[str, np.ndarray]) -> np.ndarray:
    return onnx.reference.ReferenceEvaluator(model, new_ops=[MatMulIntegerToFloat]).run(None, feed)[0]


def difference(out: np.ndarray, expected: np.ndarray) -> float:
    assert out.shape == expected.shape
    return float(np.abs(out - expected).max() / np.abs(expected).max())


def weights_of(model) -> list[tuple]:
    """(node, integers, zero points) of the dequantized constants."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = (n for n in model.graph.node if n.op_type == "DequantizeLinear" and n.input[0] in stored)
    return [(node, stored[node.input[0]], stored[node.input[2]]) for node in nodes]


@pytest.mark.parametrize(("runtime", "limits"), LOWERINGS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CASES)
def test_the_same_is_computed(name, bits, runtime, limits):
    product, kernel, attributes, shape, bias = CASES[name]
    model, feed = model_of(product, kernel, attributes, shape, bits, bias), given(shape)
    expected = run(model, feed)
    lower(model, RUNTIMES[runtime].changes(LIMITS[limits]))
    onnx.checker.check_model(model)
    assert difference(run(model, feed), expected) < TOLERANCE
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    assert set(stored) == {name for node in model.graph.node for name in node.input} & set(stored)  # none is unused
    planted = 0
    for plant in ("integers", "zero", "shift", "rows", "zeros"):
        tensors = [t for t in stored.values() if t.name.endswith(f".{plant}") and ".window" not in t.name]
        for tensor in tensors:
            before = numpy_helper.to_array(tensor).copy()
            values = before.copy()
            values.reshape(-1)[0] += 1 if plant != "shift" else 0.01 * abs(before).max()
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
            assert difference(run(model, feed), expected) > TOLERANCE, tensor.name
            planted += 1
            tensor.CopyFrom(numpy_helper.from_array(before, tensor.name))
    if runtime == "openvino":
        assert planted == (3 if bits == 8 else 2)
    else:  # of 8 bits zero points stay; a row of the embedding is left as it is
        assert planted == (0 if product == "Gemm" else 2 if bits == 8 else 1)


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", CASES)
def test_openvino_gets_weights_without_zero_points(name, bits, limits):
    product, kernel, attributes, shape, bias = CASES[name]
    model = model_of(product, kernel, attributes, shape, bits, bias)
    lower(model, RUNTIMES["openvino"].changes(LIMITS[limits]))
    weights = weights_of(model)
    assert len(weights) == (2 if bits == 8 else 1)  # 8 bits need the sums of the windows
    for _, integers, zero_points in weights:
        assert integers.dtype == np.int8 and not zero_points.any()
        assert np.abs(integers.astype(int)).max() <= LIMITS[limits].weight
    splits = bits == 8 and limits == "split"  # narrower weights need not
    assert weights[0][1].shape == (OUTPUTS, INPUTS * (2 if splits else 1), *kernel)
    found = Counter(node.op_type for node in model.graph.node)
    assert found[product] == len(weights) and found["Concat"] == (1 if splits else 0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] != "Gemm"])
def test_onnx_runtime_gets_integer_matrix_products(name, bits):
    pytest.importorskip("onnxruntime")
    product, kernel, attributes, shape, bias = CASES[name]
    model, feed = model_of(product, kernel, attributes, shape, bits, bias), given(shape)
    expected = run(model, feed)
    lower(model, RUNTIMES["onnxruntime"].changes(ProductLimits()))
    found = Counter(node.op_type for node in model.graph.node)
    assert found["Conv"] == found["MatMul"] == 0 and found["MatMulIntegerToFloat"] == 1
    assert difference(RUNTIMES["onnxruntime"].open(model, 1)(feed)[0], expected) < TOLERANCE


@pytest.mark.parametrize("limits", LIMITS)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("name", ["3x3", "3x3_plain", "1x1", "1d_wide", "gemm", "matmul"])
def test_openvino_multiplies_integers(name, bits, limits):
    """Halves and repeated inputs stay bytes; split, products are exact on every CPU, and plain ones of 4 bits too."""
    openvino = pytest.importorskip("openvino")
    product, kernel, attributes, shape, bias = CASES[name]
    model, feed = model_of(product, kernel, attributes, shape, bits, bias), given(shape)
    expected = run(model, feed)
    lower(model, RUNTIMES["openvino"].changes(LIMITS[limits]))
    core = openvino.Core()
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
    products = [
        [operand.get_element_type().get_type_name() for operand in node.inputs()[:2]]
        for node in compiled.get_runtime_model().get_ordered_ops()
        if node.get_rt_info()["layerType"].astype(str) in ("Convolution", "FullyConnected", "MatMul")
    ]
    assert len(products) == (2 if bits == 8 else 1) and all(types == ["u8", "i8"] for types in products)
    if limits == "split" or bits == 4:
        assert difference(RUNTIMES["openvino"].open(model, 1)(feed)[0], expected) < TOLERANCE


def two_products_of_one_input():
    model = model_of("Conv", *CASES["3x3"][1:4], 8, False)
    second = type(model.graph.node[-1]).FromString(model.graph.node[-1].SerializeToString())
    second.output[0] = "z"
    model.graph.node.append(second)
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, None))
    return model


def test_products_of_one_input_share_its_windows():
    model = two_products_of_one_input()
    lower(model, RUNTIMES["onnxruntime"].changes(ProductLimits()))
    found = Counter(node.op_type for node in model.graph.node)
    assert found["MatMulIntegerToFloat"] == 2 and found["Gather"] == found["Pad"] == 1


def test_split_products_of_one_input_share_what_is_repeated():
    model = two_products_of_one_input()
    lower(model, RUNTIMES["openvino"].changes(LIMITS["split"]))
    found = Counter(node.op_type for node in model.graph.node)
    assert found["Concat"] == 1 and found["Conv"] == 4  # two products, two windows


@pytest.mark.parametrize("runtime", onnx_runtimes())
@pytest.mark.parametrize("change", ["float input", "dilations"])
def test_what_no_kernel_takes_stays_a_convolution(change, runtime):
    """Weights alone are quantized, or a geometry that no network here has."""
    product, kernel, attributes, shape, bias = CASES["3x3"]
    attributes = {**attributes, **({"dilations": [2, 2]} if change == "dilations" else {})}
    model, feed = model_of(product, kernel, attributes, shape, 8, bias), given(shape)
    if change == "float input":
        model.graph.node[-1].input[0] = "x"
    expected = run(model, feed)
    lower(model, RUNTIMES[runtime].changes(ProductLimits()))
    found = Counter(node.op_type for node in model.graph.node)
    convolutions = 2 if (runtime, change) == ("openvino", "dilations") else 1
    assert found["MatMulIntegerToFloat"] == 0 and found["Conv"] == convolutions
    assert difference(run(model, feed), expected) < TOLERANCE


@pytest.mark.parametrize("quantized", ["both", "first"])
@pytest.mark.parametrize("limits", LIMITS)
def test_products_of_two_activations_for_openvino(limits, quantized):
    """Where they are not exact, integers are kept from them; what is computed stays the same."""
    nodes, stored = [], {"one": np.float32(0.1), "middle": np.uint8(128)}
    for name in ("x", "z"):
        nodes.append(helper.make_node("QuantizeLinear", [name, "one", "middle"], [f"{name}.q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", "one", "middle"], [f"{name}.d"]))
    nodes.append(helper.make_node("Transpose", ["z.d" if quantized == "both" else "z"], ["z.t"], perm=[0, 2, 1]))
    nodes.append(helper.make_node("MatMul", ["x.d", "z.t"], ["y"]))
    graph = helper.make_graph(
        nodes,
        "activations",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3, 4]) for name in ("x", "z")],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3, 3])],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in stored.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    generator = np.random.default_rng(0)
    feed = {name: generator.standard_normal((2, 3, 4)).astype(np.float32) for name in ("x", "z")}
    expected = run(model, feed)
    lower(model, RUNTIMES["openvino"].changes(LIMITS[limits]))
    kept = [node for node in model.graph.node if node.op_type == "Max"]
    assert len(kept) == (1 if (limits, quantized) == ("split", "both") else 0)
    assert np.array_equal(run(model, feed), expected)
    assert difference(run(model, feed), run(model, {**feed, "z": feed["z"] + 0.1})) > TOLERANCE


@pytest.mark.parametrize("shape", [(6, 4, 4), (6, 9)])
def test_group_normalisation_for_onnx_runtime(shape):
    generator = np.random.default_rng(0)
    tensors = {name: generator.standard_normal(6).astype(np.float32) for name in ("scale", "bias")}
    graph = helper.make_graph(
        [helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=3, epsilon=0.1)],
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *shape])],
        [numpy_helper.from_array(values, name) for name, values in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feed = {"x": generator.standard_normal((2, *shape)).astype(np.float32)}
    feed["x"][:, 0] += 3  # groups differ, and so do their channels
    expected = run(model, feed)
    lower(model, RUNTIMES["onnxruntime"].changes(ProductLimits()))
    assert "GroupNormalization" not in [node.op_type for node in model.graph.node]
    assert difference(run(model, feed), expected) < TOLERANCE
    planted = next(node for node in model.graph.node if node.op_type == "InstanceNormalization")
    planted.attribute[0].f = 0.2
    assert difference(run(model, feed), expected) > TOLERANCE
