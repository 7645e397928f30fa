"""Sampling with ``--runtime`` where activations are quantized and networks take a context; by two processes too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from ddim_runs import DATA
from exact_runtimes import require_runtimes
from latent_models import W4A8
from modulated_runs import psnr
from run_checks import image_bytes, manifest, succeeded

pytestmark = pytest.mark.slow

require_runtimes()

IMAGES = 3
# dB against the simulated images: values that fall to the other side of a rounding edge show in the last grey levels.
# 45 dB and more was seen; the float network, from which 4-bit weights are as far as from any other mistake, has 34.
SAME_IMAGES = 40.0
LINEAR = ("--quant_mode", "linear")
# A batch of one: however many processes share the images, the sums are the same.
CLASS = ("--n_samples", IMAGES, "--n_batch", 1, "--ddim_steps", 4, "--seed", 7)
TEXT = ("--prompt", "seven", "--n_samples", IMAGES, "--n_iter", 1, "--ddim_steps", 4, "--seed", 7)
CLASS_SCRIPT, TEXT_SCRIPT = "sample_diffusion_ldm_imagenet", "txt2img"


@pytest.fixture(scope="module")
def class_run(call, small_latent, tmp_path_factory):
    """Options with a calibrated checkpoint, and the simulated run that calibrated it."""
    folder = tmp_path_factory.mktemp("class") / "simulated"
    options = (*small_latent("class").options, *CLASS, *W4A8, "--split", *LINEAR)
    succeeded(call(CLASS_SCRIPT, *options, *DATA, "-l", folder))
    return (*options, "--cali_ckpt", folder / "quantized.safetensors"), folder


@pytest.fixture(scope="module")
def alone(call, class_run, tmp_path_factory):
    """The run folder of one process that exports and runs ONNX Runtime."""
    folder = tmp_path_factory.mktemp("alone")
    outcome = succeeded(call(CLASS_SCRIPT, *class_run[0], "--runtime", "onnxruntime", "-l", folder))
    assert outcome.err.count("exporting to") == 1 and manifest(folder)["processes"] == 1
    return folder


@pytest.fixture(scope="module")
def together(class_run, tmp_path_factory):
    """The run folder and stderr of two processes that run ONNX Runtime."""
    folder = tmp_path_factory.mktemp("together")
    script = Path(__file__).parents[2] / "scripts" / f"{CLASS_SCRIPT}.py"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    words = [str(o) for o in (*class_run[0], "--runtime", "onnxruntime", "-l", folder / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(launcher + words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stderr


@pytest.mark.thorough  # test_processes: the first of two calibrates
def test_the_first_of_two_processes_exports_and_both_run(together):
    folder, errors = together
    assert errors.count("exporting to") == 1 and (folder / "run.log").read_text().count("exporting to") == 1
    assert (folder / "model.onnx").is_file() and not list(folder.glob(".*"))
    run = manifest(folder)
    assert run["processes"] == 2 and run["status"] == "finished" and len(run["peak_memory_bytes"]) == 2


@pytest.mark.thorough
def test_two_processes_make_the_images_of_one(alone, together):
    assert image_bytes(together[0]) == image_bytes(alone) and len(set(image_bytes(alone).values())) == IMAGES


def test_an_exported_file_is_not_exported_again(call, class_run, alone, tmp_path):
    words = ("--runtime", "onnxruntime", "--onnx", alone / "model.onnx")
    outcome = succeeded(call(CLASS_SCRIPT, *class_run[0], *words, "-l", tmp_path))
    assert "exporting" not in outcome.err and image_bytes(tmp_path) == image_bytes(alone)


def test_the_float_network_would_be_seen(call, small_latent, class_run, tmp_path):
    succeeded(call(CLASS_SCRIPT, *small_latent("class").options, *CLASS, "-l", tmp_path))
    assert psnr(tmp_path, class_run[1]) < SAME_IMAGES


@pytest.mark.parametrize("runtime", ["torch-int8", "openvino"])
def test_classes(runtime, call, class_run, alone, tmp_path):
    options, simulated = class_run
    given = ("--onnx", alone / "model.onnx") if runtime == "openvino" else ()
    succeeded(call(CLASS_SCRIPT, *options, "--runtime", runtime, *given, "-l", tmp_path))
    assert manifest(tmp_path)["config"]["runtime"] == runtime
    assert psnr(tmp_path, simulated) > SAME_IMAGES and psnr(alone, simulated) > SAME_IMAGES


@pytest.mark.thorough  # test_onnx_leaves: of one attention
def test_text_with_a_softmax_of_16_bits(call, small_latent, tmp_path):
    options = (*small_latent("text").options, *TEXT)
    quant = (*W4A8, "--sm_abit", 16, *LINEAR)
    succeeded(call(TEXT_SCRIPT, *options, *quant, *DATA, "--outdir", tmp_path / "simulated"))
    loaded = (*options, *quant, "--cali_ckpt", tmp_path / "simulated" / "quantized.safetensors")
    for runtime in ("onnxruntime", "openvino", "torch-int8"):
        given = ("--onnx", tmp_path / "onnxruntime" / "model.onnx") if runtime == "openvino" else ()
        succeeded(call(TEXT_SCRIPT, *loaded, "--runtime", runtime, *given, "--outdir", tmp_path / runtime))
        assert manifest(tmp_path / runtime)["config"]["runtime"] == runtime
        assert psnr(tmp_path / runtime, tmp_path / "simulated") > SAME_IMAGES, runtime
    succeeded(call(TEXT_SCRIPT, *options, "--outdir", tmp_path / "float"))
    assert psnr(tmp_path / "float", tmp_path / "simulated") < SAME_IMAGES
