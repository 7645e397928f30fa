"""``--refit`` from the command line: what is recorded and fitted in each round, kept, and continued after a kill."""

from __future__ import annotations

import json

import pytest
import torch
from run_checks import image_bytes, manifest, succeeded
from safetensors.torch import load_file
from script_device import ON_DEVICE

import qdiff
from ddim.config import load_config
from ddim.models.diffusion import Model
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet, load_recording, save_recording
from qdiff.checkpoint import load_checkpoint
from qdiff.checkpoint.metadata import read_notes
from qdiff.config import QuantConfig
from qdiff.methods.qdiffusion import QDiffusionConfig
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod

SCRIPT = "sample_diffusion_ddim"
SEED, STEPS = 3, 4
SAMPLER = ("--timesteps", STEPS, "--max_images", 1, "--seed", SEED)
W4A6 = ("--ptq", "--split", "--weight_bit", 4, "--quant_act", "--act_bit", 6, "--cali_st", STEPS, "--cali_n", 2)
ITERATIONS, BATCH = 3, 4
LEARNED = (*W4A6, "--cali_iters", ITERATIONS, "--cali_iters_a", ITERATIONS, "--cali_batch_size", BATCH)
RECORDINGS = ["calibration_data.pt", "calibration_data-refit1.pt", "calibration_data-refit2.pt"]


@pytest.fixture(scope="module")
def options(one_level):
    return *one_level.options, *SAMPLER, *LEARNED, "--bias_correction", "--refit", 2


@pytest.fixture(scope="module")
def run(call, options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("refit") / "run"
    return folder, succeeded(call(SCRIPT, *options, "-l", folder)).err


def network(one_level) -> QuantModel:
    model = Model(load_config(one_level.config))
    model.load_state_dict(load_file(one_level.weights))
    ranges = {"weight_range": RangeMethod.MIN_MAX, "act_range": RangeMethod.MIN_MAX}
    return QuantModel(model, QuantConfig(4, 6, split_shortcut=True, **ranges))


def calibrated_on(one_level, file) -> QuantModel:
    """A network calibrated once, by the Python API, on a recording."""
    qnn, recorded = network(one_level), load_recording(file)
    data = CalibrationSet(tuple(torch.cat(list(recorded[key])) for key in ("xs", "ts")))
    config = QDiffusionConfig(iterations=ITERATIONS, act_iterations=ITERATIONS, batch_size=BATCH, bias_correction=True)
    qdiff.calibrate(qnn, data, "qdiff", config, run=CalibrationRun(SEED, show_progress=False))
    return qnn


def differing(qnn, other) -> list[str]:
    a, b = qnn.state_dict(), other.state_dict()
    return sorted(n for n in a if not n.endswith("float_bias") and not torch.equal(a[n], b[n]))


def test_what_a_run_leaves(run):
    folder, said = run
    made = manifest(folder)
    assert made["config"]["ptq"]["refit"] == 2 and made["activation_quantizers"]["silent"] == []
    assert set(RECORDINGS) <= {path.name for path in folder.iterdir()} and not (folder / "calibration").exists()
    roles = {"calibration data", "calibration data of refit 1", "calibration data of refit 2"}
    assert roles <= set(made["files"]) and len({made["files"][role]["sha256"] for role in roles}) == 3
    for seconds in (made["seconds"], made["cpu_seconds"]):
        assert all(seconds[phase] > 0 for phase in ("recording", "refit recording", "calibration"))
    assert read_notes(folder / "quantized.safetensors")["refit"] == 2
    told = [line for line in said.splitlines() if line.startswith(("refit", "recording 2", "calibrating with"))]
    kinds = [line.split()[0] + " " + line.split()[-2] for line in told]
    assert kinds == ["recording float", "calibrating 8", *["refit of", "recording quantized", "calibrating 8"] * 2]


@pytest.mark.slow
def test_each_recording_is_of_the_network_fitted_before(run, one_level):
    """Every recorded x follows from the one before by a DDIM step with the ε of that network, in float64."""
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 5e-4, 1000, dtype=torch.float64), 0)
    folder, _ = run

    def step_error(qnn, recorded, in_float) -> float:
        errors = []
        for i in range(STEPS - 1):
            x, t, after = recorded["xs"][i], recorded["ts"][i], recorded["xs"][i + 1].double()
            with torch.no_grad(), qnn.quantized(not in_float, not in_float):
                eps = qnn(x, t).double()
            a, a_next = alpha_bar[t[0]], alpha_bar[recorded["ts"][i + 1][0]]
            wanted = (x.double() - (1 - a).sqrt() * eps) * (a_next / a).sqrt() + (1 - a_next).sqrt() * eps
            errors.append(float((after - wanted).norm() / wanted.norm()))
        return max(errors)

    recorded = [load_recording(folder / name) for name in RECORDINGS]
    assert all(torch.equal(one["xs"][0], recorded[0]["xs"][0]) for one in recorded)  # the same x_T
    first, second = (calibrated_on(one_level, folder / name) for name in RECORDINGS[:2])
    found = [step_error(first, recorded[0], True), step_error(first, recorded[1], False)]
    found.append(step_error(second, recorded[2], False))
    assert max(found) < 1e-5
    # Planted: the float network is recorded again, and the first fit's network twice.
    assert step_error(first, recorded[0], False) > 1e-4 < step_error(first, recorded[2], False)


@pytest.mark.slow
def test_the_last_fit_is_one_on_the_last_recording(run, one_level):
    folder, _ = run
    found = network(one_level)
    load_checkpoint(found, folder / "quantized.safetensors")
    assert differing(found, calibrated_on(one_level, folder / RECORDINGS[2])) == []
    # Planted: the recording of the round before, and of the float network.
    for name in RECORDINGS[:2]:
        assert any("weight_int" in n for n in differing(found, calibrated_on(one_level, folder / name)))


@pytest.mark.slow
def test_a_killed_run_continues(run, options, call, tmp_path, monkeypatch):
    """Killed in the first fit, and again in the second refit."""
    from qdiff.calibration import journal
    from qdiff.calibration import run as loop
    from qdiff.cli import sample

    folder, fitted, recorded, left = run[0], [], [], 0
    record, fit, recording = journal.CalibrationJournal.record, loop.fit_unit, sample.record_planned

    def killed(self, *unit):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        record(self, *unit)

    def counted(unit, *rest):
        fitted.append(unit.name)
        return fit(unit, *rest)

    def listed(pipeline, plan, run, seed, qnn=None):
        recorded.append("float" if qnn is None else "quantized")
        return recording(pipeline, plan, run, seed, qnn)

    monkeypatch.setattr(journal.CalibrationJournal, "record", killed)
    monkeypatch.setattr(loop, "fit_unit", counted)
    monkeypatch.setattr(sample, "record_planned", listed)
    units = len(manifest(folder)["reconstruction_errors"])
    for left in (2, 2 * units + 1):  # noqa: B007, how many units are journaled before the kill
        assert call(SCRIPT, *options, "-l", tmp_path / "run").code == 130
    assert len(list((tmp_path / "run" / "calibration" / "refit2").glob("*.safetensors"))) == 3
    left = -1
    succeeded(call(SCRIPT, *options, "-l", tmp_path / "run"))
    assert recorded == ["float", "quantized", "quantized"], "nothing is recorded twice"
    assert len(fitted) == 3 * units + 2, "only the units in work at a kill are fitted again"
    for name in RECORDINGS[1:]:
        here, there = (load_recording(place / name) for place in (tmp_path / "run", folder))
        assert torch.equal(here["xs"], there["xs"])
    here, there = (load_file(place / "quantized.safetensors") for place in (tmp_path / "run", folder))
    assert here.keys() == there.keys() and all(torch.equal(here[n], there[n]) for n in here)
    assert image_bytes(tmp_path / "run") == image_bytes(folder) and not (tmp_path / "run" / "calibration").exists()


LINEAR = ("--method", "linear", "--refit", 1)
SCRIPTS = {
    "given data": (SCRIPT, None, ()),
    "modulated": (SCRIPT, None, ("--modulate", "--cali_st", 2)),
    "dynamic, modulated": (SCRIPT, None, ("--modulate", "--quant_mode", "dynamic")),
    "ranges per timestep": (SCRIPT, None, ("--act_ranges", "timestep")),
    "drawn": (SCRIPT, None, ("--method", "eda-dm", "--no-recon", "--calib_num_samples", 4, "--batch_samples", 4)),
    "unconditional": ("sample_diffusion_ldm", "unconditional", ("-c", STEPS, "-n", 1)),
    "class": ("sample_diffusion_ldm_imagenet", "class", ("--ddim_steps", STEPS, "--n_samples", 1, "--n_batch", 1)),
    "text": ("txt2img", "text", ("--plms", "--ddim_steps", STEPS, "--prompt", "two", "--n_samples", 1, "--n_iter", 1)),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", SCRIPTS)
def test_every_script_and_kind(kind, call, one_level, latent, run, tmp_path):
    script, model, more = SCRIPTS[kind]
    words = (*W4A6, "--w_range", "max", "--a_range", "max", *LINEAR, *more, "-l", tmp_path / "run")
    if model is None:
        words = (*one_level.options, *SAMPLER, *words)
    elif model == "unconditional":
        words = ("-r", latent(model).weights, *ON_DEVICE, "--seed", SEED, *words)
    else:
        words = (*latent(model).options, "--seed", SEED, *words)
    if kind == "given data":
        words = (*words, "--cali_data_path", run[0] / RECORDINGS[0])
    succeeded(call(script, *words))
    made, file = manifest(tmp_path / "run"), run[0] / RECORDINGS[0]
    assert made["config"]["ptq"]["refit"] == 1 and made["activation_quantizers"]["silent"] == []
    first = load_recording(file if kind == "given data" else tmp_path / "run" / RECORDINGS[0])
    own = load_recording(tmp_path / "run" / RECORDINGS[1])
    assert first.keys() == own.keys()
    for key in first.keys() - {"xs", "xs_prev"}:
        assert all(torch.equal(a, b) for a, b in zip(first[key], own[key], strict=True)), key
    assert any(not torch.equal(a, b) for a, b in zip(first["xs"], own["xs"], strict=True))


def test_samples_that_are_not_finite(call, one_level, tmp_path, monkeypatch):
    from qdiff.cli import sample

    recording = sample.record_planned

    def broken(pipeline, plan, run, seed, qnn=None):
        made = recording(pipeline, plan, run, seed, qnn)
        if qnn is not None:
            made["xs"][-1][0] = float("nan")
        return made

    monkeypatch.setattr(sample, "record_planned", broken)
    outcome = call(SCRIPT, *one_level.options, *SAMPLER, *W4A6, *LINEAR, "-l", tmp_path / "run")
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith("error: the samples of the quantized network are not finite")
    assert not (tmp_path / "run" / RECORDINGS[1]).exists()


def test_what_is_refused_before_any_work(call, one_level, run, tmp_path):
    words = (*one_level.options, *SAMPLER, *W4A6, "-l", tmp_path / "run", "--refit", 1)
    checkpoint = ("--cali_ckpt", run[0] / "quantized.safetensors")
    assert "--cali_ckpt names what is calibrated already" in call(SCRIPT, *words, *checkpoint).error_line()
    more = load_recording(run[0] / RECORDINGS[0])
    save_recording({key: torch.cat([values, values]) for key, values in more.items()}, tmp_path / "more.pt")
    given = (*words, "--cali_data_path", tmp_path / "more.pt", "--cali_st", 2 * STEPS)
    assert "--cali_st 1 to 4" in call(SCRIPT, *given).error_line()
    assert not (tmp_path / "run").exists()
    assert (
        "refit: 2 there, 1 here" in call(SCRIPT, *words, *LEARNED[-6:], "--bias_correction", "-l", run[0]).error_line()
    )


def test_what_it_would_do(call, one_level):
    shown = call(SCRIPT, *one_level.options, *SAMPLER, *W4A6, "--refit", 1, "--dry-run")
    assert json.loads(shown.out)["ptq"]["refit"] == 1
