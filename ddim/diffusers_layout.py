"""The DDPM UNet in the layout of the diffusers library: the config of its ``UNet2DModel``, and the names of its layers.

The blocks are also those of the first stages of latent diffusion, which share these tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ddim.models.layers import AttnBlock, Downsample, ResnetBlock, Upsample
from qdiff.errors import UserError
from qdiff.io.tensor_layout import NetworkLayout, layout_of

UNET = "UNet2DModel"
# Sines come first in the time embedding, its frequencies end at 1/10000 (freq_shift), strided convolutions are padded
# at the lower right, and attention has one head (attention_head_dim).
FIXED = {
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}

LEVEL = {"block": "resnets", "attn": "attentions"}
RESAMPLERS = {"downsample": "downsamplers.0", "upsample": "upsamplers.0"}
MIDDLE = {"block_1": "resnets.0", "attn_1": "attentions.0", "block_2": "resnets.1"}
RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "temb_proj": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "nin_shortcut": "conv_shortcut",
}
ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
BLOCKS = {
    ResnetBlock: lambda _: RESNET,
    AttnBlock: lambda _: ATTENTION,
    Downsample: lambda _: {"conv": "conv"},
    Upsample: lambda _: {"conv": "conv"},
}


def unet_config(config: Any, origin: str) -> dict[str, Any]:
    """Return the arguments of diffusers' ``UNet2DModel`` for the network of a config.

    Args:
        config: the result of `ddim.config.load_config`.
        origin: the config's name in error messages.

    Raises:
        UserError: that class cannot express the network.
    """
    model, size = config.model, config.data.image_size
    if not model.resamp_with_conv:
        raise UserError(f"{origin} has model.resamp_with_conv false, which diffusers' {UNET} cannot do; give true")
    if model.ch_mult[0] != 1:
        raise UserError(
            f"{origin} has model.ch_mult {model.ch_mult}, but the first level of diffusers' {UNET} has the channels of "
            "its first convolution; give a config whose first factor is 1"
        )
    attention = [size // 2**i in model.attn_resolutions for i in range(len(model.ch_mult))]
    return FIXED | {
        "sample_size": size,
        "in_channels": model.in_channels,
        "out_channels": model.out_ch,
        "block_out_channels": [model.ch * factor for factor in model.ch_mult],
        "layers_per_block": model.num_res_blocks,
        "down_block_types": ["AttnDownBlock2D" if here else "DownBlock2D" for here in attention],
        "up_block_types": ["AttnUpBlock2D" if here else "UpBlock2D" for here in reversed(attention)],
        "dropout": float(model.dropout),
    }


def config_sections(unet: Mapping[str, Any], origin: str) -> dict[str, dict[str, Any]]:
    """Return ``data`` and ``model`` of the config whose network a ``UNet2DModel`` is; undo `unet_config`.

    The result is only right if `unet_config` returns ``unet`` for it, which the caller must check.

    Args:
        unet: the complete config of diffusers' network.
        origin: its name in error messages.

    Raises:
        UserError: widths are not multiples of the first.
    """
    widths, size = unet["block_out_channels"], unet["sample_size"]
    if not isinstance(size, int):
        raise UserError(f"{origin} has sample_size {size}; give a network for square images, with one number")
    if any(width % widths[0] for width in widths):
        raise UserError(f"{origin} has block_out_channels {list(widths)}; give multiples of the first width")
    attention = [size // 2**i for i, kind in enumerate(unet["down_block_types"]) if "Attn" in kind]
    return {
        # Sampling does not use the name of the data set, which diffusers does not keep.
        "data": {"dataset": "UNKNOWN", "image_size": size, "channels": unet["in_channels"], "rescaled": True},
        "model": {
            "type": "simple",
            "in_channels": unet["in_channels"],
            "out_ch": unet["out_channels"],
            "ch": widths[0],
            "ch_mult": [width // widths[0] for width in widths],
            "num_res_blocks": unet["layers_per_block"],
            "attn_resolutions": attention,
            "dropout": unet["dropout"],
            "resamp_with_conv": True,
        },
    }


def unet_layout(network: nn.Module) -> NetworkLayout:
    """Return the layers of a `ddim.models.diffusion.Model` under the names of ``UNet2DModel``."""
    ends = {
        "temb.dense.0": "time_embedding.linear_1",
        "temb.dense.1": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    return layout_of(network, [*ends.items(), *level_modules(network)], BLOCKS)


def level_modules(network: nn.Module, ours: str = "", theirs: str = "") -> Iterator[tuple[str, str]]:
    """Yield the names (ours, theirs) of the blocks of a network's ``down``, ``mid`` and ``up``.

    Args:
        network: the UNet, or an encoder or a decoder of latent diffusion, which lack ``up`` or ``down``.
        ours, theirs: what the names begin with.
    """
    for i, level in enumerate(getattr(network, "down", ())):
        yield from _level_modules(level, f"{ours}down.{i}", f"{theirs}down_blocks.{i}")
    for name, other in MIDDLE.items():
        yield f"{ours}mid.{name}", f"{theirs}mid_block.{other}"
    up = getattr(network, "up", ())
    for i, level in enumerate(up):
        # Ours are counted from the highest resolution, theirs in the order of execution.
        yield from _level_modules(level, f"{ours}up.{i}", f"{theirs}up_blocks.{len(up) - 1 - i}")


def _level_modules(level: nn.Module, ours: str, theirs: str) -> Iterator[tuple[str, str]]:
    for name, other in LEVEL.items():
        for j in range(len(getattr(level, name))):
            yield f"{ours}.{name}.{j}", f"{theirs}.{other}.{j}"
    for name, other in RESAMPLERS.items():
        if hasattr(level, name):
            yield f"{ours}.{name}", f"{theirs}.{other}"
