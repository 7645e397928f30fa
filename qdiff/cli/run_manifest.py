"""Read a run's ``run.json``, as its own command continues it and as an evaluation finds it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def read_manifest(file: Path) -> dict[str, Any]:
    """Return the entries of a ``run.json``.

    Raises:
        ValueError: it is damaged, or an entry that is read has a value of another kind; the message says which.
    """
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError) as error:
        raise ValueError(str(error)) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("config"), dict):
        raise ValueError("it has no config")
    for name, fits in _FITS.items():
        if name in manifest and not fits(manifest[name]):
            raise ValueError(f"{name} is {_short(manifest[name])}")
    prompts = manifest["config"].get("prompts")
    if not (prompts is None or _is_list(prompts, str)):
        raise ValueError(f"the prompts of its config are {_short(prompts)}")
    return manifest


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(v, kind) and not isinstance(v, bool) for v in value)


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), str) for entry in value.values()
    )


_FITS = {
    "status": lambda value: value in ("running", "finished"),
    "num_images": lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0,
    "images_kept": lambda value: isinstance(value, bool),
    "image_shape": lambda value: _is_list(value, int) and len(value) == 3,
    "files": _is_files,
    "seconds": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "noise_error": lambda value: isinstance(value, dict) and _is_number(value.get("mse")),
    "labels": lambda value: _is_list(value, int),
}
