"""FID, IS, KID and precision/recall of a set of images, computed by torch-fidelity's own functions.

What makes such numbers disagree is settled here: statistics are computed in float64, subsets are drawn with
torch-fidelity's default seed, and images arrive as uint8 (rounding is the writer's business).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from qdiff.errors import UserError
from qdiff.evaluation.extractors import EXTRACTORS, weights_hash
from qdiff.evaluation.reference import ReferenceStatistics

# torch-fidelity's defaults, named here because the image count has to be checked against them.
ISC_SPLITS = 10
KID_SUBSET_SIZE = 1000
PRC_NEIGHBORHOOD = 3
# An IS split without an image is a mean over nothing; FID and KID divide by N-1; a k-th neighbour must exist.
LEAST_IMAGES = {"fid": 2, "isc": ISC_SPLITS, "kid": 2, "prc": PRC_NEIGHBORHOOD + 1}

Images = str | Path | Tensor | np.ndarray


class ImageSet:
    """uint8 RGB images of one size, from a folder or from memory; grey ones stand in all three channels.

    Args:
        images: a folder (all ``*.png`` directly in it, sorted by name), or uint8 [N, H, W, C] or [N, C, H, W]
            with C 1 or 3.

    Raises:
        UserError: if the folder is missing or holds no PNG, or dtype or shape are others.
    """

    def __init__(self, images: Images) -> None:
        self.paths: list[Path] | None = None
        if isinstance(images, str | Path):
            self.paths = _png_files(Path(images))
        else:
            self.array = _channels_first(torch.as_tensor(images))

    def __len__(self) -> int:
        return len(self.array if self.paths is None else self.paths)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield uint8 [n, 3, H, W] on the CPU, n = ``batch_size`` but for the last.

        Raises:
            UserError: on an unreadable file, or one of another size than the first.
        """
        if self.paths is None:
            for part in self.array.split(batch_size):
                yield part.cpu().expand(-1, 3, -1, -1)
            return
        size = None
        with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter lock
            for start in range(0, len(self.paths), batch_size):
                paths = self.paths[start : start + batch_size]
                images = list(pool.map(_read_png, paths))
                size = size or images[0].shape
                for path, image in zip(paths, images, strict=True):
                    if image.shape != size:
                        raise UserError(
                            f"{path} is {image.shape[1]}×{image.shape[0]} pixels but {self.paths[0].name} "
                            f"beside it is {size[1]}×{size[0]}: metrics need images of one size."
                        )
                yield torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    def sha256(self) -> str:
        """Return the SHA-256 of the pixels, in order: a folder and the array behind it have the same."""
        digest = hashlib.sha256()
        for batch in self.batches(256):
            for image in batch:
                digest.update(f"{list(image.shape)}\n".encode())
                digest.update(image.contiguous().numpy().tobytes())
        return digest.hexdigest()


def extract_features(
    images: Images | ImageSet, extractor: nn.Module, batch_size: int = 256, progress: bool = True
) -> dict[str, Tensor]:
    """Return the extractor's outputs for all images, in order: layer name → float32 [N, D] on the CPU."""
    images = images if isinstance(images, ImageSet) else ImageSet(images)
    if batch_size < 1:
        raise UserError(f"The batch size must be 1 or more, not {batch_size}.")
    device = next(extractor.parameters()).device
    parts: dict[str, list[Tensor]] = {layer: [] for layer in extractor.get_requested_features_list()}
    with (
        tqdm(total=len(images), desc="features", unit="img", disable=not progress) as bar,
        torch.inference_mode(),
    ):
        for batch in images.batches(batch_size):
            outputs = extractor.convert_features_tuple_to_dict(extractor(batch.to(device)))
            for layer, output in outputs.items():
                parts[layer].append(output.float().cpu())
            bar.update(len(batch))
    return {layer: torch.cat(outputs) for layer, outputs in parts.items()}


def compute_reference(
    images: Images, extractor: nn.Module, name: str, batch_size: int = 256, progress: bool = True
) -> ReferenceStatistics:
    """Make the reference statistics of real images (float32 features), to be kept with ``save_reference``.

    Args:
        images: see :class:`ImageSet`.
        extractor: from :func:`~qdiff.evaluation.extractors.create_extractor`.
        name: what the images are: data set, split, size and resize filter.
    """
    image_set = ImageSet(images)
    layer = EXTRACTORS[extractor.get_name()].feature_layer
    features = extract_features(image_set, extractor, batch_size, progress)[layer]
    return ReferenceStatistics(
        name=name,
        features=features.numpy(),
        extractor=extractor.get_name(),
        weights_hash=weights_hash(extractor),
        images_hash=image_set.sha256(),
    )


def compute_metrics(
    images: Images,
    reference: ReferenceStatistics | None,
    extractor: nn.Module,
    metrics: Sequence[str] = ("fid", "isc", "kid"),
    batch_size: int = 256,
    progress: bool = True,
) -> dict[str, float]:
    """Compare images with a reference set.

    Args:
        images: a folder of PNGs or a uint8 array, see :class:`ImageSet`.
        reference: statistics made with the same extractor; may be None for "isc" alone.
        extractor: from :func:`~qdiff.evaluation.extractors.create_extractor`.
        metrics: any of "fid", "isc", "kid", "prc" (precision and recall).
        batch_size: images per forward of the extractor; changes results by rounding only.
        progress: show a bar on stderr.

    Returns:
        ``num_images``, ``num_reference`` (with a reference), and for the metrics asked for ``fid`` | ``isc``,
        ``isc_std`` (over 10 splits) | ``kid``, ``kid_std`` (over 100 subsets), ``kid_subset_size`` (1,000,
        or the smaller of the two image counts) | ``precision``, ``recall``, ``f_score`` (3 neighbours).

        KID is an unbiased estimate for independent sets only: images that are in the reference too pull it
        below zero.

    Raises:
        UserError: on an unknown metric, too few images, unusable images, or a reference of another extractor.

    Sources: Heusel et al. 2017 (FID), Salimans et al. 2016 (IS), Bińkowski et al. 2018 (KID), Kynkäänniemi et
    al. 2019 (precision/recall); definitions and constants of torch-fidelity.
    """
    image_set = ImageSet(images)
    _check(metrics, len(image_set), reference, extractor)
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    spec = EXTRACTORS[extractor.get_name()]
    layers = extract_features(image_set, extractor, batch_size, progress)
    features = layers[spec.feature_layer]
    result: dict[str, float] = {"num_images": len(image_set)}
    if reference is not None:
        result["num_reference"] = reference.count
        real = torch.from_numpy(reference.features).float()

    if "fid" in metrics:
        # float64 here as in ReferenceStatistics: torch-fidelity insists on equal types, and would average
        # float32 features in float32.
        ours = fid_features_to_statistics(features.double())
        theirs = {"mu": reference.mu, "sigma": reference.sigma}
        result["fid"] = fid_statistics_to_metric(ours, theirs, verbose=False)[KEY_METRIC_FID]
    if "isc" in metrics:
        scores = isc_features_to_metric(layers[spec.logits_layer], splits=ISC_SPLITS)
        result["isc"], result["isc_std"] = scores[KEY_METRIC_ISC_MEAN], scores[KEY_METRIC_ISC_STD]
    if "kid" in metrics:
        size = min(KID_SUBSET_SIZE, len(image_set), reference.count)
        # float64 again: an unbiased estimate near zero is a small difference of large sums.
        scores = kid_features_to_metric(features.double(), real.double(), kid_subset_size=size, verbose=progress)
        result["kid"], result["kid_std"] = scores[KEY_METRIC_KID_MEAN], scores[KEY_METRIC_KID_STD]
        result["kid_subset_size"] = size
    if "prc" in metrics:
        # save_cpu_ram: the other path holds three N×N distance matrices, 30 GB for 50,000 images.
        result |= prc_features_to_metric(
            features, real, prc_neighborhood=PRC_NEIGHBORHOOD, save_cpu_ram=True, verbose=False
        )
    return result


def _check(metrics: Sequence[str], count: int, reference: ReferenceStatistics | None, extractor: nn.Module) -> None:
    """Refuse what cannot give a number, before any feature is computed."""
    unknown = [metric for metric in metrics if metric not in LEAST_IMAGES]
    if unknown or isinstance(metrics, str) or not metrics:
        raise UserError(f"Metrics must be a list out of {', '.join(LEAST_IMAGES)}, not {metrics!r}.")
    for metric in metrics:
        if count < LEAST_IMAGES[metric]:
            raise UserError(
                f"{metric} needs {LEAST_IMAGES[metric]} or more images, here are {count}: sample more, or "
                f"leave {metric} out of the metrics."
            )
    if reference is not None:
        reference.require_extractor(extractor)
    elif set(metrics) != {"isc"}:
        raise UserError("All metrics but isc compare with real images: name the reference statistics.")


def _png_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UserError(f"There is no folder of images at {folder}: name one that holds PNG files.")
    paths = sorted(folder.glob("*.png"))
    if not paths:
        raise UserError(f"The folder {folder} holds no PNG file: name the folder that the images lie directly in.")
    return paths


def _read_png(path: Path) -> np.ndarray:
    """Return uint8 [H, W, 3]."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # convert("RGB") would clip 16 bits to 8, not scale them
                raise UserError(f"{path} has 16 bits a channel: metrics need PNG files with 8.")
            return np.asarray(image.convert("RGB"))
    except UserError:
        raise
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's words for a truncated or foreign file
        raise UserError(f"{path} is no readable image ({error}): sample it again or remove it.") from error


def _channels_first(images: Tensor) -> Tensor:
    """Return uint8 [N, C, H, W] of images with channels on either side."""
    if images.dtype != torch.uint8:
        raise UserError(f"Images for metrics must be uint8, not {images.dtype}: clamp, scale to 0-255 and round first.")
    first, last = (images.dim() == 4 and images.shape[side] in (1, 3) for side in (1, -1))
    if first == last or images.numel() == 0:
        raise UserError(
            "Images for metrics must be [N, H, W, C] or [N, C, H, W] with C 1 or 3, not "
            f"{list(images.shape)}: bring the axes in one of these orders."
        )
    return images if first else images.permute(0, 3, 1, 2)
