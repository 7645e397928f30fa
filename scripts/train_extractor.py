"""Train the digits classifier behind FID, IS and KID, and write its weights and reference statistics.

    python scripts/train_extractor.py

takes half a minute on one CPU core, downloads nothing, and writes ``models/digits_classifier.safetensors``
and ``models/digits_reference.npz``. Metrics made with other weights cannot be compared with earlier ones.

    python scripts/train_extractor.py --reference-only --size 32

trains nothing; it uses the existing classifier to write the reference statistics of digits of another size,
``models/digits32_reference.npz``.
"""

from __future__ import annotations

import qdiff.cli.passive_waiting  # noqa: F401, before torch loads

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from ddim.datasets.digits import load_digit_images
from qdiff.cli.errors import exits_cleanly
from qdiff.cli.options.parser import Parser
from qdiff.errors import UserError
from qdiff.evaluation.classifier import IMAGE_SIZE, DigitClassifier
from qdiff.evaluation.extractors import create_extractor
from qdiff.evaluation.reference import compute_reference, save_reference
from qdiff.io.files import written_whole
from qdiff.io.progress import tracked
from qdiff.io.repository import REPOSITORY

NAME = "digits-classifier"
TEST_SIZE, SPLIT_SEED = 360, 0  # independent of --seed, so that accuracies can be compared
LEAST_ACCURACY = 0.98
LEAST_SIZE = 8
WEIGHTS = "digits_classifier.safetensors"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="weights, order and augmentation (default: 0)")
    parser.add_argument("--epochs", type=int, default=60, help="passes over the 1,437 images (default: 60)")
    parser.add_argument("--batch-size", type=int, default=64, help="images per step (default: 64)")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate (default: 0.002)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads; changes rounding (default: 1)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "models", help="folder (default: models)")
    parser.add_argument(
        "--reference-only", action="store_true", help="write only reference statistics, with the classifier in --out"
    )
    parser.add_argument("--size", type=int, help=f"side of the digits, with --reference-only (default: {IMAGE_SIZE})")
    args = parser.parse_args(arguments)
    if args.size is not None and not args.reference_only:
        raise UserError(
            f"--size needs --reference-only, because the classifier is trained at {IMAGE_SIZE}×{IMAGE_SIZE}; add it"
        )
    if args.size is not None and args.size < LEAST_SIZE:
        raise UserError(f"--size is {args.size}; give at least {LEAST_SIZE}, the size of the original digits")
    return args


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 10°, scale by up to 8 % and shift by up to 1.5 pixels: [N, 1, 16, 16] in [-1, 1]."""

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, scale = torch.deg2rad(uniform(10.0)), 1 + uniform(0.08)
    cosine, sine = scale * angle.cos(), scale * angle.sin()
    shift = 1.5 / (IMAGE_SIZE / 2)  # affine_grid's unit is half an image
    theta = torch.stack([cosine, -sine, uniform(shift), sine, cosine, uniform(shift)], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    # grid_sample fills with zeros, but the background is -1.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train(images: Tensor, labels: Tensor, args: argparse.Namespace) -> DigitClassifier:
    """Return a classifier in eval mode, trained on [N, 1, 16, 16] in [-1, 1] with int64 labels [N]."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = DigitClassifier().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    steps = -(-len(images) // args.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, epochs=args.epochs, steps_per_epoch=steps)
    for _ in tracked(range(args.epochs), "training", "epoch"):
        for batch in torch.randperm(len(images), generator=generator).split(args.batch_size):
            _, logits = model(augment(images[batch], generator))
            optimizer.zero_grad()
            F.cross_entropy(logits, labels[batch]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of images that the model classifies correctly."""
    return (model(images)[1].argmax(dim=1) == labels).double().mean().item()


def write_reference(folder: Path, size: int = IMAGE_SIZE) -> Path:
    """Write the reference statistics of all digits at ``size``×``size`` pixels, with the classifier in ``folder``.

    Returns:
        The file: digits_reference.npz at the classifier's own size, else digits<size>_reference.npz.

    Raises:
        UserError: ``folder`` has no usable classifier.
    """
    # Read back from its file, so that the statistics belong to the written weights.
    extractor = create_extractor(NAME, folder / WEIGHTS)
    pixels, _ = load_digit_images(size)
    name = f"scikit-learn digits, all {len(pixels)}, bicubic to {size}×{size}"
    # One channel suffices: three equal ones have the same mean, so RGB digits need no other reference.
    reference = compute_reference(pixels[:, None], extractor, name, progress=False)
    path = folder / f"digits{'' if size == IMAGE_SIZE else size}_reference.npz"
    save_reference(reference, path)
    return path


@exits_cleanly
def main(arguments: list[str]) -> None:
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    if args.reference_only:
        report(write_reference(args.out, args.size or IMAGE_SIZE))
        return
    pixels, digits = load_digit_images(IMAGE_SIZE)
    images = DigitClassifier.prepare(torch.from_numpy(pixels)[:, None])
    labels = torch.from_numpy(digits)
    seen, unseen = train_test_split(
        np.arange(len(pixels)), test_size=TEST_SIZE, random_state=SPLIT_SEED, stratify=digits
    )
    model = train(images[seen], labels[seen], args)
    share = accuracy(model, images[unseen], labels[unseen])
    print(
        f"test accuracy {share:.4f} on {len(unseen)} images, trained on {len(seen)} "
        f"({accuracy(model, images[seen], labels[seen]):.4f})"
    )
    if share < LEAST_ACCURACY:
        raise UserError(
            f"the test accuracy {share:.4f} is below {LEAST_ACCURACY}, so nothing was written; train longer "
            "with --epochs or try another --seed"
        )

    weights = args.out / WEIGHTS
    about = {
        "test_accuracy": f"{share:.4f}",
        "split": f"{len(seen)} train, {len(unseen)} test, stratified, random_state={SPLIT_SEED}",
        "seed": str(args.seed),
        "command": " ".join(["python", "scripts/train_extractor.py", *arguments]),
        "torch": torch.__version__,
    }
    with written_whole(weights) as temporary:
        temporary.write_bytes(save(model.state_dict(), metadata=about))
    report(weights, write_reference(args.out))


def report(*paths: Path) -> None:
    """Print the written files."""
    for path in paths:
        print(f"wrote {path} ({path.stat().st_size:,} bytes)")


if __name__ == "__main__":
    main(sys.argv[1:])
