"""Prompt files, as text and as COCO's captions, and the classes that prompts ask for."""

from __future__ import annotations

import json
import random

import pytest

from ldm.data.captions import WORDS
from ldm.prompts import asked_classes, read_prompts
from qdiff.errors import UserError

CAPTIONS = [
    {"image_id": 42, "id": 640, "caption": "A cat on a mat. "},
    {"image_id": 42, "id": 70, "caption": "A cat\nasleep."},
    {"image_id": 7, "id": 999, "caption": "Two dogs."},
    {"image_id": 391895, "id": 1, "caption": "A man riding a motorbike."},
]


def written(path, content: str):
    path.write_text(content, encoding="utf-8")
    return path


def test_one_prompt_a_line(tmp_path):
    text = "a handwritten three\n\n   the digit seven  \nfünf, 五\n"
    assert read_prompts(written(tmp_path / "a.txt", text)) == ["a handwritten three", "the digit seven", "fünf, 五"]


def test_line_ends_and_byte_order_mark_of_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read_prompts(tmp_path / "a.txt") == ["one", "two"]


@pytest.mark.parametrize("name", ["captions_val2014.json", "CAPTIONS.JSON"])
def test_coco_gives_one_caption_an_image_in_the_order_of_image_ids(name, tmp_path):
    for seed in range(5):  # whatever the file's order
        annotations = random.Random(seed).sample(CAPTIONS, len(CAPTIONS))
        path = written(tmp_path / name, json.dumps({"info": {}, "annotations": annotations}))
        assert read_prompts(path) == ["Two dogs.", "A cat asleep.", "A man riding a motorbike."]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.txt", None, "does not exist"),
        ("empty.txt", "", "holds no prompt"),
        ("blank.txt", " \n\t\n", "holds no prompt"),
        ("broken.json", '{"annotations": [', "not a COCO captions file"),
        ("lines.json", "a handwritten three\n", "not a COCO captions file"),
        ("list.json", "[]", "not a COCO captions file"),
        ("instances.json", '{"annotations": [{"image_id": 1, "id": 2, "bbox": []}]}', "caption"),
        ("null.json", '{"annotations": null}', "not a COCO captions file"),
        ("number.json", '{"annotations": [{"image_id": 1, "id": 2, "caption": null}]}', "not a COCO captions file"),
        ("none.json", '{"annotations": []}', "holds no prompt"),
    ],
)
def test_bad_files_are_one_sentence(name, content, says, tmp_path):
    path = tmp_path / name
    if content is not None:
        written(path, content)
    with pytest.raises(UserError, match=says) as caught:
        read_prompts(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_no_text_is_refused_and_the_option_is_named(tmp_path):
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff\xfe\x00")
    for path in (tmp_path / "image.png", tmp_path):
        with pytest.raises(UserError, match="--cali_prompts"):
            read_prompts(path, "--cali_prompts")


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
