"""Weights of an exported model: four bits in the file, int8 for the kernels.

Kernels take int8 weights whose zero point is 0. Weights of up to 4 bits span up to 31 such levels, [−15, 15], but no
more than 16 in any channel, so the file stores them as UINT4 with a zero point a channel, which is standard ONNX;
`expand` turns that back before a runtime sees it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

LEVELS = 16  # of 4 bits


def compact(model: onnx.ModelProto) -> None:
    """Store every int8 weight whose channels have 16 levels or fewer as UINT4, in place."""
    from onnx import TensorProto, numpy_helper

    for weight, zero in _weights(model, TensorProto.INT8):
        values = numpy_helper.to_array(weight).astype(np.int16)
        rows = values.reshape(len(values), -1)
        zero_points = np.clip(-rows.min(axis=1), 0, LEVELS - 1)
        stored = rows + zero_points[:, None]
        if stored.min() < 0 or stored.max() >= LEVELS:
            continue
        _replace(weight, TensorProto.UINT4, values.shape, _pairs(stored))
        _replace(zero, TensorProto.UINT4, zero_points.shape, _pairs(zero_points))


def expand(model: onnx.ModelProto) -> None:
    """Inverse of `compact`, in place."""
    from onnx import TensorProto

    for weight, zero in _weights(model, TensorProto.UINT4):
        shape = tuple(weight.dims)
        values = _nibbles(weight.raw_data, int(np.prod(shape))).reshape(shape[0], -1)
        values -= _nibbles(zero.raw_data, shape[0])[:, None]
        _replace(weight, TensorProto.INT8, shape, values)
        _replace(zero, TensorProto.INT8, (shape[0],), np.zeros(shape[0], dtype=np.int8))


def _weights(model: onnx.ModelProto, kind: int) -> Iterator[tuple[onnx.TensorProto, onnx.TensorProto]]:
    """Yield (integers, zero points) of the weights that are stored as a data type."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    own_zeros = set()
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in stored:
            continue
        weight, zero = stored[node.input[0]], stored[node.input[2]]
        if weight.data_type != kind:
            continue
        if zero.name in own_zeros:  # the exporter may have merged equal ones
            copy = model.graph.initializer.add()
            copy.CopyFrom(zero)
            copy.name = node.input[2] = f"{weight.name}.zero_point"
            zero = copy
        own_zeros.add(zero.name)
        yield weight, zero


def _replace(tensor: onnx.TensorProto, kind: int, shape: tuple[int, ...], values: np.ndarray) -> None:
    from onnx import helper

    made = helper.make_tensor(tensor.name, kind, shape, values.tobytes(), raw=True)
    tensor.CopyFrom(made)


def _pairs(values: np.ndarray) -> np.ndarray:
    """Pack numbers from 0 to 15, two a byte, the first in the low half."""
    flat = values.astype(np.uint8).reshape(-1)
    flat = np.append(flat, np.zeros(len(flat) % 2, dtype=np.uint8))
    return flat[::2] | flat[1::2] << 4


def _nibbles(packed: bytes, count: int) -> np.ndarray:
    """Inverse of `_pairs`, int8."""
    both = np.frombuffer(packed, dtype=np.uint8)
    return np.stack([both & 15, both >> 4], axis=1).reshape(-1)[:count].astype(np.int8)
