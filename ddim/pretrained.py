"""Find, download and load the float weights of a DDIM model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from qdiff.errors import UserError
from qdiff.io import files
from qdiff.io.downloads import cache_folder, download
from qdiff.io.repository import REPOSITORY
from qdiff.io.tensor_files import check_state, read_float_tensors, unwrapped


def pretrained_path(config: Any, folder: str | Path | None = None) -> Path:
    """Return the file that ``--use_pretrained`` uses for a config: bundled, cached, or downloaded now.

    Args:
        folder: folder to use instead of the cache (``--model_dir``).

    Raises:
        UserError: the config names no weights, they cannot be downloaded, or their MD5 is wrong.
    """
    entry = config.get("pretrained")
    if entry is None or "file" not in entry:
        raise UserError("this config names no pretrained weights; give --ckpt PATH")
    if "url" not in entry:
        bundled = REPOSITORY / entry.file if folder is None else Path(folder) / Path(entry.file).name
        if not bundled.is_file():
            raise UserError(
                f"the bundled weights {bundled} are missing; restore them from the repository, correct --model_dir, or "
                "give --ckpt PATH"
            )
        return bundled
    path = (cache_folder() if folder is None else Path(folder)) / entry.file
    if not path.is_file():
        download(entry.url, path, entry.get("md5"), ", correct --model_dir, or give --ckpt PATH")
    elif "md5" in entry and files.md5(path) != entry.md5:
        raise UserError(f"{path} has a wrong MD5 (expected {entry.md5}); delete it and run again to download it")
    return path


def load_float_weights(network: nn.Module, path: str | Path) -> None:
    """Load a float checkpoint, released or trained here, strictly and without running code from it.

    Raises:
        UserError: the file is missing, damaged, or holds the weights of another network.
    """
    expected = network.state_dict()
    state = unwrapped(read_float_tensors(Path(path)), expected)
    check_state(state, expected, path)
    network.load_state_dict(state, strict=True)
