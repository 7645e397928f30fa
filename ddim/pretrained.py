"""Find, fetch and load the float weights of a DDIM model."""

from __future__ import annotations

import http.client
import os
import urllib.request
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from qdiff import files
from qdiff.errors import UserError
from qdiff.files import written_whole
from qdiff.tensor_files import check_state, read_float_tensors

REPOSITORY = Path(__file__).resolve().parents[1]


def cache_folder() -> Path:
    """Return where downloads go: ``$QDIFF_CACHE``, or ``qdiff`` in the user's cache folder."""
    if "QDIFF_CACHE" in os.environ:
        return Path(os.environ["QDIFF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qdiff"


def pretrained_path(config: Any) -> Path:
    """Return the file that ``--use_pretrained`` takes for a config: bundled, cached, or downloaded now.

    Raises:
        UserError: the config names none, it cannot be downloaded, or its MD5 is wrong.
    """
    entry = config.get("pretrained")
    if entry is None or "file" not in entry:
        raise UserError("this config names no pretrained weights; give --ckpt PATH")
    if "url" not in entry:
        bundled = REPOSITORY / entry.file
        if not bundled.is_file():
            raise UserError(
                f"the bundled weights {bundled} are missing; restore them from the repository, or give --ckpt"
            )
        return bundled
    path = cache_folder() / entry.file
    if not path.is_file():
        _download(entry.url, path, entry.get("md5"))
    elif "md5" in entry and files.md5(path) != entry.md5:
        raise UserError(f"{path} has a wrong MD5 (expected {entry.md5}); delete it and run again to download it anew")
    return path


def _download(url: str, path: Path, md5: str | None) -> None:
    by_hand = f"download {url} by hand to {path}, or give --ckpt PATH"
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as response,
            written_whole(path) as temporary,
            open(temporary, "wb") as file,
            tqdm(desc=f"downloading {path.name}", unit="B", unit_scale=True) as bar,
        ):
            bar.total = int(response.headers.get("Content-Length") or 0) or None
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            file.flush()
            if md5 is not None and files.md5(temporary) != md5:
                raise UserError(f"the download of {url} has a wrong MD5 (expected {md5}); run again, or {by_hand}")
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, no URL, a broken answer
        reason = getattr(error, "reason", error)
        raise UserError(f"{path} is not there and cannot be downloaded ({reason}); {by_hand}") from error


def load_float_weights(network: nn.Module, path: str | Path) -> None:
    """Load a released or our own float checkpoint strictly, without running code from it.

    Raises:
        UserError: missing, damaged, or the weights of another network.
    """
    state = {name.removeprefix("module."): tensor for name, tensor in read_float_tensors(Path(path)).items()}
    check_state(state, network.state_dict(), path)
    network.load_state_dict(state, strict=True)
