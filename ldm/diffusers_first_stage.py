"""The configs of the first stages as the arguments of diffusers' ``VQModel`` and ``AutoencoderKL``, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qdiff.errors import UserError

VQ, KL = "VQModel", "AutoencoderKL"
TARGETS = {VQ: "ldm.models.autoencoder.VQModelInterface", KL: "ldm.models.autoencoder.AutoencoderKL"}
# Arguments of diffusers' classes that change no output of the networks: latents are scaled outside them.
FREE = ("force_upcast", "sample_size", "scaling_factor")


def first_stage_config(stage: Mapping[str, Any], origin: str) -> tuple[str, dict[str, Any]]:
    """Return the class of a first stage in diffusers, and its arguments but ``scaling_factor``.

    Args:
        stage: ``first_stage_config``, with target and params.
        origin: the config's name in error messages.

    Raises:
        UserError: that class cannot express the network.
    """
    kind = next(name for name, target in TARGETS.items() if target == stage["target"])
    params, d = stage["params"], stage["params"]["ddconfig"]
    double = d.get("double_z", True)
    for name, is_there in (
        (f"double_z {str(double).lower()}", double != (kind == KL)),
        ("a ch_mult that does not begin with 1", d["ch_mult"][0] != 1),
        ("another embed_dim than z_channels", kind == KL and params["embed_dim"] != d["z_channels"]),
    ):
        if is_there:
            raise UserError(f"{origin} has a first stage with {name}, unlike any {kind} of diffusers; choose another")
    attention = [d["resolution"] // 2**i in d["attn_resolutions"] for i in range(len(d["ch_mult"]))]
    config = {
        "in_channels": d["in_channels"],
        "out_channels": d["out_ch"],
        "block_out_channels": [d["ch"] * factor for factor in d["ch_mult"]],
        "layers_per_block": d["num_res_blocks"],
        "down_block_types": [f"{'Attn' if here else ''}DownEncoderBlock2D" for here in attention],
        "up_block_types": [f"{'Attn' if here else ''}UpDecoderBlock2D" for here in reversed(attention)],
        "latent_channels": d["z_channels"],
        "sample_size": d["resolution"],
    }
    if kind == KL:
        return kind, config
    return kind, config | {"num_vq_embeddings": params["n_embed"], "vq_embed_dim": params["embed_dim"]}


def first_stage_section(kind: str, config: Mapping[str, Any], origin: str) -> dict[str, Any]:
    """Return the ``first_stage_config`` whose network a first stage of diffusers is; undo `first_stage_config`.

    The result is only right if `first_stage_config` returns ``config`` for it, which the caller must check.

    Args:
        kind: its class.
        config: all arguments of the class.
        origin: the config's name in error messages.

    Raises:
        UserError: widths are not multiples of the first.
    """
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise UserError(f"{origin} has block_out_channels {list(widths)}; give multiples of the first width")
    size = config["sample_size"] if isinstance(config["sample_size"], int) else config["sample_size"][0]
    attention = [size // 2**i for i, name in enumerate(config["down_block_types"]) if "Attn" in name]
    params = {"embed_dim": config["latent_channels"]}
    if kind == VQ:
        params = {
            "embed_dim": config["vq_embed_dim"] or config["latent_channels"],
            "n_embed": config["num_vq_embeddings"],
        }
    params["ddconfig"] = {
        "double_z": kind == KL,
        "z_channels": config["latent_channels"],
        "resolution": size,
        "in_channels": config["in_channels"],
        "out_ch": config["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": config["layers_per_block"],
        "attn_resolutions": attention,
        "dropout": 0.0,
    }
    return {"target": TARGETS[kind], "params": params}
