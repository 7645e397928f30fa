"""The root of this repository, from which configs, bundled models and scripts are found."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
