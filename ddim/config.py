"""Read a DDIM model's YAML file and check all its keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qdiff.errors import UserError
from qdiff.io.config_schema import Key, check_section
from qdiff.io.yaml_files import read_config
from qdiff.sampling import BetaKind, DiffusionSchedule, Parameterization, TrainingNoise

COUNT = Key(int, least=1)
REQUIRED_COUNT = Key(int, required=True, least=1)
SECTIONS = {
    "data": {
        "dataset": Key(str, required=True),
        "image_size": REQUIRED_COUNT,
        "channels": REQUIRED_COUNT,
        "rescaled": Key(bool),
        "logit_transform": Key(bool),
        "uniform_dequantization": Key(bool),
        "gaussian_dequantization": Key(bool),
        "random_flip": Key(bool),
        "num_workers": Key(int, least=0),
        "category": Key(str),
        "path": Key(str),
    },
    "model": {
        "type": Key(choices=("simple",), because="no network of the DDPM code's other types was published"),
        "in_channels": REQUIRED_COUNT,
        "out_ch": REQUIRED_COUNT,
        "ch": REQUIRED_COUNT,
        "ch_mult": Key(Sequence[int], required=True, least=1),
        "num_res_blocks": REQUIRED_COUNT,
        "attn_resolutions": Key(Sequence[int], required=True, least=1),
        "dropout": Key(float, required=True, least=0),
        # As in the published samplers; none of them uses a learned or another fixed variance.
        "var_type": Key(choices=("fixedlarge", "fixedsmall"), because="no sampler uses a learned variance"),
        "ema_rate": Key(float, least=0),
        "ema": Key(bool),
        "resamp_with_conv": Key(bool, required=True),
    },
    "diffusion": {
        "beta_schedule": Key(choices=tuple(kind.value for kind in BetaKind), required=True),
        "beta_start": Key(float, required=True),
        "beta_end": Key(float, required=True),
        "num_diffusion_timesteps": REQUIRED_COUNT,
        "parameterization": Key(choices=tuple(kind.value for kind in Parameterization)),
        "rescale_betas_zero_snr": Key(bool),
    },
    "training": {
        "batch_size": COUNT,
        "n_epochs": COUNT,
        "n_iters": COUNT,
        "snapshot_freq": COUNT,
        "validation_freq": COUNT,
    },
    "sampling": {"batch_size": COUNT, "last_only": Key(bool)},
    "optim": {
        "optimizer": Key(choices=("Adam",)),
        "lr": Key(float, least=0),
        "beta1": Key(float, least=0),
        "eps": Key(float, least=0),
        "weight_decay": Key(float, least=0),
        "amsgrad": Key(choices=(False,)),
        "grad_clip": Key(float, least=0),
        "warmup_steps": Key(int, least=0),
    },
    "pretrained": {name: Key(str) for name in ("file", "url", "md5", "reference", "extractor", "note")},
}
REQUIRED = ("data", "model", "diffusion")
TRAINED_WITH = {
    "training": ("batch_size", "n_epochs"),
    "optim": ("lr", "beta1", "eps", "weight_decay", "grad_clip"),
    "model": ("ema_rate",),
}
FREE = ("eda_dm",)  # by option name; the method checks it


def load_config(path: str | Path) -> Any:
    """Return the configuration as an attribute-style tree (OmegaConf).

    Raises:
        UserError: the file is missing or not YAML, has an unknown key or a value of a wrong kind, or has no value for a
            key that a DDIM model needs.
    """
    known = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yml"))) or "configs/*.yml"
    config = read_config(Path(path), missing=f"give --config one of: {known}")
    origin = f"config file {path}"
    for section in REQUIRED:
        part = config.get(section) if isinstance(config, Mapping) else None
        first = next(name for name, key in SECTIONS[section].items() if key.required)
        if not isinstance(part, Mapping):
            raise UserError(f"{origin} has no {section}.{first}; a DDIM model needs it (see configs/cifar10.yml)")
    check_section(config, {name: Key(Mapping) for name in (*SECTIONS, *FREE)}, "", origin)
    for section, keys in SECTIONS.items():
        if section in config:
            check_section(config[section], keys, section, origin)
    if config.data.get("rescaled", True) and config.data.get("logit_transform", False):
        raise UserError(f"{origin} has both data.rescaled and data.logit_transform; set only one of them")
    if any(factor * config.model.ch % 32 for factor in config.model.ch_mult) or not config.model.ch_mult:
        raise UserError(
            f"{origin} has model.ch {config.model.ch} and ch_mult {config.model.ch_mult}; give products that are "
            "multiples of 32, the number of normalisation groups"
        )
    return config


def check_training(config: Any, origin: str) -> None:
    """Raise a `UserError` if a config does not describe the training of its network.

    Args:
        origin: the config's name in error messages.
    """
    for section, names in TRAINED_WITH.items():
        for name in names:
            if name not in (config.get(section) or {}):
                raise UserError(f"{origin} has no {section}.{name}, which training needs; see configs/digits.yml")


def training_noise(config: Any) -> TrainingNoise:
    """Return the noise that ``config.diffusion`` describes."""
    d = config.diffusion
    return TrainingNoise(
        d.beta_schedule,
        d.beta_start,
        d.beta_end,
        d.num_diffusion_timesteps,
        zero_terminal_snr=d.get("rescale_betas_zero_snr", False),
        parameterization=Parameterization(d.get("parameterization", Parameterization.EPS.value)),
    )


def build_schedule(config: Any) -> DiffusionSchedule:
    """Return the noise schedule that ``config.diffusion`` describes."""
    return training_noise(config).schedule()


def parameterization(config: Any) -> Parameterization:
    """Return the quantity that a config's network predicts."""
    return training_noise(config).parameterization
