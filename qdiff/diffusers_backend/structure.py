"""Turn a diffusers network into its quantized form: which layers are split, routed, replaced and packed."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import torch
from torch import nn

from qdiff.diffusers_backend.component_timesteps import make_timesteps
from qdiff.diffusers_backend.component_tokens import make_token_places
from qdiff.errors import UserError
from qdiff.interface import split_input
from qdiff.kernels.packed_weight import WeightCache
from qdiff.kernels.packing import packed_bytes
from qdiff.modes import leaves, quantized_layers, set_modes
from qdiff.tracing.attention_calls import route_attention
from qdiff.wrapping import replace_leaves

if TYPE_CHECKING:  # it imports diffusers
    from qdiff.diffusers_backend.config import QDiffConfig

_STEP_SIZES = ".delta"  # names of step sizes end so
_MIDDLE = "mid_block.resnets.0"
_ENDS = (
    ("conv_in", "conv_out"),
    ("pos_embed.proj", "proj_out"),
    ("pos_embed.proj", "proj_out_2"),  # DiT, whose proj_out_1 takes the timestep and the class
    ("x_embedder", "proj_out"),
    ("patch_embed.proj", "proj_out"),
)


def middle_of(network: nn.Module) -> str | None:
    """Return the module whose output TDAC compares, or None for a network of another build.

    In a UNet it gives what enters the middle attention, as in EDA-DM; in a transformer, what enters the block after the
    middle, for which the paper has no rule.
    """
    if any(name == _MIDDLE for name, _ in network.named_modules()):
        return _MIDDLE
    blocks = getattr(network, "transformer_blocks", None)
    return f"transformer_blocks.{(len(blocks) - 1) // 2}" if isinstance(blocks, nn.ModuleList) else None


def mark_concatenations(network: nn.Module) -> list[str]:
    """Mark the shortcuts of up blocks, which take [hidden states, skip], for ``split_shortcut``.

    As in the papers' networks, ``conv1`` is not split: a normalization before it makes the two parts alike. The
    boundary is the number of channels of the hidden states: what the residual block before gives.

    Returns:
        Names of the marked layers.

    Raises:
        UserError: the network has no up blocks, or one is not built of residual blocks that take a concatenation.
    """
    up_blocks = getattr(network, "up_blocks", None)
    if up_blocks is None:
        raise UserError(f"{type(network).__name__} has no up blocks to split; leave out split_shortcut")
    names = {m: n for n, m in network.named_modules()}
    marked = []
    for block, hidden in _with_hidden_channels(network, up_blocks):
        for resnet in block.resnets:
            layer = resnet.conv_shortcut
            if layer is None:
                raise UserError(f"{names[resnet]} has no shortcut layer; quantize this network without split_shortcut")
            channels = layer.weight.shape[1]
            if not 0 < hidden < channels:
                raise UserError(
                    f"{names[layer]} takes {channels} channels of which {hidden} would be hidden states; quantize "
                    "this network without split_shortcut"
                )
            split_input(layer, hidden)
            marked.append(names[layer])
            hidden = resnet.out_channels
    return marked


def mark_split_layers(network: nn.Module, names: Collection[str] | None) -> None:
    """Mark only those layers of `mark_concatenations` that are named; None marks all.

    Raises:
        UserError: a named layer does not take a concatenation.
    """
    marked = set(mark_concatenations(network))
    names = marked if names is None else set(names)
    if not names <= marked:
        raise UserError(
            f"{min(names - marked)} of {type(network).__name__} takes no concatenation, but its quantization_config "
            "splits it; the folder mixes two models, quantize it again"
        )
    for name in marked - names:
        del network.get_submodule(name).split_at


def _with_hidden_channels(network: nn.Module, up_blocks: nn.ModuleList) -> Iterator[tuple[nn.Module, int]]:
    """Yield the up blocks that have residual blocks, each with the channels of the hidden states that enter it."""
    middle = getattr(network, "mid_block", None)
    before = middle if middle is not None and hasattr(middle, "resnets") else network.down_blocks[-1]
    for block in up_blocks:
        if not hasattr(block, "resnets") or not all(hasattr(r, "conv1") for r in block.resnets):
            raise UserError(f"the up block {type(block).__name__} cannot be split; quantize it without split_shortcut")
        yield block, before.resnets[-1].out_channels
        before = block


def ends_of(network: nn.Module) -> tuple[str, str] | None:
    """Return the names of the layers that take the samples and give the output; None if they are not known."""
    names = {n for n, _ in network.named_modules()}
    return next((ends for ends in _ENDS if names.issuperset(ends)), None)


def has_fused_projections(network: nn.Module) -> bool:
    """Whether attention has one layer for q, k and v, after ``fuse_qkv_projections``."""

    def is_fused(module: nn.Module) -> bool:
        # Older attention keeps its fused layers when it is unfused, and takes another processor.
        takes_another = not hasattr(module, "unfuse_projections")
        is_used = not takes_another or "Fused" in type(getattr(module, "processor", None)).__name__
        return getattr(module, "fused_projections", False) and is_used

    return any(is_fused(m) for m in network.modules())


def check_rebuilds(network: nn.Module) -> None:
    """Raise a `UserError` if a component is not what its class makes of its config: it could not be loaded again."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        fresh = type(network).from_config(network.config)
    if has_fused_projections(network) and hasattr(fresh, "fuse_qkv_projections"):
        fresh.fuse_qkv_projections()
    shapes, expected = ({n: t.shape for n, t in m.state_dict().items()} for m in (network, fresh))
    changed = [n for n in {**shapes, **expected} if shapes.get(n) != expected.get(n)]
    if changed:
        raise UserError(
            f"this {type(network).__name__} has {len(changed)} tensors that its config does not describe, e.g. "
            f"{changed[0]}; load it anew, and fuse adapters (pipe.fuse_lora(), pipe.unload_lora_weights()) before "
            "quantizing it"
        )


def replace_layers(network: nn.Module, config: QDiffConfig) -> None:
    """Replace the layers of a float network by quantized ones as its config says; nothing has values yet.

    Raises:
        UserError: the config names modules that the network does not have, or the first and the last layer are to keep
            their widths and are not known.
    """
    if config.fused_projections:
        network.fuse_qkv_projections()
    known = {name for name, _ in network.named_modules()}
    named = {*config.attention, *config.left_in_float, *config.first_tokens, *(config.ends or ())}
    missing = sorted(named - known)
    if missing:
        raise UserError(
            f"{type(network).__name__} has no module {missing[0]} that its quantization_config names; the folder mixes "
            "two models, quantize the pipeline again"
        )
    config.ends = config.ends or ends_of(network)
    if config.quant_config.keep_ends and config.ends is None:
        raise UserError(f"the first and last layer of {type(network).__name__} are not known; leave out keep_ends")
    if config.quant_config.split_shortcut:
        mark_split_layers(network, config.split_layers)
    if config.quant_config.attention_widths is not None:
        route_attention(network, config.attention)
        for name in config.prescaled:
            network.get_submodule(name).prescale = True
    replace_leaves(network, config.quant_config, config.ends, config.left_in_float)
    make_timesteps(network, config.timesteps)
    make_token_places(network, config.first_tokens)


def pack_without_values(network: nn.Module) -> None:
    """Give every quantized layer a place for its packed integers, on the meta device."""
    for layer in quantized_layers(network).values():
        if len(layer.weight_quantizers):
            size = packed_bytes(layer.weight.numel(), layer.weight_quantizers[0].bits)
            layer.pack(torch.empty(size, dtype=torch.uint8, device="meta"))


def switch_on(network: nn.Module) -> None:
    """Quantize in every forward from now on, weights and activations that have a width."""
    for leaf in leaves(network):
        set_modes(leaf, weights=True, activations=True)
    network.requires_grad_(False)
    # diffusers takes a network's dtype from its first parameter that the class does not keep in float32.
    kept = list(getattr(network, "_keep_in_fp32_modules", None) or ())
    network._keep_in_fp32_modules = [*kept, *({_STEP_SIZES} - set(kept))]


def cache_weights(network: nn.Module, mebibytes: float) -> None:
    """Keep dequantized weights between calls, up to a size, so that a packed network runs faster.

    Args:
        network: a quantized component, e.g. ``pipe.unet``.
        mebibytes: what all layers together may keep; 0 keeps nothing, the size of the float network keeps all.

    Raises:
        UserError: the network is not packed, or the size is negative.
    """
    packed = [layer.packed for layer in quantized_layers(network).values() if layer.packed is not None]
    if not packed:
        raise UserError(f"this {type(network).__name__} holds no packed weights; quantize it first")
    cache = WeightCache(int(mebibytes * 2**20))
    for weight in packed:
        weight.cache = cache


def is_quantized(network: nn.Module) -> bool:
    return bool(leaves(network))
