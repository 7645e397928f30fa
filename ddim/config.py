"""Read a model's YAML file and check the parts that everything else relies on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddim.samplers.schedule import DiffusionSchedule, make_beta_schedule
from qdiff.config_files import read_config
from qdiff.errors import UserError

REQUIRED = {
    "data": ("dataset", "image_size", "channels"),
    "model": (
        "in_channels",
        "out_ch",
        "ch",
        "ch_mult",
        "num_res_blocks",
        "attn_resolutions",
        "dropout",
        "resamp_with_conv",
    ),
    "diffusion": ("beta_schedule", "beta_start", "beta_end", "num_diffusion_timesteps"),
}


def load_config(path: str | Path) -> Any:
    """Return the configuration as an attribute-style tree (OmegaConf).

    Raises:
        UserError: the file is missing, is not YAML, or lacks a key that a DDIM model needs.
    """
    from omegaconf import DictConfig

    known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yml"))) or "configs/*.yml"
    config = read_config(Path(path), missing=f"give --config one of: {known}")
    for section, keys in REQUIRED.items():
        part = config.get(section) if isinstance(config, DictConfig) else None
        for key in keys:
            if not isinstance(part, DictConfig) or key not in part:
                raise UserError(
                    f"config file {path} lacks {section}.{key}; a DDIM model needs it (see configs/cifar10.yml)"
                )
    _check_numbers(config, path)
    return config


def _check_numbers(config: Any, path: Path) -> None:
    numbers = {
        "data": ("image_size", "channels"),
        "model": ("in_channels", "out_ch", "ch", "num_res_blocks"),
        "diffusion": ("num_diffusion_timesteps",),
    }
    for section, keys in numbers.items():
        for key in keys:
            value = config[section][key]
            if not isinstance(value, int) or value < 1:
                raise UserError(f"config file {path} has {section}.{key} {value!r}; give a whole number above 0")
    from omegaconf import OmegaConf

    factors = list(config.model.ch_mult) if OmegaConf.is_list(config.model.ch_mult) else []
    if not factors or not all(isinstance(f, int) and f * config.model.ch % 32 == 0 and f > 0 for f in factors):
        raise UserError(
            f"config file {path} has model.ch {config.model.ch} and ch_mult {config.model.ch_mult}; their products "
            "must be multiples of 32, the number of normalisation groups"
        )


def build_schedule(config: Any) -> DiffusionSchedule:
    """Return the noise schedule that ``config.diffusion`` describes."""
    d = config.diffusion
    betas = make_beta_schedule(d.beta_schedule, d.beta_start, d.beta_end, d.num_diffusion_timesteps)
    return DiffusionSchedule(betas)
