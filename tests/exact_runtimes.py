"""Skips the tests of what exports and runs ONNX where a package is missing, or this CPU's integers are not exact."""

from __future__ import annotations

import os

import pytest

from qdiff.deploy.exactness import check_exact
from qdiff.deploy.onnx_lowering import ProductLimits
from qdiff.deploy.onnx_rewriting import HALF
from qdiff.deploy.runtimes import RUNTIMES, onnx_runtimes
from qdiff.errors import UserError

SPLIT = ProductLimits(HALF, activations=False)  # what OpenVINO's integers hold without VNNI


def refusal(runtime: str) -> str | None:
    """Return why a runtime is refused on this machine, or None."""
    if (reason := left_out(runtime)) is not None:
        return reason
    try:
        check_exact(RUNTIMES[runtime])
    except UserError as error:
        return str(error)
    return None


def left_out(runtime: str) -> str | None:
    """Return the reason where a runtime cannot run on the CPU that is emulated, or None."""
    if os.environ.get("QDIFF_TEST_WITHOUT") == runtime:
        return f"{runtime} is left out of this setting (tests/on_every_cpu.py)"
    return None


def require_packages() -> None:
    """Skip the calling module where a package of the ``deploy`` extra is missing."""
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)


def require_runtimes() -> None:
    """Skip the calling module where a package is missing or a runtime is refused, with that reason."""
    require_packages()
    for runtime in onnx_runtimes():
        if (reason := refusal(runtime)) is not None:
            pytest.skip(reason, allow_module_level=True)
