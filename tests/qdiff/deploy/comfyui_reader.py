"""A reader of ComfyUI's files written from the description of the format, without the code that writes them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor


def read_comfyui(path: Path) -> tuple[dict[str, Tensor], dict[str, dict]]:
    """Return a file's tensors and the declared layers, by name."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is not a dict
        declared = json.loads(file.metadata()["_quantization_metadata"])
    assert declared["format_version"] == "1.0"
    return tensors, declared["layers"]


def decoded(tensors: dict[str, Tensor], layers: dict[str, dict]) -> dict[str, Tensor]:
    """Return a plain state dict: the weights of declared layers in float64, everything else as it is."""
    state = dict(tensors)
    for name, entry in layers.items():
        weight, scale = state.pop(f"{name}.weight"), state.pop(f"{name}.weight_scale").double()
        assert weight.dtype == torch.int8
        if entry == {"format": "int8_tensorwise"}:
            assert scale.shape == (weight.shape[0], 1)
            state[f"{name}.weight"] = weight.double() * scale
            continue
        assert entry == {"format": "awq_w4a16", "group_size": 64}
        zeros = state.pop(f"{name}.weight_zeros").double()
        levels = torch.empty(weight.shape[0], 2 * weight.shape[1], dtype=torch.float64)
        levels[:, 0::2], levels[:, 1::2] = weight & 15, (weight >> 4) & 15
        group = torch.arange(levels.shape[1]) // 64
        state[f"{name}.weight"] = (levels - 8) * scale.T[:, group] + zeros.T[:, group]
    return state
