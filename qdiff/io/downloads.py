"""Download a file on request into the user's cache, atomically and with a checksum."""

from __future__ import annotations

import http.client
import os
import urllib.request
from pathlib import Path

from qdiff.errors import UserError
from qdiff.io import files
from qdiff.io.files import written_whole
from qdiff.io.progress import progress_bar


def cache_folder() -> Path:
    """Return the folder for downloads and statistics: ``$QDIFF_CACHE``, or ``qdiff`` in the user's cache folder."""
    if "QDIFF_CACHE" in os.environ:
        return Path(os.environ["QDIFF_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qdiff"


def download(url: str, path: Path, md5: str | None = None, otherwise: str = "", *, sha256: str | None = None) -> None:
    """Download a file with a progress bar.

    Args:
        path: where the file goes; nothing is left there after an error.
        md5: expected MD5 of the content.
        otherwise: what else the user can do, for error messages; follows "… by hand to PATH".
        sha256: expected SHA-256 of the content.

    Raises:
        UserError: the file cannot be downloaded, or a checksum is wrong.
    """
    by_hand = f"download {url} by hand to {path}{otherwise}"
    try:
        with (
            urllib.request.urlopen(url, timeout=30) as response,
            written_whole(path) as temporary,
            open(temporary, "wb") as file,
            progress_bar(desc=f"downloading {path.name}", unit="B", unit_scale=True) as bar,
        ):
            bar.total = int(response.headers.get("Content-Length") or 0) or None
            while block := response.read(1 << 20):
                file.write(block)
                bar.update(len(block))
            file.flush()
            for kind, expected, measure in (("MD5", md5, files.md5), ("SHA-256", sha256, files.sha256)):
                if expected is not None and measure(temporary) != expected:
                    raise UserError(
                        f"the download of {url} has a wrong {kind} (expected {expected}); run again, or {by_hand}"
                    )
    except UserError:
        raise
    except (OSError, ValueError, http.client.HTTPException) as error:  # no network, invalid URL, broken response
        reason = getattr(error, "reason", error)
        raise UserError(f"{path} is missing and cannot be downloaded ({reason}); {by_hand}") from error
