"""``torch.ops.qdiff.fake_quantize``: quantize and dequantize as one operation, which `torch.compile` does not split.

It has no gradient; `qdiff.functional.fake_quantize` has one, and calls this in its forward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qdiff.functional import fake_quantize_inference
from qdiff.kernels.switch import fused

_library = torch.library.Library("qdiff", "FRAGMENT")
_library.define(
    "fake_quantize(Tensor x, Tensor delta, Tensor zero_point, int bits) -> Tensor", tags=[torch.Tag.pt2_compliant_tag]
)


def composed(x: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Compute it with PyTorch's operations, on any device."""
    with fused(False):
        return fake_quantize_inference(x, delta, zero_point, bits)


def on_cuda(x: Tensor, delta: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """Compute it with one kernel if that supports the tensors' layout and dtypes, else with PyTorch's operations."""
    from qdiff.kernels import fake_quantize_triton  # needs Triton, which not every build of PyTorch includes

    out = torch.empty_like(x)
    layout = fake_quantize_triton.layout_of(x, delta, zero_point, out)
    if layout is None:
        return composed(x, delta, zero_point, bits)
    with torch.cuda.device(x.device):
        fake_quantize_triton.launch(x, delta, zero_point, bits, out, layout)
    return out


_library.impl("fake_quantize", composed, "CPU")
_library.impl("fake_quantize", on_cuda, "CUDA")
torch.library.register_fake("qdiff::fake_quantize", lambda x, *_: torch.empty_like(x), lib=_library)
