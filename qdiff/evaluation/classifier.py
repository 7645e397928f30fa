"""A small classifier of grey digits: the feature network of FID, IS and KID for the bundled digits models.

Inception features say little about 16×16 pen strokes, and its weights must be downloaded. Instead, a network trained on
the same digits is used, as is usual for MNIST-like data sets. Its numbers can be compared with each other, but never
with published Inception numbers. ``scripts/train_extractor.py`` trains it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

IMAGE_SIZE = 16
FEATURE_SIZE = 64
NUM_CLASSES = 10


def _convolution(inputs: int, outputs: int) -> list[nn.Module]:
    # The following normalisation has a shift, so the convolution needs no bias.
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]


class DigitClassifier(nn.Module):
    """Four 3×3 convolutions and two linear layers, 131,424 parameters.

    The features are smooth (SiLU; with ReLU, a feature can be 0 for all images, which makes the covariance singular)
    and normalised to mean 0 and variance 1 over the training images. That fixes the scale of FID, and keeps the
    arguments of KID's cubic kernel near 1, as for Inception's features. The last layer has no bias, so torch-fidelity's
    two kinds of logits (with and without bias) are the same here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            *_convolution(1, 32),
            *_convolution(32, 32),
            nn.MaxPool2d(2),
            *_convolution(32, 64),
            *_convolution(64, 64),
            nn.MaxPool2d(2),
        )
        self.features = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64 * (IMAGE_SIZE // 4) ** 2, FEATURE_SIZE),
            nn.SiLU(),
            nn.BatchNorm1d(FEATURE_SIZE, affine=False),
        )
        self.head = nn.Linear(FEATURE_SIZE, NUM_CLASSES, bias=False)

    @staticmethod
    def prepare(rgb: Tensor) -> Tensor:
        """Turn uint8 RGB images [N, 3, H, W] into grey float32 images [N, 1, H, W] in [-1, 1].

        The three channels are averaged, which changes nothing for a grey image stored in all three.
        """
        return rgb.to(torch.float32).mean(dim=1, keepdim=True) / 127.5 - 1.0

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return features [N, 64] and logits [N, 10] of grey images [N, 1, H, W] in [-1, 1].

        Images that are not 16×16 are resized (bilinear, antialiased).
        """
        if images.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            images = F.interpolate(images, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        features = self.features(self.convolutions(images))
        return features, self.head(features)
