"""The sampling command from end to end: float, naive, calibrated, loaded, continued, and refusing bad input."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

SCRIPT = "sample_diffusion_ddim"
IMAGES = 5
SAMPLER = ("--timesteps", 4, "--max_images", IMAGES, "--batch_size", 2, "--seed", 7)
W4A8 = ("--ptq", "--weight_bit", 4, "--quant_act", "--act_bit", 8, "--split")
DATA = ("--cali_st", 2, "--cali_n", 3)
FEW = (*DATA, "--cali_iters", 3, "--cali_iters_a", 2, "--cali_batch_size", 4)

# What W4A8 may move a pixel of the tiny model on average, in grey levels: 2.2 to 2.3 were seen; weights that do not
# belong to the model moved it by 18.
MEAN_GREY_LEVELS_LOST = 5.0


def sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def manifest(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


def image_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "img").glob("*.png"))}


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(p)) for p in sorted((folder / "img").glob("*.png"))]).astype(int)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Modification time and content of every file but the manifest and the log, which tell of each call."""
    return {
        str(p.relative_to(folder)): (p.stat().st_mtime_ns, sha256(p))
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in ("run.json", "run.log", "grid.png", "samples.npz")
    }


def succeeded(outcome):
    assert outcome.code == 0, outcome.err
    return outcome


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def float_run(call, tiny, runs):
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, "--save-npz", "-l", runs / "float"))
    return runs / "float"


@pytest.fixture(scope="module")
def linear_run(call, tiny, runs):
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *W4A8, *DATA, "--quant_mode", "linear", "-l", runs / "linear"))
    return runs / "linear"


@pytest.fixture(scope="module")
def calibrated_run(call, tiny, runs):
    options = (*tiny.options, *SAMPLER, *W4A8, "--a_sym", *FEW)
    succeeded(call(SCRIPT, *options, "--save-npz", "-l", runs / "w4a8"))
    return runs / "w4a8", options


@pytest.fixture(scope="module")
def weights_only_run(call, tiny, runs):
    options = ("--ptq", "--weight_bit", 4, "--split", *FEW)
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *options, "-l", runs / "w4"))
    return runs / "w4"


# --- What a run leaves behind


def test_float_run_writes_images_grid_and_array(float_run):
    names = [f"{i:05d}.png" for i in range(IMAGES)]
    assert list(image_bytes(float_run)) == names
    made = pixels(float_run)
    assert made.shape == (IMAGES, 8, 8)
    assert np.mean((made > 0) & (made < 255)) > 0.2  # not saturated: comparisons below see the network
    assert len({data for data in image_bytes(float_run).values()}) == IMAGES
    with np.load(float_run / "samples.npz") as archive:
        assert archive["arr_0"].dtype == np.uint8
        np.testing.assert_array_equal(archive["arr_0"][..., 0], made)
    with Image.open(float_run / "grid.png") as grid:
        assert grid.size == (3 * 65 - 1, 2 * 65 - 1)  # 5 images in 3 columns, 8 times enlarged, one pixel between


def test_manifest_of_a_float_run(float_run, tiny):
    run = manifest(float_run)
    assert run["status"] == "finished"
    assert run["config"]["method"] == "float" and run["config"]["ptq"] is None
    assert run["config"]["seed"] == 7
    assert run["config"]["sampler"]["timesteps"] == 4
    assert run["config"]["model"]["model"]["ch"] == 32
    assert run["num_images"] == IMAGES
    assert "--timesteps 4" in run["command"] and f"{SCRIPT}.py" in run["command"]
    assert run["files"] == {"float weights": {"path": str(tiny.weights), "sha256": sha256(tiny.weights)}}
    assert run["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert run["device"] == "cpu"
    assert run["seconds"]["sampling"] > 0
    assert run["peak_memory_bytes"][0]["ram"] > 1 << 26  # Python with torch takes more than 64 MiB
    assert "activation_quantizers" not in run


@pytest.mark.parametrize("kind", ["linear", "qdiff"])
def test_manifest_of_a_calibrated_run(kind, linear_run, calibrated_run):
    folder = linear_run if kind == "linear" else calibrated_run[0]
    run = manifest(folder)
    plan = run["config"]["ptq"]
    assert run["status"] == "finished"
    assert run["config"]["method"] == plan["method"] == kind
    assert plan["action"] == "calibrate"
    assert (plan["quant"]["weight_bits"], plan["quant"]["act_bits"], plan["quant"]["split_shortcut"]) == (4, 8, True)
    assert (plan["steps"], plan["per_step"]) == (2, 3)
    data = folder / "calibration_data.pt"
    assert run["files"]["calibration data"] == {"path": str(data), "sha256": sha256(data)}
    assert torch.load(data, weights_only=True)["xs"].shape == (2, 3, 1, 8, 8)
    assert run["activation_quantizers"]["total"] > 20
    assert run["activation_quantizers"]["silent"] == []
    assert {"recording", "calibration", "sampling"} <= set(run["seconds"])
    assert 0 < run["noise_error"]["mse"] < run["noise_error"]["float_mean_square"]
    assert run["stored_activations_peak_bytes"] > 0 or kind == "linear"
    assert bool(run["reconstruction_errors"]) == (kind == "qdiff")
    assert not (folder / "calibration").exists()  # the journal of finished blocks is gone
    assert f"method {kind}" in (folder / "run.log").read_text()


def test_quantized_images_are_near_float_but_not_equal(float_run, linear_run, calibrated_run, tiny, call, runs):
    truth = pixels(float_run)
    for folder in (linear_run, calibrated_run[0]):
        lost = np.abs(pixels(folder) - truth).mean()
        assert 0 < lost < MEAN_GREY_LEVELS_LOST
    # Planted: another network's weights.
    other = runs / "other.safetensors"
    scaled = {k: v * 3 if k.startswith("conv_out") else v for k, v in load_file(tiny.weights).items()}
    save_file(scaled, other)
    succeeded(call(SCRIPT, "--config", tiny.config, "--ckpt", other, *SAMPLER, "-l", runs / "other"))
    assert np.abs(pixels(runs / "other") - truth).mean() > MEAN_GREY_LEVELS_LOST


def test_checkpoint_is_small(calibrated_run, tiny):
    assert (calibrated_run[0] / "quantized.safetensors").stat().st_size < 0.25 * tiny.weights.stat().st_size


def test_sequence_writes_every_step(call, tiny, tmp_path):
    options = ("--timesteps", 2, "--max_images", 1, "--sequence")
    succeeded(call(SCRIPT, *tiny.options, *options, "-l", tmp_path / "run"))
    assert len(list((tmp_path / "run" / "sequence").glob("*.png"))) == 8 * 2


def test_run_folder_has_a_name_of_its_own_without_logdir(call, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (1, 2):
        succeeded(call(SCRIPT, *tiny.options, "--timesteps", 1, "--max_images", 1, "--seed", seed))
    folders = sorted(p.name for p in (tmp_path / "runs").iterdir())
    assert len(folders) == 2 and all(name.startswith("tiny-float-") for name in folders)


# --- Continuing


def test_second_call_redoes_nothing(call, calibrated_run):
    folder, options = calibrated_run
    before, seconds = snapshot(folder), manifest(folder)["seconds"]
    outcome = succeeded(call(SCRIPT, *options, "--save-npz", "-l", folder))
    assert snapshot(folder) == before
    assert manifest(folder)["seconds"] == seconds
    assert "calibrating" not in outcome.err and "recording" not in outcome.err
    assert manifest(folder)["status"] == "finished"


@pytest.mark.parametrize("kind", ["float", "qdiff"])
def test_killed_run_makes_only_the_missing_images_again(kind, call, tiny, float_run, calibrated_run, tmp_path):
    source, options = (float_run, (*tiny.options, *SAMPLER)) if kind == "float" else calibrated_run
    folder = tmp_path / "killed"
    shutil.copytree(source, folder)
    wanted = image_bytes(folder)
    for lost in (1, 2, 4):
        (folder / "img" / f"{lost:05d}.png").unlink()
    for late in ("grid.png", "samples.npz"):
        (folder / late).unlink()
    (folder / "img" / ".00001.png.4242.part").write_bytes(b"\x89PNG half an image")
    state = manifest(folder)
    state["status"] = "running"
    (folder / "run.json").write_text(json.dumps(state))
    kept = {i: (folder / "img" / f"{i:05d}.png").stat().st_mtime_ns for i in (0, 3)}

    outcome = succeeded(call(SCRIPT, *options, "--save-npz", "-l", folder))
    assert image_bytes(folder) == wanted
    assert {i: (folder / "img" / f"{i:05d}.png").stat().st_mtime_ns for i in (0, 3)} == kept
    assert (folder / "grid.png").read_bytes() == (source / "grid.png").read_bytes()
    assert manifest(folder)["status"] == "finished"
    assert "calibrating" not in outcome.err
    if kind == "qdiff":
        assert manifest(folder)["activation_quantizers"]["silent"] == []


def test_calibration_killed_at_a_block_continues_there(call, calibrated_run, tmp_path, monkeypatch):
    """The blocks finished before the kill are not fitted again, and the checkpoint is the uninterrupted one."""
    from qdiff.calibration import journal
    from qdiff.methods import qdiffusion

    folder, options = calibrated_run
    finished, record, fit = [], journal.CalibrationJournal.record, qdiffusion._learn_rounding

    def killed_at_the_fourth(self, phase, index, module):
        if len(finished) == 3:
            raise KeyboardInterrupt
        finished.append(index)
        record(self, phase, index, module)

    with monkeypatch.context() as patch:
        patch.setattr(journal.CalibrationJournal, "record", killed_at_the_fourth)
        outcome = call(SCRIPT, *options, "-l", tmp_path / "run")
    assert outcome.code == 130 and "interrupted" in outcome.err and "Traceback" not in outcome.err
    assert not (tmp_path / "run" / "quantized.safetensors").exists()

    fitted = []
    with monkeypatch.context() as patch:
        patch.setattr(qdiffusion, "_learn_rounding", lambda unit, *a, **k: (fitted.append(unit.name), fit(unit, *a))[1])
        succeeded(call(SCRIPT, *options, "-l", tmp_path / "run"))
    everything = [n for n in manifest(folder)["reconstruction_errors"] if n.startswith("weights ")]
    assert len(fitted) == len(everything) - 3
    there, here = load_file(folder / "quantized.safetensors"), load_file(tmp_path / "run" / "quantized.safetensors")
    assert there.keys() == here.keys() and all(torch.equal(there[k], here[k]) for k in there)
    assert image_bytes(tmp_path / "run") == image_bytes(folder)


def test_memory_budget_may_change_when_a_run_continues(call, calibrated_run):
    """It does not change the result, and whoever ran out of memory must be able to continue with less."""
    folder, options = calibrated_run
    succeeded(call(SCRIPT, *options, "--save-npz", "--memory_budget", 1, "-l", folder))


def test_other_options_do_not_continue_a_run(call, tiny, float_run):
    before = snapshot(float_run)
    outcome = call(SCRIPT, *tiny.options, *SAMPLER, "--seed", 8, "-l", float_run)
    line = outcome.error_line()
    assert "seed: 7 there, 8 here" in line and "--logdir" in line
    assert snapshot(float_run) == before


def test_replaced_weights_do_not_continue_a_run(call, tiny, tmp_path):
    """The same path with other content would give a folder of two models' images."""
    weights = tmp_path / "weights.safetensors"
    shutil.copy(tiny.weights, weights)
    options = ("--config", tiny.config, "--ckpt", weights, "--timesteps", 1, "--max_images", 2, "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *options))
    (tmp_path / "run" / "img" / "00001.png").unlink()
    save_file({k: v * 0.5 for k, v in load_file(tiny.weights).items()}, weights)
    line = call(SCRIPT, *options).err.splitlines()[-1]
    assert line.startswith("error: ") and str(weights) in line and "--logdir" in line
    assert not (tmp_path / "run" / "img" / "00001.png").exists()


# --- Loading


@pytest.mark.parametrize("resume", [(), ("--resume",)])
def test_own_checkpoint_gives_the_calibrated_images(resume, call, tiny, calibrated_run, tmp_path):
    source = calibrated_run[0]
    options = ("--cali_ckpt", source / "quantized.safetensors", *resume, "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *W4A8, "--a_sym", *options))
    assert image_bytes(tmp_path / "run") == image_bytes(source)
    files = manifest(tmp_path / "run")["files"]
    assert files["quantized checkpoint"]["sha256"] == sha256(source / "quantized.safetensors")
    assert not (tmp_path / "run" / "quantized.safetensors").exists()


def test_weights_of_a_w4a8_checkpoint_alone_are_the_w4_run(call, tiny, calibrated_run, weights_only_run, tmp_path):
    """Weights are fitted before activations and with the same draws: leaving activations out gives the W4 images."""
    options = ("--ptq", "--weight_bit", 4, "--split", "--cali_ckpt", calibrated_run[0] / "quantized.safetensors")
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *options, "-l", tmp_path / "run"))
    assert image_bytes(tmp_path / "run") == image_bytes(weights_only_run)
    assert image_bytes(tmp_path / "run") != image_bytes(calibrated_run[0])
    assert manifest(tmp_path / "run")["activation_quantizers"]["total"] == 0


def test_resume_w_calibrates_activations_for_loaded_weights(call, tiny, calibrated_run, weights_only_run, tmp_path):
    loaded, data = weights_only_run / "quantized.safetensors", calibrated_run[0] / "calibration_data.pt"
    options = (*W4A8, "--a_sym", *FEW, "--resume_w", "--cali_ckpt", loaded, "--cali_data_path", data)
    folder = tmp_path / "run"
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *options, "-l", folder))
    run = manifest(folder)
    assert run["config"]["ptq"]["action"] == "activations"
    assert all(name.startswith("activations ") for name in run["reconstruction_errors"])
    there, here = load_file(loaded), load_file(folder / "quantized.safetensors")
    assert all(torch.equal(there[k], here[k]) for k in there)  # the weights, untouched
    assert "act_delta" in here and "act_delta" not in there
    # W4 calibrated once and resumed is W4A8 calibrated at once: same weights, same data, same draws.
    assert image_bytes(folder) == image_bytes(calibrated_run[0])

    files = {
        "float weights": tiny.weights,
        "calibration data": data,
        "quantized checkpoint": loaded,
    }
    for role, path in files.items():
        assert run["files"][role] == {"path": str(path), "sha256": sha256(path)}
    before = snapshot(folder)
    succeeded(call(SCRIPT, *tiny.options, *SAMPLER, *options, "-l", folder))
    assert snapshot(folder) == before
    for role, path in files.items():  # also after a second call
        assert manifest(folder)["files"][role]["path"] == str(path)


def test_published_checkpoint_runs(call, tmp_path):
    """A file of the paper's code, with the options of its README."""
    case = Path(__file__).parents[1] / "golden" / "ddim_w4a8_split"
    config = json.loads((case / "case.json").read_text())["config"]
    (tmp_path / "model.yml").write_text(json.dumps(config))  # JSON is YAML
    published = torch.load(case / "ckpt.pth", weights_only=True)
    floats = {
        k.removeprefix("model."): v.contiguous()
        for k, v in published.items()
        if k.endswith((".weight", ".bias")) and "quantizer" not in k
    }
    save_file(floats, tmp_path / "float.safetensors")
    options = ("--config", tmp_path / "model.yml", "--ckpt", tmp_path / "float.safetensors", "--device", "cpu")
    options += (*SAMPLER, *W4A8, "--a_sym", "--cali_ckpt", case / "ckpt.pth", "-l", tmp_path / "run")
    succeeded(call(SCRIPT, *options))
    assert pixels(tmp_path / "run").shape == (IMAGES, 16, 16, 3)
    assert manifest(tmp_path / "run")["files"]["quantized checkpoint"]["sha256"] == sha256(case / "ckpt.pth")


# --- Dry run and published commands

# The DDIM section of Q-Diffusion's README, its placeholders filled in.
README_WEIGHTS = (
    "--config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit {bits} "
    "--quant_mode qdiff --split -l out --cali_ckpt w{bits}.pth"
)
README_W_AND_A = (
    "--config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit {bits} "
    "--quant_mode qdiff --quant_act --act_bit 8 --a_sym --split -l out --cali_ckpt w{bits}a8.pth"
)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("command", [README_WEIGHTS, README_W_AND_A], ids=["weights", "weights-and-activations"])
def test_readme_commands_resolve(command, bits, call, tmp_path, monkeypatch):
    shutil.copytree(Path(__file__).parents[2] / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    outcome = succeeded(call(SCRIPT, *shlex.split(command.format(bits=bits)), "--dry-run"))
    config = json.loads(outcome.out)
    assert sorted(tmp_path.rglob("*")) == before
    assert outcome.err == ""
    quant, activations = config["ptq"]["quant"], command is README_W_AND_A
    assert config["method"] == "qdiff" and config["ptq"]["action"] == "load"
    assert config["ptq"]["checkpoint"] == (f"w{bits}a8.pth" if activations else f"w{bits}.pth")
    assert quant["weight_bits"] == bits and quant["split_shortcut"] is True
    assert quant["act_bits"] == (8 if activations else None) and quant["act_symmetric"] is activations
    assert config["sampler"]["skip_type"] == "quad" and config["sampler"]["timesteps"] == 100
    assert config["max_images"] == 50000 and config["seed"] == 1234


def test_dry_run_prints_what_the_manifest_keeps(call, calibrated_run):
    folder, options = calibrated_run
    outcome = succeeded(call(SCRIPT, *options, "-l", "never-made", "--dry-run"))
    assert json.loads(outcome.out) == manifest(folder)["config"]


def test_dry_run_needs_no_weights_data_or_device(call, tiny, tmp_path):
    missing = tmp_path / "missing"
    options = ("--config", tiny.config, "--ckpt", missing, "--cali_data_path", missing, "--device", "cuda:9")
    outcome = succeeded(call(SCRIPT, *options, *W4A8, "-l", tmp_path / "run", "--dry-run"))
    assert json.loads(outcome.out)["weights"] == str(missing)
    assert list(tmp_path.iterdir()) == []


# --- Bad input: exit code 2, one sentence, nothing left behind


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
    "checkpoint truncated pickle": ((*W4A8, "--cali_ckpt", "{bad}/pickle-truncated"), ("truncated", "anew")),
    "checkpoint foreign": ((*W4A8, "--cali_ckpt", "{bad}/foreign"), ("{bad}/foreign",)),
    "checkpoint with code": ((*W4A8, "--cali_ckpt", "{bad}/code"), ("{bad}/code", "dict of tensors")),
    "checkpoint is float": ((*W4A8, "--cali_ckpt", "{weights}"), ("{weights}", "no quantized checkpoint")),
    "other bits": ((*LOAD, "--weight_bit", 8), ("weight_bits 4", "--weight_bit 4")),
    "other act bits": ((*LOAD, "--act_bit", 6), ("act_bits 8", "--act_bit 8")),
    "without split": (without(LOAD, "--split"), ("split_shortcut", "--split")),
    "without a_sym": (without(LOAD, "--a_sym"), ("act_symmetric", "--a_sym")),
    "no activations in it": (
        (*W4A8, "--cali_ckpt", "{w4}/quantized.safetensors"),
        ("--quant_act", "--resume_w"),
    ),
    "unknown option": (("--cali_stepz", 3), ("--cali_stepz",)),
    "abbreviated option": (("--max_im", 3), ("--max_im",)),
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
    "eta beyond one": (("--eta", 1.5), ("--eta",)),
    "no images": (("--max_images", 0), ("--max_images",)),
    "batch of none": (("--batch_size", 0), ("--batch_size",)),
    "negative seed": (("--seed", -1), ("--seed",)),
    "quantized without ptq": (("--quant_act",), ("--quant_act", "--ptq")),
    "no such device": (("--device", "abacus"), ("--device abacus",)),
}


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
