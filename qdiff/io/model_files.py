"""A model on disk: a checkpoint, and its config in ``config.yaml`` beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qdiff.errors import UserError
from qdiff.io.files import check_writable, written_whole

CONFIG_NAME = "config.yaml"


def check_new_model(path: str | Path) -> None:
    """Raise a `UserError` now if a checkpoint or its config is there already, or could not be written later."""
    for file in (Path(path), Path(path).with_name(CONFIG_NAME)):
        check_writable(file)
        if file.exists():
            raise UserError(f"{file} exists; choose another folder, or delete it")


def write_model(path: str | Path, state: Mapping[str, Tensor], config: Any) -> None:
    """Write a checkpoint (safetensors) and its config, a mapping of YAML values."""
    from omegaconf import OmegaConf
    from safetensors.torch import save_file

    with written_whole(path) as temporary:
        save_file(dict(state), temporary)
    with written_whole(Path(path).with_name(CONFIG_NAME)) as temporary:
        OmegaConf.save(OmegaConf.create(config), temporary)
