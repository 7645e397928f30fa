"""Read YAML files: configs of model families as attribute-style trees, tables as plain mappings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qdiff.errors import UserError, first_line


def read_config(path: Path, missing: str) -> Any:
    """Return a YAML file as an attribute-style tree (OmegaConf).

    Args:
        missing: what to do if the file does not exist, for the error message.

    Raises:
        UserError: the file is missing, is not YAML, or is not a mapping.
    """
    from omegaconf import OmegaConf

    return _read(path, OmegaConf.load, "config file", missing)


def read_table(path: Path) -> dict[str, Any]:
    """Return a table's YAML file, or a config that it names, as a plain mapping.

    Values are parsed by PyYAML, which reads ``1e-3`` as a string and ``2024-01-01`` as a date; OmegaConf does not.

    Raises:
        UserError: as `read_config`.
    """
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the same, ten times as fast where PyYAML has libyaml
    return _read(path, lambda file: yaml.load(file.read_text(), loader), "table or config", "see configs/tables")


def _read(path: Path, load: Callable[[Path], Any], what: str, missing: str) -> Any:
    import yaml
    from omegaconf.errors import OmegaConfBaseException

    if not path.exists() or path.is_dir():
        raise UserError(f"{what} {path} does not exist; {missing}")
    try:
        value = load(path)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError, OSError) as error:
        # An invalid date raises a ValueError.
        raise UserError(f"{what} {path} is not readable YAML ({first_line(error)}); correct it") from error
    if not isinstance(value, Mapping):
        raise UserError(f"{what} {path} is not a YAML mapping; correct it")
    return value
