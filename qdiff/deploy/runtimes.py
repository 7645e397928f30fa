"""The runtimes by name. A new one is a file beside this with a `Runtime` or an `OnnxRuntime`, and a row below."""

from __future__ import annotations

from qdiff.deploy.for_onnxruntime import ONNXRUNTIME
from qdiff.deploy.for_openvino import OPENVINO
from qdiff.deploy.runtime import OnnxRuntime, Runtime
from qdiff.deploy.torch_runtimes import INTEGER, PACKED, SIMULATED

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime for runtime in (SIMULATED, PACKED, INTEGER, ONNXRUNTIME, OPENVINO)
}
"""By the names that ``--runtime`` and ``--runtimes`` have for them."""


def onnx_runtimes() -> list[str]:
    """Return the names of those that run an exported model."""
    return [name for name, runtime in RUNTIMES.items() if isinstance(runtime, OnnxRuntime)]
