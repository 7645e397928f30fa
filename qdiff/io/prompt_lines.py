"""Prompts of text files, one per line, and of COCO's captions."""

from __future__ import annotations

import json
import re
from pathlib import Path

from qdiff.errors import UserError


def prompt_lines(text: str) -> list[str]:
    """Return the non-empty lines, without surrounding spaces.

    Only newlines end a line: other characters at which `str.splitlines` splits (U+2028, form feed) occur inside
        captions.
    """
    return [line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def read_prompts(path: str | Path, option: str = "--from-file") -> list[str]:
    """Return the prompts of a text file, one per line, or one caption per image, by image id, of a COCO captions file.

    Args:
        option: the option that named the file, for error messages.

    Raises:
        UserError: the file is missing, unreadable, empty, or a JSON file that is not COCO's.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors write a byte-order mark
    except FileNotFoundError:
        raise UserError(f"prompt file {path} does not exist; check {option}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt file {path} cannot be read as UTF-8 text ({error}); check {option}") from error
    prompts = _coco_captions(text, path) if path.suffix.lower() == ".json" else prompt_lines(text)
    if not prompts:
        raise UserError(f"prompt file {path} holds no prompt; write one per line")
    return prompts


def _coco_captions(text: str, path: Path) -> list[str]:
    try:
        first: dict[int, tuple[int, str]] = {}
        for entry in json.loads(text)["annotations"]:
            image, caption = int(entry["image_id"]), (int(entry["id"]), " ".join(entry["caption"].split()))
            first[image] = min(first.get(image, caption), caption)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"{path} is not a COCO captions file ({type(error).__name__}: {error}); give captions_val2014.json or a "
            "text file with one prompt per line"
        ) from error
    # If an image has several captions, the one with the lowest id counts, regardless of their order in the file.
    return [caption for image in sorted(first) if (caption := first[image][1])]
