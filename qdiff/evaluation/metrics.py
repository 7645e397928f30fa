"""FID, sFID, IS, KID and precision/recall of a set of images, computed by torch-fidelity's own functions.

What makes such numbers disagree is settled here: statistics are computed in float64, subsets are drawn with
torch-fidelity's default seed, and images arrive as uint8 (rounding is the writer's business).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qdiff.errors import UserError
from qdiff.evaluation.features import ImageFeatures, cached_features
from qdiff.evaluation.gaussians import frechet_distance
from qdiff.evaluation.image_sets import Images, open_images
from qdiff.evaluation.reference import ReferenceStatistics

# torch-fidelity's defaults, named here because the image count has to be checked against them.
ISC_SPLITS = 10
KID_SUBSET_SIZE = 1000
PRC_NEIGHBORHOOD = 3
ADM_ISC_SPLIT = 5000  # images; guided-diffusion's evaluator.py
# An IS split without an image is a mean over nothing; FID and KID divide by N-1; a k-th neighbour must exist.
LEAST_IMAGES = {"fid": 2, "sfid": 2, "isc": ISC_SPLITS, "kid": 2, "prc": PRC_NEIGHBORHOOD + 1}
# What a reference must hold.
NEEDS = {"fid": "gaussian", "sfid": "spatial", "kid": "features", "prc": "features"}


def compute_metrics(
    images: Images | ImageFeatures,
    reference: ReferenceStatistics | None,
    extractor: nn.Module,
    metrics: Sequence[str] = ("fid", "isc", "kid"),
    batch_size: int | None = None,
    progress: bool = True,
    cache: Path | None = None,
    adm_protocol: bool = False,
) -> dict[str, float]:
    """Compare images with a reference set.

    Args:
        images: a folder, a .npz file or a uint8 array, see `qdiff.evaluation.image_sets.open_images`; or what
            ``extractor`` made of them before.
        reference: statistics made with the same extractor; may be None for "isc" alone.
        extractor: from `qdiff.evaluation.extractors.create_extractor`.
        metrics: any of "fid", "sfid", "isc", "kid", "prc" (precision and recall).
        batch_size: images per forward of the extractor; changes results by rounding only. By default what fits the
            memory.
        progress: show a bar on stderr.
        cache: folder where features are kept; None keeps none.
        adm_protocol: IS over parts of 5,000 images in order, as guided-diffusion's evaluator does, not over 10 parts of
            shuffled images, as torch-fidelity does.

    Returns:
        ``num_images``, ``num_reference`` (with a reference; None where its file does not tell), and for the metrics
        asked for ``fid`` | ``sfid`` | ``isc``, ``isc_std`` (over the parts) | ``kid``, ``kid_std`` (over 100 subsets),
        ``kid_subset_size`` (1,000, or the smaller of the two image counts) | ``precision``, ``recall``, ``f_score`` (3
        neighbours).

        KID is an unbiased estimate for independent sets only: images that are in the reference too pull it
        below zero.

    Raises:
        UserError: on an unknown metric, too few images, unusable images, or a reference of another extractor or
            without what a metric needs.

    Sources: Heusel et al. 2017 (FID), Nash et al. 2021 (sFID), Salimans et al. 2016 (IS), Bińkowski et al. 2018 (KID),
    Kynkäänniemi et al. 2019 (precision/recall); definitions and constants of torch-fidelity.
    """
    if isinstance(images, ImageFeatures):
        check_metrics(metrics, images.count, reference, extractor)
        found = images
    else:
        images = open_images(images)
        check_metrics(metrics, len(images), reference, extractor)
        found = cached_features(images, extractor, cache, batch_size, progress)
    result: dict[str, float] = {"num_images": found.count}
    if reference is not None:
        result["num_reference"] = reference.count or None
    for metric in metrics:
        if metric == "isc":
            result |= _inception_score(found.logits, adm_protocol)
        else:
            result |= _COMPARE[metric](found, reference)
    return result


def _fid(found: ImageFeatures, reference: ReferenceStatistics) -> dict[str, float]:
    return {"fid": frechet_distance(found.gaussian, reference.gaussian)}


def _sfid(found: ImageFeatures, reference: ReferenceStatistics) -> dict[str, float]:
    return {"sfid": frechet_distance(found.spatial, reference.spatial)}


def _inception_score(logits: Tensor, adm_protocol: bool) -> dict[str, float]:
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    if not adm_protocol:
        scores = isc_features_to_metric(logits, splits=ISC_SPLITS)
        return {"isc": scores[KEY_METRIC_ISC_MEAN], "isc_std": scores[KEY_METRIC_ISC_STD]}
    parts = [
        isc_features_to_metric(part, splits=1, shuffle=False)[KEY_METRIC_ISC_MEAN]
        for part in logits.split(ADM_ISC_SPLIT)
    ]
    return {"isc": float(np.mean(parts)), "isc_std": float(np.std(parts))}


def _kid(found: ImageFeatures, reference: ReferenceStatistics) -> dict[str, float]:
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    real = torch.from_numpy(reference.features)
    size = min(KID_SUBSET_SIZE, len(found.features), len(real))
    # float64: an unbiased estimate near zero is a small difference of large sums.
    scores = kid_features_to_metric(found.features.double(), real.double(), kid_subset_size=size, verbose=False)
    return {"kid": scores[KEY_METRIC_KID_MEAN], "kid_std": scores[KEY_METRIC_KID_STD], "kid_subset_size": size}


def _precision_recall(found: ImageFeatures, reference: ReferenceStatistics) -> dict[str, float]:
    from torch_fidelity.metric_prc import prc_features_to_metric

    # save_cpu_ram: the other path holds three N×N distance matrices, 30 GB for 50,000 images.
    real = torch.from_numpy(reference.features).float()
    return prc_features_to_metric(
        found.features, real, prc_neighborhood=PRC_NEIGHBORHOOD, save_cpu_ram=True, verbose=False
    )


_COMPARE: dict[str, Callable[[ImageFeatures, ReferenceStatistics], dict[str, float]]] = {
    "fid": _fid,
    "sfid": _sfid,
    "kid": _kid,
    "prc": _precision_recall,
}


def possible_metrics(count: int, reference: ReferenceStatistics | None) -> list[str]:
    """Return the metrics that ``count`` images and a reference are enough for."""
    return [
        metric
        for metric, least in LEAST_IMAGES.items()
        if count >= least and (metric == "isc" or getattr(reference, NEEDS[metric], None) is not None)
    ]


def check_metrics(
    metrics: Sequence[str], count: int, reference: ReferenceStatistics | None, extractor: nn.Module
) -> None:
    """Raise a `UserError` for what cannot give a number, before any feature is computed."""
    unknown = [metric for metric in metrics if metric not in LEAST_IMAGES]
    if unknown or isinstance(metrics, str) or not metrics:
        raise UserError(f"Metrics must be a list out of {', '.join(LEAST_IMAGES)}, not {metrics!r}.")
    for metric in metrics:
        if count < LEAST_IMAGES[metric]:
            raise UserError(
                f"{metric} needs {LEAST_IMAGES[metric]} or more images, here are {count}: sample more, or "
                f"leave {metric} out of the metrics."
            )
    if reference is None:
        if set(metrics) != {"isc"}:
            raise UserError("All metrics but isc compare with real images: name the reference statistics.")
        return
    reference.require_extractor(extractor)
    for metric in metrics:
        if metric != "isc" and getattr(reference, NEEDS[metric]) is None:
            kind = "spatial statistics" if metric == "sfid" else "features of single images"
            raise UserError(
                f"{metric} needs {kind}, which the reference statistics {reference.name!r} do not hold: make them anew "
                f"with scripts/prepare_reference.py, or leave {metric} out of the metrics."
            )
        if NEEDS.get(metric) == "features" and len(reference.features) < LEAST_IMAGES[metric]:
            raise UserError(
                f"{metric} needs features of {LEAST_IMAGES[metric]} or more images, and the reference statistics "
                f"{reference.name!r} hold {len(reference.features)}: make them of more images."
            )
