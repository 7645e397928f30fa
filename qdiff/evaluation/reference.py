"""Reference statistics: the features of the real images that generated ones are compared with, in one .npz.

The file holds the features themselves, because KID and precision/recall need them; FID's mean and covariance
are derived from them, so that the two cannot disagree.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from qdiff.errors import UserError
from qdiff.evaluation.extractors import REPOSITORY, extractor_spec, weights_hash
from qdiff.files import written_whole

FORMAT = "qdiff reference statistics 1"


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Features of a reference set, and what they were made from.

    Attributes:
        name: what the images are, for people.
        features: float32 or float16 [N, D].
        extractor: a key of ``EXTRACTORS``.
        weights_hash: SHA-256 of the extractor's weights, see ``extractors.weights_hash``.
        images_hash: SHA-256 of the images' pixels, see ``metrics.ImageSet.sha256``.
    """

    name: str
    features: np.ndarray
    extractor: str
    weights_hash: str
    images_hash: str

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.dtype not in (np.float32, np.float16):
            raise ValueError(
                f"features must be float32 or float16 [N, D], not {self.features.dtype} {self.features.shape}"
            )

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.features)

    @cached_property
    def mu(self) -> np.ndarray:
        """Mean of the features, float64 [D]."""
        return self.features.mean(axis=0, dtype=np.float64)

    @cached_property
    def sigma(self) -> np.ndarray:
        """Covariance of the features with the divisor N-1, float64 [D, D]."""
        return np.cov(self.features.astype(np.float64), rowvar=False)

    def require_extractor(self, extractor: nn.Module) -> None:
        """Raise a UserError unless ``extractor`` is the one, with the weights, that made these features."""
        used = extractor.get_name()
        if used != self.extractor:
            raise UserError(
                f"The reference statistics {self.name!r} were made with the extractor {self.extractor}, not "
                f"{used}: choose that extractor, or make statistics with {used}."
            )
        used_hash = weights_hash(extractor)
        if used_hash != self.weights_hash:
            raise UserError(
                f"The reference statistics {self.name!r} were made with other weights of {self.extractor} "
                f"({self.weights_hash[:12]}, now {used_hash[:12]}): use those weights, or make the "
                "statistics anew."
            )


def save_reference(reference: ReferenceStatistics, path: str | Path) -> None:
    """Write ``reference`` to ``path`` (.npz, compressed; equal content gives equal bytes)."""
    about = {
        "format": FORMAT,
        "name": reference.name,
        "count": reference.count,
        "extractor": reference.extractor,
        "weights_hash": reference.weights_hash,
        "images_hash": reference.images_hash,
    }
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, features=reference.features, about=np.array(json.dumps(about)))


def load_reference(path: str | Path, extractor: nn.Module | None = None) -> ReferenceStatistics:
    """Read what :func:`save_reference` wrote.

    Args:
        path: the .npz file.
        extractor: if given, the statistics must have been made with it.

    Raises:
        UserError: if the file is missing, is no such file, or was made with another extractor or weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"There are no reference statistics at {path}: name an existing .npz file, or make it from the images."
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            about = json.loads(str(archive["about"]))
            if about["format"] != FORMAT:
                raise ValueError(f"format is {about['format']!r}")
            reference = ReferenceStatistics(
                name=about["name"],
                features=archive["features"],
                extractor=about["extractor"],
                weights_hash=about["weights_hash"],
                images_hash=about["images_hash"],
            )
        if reference.count != about["count"]:
            raise ValueError(f"{reference.count} features, but {about['count']} images")
    # np.load gives an array, not an archive, for a .npy file: hence the last two.
    except (zipfile.BadZipFile, OSError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} does not hold reference statistics in this toolkit's format ({error}): name a file that "
            "save_reference wrote, or make it anew from the images."
        ) from error
    if extractor is not None:
        reference.require_extractor(extractor)
    return reference


def bundled_reference(name: str, extractor: nn.Module | None = None) -> ReferenceStatistics:
    """Load the reference statistics that come with the extractor called ``name``.

    Raises:
        UserError: as :func:`load_reference`, or if that extractor comes with none.
    """
    spec = extractor_spec(name)
    if spec.reference is None:
        raise UserError(
            f"No reference statistics come with the extractor {name}: make them from the real images first."
        )
    return load_reference(REPOSITORY / spec.reference, extractor)
