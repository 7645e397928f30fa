"""First tokens that are not quantized, in a component of a pipeline, whose loop calls the network without us."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from qdiff.calibration.first_token import find_first_tokens
from qdiff.diffusers_backend.denoiser import listen, read_call
from qdiff.errors import UserError
from qdiff.modes import first_tokens
from qdiff.quant_layer import QuantModule
from qdiff.ranges.first_token import FirstToken


def make_token_places(network: nn.Module, layers: Mapping[str, bool]) -> None:
    """Give layers of a network that is not filled yet a place for their outputs of the first token.

    Args:
        layers: names, and whether a layer has the token as well.

    Raises:
        UserError: a name is of no quantized layer.
    """
    for name, has_token in layers.items():
        layer = network.get_submodule(name)
        if not isinstance(layer, QuantModule):
            raise UserError(
                f"{name} is no quantized layer, but its quantization_config has an output of the first token for it; "
                "the folder mixes two models, quantize the pipeline again"
            )
        token = torch.empty(layer.in_channels) if has_token else None
        layer.first_token = FirstToken(torch.empty(len(layer.weight)), token)


def tokens_of(network: nn.Module) -> dict[str, bool]:
    """Inverse of `make_token_places`."""
    return {name: token.input is not None for name, token in first_tokens(network).items()}


def watch_first_tokens(network: nn.Module) -> None:
    """Have every call of a network end with an error if its context begins with another token; may be called twice.

    On a GPU a call waits for that. The loops of diffusers wait at every step anyway.
    """
    if first_tokens(network) and _check not in network._forward_hooks.values():
        network.register_forward_hook(_check)


def _check(network: nn.Module, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        for token in first_tokens(network).values():
            token.check_seen()


def check_at_first_call(network: nn.Module, single_precision: Callable[[], contextlib.AbstractContextManager]) -> Any:
    """Compare the first tokens of the next call of a float network before it is made; returns the hook's handle.

    Args:
        single_precision: returns the context in which the network is in float32.

    Raises:
        UserError: in that call: see `find_first_tokens`.
    """

    def heard(args: tuple, keywords: dict[str, Any]) -> None:
        handle.remove()
        call, inputs = read_call(network, args, keywords)
        with single_precision():
            find_first_tokens(network, inputs, call)

    handle = listen(network, heard)
    return handle
