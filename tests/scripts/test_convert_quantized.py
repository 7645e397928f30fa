"""scripts/convert.py --ptq: published checkpoints in pipelines of diffusers, and such pipelines as checkpoints."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from golden_cases import EXACT_TOLERANCE, GoldenCase
from golden_diffusers import in_double
from latent_models import write_latent_model
from omegaconf import OmegaConf
from run_checks import image_bytes, succeeded
from safetensors.torch import save_file
from script_device import ON_DEVICE
from thorough import thorough_except

from qdiff.checkpoint import load_checkpoint, save_checkpoint
from qdiff.cli.options.words import quantization_words
from qdiff.config import QuantConfig
from qdiff.io.tensor_files import read_safetensors

pytest.importorskip("diffusers")

import diffusers

# Of every kind of pipeline; all cases are in tests/qdiff/diffusers_backend/test_convert_state.py.
CASES = ("ddim_w4a8_split", "bedroom_w4a8", "church_w8a8", "imagenet_w4a8_split", "sd_w4a8_sm16_split")
KEPT = ("ddim_w4a8_split", "sd_w4a8_sm16_split")  # by make test
STEPS = {"sample_diffusion_ldm": "-c", "sample_diffusion_ddim": "--timesteps"}  # of the others: --ddim_steps
PIPELINES = {
    "sample_diffusion_ddim": "DDIMPipeline",
    "sample_diffusion_ldm": "LDMPipeline",
    "sample_diffusion_ldm_imagenet": "ClassConditionalLDMPipeline",
    "txt2img": "StableDiffusionPipeline",
}
SCRIPTS = {
    "ddim": "sample_diffusion_ddim",
    "bedroom": "sample_diffusion_ldm",
    "church": "sample_diffusion_ldm",
    "imagenet": "sample_diffusion_ldm_imagenet",
    "sd": "txt2img",
}
KINDS = {"sample_diffusion_ldm_imagenet": "class", "txt2img": "text", "sample_diffusion_ldm": "unconditional"}


def options_of(script: str, config: Path, weights: Path) -> tuple[object, ...]:
    """Return the options of a model that has its config beside its weights, and of two sampling steps."""
    named = ("--config", config, "--ckpt", weights)
    model = ("-r", weights, "--seed", 1) if script == "sample_diffusion_ldm" else named
    return *model, STEPS.get(script, "--ddim_steps"), 2


def written(golden: GoldenCase, script: str, folder: Path) -> tuple[object, ...]:
    """Write a case's float model; return its options."""
    if script in KINDS:
        files = write_latent_model(KINDS[script], folder, golden.case["model"], golden.float_weights())
        return options_of(script, files.config, files.weights)
    folder.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create(golden.case["config"]), folder / "config.yaml")
    save_file(golden.float_weights(), folder / "model.safetensors")
    return options_of(script, folder / "config.yaml", folder / "model.safetensors")


def words_of(golden: GoldenCase) -> list[str]:
    return quantization_words(QuantConfig(**golden.options))


@pytest.fixture(scope="module")
def convert(call, tmp_path_factory):
    """``convert(name)``: the script of a case, the options of its float model, and the folder that was written."""
    parent, made = tmp_path_factory.mktemp("converted"), {}

    def run(name: str) -> tuple[str, tuple[object, ...], Path]:
        if name not in made:
            golden, folder = GoldenCase(name), parent / name
            script = SCRIPTS[name.removeprefix("wide_").partition("_")[0]]
            model = written(golden, script, folder / "model")
            quantized = (*words_of(golden), "--cali_ckpt", golden.path, "--resume")
            outcome = succeeded(call("convert", "--like", script, *model, *quantized, "--out", folder / "pipeline"))
            assert outcome.out.startswith(f"{folder / 'pipeline'}: {PIPELINES[script]}, ")
            made[name] = script, model, folder / "pipeline"
        return made[name]

    return run


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    thorough_except([*CASES, "wide_sd_w4a8_sm16_split", "wide_sd_w8a8_sym"], "ddim_w4a8_split", "sd_w4a8_sm16_split"),
)
def test_published_checkpoints_in_pipelines(name, convert):
    import ldm.diffusers_networks as networks

    golden, (script, _, folder) = GoldenCase(name), convert(name)
    kind = getattr(networks, PIPELINES[script], diffusers.DiffusionPipeline)
    pipeline = kind.from_pretrained(folder)
    assert type(pipeline).__name__ == PIPELINES[script]
    found, expected = in_double(golden, pipeline.unet)(*golden.exact_inputs).sample, golden.values["resumed"]
    assert (found - expected).norm() / expected.norm() < EXACT_TOLERANCE
    # Planted: the published code's outputs without quantization.
    assert (found - golden.values["fp"]).norm() / expected.norm() > EXACT_TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", thorough_except(CASES, *KEPT))
def test_and_back(name, convert, call, tmp_path):
    golden, (_, _, folder) = GoldenCase(name), convert(name)
    path = tmp_path / "back" / "model.safetensors"
    line = succeeded(call("convert", folder, "--to-papers", "--out", path)).out.splitlines()[1]
    quantized = path.with_name("quantized.safetensors")
    words = " ".join(words_of(golden))
    assert line == f"{quantized}: its quantized UNet, for sampling with {words} --cali_ckpt {quantized}"
    qnn = golden.wrapped()
    load_checkpoint(qnn, golden.path)
    save_checkpoint(qnn, tmp_path / "expected.safetensors")
    found, expected = read_safetensors(quantized), read_safetensors(tmp_path / "expected.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.thorough
def test_the_same_images(convert, call, tmp_path):
    golden = GoldenCase("sd_w4a8_sm16_split")
    script, model, folder = convert(golden.name)
    path = tmp_path / "back" / "model.safetensors"
    line = succeeded(call("convert", folder, "--to-papers", "--out", path)).out.splitlines()[1]
    quantized = line.partition(" for sampling with ")[2].split()
    sampler = ("--prompt", "two", "--n_samples", 2, "--n_iter", 1, *ON_DEVICE)
    again = options_of(script, path.with_name("config.yaml"), path)
    runs = ((model, (*words_of(golden), "--cali_ckpt", golden.path)), (again, (*quantized, "--resume")))
    for number, (options, checkpoint) in enumerate(runs):
        succeeded(call(script, *options, *sampler, *checkpoint, "-l", tmp_path / str(number)))
    assert image_bytes(tmp_path / "0") == image_bytes(tmp_path / "1") and len(image_bytes(tmp_path / "0")) == 2
    # Planted: the weights alone.
    floats = [word for word in quantized if word not in ("--quant_act", "--sm_abit", "16")]
    succeeded(call(script, *again, *sampler, *floats, "-l", tmp_path / "2"))
    assert image_bytes(tmp_path / "0") != image_bytes(tmp_path / "2")


# --- what is refused: one sentence, exit code 2, and nothing is written


@pytest.fixture(scope="module")
def checkpoint(call, tiny, tmp_path_factory):
    """A native checkpoint of the tiny DDIM, W4 with the weights alone."""
    folder = tmp_path_factory.mktemp("native")
    few = ("--max_images", 1, "--timesteps", 2, "--cali_st", 1, "--cali_n", 2, "--quant_mode", "linear")
    succeeded(call("sample_diffusion_ddim", *tiny.options, *few, "--ptq", "--weight_bit", 4, "-l", folder / "run"))
    return folder / "run" / "quantized.safetensors"


REFUSED = [
    (("--ptq",), "a pipeline is converted with a finished checkpoint; give --cali_ckpt PATH"),
    (("--ptq", "--cali_ckpt", "FILE", "--weight_bit", 5), "weight_bits 4 but this run has 5; give --weight_bit 4"),
    (("--ptq", "--cali_ckpt", "FILE", "--weight_bit", 4, "--quant_act"), "holds no activation quantizers; leave out"),
    (("--ptq", "--cali_ckpt", "FILE", "--quant_act", "--modulate"), "made without --modulate"),
    (("--ptq", "--cali_ckpt", "missing"), "checkpoint missing does not exist; check the path"),
    (("--cali_ckpt", "FILE"), "--cali_ckpt has no meaning without --ptq; add --ptq, or leave --cali_ckpt out"),
]


@pytest.mark.parametrize(("options", "match"), REFUSED)
def test_what_is_not_converted(options, match, call, tiny, checkpoint, tmp_path):
    given = [checkpoint if word == "FILE" else word for word in options]
    assert match in call("convert", *tiny.options[:4], *given, "--out", tmp_path / "out").error_line()
    assert list(tmp_path.iterdir()) == []


def test_native_checkpoints_and_what_is_told(call, tiny, checkpoint, tmp_path):
    given = (*tiny.options[:4], "--ptq", "--weight_bit", 4, "--cali_ckpt", checkpoint)
    succeeded(call("convert", *given, "--act_bit", 4, "--out", tmp_path / "there"))
    card = (tmp_path / "there" / "unet" / "README.md").read_text()
    assert "| method | linear |" in card and "| weights | 4 bits" in card and "base_model: tiny" in card
    outcome = succeeded(call("convert", *tiny.options[:4], "--split", "--out", tmp_path / "float"))
    assert "without --ptq the float model samples, and --split has no effect" in outcome.err
    # Where a script's --resume is the float checkpoint, --cali_ckpt alone is enough.
    words = ("--ptq", "--cali_ckpt", "missing", "--resume", "nowhere")
    line = call("convert", "--like", "sample_diffusion_ldm_church", *words, "--out", tmp_path / "c").error_line()
    assert "nowhere" in line


@pytest.mark.slow
def test_folders_that_are_not_read(call, convert, tmp_path, monkeypatch):
    _, _, folder = convert("ddim_w4a8_split")
    (tmp_path / "quantized.safetensors").touch()
    back = ("--to-papers", "--out", tmp_path / "model.safetensors")
    assert "quantized.safetensors exists; choose another folder" in call("convert", folder, *back).error_line()
    (tmp_path / "quantized.safetensors").unlink()
    path = folder / "unet" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"quant_method": "qdiff"', '"quant_method": "torchao"'))
    assert "has the quantization method torchao; only" in call("convert", folder, *back).error_line()
    path.write_text(text)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert "diffusers is not installed" in call("convert", folder, *back).error_line()
    assert list(tmp_path.iterdir()) == []
