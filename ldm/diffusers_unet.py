"""The config of the latent UNet as the arguments of the diffusers library's classes, and back."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff.errors import UserError
from qdiff.io.diffusers_files import defaults_of

PLAIN, NARROW, CONDITIONAL = "UNet2DModel", "LatentUNet2DModel", "UNet2DConditionModel"
GROUPS = 32
FIXED = {"flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1, "norm_eps": 1e-5, "norm_num_groups": GROUPS}
# Arguments of diffusers' classes that change no output, or only the shape of weights or the precision.
FREE = ("num_train_timesteps", "use_linear_projection", "upcast_attention")
# Arguments that are one value, or one per level.
PER_LEVEL = (
    *("attention_head_dim", "transformer_layers_per_block", "cross_attention_dim", "layers_per_block"),
    "only_cross_attention",
)


def diffusers_class(name: str) -> type:
    """Return a class of diffusers, or `NARROW`."""
    module = "ldm.diffusers_networks" if name == NARROW else "diffusers"
    return getattr(importlib.import_module(module), name)


def unet_config(params: Mapping[str, Any], size: int, origin: str) -> tuple[str, dict[str, Any]]:
    """Return the class of a UNet in diffusers (or `NARROW`, of `ldm.diffusers_networks`) and its arguments.

    Args:
        params: arguments of `UNetModel`.
        size: side of the latents.
        origin: the config's name in error messages.

    Raises:
        UserError: no such class can express the network.
    """
    p = defaults_of(UNetModel) | dict(params)
    spatial, block_resampling = p["use_spatial_transformer"], p["resblock_updown"]
    widths = [p["model_channels"] * factor for factor in p["channel_mult"]]
    attention = [2**i in p["attention_resolutions"] for i in range(len(widths))]
    narrow = widths[0] != p["model_channels"]
    for name, is_there in (
        ("conv_resample false", not (p["conv_resample"] or block_resampling)),
        ("num_heads_upsample", p["num_heads_upsample"] not in (-1, p["num_heads"])),
        ("resblock_updown and use_spatial_transformer together", block_resampling and spatial),
        ("use_spatial_transformer and a channel_mult that does not begin with 1", narrow and spatial),
    ):
        if is_there:
            raise UserError(f"{origin} has {name}, which no network of diffusers can do; choose another model")
    config = FIXED | {
        "sample_size": size,
        "in_channels": p["in_channels"],
        "out_channels": p["out_channels"],
        "block_out_channels": widths,
        "layers_per_block": p["num_res_blocks"],
        "down_block_types": [_kind("Down", here, spatial, block_resampling) for here in attention],
        "up_block_types": [_kind("Up", here, spatial, block_resampling) for here in reversed(attention)],
        "resnet_time_scale_shift": "scale_shift" if p["use_scale_shift_norm"] else "default",
        "dropout": float(p["dropout"]),
    }
    heads = [p["num_heads"] if p["num_head_channels"] == -1 else w // p["num_head_channels"] for w in widths]
    if spatial:
        return CONDITIONAL, config | {
            "attention_head_dim": _one_if_same(heads),  # the number of heads, in spite of its name
            "cross_attention_dim": p["context_dim"],
            "transformer_layers_per_block": p["transformer_depth"],
        }
    config |= {"downsample_type": "resnet", "upsample_type": "resnet"} if block_resampling else {}
    config |= {"attn_norm_num_groups": GROUPS} if p["use_scale_shift_norm"] else {}
    # The middle has attention in any case.
    used = [(w, n) for w, n, here in zip(widths, heads, [*attention[:-1], True], strict=True) if here]
    wide = {w // n for w, n in used}
    one_head = all(n == 1 for _, n in used)
    config |= {"attention_head_dim": None if one_head or len(wide) > 1 else wide.pop()}
    if narrow or (config["attention_head_dim"] is None and not one_head):
        return NARROW, config | {
            "stem_channels": p["model_channels"] if narrow else None,
            "time_embedding_dim": 4 * p["model_channels"] if narrow else None,
            "num_attention_heads": None if config["attention_head_dim"] or one_head else p["num_heads"],
        }
    return PLAIN, config


def _kind(way: str, attention: bool, spatial: bool, block_resampling: bool) -> str:
    """Return the class of a level on the way ``Down`` or ``Up``; ``block_resampling`` is ``resblock_updown``."""
    if attention:
        return f"{'CrossAttn' if spatial else 'Attn'}{way}Block2D"
    return f"Resnet{way}sampleBlock2D" if block_resampling else f"{way}Block2D"


def unet_params(kind: str, config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the arguments of the `UNetModel` that a network of diffusers is; undo `unet_config`.

    The result is only right if `unet_config` returns ``config`` for it, which the caller must check.

    Args:
        kind: the network's class.
        config: all arguments of the class.
        origin: the config's name in error messages.

    Raises:
        UserError: sizes have no counterpart in the papers' code.
    """
    widths, size = config["block_out_channels"], config["sample_size"]
    first = config.get("stem_channels") or widths[0]
    if not isinstance(size, int):
        raise UserError(f"{origin} has sample_size {size}; give a network for square latents, with one number")
    if any(width % first for width in widths):
        raise UserError(f"{origin} has block_out_channels {list(widths)}; give multiples of the first width")
    spatial = kind == CONDITIONAL
    attention = [2**i for i, name in enumerate(config["down_block_types"]) if "Attn" in name]
    params = {
        "image_size": size,
        "in_channels": config["in_channels"],
        "out_channels": config["out_channels"],
        "model_channels": first,
        "attention_resolutions": attention,
        "num_res_blocks": config["layers_per_block"],
        "channel_mult": [width // first for width in widths],
        "dropout": config["dropout"],
        "use_scale_shift_norm": config["resnet_time_scale_shift"] == "scale_shift",
    }
    if spatial:
        return params | {
            **_heads(config["attention_head_dim"], widths, origin),
            "use_spatial_transformer": True,
            "transformer_depth": config["transformer_layers_per_block"],
            "context_dim": config["cross_attention_dim"],
        }
    params["resblock_updown"] = config["downsample_type"] == "resnet"
    if config.get("num_attention_heads"):
        return params | {"num_heads": config["num_attention_heads"]}
    width = config["attention_head_dim"]
    return params | ({"num_heads": 1} if width is None else {"num_head_channels": width})


def _heads(heads: int | Sequence[int], widths: Sequence[int], origin: str) -> dict[str, int]:
    """Return the argument of `UNetModel` for numbers of heads, one or one per level."""
    if isinstance(heads, int):
        return {"num_heads": heads}
    each = {width // number for width, number in zip(widths, heads, strict=True)}
    if len(each) > 1:
        raise UserError(
            f"{origin} has attention_head_dim {list(heads)}; give one number of heads, or heads of one width"
        )
    return {"num_head_channels": each.pop()}


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config in which lists that repeat one value per level are that value."""
    return {
        name: _one_if_same(value) if name in PER_LEVEL and isinstance(value, list) else value
        for name, value in config.items()
    }


def _one_if_same(values: Sequence[Any]) -> Any:
    return values[0] if len(set(map(str, values))) == 1 else list(values)
