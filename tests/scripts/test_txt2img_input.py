"""What txt2img makes of its options before it does any work: published commands, defaults, and bad input."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from run_checks import succeeded
from script_device import ON_DEVICE

SCRIPT = "txt2img"
REPOSITORY = Path(__file__).parents[2]
SAMPLER = ("--ddim_steps", 4, "--seed", 7)

# Q-Diffusion's README, its placeholders filled in.
README = (
    '--prompt "a puppet wearing a hat" --plms --cond --ptq --weight_bit {bits} --quant_mode qdiff --no_grad_ckpt '
    "--split --n_samples 5 "
)
LOADED = "--outdir out --cali_ckpt quantized.pth"
PUBLISHED = {
    "weights": README + LOADED,
    "activations": README + "--quant_act --act_bit 8 --sm_abit 16 " + LOADED,
    "calibration": README
    + "--quant_act --act_bit 8 --sm_abit 16 --cali_st 25 --cali_batch_size 8 --cali_n 128 --running_stat "
    + "--cali_data_path sd_coco_sample1024_allst.pt --outdir out",
    "resumed": README + "--quant_act --act_bit 8 --sm_abit 16 --resume " + LOADED,
    "resumed weights": README + "--quant_act --act_bit 8 --sm_abit 16 --resume_w --rs_sm_only --verbose " + LOADED,
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_resolve_without_weights(name, bits, call, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    words = shlex.split(PUBLISHED[name].format(bits=bits))
    # The README leaves Stable Diffusion's config to its default, which needs the checkpoint in place.
    outcome = succeeded(call(SCRIPT, *words, "--config", "configs/stable-diffusion/v1-inference.yaml", "--dry-run"))
    config = json.loads(outcome.out)
    assert outcome.err == ""
    assert config["weights"] == "models/ldm/stable-diffusion-v1/model.ckpt"
    assert config["latent_shape"] == [4, 64, 64] and config["prompts"] == ["a puppet wearing a hat"] * 10
    assert config["sampler"] == {"kind": "plms", "steps": 50, "eta": 0.0, "scale": 7.5, "fixed_code": None}
    plan, quant = config["ptq"], config["ptq"]["quant"]
    assert (quant["weight_bits"], quant["split_shortcut"]) == (bits, True)
    assert (quant["act_bits"], quant["softmax_bits"]) == ((None, 8) if name == "weights" else (8, 16))
    assert plan["action"] == {"calibration": "calibrate", "resumed weights": "activations"}.get(name, "load")
    if name == "calibration":
        assert (plan["steps"], plan["per_step"], plan["recipe"]["batch_size"]) == (25, 128, 8)
        assert plan["recipe"]["running_stat"] is True


@pytest.mark.slow
def test_defaults_of_stable_diffusion_and_of_the_bundled_model(call, tmp_path, monkeypatch):
    import ldm.locate

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ldm.locate, "REPOSITORY", tmp_path)
    config = json.loads(succeeded(call(SCRIPT, "--dry-run")).out)
    assert config["weights"].endswith("models/ldm/digits_text/model.safetensors")
    assert config["prompts"] == ["a handwritten three"] * 6 and config["seed"] == 42
    assert (config["sampler"]["steps"], config["sampler"]["scale"], config["precision"]) == (50, 7.5, "autocast")
    assert list(tmp_path.iterdir()) == []

    weights = Path("models") / "ldm" / "stable-diffusion-v1" / "model.ckpt"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"")
    shutil.copytree(REPOSITORY / "configs", tmp_path / "configs")
    config = json.loads(succeeded(call(SCRIPT, "--prompt", "--dry-run")).out)
    assert config["weights"] == str(weights) and config["latent_shape"] == [4, 64, 64]
    assert config["prompts"] == ["a painting of a virus monster playing guitar"] * 6
    config = json.loads(succeeded(call(SCRIPT, "--H", 512, "--W", 768, "--C", 4, "--f", 8, "--dry-run")).out)
    assert config["latent_shape"] == [4, 64, 96]


@pytest.mark.slow
def test_a_bundled_model_in_place_of_stable_diffusion_is_said(call, latent, tmp_path, monkeypatch):
    import ldm.locate
    import ldm.pipeline

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ldm.locate, "REPOSITORY", tmp_path)
    monkeypatch.setitem(ldm.pipeline.BUNDLED, "text", latent("text").folder)
    given = (*SAMPLER, "--n_samples", 1, "--n_iter", 1, "--prompt", "two", *ON_DEVICE)
    outcome = succeeded(call(SCRIPT, *given))
    (folder,) = (tmp_path / "outputs" / "txt2img-samples").iterdir()  # the published place, a folder for each run
    for text in (outcome.err, (folder / "run.log").read_text()):
        assert "models/ldm/stable-diffusion-v1/model.ckpt is missing" in text and str(latent("text").folder) in text
    succeeded(call(SCRIPT, *given, "--seed", 8))
    assert len(list(folder.parent.iterdir())) == 2
    # Once; and before anything is there to be logged: in a dry run, and beside an error that may come of it.
    assert outcome.err.count("is missing; the bundled model") == 1
    outcome = succeeded(call(SCRIPT, *given, "--dry-run"))
    assert "model.ckpt is missing; the bundled model" in outcome.err and json.loads(outcome.out)
    (tmp_path / "c.pth").write_bytes(b"PK")
    outcome = call(SCRIPT, *given, "--ptq", "--cali_ckpt", "c.pth")
    assert outcome.code == 2 and "model.ckpt is missing; the bundled model" in outcome.err


def test_dry_run_needs_no_weights_data_or_device(call, latent, tmp_path):
    missing = tmp_path / "missing"
    options = ("--config", latent("text").config, "--ckpt", missing, "--cali_data_path", missing, "--device", "cuda:9")
    outcome = succeeded(call(SCRIPT, *options, *SAMPLER, "--ptq", "--outdir", tmp_path / "run", "--dry-run"))
    assert json.loads(outcome.out)["weights"] == str(missing) and outcome.err == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["txt2img", "sample_txt2img"])
@pytest.mark.parametrize("option", ["--from-file", "--cali_prompts"])
def test_dry_run_needs_no_prompt_file(option, script, call, latent, tmp_path):
    given = (*latent("text").options, *SAMPLER, option, "none.txt", "-l", tmp_path / "run")
    outcome = succeeded(call(script, *given, "--dry-run"))
    assert outcome.err == f"{option} none.txt does not exist; the plan is shown without its prompts\n"
    assert json.loads(outcome.out)["calibration_prompts"] == []
    assert "none.txt does not exist" in call(script, *given).error_line()
    (tmp_path / "empty.txt").write_text("")
    assert "holds no prompt" in call(script, *given, option, tmp_path / "empty.txt", "--dry-run").error_line()


# --- Bad input

REFUSED = {
    "laion": (("--laion400m",), "--laion400m is not supported"),
    "two samplers": (("--plms", "--dpm"), "--plms and --dpm"),
    "noise in PLMS": (("--plms", "--ddim_eta", 0.5), "--plms has no η, so --ddim_eta 0.5"),
    "noise in DPM-Solver": (("--dpm", "--ddim_eta", 1), "--dpm has no η, so --ddim_eta 1.0"),
    "height": (("--H", 18), "--H is 18; give a positive multiple of 4"),
    "width": (("--W", 30), "--W is 30"),
    "no height": (("--H", 0), "--H is 0"),
    "negative width": (("--W", -16), "--W is -16"),
    "channels": (("--C", 5), "--C is 5 but this model's is 4"),
    "factor": (("--f", 8), "--f is 8 but this model's is 2"),
    "no samples": (("--n_samples", 0), "--n_samples is 0"),
    "no iterations": (("--n_iter", 0), "--n_iter is 0"),
    "no images": (("--max_images", 0), "--max_images is 0"),
    "columns": (("--n_rows", -2), "--n_rows is -2"),
    "nothing kept": (("--skip_grid", "--skip_save"), "--skip_grid and --skip_save"),
    "scale": (("--scale", "inf"), "scale is inf"),
    "eta": (("--ddim_eta", 2), "eta is 2.0"),
    "steps": (("--ddim_steps", 41), "41 sampling steps"),
    "seed": (("--seed", -1), "--seed is -1"),
    "file": (("--from-file", "none.txt"), "none.txt does not exist; check --from-file"),
    "quant_mode": (("--quant_mode", "symmetric"), "--quant_mode"),
    "no ptq": (("--resume",), "--ptq"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_options_are_one_sentence(name, call, latent, tmp_path):
    more, says = REFUSED[name]
    line = call(SCRIPT, *latent("text").options, *SAMPLER, *more, "--outdir", tmp_path / "run").error_line()
    assert says in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", " \n", None])
def test_a_file_without_prompts(content, call, latent, tmp_path):
    path = tmp_path / ("captions.json" if content is None else "prompts.txt")
    path.write_text("[]" if content is None else content)
    given = (*latent("text").options, *SAMPLER, "--from-file", path, "--outdir", tmp_path / "run")
    line = call(SCRIPT, *given).error_line()
    assert str(path) in line
    assert not (tmp_path / "run").exists()


def test_models_of_other_families(call, latent, tiny, tmp_path):
    for config, says in (
        (latent("unconditional").config, "not a text-conditional model"),
        (latent("class").config, "not a text-conditional model"),
        (tiny.config, "does not describe a latent diffusion model"),
        (REPOSITORY / "configs" / "digits.yml", "does not describe a latent diffusion model"),
        (tmp_path / "none.yaml", "does not exist"),
    ):
        assert says in call(SCRIPT, "--config", config, *SAMPLER, "--outdir", tmp_path / "run").error_line()
    for weights, says in (
        (latent("class").weights, "does not hold the weights"),
        (tiny.weights, "not a latent diffusion checkpoint"),
    ):
        given = ("--config", latent("text").config, "--ckpt", weights, *SAMPLER, "--outdir", tmp_path / "run")
        assert says in call(SCRIPT, *given).error_line()
    assert list(tmp_path.iterdir()) == []


def test_a_missing_checkpoint_says_where_to_get_it(call, tmp_path):
    missing = tmp_path / "sd-v1-4.ckpt"
    line = call(SCRIPT, "--ckpt", missing, "--outdir", tmp_path / "run").error_line()
    assert str(missing) in line and "https://huggingface.co/CompVis" in line
    assert list(tmp_path.iterdir()) == []


def test_a_config_beside_the_checkpoint_is_taken(call, latent):
    config = json.loads(succeeded(call(SCRIPT, "--ckpt", latent("text").weights, *SAMPLER, "--dry-run")).out)
    assert config["latent_shape"] == [4, 8, 8]
