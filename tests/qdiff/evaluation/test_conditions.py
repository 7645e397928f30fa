"""The share of images that show what was asked for."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ddim.datasets.digits import load_digit_images
from qdiff.errors import UserError
from qdiff.evaluation.conditions import asked_share
from qdiff.evaluation.extractors import EXTRACTORS, create_extractor
from qdiff.evaluation.features import extract_features
from qdiff.io.images import save_png
from qdiff.io.repository import REPOSITORY

DIGITS = "digits-classifier"
COUNT = 60


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder of real digits, 32×32 in three channels, and the digits they are."""
    images, labels = load_digit_images(32)
    folder = tmp_path_factory.mktemp("digits")
    for i in range(COUNT):
        save_png(np.repeat(images[i, :, :, None], 3, axis=2), folder / f"{i:05d}.png")
    return folder, [int(label) for label in labels[:COUNT]]


def seen_in(folder, weights=None, batch_size=COUNT):
    """What the digits classifier makes of a folder of images."""
    return extract_features(folder, create_extractor(DIGITS, weights), batch_size, progress=False)


@pytest.fixture(scope="module")
def found(digits):
    return seen_in(digits[0])


def test_real_digits_are_what_they_are(digits, found):
    folder, labels = digits
    assert asked_share(found, labels) == 1.0
    assert asked_share(seen_in(folder, batch_size=7), np.array(labels)) == 1.0


def test_every_wrong_label_counts_once(digits, found):
    _, labels = digits
    wrong = [(label + 1) % 10 if i in (0, 17, 59) else label for i, label in enumerate(labels)]
    assert asked_share(found, wrong) == pytest.approx(1 - 3 / COUNT)
    assert asked_share(found, [(label + 1) % 10 for label in labels]) == 0.0


def test_image_i_is_the_file_sorted_i(digits, tmp_path):
    folder, labels = digits
    for i in reversed(range(COUNT)):  # written, and perhaps listed, in another order
        (tmp_path / f"{i:05d}.png").write_bytes((folder / f"{i:05d}.png").read_bytes())
    assert asked_share(seen_in(tmp_path), labels) == 1.0
    # The planted error: the same labels in another order.
    assert asked_share(seen_in(tmp_path), labels[::-1]) < 0.5


def test_other_weights_of_the_extractor_are_used(digits, tmp_path):
    tensors = load_file(REPOSITORY / EXTRACTORS[DIGITS].weights)
    tensors["head.weight"] = tensors["head.weight"].roll(1, dims=0)  # names every digit d as d + 1
    save_file(tensors, tmp_path / "rolled.safetensors")
    folder, labels = digits
    rolled = seen_in(folder, tmp_path / "rolled.safetensors")
    assert asked_share(rolled, labels) == 0.0
    assert asked_share(rolled, [(d + 1) % 10 for d in labels]) == 1.0


def test_an_extractor_without_class_names_is_refused(digits, found):
    with pytest.raises(UserError, match=r"inception-v3-compat has no class names.*choose digits-classifier"):
        asked_share(replace(found, extractor="inception-v3-compat"), digits[1])


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([1] * (COUNT - 1), f"{COUNT - 1} labels for the {COUNT} images"),
        ([], "list of integers"),
        ([1] * (COUNT - 1) + [10], "The label 10 is no class of digits-classifier: its classes are 0 to 9"),
        ([-1] + [1] * (COUNT - 1), "The label -1 is no class"),
        ([1.0] * COUNT, "list of integers"),
        (["1"] * COUNT, "list of integers"),
        ([[1]] * COUNT, "list of integers"),
    ],
)
def test_unfit_labels_are_refused(found, labels, says):
    with pytest.raises(UserError, match=says):
        asked_share(found, labels)
