"""The factors of all layers' input channels as one tensor of a native file."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qdiff.kernels.packing import inflate_floats
from qdiff.quant_layer import QuantModule


def stored_scales(layers: Mapping[str, QuantModule]) -> list[Tensor]:
    """Return the factors of every layer's input channels, 1 where a layer has none; nothing if no layer has any."""
    if all(layer.input_scale is None for layer in layers.values()):
        return []
    return [torch.ones(m.in_channels) if m.input_scale is None else m.input_scale for m in layers.values()]


def scales_by_layer(layers: Mapping[str, QuantModule], stored: Tensor) -> dict[str, Tensor]:
    """Inverse of `stored_scales`, from the deflated tensor of a file; raises a ValueError if it is damaged."""
    sizes = {name: layer.in_channels for name, layer in layers.items()}
    values = inflate_floats(stored, sum(sizes.values()))
    if not (torch.isfinite(values) & (values > 0)).all():
        raise ValueError("factors of input channels are out of range")
    return dict(zip(sizes, values.split(list(sizes.values())), strict=True))
