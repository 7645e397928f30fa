"""Find the files of a latent diffusion model and read sizes from its config."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ldm.config import load_config
from qdiff.errors import UserError
from qdiff.io.repository import REPOSITORY

CHECKPOINTS = ("model.ckpt", "model.safetensors")


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint that ``-r`` names: a file, or the model file in a folder.

    Raises:
        UserError: there is no config.yaml next to the checkpoint.
    """
    path = Path(path)
    if path.is_dir():
        found = [path / name for name in CHECKPOINTS if (path / name).is_file()]
        path = found[0] if found else path / CHECKPOINTS[0]
    if not path.with_name("config.yaml").is_file():
        raise UserError(
            f"there is no config.yaml next to {path}; give -r a model's checkpoint or folder, e.g. "
            "models/ldm/lsun_beds256/model.ckpt"
        )
    return path


def big_or_bundled(
    given_config: str | None, given_ckpt: str | None, config: str, ckpt: str, bundled: Path
) -> tuple[Path, Path, str | None]:
    """Return config and checkpoint: the given ones, else the big model's if present, else the bundled model's.

    Relative defaults are searched for in the current folder, then in the repository.

    Args:
        given_config, given_ckpt: ``--config`` and ``--ckpt``.
        config, ckpt: files of the big model.
        bundled: folder of the bundled model.

    Returns:
        Config, checkpoint, and a sentence for the user if the bundled model replaces the big one, else None.
    """
    if given_config:
        pretrained = load_config(given_config).get("pretrained") or {}
        return Path(given_config), Path(given_ckpt or _here_or_in_repository(pretrained.get("file", ckpt))), None
    if given_ckpt:
        beside = Path(given_ckpt).with_name("config.yaml")
        return beside if beside.is_file() else _here_or_in_repository(config), Path(given_ckpt), None
    if (weights := _here_or_in_repository(ckpt)).is_file():
        return _here_or_in_repository(config), weights, None
    note = f"{ckpt} is missing; the bundled model {bundled} is used instead"
    return bundled / "config.yaml", bundled / "model.safetensors", note


def _here_or_in_repository(path: str) -> Path:
    inside = REPOSITORY / path
    return inside if inside.is_file() and not Path(path).is_file() else Path(path)


@dataclass(frozen=True)
class ImageSize:
    """The sizes that users of the text scripts can choose; None takes the model's.

    Attributes:
        H, W: height and width of an image in pixels.
        C: channels of a latent.
        f: image pixels per latent pixel, per side.
    """

    H: int | None = None
    W: int | None = None
    C: int | None = None
    f: int | None = None


def latent_shape(config: Any, asked: ImageSize) -> tuple[int, int, int]:
    """Return (C, h, w) of a model's latents, adapted to ``--H`` and ``--W``.

    Raises:
        UserError: ``--C`` or ``--f`` differs from the model's, or its UNet cannot halve ``--H`` or ``--W``.
    """
    params = config.model.params
    channels, size = params.get("channels", 3), params.get("image_size", 256)
    if all(getattr(asked, field.name) is None for field in fields(asked)):
        return channels, size, size
    ddconfig = params.first_stage_config.params.get("ddconfig") or {}
    if "ch_mult" not in ddconfig:
        raise UserError(
            "the model's config has no first_stage_config.params.ddconfig.ch_mult; leave out --H, --W and --f"
        )
    factor = 2 ** (len(ddconfig.ch_mult) - 1)
    for name, value, own in (("C", asked.C, channels), ("f", asked.f, factor)):
        if value not in (None, own):
            raise UserError(f"--{name} is {value} but this model's is {own}; leave --{name} out")
    # The UNet halves the latent once per level, and its skips must fit on the way back up.
    unit = factor * 2 ** (len(params.unet_config.params.get("channel_mult", (1, 2, 4, 8))) - 1)
    sides = []
    for name, value in (("H", asked.H), ("W", asked.W)):
        value = size * factor if value is None else value
        if value < 1 or value % unit:
            raise UserError(
                f"--{name} is {value}; give a positive multiple of {unit} (this model's --f {factor} times the "
                "UNet's downsampling)"
            )
        sides.append(value // factor)
    return channels, sides[0], sides[1]


def how_to_get(config: Any) -> str:
    """Return the advice for a missing checkpoint."""
    pretrained = config.get("pretrained") or {}
    if "url" in pretrained:
        return f"download {pretrained['url']} and put it there ({pretrained.get('note', 'a checkpoint file')})"
    return "check the path"
