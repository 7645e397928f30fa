"""Tensors of a native file that only some networks have: input scales and first tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qdiff.checkpoint.concatenation import concatenated
from qdiff.kernels.packing import deflate_floats, inflate_floats
from qdiff.quant_layer import QuantModule
from qdiff.ranges.first_token import FirstToken

TOKENS, TOKEN_PARTS = "first_token", "first_token_parts"
NONE, OUTPUT, BOTH = range(3)  # what a layer has of the first token: nothing, its output, or the token as well


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


def first_token_values(layers: Mapping[str, QuantModule]) -> list[Tensor]:
    """Return what layers have of the first token, in their order: each one's output, then the token."""
    tokens = [layer.first_token for layer in layers.values() if layer.first_token is not None]
    return [value for token in tokens for value in (token.output, token.input) if value is not None]


def stored_tokens(layers: Mapping[str, QuantModule]) -> dict[str, Tensor]:
    """Return a file's tensors of the first token; none if no layer has one."""
    if not (values := first_token_values(layers)):
        return {}
    tokens = [layer.first_token for layer in layers.values()]
    parts = [NONE if token is None else OUTPUT if token.input is None else BOTH for token in tokens]
    return {
        TOKENS: deflate_floats(concatenated(values, torch.float32)),
        TOKEN_PARTS: torch.tensor(parts, dtype=torch.uint8),
    }


def tokens_by_layer(layers: Mapping[str, QuantModule], tensors: Mapping[str, Tensor]) -> dict[str, FirstToken]:
    """Inverse of `stored_tokens`, from a file's tensors; raises a ValueError or KeyError if they are damaged."""
    parts = tensors[TOKEN_PARTS].tolist()
    if len(parts) != len(layers) or not set(parts) <= {NONE, OUTPUT, BOTH} or not any(parts):
        raise ValueError("it is unclear which layers know the first token")
    has = {name: part for name, part in zip(layers, parts, strict=True) if part != NONE}
    sizes = [(len(layers[name].weight), layers[name].in_channels if part == BOTH else 0) for name, part in has.items()]
    values = inflate_floats(tensors[TOKENS], sum(map(sum, sizes)))
    if not torch.isfinite(values).all():
        raise ValueError("outputs of the first token are not finite")
    pairs = (chunk.split(own) for chunk, own in zip(values.split([sum(own) for own in sizes]), sizes, strict=True))
    return {
        name: FirstToken(output, token if len(token) else None)
        for name, (output, token) in zip(has, pairs, strict=True)
    }
