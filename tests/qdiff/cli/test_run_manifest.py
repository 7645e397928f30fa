"""A ``run.json`` is read where its entries are of the right kinds, and which one is not is said."""

from __future__ import annotations

import json

import pytest

from qdiff.cli.run_manifest import VERSION, Manifest

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


def test_what_was_written_is_read(tmp_path):
    made = Manifest.read(written(tmp_path / "run.json", GOOD))
    assert (made.config, made.labels, made.seconds) == (GOOD["config"], [1, 2], {"sampling": 1.5})
    assert made.cost is None and made.version == VERSION  # of a file without one
    made.add_seconds("sampling", 0.25)
    made.write(tmp_path / "again.json")
    assert Manifest.read(tmp_path / "again.json") == made
    again = json.loads((tmp_path / "again.json").read_text())
    assert again == {**GOOD, "seconds": {"sampling": 1.75}, "command": "", "packages": {}, "machine": {}, "version": 1}


def test_one_with_less_in_it_and_one_with_more(tmp_path):
    assert Manifest.read(written(tmp_path / "run.json", {"config": {}})) == Manifest({})
    made = Manifest.read(written(tmp_path / "run.json", {"config": {}, "of_another_tool": [1]}))
    made.write(tmp_path / "run.json")
    assert json.loads((tmp_path / "run.json").read_text())["of_another_tool"] == [1]


def test_no_gpu_is_an_answer_where_something_was_sampled(tmp_path):
    for device, there in ((None, False), ("cpu", True)):
        Manifest({}, device=device).write(tmp_path / "run.json")
        assert ("gpu" in json.loads((tmp_path / "run.json").read_text())) is there


BAD = {
    "status": ["done", None],
    "num_images": [0, -1, 2.0, "3", True],
    "images_kept": [None, 1],
    "image_shape": [[8, 8], [8, 8, "1"], 8],
    "files": [[], {"float weights": "w"}, {"float weights": {"sha256": 5}}],
    "seconds": [None, [1], {"sampling": "1"}, {"sampling": float("nan")}],
    "noise_error": [0.1, {}, {"mse": float("nan")}, {"mse": None}],
    "labels": ["12", [1.5], [None]],
    "version": [VERSION + 1, 0, "1"],
    "packages": [[], "torch"],
    "machine": [None],
}


@pytest.mark.parametrize(("entry", "value"), [(entry, value) for entry, values in BAD.items() for value in values])
def test_an_entry_of_another_kind_is_named(entry, value, tmp_path):
    with pytest.raises(ValueError, match=rf"^{entry} is "):
        Manifest.read(written(tmp_path / "run.json", GOOD | {entry: value}))


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"config": []}', "[" * 100_000, "\x00"])
def test_other_files(text, tmp_path):
    with pytest.raises(ValueError):
        Manifest.read(written(tmp_path / "run.json", text))


def test_prompts_are_texts(tmp_path):
    with pytest.raises(ValueError, match="prompts of its config"):
        Manifest.read(written(tmp_path / "run.json", {"config": {"prompts": [1]}}))
