"""Rewrite an exported model into what a runtime's integer kernels take; what it computes stays the same.

The file says it the plain way: a product of dequantized operands, each with zero points. Kernels are choosier.
OpenVINO's take weights whose zero points are 0: up to 7 bits q − z fits int8, and of 8 bits q − 128 is taken and the
missing δ·(128 − z)·Σx is added. ONNX Runtime's integer convolution wants its output quantized too, but its integer
matrix product gives float32 and takes zero points: a convolution becomes a product of the windows of its input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from qdiff.deploy.onnx_weights import expand, keep_initialisers

if TYPE_CHECKING:
    import onnx

PRODUCTS = ("Conv", "Gemm", "MatMul")
MIDDLE = 128  # of 8 bits
NO_BIAS = 1e-30  # vanishes in every sum, and is not 0, which would be taken out


@dataclass(frozen=True)
class _Weight:
    """Integers of a product's second operand, with the output channels first.

    Attributes:
        integers: int16 [O, I, …].
        zero_points: int16 [O].
        scale: name of δ [O].
        transposed: the product takes [I, O].
    """

    integers: np.ndarray
    zero_points: np.ndarray
    scale: str
    transposed: bool

    @property
    def centred(self) -> np.ndarray | None:
        """int8 q − z; None where that does not fit."""
        return _int8(self.integers - self._along_channels(self.zero_points))

    @property
    def shifted(self) -> tuple[np.ndarray, np.ndarray]:
        """int8 q and z, both less the same number, which is 0 for z where it can be."""
        if self.centred is not None:
            return self.centred, np.zeros(len(self.zero_points), np.int8)
        return (self.integers - MIDDLE).astype(np.int8), (self.zero_points - MIDDLE).astype(np.int8)

    def _along_channels(self, values: np.ndarray) -> np.ndarray:
        return values.reshape(-1, *[1] * (self.integers.ndim - 1))


def _int8(values: np.ndarray) -> np.ndarray | None:
    fits = values.min() >= -MIDDLE and values.max() < MIDDLE
    return values.astype(np.int8) if fits else None


class _Rewriting:
    """A graph whose nodes are gone through in order; new ones are appended in the place of the one at hand."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.stored = {tensor.name: tensor for tensor in self.graph.initializer}
        self.made_by = {output: node for node in self.graph.node for output in node.output}
        self.sizes = {value.name: side for value in self.graph.value_info if (side := _sides(value)) is not None}
        self.nodes: list[onnx.NodeProto] = []
        self._done: set[str] = set()
        self._made: list[str] = []

    def constant(self, name: str, values: np.ndarray) -> str:
        """Store a tensor under a name, once."""
        from onnx import numpy_helper

        if name not in self.stored:
            self.stored[name] = numpy_helper.from_array(np.ascontiguousarray(values), name)
            self._made.append(name)
        return name

    def node(self, op: str, inputs: list[str], output: str, **attributes: object) -> str:
        """Append a node, unless its output is there already, and return its output."""
        from onnx import helper

        if output not in self._done:
            self.nodes.append(helper.make_node(op, inputs, [output], **attributes))
            self._done.add(output)
        return output

    def array(self, name: str) -> np.ndarray:
        from onnx import numpy_helper

        return numpy_helper.to_array(self.stored[name])

    def weight(self, product: onnx.NodeProto) -> _Weight | None:
        """Return the quantized weight of a product, or None."""
        node = self.made_by.get(product.input[1])
        transposed = node is not None and node.op_type == "Transpose"
        if transposed:
            node = self.made_by.get(node.input[0])
        if node is None or node.op_type != "DequantizeLinear" or node.input[0] not in self.stored:
            return None
        integers, zero_points = (self.array(name).astype(np.int16) for name in (node.input[0], node.input[2]))
        return _Weight(integers, zero_points, node.input[1], transposed)

    def quantized_input(self, product: onnx.NodeProto) -> onnx.NodeProto | None:
        """Return the node that dequantizes what a product takes, or None where that was not quantized."""
        node = self.made_by.get(product.input[0])
        found = node is not None and node.op_type == "DequantizeLinear" and node.input[0] not in self.stored
        return node if found else None

    def rewrite(self, change: Callable[[_Rewriting, onnx.NodeProto, onnx.NodeProto, _Weight], None]) -> None:
        """Call ``change(self, product, dequantized input, weight)`` for every integer product; drop what is unused."""
        for node in self.graph.node:
            weight = self.weight(node) if node.op_type in PRODUCTS else None
            given = None if weight is None else self.quantized_input(node)
            if given is None:
                self.nodes.append(node)
            else:
                change(self, node, given, weight)
        wanted, kept = {output.name for output in self.graph.output}, []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(node.input)
                kept.append(node)
        nodes = [type(node).FromString(node.SerializeToString()) for node in reversed(kept)]
        del self.graph.node[:]
        self.graph.node.extend(nodes)
        keep_initialisers(self.graph, wanted)
        self.graph.initializer.extend(self.stored[name] for name in self._made if name in wanted)


def _sides(value: onnx.ValueInfoProto) -> list[int] | None:
    """Return the sides of what [N, C, …] describes; None where they are not fixed."""
    sides = [dim.dim_value for dim in value.type.tensor_type.shape.dim[2:]]
    return sides if all(sides) else None


def _dequantized(
    graph: _Rewriting, name: str, integers: np.ndarray, zero_points: np.ndarray, scale: str, axis: int
) -> str:
    """Append the node that dequantizes a constant."""
    operands = [graph.constant(f"{name}.integers", integers), scale, graph.constant(f"{name}.zero", zero_points)]
    return graph.node("DequantizeLinear", operands, f"{name}.weight", axis=axis)


# --- OpenVINO


def _without_zero_points(graph: _Rewriting, product: onnx.NodeProto, given: onnx.NodeProto, weight: _Weight) -> None:
    output = product.output[0]
    integers = weight.shifted[0]

    def operand(name: str, values: np.ndarray, scale: str) -> str:
        zero = np.zeros(len(values), np.int8)
        made = _dequantized(graph, name, values, zero, scale, axis=0)
        # Behind the node, as the file has it: OpenVINO takes integers with the output channels first.
        return graph.node("Transpose", [made], f"{name}.transposed", perm=[1, 0]) if weight.transposed else made

    product.input[1] = operand(output, integers, weight.scale)
    graph.nodes.append(product)
    if product.op_type == "Conv" and not (len(product.input) > 2 and graph.array(product.input[2]).any()):
        _add_bias(graph, product, len(integers))
    if weight.centred is not None:
        return
    # One more output channel, of ones, whose kernel sums windows in integers too.
    ones, one = np.ones_like(integers[:1]), graph.constant("qdiff.one", np.ones(1, np.float32))
    window = type(product).FromString(product.SerializeToString())
    window.input[1] = operand(f"{output}.window", ones, one)
    del window.input[2:]
    window.output[0] = f"{output}.window.sum"
    product.output[0] = f"{output}.product"
    shape = (-1,) if product.op_type != "Conv" else (-1, *[1] * (integers.ndim - 2))
    shift = graph.array(weight.scale) * (MIDDLE - weight.zero_points)
    missing = graph.constant(f"{output}.shift", shift.astype(np.float32).reshape(shape))
    graph.nodes.append(window)
    graph.node("Mul", [window.output[0], missing], f"{output}.missing")
    graph.node("Add", [product.output[0], f"{output}.missing"], output)


def _add_bias(graph: _Rewriting, conv: onnx.NodeProto, channels: int) -> None:
    """Give a convolution without a bias one that changes nothing.

    OpenVINO (2026.4) otherwise adds what comes behind it, a residual, to its output before that is scaled.
    """
    del conv.input[2:]
    conv.input.append(graph.constant(f"qdiff.bias.{channels}", np.full(channels, NO_BIAS, np.float32)))


# --- ONNX Runtime


def _as_matrix_product(graph: _Rewriting, product: onnx.NodeProto, given: onnx.NodeProto, weight: _Weight) -> None:
    output, (integers, zero_points) = product.output[0], weight.shifted
    is_conv = product.op_type == "Conv"
    operand = _windows(graph, product, given, weight) if is_conv else product.input[0]
    # A Gemm (the embedding of t, a row a sample) would come back as one, and be computed in float.
    if operand is None or product.op_type == "Gemm":
        graph.nodes.append(product)
        return
    rows = np.moveaxis(integers, (0, 1), (-1, -2)).reshape(-1, len(integers))
    steps = [("MatMul", [_dequantized(graph, output, rows, zero_points, weight.scale, axis=1)], {})]
    if bias := product.input[2:]:
        steps.append(("Add", list(bias), {}))
    if is_conv:
        rank = integers.ndim
        steps.append(("Transpose", [], {"perm": [0, rank - 1, *range(1, rank - 1)]}))
    for left, (op, others, attributes) in zip(reversed(range(len(steps))), steps, strict=True):
        operand = graph.node(op, [operand, *others], f"{output}.{left}" if left else output, **attributes)


def _windows(graph: _Rewriting, conv: onnx.NodeProto, given: onnx.NodeProto, weight: _Weight) -> str | None:
    """Append what gathers a convolution's windows as integers, [N, …, K·I]; None for what no network here has."""
    from onnx import helper

    channels, *kernel = weight.integers.shape[1:]
    rank, size = len(kernel), graph.sizes.get(conv.input[0])
    attributes = {a.name: helper.get_attribute_value(a) for a in conv.attribute}
    pads, strides = attributes.get("pads", [0] * 2 * rank), attributes.get("strides", [1] * rank)
    plain = attributes.get("auto_pad", b"NOTSET") == b"NOTSET" and attributes.get("group", 1) == 1
    if size is None or not plain or any(d != 1 for d in attributes.get("dilations", [])):
        return None
    integers, scale, zero_point = given.input
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
        gathered = graph.node("Reshape", [gathered, unfolded], f"{name}.unfolded")
    return graph.node("DequantizeLinear", [gathered, scale, zero_point], name)


def _places(size: Sequence[int], kernel: Sequence[int], strides: Sequence[int]) -> tuple[np.ndarray, list[int]]:
    """Return where in a flattened input each window's values lie, [windows, K], and how many windows each side has."""
    out = [(side - k) // s + 1 for side, k, s in zip(size, kernel, strides, strict=True)]
    corners = np.ravel_multi_index(np.indices(out).reshape(len(out), -1) * np.array(strides)[:, None], size)
    return corners[:, None] + np.ravel_multi_index(np.indices(kernel).reshape(len(out), -1), size), out


def _text(*numbers: int) -> str:
    return "x".join(map(str, numbers))


CHANGES = {"onnxruntime": _as_matrix_product, "openvino": _without_zero_points}


def lower(model: onnx.ModelProto, runtime: str) -> None:
    """Rewrite a model of `qdiff.deploy.onnx_export` for a runtime, in place.

    Args:
        runtime: one of `CHANGES`.
    """
    expand(model)
    _Rewriting(model).rewrite(CHANGES[runtime])
