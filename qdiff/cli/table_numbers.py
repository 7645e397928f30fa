"""What a table tells about one finished run, and what it holds against it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qdiff.cli.mixed_precision import WIDTHS
from qdiff.cli.run_manifest import FLOAT_WEIGHTS, Manifest
from qdiff.config import ScalePer
from qdiff.evaluation.registry import metric_columns

TOLERANCE = 0.05  # largest accepted relative difference of the float model from its published number


def misses(row: dict[str, Any]) -> list[str]:
    """Return one sentence per published number that the row misses by more than 5 %."""
    sentences = []
    for column in metric_columns():
        wanted, found = row["published"].get(column.key), row.get(column.key)
        if wanted and found is not None and abs(found - wanted) > TOLERANCE * abs(wanted):
            off = abs(found - wanted) / abs(wanted)
            sentences.append(
                f"{column.title} {column.write(found)} misses the published {column.write(wanted)} by {100 * off:.0f} %"
            )
    return sentences


def ranges(ptq: dict[str, Any]) -> str | None:
    """Describe the activation ranges of a row that is modulated or has dynamic ranges; None for any other row."""
    quant = ptq.get("quant", {})
    if quant.get("act_dynamic"):
        ranges = quant.get("act_scale_per", ScalePer.TENSOR.value)
    elif quant.get("modulate"):
        ranges = "calibrated" if ptq["changes"]["learn"] else "min-max"
    else:
        return None
    return f"{ranges}, rest {quant['rest_bits']}" if quant.get("rest_bits") else ranges


def file_bytes(folder: Path, manifest: Manifest) -> int:
    """Return the bytes of the quantized checkpoint, or of the network's float weights in float32."""
    calibrated, files = folder / "quantized.safetensors", manifest.files
    if calibrated.is_file():
        return calibrated.stat().st_size
    if "quantized checkpoint" in files:
        return Path(files["quantized checkpoint"]["path"]).stat().st_size
    # The file of a float latent model also holds an autoencoder; only the quantized network counts.
    return manifest.network_bytes or Path(files[FLOAT_WEIGHTS]["path"]).stat().st_size


def machine_of(manifest: Manifest) -> str:
    """Describe what a run was made on; runs of earlier versions do not tell their CPU."""
    machine = manifest.machine
    cpu = f" ({machine['cpu']})" if "cpu" in machine else ""
    return (
        f"{machine['cpus']} CPUs{cpu}, {manifest.torch_threads} thread(s), device {manifest.device}, "
        f"torch {manifest.packages.get('torch')}"
    )


def mean_widths(folder: Path) -> dict[str, float | None]:
    """Return the mean widths that a run of mixed precision chose; None for any other run, and for what it left alone.

    Args:
        folder: the run folder.

    Returns:
        ``mean_weight_bits``, over all weights, and ``mean_act_bits``, over all multiplications.
    """
    file = folder / WIDTHS
    chosen = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {"mean_weight_bits": chosen.get("mean_bits"), "mean_act_bits": chosen.get("mean_act_bits")}
