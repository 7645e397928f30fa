"""What diffusers would do to float layers and cannot do to quantized ones: refused in one sentence."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from qdiff.errors import UserError
from qdiff.modes import scaled_layers
from qdiff.quant_layer import QuantModule
from qdiff.quant_model import QuantModel

_LORA = (
    "a LoRA cannot be added to quantized weights; fuse it into the float pipeline (pipe.fuse_lora(), "
    "pipe.unload_lora_weights()) and quantize that"
)
NO_SCALES = "a pipeline's component has no place for factors of its layers' input channels"
_FUSING = "the projections of quantized attention stay as they are; fuse or unfuse them in the float pipeline"
_REFUSED = {
    "load_lora_adapter": _LORA,
    "add_adapter": _LORA,
    "fuse_qkv_projections": _FUSING,
    "unfuse_qkv_projections": _FUSING,
    "dequantize": "the float weights are gone; load the float pipeline",
}


def refuse_changes(network: nn.Module) -> None:
    """Have a quantized component refuse what would change its layers, and offloading layer by layer."""
    for name, sentence in _REFUSED.items():
        if hasattr(network, name):
            setattr(network, name, partial(_refuse, sentence))
    if _check_placement not in network._forward_pre_hooks.values():
        network.register_forward_pre_hook(_check_placement)


def refuse_scales(qnn: QuantModel) -> None:
    """Raise a `UserError` if layers of a calibrated network scale the channels of their input."""
    if scaled_layers(qnn.model):
        raise UserError(f"{NO_SCALES}; give a checkpoint that was made without --scaling")


def _refuse(sentence: str, *_: Any, **__: Any) -> None:
    raise UserError(sentence)


def _check_placement(network: nn.Module, _: tuple) -> None:
    """Raise a `UserError` if step sizes are offloaded by accelerate: what would load them is never called itself."""
    if torch.compiler.is_compiling() or not hasattr(network, "_hf_hook"):
        return
    for layer in network.modules():
        if isinstance(layer, QuantModule) and any(t.is_meta for t in layer.weight_quantizers.parameters()):
            raise UserError(
                f"this {type(network).__name__} is quantized and cannot be offloaded layer by layer; call "
                "pipe.enable_model_cpu_offload() instead of pipe.enable_sequential_cpu_offload()"
            )


def check_is_plain(network: nn.Module, name: str) -> None:
    """Raise a `UserError` if a float component is compiled or offloaded, so that its layers cannot be replaced.

    Args:
        name: of the component in its pipeline.
    """
    if any(m._compiled_call_impl is not None for m in network.modules()):
        raise UserError(f"{name} has compiled modules; quantize it first and compile it then")
    if any(hasattr(m, "_hf_hook") for m in network.modules()):
        raise UserError(
            f"{name} is offloaded; call pipe.remove_all_hooks() and pipe.to(device), quantize it, and enable "
            "offloading then"
        )
