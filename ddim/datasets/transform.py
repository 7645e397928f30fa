"""Convert between images in [−1, 1] and the value range of a DDIM network, as ``config.data`` describes it.

Source: the released DDIM code. ``rescaled`` (the default here) is [−1, 1]; ``logit_transform`` is the logit of images
in [0, 1]; without either, the range is [0, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LOGIT_MARGIN = 1e-6  # keeps the logits of black and white finite


def to_network_range(images: Tensor, data: Any) -> Tensor:
    """Convert images [N, C, H, W] in [−1, 1] to the network's range; dequantization draws noise."""
    uniform, gaussian = data.get("uniform_dequantization", False), data.get("gaussian_dequantization", False)
    if data.get("random_flip", False):
        flipped = torch.rand(len(images), device=images.device) < 0.5
        images = torch.where(flipped[:, None, None, None], images.flip(-1), images)
    plain = data.get("rescaled", True)
    if plain and not uniform and not gaussian:
        return images
    images = (images + 1.0) / 2.0
    if uniform:
        images = images * (255.0 / 256.0) + torch.rand_like(images) / 256.0
    if gaussian:
        images = images + torch.randn_like(images) * 0.01
    if plain:
        return 2.0 * images - 1.0
    if data.get("logit_transform", False):
        return torch.logit(LOGIT_MARGIN + (1.0 - 2.0 * LOGIT_MARGIN) * images.clamp(0.0, 1.0))
    return images


def from_network_range(x_0: Tensor, data: Any) -> Tensor:
    """Convert from the network's range to images [N, C, H, W], nominally in [−1, 1]."""
    if data.get("logit_transform", False):
        return 2.0 * torch.sigmoid(x_0) - 1.0
    return x_0 if data.get("rescaled", True) else 2.0 * x_0 - 1.0
