"""Read the YAML file of a latent diffusion model and check all its keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.keys import MODEL, PARAMS, PRETRAINED, STAGE, TOP
from qdiff.errors import UserError
from qdiff.io.config_schema import check_section
from qdiff.io.repository import REPOSITORY
from qdiff.io.yaml_files import read_config

MISSING = "see configs/latent-diffusion and configs/stable-diffusion"  # advice for a missing file
HOLDER = "ldm.models.diffusion.ddpm.LatentDiffusion"
TARGETS = {
    "unet_config": ("ldm.modules.diffusionmodules.openaimodel.UNetModel",),
    "first_stage_config": ("ldm.models.autoencoder.AutoencoderKL", "ldm.models.autoencoder.VQModelInterface"),
    "cond_stage_config": (
        "ldm.modules.encoders.modules.ClassEmbedder",
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    ),
}
NOTHING = "__is_unconditional__"


def load_config(path: str | Path) -> Any:
    """Return a model's config as an attribute-style tree (OmegaConf).

    A ``base`` entry names another YAML file (relative to the repository) that this one extends and overrides.

    Raises:
        UserError: the file is missing, not YAML, or of another family, has no entry for a part of the model, or has an
            unknown key or a value of a wrong kind.
    """
    from omegaconf import OmegaConf

    config = read_config(Path(path), MISSING)
    if "base" in config:
        config = OmegaConf.merge(read_config(REPOSITORY / str(config.base), MISSING), config)
    model = config.get("model")
    if not OmegaConf.is_dict(model) or model.get("target") != HOLDER:
        named = model.get("target") if OmegaConf.is_dict(model) else None
        raise UserError(
            f"config file {path} does not describe a latent diffusion model (model.target is {named}, not {HOLDER}); "
            "give one of configs/latent-diffusion or configs/stable-diffusion"
        )
    origin = f"config file {path}"
    check_section(config, TOP, "", origin)
    check_section(model, MODEL, "model", origin)
    params = model.get("params") or {}
    for part in TARGETS:
        _check_part(params.get(part, NOTHING), part, origin)
    check_section(params, PARAMS, "model.params", origin)
    if "pretrained" in config:
        check_section(config.pretrained, PRETRAINED, "pretrained", origin)
    conditional = params.get("cond_stage_config", NOTHING) != NOTHING
    # Without a conditioning_key, latent diffusion concatenates the condition to the latent unless concat_mode is false.
    if conditional and params.get("conditioning_key") is None and params.get("concat_mode", True):
        raise UserError(f"{origin} has no model.params.conditioning_key; add conditioning_key: crossattn")
    return config


def _check_part(stage: Any, part: str, origin: str) -> None:
    if part == "cond_stage_config" and stage == NOTHING:
        return
    where = f"model.params.{part}"
    needs_params = part != "cond_stage_config"
    if not isinstance(stage, Mapping) or "target" not in stage:
        raise UserError(f"{origin} has no {where} with target and params; add it")
    if needs_params and not isinstance(stage.get("params"), Mapping):
        raise UserError(f"{origin} has no {where} with target and params; add it")
    check_section(stage, STAGE, where, origin)
    if stage.target not in TARGETS[part]:
        raise UserError(
            f"{origin} has {where}.target {stage.target}, which is not allowed; choose {' or '.join(TARGETS[part])}"
        )
