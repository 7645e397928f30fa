"""Measure a set of images: compute the requested metrics of the registry, with one pass of each network.

The inputs of all metrics are checked first, so that a metric that cannot be computed fails before any feature is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdiff.errors import UserError
from qdiff.evaluation.registry import METRICS, Metric
from qdiff.evaluation.subject import Subject

# Descriptions of missing attributes of a subject.
_INPUTS = {
    "extractor": "no feature network",
    "clip": "no CLIP model",
    "prompts": "no prompts in its run.json",
    "labels": "no classes that were asked for",
    "classes": "a feature network without class names",
    "float_images": "no float run to compare with",
}
_PARTS = {
    "gaussian": "statistics of features",
    "spatial": "spatial statistics",
    "features": "features of single images",
}


def measure(subject: Subject, metrics: Sequence[str]) -> dict[str, Any]:
    """Compute metrics of a set of images.

    Args:
        subject: the images, and what they are compared with.
        metrics: names in `qdiff.evaluation.registry.METRICS`; the results come in this order.

    Returns:
        The metrics' numbers by key. Metrics of features: ``num_images``, ``num_reference`` (with a reference; None if
        its file does not say), ``fid`` | ``sfid`` | ``isc``, ``isc_std`` (over the parts) | ``kid``, ``kid_std`` (over
        100 subsets), ``kid_subset_size`` (1,000, or the smaller of the two image counts) | ``precision``, ``recall``,
        ``f_score`` (3 neighbours). "fidelity": see `compare_runs`; "clip": see `clip_scores`; "asked": ``asked_share``.

        KID is an unbiased estimate only for independent sets: images that are also in the reference pull it below zero.

    Raises:
        UserError: a metric is unknown, there are too few images, images are unusable, the reference was made with
            another extractor or does not have what a metric needs, or another input is missing.
    """
    check(subject, metrics)
    found: dict[str, Any] = {}
    for name in metrics:
        found |= METRICS[name].measure(subject)
    return found


def check(subject: Subject, metrics: Sequence[str]) -> None:
    """Raise a `UserError` for a metric that cannot be computed, before any feature is computed."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or isinstance(metrics, str) or not metrics:
        raise UserError(f"metrics are {metrics!r}; give a list of names among {', '.join(METRICS)}")
    wanted = [METRICS[name] for name in metrics]
    for metric in wanted:
        if (sentence := _missing_images(subject, metric)) is not None:
            raise UserError(sentence)
    if subject.reference is not None and subject.extractor is not None:
        subject.reference.require_extractor(subject.extractor)
    for metric in wanted:
        if (sentence := _missing_input(subject, metric)) is not None:
            raise UserError(sentence)


def possible(subject: Subject, metrics: Sequence[str]) -> list[str]:
    """Return the metrics for which the subject has all inputs and enough images."""

    def misses(metric: Metric) -> bool:
        return any(missing(subject, metric) is not None for missing in (_missing_images, _missing_input))

    return [name for name in metrics if not misses(METRICS[name])]


def _missing_images(subject: Subject, metric: Metric) -> str | None:
    """Return a sentence if there are too few images for a metric, else None."""
    if subject.count >= metric.least_images:
        return None
    return (
        f"{metric.name} needs {metric.least_images} or more images, here are {subject.count}; sample more, or leave "
        f"{metric.name} out of the metrics"
    )


def _missing_input(subject: Subject, metric: Metric) -> str | None:
    """Return a sentence if an input of a metric is missing, else None."""
    for name in metric.inputs:
        if getattr(subject, name) is None:
            missing = _INPUTS.get(name, f"no {name.replace('_', ' ')}")
            return f"{subject.name} has {missing}, which {metric.name} needs; leave {metric.name} out"
    part, reference = metric.reference_part, subject.reference
    if part is None:
        return None
    if reference is None:
        return f"{metric.name} compares with real images; name the reference statistics"
    if getattr(reference, part) is None:
        return (
            f"{metric.name} needs {_PARTS[part]}, which the reference statistics {reference.name!r} do not hold; make "
            f"them again with scripts/prepare_reference.py, or leave {metric.name} out of the metrics"
        )
    if part == "features" and len(reference.features) < metric.least_images:
        return (
            f"{metric.name} needs features of {metric.least_images} or more images, and the reference statistics "
            f"{reference.name!r} hold {len(reference.features)}; make them from more images"
        )
    return None
