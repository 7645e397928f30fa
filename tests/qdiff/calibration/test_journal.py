"""Finished units on disk: they come back bit by bit, or not at all."""

from __future__ import annotations

import pytest
import torch

from qdiff.calibration.journal import CalibrationJournal
from qdiff.errors import UserError

CONFIG = {"weight_bits": 4, "act_bits": 8, "split_shortcut": True}
SETTINGS = {"seed": 3, "plan": {"iterations": 10}}


def unit_of(qnn):
    return qnn.model.up[0].block[0]  # with a split shortcut


def quantizer_state(module):
    return {k: v.clone() for k, v in module.state_dict().items() if "quantizers" in k or "weight_int" in k}


def test_a_unit_comes_back_exactly(calibrated, wrap, tmp_path):
    source, target = unit_of(calibrated(**CONFIG)), unit_of(wrap(**CONFIG))
    CalibrationJournal(tmp_path / "j", SETTINGS).record("weights", 4, source, {"block": 0.25, "block.conv1": 1e-9 / 3})
    journal = CalibrationJournal(tmp_path / "j", SETTINGS)
    assert journal.restore("weights", 4, target) == {"block": 0.25, "block.conv1": 1e-9 / 3}
    expected = quantizer_state(source)
    assert len(expected) > 10
    assert all(torch.equal(v, expected[k]) for k, v in quantizer_state(target).items())


def test_a_unit_from_before_errors_were_kept(calibrated, wrap, tmp_path):
    from safetensors.torch import load_file, save_file

    journal = CalibrationJournal(tmp_path, SETTINGS)
    journal.record("weights", 4, unit_of(calibrated(**CONFIG)), {"block": 0.25})
    (path,) = tmp_path.glob("*.safetensors")
    save_file(load_file(path), path)
    assert journal.restore("weights", 4, unit_of(wrap(**CONFIG))) == {}


def test_what_was_not_finished_is_not_there(calibrated, wrap, tmp_path):
    journal = CalibrationJournal(tmp_path / "j", SETTINGS)
    assert not journal.folder.exists(), "created at the first unit, not before"
    journal.record("weights", 4, unit_of(calibrated(**CONFIG)), {})
    target = unit_of(wrap(**CONFIG))
    before = quantizer_state(target)
    assert journal.restore("weights", 5, target) is None
    assert journal.restore("activations", 4, target) is None
    assert all(torch.equal(v, before[k]) for k, v in quantizer_state(target).items())


def test_other_settings_are_an_error_that_names_them(calibrated, tmp_path):
    CalibrationJournal(tmp_path, SETTINGS).record("weights", 0, unit_of(calibrated(**CONFIG)), {})
    with pytest.raises(UserError, match=r"other settings \(seed\)"):
        CalibrationJournal(tmp_path, {**SETTINGS, "seed": 4})
    with pytest.raises(UserError, match=r"\(new\)"):
        CalibrationJournal(tmp_path, {**SETTINGS, "new": 1})
    CalibrationJournal(tmp_path, {**SETTINGS, "plan": {"iterations": 10}})


@pytest.mark.parametrize("content", [b"", b"half a file", None])
def test_an_unreadable_unit_is_fitted_again(calibrated, wrap, tmp_path, content):
    journal = CalibrationJournal(tmp_path, SETTINGS)
    journal.record("weights", 4, unit_of(calibrated(**CONFIG)), {})
    (path,) = tmp_path.glob("weights-*")
    path.write_bytes(path.read_bytes()[:-50] if content is None else content)
    assert journal.restore("weights", 4, unit_of(wrap(**CONFIG))) is None
    assert not path.exists()


def test_a_unit_of_another_network_is_fitted_again(calibrated, wrap, tmp_path):
    journal = CalibrationJournal(tmp_path, SETTINGS)
    journal.record("weights", 4, calibrated(**CONFIG).model.conv_in, {})
    assert journal.restore("weights", 4, unit_of(wrap(**CONFIG))) is None


def test_an_interrupted_write_leaves_no_unit(calibrated, tmp_path, monkeypatch):
    import safetensors.torch

    def interrupted(_, path, metadata):
        path.write_text("half")
        raise KeyboardInterrupt

    journal = CalibrationJournal(tmp_path, SETTINGS)
    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        journal.record("weights", 4, unit_of(calibrated(**CONFIG)), {})
    assert [p.name for p in tmp_path.iterdir()] == ["settings.json"]


def test_discard_removes_everything(calibrated, tmp_path):
    journal = CalibrationJournal(tmp_path / "j", SETTINGS)
    journal.discard()  # nothing there yet: fine
    journal.record("weights", 4, unit_of(calibrated(**CONFIG)), {})
    journal.discard()
    assert not (tmp_path / "j").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "[" * 100_000])
def test_damaged_settings_are_one_sentence(content, tmp_path):
    (tmp_path / "settings.json").write_text(content)
    with pytest.raises(UserError, match=r"settings\.json of an unfinished calibration is damaged"):
        CalibrationJournal(tmp_path, SETTINGS)


def test_a_unit_with_values_that_are_not_finite_is_fitted_again(calibrated, wrap, tmp_path):
    from safetensors.torch import load_file, save_file

    journal = CalibrationJournal(tmp_path, SETTINGS)
    journal.record("weights", 4, unit_of(calibrated(**CONFIG)), {})
    (path,) = tmp_path.glob("*.safetensors")
    state = load_file(path)
    name = next(n for n in state if n.endswith(".delta"))
    save_file(state | {name: state[name] * float("nan")}, path)
    fresh = unit_of(wrap(**CONFIG))
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    assert journal.restore("weights", 4, fresh) is None
    after = fresh.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
