"""How the numbers of a table came about: what a reader needs to compare them with others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qdiff.cli.run_manifest import Manifest
from qdiff.cli.table_file import TableFile
from qdiff.evaluation.reference import ReferenceStatistics


def protocol_of(
    table: TableFile,
    manifest: Manifest,
    results: Sequence[dict[str, Any]],
    extractor: str,
    reference: ReferenceStatistics,
    compared: int,
) -> list[tuple[str, str]]:
    """Return the protocol as (name, value), in the order shown.

    Args:
        table: the table's file.
        manifest: of the float row.
        results: of every finished row, before seeds are put together.
        extractor: name of the feature network.
        reference: the statistics of real images.
        compared: number of images compared with float's one by one.
    """
    counts, dates = sorted({row["images"] for row in results}), sorted(row["date"] for row in results)
    told = [
        ("images per row", " or ".join(f"{count:,}" for count in counts)),
        ("seed", str(manifest.config["seed"])),
        ("sampler", _shown(manifest.config["sampler"])),
        ("pixels", "clamped, scaled to 0–255, rounded"),
        ("features", f"{extractor} ({(reference.weights_hash or 'weights not known')[:12]})"),
        ("reference", f"{reference.name} ({reference.count:,} images)" if reference.count else reference.name),
        ("float weights", (manifest.weights_hash or "")[:12]),
        ("PSNR, SSIM", f"against the float row, image by image, first {compared} images"),
        ("ε error", "mean squared difference from the float network on held-out inputs"),
    ]
    if _any(results, "last_step_mse"):
        told.append(("ε last step", "the same for the inputs of the sampler's last network call, at the smallest t"))
    if _any(results, "mean_weight_bits") or _any(results, "mean_act_bits"):
        told.append(("mean W, A bits", "of mixed precision: W over all weights, A over all multiplications"))
    told += [
        ("file", "bytes of the quantized checkpoint; float: the denoising network in float32"),
        ("counted, GBops", "parameters and bit operations by qdiff/cost/account.py; one sample, one network call"),
    ]
    if _any(results, "state_bytes"):
        told += [
            ("GBops of modulated rows", "mean over the run's network calls, the first step included"),
            ("state", "float32 tensors that modulated layers keep from step to step, bytes per image"),
            ("additions", "what modulated layers add and subtract at a later step, per image; in no GBops"),
        ]
    refits = "; with those of refits, which they do not" if any("--refit" in r["command"] for r in results) else ""
    widths = "; with the choice of widths" if any("--target_" in r["command"] for r in results) else ""
    told.append(("calibration", f"without the recording of the calibration set, which all rows share{refits}{widths}"))
    if any(row.group for row in table.rows):
        told += [
            ("±", "standard deviation over the calibration seeds, each with a calibration set of its own"),
            (
                "bold, =",
                "the best of its widths, and what is equal to it within √(s² + s²) of both deviations; a row of one "
                "seed has the largest deviation of its widths",
            ),
            ("CPU", "CPU seconds of the calibration"),
        ]
    if any("asked_share" in row for row in results):
        told.append(("asked", "images in which the classifier sees what was asked for"))
    told += [
        ("machine", machines_text(results, {row.label: row.group for row in table.rows})),
        ("date", dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"),
    ]
    return told if table.source is None else [("published numbers", table.source), *told]


def _any(results: Sequence[dict[str, Any]], key: str) -> bool:
    return any(row.get(key) for row in results)


def machines_text(results: Sequence[dict[str, Any]], groups: Mapping[str, str | None]) -> str:
    """Name the machines; with more than one, that of most rows first, and of each other one its rows.

    Times are comparable only on one machine. A group whose finished seeds are all of one machine is named once.

    Args:
        results: of every finished row.
        groups: the label that stands for all seeds of a row, by the row's label.
    """
    rows: dict[str, list[str]] = {}
    used: dict[str | None, set[str]] = {}  # machines by the label of the group
    for row in results:
        rows.setdefault(row["machine"], []).append(row["label"])
        used.setdefault(groups[row["label"]], set()).add(row["machine"])
    (text, _), *others = sorted(rows.items(), key=lambda one: (-len(one[1]), one[0]))
    for machine, labels in others:
        shown = [group if (group := groups[label]) and len(used[group]) == 1 else label for label in labels]
        text += f"; but {machine}: " + ", ".join(f"“{label}”" for label in dict.fromkeys(shown))
    return text


def _shown(sampler: Any) -> str:
    """Return a sampler's configuration as readable text."""
    if not isinstance(sampler, dict):
        return str(sampler)
    return ", ".join(f"{k} {v}" for k, v in sampler.items() if v is not None)
