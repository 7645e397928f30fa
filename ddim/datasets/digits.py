"""Scikit-learn's handwritten digits as square grey images.

Source: the UCI "Optical Recognition of Handwritten Digits" test set (1,797 images, 8×8, 17 grey levels), which is part
of scikit-learn, so nothing is downloaded.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

NUM_CLASSES = 10


def load_digit_images(size: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Return all digits, upscaled with a bicubic filter.

    Args:
        size: side of the square images, in pixels.

    Returns:
        ``images`` uint8 [1797, size, size] (0 is background), ``labels`` int64 [1797] (0-9).
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    grey = np.round(digits.images * (255.0 / 16.0)).astype(np.uint8)
    scaled = [Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC) for image in grey]
    return np.stack([np.asarray(image) for image in scaled]), digits.target.astype(np.int64)
