"""A run folder is written whole, continued with the same options, and refused with others."""

from __future__ import annotations

import json
import logging
import time
from importlib import metadata

import numpy as np
import pytest
import torch

from qdiff.cli.run_folder import RunFolder, start_logging
from qdiff.errors import UserError
from qdiff.io.files import sha256
from qdiff.io.images import load_png

CONFIG = {"seed": 1, "sampler": {"eta": 0.0, "steps": 4}, "ptq": None}


@pytest.fixture(autouse=True)
def own_log_handlers():
    log = logging.getLogger("qdiff")
    before = list(log.handlers)
    yield
    for handler in set(log.handlers) - set(before):
        log.removeHandler(handler)
        handler.close()


def opened(path, config=CONFIG, count=3):
    run = RunFolder(path, config, count)
    run.open()
    return run


def some_images(n=3):
    return np.random.default_rng(0).integers(0, 256, (n, 4, 4, 1), dtype=np.uint8)


def test_construction_writes_nothing(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG, 3)
    assert list(tmp_path.iterdir()) == []
    assert run.pending() == [0, 1, 2]


def test_first_state(tmp_path):
    opened(tmp_path / "run")
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["status"], state["num_images"], state["config"]) == ("running", 3, CONFIG)
    assert state["packages"]["torch"] == metadata.version("torch")
    assert state["machine"]["cpus"] > 0 and state["machine"]["python"] and ", " in state["machine"]["cpu"]
    assert state["command"]


def test_images_by_number_and_what_is_pending(tmp_path):
    run, images = opened(tmp_path / "run", count=5), some_images(2)
    run.save_images([1, 4], images)
    assert run.image_path(4).name == "00004.png"
    assert run.pending() == [0, 2, 3]
    assert (run.pending(0, 2), run.pending(1, 2)) == ([0, 2], [3])
    with pytest.raises(ValueError):
        run.save_images([0], images)


def test_finish_writes_grid_array_and_state(tmp_path):
    run, images = opened(tmp_path / "run"), some_images()
    run.save_images([0, 1, 2], images)
    run.finish(save_npz=False)
    assert not (run.path / "samples.npz").exists() and (run.path / "grid.png").is_file()
    run.finish(save_npz=True)
    with np.load(run.path / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        np.testing.assert_array_equal(archive["arr_0"], images)
    np.testing.assert_array_equal(run.load_images(2), images[:2])
    assert json.loads((run.path / "run.json").read_text())["status"] == "finished"
    assert not list(run.path.rglob("*.part"))


def test_finish_without_grid_or_without_images(tmp_path):
    run, images = opened(tmp_path / "run", count=5), some_images(5)
    run.save_images([0, 1, 2, 3, 4], images)
    run.finish(save_npz=False, write_grid=False)
    assert not (run.path / "grid.png").exists() and not RunFolder(run.path, CONFIG, 5).images_discarded
    run.finish(save_npz=False, columns=5, keep_images=False)
    assert load_png(run.path / "grid.png").shape[:2] == (64, 5 * 65 - 1)
    assert not run.images.exists()
    again = RunFolder(run.path, CONFIG, 5)
    assert again.images_discarded and again.pending() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("columns", [3, 9])
def test_no_more_columns_than_images(columns, tmp_path):
    run = opened(tmp_path / "run")
    run.save_images([0, 1, 2], some_images())
    run.finish(save_npz=False, columns=columns)
    assert load_png(run.path / "grid.png").shape[:2] == (64, 3 * 65 - 1)


def test_long_values_are_named_by_their_beginning(tmp_path):
    opened(tmp_path / "run", {"prompts": ["a dog"] * 10_000})
    with pytest.raises(UserError, match=r"prompts: \['a dog'") as caught:
        RunFolder(tmp_path / "run", {"prompts": ["a cat"] * 10_000}, 3)
    assert len(str(caught.value)) < 600


def test_same_config_continues_and_keeps_what_was_measured(tmp_path):
    run = opened(tmp_path / "run")
    run.manifest.seconds["sampling"] = 5.0
    run.save_manifest()
    again = RunFolder(tmp_path / "run", json.loads(json.dumps(CONFIG)), 3)
    assert again.manifest.seconds == {"sampling": 5.0}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 2}, "seed: 1 there, 2 here"),
        ({"sampler": {"eta": 0.5, "steps": 4}}, "sampler.eta: 0.0 there, 0.5 here"),
        ({"ptq": {"bits": 4}}, "ptq: None there"),
        ({"new": 1}, "new: None there, 1 here"),
    ],
)
def test_other_config_is_refused_and_named(change, says, tmp_path):
    opened(tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_text()
    with pytest.raises(UserError) as caught:
        RunFolder(tmp_path / "run", {**CONFIG, **change}, 3)
    assert says in str(caught.value) and "--logdir" in str(caught.value)
    assert (tmp_path / "run" / "run.json").read_text() == before


OFF = [None, False, 0, 0.0, "", [], {}]


@pytest.mark.parametrize("off", OFF, ids=repr)
def test_an_option_that_one_side_lacks_and_that_is_off_is_the_same(off, tmp_path):
    """A later version may have brought it: runs of before go on."""
    without, with_ = {"ptq": {"bits": 4}}, {"ptq": {"bits": 4, "keep_ends": off}, "draw": off}
    opened(tmp_path / "old", without)
    assert RunFolder(tmp_path / "old", with_, 3).config == with_
    opened(tmp_path / "new", with_)
    assert RunFolder(tmp_path / "new", without, 3).config == without
    for there, here in ((without, {"ptq": {"bits": 4, "keep_ends": True}}), (with_, {"ptq": {"bits": 5}})):
        with pytest.raises(UserError, match="ptq"):
            RunFolder(opened(tmp_path / f"{len(here)}{'draw' in there}", there).path, here, 3)


def test_an_option_that_both_sides_have_differs_even_when_off(tmp_path):
    opened(tmp_path / "run", {"count": 0, "name": None})
    with pytest.raises(UserError, match="count: 0 there, None here"):
        RunFolder(tmp_path / "run", {"count": None, "name": None}, 3)


def test_tuples_and_lists_are_the_same_config(tmp_path):
    opened(tmp_path / "run", {"shape": (1, 2)})
    assert RunFolder(tmp_path / "run", {"shape": [1, 2]}, 3).config == {"shape": [1, 2]}


def test_files_are_hashed_and_must_not_change(tmp_path):
    file = tmp_path / "weights"
    file.write_bytes(b"first")
    run = opened(tmp_path / "run")
    run.add_file("float weights", file)
    run.save_manifest()
    assert run.manifest.files == {"float weights": {"path": str(file), "sha256": sha256(file)}}
    again = RunFolder(tmp_path / "run", CONFIG, 3)
    again.add_file("float weights", file)
    file.write_bytes(b"second")
    with pytest.raises(UserError, match="has changed") as caught:
        RunFolder(tmp_path / "run", CONFIG, 3).add_file("float weights", file)
    assert str(file) in str(caught.value) and "--logdir" in str(caught.value)


def test_times_add_up_over_continuations_and_errors(tmp_path, monkeypatch):
    run, clock = RunFolder(tmp_path / "run", CONFIG, 3), iter([10.0, 12.5, 100.0, 101.25])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    with run.timed("work"):
        pass
    assert run.manifest.seconds == {"work": 2.5}
    with pytest.raises(RuntimeError), run.timed("work"):
        raise RuntimeError
    assert run.manifest.seconds == {"work": 3.75}


def test_log_lines_go_to_stderr_and_the_file(tmp_path, capsys):
    run = opened(tmp_path / "run")
    start_logging(verbose=False)
    log = logging.getLogger("qdiff")
    with run.logged():
        log.info("seen")
        log.debug("hidden")
    log.info("later")
    streams = capsys.readouterr()
    assert streams.out == "" and "hidden" not in streams.err
    text = (run.path / "run.log").read_text()
    assert "INFO seen" in text and "hidden" not in text and "later" not in text


def end_with(error: BaseException, run: RunFolder) -> None:
    with pytest.raises(type(error)), run.logged():
        raise error


@pytest.mark.parametrize("there", [(), ("all",), ("all", "all/runs"), ("all", "all/runs", "all/runs/1")])
def test_a_new_run_that_is_refused_at_its_first_step_leaves_nothing(there, tmp_path):
    for folder in there:
        (tmp_path / folder).mkdir()
    run = tmp_path / "all" / "runs" / "1"
    end_with(UserError("no such scheduler"), opened(run))
    assert sorted(tmp_path.rglob("*")) == [tmp_path / folder for folder in there]
    assert opened(run, config={"seed": 2}).pending() == [0, 1, 2]  # nothing is in the mended command's way


def test_a_run_beside_a_refused_one_stays(tmp_path):
    refused, other = opened(tmp_path / "all" / "1"), opened(tmp_path / "all" / "2")
    end_with(UserError("no such scheduler"), refused)
    assert not refused.path.exists() and (other.path / "run.json").is_file()


def test_what_was_made_outlives_a_refusal(tmp_path):
    run = opened(tmp_path / "images")
    run.save_images([1], some_images(1))
    end_with(UserError("too late"), run)
    assert run.pending() == [0, 2] and (run.path / "run.json").is_file()
    run = opened(tmp_path / "calibrated")
    (run.path / "quantized.safetensors").write_bytes(b"1")
    end_with(UserError("too late"), run)
    assert (run.path / "run.json").is_file() and (run.path / "quantized.safetensors").is_file()


def test_what_the_user_had_there_stays(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.log").write_text("of a redirection\n")
    end_with(UserError("refused"), opened(run))
    assert (run / "run.log").read_text() == "of a redirection\n" and (run / "run.json").is_file()


@pytest.mark.parametrize("shared", [False, True])
def test_what_other_processes_write_can_be_continued(shared, tmp_path):
    run = opened(tmp_path / "run")
    with pytest.raises(UserError), run.logged(shared):
        if not shared:  # it was not told of the other process
            RunFolder(tmp_path / "run", CONFIG, 3).save_images([1], some_images(1))
        raise UserError("refused")
    assert RunFolder(tmp_path / "run", CONFIG, 3).pending() == ([0, 1, 2] if shared else [0, 2])
    assert (tmp_path / "run" / "run.json").is_file()


def test_measured_errors_stay(tmp_path):
    run = opened(tmp_path / "run")
    run.manifest.noise_error = {"mse": 1.0}
    end_with(UserError("out of memory"), run)
    assert (tmp_path / "run" / "run.json").is_file()


def test_interrupted_and_continued_runs_stay(tmp_path):
    end_with(KeyboardInterrupt(), opened(tmp_path / "run"))
    end_with(UserError("refused now"), opened(tmp_path / "run"))  # the same run again
    assert (tmp_path / "run" / "run.json").is_file()


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "3"])
def test_foreign_manifest_is_refused(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(UserError, match="is not a run's manifest"):
        RunFolder(tmp_path, CONFIG, 3)


def test_folder_of_foreign_images_is_refused(tmp_path):
    (tmp_path / "img").mkdir()
    RunFolder(tmp_path, CONFIG, 3)  # an empty one is fine
    (tmp_path / "img" / "cat.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no run\.json"):
        RunFolder(tmp_path, CONFIG, 3)


def test_unwritable_places_are_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(UserError, match="cannot be written"):
            RunFolder(path, CONFIG, 3)


def test_folder_that_becomes_unwritable_is_refused_on_opening(tmp_path):
    run = RunFolder(tmp_path / "run", CONFIG, 3)
    (tmp_path / "run").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        run.open()


def test_tensor_is_no_config(tmp_path):
    with pytest.raises(TypeError):
        RunFolder(tmp_path / "run", {"x": torch.zeros(1)}, 3)


@pytest.mark.parametrize(
    ("key", "fewer", "more", "other"),
    [
        ("max_images", 3, 5, 2),
        ("num_images", 3, 5, 2),
        ("prompts", ["a", "b", "c"], ["a", "b", "c", "d", "e"], ["a", "x", "c", "d", "e"]),
    ],
)
def test_a_finished_run_gets_more_images(key, fewer, more, other, tmp_path):
    run = opened(tmp_path / "run", {**CONFIG, key: fewer})
    run.save_images([0, 1, 2], some_images())
    run.finish(save_npz=False)
    grown = opened(tmp_path / "run", {**CONFIG, key: more}, count=5)
    assert grown.pending() == [3, 4] and not grown.images_discarded
    state = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (state["status"], state["num_images"], state["config"][key]) == ("running", 5, more)
    with pytest.raises(UserError, match=key):
        RunFolder(tmp_path / "run", {**CONFIG, key: other}, 5)
    with pytest.raises(UserError, match="seed"):
        RunFolder(tmp_path / "run", {**CONFIG, key: more, "seed": 2}, 5)


def test_a_finished_run_without_its_images_gets_no_more(tmp_path):
    run = opened(tmp_path / "run", {**CONFIG, "max_images": 3})
    run.save_images([0, 1, 2], some_images())
    run.finish(save_npz=True, keep_images=False)
    assert RunFolder(tmp_path / "run", {**CONFIG, "max_images": 3}, 3).images_discarded
    with pytest.raises(UserError, match="3 images were deleted"):
        RunFolder(tmp_path / "run", {**CONFIG, "max_images": 5}, 5)


def test_the_array_file_of_a_run_that_got_more_images_has_all(tmp_path):
    run = opened(tmp_path / "run", {**CONFIG, "max_images": 3})
    run.save_images([0, 1, 2], some_images())
    run.finish(save_npz=True)
    grown = opened(tmp_path / "run", {**CONFIG, "max_images": 5}, count=5)
    grown.save_images([3, 4], some_images(2))
    grown.finish(save_npz=False)
    with np.load(grown.path / "samples.npz") as archive:
        assert len(archive["arr_0"]) == 5
