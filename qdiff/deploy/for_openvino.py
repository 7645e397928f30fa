"""What OpenVINO's integer kernels take: weights whose zero points are 0.

Up to 7 bits q − z fits int8. Of 8 bits q − 128 is taken, and the missing δ·(128 − z)·Σx is added.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from qdiff.deploy.onnx_rewriting import Rewriting, Weight, of_integers

if TYPE_CHECKING:
    import onnx

NO_BIAS = 1e-30  # vanishes in every sum, and is not 0, which would be taken out


def _without_zero_points(graph: Rewriting, product: onnx.NodeProto, given: onnx.NodeProto, weight: Weight) -> None:
    output, (integers, zero_points) = product.output[0], weight.shifted()

    def operand(name: str, values: np.ndarray, scale: str) -> str:
        zeros = graph.constant(f"{name}.zero", np.zeros(len(values), np.int8))
        operands = [graph.constant(f"{name}.integers", values), scale, zeros]
        made = graph.node("DequantizeLinear", operands, f"{name}.weight", axis=0)
        # Behind the node, as the file has it: OpenVINO takes integers with the output channels first.
        return graph.node("Transpose", [made], f"{name}.transposed", perm=[1, 0]) if weight.transposed else made

    product.input[1] = operand(output, integers, weight.scale)
    graph.nodes.append(product)
    if product.op_type == "Conv" and not (len(product.input) > 2 and graph.array(product.input[2]).any()):
        _add_bias(graph, product, len(integers))
    if not zero_points.any():
        return
    # One more output channel, of ones, whose kernel sums windows in integers too.
    ones, one = np.ones_like(integers[:1]), graph.constant("qdiff.one", np.ones(1, np.float32))
    window = type(product).FromString(product.SerializeToString())
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


def _add_bias(graph: Rewriting, conv: onnx.NodeProto, channels: int) -> None:
    """Give a convolution without a bias one that changes nothing.

    OpenVINO (2026.4) otherwise adds what comes behind it, a residual, to its output before that is scaled.
    """
    del conv.input[2:]
    conv.input.append(graph.constant(f"qdiff.bias.{channels}", np.full(channels, NO_BIAS, np.float32)))


CHANGES = dict.fromkeys(("Conv", "Gemm", "MatMul"), of_integers(_without_zero_points))
