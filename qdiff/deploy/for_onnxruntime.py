"""ONNX Runtime, and what its integer kernels take: matrix products.

Its integer convolution wants its output quantized too, but its integer matrix product gives float32, and takes zero
points: a convolution becomes a product of the windows of its input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qdiff.deploy.exactness import limits_of
from qdiff.deploy.onnx_export import import_extra
from qdiff.deploy.onnx_rewriting import Change, Rewriting, Weight, of_integers
from qdiff.deploy.runtime import OnnxRuntime, Run

if TYPE_CHECKING:
    import onnx

    from qdiff.deploy.onnx_lowering import ProductLimits

OWN = "com.microsoft"  # the domain of the runtime's own operations


def _as_matrix_product(graph: Rewriting, product: onnx.NodeProto, given: onnx.NodeProto, weight: Weight) -> None:
    output, (integers, zero_points) = product.output[0], weight.shifted()
    is_conv = product.op_type == "Conv"
    operand, scale, zero_point = given.input
    windows = _windows(graph, product, operand, zero_point, weight) if is_conv else operand
    if windows is None:
        graph.nodes.append(product)
        return
    rows = np.moveaxis(integers, (0, 1), (-1, -2)).reshape(-1, len(integers))
    # Without zero points it need not sum the rows of its first operand. An input without a name is one left out.
    zeros = graph.constant(f"{output}.zeros", zero_points) if zero_points.any() else ""
    operands = [windows, graph.constant(f"{output}.rows", rows), scale, weight.scale, zero_point, zeros]
    made = f"{output}.product" if is_conv else output
    graph.node("MatMulIntegerToFloat", [*operands, *product.input[2:]], made, domain=OWN)
    if is_conv:
        rank = integers.ndim
        graph.node("Transpose", [made], output, perm=[0, rank - 1, *range(1, rank - 1)])


def _windows(graph: Rewriting, conv: onnx.NodeProto, integers: str, zero_point: str, weight: Weight) -> str | None:
    """Append what gathers a convolution's windows as integers, [N, …, K·I]; None for what no network here has."""
    from onnx import helper

    channels, *kernel = weight.integers.shape[1:]
    rank, size = len(kernel), graph.sizes.get(conv.input[0])
    attributes = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
    pads, strides = attributes.get("pads", [0] * 2 * rank), attributes.get("strides", [1] * rank)
    plain = attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and attributes.get("group", 1) == 1
    if size is None or not plain or any(d != 1 for d in attributes.get("dilations", [])):
        return None
    name = f"{integers}.windows.{_text(*kernel, *strides, *pads)}"  # products of one input share them
    gathered = graph.node("Transpose", [integers], f"{integers}.last", perm=[0, *range(2, rank + 2), 1])
    if any(pads):
        widths = np.array([0, *pads[:rank], 0, 0, *pads[rank:], 0], np.int64)
        size = [side + pads[i] + pads[rank + i] for i, side in enumerate(size)]
        widths_name = graph.constant(f"qdiff.pads.{_text(*pads)}", widths)
        gathered = graph.node("Pad", [gathered, widths_name, zero_point], f"{name}.padded")
    if any(k != 1 for k in (*kernel, *strides)):
        places, out = _places(size, kernel, strides)
        flat = graph.constant(f"qdiff.flat.{channels}", np.array([0, -1, channels]))
        unfolded = graph.constant(f"qdiff.unfolded.{_text(*out, *kernel, channels)}", np.array([0, *out, -1]))
        where = graph.constant(f"qdiff.places.{_text(*size, *kernel, *strides)}", places)
        gathered = graph.node("Reshape", [gathered, flat], f"{name}.flat")
        gathered = graph.node("Gather", [gathered, where], f"{name}.gathered", axis=1)
        gathered = graph.node("Reshape", [gathered, unfolded], name)
    return gathered


def _places(size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Return where in a flattened input each window's values lie, [windows, K], and how many windows each side has."""
    out = [(side - k) // s + 1 for side, k, s in zip(size, kernel, strides, strict=True)]
    corners = np.ravel_multi_index(np.indices(out).reshape(len(out), -1) * np.array(strides)[:, None], size)
    return corners[:, None] + np.ravel_multi_index(np.indices(kernel).reshape(len(out), -1), size), out


def _text(*numbers: int) -> str:
    return "x".join(map(str, numbers))


def _normalised(graph: Rewriting, norm: onnx.NodeProto) -> None:
    """Group normalisation by the kernel of instance normalisation: the runtime has none, and expands it to 20 nodes."""
    from onnx import helper

    (x, scale, bias), output = norm.input, norm.output[0]
    attributes = {a.name: helper.get_attribute_value(a) for a in norm.attribute}
    groups, channels = attributes["num_groups"], len(graph.array(scale))
    by_group = graph.constant(f"qdiff.groups.{groups}", np.array([0, groups, -1]))
    by_channel = graph.constant(f"qdiff.channels.{channels}", np.array([0, channels, -1]))
    one = graph.constant(f"qdiff.ones.{groups}", np.ones(groups, np.float32))
    none = graph.constant(f"qdiff.zeros.{groups}", np.zeros(groups, np.float32))
    scale, bias = (graph.constant(f"{name}.column", graph.array(name).reshape(-1, 1)) for name in (scale, bias))
    made = graph.node("Reshape", [x, by_group], f"{output}.groups")
    made = graph.node("InstanceNormalization", [made, one, none], f"{output}.normal", epsilon=attributes["epsilon"])
    made = graph.node("Reshape", [made, by_channel], f"{output}.channels")
    made = graph.node("Mul", [made, scale], f"{output}.scaled")
    made = graph.node("Add", [made, bias], f"{output}.shifted")
    graph.node("Reshape", [made, graph.node("Shape", [x], f"{x}.shape")], output)


def changes(limits: ProductLimits) -> Mapping[str, Change]:
    """Return what comes in the place of which operations; what is exact is left to the choice of kernels."""
    # Not Gemm (the embedding of t, one row per sample): its product would come back as one, and be computed in float.
    return {
        **dict.fromkeys(("Conv", "MatMul"), of_integers(_as_matrix_product)),
        "GroupNormalization": _normalised,
    }


def largest_weight(model: onnx.ModelProto) -> int:
    """Return the largest |q| among the weights of a lowered model's integer products; 0 where there are none."""
    from onnx.numpy_helper import to_array

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    weights = [node.input[1] for node in model.graph.node if node.op_type == "MatMulIntegerToFloat"]
    arrays = (to_array(stored[name]).astype(np.int16) for name in weights)
    return max((int(np.abs(values).max()) for values in arrays), default=0)


def _open(model: onnx.ModelProto, threads: int) -> Run:
    fast = limits_of(changes, _fast_session)
    return _session(model, threads, fast is not None and fast.activations and largest_weight(model) <= fast.weight)


def _fast_session(model: onnx.ModelProto, threads: int) -> Run:
    return _session(model, threads, fast=True)


def _session(model: onnx.ModelProto, threads: int, fast: bool) -> Run:
    onnxruntime = import_extra("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # Or it would quantize float activations that meet quantized weights, by ranges of its own.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not fast:  # kernels that never add pairs of products in 16 bits, and take twice the time; with VNNI none does
        options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        disabled_optimizers=["WeightBiasQuantization"],  # which rounds biases
    )
    return lambda feed: session.run(None, feed)


ONNXRUNTIME = OnnxRuntime(name="onnxruntime", package="onnxruntime", changes=changes, open=_open)
