"""Rewrite an exported model for a runtime's integer kernels; its results stay the same.

The file has the general form: products of dequantized operands, each with zero points. Kernels accept special forms.
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
    """Which integer products are exact, as found by `qdiff.deploy.exactness`; by default all of them.

    Attributes:
        weight: the largest |q| of a weight, with or without zero point, whose products with bytes are exact.
        activations: whether products of two quantized activations are exact.
    """

    weight: int = MIDDLE
    activations: bool = True


def lower(model: onnx.ModelProto, changes: Mapping[str, Change]) -> None:
    """Rewrite a model of `qdiff.deploy.onnx_export` for a runtime, in place.

    Args:
        changes: changes of a runtime (`qdiff.deploy.runtime.OnnxRuntime`) for the limits of its products. ONNX Runtime
            keeps them by the choice of kernels, not by rewriting.
    """
    expand(model)
    Rewriting(model).rewrite(changes)
