"""Features of images: one pass of the extractor gives what all of its metrics are computed from."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.evaluation.extractors import EXTRACTORS, weights_hash
from qdiff.evaluation.gaussians import Gaussian, RunningGaussian
from qdiff.evaluation.image_sets import Images, ImageSet, add_pixels, open_images
from qdiff.io.files import DAMAGED_NPZ, written_whole
from qdiff.io.progress import progress_bar
from qdiff.machine.memory import available_on

# sFID takes the first 7 channels of a map in the middle of the network (Nash et al. 2021): 17×17×7 of Inception.
SPATIAL_CHANNELS = 7
LARGEST_BATCH = 256
# Of the memory that is free, for what a forward holds; the rest is for features and their covariances.
MEMORY_SHARE = 0.25


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """What an extractor says of a set of images.

    Attributes:
        extractor, weights_hash: which network, and the SHA-256 of its weights.
        pixels_hash: SHA-256 of the images' pixels, see `ImageSet.sha256`.
        features: float32 [n, D], in order; of every image, or of n evenly spaced ones.
        logits: float32 [n, classes], of the same images.
        gaussian: mean and covariance of the features of all images.
        spatial: the same of the spatial features.
    """

    extractor: str
    weights_hash: str
    pixels_hash: str
    features: Tensor
    logits: Tensor
    gaussian: Gaussian
    spatial: Gaussian

    @property
    def count(self) -> int:
        """Number of images."""
        return self.gaussian.count


def extract_features(
    images: Images,
    extractor: nn.Module,
    batch_size: int | None = None,
    progress: bool = True,
    most_kept: int | None = None,
) -> ImageFeatures:
    """Run images through an extractor once.

    Args:
        images: see `open_images`; two or more.
        extractor: from `qdiff.evaluation.extractors.create_extractor`.
        batch_size: images per forward; by default as many as fit a quarter of the free memory, at most 256. It
            changes results by rounding only.
        progress: show a bar on stderr.
        most_kept: keep features of so many images, evenly spaced; by default of all.

    Raises:
        UserError: on fewer than two images, unusable ones, or a batch size below 1.
    """
    images = open_images(images)
    if len(images) < 2:
        raise UserError("Metrics need two images or more: sample more.")
    spec = EXTRACTORS[extractor.get_name()]
    kept = _evenly_spaced(len(images), most_kept)
    features, logits = [], []
    gaussian, spatial, pixels = RunningGaussian(), RunningGaussian(), hashlib.sha256()
    batch_size = fitting_batch_size(images, extractor) if batch_size is None else batch_size
    if batch_size < 1:
        raise UserError(f"The batch size must be 1 or more, not {batch_size}.")
    first = 0
    with progress_bar(len(images), "features", "img", disable=not progress) as bar:
        for batch in images.batches(batch_size):
            add_pixels(pixels, batch)
            outputs, middle = forward(extractor, batch)
            chosen = kept[first : first + len(batch)]
            features.append(outputs[spec.feature_layer][chosen])
            logits.append(outputs[spec.logits_layer][chosen])
            gaussian.add(outputs[spec.feature_layer].numpy())
            spatial.add(middle.numpy())
            first += len(batch)
            bar.update(len(batch))
    return ImageFeatures(
        extractor=extractor.get_name(),
        weights_hash=weights_hash(extractor),
        pixels_hash=pixels.hexdigest(),
        features=torch.cat(features),
        logits=torch.cat(logits),
        gaussian=gaussian.result(),
        spatial=spatial.result(),
    )


def _device_of(extractor: nn.Module) -> torch.device:
    return next(extractor.parameters()).device


@torch.inference_mode()
def forward(extractor: nn.Module, batch: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Run uint8 images [n, 3, H, W] through an extractor.

    Returns:
        Layer name → float32 [n, D], and the spatial features float32 [n, h·w·7], all on the CPU. Their order is
        that of ADM's statistics files (rows, columns, channels), so that they can be compared with those.
    """
    device = _device_of(extractor)
    module = extractor.get_submodule(EXTRACTORS[extractor.get_name()].spatial_module)
    maps: list[Tensor] = []
    handle = module.register_forward_hook(lambda _, __, output: maps.append(output[:, :SPATIAL_CHANNELS]))
    try:
        outputs = extractor.convert_features_tuple_to_dict(extractor(batch.to(device)))
    finally:
        handle.remove()
    spatial = rearrange(maps[0], "n c h w -> n (h w c)")
    return {layer: output.float().cpu() for layer, output in outputs.items()}, spatial.float().cpu()


def fitting_batch_size(images: ImageSet, extractor: nn.Module) -> int:
    """Return how many images a forward may take: what one holds is measured on the first."""
    first = next(images.batches(1))
    device = _device_of(extractor)
    largest = 1

    def measure(_: nn.Module, inputs: tuple, output: object) -> None:
        nonlocal largest
        tensors = [t for t in (*inputs, output) if isinstance(t, Tensor)]
        largest = max(largest, sum(t.numel() * t.element_size() for t in tensors))

    with contextlib.ExitStack() as stack:
        for module in extractor.modules():
            if not list(module.children()):
                stack.callback(module.register_forward_hook(measure).remove)
        forward(extractor, first)
    # A convolution's workspace and the branches of a block that wait for each other take as much again, twice.
    return max(1, min(LARGEST_BATCH, int(available_on(device) * MEMORY_SHARE) // (4 * largest)))


def cached_features(
    images: Images, extractor: nn.Module, folder: Path | None, batch_size: int | None = None, progress: bool = True
) -> ImageFeatures:
    """Return `extract_features`, kept in a folder under a name made of the hashes of images and weights
    and, but for the CPU, the kind of device.

    Args:
        folder: of the cache; None computes anew and keeps nothing.
    """
    images = open_images(images)
    if folder is None:
        return extract_features(images, extractor, batch_size, progress)
    weights = weights_hash(extractor)
    device = _device_of(extractor).type
    by = f"{extractor.get_name()}-{weights[:12]}" + ("" if device == "cpu" else f"-{device}")
    path = folder / f"{images.fingerprint()[:20]}-{by}.npz"
    with contextlib.suppress(*DAMAGED_NPZ):  # absent or damaged: make it
        return _load(path)
    features = extract_features(images, extractor, batch_size, progress)
    _save(features, path)
    return features


def _save(features: ImageFeatures, path: Path) -> None:
    about = {k: getattr(features, k) for k in ("extractor", "weights_hash", "pixels_hash", "count")}
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            about=np.array(json.dumps(about)),
            features=features.features.numpy(),
            logits=features.logits.numpy(),
            **{f"{n}_{k}": getattr(getattr(features, n), k) for n in ("gaussian", "spatial") for k in ("mu", "sigma")},
        )


def _load(path: Path) -> ImageFeatures:
    with np.load(path, allow_pickle=False) as archive:
        about = json.loads(str(archive["about"]))
        count = about.pop("count")
        return ImageFeatures(
            **about,
            features=torch.from_numpy(archive["features"]),
            logits=torch.from_numpy(archive["logits"]),
            gaussian=Gaussian(archive["gaussian_mu"], archive["gaussian_sigma"], count),
            spatial=Gaussian(archive["spatial_mu"], archive["spatial_sigma"], count),
        )


def _evenly_spaced(count: int, most: int | None) -> Tensor:
    """Return which of ``count`` images are kept, bool [count]."""
    kept = torch.zeros(count, dtype=torch.bool)
    number = count if most is None else min(most, count)
    kept[torch.from_numpy(np.linspace(0, count - 1, number).round().astype(np.int64))] = True
    return kept
