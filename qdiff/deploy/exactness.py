"""Whether a runtime's integer kernels are exact on this CPU.

Without VNNI they may add pairs of products in 16 bits, which do not hold two of 255·127: sums saturate, a layer's
output is off by a third, and nothing is said.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from qdiff.deploy.onnx_lowering import lower
from qdiff.errors import UserError

if TYPE_CHECKING:
    import onnx

TERMS, CHANNELS, LARGEST = 64, 16, 255
EXACT = 1e-5

Open = Callable[[Any, int], Callable[[dict], list[np.ndarray]]]


def check_exact(runtime: str, open_runtime: Open) -> None:
    """Raise a `UserError` where a runtime's integer products saturate here.

    Args:
        open_runtime: opens a lowered model with a number of threads.
    """
    if not is_exact(runtime, open_runtime):
        raise UserError(
            f"the integer products of {runtime} saturate on this CPU, which has no VNNI; give --runtime torch-int8 or "
            "simulated"
        )


@functools.cache
def is_exact(runtime: str, open_runtime: Open) -> bool:
    """Whether the products of the largest integers come out right; see `check_exact`."""
    model = _extremes()
    lower(model, runtime)
    feed = {"x": np.full((1, TERMS, 2, 2), LARGEST, np.float32), "y": np.full((1, 2, TERMS), LARGEST, np.float32)}
    expected = TERMS * LARGEST * (LARGEST - 128)
    return all(np.abs(out / expected - 1).max() < EXACT for out in open_runtime(model, 1)(feed))


def _extremes() -> onnx.ModelProto:
    """A convolution and a product of two activations, all of the largest integers."""
    from onnx import TensorProto, helper, numpy_helper

    stored = {
        "one": np.float32(1),
        "none": np.uint8(0),
        "integers": np.full((CHANNELS, TERMS, 1, 1), LARGEST, np.uint8),
        "ones": np.ones(CHANNELS, np.float32),
        "middle": np.full(CHANNELS, 128, np.uint8),
        "flat": np.array([1, TERMS, 4]),
        "half": np.uint8(128),
        "half_float": np.float32(128),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "one", "none"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "one", "none"], ["xd"]),
        helper.make_node("DequantizeLinear", ["integers", "ones", "middle"], ["weight"], axis=0),
        helper.make_node("Conv", ["xd", "weight"], ["a"]),
        helper.make_node("Sub", ["x", "half_float"], ["shifted"]),
        helper.make_node("Reshape", ["shifted", "flat"], ["z"]),
        helper.make_node("QuantizeLinear", ["z", "one", "half"], ["zq"]),
        helper.make_node("DequantizeLinear", ["zq", "one", "half"], ["zd"]),
        helper.make_node("QuantizeLinear", ["y", "one", "none"], ["yq"]),
        helper.make_node("DequantizeLinear", ["yq", "one", "none"], ["yd"]),
        helper.make_node("MatMul", ["yd", "zd"], ["b"]),
    ]
    graph = helper.make_graph(
        nodes,
        "extremes",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, TERMS, 2, 2]),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2, TERMS]),
        ],
        [
            helper.make_tensor_value_info("a", TensorProto.FLOAT, [1, CHANNELS, 2, 2]),
            helper.make_tensor_value_info("b", TensorProto.FLOAT, [1, 2, 4]),
        ],
        [numpy_helper.from_array(np.asarray(values), name) for name, values in stored.items()],
        value_info=[helper.make_tensor_value_info("xd", TensorProto.FLOAT, [1, TERMS, 2, 2])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
