"""Bad input to the DDIM sampling command: exit code 2, one sentence, nothing left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ddim_runs import FEW, SAMPLER, SCRIPT, W4A8
from omegaconf import OmegaConf

from ddim.models.diffusion import Model
from ddim.pretrained import load_float_weights
from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory, calibrated_run, tiny):
    """Files that no run may take, by the name of what is wrong with them."""
    folder = tmp_path_factory.mktemp("bad")
    checkpoint = (calibrated_run[0] / "quantized.safetensors").read_bytes()
    recording = torch.load(calibrated_run[0] / "calibration_data.pt", weights_only=True)
    (folder / "truncated").write_bytes(checkpoint[: len(checkpoint) // 2])
    (folder / "empty").write_bytes(b"")
    (folder / "text").write_text("this is no checkpoint\n")
    (folder / "float-truncated").write_bytes(tiny.weights.read_bytes()[:-100])
    torch.save({"conv_in.weight": torch.zeros(3)}, folder / "foreign")
    (folder / "pickle-truncated").write_bytes((folder / "foreign").read_bytes()[:200])
    torch.save({"model": Path("x")}, folder / "code")  # needs more than tensors: refused, not run
    torch.save(recording["xs"], folder / "data-malformed")
    torch.save({"xs": recording["xs"], "ts": recording["ts"][:1]}, folder / "data-uneven")
    torch.save({"xs": torch.zeros(0, 3, 1, 8, 8), "ts": torch.zeros(0, 3)}, folder / "data-empty")
    torch.save({"xs": torch.zeros(2, 3, 3, 9, 9), "ts": torch.zeros(2, 3)}, folder / "data-foreign")
    torch.save({**recording, "ts": recording["ts"] + 999}, folder / "data-late")
    torch.save(torch.nn.Linear(2, 2), folder / "module")
    flipped = bytearray(checkpoint)
    flipped[-9] ^= 1
    (folder / "flipped").write_bytes(flipped)
    network = Model(OmegaConf.load(tiny.config))
    load_float_weights(network, tiny.weights)
    qnn = QuantModel(network, QuantConfig(weight_bits=4, act_bits=8, split_shortcut=True, act_symmetric=True))
    load_checkpoint(qnn, calibrated_run[0] / "quantized.safetensors")
    save_checkpoint(qnn, folder / "published.pth", format="published")
    (folder / "config-empty").write_text("")
    (folder / "config-broken").write_text("data: [1, 2")
    (folder / "config-lacking").write_text(tiny.config.read_text().replace("image_size: 8, ", ""))
    (folder / "file").write_text("not a folder")
    return folder


def without(options: tuple, *removed: str) -> tuple:
    return tuple(o for o in options if o not in removed)


# name: (options after the model's, words that the sentence must hold). {bad} is the folder of bad files, {run} the
# calibrated run's folder.
LOAD = (*W4A8, "--a_sym", "--cali_ckpt", "{run}/quantized.safetensors")
DATA_FROM = (*W4A8, *FEW, "--cali_data_path")
REFUSED = {
    "checkpoint missing": ((*W4A8, "--cali_ckpt", "{bad}/none"), ("{bad}/none", "does not exist")),
    "checkpoint empty": ((*W4A8, "--cali_ckpt", "{bad}/empty"), ("{bad}/empty", "empty")),
    "checkpoint text": ((*W4A8, "--cali_ckpt", "{bad}/text"), ("{bad}/text", "damaged")),
    "checkpoint truncated": ((*W4A8, "--cali_ckpt", "{bad}/truncated"), ("{bad}/truncated", "truncated")),
    "checkpoint truncated pickle": ((*W4A8, "--cali_ckpt", "{bad}/pickle-truncated"), ("truncated", "again")),
    "checkpoint foreign": ((*W4A8, "--cali_ckpt", "{bad}/foreign"), ("{bad}/foreign",)),
    "checkpoint with code": ((*W4A8, "--cali_ckpt", "{bad}/code"), ("{bad}/code", "dict of tensors")),
    "checkpoint flipped": ((*LOAD, "--cali_ckpt", "{bad}/flipped"), ("{bad}/flipped", "checksum")),
    "checkpoint is a module": ((*W4A8, "--cali_ckpt", "{bad}/module"), ("{bad}/module", "nn.Module", "state_dict")),
    "published of other act bits": (
        (*LOAD, "--cali_ckpt", "{bad}/published.pth", "--act_bit", 6),
        ("about 8 bits", "not 6", "--act_bit"),
    ),
    "published of wider act bits": (
        (*LOAD, "--cali_ckpt", "{bad}/published.pth", "--act_bit", 16),
        ("about 8 bits", "not 16", "--act_bit"),
    ),
    "published of other softmax bits": (
        (*LOAD, "--cali_ckpt", "{bad}/published.pth", "--sm_abit", 16),
        ("steps of at most", "not 16", "--sm_abit"),
    ),
    "data beyond the schedule": ((*DATA_FROM, "{bad}/data-late"), ("{bad}/data-late", "timestep 1", "0 to 999")),
    "checkpoint is float": ((*W4A8, "--cali_ckpt", "{weights}"), ("{weights}", "no native quantized checkpoint")),
    "other bits": ((*LOAD, "--weight_bit", 8), ("weight_bits 4", "--weight_bit 4")),
    "other act bits": ((*LOAD, "--act_bit", 6), ("act_bits 8", "--act_bit 8")),
    "without split": (without(LOAD, "--split"), ("split_shortcut", "--split")),
    "without a_sym": (without(LOAD, "--a_sym"), ("act_symmetric", "--a_sym")),
    "no activations in it": (
        (*W4A8, "--cali_ckpt", "{w4}/quantized.safetensors"),
        ("--quant_act", "--resume_w"),
    ),
    "unknown option": (("--cali_stepz", 3), ("--cali_stepz",)),
    "ambiguous option": (("--cali", 3), ("--cali could match", "--cali_st")),
    "no number": (("--weight_bit", "four"), ("--weight_bit", "four")),
    "data missing": ((*DATA_FROM, "{bad}/none"), ("{bad}/none", "does not exist", "collect_calibration")),
    "data empty file": ((*DATA_FROM, "{bad}/empty"), ("{bad}/empty", "collect_calibration")),
    "data empty": ((*DATA_FROM, "{bad}/data-empty"), ("{bad}/data-empty", "empty")),
    "data malformed": ((*DATA_FROM, "{bad}/data-malformed"), ("{bad}/data-malformed", "malformed")),
    "data uneven": ((*DATA_FROM, "{bad}/data-uneven"), ("malformed", "2 steps of xs, 1 of ts")),
    "data of another model": ((*DATA_FROM, "{bad}/data-foreign"), ("(3, 9, 9)", "(1, 8, 8)")),
    "cali_st beyond the file": (
        (*DATA_FROM, "{run}/calibration_data.pt", "--cali_st", 3),
        ("--cali_st 3", "2 steps", "--cali_st 2"),
    ),
    "cali_n beyond the file": (
        (*DATA_FROM, "{run}/calibration_data.pt", "--cali_n", 9),
        ("--cali_n 9", "--cali_n 3"),
    ),
    "cali_st beyond the sampler": ((*W4A8, "--cali_st", 5), ("5 calibration steps", "--cali_st 1 to 4")),
    "cali_st zero": ((*W4A8, "--cali_st", 0), ("--cali_st",)),
    "iterations zero": ((*W4A8, "--cali_iters", 0), ("--cali_iters",)),
    "weight_bit too high": ((*W4A8, "--weight_bit", 9), ("--weight_bit", "from 1 to 8")),
    "weight_bit zero": ((*W4A8, "--weight_bit", 0), ("--weight_bit", "from 1 to 8")),
    "act_bit too low": ((*W4A8, "--act_bit", 1), ("--act_bit", "from 2 to 16")),
    "sm_abit too high": ((*W4A8, "--sm_abit", 17), ("--sm_abit", "from 2 to 16")),
    "timesteps zero": (("--timesteps", 0), ("1 to 1000",)),
    "timesteps beyond training": (("--timesteps", 1001), ("1001",)),
    "eta beyond one": (("--eta", 1.5), ("eta is 1.5; give a number from 0 to 1",)),
    "no images": (("--max_images", 0), ("--max_images",)),
    "batch of none": (("--batch_size", 0), ("--batch_size",)),
    "negative seed": (("--seed", -1), ("--seed",)),
    "quantized without ptq": (("--quant_act",), ("--quant_act", "--ptq")),
    "no such device": (("--device", "abacus"), ("--device abacus",)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_bad_input_is_one_sentence(name, call, tiny, bad_files, calibrated_run, weights_only_run, tmp_path):
    options, words = REFUSED[name]
    places = {"bad": bad_files, "run": calibrated_run[0], "w4": weights_only_run, "weights": tiny.weights}
    filled = [str(o).format(**places) for o in options]
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, *filled, "-l", tmp_path / "run")
    line = outcome.error_line()
    for word in words:
        assert word.format(**places) in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("weights", ["none", "empty", "text", "float-truncated", "pickle-truncated", "foreign", "code"])
def test_bad_float_weights(weights, call, tiny, bad_files, tmp_path):
    path = bad_files / weights
    outcome = call(SCRIPT, "--config", tiny.config, "--ckpt", path, *SAMPLER, "-l", tmp_path / "run")
    assert str(path) in outcome.error_line()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("config", ["none", "config-empty", "config-broken", "config-lacking"])
def test_bad_config(config, call, tiny, bad_files, tmp_path):
    path = bad_files / config
    outcome = call(SCRIPT, "--config", path, "--ckpt", tiny.weights, *SAMPLER, "-l", tmp_path / "run")
    line = outcome.error_line()
    assert str(path) in line
    assert ("data.image_size" in line) == (config == "config-lacking")
    assert list(tmp_path.iterdir()) == []


def test_weights_must_be_named_once(call, tiny, tmp_path):
    for options in ((), ("--use_pretrained", "--ckpt", tiny.weights)):
        line = call(SCRIPT, "--config", tiny.config, *options, "-l", tmp_path / "run").error_line()
        assert "--use_pretrained" in line and "--ckpt" in line


def test_unwritable_run_folder(call, tiny, bad_files):
    for folder in (bad_files / "file", bad_files / "file" / "below", Path("/proc/qdiff-run")):
        line = call(SCRIPT, *tiny.options, *SAMPLER, "-l", folder).error_line()
        assert str(folder) in line and "cannot be written" in line
    assert (bad_files / "file").read_text() == "not a folder"


def test_folder_with_images_of_no_run_is_left_alone(call, tiny, tmp_path):
    (tmp_path / "img").mkdir()
    (tmp_path / "img" / "00000.png").write_bytes(b"mine")
    assert "no run.json" in call(SCRIPT, *tiny.options, *SAMPLER, "-l", tmp_path).error_line()
    assert (tmp_path / "img" / "00000.png").read_bytes() == b"mine"


@pytest.mark.parametrize("content", ["{", "[]", "{}", "\x00\x01"])
def test_folder_with_a_foreign_manifest_is_left_alone(content, call, tiny, tmp_path):
    (tmp_path / "run.json").write_text(content)
    assert "run.json" in call(SCRIPT, *tiny.options, *SAMPLER, "-l", tmp_path).error_line()
    assert (tmp_path / "run.json").read_text() == content and len(list(tmp_path.iterdir())) == 1
