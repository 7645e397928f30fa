"""The file of a noise correction: JSON, with what it was collected for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.io.files import written_whole
from qdiff.sampling import NoiseCorrection, Sampler

FORMAT = "qdiff-noise-correction-1"
FIX = "give another --correction_path, or collect one with --noise_correction"
# What decides the images but not the errors of ε.
_IRRELEVANT = ("fixed_code",)
# How ranges were chosen: what counts is the checkpoint that holds them. Widths of layers have an entry of another name,
# because under this one older files have only those that were given, without the ones that were chosen.
_NOT_COMPARED = ("weight_range", "act_range", "layer_bits")
# Entries that came later. A file without one does not say it; its checkpoint is compared in any case.
_LATER = ("layer_widths", "precision")


def describe_use(sampler: Sampler, quant: QuantConfig, checkpoint: str, precision: str) -> dict[str, Any]:
    """Return what a correction is valid for, as JSON values by name.

    Args:
        quant: of the network that was calibrated or loaded, with the widths that were chosen for its layers.
        checkpoint: `qdiff.checkpoint.metadata.content_hash` of the quantized checkpoint.
        precision: in which both networks are called, e.g. ``float16``.
    """
    options = {name: value for name, value in asdict(sampler.options).items() if name not in _IRRELEVANT}
    values = quant.to_dict()
    widths = {name: value for name, value in values.items() if name not in _NOT_COMPARED}
    betas = sampler.schedule.betas.numpy().tobytes()
    return {
        "checkpoint": checkpoint,
        "precision": precision,
        **{("sampler" if name == "kind" else name): value for name, value in options.items()},
        "shape": list(sampler.shape),
        "predicts": sampler.parameterization.value,
        "schedule": hashlib.sha256(betas).hexdigest()[:16],
        **widths,
        "layer_widths": values.get("layer_bits", {}),
    }


def write_correction(
    path: Path, correction: NoiseCorrection, use: Mapping[str, Any], origin: Mapping[str, Any]
) -> None:
    """Write a correction, atomically.

    Args:
        use: from `describe_use`.
        origin: how it was collected, JSON values.
    """
    tables = {name: getattr(correction, name).tolist() for name in NoiseCorrection.table_names()}
    held = {"format": FORMAT, **origin, "for": use, "timesteps": correction.times, **tables}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in held.items())
    with written_whole(path) as temporary:
        temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


def read_correction(path: Path, fix: str = FIX) -> tuple[NoiseCorrection, dict[str, Any], dict[str, Any]]:
    """Return a correction, what it is valid for, and how it was collected.

    Args:
        fix: what to do about a file that is not right, the rest of the sentence.

    Raises:
        UserError: the file is missing, damaged, or of another kind.
    """
    if not path.is_file():
        raise UserError(f"noise correction {path} does not exist; {fix}")
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held.pop("format") != FORMAT:
            raise ValueError(f"its format is not {FORMAT}")
        tables = [torch.tensor(held.pop(name), dtype=torch.float64) for name in NoiseCorrection.table_names()]
        correction = NoiseCorrection(tuple(map(float, held.pop("timesteps"))), *tables)
        return correction, dict(held.pop("for")), held
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is not a noise correction, or is damaged ({error}); {fix}") from error


def check_use(
    path: Path,
    correction: NoiseCorrection,
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    sampler: Sampler,
    fix: str = FIX,
) -> None:
    """Raise a `UserError` if a correction was collected for something else than a run does.

    Args:
        path: the correction's file.
        found, wanted: what the file is valid for, and what the run does; from `describe_use`.
        sampler: the run's sampler.
        fix: as in `read_correction`.
    """
    for name in (*wanted, *(found.keys() - wanted.keys())):
        if name in _NOT_COMPARED or (name in _LATER and name not in found):
            continue
        there, here = found.get(name), wanted.get(name)
        if there != here:
            what = "for another quantized checkpoint" if name == "checkpoint" else f"with {name} {there}, not {here}"
            raise UserError(f"noise correction {path} was collected {what}; {fix}")
    times = sampler.visited()
    missing = [t for call, t in enumerate(times) if correction.times[call : call + 1] != (t,)]
    if missing:
        raise UserError(f"noise correction {path} has no entry for timestep {missing[0]:g}; {fix}")
    if len(correction.times) > len(times):
        raise UserError(
            f"noise correction {path} has {len(correction.times)} entries for {len(times)} network calls; {fix}"
        )
    channels = correction.scale.shape[1]
    if channels not in (1, sampler.shape[0]):
        raise UserError(f"noise correction {path} is for {channels} channels, not {sampler.shape[0]}; {fix}")
