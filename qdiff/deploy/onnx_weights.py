"""Weights of an exported model: stored as UINT4 where they fit, expanded to UINT8 before rewriting or running."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

LEVELS = 16  # levels of 4 bits


def compact(model: onnx.ModelProto) -> None:
    """Store every weight whose integers and zero points are all below 16 as UINT4 (standard ONNX), in place."""
    from onnx import TensorProto, numpy_helper

    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    readers = defaultdict(list)  # the exporter may have merged equal integers, and equal zero points
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in stored:
            readers[node.input[0]].append(node)
    for name, nodes in readers.items():
        tensors = [stored[name], *(stored[node.input[2]] for node in nodes)]
        if any(t.data_type != TensorProto.UINT8 or numpy_helper.to_array(t).max() >= LEVELS for t in tensors):
            continue
        for number, node in enumerate(nodes):
            zero = model.graph.initializer.add()
            zero.CopyFrom(stored[node.input[2]])
            zero.name = node.input[2] = f"{name}.zero_point.{number}"
            _store_as(zero, TensorProto.UINT4)
        _store_as(stored[name], TensorProto.UINT4)
    keep_initialisers(model.graph, {name for node in model.graph.node for name in node.input})


def keep_initialisers(graph: onnx.GraphProto, names: set[str]) -> None:
    """Delete every stored tensor whose name is not among ``names``."""
    for place in reversed(range(len(graph.initializer))):
        if graph.initializer[place].name not in names:
            del graph.initializer[place]


def expand(model: onnx.ModelProto) -> None:
    """Store UINT4 tensors as UINT8, in place."""
    from onnx import TensorProto

    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.UINT4:
            _store_as(tensor, TensorProto.UINT8)


def _store_as(tensor: onnx.TensorProto, kind: int) -> None:
    from onnx import helper, numpy_helper

    values = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(kind))
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
