"""Class accuracy: how often a conditional model draws the requested class, judged by a classifier."""

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
    """Return the share of images, 0 to 1, in which the classifier sees the requested class (class accuracy).

    The classifier sees the class with the highest logit, and is sometimes wrong itself: the digits classifier
    misclassifies 1 of 360 real digits at 16×16, and none at 32×32.

    Args:
        found: the images' features and logits from the classifier, an extractor with class names.
        labels: the requested class per image, as positions in the extractor's ``classes``.
        whose: " of …", for errors.

    Raises:
        UserError: the extractor has no class names, or the labels are not valid classes, one per image.
    """
    classes = extractor_spec(found.extractor).classes
    if classes is None:
        able = ", ".join(name for name, spec in EXTRACTORS.items() if spec.classes is not None)
        raise UserError(
            f"the extractor {found.extractor} has no class names, so it cannot tell whether images are what was "
            f"asked for; choose {able}"
        )
    wanted = np.asarray(labels)
    if wanted.ndim != 1 or not np.issubdtype(wanted.dtype, np.integer):
        raise UserError(f"labels are {wanted.dtype} {list(wanted.shape)}; give a list of integers, one per image")
    if len(wanted) != found.count:
        raise UserError(f"there are {len(wanted)} labels for the {found.count} images{whose}; give one label per image")
    strange = wanted[(wanted < 0) | (wanted >= len(classes))]
    if len(strange):
        raise UserError(
            f"the label {strange[0]} is not a class of {found.extractor}; give one of 0 to {len(classes) - 1} "
            f"({', '.join(classes)})"
        )
    seen = found.logits.argmax(dim=1)
    return (seen == torch.from_numpy(wanted.astype(np.int64))).double().mean().item()
