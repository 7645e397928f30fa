"""The subject of metrics: a set of images, what it is compared with, and the features that all metrics share."""

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
    """A set of images with everything that metrics use; only the inputs of the requested metrics must be given.

    Attributes:
        images: see `open_images`; image i has the number i.
        reference: statistics of real images.
        extractor: feature network, from `create_extractor`.
        float_images: images of the float run with the same seeds, in the same order.
        prompts, labels: the request per image: a text, or the number of a class.
        name: name of the images, for errors.
        clip: the result of `load_clip`.
        lpips_weights, lpips_net: see `compare_runs`.
        compared: number of images, from the first, to compare with the float run's; None compares all.
        adm_protocol: inception score over parts of 5,000 images in order, as guided-diffusion's evaluator computes it,
            not over ten parts of shuffled images, as torch-fidelity does.
        device: device for comparing images and for CLIP.
        batch_size: images per forward of the extractor; None takes as many as fit the memory. It changes results by
            rounding only.
        cache: folder for cached features; None uses no cache.
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
        """Names of the extractor's classes; None if they are not the classes of conditional models."""
        return None if self.extractor is None else extractor_spec(self.extractor.get_name()).classes

    @functools.cached_property
    def features(self) -> ImageFeatures:
        """Features of the images, extracted in one pass when the first metric needs them."""
        return cached_features(self.images, self.extractor, self.cache, self.batch_size, self.progress)
