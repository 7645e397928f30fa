"""Switch for the project's own CUDA kernels. They are off by default: none of them was timed on a GPU yet."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator

import torch
from torch import Tensor

from qdiff.errors import UserError

_enabled = False


@contextlib.contextmanager
def fused(enabled: bool = True) -> Iterator[None]:
    """Turn the kernels of `qdiff.kernels` for CUDA on or off inside the block. Results are the same to the bit.

    Raises:
        UserError: they are turned on without a CUDA device or without Triton.
    """
    global _enabled
    if enabled:
        check_available()
        from qdiff.kernels import fake_quantize  # noqa: F401  registers the operation
    before, _enabled = _enabled, enabled
    try:
        yield
    finally:
        _enabled = before


def check_available(device: torch.device | None = None) -> None:
    """Raise a `UserError` if the kernels cannot run.

    Args:
        device: the device to run on; None accepts any CUDA device.
    """
    if not torch.cuda.is_available() or (device is not None and device.type != "cuda"):
        raise UserError("--fused_kernels needs CUDA, and this run is not on a CUDA device; leave --fused_kernels out")
    if importlib.util.find_spec("triton") is None:
        raise UserError(
            "--fused_kernels needs Triton, which is not installed; pip install triton, or leave --fused_kernels out"
        )


def runs_fused(*tensors: Tensor) -> bool:
    """Whether a kernel of `qdiff.kernels` computes an operation on these tensors; not if gradients are needed."""
    if not _enabled or tensors[0].device.type != "cuda":
        return False
    return not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
