"""A ``run.json`` is read where its entries are of the right kinds, and which one is not is said."""

from __future__ import annotations

import json

import pytest

from qdiff.cli.run_manifest import read_manifest

GOOD = {
    "config": {"seed": 1, "prompts": ["two"]},
    "status": "finished",
    "num_images": 3,
    "images_kept": True,
    "image_shape": [8, 8, 1],
    "files": {"float weights": {"path": "w", "sha256": "00"}},
    "seconds": {"sampling": 1.5},
    "noise_error": {"mse": 0.1},
    "labels": [1, 2],
}


def written(path, value) -> object:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_good_ones_and_those_with_less_in_them(tmp_path):
    assert read_manifest(written(tmp_path / "run.json", GOOD)) == GOOD
    assert read_manifest(written(tmp_path / "run.json", {"config": {}})) == {"config": {}}


BAD = {
    "status": ["done", None],
    "num_images": [0, -1, 2.0, "3", True],
    "images_kept": [None, 1],
    "image_shape": [[8, 8], [8, 8, "1"], 8],
    "files": [[], {"float weights": "w"}, {"float weights": {"sha256": 5}}],
    "seconds": [None, [1], {"sampling": "1"}, {"sampling": float("nan")}],
    "noise_error": [0.1, {}, {"mse": float("nan")}, {"mse": None}],
    "labels": ["12", [1.5], [None]],
}


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry, values in BAD.items() for value in values])
def test_an_entry_of_another_kind_is_named(entry, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{entry} is "):
        read_manifest(written(tmp_path / "run.json", GOOD | {entry: value}))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": []}', "[" * 100_000, "\x00"])
def test_other_files(text, tmp_path):
    with pytest.raises(ValueError):
        read_manifest(written(tmp_path / "run.json", text))


def test_prompts_are_texts(tmp_path):
    with pytest.raises(ValueError, match="prompts of its config"):
        read_manifest(written(tmp_path / "run.json", {"config": {"prompts": [1]}}))
