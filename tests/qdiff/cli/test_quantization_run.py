"""Carrying out a plan on a tiny network: check first, calibrate once, continue, and measure what was lost."""

from __future__ import annotations

import copy
import logging
from argparse import Namespace

import pytest
import torch

from qdiff.calibration import run
from qdiff.calibration.journal import CalibrationJournal
from qdiff.calibration.samples import CalibrationSet, save_recording
from qdiff.checkpoint import save_checkpoint
from qdiff.cli import quantize
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.cli.quantize import CHECKPOINT, JOURNAL, RECORDING, Quantization
from qdiff.cli.run_folder import RunFolder
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.evaluation.noise_error import measure_noise_error
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod

SHAPE = (1, 8, 8)
QUICK = ("--cali_st", 2, "--cali_n", 3, "--cali_iters", 2, "--cali_iters_a", 2, "--cali_batch_size", 3)
W4A8 = ("--weight_bit", 4, "--quant_act", "--split")

# Relative: the error is summed in float64 over float32 outputs in batches, here once over the whole in float32.
ERROR_TOLERANCE = 1e-5


def plan(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    args: Namespace = parser.parse_args(["--ptq", *(str(w) for w in words)])
    return resolve_ptq(args, RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)


def recording(steps: int = 2, per_step: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    x = torch.randn(steps, per_step, *SHAPE, generator=torch.Generator().manual_seed(seed))
    return {"xs": x, "ts": torch.arange(steps)[:, None].expand(steps, per_step) * 300.0}


class Recorder:
    """Stands for the float model's sampler; counts how often it is asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []

    def __call__(self) -> dict[str, torch.Tensor]:
        self.asked.append((2, 3))
        return recording(2, 3)


def prepared(network, folder, *words) -> Quantization:
    made = plan(*words)
    return Quantization(copy.deepcopy(network), made, RunFolder(folder, made.to_dict(), 1), SHAPE)


def completed(quantization: Quantization, record=None, seed: int = 0) -> QuantModel:
    quantization.run.open()
    return quantization.complete(seed, record or Recorder(), show_progress=False)


def outputs(qnn: QuantModel) -> torch.Tensor:
    data = recording(1, 4, seed=9)
    with torch.no_grad(), qnn.quantized():
        return qnn(data["xs"][0], data["ts"][0])


@pytest.mark.parametrize("method", ["linear", "qdiff"])
def test_construction_writes_nothing_and_keeps_float(method, tiny_network, tmp_path):
    x, t = recording()["xs"][0], recording()["ts"][0]
    with torch.no_grad():
        wanted = tiny_network(x, t)
        quantization = prepared(tiny_network, tmp_path / "run", *W4A8, *QUICK, "--method", method)
        torch.testing.assert_close(quantization.qnn(x, t), wanted, rtol=0, atol=0)
    assert not quantization.is_calibrated
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["linear", "qdiff"])
def test_calibrates_once_and_comes_back_from_the_checkpoint(method, tiny_network, tmp_path):
    words, record = (*W4A8, *QUICK, "--method", method), Recorder()
    first = prepared(tiny_network, tmp_path / "run", *words)
    wanted = outputs(completed(first, record))
    assert record.asked == [(2, 3)]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert {CHECKPOINT, RECORDING, "run.json"} <= names and JOURNAL not in names

    again = prepared(tiny_network, tmp_path / "run", *words)
    assert again.is_calibrated
    torch.testing.assert_close(outputs(completed(again, record)), wanted, rtol=0, atol=0)
    assert record.asked == [(2, 3)]
    assert set(again.run.manifest.files) == {"calibrated checkpoint", "calibration data"}
    # Planted: the calibration of another seed's draws.
    other = completed(prepared(tiny_network, tmp_path / "other", *words), seed=1)
    assert torch.equal(outputs(other), wanted) == (method == "linear")  # which draws nothing


@pytest.mark.slow
def test_recording_of_an_interrupted_run_is_used_again(tiny_network, tmp_path):
    words, record = (*W4A8, *QUICK), Recorder()
    save_recording(recording(), tmp_path / "run" / RECORDING)
    made = completed(prepared(tiny_network, tmp_path / "run", *words), record)
    assert record.asked == []
    torch.testing.assert_close(
        outputs(made), outputs(completed(prepared(tiny_network, tmp_path / "new", *words))), rtol=0, atol=0
    )


ON_CPU, ON_CUDA, WITH_TF32 = {}, {"device": "cuda", "tf32": False}, {"device": "cuda", "tf32": True}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("began", "goes_on", "differing"),
    [
        (ON_CPU, ON_CPU, None),  # as before there was such an entry
        (ON_CUDA, ON_CUDA, None),
        (ON_CPU, ON_CUDA, "device, tf32"),
        (ON_CUDA, ON_CPU, "device, tf32"),
        (ON_CUDA, WITH_TF32, "tf32"),
    ],
)
def test_a_calibration_goes_on_where_it_began(began, goes_on, differing, tiny_network, tmp_path, monkeypatch):
    quantization = prepared(tiny_network, tmp_path / "run", *W4A8, *QUICK)
    settings = {"plan": quantization.plan.to_dict(), "seed": 0, "weights": None, **began}
    unfinished = CalibrationJournal(tmp_path / "run" / JOURNAL, settings)
    unfinished.record("weights", 0, torch.nn.Identity(), {})
    monkeypatch.setattr(quantize, "arithmetic_of", lambda device: goes_on)
    if differing is None:
        completed(quantization)
        assert quantization.finished.is_file()
    else:
        with pytest.raises(UserError, match=rf"unfinished calibration with other settings \({differing}\)"):
            completed(quantization)


@pytest.mark.slow
def test_too_little_memory_for_a_calibration_names_its_option(tiny_network, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")

    monkeypatch.setattr(run, "fit_unit", fails)
    with pytest.raises(
        UserError, match=r"out of GPU memory while calibrating .*with a --memory_budget in GiB to continue"
    ):
        completed(prepared(tiny_network, tmp_path / "run", *W4A8, *QUICK))
    with pytest.raises(UserError, match=r"with a --memory_budget of less than 0\.5 to continue"):
        completed(prepared(tiny_network, tmp_path / "run", *W4A8, *QUICK, "--memory_budget", 0.5))
    monkeypatch.undo()
    completed(prepared(tiny_network, tmp_path / "run", *W4A8, *QUICK, "--memory_budget", 0.25))  # goes on


@pytest.mark.slow
def test_given_data_is_read_and_hashed(tiny_network, tmp_path, caplog):
    file, record = tmp_path / "data.pt", Recorder()
    save_recording(recording(4, 5), file)
    quantization = prepared(tiny_network, tmp_path / "run", *W4A8, *QUICK, "--cali_data_path", file)
    with caplog.at_level(logging.INFO, logger="qdiff"):
        completed(quantization, record)
    assert record.asked == [] and not (tmp_path / "run" / RECORDING).exists()
    assert quantization.run.manifest.files["calibration data"]["path"] == str(file)
    assert "calibrating with qdiff on 6 samples" in caplog.text


def test_weights_only_leaves_activations_in_float(tiny_network, tmp_path):
    qnn = completed(prepared(tiny_network, tmp_path / "run", "--weight_bit", 4, *QUICK))
    assert qnn.act_quantizers() == {}
    assert qnn.layers()["conv_in"].weight_int.max() <= 15


@pytest.mark.slow
def test_resume_w_keeps_the_weights_and_calibrates_activations(tiny_network, tmp_path):
    base = completed(prepared(tiny_network, tmp_path / "w4", "--weight_bit", 4, "--split", *QUICK))
    loaded = ("--resume_w", "--cali_ckpt", tmp_path / "w4" / CHECKPOINT)
    made = prepared(tiny_network, tmp_path / "run", *W4A8, *QUICK, *loaded)
    qnn = completed(made)
    for name, layer in qnn.layers().items():
        assert torch.equal(layer.weight_int, base.layers()[name].weight_int), name
    assert qnn.act_quantizers() and all(q.initialised for q in qnn.act_quantizers().values())
    assert all(name.startswith("activations ") for name in made.run.manifest.reconstruction_errors)
    # Planted: rounding to nearest, which is what a calibration that ignored the file would start from.
    nearest = completed(prepared(tiny_network, tmp_path / "linear", *W4A8, *QUICK, "--method", "linear"))
    assert any(not torch.equal(nearest.layers()[n].weight_int, base.layers()[n].weight_int) for n in base.layers())


@pytest.mark.parametrize("action", ["load", "activations"])
def test_missing_checkpoint_is_found_at_construction(action, tiny_network, tmp_path):
    words = ("--cali_ckpt", tmp_path / "none", *(("--resume_w",) if action == "activations" else ()))
    with pytest.raises(UserError, match="does not exist"):
        prepared(tiny_network, tmp_path / "run", *W4A8, *words)
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_found_at_construction(tiny_network, tmp_path):
    file = tmp_path / "data.pt"
    save_recording(recording(1, 3), file)
    with pytest.raises(UserError, match="--cali_st 2 is more than"):
        prepared(tiny_network, tmp_path / "run", *W4A8, *QUICK, "--cali_data_path", file)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_load_reads_a_checkpoint_made_elsewhere(tiny_network, tmp_path):
    source = completed(prepared(tiny_network, tmp_path / "source", *W4A8, *QUICK))
    save_checkpoint(source, tmp_path / "published.pth", format="published")
    for file in (tmp_path / "source" / CHECKPOINT, tmp_path / "published.pth"):
        made = prepared(tiny_network, tmp_path / f"run-{file.name}", *W4A8, "--cali_ckpt", file)
        assert made.is_calibrated
        record = Recorder()
        torch.testing.assert_close(outputs(completed(made, record)), outputs(source), rtol=0, atol=0)
        assert record.asked == []
        assert made.run.manifest.files["quantized checkpoint"]["path"] == str(file)


@pytest.mark.slow
def test_memory_budget_changes_nothing_but_where_activations_are(tiny_network, tmp_path):
    free = outputs(completed(prepared(tiny_network, tmp_path / "free", *W4A8, *QUICK)))
    tight = outputs(completed(prepared(tiny_network, tmp_path / "tight", *W4A8, *QUICK, "--memory_budget", 0)))
    torch.testing.assert_close(tight, free, rtol=0, atol=0)


def test_noise_error_is_the_mean_square_over_all_samples(tiny_network):
    data = recording(3, 5, seed=4)
    qnn = QuantModel(copy.deepcopy(tiny_network), QuantConfig(weight_bits=3))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    x, t = data["xs"].flatten(0, 1), data["ts"].flatten(0, 1)
    found = measure_noise_error(qnn, CalibrationSet((x, t)), batch_size=4)
    with torch.no_grad():
        wanted = tiny_network(x, t)
        with qnn.quantized():
            error = (qnn(x, t) - wanted).square().mean()
    assert found["samples"] == 15
    assert found["mse"] == pytest.approx(float(error), rel=ERROR_TOLERANCE)
    assert found["float_mean_square"] == pytest.approx(float(wanted.square().mean()), rel=ERROR_TOLERANCE)
    # Planted: the last batch of 3 left out.
    partial = measure_noise_error(qnn, CalibrationSet((x[:12], t[:12])))
    assert partial["mse"] != pytest.approx(float(error), rel=ERROR_TOLERANCE)


def test_noise_error_of_float_is_zero(tiny_network):
    qnn = QuantModel(copy.deepcopy(tiny_network), QuantConfig(weight_bits=None))
    data = recording()
    held_out = CalibrationSet((data["xs"].flatten(0, 1), data["ts"].flatten(0, 1)))
    assert measure_noise_error(qnn, held_out)["mse"] == 0


def test_the_last_call_and_the_median_are_told_apart(tiny_network):
    data, last = recording(3, 4, seed=4), recording(1, 2, seed=5)
    qnn = QuantModel(copy.deepcopy(tiny_network), QuantConfig(weight_bits=3))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    sets = [CalibrationSet((part["xs"].flatten(0, 1), part["ts"].flatten(0, 1))) for part in (data, last)]
    alone = measure_noise_error(qnn, sets[0], batch_size=3)
    found = measure_noise_error(qnn, sets[0], batch_size=3, last_call=sets[1])
    with torch.no_grad(), qnn.quantized():
        steps, (at_last,) = (
            [float((qnn(*s) - tiny_network(*s)).square().mean()) for s in zip(part["xs"], part["ts"], strict=True)]
            for part in (data, last)
        )
    assert len({float(t) for t in data["ts"].flatten()}) == 3
    assert found["last_step"] == pytest.approx(at_last, rel=ERROR_TOLERANCE)
    assert found["last_timestep"] == float(last["ts"][0, 0])
    assert found["median_step"] == pytest.approx(sorted(steps)[1], rel=ERROR_TOLERANCE)
    assert {name: found[name] for name in alone} == alone, "the last call is in no mean"
    # Planted: the mean in place of the median, and another step's error as the last one's.
    assert found["median_step"] != pytest.approx(found["mse"], rel=ERROR_TOLERANCE)
    assert found["last_step"] != pytest.approx(steps[-1], rel=ERROR_TOLERANCE)
