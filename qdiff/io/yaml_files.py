"""Read a model family's YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qdiff.errors import UserError, first_line


def read_config(path: Path, missing: str) -> Any:
    """Return the YAML file as an attribute-style tree (OmegaConf).

    Args:
        missing: what to do if the file does not exist, for the error message.

    Raises:
        UserError: the file is missing or is not YAML.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if not path.is_file():
        raise UserError(f"config file {path} does not exist; {missing}")
    try:
        return OmegaConf.load(path)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        raise UserError(f"config file {path} is not readable YAML ({first_line(error)}); correct it") from error
