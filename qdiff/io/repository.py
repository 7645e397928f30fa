"""Where this repository lies: configs, bundled models and scripts are found from its root."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
