"""Which integer products of a runtime are exact on this CPU, found by running a model of extremes on it.

CPUs without VNNI multiply bytes in pairs and add each pair in 16 bits. Two products of 255·127 do not fit: sums
saturate, a layer's output is off by up to a half, and nothing is said. Two of 255·64 do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from qdiff.deploy.onnx_lowering import ProductLimits, lower
from qdiff.deploy.onnx_rewriting import HALF, MIDDLE, Change
from qdiff.errors import UserError

if TYPE_CHECKING:
    import onnx

    from qdiff.deploy.runtime import OnnxRuntime

TERMS, CHANNELS, COLUMNS, LARGEST = 64, 16, 4, 255
EXACT = 1e-5

Changes = Callable[[ProductLimits], Mapping[str, Change]]
Open = Callable[[Any, int], Callable[[dict], list[np.ndarray]]]


def check_exact(runtime: OnnxRuntime) -> ProductLimits:
    """Return how models must be lowered for a runtime's products to be exact here.

    Raises:
        UserError: they are not, however models are lowered.
    """
    limits = _exact_lowering(runtime.changes, runtime.open)
    if limits is None:
        raise UserError(
            f"the integer products of {runtime.name} saturate on this CPU, which has no VNNI; give --runtime "
            "torch-int8 or simulated"
        )
    return limits


@functools.cache
def _exact_lowering(changes: Changes, open_runtime: Open) -> ProductLimits | None:
    limits = limits_of(changes, open_runtime)
    if limits is None or limits == ProductLimits():
        return limits
    # What was lowered to keep within the limits is run as well.
    return limits if all(_exact_products(changes, open_runtime, MIDDLE, limits)) else None


@functools.cache
def limits_of(changes: Changes, open_runtime: Open) -> ProductLimits | None:
    """Return which products of a runtime are exact as they are, or None: not even those of half the range.

    Args:
        changes: how the runtime's models are lowered (`qdiff.deploy.runtime.OnnxRuntime`).
        open_runtime: opens a lowered model with a number of threads.
    """
    for largest in (MIDDLE, HALF):
        *weights, activations = _exact_products(changes, open_runtime, largest, ProductLimits())
        if all(weights):
            return ProductLimits(largest, activations)
    return None


def _exact_products(changes: Changes, open_runtime: Open, largest: int, limits: ProductLimits) -> list[bool]:
    """Return which outputs of `_extremes` come out right: those of weights, then that of two activations."""
    model = _extremes(largest)
    lower(model, changes(limits))
    signed = np.where(np.arange(COLUMNS) % 2 == 0, MIDDLE - 1, -MIDDLE).astype(np.float32)
    feed = {
        "bytes": np.full((1, TERMS, 3, 3), LARGEST, np.float32),
        "centred": np.full((1, TERMS, 3, 3), LARGEST - MIDDLE, np.float32),
        "rows": np.full((1, 2, TERMS), LARGEST, np.float32),
        "columns": np.tile(signed, (1, TERMS, 1)),
    }
    weights = TERMS * (_alternating(largest).astype(np.float64) - MIDDLE)
    column = weights.reshape(-1, 1, 1)
    expected = (9 * LARGEST * column, (LARGEST - MIDDLE) * column, LARGEST * weights, TERMS * LARGEST * signed)
    found = open_runtime(model, 1)(feed)
    return [bool(np.abs(out / right - 1).max() < EXACT) for out, right in zip(found, expected, strict=True)]


def _alternating(largest: int) -> np.ndarray:
    """Return each output channel's integer, with 128 as zero point: the largest weight and its negative in turn."""
    signs = np.where(np.arange(CHANNELS) % 2 == 0, largest, -largest)
    return (np.minimum(signs, MIDDLE - 1) + MIDDLE).astype(np.uint8)


def _extremes(largest: int) -> onnx.ModelProto:
    """Convolutions, a linear layer and a product of two activations; all of the largest integers, weights as given."""
    from onnx import TensorProto, helper, numpy_helper

    def integers(*kernel: int) -> np.ndarray:
        channels = _alternating(largest).reshape(-1, 1, *[1] * len(kernel))
        return np.broadcast_to(channels, (CHANNELS, TERMS, *kernel))

    stored = {
        "one": np.float32(1),
        "none": np.uint8(0),
        "half": np.uint8(MIDDLE),
        "ones": np.ones(CHANNELS, np.float32),
        "middle": np.full(CHANNELS, MIDDLE, np.uint8),
        "integers_3x3": integers(3, 3),
        "integers_1x1": integers(1, 1),
        "integers": integers(),
    }
    inputs = {
        "bytes": ("none", (1, TERMS, 3, 3)),
        "centred": ("half", (1, TERMS, 3, 3)),
        "rows": ("none", (1, 2, TERMS)),
        "columns": ("half", (1, TERMS, COLUMNS)),
    }
    nodes = []
    for name, (zero_point, _) in inputs.items():
        nodes.append(helper.make_node("QuantizeLinear", [name, "one", zero_point], [f"{name}.q"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}.q", "one", zero_point], [f"{name}.d"]))
    for name in ("integers_3x3", "integers_1x1", "integers"):
        nodes.append(helper.make_node("DequantizeLinear", [name, "ones", "middle"], [f"{name}.d"], axis=0))
    nodes += [
        helper.make_node("Conv", ["bytes.d", "integers_3x3.d"], ["spatial"]),
        helper.make_node("Conv", ["centred.d", "integers_1x1.d"], ["pointwise"]),
        helper.make_node("Transpose", ["integers.d"], ["integers.t"], perm=[1, 0]),
        helper.make_node("MatMul", ["rows.d", "integers.t"], ["linear"]),
        helper.make_node("MatMul", ["rows.d", "columns.d"], ["activations"]),
    ]
    outputs = {
        "spatial": (1, CHANNELS, 1, 1),
        "pointwise": (1, CHANNELS, 3, 3),
        "linear": (1, 2, CHANNELS),
        "activations": (1, 2, COLUMNS),
    }

    def described(name: str, shape: tuple[int, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        nodes,
        "extremes",
        [described(name, shape) for name, (_, shape) in inputs.items()],
        [described(name, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(np.ascontiguousarray(values), name) for name, values in stored.items()],
        value_info=[described(f"{name}.d", inputs[name][1]) for name in ("bytes", "centred")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
