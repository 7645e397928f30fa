"""Every path of the sampling scripts runs once on the virtual GPU: same images as on the CPU, and no step waits."""

from __future__ import annotations

import pytest
from cuda_checks import assert_sampling_never_waits
from ddim_runs import DATA, SAMPLER, SCRIPT, W4A8
from run_checks import image_bytes, manifest, succeeded
from script_device import ON_DEVICE

ON_CUDA = ("--device", "cuda")
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
}
PACKED = ("torch", "torch-int8")


@pytest.fixture
def run_on_cuda(call, cuda):
    """``run_on_cuda(script, *words)``: a run on the device whose sampling never waited."""

    def run(script, *words):
        with cuda.counting() as counts:
            outcome = succeeded(call(script, *words, *ON_CUDA))
        assert_sampling_never_waits(counts)
        return outcome

    return run


@pytest.fixture(scope="session")
def of_script(tiny, latent):
    """``of_script(name)``: model, number of images and seed of a script's runs."""

    def options(script):
        if script == SCRIPT:
            return *tiny.options, *SAMPLER
        if "ldm" in script and "imagenet" not in script:
            return "-r", latent("unconditional").weights, "-n", 3, "--batch_size", 2, "--seed", 7, *ON_DEVICE
        common = ("--batch_size", 2, "--seed", 7, "--skip_grid")
        if "imagenet" in script:
            return *latent("class").options, "--n_samples", 3, *common
        return *latent("text").options, "--prompt", "two", "--n_samples", 3, *common

    return options


def pictures(folder):
    """Return where a run on the device says that it was, with what it made."""
    assert manifest(folder)["device"] == "cuda" and manifest(folder)["status"] == "finished"
    assert manifest(folder)["peak_memory_bytes"][0]["device"] > 0
    return image_bytes(folder)


@pytest.mark.parametrize("name", FLOAT_RUNS)
def test_float(name, call, run_on_cuda, of_script, tmp_path):
    script, sampler = FLOAT_RUNS[name]
    options = (*of_script(script), *sampler)
    half = ("--precision", "full") if script in ("txt2img", "sample_txt2img") or "imagenet" in script else ()
    run_on_cuda(script, *options, *half, "-l", tmp_path / "cuda")
    assert len(pictures(tmp_path / "cuda")) >= 3
