"""Every path of the sampling scripts runs once on the virtual GPU: same images as on the CPU, and no step waits."""

from __future__ import annotations

import pytest
import torch
from cuda_checks import assert_sampling_never_waits
from ddim_runs import SCRIPT, W4A8
from golden_cases import GoldenCase
from latent_models import write_latent_model
from modulated_runs import psnr
from run_checks import image_bytes, largest_difference, lose_images, manifest, succeeded
from script_device import ON_DEVICE
from thorough import thorough_except

from qdiff.cli import held_out

ON_CUDA = ("--device", "cuda")
TWO_IMAGES = ("--timesteps", 4, "--max_images", 2, "--seed", 7)
# The virtual device computes on the CPU, but attention by another composition.
GREY_LEVELS = 1
# dB: in half precision, and where a value falls to the other side of a rounding edge. The tiny models gave 31 dB and
# more; images of another seed have less than 15.
SAME_IMAGES = 25.0

FLOAT_RUNS = {
    "ddim": (SCRIPT, ()),
    "ddim with noise": (SCRIPT, ("--eta", 1)),
    "ddim quadratic": (SCRIPT, ("--skip_type", "quad")),
    "ddpm": (SCRIPT, ("--sample_type", "ddpm_noisy")),
    "dpm multistep": (SCRIPT, ("--sample_type", "dpm_solver", "--dpm_order", 3)),
    "dpm singlestep": (SCRIPT, ("--sample_type", "dpm_solver", "--dpm_method", "singlestep")),
    "unconditional": ("sample_diffusion_ldm", ("-c", 4, "-e", 1.0)),
    "unconditional dpm": ("sample_diffusion_ldm", ("-c", 4, "--dpm")),
    "ancestral": ("sample_diffusion_ldm", ("--vanilla_sample",)),
    "bedroom": ("sample_diffusion_ldm_bedroom", ("-c", 4, "-e", 1.0)),
    "class": ("sample_diffusion_ldm_imagenet", ("--ddim_steps", 4, "--ddim_eta", 1.0)),
    "text": ("txt2img", ("--ddim_steps", 4)),
    "text plms": ("txt2img", ("--ddim_steps", 4, "--plms")),
    "text dpm": ("txt2img", ("--ddim_steps", 4, "--dpm", "--fixed_code")),
    "captions": ("sample_txt2img", ("--ddim_steps", 4, "--plms")),
}
DATA = ("--cali_st", 2, "--cali_n", 2)
LINEAR = ("--quant_mode", "linear", *DATA)
TDAC = ("--calib_num_samples", 4, "--batch_samples", 4, "--no-recon", "--w_range", "max", "--a_range", "max")
MODULATED = ("--quant_mode", "dynamic", "--modulate", "--method", "linear", *DATA)
# Roundings and step sizes are learned in `backward_on_cuda`.
QUANTIZED_RUNS = {
    "weights": ("--ptq", "--weight_bit", 4, "--split", *LINEAR),
    "w4a8": (*W4A8, *LINEAR),
    "16-bit softmax": (*W4A8, "--a_sym", "--sm_abit", 16, *LINEAR),
    "dynamic": (*W4A8, "--quant_mode", "dynamic", "--method", "linear", *DATA),
    "eda-dm": (*W4A8, "--method", "eda-dm", *TDAC),
    "ptq4dm": (*W4A8, "--method", "ptq4dm", *TDAC),
    "modulated": (*W4A8, *MODULATED),
    "modulated by channel": (*W4A8, *MODULATED, "--act_scale_per", "channel"),
    "modulated, calibrated": (*W4A8, "--modulate", *LINEAR),
    "corrected": (*W4A8, *LINEAR, "--eta", 1, "--noise_correction", "d2", "--correction_samples", 2),
}


@pytest.fixture(autouse=True)
def one_held_out(monkeypatch):
    monkeypatch.setattr(held_out, "IMAGES", 1)


@pytest.fixture
def run_on_cuda(call, cuda):
    """``run_on_cuda(script, *words)``: a run on the device whose sampling never waited, and where it says it was."""

    def run(script, *words):
        with cuda.counting() as counts:
            outcome = succeeded(call(script, *words, *ON_CUDA))
        assert_sampling_never_waits(counts)
        if "-l" in words:
            made = manifest(words[words.index("-l") + 1])
            assert made["device"] == "cuda" and made["status"] == "finished"
            assert made["peak_memory_bytes"][0]["device"] > 0
        return outcome

    return run


@pytest.fixture(scope="session")
def of_script(one_level, latent, small_latent):
    """``of_script(name)``: the options of a script's runs, two images in one batch."""

    def options(script):
        if script == SCRIPT:
            return *one_level.options, *TWO_IMAGES
        if script.startswith("sample_diffusion_ldm") and "imagenet" not in script:
            return "-r", latent("unconditional").weights, "-n", 2, "--seed", 7, *ON_DEVICE
        if "imagenet" in script:
            return *small_latent("class").options, "--n_samples", 2, "--seed", 7, "--ddim_steps", 4
        once = ("--n_iter", 1) if script == "txt2img" else ()
        return *small_latent("text").options, "--prompt", "two", "--n_samples", 2, *once, "--seed", 7, "--ddim_steps", 4

    return options


@pytest.mark.parametrize("name", thorough_except(FLOAT_RUNS, "ddim with noise", "dpm multistep", "text plms"))
def test_float(name, run_on_cuda, of_script, tmp_path):
    script, sampler = FLOAT_RUNS[name]
    full = ("--precision", "full") if name.startswith(("class", "text", "captions")) else ()
    run_on_cuda(script, *of_script(script), *sampler, *full, "-l", tmp_path)
    assert len(image_bytes(tmp_path)) == 2


@pytest.mark.slow
@pytest.mark.parametrize("script", thorough_except((SCRIPT, "txt2img"), SCRIPT))
def test_the_images_are_those_of_the_cpu(script, call, cuda, of_script, tmp_path):
    words = (*of_script(script), *(("--eta", 1) if script == SCRIPT else ("--ddim_eta", 1, "--precision", "full")))
    for name, device in (("cpu", ON_DEVICE), ("cuda", ON_CUDA)):
        succeeded(call(script, *words, *device, "-l", tmp_path / name))
    assert largest_difference(tmp_path / "cpu", tmp_path / "cuda") <= GREY_LEVELS
    succeeded(call(script, *words, "--seed", 8, *ON_CUDA, "-l", tmp_path / "other"))  # planted: other noise
    assert largest_difference(tmp_path / "cpu", tmp_path / "other") > GREY_LEVELS


def test_pictures_of_every_step(run_on_cuda, of_script, tmp_path):
    run_on_cuda(SCRIPT, *of_script(SCRIPT), "--sequence", "-l", tmp_path)
    assert len(list((tmp_path / "sequence").glob("*.png"))) == 8 * 4


# --- Quantized


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_except(QUANTIZED_RUNS, "w4a8", "modulated"))
def test_quantized(name, run_on_cuda, one_level, tmp_path):
    """Recorded, calibrated, measured and sampled; the same command from the file that it wrote, and packed."""
    words = (*one_level.options, *TWO_IMAGES, *QUANTIZED_RUNS[name], "-l", tmp_path)
    run_on_cuda(SCRIPT, *words)
    assert manifest(tmp_path)["activation_quantizers"]["silent"] == []
    wanted = image_bytes(tmp_path)
    lose_images(tmp_path, 0, 1)  # both: in a batch of another size sums round differently
    outcome = run_on_cuda(SCRIPT, *words)
    assert image_bytes(tmp_path) == wanted and "calibrating" not in outcome.err


@pytest.mark.thorough
@pytest.mark.parametrize("script", ["sample_diffusion_ldm", "sample_diffusion_ldm_imagenet"])
def test_quantized_latent_models(script, run_on_cuda, of_script, tmp_path):
    steps = ("-c", 4, "-e", 1.0) if script == "sample_diffusion_ldm" else ("--precision", "full", "--scale", 2.0)
    run_on_cuda(script, *of_script(script), *steps, *W4A8, *LINEAR, "-l", tmp_path)
    assert manifest(tmp_path)["activation_quantizers"]["silent"] == []


@pytest.fixture(scope="module")
def checkpoint(call, of_script, tmp_path_factory):
    """A W4A8 file of the CPU, with the images that the CPU makes of it."""
    folder = tmp_path_factory.mktemp("checkpoint")
    succeeded(call(SCRIPT, *of_script(SCRIPT), *W4A8, *LINEAR, "-l", folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("runtime", thorough_except(("simulated", "torch", "torch-int8"), "torch-int8"))
def test_runtimes_from_a_file(runtime, run_on_cuda, of_script, checkpoint, tmp_path):
    words = ("--quant_mode", "linear", "--runtime", runtime, "--cali_ckpt", checkpoint / "quantized.safetensors")
    run_on_cuda(SCRIPT, *of_script(SCRIPT), *W4A8, *words, "-l", tmp_path)
    assert psnr(tmp_path, checkpoint) > SAME_IMAGES


def test_another_runtimes_images_would_be_seen(call, of_script, checkpoint, tmp_path):
    succeeded(call(SCRIPT, *of_script(SCRIPT), "--seed", 8, "-l", tmp_path))
    assert psnr(tmp_path, checkpoint) < SAME_IMAGES


@pytest.mark.thorough
def test_a_published_checkpoint(run_on_cuda, tmp_path):
    golden = GoldenCase("sd_w4a8_sm16_split")
    files = write_latent_model("text", tmp_path / "model", golden.case["model"], golden.float_weights())
    sampler = ("--prompt", "two", "--plms", "--n_samples", 1, "--n_iter", 1, "--ddim_steps", 4, "--no_grad_ckpt")
    quant = (*W4A8, "--sm_abit", 16, "--cali_ckpt", golden.path)
    run_on_cuda("txt2img", *files.options, *sampler, *quant, "-l", tmp_path / "run")
    assert manifest(tmp_path / "run")["config"]["precision"] == "autocast"


@pytest.mark.slow
def test_collecting(run_on_cuda, of_script, tmp_path):
    for script, more in ((SCRIPT, ()), ("txt2img", ("--precision", "full"))):
        words = [w for w in of_script(script) if w != "--max_images"]
        words = words[: words.index(2)] + words[words.index(2) + 1 :] if script == SCRIPT else words
        like = ("--like", script, "--cali_st", 2, "--cali_n", 2, "--out", tmp_path / f"{script}.pt")
        run_on_cuda("collect_calibration", *like, *words, *more)
        recorded = torch.load(tmp_path / f"{script}.pt", weights_only=True)
        assert all(value.device.type == "cpu" for value in recorded.values())


# --- Half precision


@pytest.mark.slow
@pytest.mark.parametrize("kind", thorough_except(("float", "w4a8", "modulated"), "float"))
def test_autocast(kind, run_on_cuda, of_script, tmp_path):
    """Half precision is what the conditional scripts take by default; their error of ε is measured in it."""
    quant = {"float": (), "w4a8": (*W4A8, "--sm_abit", 16, *LINEAR), "modulated": (*W4A8, *MODULATED)}[kind]
    words = (*of_script("txt2img"), "--plms", "--ddim_steps", 2, *quant)
    run_on_cuda("txt2img", *words, "-l", tmp_path / "half")
    run_on_cuda("txt2img", *words, "--precision", "full", "-l", tmp_path / "full")
    assert psnr(tmp_path / "half", tmp_path / "full") > SAME_IMAGES
    if quant:
        half, full = (manifest(tmp_path / name)["noise_error"]["mse"] for name in ("half", "full"))
        assert half != full and half == pytest.approx(full, rel=0.5)
