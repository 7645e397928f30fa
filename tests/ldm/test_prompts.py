"""The classes that prompts ask for."""

from __future__ import annotations

import pytest

from ldm.data.captions import WORDS
from ldm.prompts import asked_classes


def test_asked_classes_are_the_numbers_of_the_words():
    assert asked_classes(["a handwritten Three", "zero", "the digit nine, please"], WORDS) == [3, 0, 9]
    assert asked_classes(["THE NUMBER ONE"], ["Zero", "One"]) == [1]


@pytest.mark.parametrize("prompt", ["a cat", "", "one or two", "everyone", "three-ones"])
def test_a_prompt_without_one_class_leaves_the_run_without_labels(prompt):
    """Words count whole, so that a list of labels is right or not there."""
    expected = [3] if prompt == "three-ones" else None
    assert asked_classes([prompt], WORDS) == expected
    if expected is None:
        assert asked_classes(["three", prompt], WORDS) is None


def test_models_without_class_words_have_no_labels():
    assert asked_classes(["three"], []) is None
