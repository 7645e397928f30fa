"""Rewrite an exported model into what a runtime's integer kernels take; what it computes stays the same.

The file says it the plain way: a product of dequantized operands, each with zero points. Kernels are choosier.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qdiff.deploy import for_onnxruntime, for_openvino
from qdiff.deploy.onnx_rewriting import Rewriting
from qdiff.deploy.onnx_weights import expand

if TYPE_CHECKING:
    import onnx

CHANGES = {"onnxruntime": for_onnxruntime.CHANGES, "openvino": for_openvino.CHANGES}


def lower(model: onnx.ModelProto, runtime: str) -> None:
    """Rewrite a model of `qdiff.deploy.onnx_export` for a runtime, in place.

    Args:
        runtime: one of `CHANGES`.
    """
    expand(model)
    Rewriting(model).rewrite(CHANGES[runtime])
