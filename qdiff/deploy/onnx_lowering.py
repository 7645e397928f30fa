"""Rewrite an exported model into what a runtime's integer kernels take; what it computes stays the same.

The file says it the plain way: a product of dequantized operands, each with zero points. Kernels are choosier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qdiff.deploy.onnx_rewriting import MIDDLE, Change, Rewriting
from qdiff.deploy.onnx_weights import expand

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class ProductLimits:
    """Which integer products are exact; found by `qdiff.deploy.exactness`. As it stands here, all of them.

    Attributes:
        weight: the largest |q| of a weight, zero points taken off or not, whose products with bytes are exact.
        activations: whether products of two quantized activations are.
    """

    weight: int = MIDDLE
    activations: bool = True


def lower(model: onnx.ModelProto, changes: Mapping[str, Change]) -> None:
    """Rewrite a model of `qdiff.deploy.onnx_export` for a runtime, in place.

    Args:
        changes: a runtime's (`qdiff.deploy.runtime.OnnxRuntime`), for the limits of its products. Those of ONNX Runtime
            are kept by its choice of kernels, not by rewriting.
    """
    expand(model)
    Rewriting(model).rewrite(changes)
