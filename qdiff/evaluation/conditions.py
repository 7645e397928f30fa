"""How often a conditional model draws what it was asked for, judged by a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from qdiff.errors import UserError
from qdiff.evaluation.extractors import EXTRACTORS, create_extractor, extractor_spec
from qdiff.evaluation.features import ImageFeatures, extract_features
from qdiff.evaluation.image_sets import Images, open_images


def asked_share(
    images: Images | ImageFeatures,
    labels: Sequence[int],
    extractor_name: str,
    extractor_weights: str | Path | None = None,
    batch_size: int = 256,
) -> float:
    """Return the share of images, 0 to 1, in which the classifier sees the class that was asked for.

    It sees the class of the highest logit, and errs at times itself: the digits classifier names 1 of 360 real
    digits wrongly at 16×16, none of them at 32×32.

    Args:
        images: a folder (sorted by name, file i is image i) or another form that `open_images` takes; or what the
            extractor made of them before.
        labels: the class asked for, one per image, as positions in the extractor's ``classes``.
        extractor_name: a key of ``EXTRACTORS`` with class names.
        extractor_weights: weights file; by default the bundled one.
        batch_size: images per forward of the classifier.

    Raises:
        UserError: if the extractor has no class names, labels are no classes or not one per image, or weights
            or images are unusable.
    """
    classes = extractor_spec(extractor_name).classes
    if classes is None:
        able = ", ".join(name for name, spec in EXTRACTORS.items() if spec.classes is not None)
        raise UserError(
            f"The extractor {extractor_name} has no class names, so it cannot tell whether images are what was "
            f"asked for: choose {able}."
        )
    known, where = isinstance(images, ImageFeatures), f" in {images}" if isinstance(images, str | Path) else ""
    count = images.count if known else len(images := open_images(images))
    asked = np.asarray(labels)
    if asked.ndim != 1 or not np.issubdtype(asked.dtype, np.integer):
        raise UserError(f"Labels must be a list of integers, one per image, not {asked.dtype} {list(asked.shape)}.")
    if len(asked) != count:
        raise UserError(f"There are {len(asked)} labels for the {count} images{where}: give one label per image.")
    strange = asked[(asked < 0) | (asked >= len(classes))]
    if len(strange):
        raise UserError(
            f"The label {strange[0]} is no class of {extractor_name}: its classes are 0 to {len(classes) - 1} "
            f"({', '.join(classes)})."
        )
    if not known:
        images = extract_features(images, create_extractor(extractor_name, extractor_weights), batch_size, False)
    seen = images.logits.argmax(dim=1)
    return (seen == torch.from_numpy(asked.astype(np.int64))).double().mean().item()
