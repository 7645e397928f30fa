"""Sampling with ``--runtime``: the three families in both runtimes, continuing, and options that do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
from ddim_runs import SAMPLER, SCRIPT
from exact_runtimes import require_runtimes
from latent_models import FEW
from run_checks import image_bytes, largest_difference, lose_images, manifest, snapshot, succeeded

require_runtimes()

RUNTIMES = ("onnxruntime", "openvino")
# Weights alone: no activation lies on a rounding edge, so the images are those of the simulation.
GREY_LEVELS = 1
W4 = ("--ptq", "--weight_bit", 4, "--quant_mode", "linear", *FEW)
DYNAMIC = ("--quant_act", "--quant_mode", "dynamic")
IMAGES = 3
FAMILIES = {
    "class": ("sample_diffusion_ldm_imagenet", ("--n_samples", IMAGES, "--n_batch", 2, "--ddim_steps", 4, "--seed", 7)),
    "text": ("txt2img", ("--prompt", "seven", "--n_samples", IMAGES, "--n_iter", 1, "--ddim_steps", 4, "--seed", 7)),
}


@pytest.fixture(scope="module")
def ddim_runs(call, one_level, small_weights_run, tmp_path_factory):
    """Options of a run from the checkpoint of `small_weights_run`, and a finished run by ONNX Runtime."""
    checkpoint = small_weights_run / "quantized.safetensors"
    options = (*one_level.options, *SAMPLER, "--ptq", "--weight_bit", 4, "--split", "--cali_ckpt", checkpoint)
    folder = tmp_path_factory.mktemp("runtimes") / "onnxruntime"
    outcome = succeeded(call(SCRIPT, *options, "--runtime", "onnxruntime", "-l", folder))
    assert "exporting to" in outcome.err
    return options, folder


@pytest.mark.slow
def test_ddim_in_both_runtimes(call, ddim_runs, small_weights_run, tmp_path):
    options, folder = ddim_runs
    run = manifest(folder)
    assert run["config"]["runtime"] == "onnxruntime" and run["status"] == "finished"
    assert "activation_quantizers" not in run  # nothing was simulated
    assert largest_difference(folder, small_weights_run) <= GREY_LEVELS
    words = ("--runtime", "openvino", "--onnx", folder / "model.onnx")
    outcome = succeeded(call(SCRIPT, *options, *words, "-l", tmp_path / "openvino"))
    assert "exporting" not in outcome.err and not (tmp_path / "openvino" / "model.onnx").exists()
    assert manifest(tmp_path / "openvino")["config"]["runtime"] == "openvino"
    assert largest_difference(tmp_path / "openvino", small_weights_run) <= GREY_LEVELS


@pytest.mark.slow
def test_the_file_that_is_named_is_what_runs(call, ddim_runs, small_weights_run, tmp_path):
    """Planted: the last layer's scales twice as large, in the file alone."""
    import onnx

    options, folder = ddim_runs
    model = onnx.load(str(folder / "model.onnx"))
    scale = next(n.input[1] for n in reversed(model.graph.node) if n.op_type == "DequantizeLinear")
    tensor = next(t for t in model.graph.initializer if t.name == scale)
    tensor.CopyFrom(onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), scale))
    onnx.save(model, str(tmp_path / "planted.onnx"))
    for runtime in RUNTIMES:
        words = ("--runtime", runtime, "--onnx", tmp_path / "planted.onnx")
        succeeded(call(SCRIPT, *options, *words, "-l", tmp_path / runtime))
        assert largest_difference(tmp_path / runtime, small_weights_run) > GREY_LEVELS


def test_a_repeated_command_continues(call, ddim_runs, tmp_path):
    options, finished = ddim_runs
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    images, exported = image_bytes(folder), snapshot(folder)["model.onnx"]
    lose_images(folder, 1, 4)
    outcome = succeeded(call(SCRIPT, *options, "--runtime", "onnxruntime", "-l", folder))
    assert "exporting" not in outcome.err and snapshot(folder)["model.onnx"] == exported
    assert image_bytes(folder).keys() == images.keys() and largest_difference(folder, finished) <= GREY_LEVELS
    line = call(SCRIPT, *options, "--runtime", "openvino", "-l", folder).error_line()
    assert "runtime: onnxruntime there, openvino here" in line
    assert "runtime" in call(SCRIPT, *options, "-l", folder).error_line()  # simulated


@pytest.mark.thorough  # test_quantized_runtimes: with activations
@pytest.mark.parametrize("kind", FAMILIES)
def test_latent_families_in_both_runtimes(kind, call, small_latent, tmp_path):
    script, sampler = FAMILIES[kind]
    option = "--outdir" if kind == "text" else "-l"
    options = (*small_latent(kind).options, *sampler)
    succeeded(call(script, *options, *W4, option, tmp_path / "simulated"))
    loaded = (*options, "--ptq", "--weight_bit", 4, "--quant_mode", "linear")
    loaded += ("--cali_ckpt", tmp_path / "simulated" / "quantized.safetensors")
    for runtime in RUNTIMES:
        given = () if runtime == RUNTIMES[0] else ("--onnx", tmp_path / RUNTIMES[0] / "model.onnx")
        succeeded(call(script, *loaded, "--runtime", runtime, *given, option, tmp_path / runtime))
        assert manifest(tmp_path / runtime)["config"]["runtime"] == runtime
        assert largest_difference(tmp_path / runtime, tmp_path / "simulated") <= GREY_LEVELS
    assert len(set(image_bytes(tmp_path / "simulated").values())) == IMAGES


# --- Options and files that do not fit: one sentence, and nothing left behind


def test_options_that_contradict_each_other(call, ddim_runs, tmp_path):
    options, folder = ddim_runs
    words = (*options, "-l", tmp_path / "run")
    line = call(SCRIPT, *words, "--onnx", folder / "model.onnx").error_line()
    assert "--onnx needs --runtime onnxruntime or openvino" in line
    line = call(SCRIPT, *words, "--onnx", tmp_path / "none.onnx", "--runtime", "openvino").error_line()
    assert "none.onnx does not exist; write it with scripts/export.py" in line
    assert "--runtime" in call(SCRIPT, *words, "--runtime", "tensorrt").error_line()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("runtime", "words", "sentence"),
    [
        ("torch-int8", (), "have no width; add --quant_act"),
        (
            "torch-int8",
            (*DYNAMIC, "--act_scale_per", "channel"),
            "_scale_per tensor or sample",
        ),
        ("openvino", (*DYNAMIC, "--act_scale_per", "channel"), "_scale_per tensor or sample"),
        ("onnxruntime", (*DYNAMIC, "--modulate", "--modulate_ablation", "cleared-state"), "cannot be written as ONNX"),
    ],
)
def test_what_a_runtime_cannot_run_is_said_before_anything_else(runtime, words, sentence, call, ddim_runs, tmp_path):
    options, _ = ddim_runs
    line = call(SCRIPT, *options, *words, "--runtime", runtime, "-l", tmp_path / "run").error_line()
    assert sentence in line
    assert not (tmp_path / "run").exists()


def test_dry_run_shows_the_runtime(call, ddim_runs):
    options, _ = ddim_runs
    shown = json.loads(succeeded(call(SCRIPT, *options, "--runtime", "openvino", "--dry-run")).out)
    assert shown["runtime"] == "openvino"
    assert "runtime" not in json.loads(succeeded(call(SCRIPT, *options, "--dry-run")).out)  # as before there were any


def test_files_of_other_networks_are_refused_before_anything_else(call, one_level, ddim_runs, tmp_path):
    options, folder = ddim_runs
    run = ("--runtime", "openvino", "-l", tmp_path / "run")
    line = call(SCRIPT, *one_level.options, *SAMPLER, *run, "--onnx", folder / "model.onnx").error_line()
    assert "was exported with weight_bits 4, this run asks for None; export it again" in line
    (tmp_path / "damaged.onnx").write_bytes((folder / "model.onnx").read_bytes()[:5000])
    line = call(SCRIPT, *options, *run, "--onnx", tmp_path / "damaged.onnx").error_line()
    assert line.startswith("error: ") and ("is damaged" in line or "is not an ONNX model written by" in line)
    assert not (tmp_path / "run").exists()
