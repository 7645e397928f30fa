"""The training command on a tiny model: weights appear whole, and a repeated command continues."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from script_device import ON_DEVICE

SCRIPT = "train_ddim"
IMAGES, BATCH = 40, 16
STEPS_AN_EPOCH = 2  # 40 images in full batches of 16
CHECKPOINT_EVERY = 10  # epochs


@pytest.fixture
def command(tiny, tmp_path, monkeypatch):
    """``command(epochs)``: the arguments of a run on 40 random images; leaves everything in tmp_path."""
    import ddim.datasets

    images = torch.rand(IMAGES, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(ddim.datasets, "load_training_images", lambda data: images)
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "train.yml"
    config.write_text(tiny.config.read_text().replace("batch_size: 600", f"batch_size: {BATCH}"))
    fixed = ("--config", config, "--out", tmp_path / "out" / "weights.safetensors", "--workdir", tmp_path / "work")
    return lambda epochs: (*fixed, "--threads", 1, "--epochs", epochs)


@pytest.fixture
def steps(monkeypatch):
    """The training steps that were done: a list that grows."""
    from ddim.training import NoisePredictionTask

    done, training_step = [], NoisePredictionTask.training_step

    def counted(self, batch, index):
        done.append(self.global_step)
        return training_step(self, batch, index)

    monkeypatch.setattr(NoisePredictionTask, "training_step", counted)
    return done


def weights_in(folder: Path) -> list[str]:
    return [p.name for p in folder.rglob("*") if p.is_file() and p.parent.name == "out"]


@pytest.mark.slow
def test_two_epochs_write_weights_that_sample(call, command, steps, tmp_path):
    outcome = call(SCRIPT, *command(2))
    assert outcome.code == 0, outcome.err
    assert len(steps) == 2 * STEPS_AN_EPOCH
    assert "training: 100 % (2 of 2 epoch), took" in outcome.err  # no terminal, no bar
    assert "\r" not in outcome.err + outcome.out
    weights = tmp_path / "out" / "weights.safetensors"
    assert weights_in(tmp_path) == [weights.name]  # no temporary file
    with safe_open(weights, framework="pt") as file:
        notes = json.loads(file.metadata()["training"])
    assert (notes["epochs"], notes["steps"], notes["images"], notes["seed"]) == (2, 4, IMAGES, 1234)
    assert 0 < notes["final_loss"] < 3
    options = ("--config", tmp_path / "train.yml", "--ckpt", weights, "--timesteps", 2, "--max_images", 1)
    assert call("sample_diffusion_ddim", *options, *ON_DEVICE, "-l", tmp_path / "run").code == 0


@pytest.mark.slow
def test_repeated_command_continues_from_the_last_checkpoint(call, command, steps, tmp_path):
    assert call(SCRIPT, *command(CHECKPOINT_EVERY)).code == 0
    assert len(steps) == CHECKPOINT_EVERY * STEPS_AN_EPOCH
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["last.ckpt"]
    steps.clear()
    assert call(SCRIPT, *command(CHECKPOINT_EVERY + 1)).code == 0
    first = CHECKPOINT_EVERY * STEPS_AN_EPOCH
    assert steps == [first, first + 1]
    # Another seed or model is not what lies there.
    steps.clear()
    line = call(SCRIPT, *command(CHECKPOINT_EVERY + 2), "--seed", 7).error_line()
    assert "last.ckpt was trained with another seed; choose another --workdir" in line
    other = tmp_path / "other.yml"
    other.write_text((tmp_path / "train.yml").read_text().replace("dropout: 0.1", "dropout: 0.2"))
    assert other.read_text() != (tmp_path / "train.yml").read_text()
    line = call(SCRIPT, *command(CHECKPOINT_EVERY + 2), "--config", other).error_line()
    assert "last.ckpt was trained with another config" in line and steps == []


@pytest.mark.slow
def test_interrupted_training_writes_no_weights_and_continues(call, command, steps, tmp_path, monkeypatch):
    from ddim.training import NoisePredictionTask

    counted = NoisePredictionTask.training_step

    def interrupted(self, batch, index):
        if self.global_step == CHECKPOINT_EVERY * STEPS_AN_EPOCH + 1:
            raise KeyboardInterrupt
        return counted(self, batch, index)

    with monkeypatch.context() as patch:
        patch.setattr(NoisePredictionTask, "training_step", interrupted)
        outcome = call(SCRIPT, *command(CHECKPOINT_EVERY + 2))
    assert outcome.code not in (0, 2)
    assert weights_in(tmp_path) == []
    steps.clear()
    assert call(SCRIPT, *command(CHECKPOINT_EVERY + 2)).code == 0
    assert len(steps) == 2 * STEPS_AN_EPOCH
    assert weights_in(tmp_path) == ["weights.safetensors"]


@pytest.mark.slow
def test_seed_fixes_the_weights(call, command, tmp_path):
    from safetensors.torch import load_file

    made = []
    for seed in (1, 1, 2):
        assert call(SCRIPT, *command(1), "--seed", seed).code == 0
        made.append(load_file(tmp_path / "out" / "weights.safetensors")["conv_in.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_bad_input_is_one_sentence_before_any_training(call, command, steps, tmp_path):
    assert "--epochz" in call(SCRIPT, *command(1), "--epochz", 3).error_line()
    assert "--config" in call(SCRIPT, "--out", tmp_path / "x").error_line()
    assert "none.yml" in call(SCRIPT, *command(1), "--config", "none.yml").error_line()
    (tmp_path / "file").write_text("")
    assert "cannot be written" in call(SCRIPT, *command(1), "--out", tmp_path / "file" / "w").error_line()
    for option, value in (("--epochs", -1), ("--threads", 0), ("--seed", -1)):
        assert f"{option} is {value}; give at least" in call(SCRIPT, *command(1), option, value).error_line()
    assert "cannot be written" in call(SCRIPT, *command(1), "--workdir", tmp_path / "file" / "w").error_line()
    assert steps == [] and not (tmp_path / "work").exists()
