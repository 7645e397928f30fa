"""Carrying out plans that modulate on a tiny network: ranges of changes in files, and the error along a trajectory."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from thorough import thorough_except

from qdiff.calibration.samples import save_recording
from qdiff.checkpoint import save_checkpoint
from qdiff.cli.options.parser import Parser
from qdiff.cli.options.ptq import add_ptq_options, resolve_ptq
from qdiff.cli.quantize import CHECKPOINT, JOURNAL, Quantization
from qdiff.cli.run_folder import RunFolder
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.evaluation.noise_error import measure_trajectory_error
from qdiff.io.tensor_files import read_safetensors
from qdiff.quant_model import QuantModel
from qdiff.ranges.estimators import RangeMethod

SHAPE = (1, 8, 8)
QUICK = ("--cali_st", 2, "--cali_n", 3, "--cali_iters", 2, "--cali_iters_a", 2, "--cali_batch_size", 3)
W4A4 = ("--weight_bit", 4, "--quant_act", "--act_bit", 4, "--split")
DYNAMIC = ("--quant_mode", "dynamic")
# Relative: sums in float64 over float32 outputs, here in another order.
ERROR_TOLERANCE = 1e-5


def plan(*words):
    parser = Parser(None)
    add_ptq_options(parser)
    args = parser.parse_args(["--ptq", *(str(w) for w in words)])
    return resolve_ptq(args, RangeMethod.MIN_MAX, RangeMethod.MIN_MAX)


def recording(residual=True, steps=2, per_step=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(steps, per_step, *SHAPE, generator=generator)
    made = {"xs": x, "ts": torch.arange(steps, 0, -1)[:, None].expand(steps, per_step) * 300.0}
    if residual:
        made["xs_prev"] = x + 0.2 * torch.randn(x.shape, generator=generator)
        made["ts_prev"] = made["ts"] + 50
    return made


def prepared(network, folder, *words) -> Quantization:
    made = plan(*words)
    return Quantization(copy.deepcopy(network), made, RunFolder(folder, made.to_dict(), 1), SHAPE)


def completed(quantization: Quantization, seed=0, record=recording) -> QuantModel:
    quantization.run.open()
    return quantization.complete(seed, record, show_progress=False)


def trajectory(count=4, n=5, seed=9):
    """Inputs of a sampling run: each a little further."""
    generator = torch.Generator().manual_seed(seed)
    x, calls = torch.randn(n, *SHAPE, generator=generator), []
    for call in range(count):
        calls.append((x, torch.full((n,), 900.0 - 200 * call)))
        x = 0.9 * x + 0.2 * torch.randn(x.shape, generator=generator)
    return calls


@torch.no_grad()
def outputs(qnn):
    with qnn.quantized(), qnn.trajectory():
        return torch.stack([qnn(*call) for call in trajectory()])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tmp_path_factory.mktemp("finished"), {}


@pytest.fixture
def made(tiny_network, finished):
    """``made(*words)``: the network and the checkpoint of a completed run, calibrated once for all tests."""
    folder, known = finished

    def run(*words):
        if words not in known:
            place = folder / str(len(known))
            known[words] = completed(prepared(tiny_network, place, *W4A4, *QUICK, *words)), place / CHECKPOINT
        return known[words]

    return run


# --- Calibrate, save, reload


CALIBRATED = [("--modulate",), ("--modulate", "--cali_min_max"), ("--method", "linear", "--modulate")]


@pytest.mark.slow
@pytest.mark.parametrize("more", thorough_except(CALIBRATED, CALIBRATED[0]))
def test_changes_are_calibrated_once_and_come_back_from_the_file(more, made, tiny_network, tmp_path):
    qnn, file = made(*more)
    assert all(q.initialised for q in qnn.act_quantizers().values())
    assert not (file.parent / JOURNAL).exists()
    wanted = outputs(qnn)
    again = prepared(tiny_network, file.parent, *W4A4, *QUICK, *more)
    loaded = prepared(tiny_network, tmp_path / "loaded", *W4A4, *more, "--cali_ckpt", file)
    assert again.is_calibrated and loaded.is_calibrated
    assert torch.equal(outputs(completed(again)), wanted) and torch.equal(outputs(completed(loaded)), wanted)
    ranges = {n: float(q.delta) for n, q in qnn.calibrated_act_quantizers().items()}
    assert ranges == {n: float(q.delta) for n, q in loaded.qnn.calibrated_act_quantizers().items()}
    tensors = read_safetensors(file)
    assert len(tensors["act_delta"]) == len(ranges) > len(qnn.layers())  # two where split, none of attention
    assert not torch.equal(tensors["act_delta"], torch.ones(len(ranges)))


@pytest.mark.slow
def test_the_file_s_method_and_the_weights(made):
    from qdiff.checkpoint.metadata import read_metadata

    (learned, file), (extremes, _) = made("--modulate"), made("--modulate", "--cali_min_max")
    notes, config = (json.loads(read_metadata(file)[key]) for key in ("notes", "config"))
    assert notes["method"] == "modiff" and config["modulate"] is True
    for name, layer in learned.layers().items():  # weights come first, and from the same draws
        assert torch.equal(layer.weight_int, extremes.layers()[name].weight_int)
    assert not torch.equal(outputs(learned), outputs(extremes))


@pytest.mark.slow
def test_resume_w_takes_the_weights_of_any_file(made, tiny_network, tmp_path):
    """Of a weights-only run, of one with ranges of activations, of a dynamic one, and a published file."""
    whole, _ = made("--modulate", "--cali_min_max")
    sources = {"acts": made()[1], "dynamic": made(*DYNAMIC)[1]}
    save_checkpoint(made()[0], tmp_path / "published.pth", format="published")
    sources["published"] = tmp_path / "published.pth"
    weights = completed(prepared(tiny_network, tmp_path / "w4", "--weight_bit", 4, "--split", *QUICK))
    sources["weights"] = tmp_path / "w4" / CHECKPOINT
    assert weights.act_quantizers() == {}
    for name, source in sources.items():
        qnn, _ = made("--modulate", "--cali_min_max", "--resume_w", "--cali_ckpt", str(source))
        assert torch.equal(outputs(qnn), outputs(whole)), name


@pytest.mark.slow
def test_dynamic_ranges_are_in_no_file(made, tiny_network, tmp_path):
    wanted, file = made("--modulate", *DYNAMIC)
    assert "act_delta" not in read_safetensors(file)
    for resume in ("--resume", "--resume_w"):
        loaded = prepared(tiny_network, tmp_path / resume, *W4A4, "--modulate", *DYNAMIC, resume, "--cali_ckpt", file)
        assert loaded.is_calibrated and torch.equal(outputs(completed(loaded)), outputs(wanted))
    # Any file's weights do: those with ranges of activations, of changes, or none.
    for name, words in {"acts": (), "changes": ("--modulate",)}.items():
        _, source = made(*words)
        options = (*W4A4, "--modulate", *DYNAMIC, "--cali_ckpt", source)
        assert torch.equal(
            outputs(completed(prepared(tiny_network, tmp_path / f"of-{name}", *options))), outputs(wanted)
        )


@pytest.mark.thorough
def test_weights_of_eda_dm_modulate_too(tiny_network, tmp_path):
    """Its last layer stays in float."""
    quick = ("--w_range", "max", "--calib_num_samples", 6, "--batch_samples", 3, "--cali_iters", 2)
    options = (*W4A4, "--method", "eda-dm", *quick, "--modulate")
    base = completed(prepared(tiny_network, tmp_path / "base", *options, *DYNAMIC), record=lambda: recording(False))
    resumed = (*options[:-1], "--modulate", "--resume_w", "--cali_ckpt", tmp_path / "base" / CHECKPOINT)
    resumed = [w for w in resumed if w not in ("--calib_num_samples", "--batch_samples")]
    static = completed(prepared(tiny_network, tmp_path / "run", *W4A4, "--method", "eda-dm", *QUICK, *resumed[-4:]))
    for name, layer in static.layers().items():
        assert torch.equal(layer.weight_int, base.layers()[name].weight_int)
    assert not static.layers()["conv_out"].modulates and len(static.layers()["conv_out"].act_quantizers) == 0
    assert all(layer.modulates for name, layer in static.layers().items() if name != "conv_out")
    assert torch.isfinite(outputs(static)).all() and not torch.equal(outputs(static), outputs(base))


# --- Files that do not fit


def refused(network, folder, *words):
    with pytest.raises(UserError) as caught:
        prepared(network, folder, *W4A4, *QUICK, *words)
    assert "\n" not in str(caught.value) and not folder.exists()
    return str(caught.value)


@pytest.mark.slow
def test_ranges_of_activations_are_none_of_changes(made, tiny_network, tmp_path):
    _, acts = made()
    _, changes = made("--modulate")
    _, dynamic = made(*DYNAMIC)
    new = tmp_path / "new"
    assert "leave out --modulate" in refused(tiny_network, new, "--modulate", "--cali_ckpt", acts)
    assert "add --modulate" in refused(tiny_network, new, "--cali_ckpt", changes)
    assert "add --quant_mode dynamic" in refused(tiny_network, new, "--cali_ckpt", dynamic)
    _, both = made("--modulate", *DYNAMIC)
    assert "add --quant_mode dynamic" in refused(tiny_network, new, "--modulate", "--cali_ckpt", both)


def test_published_files_hold_no_changes(made, tiny_network, tmp_path):
    qnn, _ = made()
    save_checkpoint(qnn, tmp_path / "w.pth", format="published")
    for resume in ((), ("--resume",)):
        line = refused(tiny_network, tmp_path / "new", "--modulate", *resume, "--cali_ckpt", tmp_path / "w.pth")
        assert "--resume_w" in line and "--quant_mode dynamic" in line and str(tmp_path / "w.pth") in line
    options = ("--modulate", *DYNAMIC, "--resume", "--cali_ckpt", tmp_path / "w.pth")
    loaded = prepared(tiny_network, tmp_path / "run", *W4A4, *options)
    assert torch.isfinite(outputs(completed(loaded))).all()


def test_data_without_the_steps_before(tiny_network, tmp_path):
    save_recording(recording(residual=False), tmp_path / "raw.pt")
    save_recording(recording(), tmp_path / "residual.pt")
    line = refused(tiny_network, tmp_path / "new", "--modulate", "--cali_data_path", tmp_path / "raw.pt")
    assert "--generate residual" in line and str(tmp_path / "raw.pt") in line
    # The other way round it does: the steps before are not looked at.
    a, b = (
        prepared(tiny_network, tmp_path / name, *W4A4, *QUICK, "--cali_data_path", tmp_path / f"{name}.pt")
        for name in ("raw", "residual")
    )
    assert all(torch.equal(i, j) for i, j in zip(a.data.inputs, b.data.inputs, strict=True)) and b.pairs is None


# --- The error along a trajectory


def rounded(network, **config):
    qnn = QuantModel(copy.deepcopy(network), QuantConfig(weight_bits=4, act_bits=3, act_dynamic=True, **config))
    for layer in qnn.layers().values():
        layer.init_weight_ranges(qnn.config.weight_range)
    return qnn


@pytest.mark.slow
@pytest.mark.parametrize("modulate", [True, False])
@torch.no_grad()
def test_error_by_hand(modulate, tiny_network):
    calls, qnn = trajectory(count=5, n=3), rounded(tiny_network, modulate=modulate)
    found = measure_trajectory_error(qnn, calls, compared=[0, 2, 4])
    wanted = [tiny_network(*call) for call in calls]
    with qnn.quantized(), qnn.trajectory():
        errors = [float((qnn(*call) - w).square().mean()) for call, w in zip(calls, wanted, strict=True)]
    assert found["by_call"] == pytest.approx(errors, rel=ERROR_TOLERANCE)
    assert found["mse"] == pytest.approx((errors[0] + errors[2] + errors[4]) / 3, rel=ERROR_TOLERANCE)
    squares = [float(w.square().mean()) for w in wanted]
    assert found["float_mean_square"] == pytest.approx((squares[0] + squares[2] + squares[4]) / 3, rel=ERROR_TOLERANCE)
    assert found["samples"] == 9
    assert found["median_step"] == pytest.approx(sorted(errors[::2])[1], rel=ERROR_TOLERANCE)
    assert found["last_step"] == found["by_call"][-1] and found["last_timestep"] == float(calls[-1][1][0])
    # Planted: all calls, and every call as a first one.
    assert found["mse"] != pytest.approx(sum(errors) / 5, rel=ERROR_TOLERANCE)
    if modulate:
        first = rounded(tiny_network, modulate=True, ablation="cleared-state")
        assert measure_trajectory_error(first, calls, [0])["by_call"][1:] != pytest.approx(errors[1:], rel=0.01)


@torch.no_grad()
def test_releasing_the_float_weights_changes_nothing(tiny_network):
    calls = trajectory(count=3, n=2)
    kept, released = (rounded(tiny_network, modulate=True) for _ in range(2))
    assert measure_trajectory_error(kept, calls, [1]) == measure_trajectory_error(released, calls, [1], release=True)
    with pytest.raises(RuntimeError, match="released"):
        released(*calls[0])
    assert torch.isfinite(kept(*calls[0])).all()
