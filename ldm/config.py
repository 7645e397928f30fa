"""Read the YAML file of a latent diffusion model and check what everything else relies on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.util import ALLOWED_TARGETS
from qdiff.config_files import read_config
from qdiff.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
HOLDER = "ldm.models.diffusion.ddpm.LatentDiffusion"


def load_config(path: str | Path) -> Any:
    """Return a model's config as an attribute-style tree (OmegaConf).

    A ``base`` entry names another YAML file (relative to the repository) that this one adds to or overrides.

    Raises:
        UserError: the file is missing, is not YAML, is of another family, or lacks a part of the model.
    """
    from omegaconf import OmegaConf

    config = _read(Path(path))
    if "base" in config:
        config = OmegaConf.merge(_read(REPOSITORY / str(config.base)), config)
    model = config.get("model")
    if not OmegaConf.is_dict(model) or model.get("target") != HOLDER:
        named = model.get("target") if OmegaConf.is_dict(model) else None
        raise UserError(
            f"config file {path} is not that of a latent diffusion model (model.target is {named}, not {HOLDER}); give "
            "one of configs/latent-diffusion or configs/stable-diffusion"
        )
    for part in ("unet_config", "first_stage_config"):
        stage = (model.get("params") or {}).get(part)
        if not OmegaConf.is_dict(stage) or "target" not in stage or not OmegaConf.is_dict(stage.get("params")):
            raise UserError(f"config file {path} lacks model.params.{part} with target and params; add it")
        if stage.target not in ALLOWED_TARGETS:
            raise UserError(f"config file {path} names the class {stage.target}, which is not allowed; correct it")
    return config


def _read(path: Path) -> Any:
    from omegaconf import OmegaConf

    config = read_config(path, missing="see configs/latent-diffusion and configs/stable-diffusion")
    if not OmegaConf.is_dict(config):
        raise UserError(f"config file {path} is not a YAML mapping; correct it")
    return config


def is_latent_config(config: Any) -> bool:
    """Whether a config has the form of a latent diffusion model's."""
    return str((config.get("model") or {}).get("target", "")).startswith("ldm.")
