"""FID, sFID, IS, KID and precision/recall of a set of images, computed by torch-fidelity's own functions.

What makes such numbers disagree is settled here: statistics are computed in float64, subsets are drawn with
torch-fidelity's default seed, and images arrive as uint8 (rounding is the writer's business).

Sources: Heusel et al. 2017 (FID), Nash et al. 2021 (sFID), Salimans et al. 2016 (IS), Bińkowski et al. 2018 (KID),
Kynkäänniemi et al. 2019 (precision/recall); definitions and constants of torch-fidelity.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from qdiff.evaluation.gaussians import frechet_distance
from qdiff.evaluation.subject import Subject

# torch-fidelity's defaults, named here because the image count has to be checked against them.
ISC_SPLITS = 10
KID_SUBSET_SIZE = 1000
PRC_NEIGHBORHOOD = 3
ADM_ISC_SPLIT = 5000  # images; guided-diffusion's evaluator.py


def fid(subject: Subject) -> dict[str, Any]:
    """Return the Fréchet distance of features."""
    return {**_counts(subject), "fid": frechet_distance(subject.features.gaussian, subject.reference.gaussian)}


def sfid(subject: Subject) -> dict[str, Any]:
    """Return the Fréchet distance of spatial features."""
    return {**_counts(subject), "sfid": frechet_distance(subject.features.spatial, subject.reference.spatial)}


def isc(subject: Subject) -> dict[str, Any]:
    """Return the inception score, and its standard deviation over the parts."""
    return {**_counts(subject), **_inception_score(subject.features.logits, subject.adm_protocol)}


def _counts(subject: Subject) -> dict[str, Any]:
    counts: dict[str, Any] = {"num_images": subject.features.count}
    if subject.reference is not None:
        counts["num_reference"] = subject.reference.count or None
    return counts


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


def kid(subject: Subject) -> dict[str, Any]:
    """Return the kernel distance, its standard deviation over 100 subsets, and their size."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    ours, real = subject.features.features, torch.from_numpy(subject.reference.features)
    size = min(KID_SUBSET_SIZE, len(ours), len(real))
    # float64: an unbiased estimate near zero is a small difference of large sums.
    scores = kid_features_to_metric(ours.double(), real.double(), kid_subset_size=size, verbose=False)
    found = {"kid": scores[KEY_METRIC_KID_MEAN], "kid_std": scores[KEY_METRIC_KID_STD], "kid_subset_size": size}
    return {**_counts(subject), **found}


def prc(subject: Subject) -> dict[str, Any]:
    """Return precision, recall and their harmonic mean, by 3 neighbours."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    # save_cpu_ram: the other path holds three N×N distance matrices, 30 GB for 50,000 images.
    ours, real = subject.features.features, torch.from_numpy(subject.reference.features).float()
    found = prc_features_to_metric(ours, real, prc_neighborhood=PRC_NEIGHBORHOOD, save_cpu_ram=True, verbose=False)
    return {**_counts(subject), **found}
