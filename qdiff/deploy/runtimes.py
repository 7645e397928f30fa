"""Registry of runtimes. To add one, write a file here with a `Runtime` or an `OnnxRuntime`, and add a row below."""

from __future__ import annotations

from qdiff.deploy.for_onnxruntime import ONNXRUNTIME
from qdiff.deploy.for_openvino import OPENVINO
from qdiff.deploy.runtime import OnnxRuntime, Runtime
from qdiff.deploy.torch_runtimes import INTEGER, PACKED, SIMULATED

RUNTIMES: dict[str, Runtime] = {
    runtime.name: runtime for runtime in (SIMULATED, PACKED, INTEGER, ONNXRUNTIME, OPENVINO)
}
"""The runtimes by their name in ``--runtime`` and ``--runtimes``."""


def onnx_runtimes() -> list[str]:
    """Return the names of the runtimes that run an exported model."""
    return [name for name, runtime in RUNTIMES.items() if isinstance(runtime, OnnxRuntime)]
