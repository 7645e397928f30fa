"""Registry of weight formats. To add one, write a file here with a `WeightFormat`, and add it to the rows below."""

from __future__ import annotations

from qdiff.deploy.comfyui import COMFYUI
from qdiff.deploy.nunchaku_lite import NUNCHAKU_LITE
from qdiff.deploy.weight_format import WeightFormat

FORMATS: dict[str, WeightFormat] = {row.name: row for row in (COMFYUI, NUNCHAKU_LITE)}
"""The formats by their name in ``--format`` of scripts/export.py."""
