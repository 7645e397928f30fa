"""OpenVINO, and what its integer kernels take: weights whose zero points are 0.

Up to 7 bits q − z fits int8. Of 8 bits q − 128 is taken, and the missing δ·(128 − z)·Σx is added.

Where products of large weights are not exact (`qdiff.deploy.exactness`), such a weight w becomes two of half its size,
w = h + (w − h) with h = ⌊w/2⌋, side by side: the product of twice as many input channels, [x, x]·[h, w − h], is the
same sum. Products of two activations are then computed in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from qdiff.deploy.onnx_export import import_extra
from qdiff.deploy.onnx_rewriting import Change, Rewriting, Weight, of_integers
from qdiff.deploy.runtime import OnnxRuntime, Run
from qdiff.errors import UserError

if TYPE_CHECKING:
    import onnx

    from qdiff.deploy.onnx_lowering import ProductLimits

NO_BIAS = 1e-30  # vanishes in every sum, and is not 0, which would be taken out
MOVES = ("Transpose", "Reshape")  # what integers pass through on their way to a product


def changes(limits: ProductLimits) -> Mapping[str, Change]:
    """Return what comes in the place of which operations.

    Args:
        limits: beyond which products are split, or computed in float32.
    """
    integer = of_integers(partial(_without_zero_points, largest=limits.weight))

    def product_of_activations(graph: Rewriting, product: onnx.NodeProto) -> None:
        if graph.weight(product) is None and not limits.activations:
            _keep_in_float(graph, product)
        integer(graph, product)

    return {"Conv": integer, "Gemm": integer, "MatMul": product_of_activations}


def _without_zero_points(
    graph: Rewriting, product: onnx.NodeProto, given: onnx.NodeProto, weight: Weight, largest: int
) -> None:
    output, (integers, zero_points) = product.output[0], weight.shifted()
    groups = next((a.i for a in product.attribute if a.name == "group"), 1)
    if groups != 1:  # neither the window of ones nor two halves of a weight are per group
        raise UserError(
            f"{output} is a convolution of {groups} groups, which openvino is not given in integers; give --runtime "
            "onnxruntime or simulated"
        )

    def operand(name: str, values: np.ndarray, scale: str) -> str:
        zeros = graph.constant(f"{name}.zero", np.zeros(len(values), np.int8))
        operands = [graph.constant(f"{name}.integers", values), scale, zeros]
        made = graph.node("DequantizeLinear", operands, f"{name}.weight", axis=0)
        # Behind the node, as the file has it: OpenVINO takes integers with the output channels first.
        return graph.node("Transpose", [made], f"{name}.transposed", perm=[1, 0]) if weight.transposed else made

    window = type(product).FromString(product.SerializeToString())
    values = integers
    if np.abs(integers.astype(np.int16)).max() > largest:
        half = integers // 2
        values = np.concatenate([half, integers - half], axis=1)
        product.input[0] = _twice(graph, given, 1 if product.op_type == "Conv" else -1)
    product.input[1] = operand(output, values, weight.scale)
    graph.nodes.append(product)
    if product.op_type == "Conv" and not (len(product.input) > 2 and graph.array(product.input[2]).any()):
        _add_bias(graph, product, len(integers))
    if not zero_points.any():
        return
    # One more output channel, of ones, whose kernel sums windows in integers too.
    ones, one = np.ones_like(integers[:1]), graph.constant("qdiff.one", np.ones(1, np.float32))
    window.input[1] = operand(f"{output}.window", ones, one)
    del window.input[2:]
    window.output[0] = f"{output}.window.sum"
    product.output[0] = f"{output}.product"
    shape = (-1,) if product.op_type != "Conv" else (-1, *[1] * (integers.ndim - 2))
    shift = graph.array(weight.scale) * -zero_points.astype(np.float32)
    missing = graph.constant(f"{output}.shift", shift.reshape(shape))
    graph.nodes.append(window)
    graph.node("Mul", [window.output[0], missing], f"{output}.missing")
    graph.node("Add", [product.output[0], f"{output}.missing"], output)


def _twice(graph: Rewriting, given: onnx.NodeProto, axis: int) -> str:
    """Append what repeats the channels of a quantized input, in bytes; products of one input share it."""
    integers, scale, zero_point = given.input
    repeated = graph.node("Concat", [integers, integers], f"{integers}.twice.{axis}", axis=axis)
    return graph.node("DequantizeLinear", [repeated, scale, zero_point], f"{given.output[0]}.twice.{axis}")


def _keep_in_float(graph: Rewriting, product: onnx.NodeProto) -> None:
    """Keep a product of two quantized activations in float32: integers do not pass a maximum, which changes nothing."""
    node = graph.made_by.get(product.input[1])
    while node is not None and node.op_type in MOVES:
        node = graph.made_by.get(node.input[0])
    if node is None or node.op_type != "DequantizeLinear":
        return
    lowest = graph.constant("qdiff.lowest", np.array(np.finfo(np.float32).min, np.float32))
    product.input[1] = graph.node("Max", [product.input[1], lowest], f"{product.output[0]}.float")


def _add_bias(graph: Rewriting, conv: onnx.NodeProto, channels: int) -> None:
    """Give a convolution without a bias one that changes nothing.

    OpenVINO (2026.4) otherwise adds what comes behind it, a residual, to its output before that is scaled.
    """
    del conv.input[2:]
    conv.input.append(graph.constant(f"qdiff.bias.{channels}", np.full(channels, NO_BIAS, np.float32)))


def _open(model: onnx.ModelProto, threads: int) -> Run:
    openvino = import_extra("openvino")
    core = openvino.Core()
    # Elsewhere it may choose bfloat16 for what is not quantized, or quantize it by ranges of its own.
    core.set_property("CPU", {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0})
    core.set_property("CPU", {"INFERENCE_NUM_THREADS": threads})
    compiled = core.compile_model(core.read_model(model.SerializeToString()), "CPU")
    # By place: an input that is also an output (the state of the first layer) loses its name.
    names = [each.name for each in model.graph.input]
    return lambda feed: [value.copy() for value in compiled([feed[name] for name in names]).values()]


OPENVINO = OnnxRuntime(name="openvino", package="openvino", changes=changes, open=_open)
