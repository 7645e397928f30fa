"""The metrics by name. A new one is a file beside this with a function of a `Subject`, and a row below.

    def contrast(subject: Subject) -> dict[str, Any]:
        pixels = torch.cat([batch.double().flatten(1) for batch in subject.images.batches(64)])
        return {"contrast": float(pixels.std(1).mean())}

    Metric("contrast", contrast, (Column("contrast", "contrast", HIGHER, "{:.1f}".format),))

``scripts/evaluate.py --metrics contrast`` and ``metrics: [contrast]`` in a table's file then measure it; tables have a
column of it, and plots an axis.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qdiff.evaluation.clip_score import clip_score
from qdiff.evaluation.column import HIGHER, LOWER, Column
from qdiff.evaluation.conditions import asked
from qdiff.evaluation.fidelity import fidelity
from qdiff.evaluation.metrics import ISC_SPLITS, PRC_NEIGHBORHOOD, fid, isc, kid, prc, sfid
from qdiff.evaluation.subject import Subject


@dataclass(frozen=True)
class Metric:
    """One way to judge a set of images.

    Attributes:
        name: what it is asked for by.
        measure: returns its numbers by key; each is computed from what the subject holds, and nothing else is read.
        columns: of its numbers, those that tables and plots show, in order. The first tells whether it was measured.
        least_images: with fewer there is no number.
        inputs: attributes of the `Subject` that it cannot do without.
        reference_part: the attribute of `ReferenceStatistics` that it compares with.
        option: the option of ``scripts/evaluate.py`` that asks for it by naming what it needs; None leaves it to
            ``--metrics``.
        implied: measured wherever the subject has what it needs; nobody asks for it by name.
    """

    name: str
    measure: Callable[[Subject], dict[str, Any]]
    columns: tuple[Column, ...]
    least_images: int = 1
    inputs: tuple[str, ...] = ()
    reference_part: str | None = None
    option: str | None = None
    implied: bool = False


_ROWS = (
    # An IS split without an image is a mean over nothing; FID and KID divide by N-1; a k-th neighbour must exist.
    Metric("fid", fid, (Column("fid", "FID", LOWER, "{:.2f}".format),), 2, ("extractor",), "gaussian"),
    Metric("sfid", sfid, (Column("sfid", "sFID", LOWER, "{:.2f}".format),), 2, ("extractor",), "spatial"),
    Metric("isc", isc, (Column("isc", "IS", HIGHER, "{:.2f}".format, spread=True),), ISC_SPLITS, ("extractor",)),
    # Its spread is of its subsets, not of its mean, and would be mistaken for it.
    Metric("kid", kid, (Column("kid", "KID", LOWER, "{:.4f}".format),), 2, ("extractor",), "features"),
    Metric(
        "prc",
        prc,
        (
            Column("precision", "precision", HIGHER, "{:.3f}".format),
            Column("recall", "recall", HIGHER, "{:.3f}".format),
        ),
        PRC_NEIGHBORHOOD + 1,
        ("extractor",),
        "features",
    ),
    Metric(
        "clip",
        clip_score,
        (Column("clip_score", "CLIP", HIGHER, "{:.2f}".format),),
        inputs=("clip", "prompts"),
        option="--clip",
    ),
    Metric(
        "asked",
        asked,
        (Column("asked_share", "asked", HIGHER, lambda share: f"{100 * share:.1f} %", share=True),),
        least_images=2,
        inputs=("labels", "classes"),
        implied=True,
    ),
    Metric(
        "fidelity",
        fidelity,
        (
            Column("psnr", "PSNR", HIGHER, "{:.1f} dB".format),
            Column("ssim", "SSIM", HIGHER, "{:.3f}".format),
            Column("lpips", "LPIPS", LOWER, "{:.3f}".format),
        ),
        inputs=("float_images",),
        option="--against",
    ),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ROWS}


def named_metrics() -> list[str]:
    """Return the names that a table's file may ask for."""
    return [metric.name for metric in METRICS.values() if not metric.implied]


def optional_metrics() -> list[str]:
    """Return the names that ``scripts/evaluate.py --metrics`` takes: of metrics that no other option asks for."""
    return [name for name in named_metrics() if METRICS[name].option is None]


def implied_metrics() -> list[str]:
    """Return the names of metrics that are measured wherever they can be."""
    return [metric.name for metric in METRICS.values() if metric.implied]


def metric_columns() -> list[Column]:
    """Return the columns of all metrics, in order."""
    return [column for metric in METRICS.values() for column in metric.columns]
