"""A reference that samples are compared with, given by a user: images, statistics of images, or a file with both."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from torch import nn

from qdiff.evaluation.features import cached_features
from qdiff.evaluation.image_sets import ImageSet, NpzImages, holds_images
from qdiff.evaluation.reference import (
    FOREIGN_EXTRACTOR,
    ReferenceStatistics,
    find_reference,
    holds_statistics,
    load_reference,
    reference_of,
    statistics_file,
)
from qdiff.evaluation.run_images import images_at


class ReferenceSet:
    """A reference given by path or name; decides whether it means images or statistics.

    Folders, and .npz files without statistics, are images. Any other file, and a name that `find_reference` knows, are
    statistics. ADM's files hold statistics of the whole set and some images: FID and sFID use the statistics, and
    metrics that need features of single images use the images.

    Args:
        name: the path or name.

    Attributes:
        name: as given.
        images: the images; None if there are only statistics.
        has_statistics: whether there are statistics.

    Raises:
        UserError: the reference means images, and these are missing or unusable.
    """

    def __init__(self, name: str | Path) -> None:
        self.name = str(name)
        path = Path(name)
        if not path.is_dir():
            path = statistics_file(name) or path
        self.has_statistics = not (path.is_dir() or (path.suffix == ".npz" and not holds_statistics(path)))
        self.images: ImageSet | None = None
        if not self.has_statistics:
            self.images = images_at(path)
        elif holds_images(path):
            self.images = NpzImages(path)

    @property
    def extractor(self) -> str:
        """Name of the feature network: the one that made the statistics, if their file can be found without it."""
        file = statistics_file(self.name) if self.has_statistics else None
        return FOREIGN_EXTRACTOR if file is None else load_reference(file).extractor

    def statistics(self, extractor: nn.Module) -> ReferenceStatistics | None:
        """Return the statistics that the name stands for; None if it stands for images.

        Raises:
            UserError: as `find_reference`.
        """
        return find_reference(self.name, extractor) if self.has_statistics else None

    def completed(
        self,
        statistics: ReferenceStatistics | None,
        extractor: nn.Module,
        needs_features: bool,
        cache: Path | None = None,
        batch_size: int | None = None,
    ) -> ReferenceStatistics:
        """Return the statistics, with missing parts computed from the images.

        Args:
            statistics: the result of `statistics`.
            needs_features: also compute features of single images, if there are images.
            cache, batch_size: see `cached_features`.
        """
        if statistics is not None and (self.images is None or statistics.features is not None or not needs_features):
            return statistics
        found = cached_features(self.images, extractor, cache, batch_size)
        if statistics is None:
            return reference_of(found, self.name)
        return dataclasses.replace(statistics, features=found.features.numpy())
