"""The layers of latent diffusion's networks under the names that they have in the diffusers library.

Their configs are in `ldm.diffusers_unet` and `ldm.diffusers_first_stage`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from einops import rearrange
from torch import nn

from ddim.diffusers_layout import BLOCKS as DDIM_BLOCKS
from ddim.diffusers_layout import level_modules
from ldm.models.autoencoder import FirstStage, VQModelInterface
from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import AttentionBlock, Downsample, ResBlock, Upsample
from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff.io.tensor_layout import Divided, NetworkLayout, Table, layout_of

UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
MIDDLE = {"middle_block.0": "resnets.0", "middle_block.1": "attentions.0", "middle_block.2": "resnets.1"}
RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def unet_layout(network: UNetModel) -> NetworkLayout:
    """Return the layers of a UNet under the names of diffusers' ``UNet2DModel`` or ``UNet2DConditionModel``."""
    return layout_of(network, [*UNET_ENDS.items(), *_unet_modules(network)], BLOCKS)


def first_stage_layout(stage: FirstStage) -> NetworkLayout:
    """Return the layers of a first stage under the names of diffusers' ``VQModel`` or ``AutoencoderKL``."""
    modules = [(name, name) for name in ("quant_conv", "post_quant_conv")]
    modules += [("quantize.embedding", "quantize.embedding")] if isinstance(stage, VQModelInterface) else []
    for part in ("encoder", "decoder"):
        half = stage.get_submodule(part)
        ends = {"conv_in": "conv_in", "norm_out": "conv_norm_out", "conv_out": "conv_out"}
        modules += [(f"{part}.{name}", f"{part}.{other}") for name, other in ends.items()]
        modules += level_modules(half, f"{part}.", f"{part}.")
    return layout_of(stage, modules, BLOCKS)


def _unet_modules(network: UNetModel) -> Iterator[tuple[str, str]]:
    """Yield the names (ours, theirs) of the blocks: ours in one list, theirs in one list per level."""
    yield from _level_modules(network.input_blocks, "input_blocks", "down_blocks", "downsamplers.0", start=1)
    yield from ((name, f"mid_block.{other}") for name, other in MIDDLE.items())
    yield from _level_modules(network.output_blocks, "output_blocks", "up_blocks", "upsamplers.0")


def _level_modules(
    blocks: nn.ModuleList, ours: str, theirs: str, resampler: str, start: int = 0
) -> Iterator[tuple[str, str]]:
    """Yield the names of the blocks on one way.

    Args:
        resampler: their name, inside a level, of the block that ends it.
        start: the first entry of ``blocks`` that belongs to a level.
    """
    level, block = 0, 0
    for i in range(start, len(blocks)):
        for j, layer in enumerate(blocks[i]):
            name, place = f"{ours}.{i}.{j}", f"{theirs}.{level}"
            if isinstance(layer, Downsample | Upsample) or getattr(layer, "resample", None) is not None:
                yield name, f"{place}.{resampler}"
                level, block = level + 1, 0
            elif isinstance(layer, ResBlock):
                yield name, f"{place}.resnets.{block}"
                block += 1
            else:
                yield name, f"{place}.attentions.{block - 1}"


def _attention(block: AttentionBlock) -> Table:
    channels = torch.arange(block.qkv.out_channels)
    order = "(qkv heads d)" if block.new_order else "(heads qkv d)"
    rows = rearrange(channels, f"{order} -> qkv (heads d)", qkv=3, heads=block.heads)
    return {"norm": "group_norm", "qkv": Divided(("to_q", "to_k", "to_v"), tuple(rows)), "proj_out": "to_out.0"}


def _transformer(block: SpatialTransformer) -> Table:
    """Return the table of a transformer, whose layers have one name in both layouts."""
    return {name: name for name, _ in block.named_modules()}


BLOCKS = {
    **DDIM_BLOCKS,
    ResBlock: lambda _: RESNET,
    AttentionBlock: _attention,
    SpatialTransformer: _transformer,
    Downsample: lambda _: {"op": "conv"},
    Upsample: lambda _: {"conv": "conv"},
}
