"""Prompts of a text end at newlines alone; prompt files, as text and as COCO's captions."""

from __future__ import annotations

import json
import random

import pytest

from qdiff.errors import UserError
from qdiff.io.prompt_lines import prompt_lines, read_prompts

CAPTIONS = [
    {"image_id": 42, "id": 640, "caption": "A cat on a mat. "},
    {"image_id": 42, "id": 70, "caption": "A cat\nasleep."},
    {"image_id": 7, "id": 999, "caption": "Two dogs."},
    {"image_id": 391895, "id": 1, "caption": "A man riding a motorbike."},
]


@pytest.mark.parametrize("inside", ["\u2028", "\u2029", "\f", "\v", "\x1c", "\x1d", "\x1e", "\x85"])
def test_other_separators_stay_inside_a_prompt(inside):
    assert prompt_lines(f"a{inside}b\nc") == [f"a{inside}b", "c"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_newlines_of_every_system_end_a_prompt(end):
    assert prompt_lines(f" a {end}{end} {end}b") == ["a", "b"]


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
