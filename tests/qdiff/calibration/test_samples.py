"""Calibration files: the published format, what is taken from it, and bad ones."""

from __future__ import annotations

import itertools
import os
import pickle

import numpy as np
import pytest
import torch

from qdiff.calibration.samples import load_recording, save_recording, select_samples
from qdiff.calibration.timesteps import Spacing, ends_early, spaced
from qdiff.errors import UserError

SHAPE = (2, 4, 4)


def recording(steps=10, count=6, conditional=False):
    """Every sample carries its (step, number) in its values."""
    xs = torch.zeros(steps, count, *SHAPE)
    xs += torch.arange(steps)[:, None, None, None, None] * 100 + torch.arange(count)[None, :, None, None, None]
    made = {"xs": xs, "ts": torch.arange(steps)[:, None].expand(steps, count).clone()}
    if conditional:
        made["cs"] = torch.ones(steps, count, 3, 5)
        made["ucs"] = torch.zeros(steps, count, 3, 5)
    return made


@pytest.mark.parametrize(
    ("recorded", "count", "expected"), [(10, 3, [0, 3, 6]), (10, 10, list(range(10))), (7, 1, [0])]
)
def test_steps_are_taken_evenly(recorded, count, expected):
    assert spaced(recorded, count) == expected


@pytest.mark.parametrize(
    ("recorded", "count", "expected"),
    [
        (25, 4, [0, 8, 16, 24]),
        (21, 20, [*range(10), *range(11, 21)]),
        (10, 10, list(range(10))),
        (7, 1, [3]),
        (2, 1, [0]),
    ],
)
def test_steps_from_end_to_end(recorded, count, expected):
    assert spaced(recorded, count, Spacing.ENDS) == expected


@pytest.mark.parametrize("recorded", range(2, 30))
def test_both_ends_are_kept_and_gaps_are_like(recorded):
    for count in range(2, recorded + 1):
        steps = spaced(recorded, count, Spacing.ENDS)
        gaps = [b - a for a, b in itertools.pairwise(steps)]
        assert (steps[0], steps[-1], len(steps)) == (0, recorded - 1, count)
        assert min(gaps) >= 1 and max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize("spacing", Spacing)
@pytest.mark.parametrize("count", [0, -1, 11])
def test_steps_that_cannot_be_taken(count, spacing):
    with pytest.raises(UserError, match="--cali_st 1 to 10"):
        spaced(10, count, spacing)


@pytest.mark.parametrize(
    ("recorded", "visited", "early"),
    [
        ([950, 200], [950, 500, 200, 0], True),  # the first three of four calls
        ([950, 199], [950, 500, 200, 0], False),  # by another sampler
        ([950, 0], [950, 500, 200, 0], False),
        ([950, 200], [950, 200, 0, 0], True),  # the last call repeats a timestep
        ([950], [950], False),
        ([950], [], False),
    ],
)
def test_a_recording_that_ends_early(recorded, visited, early):
    assert ends_early(torch.tensor(recorded), visited) is early


def test_selection_from_end_to_end():
    x, t = select_samples(recording(), 3, 2, SHAPE, spacing=Spacing.ENDS).inputs
    assert t.tolist() == [0, 0, 5, 5, 9, 9] and x[:, 0, 0, 0].tolist() == [0, 1, 500, 501, 900, 901]


def test_selection_takes_the_first_samples_of_each_chosen_step():
    chosen = select_samples(recording(), steps=3, per_step=2, image_shape=SHAPE)
    x, t = chosen.inputs
    assert len(chosen) == 6
    assert x[:, 0, 0, 0].tolist() == [0, 1, 300, 301, 600, 601]
    assert t.tolist() == [0, 0, 3, 3, 6, 6]


def test_conditional_selection_doubles_the_data():
    x, t, context = select_samples(recording(conditional=True), 2, 3, SHAPE, conditional=True).inputs
    assert len(x) == len(t) == len(context) == 12
    assert torch.equal(x[:6], x[6:]) and torch.equal(t[:6], t[6:])
    assert bool((context[:6] == 1).all()) and bool((context[6:] == 0).all())


def test_conditional_selection_without_guidance_takes_what_there_is():
    made = recording(conditional=True)
    del made["ucs"]
    x, t, context = select_samples(made, 2, 3, SHAPE, conditional=True).inputs
    assert len(x) == len(t) == len(context) == 6
    assert bool((context == 1).all())
    assert torch.equal(x, select_samples(recording(), 2, 3, SHAPE).inputs[0])


@pytest.mark.parametrize("key", ["cs", "ucs"])
@pytest.mark.parametrize("damage", [lambda v: v[:, :, 0], lambda v: v[:, :2]])
def test_conditions_must_match_the_samples(key, damage):
    made = recording(conditional=True)
    made[key] = damage(made[key])
    with pytest.raises(UserError, match=r"one \[L, D\] condition per sample"):
        select_samples(made, 2, 3, SHAPE, conditional=True)


def test_conditions_are_refused_where_the_network_takes_none():
    with pytest.raises(UserError, match="takes none"):
        select_samples(recording(conditional=True), 2, 3, SHAPE)


def test_steps_may_hold_different_counts():
    """A list of tensors, as the published files are."""
    made = recording()
    ragged = {"xs": list(made["xs"]), "ts": list(made["ts"])}
    ragged["xs"][3], ragged["ts"][3] = ragged["xs"][3][:2], ragged["ts"][3][:2]
    assert len(select_samples(ragged, 2, 6, SHAPE)) == 12  # steps 0 and 5
    with pytest.raises(UserError, match="--cali_n 2 or less"):
        select_samples(ragged, 3, 3, SHAPE)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"steps": 11}, "--cali_st 10 or less"),
        ({"steps": 0}, "--cali_st"),
        ({"per_step": 7}, "--cali_n 6 or less"),
        ({"per_step": 0}, "at least 1"),
        ({"image_shape": (3, 4, 4)}, r"shape \(2, 4, 4\) but the network takes \(3, 4, 4\)"),
        ({"conditional": True}, "no conditions"),
    ],
)
def test_impossible_selections_name_the_option(arguments, match):
    with pytest.raises(UserError, match=match):
        select_samples(recording(), **{"steps": 2, "per_step": 2, "image_shape": SHAPE, **arguments})


def test_timesteps_must_match_the_samples():
    made = recording()
    made["ts"] = made["ts"][:, :3]
    with pytest.raises(UserError, match="one timestep per sample"):
        select_samples(made, 2, 2, SHAPE)


def test_file_round_trip(tmp_path):
    made = recording(conditional=True)
    save_recording(made, tmp_path / "new" / "data.pt")
    loaded = load_recording(tmp_path / "new" / "data.pt")
    assert set(loaded) == set(made) and all(torch.equal(loaded[k], made[k]) for k in made)
    assert os.listdir(tmp_path / "new") == ["data.pt"]


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damaged_files(folder):
    good = folder / "good.pt"
    save_recording(recording(), good)
    yield "truncated", good.read_bytes()[:-200], "damaged"
    yield "empty file", b"", "damaged"
    yield "foreign", b"<html>404</html>" * 40, "damaged"
    yield "code", pickle.dumps({"xs": Evil(folder / "evidence")}, protocol=2), "written by pickle"
    for name, content, match in (
        ("list", [1, 2], "not a dict with xs and ts"),
        ("no ts", {"xs": torch.zeros(1, 1, *SHAPE)}, "not a dict with xs and ts"),
        ("numbers", {"xs": 3, "ts": 4}, "does not hold tensors"),
        ("lists of numbers", {"xs": [1, 2], "ts": [1, 2]}, "does not hold tensors"),
        ("steps differ", recording() | {"ts": torch.zeros(9, 6)}, "10 steps of xs, 9 of ts"),
        ("no steps", {"xs": torch.zeros(0, 6, *SHAPE), "ts": torch.zeros(0, 6)}, "is empty"),
        ("no samples", {"xs": torch.zeros(5, 0, *SHAPE), "ts": torch.zeros(5, 0)}, "is empty"),
    ):
        torch.save(content, folder / "made.pt")
        yield name, (folder / "made.pt").read_bytes(), match


def test_bad_files_are_one_clear_error(tmp_path):
    for name, content, match in damaged_files(tmp_path):
        path = tmp_path / "bad.pt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=match) as caught:
            load_recording(path)
            pytest.fail(name)
        assert str(path) in str(caught.value), name
    assert not (tmp_path / "evidence").exists()
    with pytest.raises(UserError, match="does not exist"):
        load_recording(tmp_path / "nowhere.pt")


NUMBERS = {
    "unknown key": (lambda made: made.update(latents=made["xs"]), r"holds unknown entries \(latents\)"),
    "integers": (lambda made: made.update(xs=made["xs"].long()), "xs holds torch.int64, not floats"),
    "truth values": (lambda made: made.update(ts=made["ts"] > 3), "ts holds torch.bool, not timesteps"),
    "single numbers": (lambda made: made.update(ts=[torch.tensor(i) for i in range(10)]), "single numbers"),
    "a number": (lambda made: made.update(ts=torch.tensor(3)), "single numbers"),
    "negative times": (lambda made: made["ts"].__setitem__(3, -1), "timestep -1.0 at step 3"),
    "NaN": (lambda made: made["xs"][4].fill_(torch.nan), "NaN or infinite values, the first in xs at step 4"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_no_network_can_be_fed(name, tmp_path):
    damage, match = NUMBERS[name]
    made = recording()
    damage(made)
    save_recording(made, tmp_path / "data.pt")
    with pytest.raises(UserError, match=match) as caught:
        load_recording(tmp_path / "data.pt")
    assert "data.pt" in str(caught.value)


OUTSIDE = {
    "counted from 1": lambda made: made["ts"].__setitem__(0, 10),
    "of a longer schedule": lambda made: made.update(ts=made["ts"] * 100.0),
    "the steps before": lambda made: made.update(xs_prev=made["xs"], ts_prev=made["ts"] + 1),
    "of one sample in a list": lambda made: made.update(
        ts=[*made["ts"][:9], torch.tensor([9.0, 9, 9, 9, 9, 10.5])], xs=list(made["xs"])
    ),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_timesteps_outside_the_schedule(name, tmp_path):
    made, path = recording(), tmp_path / "data.pt"
    save_recording(made, path)
    load_recording(path, training_steps=10)
    OUTSIDE[name](made)
    save_recording(made, path)
    load_recording(path)
    with pytest.raises(UserError, match=r"holds the timestep \d+(\.5)? in ts\w* at step \d, .*0 to 9; give a file"):
        load_recording(path, training_steps=10)


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_files_and_objects_in_them(zipped, tmp_path):
    """numpy arrays in the place of tensors are told, and so are those beside them; neither is damage."""
    path, made = tmp_path / "data.pt", recording()
    torch.save(made, path, _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_recording(path)["xs"], made["xs"])
    for content, match in (
        ({"xs": made["xs"].numpy(), "ts": made["ts"].numpy()}, "xs does not hold tensors"),
        (made | {"seed": np.int64(3)}, r"holds unknown entries \(seed\)"),
        (torch.nn.Linear(2, 2), "not a dict with xs and ts|a whole nn.Module"),
    ):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(UserError, match=match) as caught:
            load_recording(path)
        assert "damaged" not in str(caught.value) and "\n" not in str(caught.value)
