"""How often a conditional model draws what it was asked for, judged by a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from qdiff.errors import UserError
from qdiff.evaluation.extractors import EXTRACTORS, extractor_spec
from qdiff.evaluation.features import ImageFeatures
from qdiff.evaluation.subject import Subject


def asked(subject: Subject) -> dict[str, Any]:
    """Return `asked_share` of a subject's images and labels."""
    return {"asked_share": asked_share(subject.features, subject.labels, f" of {subject.name}")}


def asked_share(found: ImageFeatures, labels: Sequence[int], whose: str = "") -> float:
    """Return the share of images, 0 to 1, in which the classifier sees the class that was asked for.

    It sees the class of the highest logit, and errs at times itself: the digits classifier names 1 of 360 real
    digits wrongly at 16×16, none of them at 32×32.

    Args:
        found: what the classifier, an extractor with class names, makes of the images.
        labels: the class asked for, one per image, as positions in the extractor's ``classes``.
        whose: " of …", for errors.

    Raises:
        UserError: if the extractor has no class names, or labels are no classes or not one per image.
    """
    classes = extractor_spec(found.extractor).classes
    if classes is None:
        able = ", ".join(name for name, spec in EXTRACTORS.items() if spec.classes is not None)
        raise UserError(
            f"The extractor {found.extractor} has no class names, so it cannot tell whether images are what was "
            f"asked for: choose {able}."
        )
    wanted = np.asarray(labels)
    if wanted.ndim != 1 or not np.issubdtype(wanted.dtype, np.integer):
        raise UserError(f"Labels must be a list of integers, one per image, not {wanted.dtype} {list(wanted.shape)}.")
    if len(wanted) != found.count:
        raise UserError(
            f"There are {len(wanted)} labels for the {found.count} images{whose}: give one label per image."
        )
    strange = wanted[(wanted < 0) | (wanted >= len(classes))]
    if len(strange):
        raise UserError(
            f"The label {strange[0]} is no class of {found.extractor}: its classes are 0 to {len(classes) - 1} "
            f"({', '.join(classes)})."
        )
    seen = found.logits.argmax(dim=1)
    return (seen == torch.from_numpy(wanted.astype(np.int64))).double().mean().item()
