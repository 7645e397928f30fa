"""Reference statistics: what is kept of the real images that generated ones are compared with, in one .npz.

The file holds mean and covariance of all images, for FID and sFID, and features of up to 50,000 of them, for KID and
precision/recall. ADM's and pytorch-fid's files are read as well.
"""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qdiff.errors import UserError
from qdiff.evaluation.extractors import weights_hash
from qdiff.evaluation.features import ImageFeatures, extract_features
from qdiff.evaluation.gaussians import Gaussian
from qdiff.evaluation.image_sets import Images
from qdiff.io.downloads import cache_folder
from qdiff.io.files import DAMAGED_NPZ, written_whole
from qdiff.io.repository import REPOSITORY

FORMAT = "qdiff reference statistics 2"
MOST_FEATURES = 50_000
# Files of others do not say which network made them: these two projects' use Inception.
FOREIGN_EXTRACTOR = "inception-v3-compat"
FOREIGN_SIZES = {"": 2048, "_s": 2023}  # pytorch-fid has smaller features too, of other layers
BUNDLED = {"digits": "models/digits_reference.npz", "digits32": "models/digits32_reference.npz"}


@dataclass(frozen=True, eq=False)
class ReferenceStatistics:
    """Statistics of a reference set, and what they were made from.

    Attributes:
        name: what the images are, for people: data set, split, size and resize filter.
        extractor: a key of ``EXTRACTORS``.
        weights_hash: SHA-256 of the extractor's weights, see ``extractors.weights_hash``; None where a file of others
            does not tell.
        images_hash: SHA-256 of the images' pixels, see ``ImageSet.sha256``; None likewise.
        gaussian: of the features of all images.
        spatial: of the spatial features of all images; None where a file of others has none.
        features: float32 [n, D] of all images, or of 50,000 evenly spaced ones; None likewise.
    """

    name: str
    extractor: str
    weights_hash: str | None
    images_hash: str | None
    gaussian: Gaussian
    spatial: Gaussian | None = None
    features: np.ndarray | None = None

    @property
    def count(self) -> int:
        """Number of images; 0 where a file of others does not tell."""
        return self.gaussian.count

    def require_extractor(self, extractor: nn.Module) -> None:
        """Raise a UserError unless ``extractor`` is the one, with the weights, that made these statistics."""
        used = extractor.get_name()
        if used != self.extractor:
            raise UserError(
                f"The reference statistics {self.name!r} were made with the extractor {self.extractor}, not "
                f"{used}: choose that extractor, or make statistics with {used}."
            )
        used_hash = weights_hash(extractor)
        if self.weights_hash is not None and used_hash != self.weights_hash:
            raise UserError(
                f"The reference statistics {self.name!r} were made with other weights of {self.extractor} "
                f"({self.weights_hash[:12]}, now {used_hash[:12]}): use those weights, or make the "
                "statistics anew."
            )


def compute_reference(
    images: Images, extractor: nn.Module, name: str, batch_size: int | None = None, progress: bool = True
) -> ReferenceStatistics:
    """Make the reference statistics of real images, to be kept with `save_reference`.

    Args:
        images: see `qdiff.evaluation.image_sets.open_images`.
        extractor: from `qdiff.evaluation.extractors.create_extractor`.
        name: what the images are: data set, split, size and resize filter.
        batch_size, progress: see `extract_features`.
    """
    return reference_of(extract_features(images, extractor, batch_size, progress, most_kept=MOST_FEATURES), name)


def reference_of(found: ImageFeatures, name: str) -> ReferenceStatistics:
    """Return features that were extracted already as reference statistics."""
    return ReferenceStatistics(
        name=name,
        extractor=found.extractor,
        weights_hash=found.weights_hash,
        images_hash=found.pixels_hash,
        gaussian=found.gaussian,
        spatial=found.spatial,
        features=found.features.numpy(),
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
    arrays = {"mu": reference.gaussian.mu, "sigma": reference.gaussian.sigma}
    if reference.spatial is not None:
        arrays |= {"mu_s": reference.spatial.mu, "sigma_s": reference.spatial.sigma}
    if reference.features is not None:
        arrays["features"] = reference.features
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, about=np.array(json.dumps(about)), **arrays)


def holds_statistics(path: str | Path) -> bool:
    """Whether a .npz file holds statistics (ours, ADM's or pytorch-fid's), not images alone."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def load_reference(path: str | Path, extractor: nn.Module | None = None) -> ReferenceStatistics:
    """Read what `save_reference` wrote, or ``mu``, ``sigma`` (``mu_s``, ``sigma_s``) of ADM's or pytorch-fid's files.

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
            reference = _read(archive, path)
    # np.load gives an array, not an archive, for a .npy file: hence AttributeError.
    except DAMAGED_NPZ as error:
        raise UserError(
            f"{path} does not hold reference statistics ({error}): name a file that scripts/prepare_reference.py "
            "wrote, or make it anew from the images."
        ) from error
    if extractor is not None:
        reference.require_extractor(extractor)
    return reference


def _read(archive: Any, path: Path) -> ReferenceStatistics:
    if "about" not in archive:
        for suffix, size in FOREIGN_SIZES.items():
            if f"mu{suffix}" in archive and archive[f"mu{suffix}"].shape != (size,):
                raise ValueError(
                    f"mu{suffix} is {list(archive[f'mu{suffix}'].shape)}, but that of Inception is [{size}]"
                )
        return ReferenceStatistics(
            name=path.name,
            extractor=FOREIGN_EXTRACTOR,
            weights_hash=None,
            images_hash=None,
            gaussian=_gaussian(archive, ""),
            spatial=_gaussian(archive, "_s") if "mu_s" in archive else None,
        )
    about = json.loads(str(archive["about"]))
    if about["format"] != FORMAT:
        raise ValueError(f"format is {about['format']!r}, not {FORMAT!r}")
    features = archive.get("features")
    if features is not None and (features.ndim != 2 or features.shape[1] != len(archive["mu"])):
        raise ValueError(f"features are {list(features.shape)}, but the mean has {len(archive['mu'])}")
    return ReferenceStatistics(
        **{k: about[k] for k in ("name", "extractor", "weights_hash", "images_hash")},
        gaussian=_gaussian(archive, "", about["count"]),
        spatial=_gaussian(archive, "_s", about["count"]) if "mu_s" in archive else None,
        features=features,
    )


def _gaussian(archive: Any, suffix: str, count: int = 0) -> Gaussian:
    return Gaussian(archive[f"mu{suffix}"].astype(np.float64), archive[f"sigma{suffix}"].astype(np.float64), count)


def cached_reference_path(name: str, extractor: nn.Module) -> Path:
    """Return where the statistics called ``name`` are kept: the weights that made them are part of the file's name."""
    file = f"{name}-{extractor.get_name()}-{weights_hash(extractor)[:8]}.npz"
    return cache_folder() / "references" / file


def statistics_file(name: str | Path) -> Path | None:
    """Return the file that a reference's path (from here or from the repository) or bundled name stands for.

    None where it stands for no file that is there: for prepared statistics the extractor must be known as well.
    """
    path = next((p for p in (Path(name), REPOSITORY / name) if p.is_file()), None)
    return REPOSITORY / BUNDLED[str(name)] if path is None and str(name) in BUNDLED else path


def find_reference(name: str | Path, extractor: nn.Module) -> ReferenceStatistics:
    """Load statistics by name (bundled, or prepared before) or by a file's path (from here or from the repository).

    Raises:
        UserError: as `load_reference`, or no such name is known here.
    """
    path = statistics_file(name)
    if path is None and Path(name).suffix == ".npz":
        path = Path(name)
    if path is None:
        path = cached_reference_path(str(name), extractor)
        if not path.is_file():
            raise UserError(
                f"There are no reference statistics {str(name)!r} for {extractor.get_name()} (they would be {path}): "
                f"make them with 'python scripts/prepare_reference.py {name} …', or name a .npz file, or one of "
                f"{', '.join(BUNDLED)}."
            )
    return load_reference(path, extractor)
