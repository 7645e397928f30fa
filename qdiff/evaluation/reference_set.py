"""What samples are compared with, as a user names it: images, statistics of images, or a file of both."""

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
    """A reference by its path or name. This is where "images or statistics?" is answered.

    Folders are images; a .npz file without statistics is, too. Any other file, and a name that `find_reference` knows,
    stand for statistics. ADM's files hold images beside the statistics of the whole set: FID and sFID are of the
    statistics, and what needs features of single images has them of the images.

    Args:
        name: the path or name.

    Attributes:
        name: as given.
        images: the images; None where there are statistics alone.
        has_statistics: whether there are statistics.

    Raises:
        UserError: it stands for images, and these are missing or unusable.
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
        """The feature network to compare by: the one that made the statistics, where their file is known without it."""
        file = statistics_file(self.name) if self.has_statistics else None
        return FOREIGN_EXTRACTOR if file is None else load_reference(file).extractor

    def statistics(self, extractor: nn.Module) -> ReferenceStatistics | None:
        """Return the statistics that were named; None where images were.

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
        """Return the statistics with what is missing made of the images.

        Args:
            statistics: what `statistics` returned.
            needs_features: features of single images are wanted, where there are images to have them of.
            cache, batch_size: see `cached_features`.
        """
        if statistics is not None and (self.images is None or statistics.features is not None or not needs_features):
            return statistics
        found = cached_features(self.images, extractor, cache, batch_size)
        if statistics is None:
            return reference_of(found, self.name)
        return dataclasses.replace(statistics, features=found.features.numpy())
