"""Training images, selected by a config's ``data.dataset``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qdiff.errors import UserError


def load_training_images(data: Any) -> Tensor:
    """Return the images of ``config.data`` as float32 [N, C, H, W] in [−1, 1].

    Raises:
        UserError: no loader is known for ``data.dataset``.
    """
    if data.dataset == "DIGITS":
        from ddim.datasets.digits import load_digit_images

        images, _ = load_digit_images(data.image_size)
        grey = torch.from_numpy(images).unsqueeze(1).float() / 127.5 - 1.0
        return grey.repeat(1, data.get("channels", 1), 1, 1)
    raise UserError(f"data.dataset is {data.dataset}, which cannot be used for training; give DIGITS")


def load_training_labels(data: Any) -> Tensor:
    """Return the classes of the images of `load_training_images`, int64 [N]."""
    if data.dataset == "DIGITS":
        from ddim.datasets.digits import load_digit_images

        return torch.from_numpy(load_digit_images(data.image_size)[1])
    raise UserError(f"data.dataset is {data.dataset}, whose labels are not available; give DIGITS")
