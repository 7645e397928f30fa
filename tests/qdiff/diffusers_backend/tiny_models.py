"""Tiny random diffusers networks, one per architecture, and what a pipeline calls them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

TOKENS, TEXT = 3, 8  # length and width of encoded prompts


@dataclass(frozen=True)
class TinyModel:
    """A diffusers network and its calls.

    Attributes:
        make: returns the network; its weights depend on torch's seed.
        inputs: ``inputs(count)`` returns the keywords of a forward of ``count`` samples.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]


_FIRST = "sample"  # what UNets call their first input


def _images(count: int, channels: int) -> dict[str, Any]:
    return {_FIRST: torch.randn(count, channels, 8, 8), "timestep": torch.arange(count) * 100 + 50}


def _prompts(count: int, width: int = TEXT) -> Tensor:
    return torch.randn(count, TOKENS, width)


def _for_transformer(inputs: dict[str, Any]) -> dict[str, Any]:
    """Transformers name their samples otherwise."""
    return {"hidden_states": inputs.pop(_FIRST), **inputs}


def unet(**changes: Any) -> nn.Module:
    """DDPM's network: convolutions, self-attention, concatenations in the up blocks."""
    options = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    }
    return diffusers.UNet2DModel(**{**options, **changes}).eval()


def text_unet(**changes: Any) -> nn.Module:
    """Stable Diffusion's network: as `unet`, with transformer blocks."""
    options = {
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 2,
        "cross_attention_dim": TEXT,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return diffusers.UNet2DConditionModel(**{**options, **changes}).eval()


def _sdxl() -> nn.Module:
    return text_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        use_linear_projection=True,
        attention_head_dim=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=6 * 2 + TEXT,
    )


def _sdxl_inputs(count: int) -> dict[str, Any]:
    sizes = torch.tensor([8.0, 8, 0, 0, 8, 8]).repeat(count, 1)
    return {
        **_images(count, 4),
        "encoder_hidden_states": _prompts(count),
        "added_cond_kwargs": {"text_embeds": torch.randn(count, TEXT), "time_ids": sizes},
    }


def controlnet() -> nn.Module:
    """A ControlNet for `text_unet`; its last layers, which are zeros before training, are not."""
    network = diffusers.ControlNetModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=2,
        cross_attention_dim=TEXT,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        conditioning_embedding_out_channels=(4, 4),  # for images of twice the latents' size
    )
    last = network.controlnet_mid_block, network.controlnet_cond_embedding.conv_out
    for layer in (*network.controlnet_down_blocks, *last):
        nn.init.normal_(layer.weight, std=0.1)
    return network.eval()


def _controlled_inputs(count: int) -> dict[str, Any]:
    inputs = {**_images(count, 4), "encoder_hidden_states": _prompts(count)}
    shapes = [(8, 8), (8, 8), (8, 4), (16, 4)]
    return {
        **inputs,
        "down_block_additional_residuals": tuple(torch.randn(count, c, s, s) for c, s in shapes),
        "mid_block_additional_residual": torch.randn(count, 16, 4, 4),
    }


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 4}


def dit() -> nn.Module:
    """DiT: adaptive normalisation from the timestep and the class in every block."""
    return diffusers.DiTTransformer2DModel(
        **_HEADS, in_channels=4, out_channels=8, num_layers=2, sample_size=8, num_embeds_ada_norm=1000
    ).eval()


def _transformer_2d() -> nn.Module:
    """The transformer as a network of its own, for class-conditional patches."""
    return diffusers.Transformer2DModel(
        **_HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
        num_embeds_ada_norm=10,
        activation_fn="geglu",
        attention_bias=True,
    ).eval()


def _dit_inputs(count: int) -> dict[str, Any]:
    return _for_transformer({**_images(count, 4), "class_labels": torch.arange(count) % 10})


def pixart() -> nn.Module:
    """PixArt: one adaptive normalisation for all blocks, from the timestep and the size; masked cross-attention."""
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=4,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        cross_attention_dim=12,
        caption_channels=6,
        use_additional_conditions=True,
    ).eval()


def _pixart_inputs(count: int) -> dict[str, Any]:
    mask = torch.ones(count, TOKENS)
    mask[::2, -1] = 0
    return _for_transformer(
        {
            **_images(count, 4),
            "encoder_hidden_states": _prompts(count, 6),
            "encoder_attention_mask": mask,
            "added_cond_kwargs": {
                "resolution": torch.full((count, 2), 64.0),
                "aspect_ratio": torch.linspace(0.5, 2, count)[:, None],
            },
        }
    )


def sd3(**changes: Any) -> nn.Module:
    """Stable Diffusion 3: joint attention over image and text."""
    options = {"num_layers": 2, "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_size": 8}
    widths = {"joint_attention_dim": TEXT, "caption_projection_dim": 8, "pooled_projection_dim": 6}
    options = {**options, **_HEADS, **widths, "pos_embed_max_size": 4}
    return diffusers.SD3Transformer2DModel(**{**options, **changes}).eval()


def _sd3_inputs(count: int) -> dict[str, Any]:
    conditions = {"encoder_hidden_states": _prompts(count), "pooled_projections": torch.randn(count, 6)}
    return _for_transformer({**_images(count, 4), **conditions})


def flux() -> nn.Module:
    """FLUX: joint and single-stream blocks, rotary positions, queries and keys normalised."""
    return diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        joint_attention_dim=TEXT,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, 4),
    ).eval()


def _flux_inputs(count: int) -> dict[str, Any]:
    rows = torch.arange(4.0)
    positions = torch.stack([torch.zeros(16), rows.repeat_interleave(4), rows.repeat(4)], dim=1)
    return {
        "hidden_states": torch.randn(count, 16, 4),
        "timestep": torch.linspace(1, 0.2, count),
        "guidance": torch.full((count,), 3.5),
        "encoder_hidden_states": _prompts(count),
        "pooled_projections": torch.randn(count, 6),
        "img_ids": positions,
        "txt_ids": torch.zeros(TOKENS, 3),
    }


def sana() -> nn.Module:
    """Sana: linear attention, convolutions with depthwise groups instead of a feed-forward network."""
    return diffusers.SanaTransformer2DModel(
        **_HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=6,
        sample_size=8,
    ).eval()


def _sana_inputs(count: int) -> dict[str, Any]:
    mask = torch.ones(count, TOKENS)
    mask[::2, -1] = 0
    conditions = {"encoder_hidden_states": _prompts(count, 6), "encoder_attention_mask": mask}
    return _for_transformer({**_images(count, 4), **conditions})


def _text_inputs(channels: int) -> Callable[[int], dict[str, Any]]:
    return lambda count: {**_images(count, channels), "encoder_hidden_states": _prompts(count)}


_ONE_SIZE = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}
MODELS = {
    "DDPM": TinyModel(unet, lambda count: _images(count, 1)),
    "LSUN": TinyModel(  # with what other UNets have: blocks that resample, scales from the timestep, classes
        lambda: unet(
            down_block_types=("AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D"),
            resnet_time_scale_shift="scale_shift",
            downsample_type="resnet",
            upsample_type="resnet",
            num_class_embeds=5,
        ),
        lambda count: {**_images(count, 1), "class_labels": torch.arange(count) % 5},
    ),
    "SD 1": TinyModel(lambda: text_unet(**_ONE_SIZE), _text_inputs(4)),
    "SD 2.1": TinyModel(
        lambda: text_unet(use_linear_projection=True, attention_head_dim=(4,), upcast_attention=True, **_ONE_SIZE),
        _text_inputs(4),
    ),
    "SDXL": TinyModel(_sdxl, _sdxl_inputs),
    "inpainting": TinyModel(lambda: text_unet(in_channels=9, **_ONE_SIZE), _text_inputs(9)),
    "with ControlNet": TinyModel(text_unet, _controlled_inputs),
    "ControlNet": TinyModel(
        controlnet, lambda count: {**_text_inputs(4)(count), "controlnet_cond": torch.rand(count, 3, 16, 16)}
    ),
    "DiT": TinyModel(dit, _dit_inputs),
    "Transformer2DModel": TinyModel(_transformer_2d, _dit_inputs),
    "PixArt": TinyModel(pixart, _pixart_inputs),
    "SD3": TinyModel(lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), _sd3_inputs),
    "FLUX": TinyModel(flux, _flux_inputs),
    "Sana": TinyModel(sana, _sana_inputs),
}
