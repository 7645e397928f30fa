"""Post-training quantization of diffusion models.

The names below are imported when they are first used, so that importing a submodule that needs no torch, such as
`qdiff.cli.passive_waiting`, does not load torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qdiff.diffusers_backend.registration import register_when_imported

if TYPE_CHECKING:
    from qdiff.api import calibrate, choose_widths, record, sample
    from qdiff.checkpoint import load_checkpoint, save_checkpoint
    from qdiff.config import QuantConfig
    from qdiff.diffusers_backend.config import QDiffConfig
    from qdiff.diffusers_backend.quantize import quantize_pipeline
    from qdiff.diffusers_backend.structure import cache_weights
    from qdiff.errors import UserError
    from qdiff.evaluation.noise_error import measure_noise_error
    from qdiff.quant_model import QuantModel

__all__ = [
    "QDiffConfig",
    "QuantConfig",
    "QuantModel",
    "UserError",
    "cache_weights",
    "calibrate",
    "choose_widths",
    "load_checkpoint",
    "measure_noise_error",
    "quantize_pipeline",
    "record",
    "sample",
    "save_checkpoint",
]

register_when_imported()

_HOMES = {
    "QDiffConfig": "qdiff.diffusers_backend.config",
    "cache_weights": "qdiff.diffusers_backend.structure",
    "quantize_pipeline": "qdiff.diffusers_backend.quantize",
    "QuantConfig": "qdiff.config",
    "QuantModel": "qdiff.quant_model",
    "UserError": "qdiff.errors",
    "calibrate": "qdiff.api",
    "choose_widths": "qdiff.api",
    "measure_noise_error": "qdiff.evaluation.noise_error",
    "record": "qdiff.api",
    "sample": "qdiff.api",
    "load_checkpoint": "qdiff.checkpoint",
    "save_checkpoint": "qdiff.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    try:  # ``import qdiff`` alone makes its submodules available, too
        return importlib.import_module(f"qdiff.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"qdiff.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
