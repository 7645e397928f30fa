"""diffusers' loader of ``nunchaku_lite`` without its CUDA kernels, and a reader of its words by row and channel."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

GROUP = 64
KERNEL_LAYERS = "diffusers.quantizers.nunchaku.utils"


def levels_of(qweight: Tensor) -> Tensor:
    """Return the 4-bit integers [N, K] of ``qweight``, int32 [N/4, K/2], each found by its row and channel.

    Of each four rows and 64 channels there are 64 words of 16 bits, 16 per row. Each half of the 64 channels has 8
    words; a word's nibbles are the channels i, i + 8, i + 16 and i + 24 of the half, the first lowest.
    """
    row = torch.arange(qweight.shape[0] * 4).view(-1, 1)
    channel = torch.arange(qweight.shape[1] * 2).view(1, -1)
    word = (channel // 64 * 4 + row % 4) * 16 + channel % 64 // 32 * 8 + channel % 8
    pairs = qweight.long()[row // 4, word // 2]
    return pairs >> (16 * (word % 2) + 4 * (channel % 32 // 8)) & 15


def decoded(layer: dict[str, Tensor]) -> Tensor:
    """Return the weight of a layer in float64: W = q·scale + zero."""
    levels = levels_of(layer["qweight"])
    group = torch.arange(levels.shape[1]) // GROUP
    return levels * layer["wscales"].double().T[:, group] + layer["wzeros"].double().T[:, group]


def read_layer(folder: Path, name: str) -> dict[str, Tensor]:
    """Return the tensors of one layer of a written folder, by the last part of their names."""
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    return {n.removeprefix(f"{name}."): t for n, t in tensors.items() if n.startswith(f"{name}.")}


def _gemv(x: Tensor, qweight: Tensor, wscales: Tensor, wzeros: Tensor, m: int, n: int, k: int, group: int) -> Tensor:
    assert x.shape == (m, k) and m <= 8 and wscales.shape == wzeros.shape == (k // group, n) and n % 8 == 0
    weight = decoded({"qweight": qweight, "wscales": wscales, "wzeros": wzeros})
    return (x.double() @ weight.T).to(x.dtype)


def use_plain_kernels(patch: pytest.MonkeyPatch) -> None:
    """Replace the CUDA kernels by a product in float64 with the decoded weight, and the check for a GPU by nothing."""
    from diffusers.quantizers.nunchaku import NunchakuLiteQuantizer

    patch.setattr(NunchakuLiteQuantizer, "validate_environment", lambda *args, **keywords: None)
    kernels = types.ModuleType("kernels")
    kernels.get_kernel = lambda *args, **keywords: types.SimpleNamespace(ops=types.SimpleNamespace(gemv_awq=_gemv))
    # The module looks for the package when it is imported. Other packages must not find it.
    with pytest.MonkeyPatch.context() as during_import:
        during_import.setitem(sys.modules, "kernels", kernels)
        during_import.setattr("diffusers.utils.is_kernels_available", lambda: True)
        during_import.setattr("diffusers.utils.is_kernels_version", lambda *args: True)
        during_import.setattr("diffusers.utils.constants.DIFFUSERS_TRUST_REMOTE_KERNELS", True)
        sys.modules.pop(KERNEL_LAYERS, None)
        layers = importlib.import_module(KERNEL_LAYERS)
    del sys.modules[KERNEL_LAYERS]
    patch.setitem(sys.modules, KERNEL_LAYERS, layers)
