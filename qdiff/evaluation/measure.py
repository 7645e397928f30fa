"""Measure a set of images: the metrics asked for, by the registry, over one pass of each network.

What metrics need is checked first: what cannot give a number is an error before any feature is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from qdiff.errors import UserError
from qdiff.evaluation.registry import METRICS, Metric
from qdiff.evaluation.subject import Subject

# What a subject's attributes are called where one is missing.
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
        metrics: names out of `qdiff.evaluation.registry.METRICS`; numbers come in their order.

    Returns:
        The metrics' numbers by key. Those of features: ``num_images``, ``num_reference`` (with a reference; None where
        its file does not tell), ``fid`` | ``sfid`` | ``isc``, ``isc_std`` (over the parts) | ``kid``, ``kid_std`` (over
        100 subsets), ``kid_subset_size`` (1,000, or the smaller of the two image counts) | ``precision``, ``recall``,
        ``f_score`` (3 neighbours). Of "fidelity": see `compare_runs`; of "clip": see `clip_scores`; of "asked":
        ``asked_share``.

        KID is an unbiased estimate for independent sets only: images that are in the reference too pull it
        below zero.

    Raises:
        UserError: on an unknown metric, too few images, unusable images, a reference of another extractor or without
            what a metric needs, or another input that is missing.
    """
    check(subject, metrics)
    found: dict[str, Any] = {}
    for name in metrics:
        found |= METRICS[name].measure(subject)
    return found


def check(subject: Subject, metrics: Sequence[str]) -> None:
    """Raise a `UserError` for what cannot give a number, before any feature is computed."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or isinstance(metrics, str) or not metrics:
        raise UserError(f"Metrics must be a list out of {', '.join(METRICS)}, not {metrics!r}.")
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
    """Return those of the metrics that the subject has all inputs and enough images for."""

    def misses(metric: Metric) -> bool:
        return any(missing(subject, metric) is not None for missing in (_missing_images, _missing_input))

    return [name for name in metrics if not misses(METRICS[name])]


def _missing_images(subject: Subject, metric: Metric) -> str | None:
    """Return a sentence where there are too few images for a metric."""
    if subject.count >= metric.least_images:
        return None
    return (
        f"{metric.name} needs {metric.least_images} or more images, here are {subject.count}: sample more, or leave "
        f"{metric.name} out of the metrics."
    )


def _missing_input(subject: Subject, metric: Metric) -> str | None:
    """Return a sentence about what a metric is to be computed from and is not there."""
    for name in metric.inputs:
        if getattr(subject, name) is None:
            missing = _INPUTS.get(name, f"no {name.replace('_', ' ')}")
            return f"{subject.name} has {missing}, which {metric.name} needs; leave {metric.name} out"
    part, reference = metric.reference_part, subject.reference
    if part is None:
        return None
    if reference is None:
        return f"{metric.name} compares with real images: name the reference statistics."
    if getattr(reference, part) is None:
        return (
            f"{metric.name} needs {_PARTS[part]}, which the reference statistics {reference.name!r} do not hold: make "
            f"them anew with scripts/prepare_reference.py, or leave {metric.name} out of the metrics."
        )
    if part == "features" and len(reference.features) < metric.least_images:
        return (
            f"{metric.name} needs features of {metric.least_images} or more images, and the reference statistics "
            f"{reference.name!r} hold {len(reference.features)}: make them of more images."
        )
    return None
