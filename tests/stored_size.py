"""How many bytes a network takes as stored: read from its file, or counted from its layers."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from qdiff.cost import account as accounting


def content_bytes(path: Path) -> int:
    """Return what the tensors of a native file take, the float part inflated. The file itself is smaller."""
    tensors = load_file(path)
    floats = tensors.pop("float")
    size = floats.numel() * floats.element_size()
    if floats.dtype == torch.uint8:  # the first version of the format did not deflate them
        size = len(zlib.decompress(floats.numpy().tobytes()))
    return size + sum(t.numel() * t.element_size() for t in tensors.values())


def stored_bytes(module: nn.Module) -> int:
    """Return the bytes of any module's parameters, e.g. of a first stage, that `account` has no input for."""
    return sum(cost.size_bytes for cost in accounting._costs(accounting._unwrapped(module), {}))
