"""What metrics are computed of: a set of images, what it is compared with, and features that all metrics share."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from qdiff.evaluation.extractors import extractor_spec
from qdiff.evaluation.features import ImageFeatures, cached_features
from qdiff.evaluation.image_sets import Images, ImageSet, open_images

if TYPE_CHECKING:
    from qdiff.evaluation.clip_score import Clip
    from qdiff.evaluation.reference import ReferenceStatistics


@dataclass(eq=False)
class Subject:
    """A set of images with all that a metric may want to know of it; only what the metrics asked for need is needed.

    Attributes:
        images: see `open_images`; image i is the one of number i.
        reference: statistics of real images.
        extractor: feature network, from `create_extractor`.
        float_images: of the float run with the same seeds, in the same order.
        prompts, labels: what was asked for: a text, or a class by its number, per image.
        name: of the images, for errors.
        clip: what `load_clip` returned.
        lpips_weights, lpips_net: see `compare_runs`.
        compared: images that are compared with the float run's, the first so many; None compares all.
        adm_protocol: inception score over parts of 5,000 images in order, as guided-diffusion's evaluator computes it,
            not over ten parts of shuffled images, as torch-fidelity does.
        device: where images are compared, and where CLIP runs.
        batch_size: images per forward of the extractor; None takes what fits the memory. It changes results by rounding
            only.
        cache: folder where features are kept; None keeps none.
        progress: show bars on stderr.
    """

    images: Images
    reference: ReferenceStatistics | None = None
    extractor: nn.Module | None = None
    float_images: ImageSet | None = None
    prompts: list[str] | None = None
    labels: list[int] | None = None
    name: str = "the set of images"
    clip: Clip | None = None
    lpips_weights: Path | None = None
    lpips_net: str = "alex"
    compared: int | None = None
    adm_protocol: bool = False
    device: str | torch.device = "cpu"
    batch_size: int | None = None
    cache: Path | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        self.images: ImageSet = open_images(self.images)

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """The classes that the extractor tells apart; None where they are not those that models are asked for."""
        return None if self.extractor is None else extractor_spec(self.extractor.get_name()).classes

    @functools.cached_property
    def features(self) -> ImageFeatures:
        """What the extractor says of the images: one pass, when the first metric asks for it."""
        return cached_features(self.images, self.extractor, self.cache, self.batch_size, self.progress)
