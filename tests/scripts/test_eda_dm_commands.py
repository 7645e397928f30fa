"""EDA-DM's published commands resolve to the numbers that they name, and its scripts' options mean what they meant."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from run_checks import succeeded

REPOSITORY = Path(__file__).parents[2]

# The paper's README, word for word but for the placeholders: <…> are filled in by the tests.
CIFAR = (
    "scripts/sample_diffusion_ddim.py --config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 "
    "--skip_type quad --ptq --weight_bit {bits} --quant_mode qdiff --split --logdir result/cifar --device cuda:0 "
    "--quant_act --act_bit 8 --a_sym --calib_t_mode normal --calib_num_samples 1024 --batch_samples 1024 "
    "--max_images 50000 --calib_im_mode greedy --lamda {lamda} --recon --block_recon --lr_w {lr_w} --lr_a {lr_a} "
    "--add_loss {add_loss}"
)
LSUN = (
    "./scripts/sample_diffusion_ldm_{set}.py -n 50000 --batch_size {batch} -r <model_ckpt_path> -c {steps} -e {eta} "
    "--ptq --split --logdir result/{set} --dataset <dataset_path> --device cuda:0 --weight_bit {bits} --quant_act "
    "--act_bit 8 --a_sym --calib_t_mode normal --calib_num_samples 1024 --batch_samples 64 --calib_im_mode greedy "
    "--lamda {lamda} --recon --lr_w {lr_w} --lr_a {lr_a} --add_loss {add_loss}"
)
IMAGENET = (
    "./scripts/sample_diffusion_ldm_imagenet.py --cond --ptq --no_grad_ckpt --split --ddim_steps 20 --ddim_eta 0.0 "
    "--ckpt <model_ckpt_path> --config configs/latent-diffusion/cin256-v2.yaml --logdir result/imagenet --dataset "
    "<dataset_path> --device cuda:0 --skip_grid --n_samples 50000 --n_batch 50 --weight_bit {bits} --quant_act "
    "--act_bit 8 --sm_abit 8 --calib_t_mode normal --calib_num_samples 1024 --batch_samples 64 --calib_im_mode greedy "
    "--lamda {lamda} --recon --lr_w {lr_w} --lr_a {lr_a} --add_loss {add_loss}"
)
COCO = (
    './scripts/sample_txt2img.py --prompt "a puppy wearing a hat" --from-file <prompt_path> --plms --cond '
    "--no_grad_ckpt --split --ckpt <model_ckpt_path> --logdir result/coco --dataset <dataset_path> --device cuda:0 "
    "--skip_grid --weight_bit {bits} --quant_act --act_bit 8 --sm_abit 8 --calib_t_mode normal --ptq --n_samples 10000 "
    "--n_batch 4 --calib_num_samples 256 --batch_samples 8 --calib_im_mode greedy --lamda {lamda} --recon --lr_w "
    "{lr_w} --lr_a {lr_a} --add_loss {add_loss}"
)
BEDROOM_OPTIONS = {"set": "bedroom", "batch": 50, "steps": 200, "eta": 1.0}
CHURCH_OPTIONS = {"set": "church", "batch": 100, "steps": 500, "eta": 0.0}
# command, its own values, then: λ, lr_w, lr_a, γ as the README writes them
PUBLISHED = {
    "cifar10 w8": (CIFAR, {}, 8, "1.3", "5e-2", "1e-3", "3.0"),
    "cifar10 w4": (CIFAR, {}, 4, "1.2", "5e-1", "5e-4", "0.8"),
    "bedroom w8": (LSUN, BEDROOM_OPTIONS, 8, "100.0", "5e-4", "1e-4", "0.1"),
    "bedroom w4": (LSUN, BEDROOM_OPTIONS, 4, "100.0", "1e-2", "5e-3", "0.001"),
    "church w8": (LSUN, CHURCH_OPTIONS, 8, "1.0", "5e-2", "1e-4", "1.0"),
    "church w4": (LSUN, CHURCH_OPTIONS, 4, "1.0", "5e-2", "1e-4", "1.0"),
    "imagenet w8": (IMAGENET, {}, 8, "0.5", "1e-4", "1e-3", "1.3"),
    "imagenet w4": (IMAGENET, {}, 4, "0.5", "5e-1", "1e-4", "1.3"),
    "coco w8": (COCO, {}, 8, "50.0", "5e-4", "1e-4", "0.5"),
    "coco w4": (COCO, {}, 4, "50.0", "3e-2", "1e-4", "0.5"),
}
CHECKPOINTS = {
    "cifar10": None,
    "bedroom": "models/ldm/lsun_beds256/model.ckpt",
    "church": "models/ldm/lsun_churches256/model.ckpt",
    "imagenet": "models/ldm/cin256/model.ckpt",
    "coco": "sd-v1-4.ckpt",
}
# What a command takes from its preset: r of TDAC, iterations, batch.
PRESET = {
    "cifar10": (3.0, 5000, 32),
    "bedroom": (0.3, 5000, 32),
    "church": (0.3, 5000, 32),
    "imagenet": (3.0, 1000, 32),
    "coco": (0.3, 1000, 2),
}
STEPS = {"cifar10": 100, "bedroom": 200, "church": 500, "imagenet": 20, "coco": 50}


def words_of(name, captions):
    command, own, bits, lamda, lr_w, lr_a, add_loss = PUBLISHED[name]
    text = command.format(**own, bits=bits, lamda=lamda, lr_w=lr_w, lr_a=lr_a, add_loss=add_loss)
    filled = {"<model_ckpt_path>": str(CHECKPOINTS[name.split()[0]]), "<prompt_path>": str(captions)}
    script, *words = shlex.split(text)
    return Path(script).stem, [filled.get(w, w) for w in words]


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    path = tmp_path_factory.mktemp("coco") / "captions_val2014.json"
    entries = [{"image_id": i, "id": i, "caption": f"caption {i}"} for i in range(12_000)]
    path.write_text(json.dumps({"annotations": entries}))
    return path


@pytest.fixture
def resolved(call, captions, monkeypatch):
    """``resolved(name, *more)``: what a published command prints with --dry-run."""
    monkeypatch.chdir(REPOSITORY)

    def run(name, *more):
        script, words = words_of(name, captions)
        outcome = succeeded(call(script, *words, *more, "--dry-run"))
        note = "--from-file replaces --prompt\n"
        assert outcome.err == (note if "--from-file" in words and "--prompt" in words else "")
        return json.loads(outcome.out)

    return run


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_commands_resolve(name, resolved):
    config, kind = resolved(name), name.split()[0]
    _, _, bits, lamda, lr_w, lr_a, add_loss = PUBLISHED[name]
    plan, radius, iterations, batch = config["ptq"], *PRESET[kind]
    assert config["method"] == plan["method"] == "eda-dm" and plan["action"] == "calibrate"
    count, batch_samples = (256, 8) if kind == "coco" else (1024, 1024 if kind == "cifar10" else 64)
    expected = {"schedule": "tdac", "count": count, "batch_size": batch_samples, "lamda": float(lamda)}
    assert plan["draw"] == expected | {"radius": radius}
    assert plan["recipe"] == {
        "reconstruct": True,
        "iterations": iterations,
        "batch_size": batch,
        "lr_rounding": float(lr_w),
        "lr_act": float(lr_a),
        "layer_weight": float(add_loss),
        "drop": 0.5,
        "unit": "block",
    }
    quant = plan["quant"]
    assert (quant["weight_bits"], quant["act_bits"], quant["softmax_bits"]) == (bits, 8, 8)
    assert quant["split_shortcut"] and quant["keep_ends"]
    assert quant["weight_range"] == quant["act_range"] == "search"
    # Present means 2-D and absent the symmetric search.
    assert quant["act_symmetric"] is (kind in ("imagenet", "coco"))
    sampler, images = config["sampler"], config.get("max_images", config.get("num_images", 0))
    assert sampler.get("steps", sampler.get("timesteps")) == STEPS[kind]
    assert config["seed"] == 1234
    if kind == "coco":
        assert (sampler["kind"], sampler["scale"], len(config["prompts"])) == ("plms", 7.5, 10_000)
        assert config["prompts"][0] == "caption 0" and config["weights"] == "sd-v1-4.ckpt"
    else:
        assert images == 50_000
    if kind in CHECKPOINTS and kind not in ("cifar10", "coco"):
        assert config["weights"] == CHECKPOINTS[kind]
        eta = {"bedroom": 1.0}.get(kind, 0.0)
        assert sampler["eta"] == eta and config["latent_shape"] == ([4, 32, 32] if kind == "church" else [3, 64, 64])
    assert sampler.get("skip_type", "quad") == "quad"


@pytest.mark.parametrize("name", [n for n in PUBLISHED if n.endswith("w4")])
def test_other_methods_and_a_finished_checkpoint(name, resolved):
    loaded = resolved(name, "--cali_ckpt", "quantized.safetensors")["ptq"]
    assert (loaded["action"], loaded["checkpoint"]) == ("load", "quantized.safetensors")
    naive = resolved(name, "--no-recon", "--no-keep_ends", "--qdrop", 0)["ptq"]
    assert (naive["recipe"]["reconstruct"], naive["quant"].get("keep_ends", False), naive["recipe"]["drop"]) == (
        False,
        False,
        0,
    )
    normal = resolved(name, "--calib_im_mode", "noise_backward_t")["ptq"]
    assert normal["draw"]["schedule"] == "normal" and normal["method"] == "eda-dm"


DEFAULTS = {  # by the tables of the published scripts
    "sample_diffusion_ldm_bedroom": {"seed": 1234, "num_images": 10_000, "steps": 50, "eta": 1.0},
    "sample_diffusion_ldm_church": {"seed": 1234, "num_images": 10_000, "steps": 50, "eta": 1.0},
    "sample_txt2img": {"seed": 1234, "num_images": 3, "steps": 50, "eta": 0.0},
}


@pytest.mark.parametrize("script", DEFAULTS)
def test_defaults_are_the_published_ones(script, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, expected = json.loads(succeeded(call(script, "--dry-run")).out), DEFAULTS[script]
    assert config["method"] == "float" and config["seed"] == expected["seed"]
    assert config.get("num_images", len(config.get("prompts", ()))) == expected["num_images"]
    assert (config["sampler"]["steps"], config["sampler"]["eta"]) == (expected["steps"], expected["eta"])
    if script != "sample_txt2img":
        bare = json.loads(succeeded(call(script, "-r", "-n", "-c", "-e", "-l", "--dataset", "--dry-run")).out)
        assert bare == config
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", ["sample_diffusion_ldm_bedroom", "sample_diffusion_ldm_church"])
def test_resume_names_the_float_checkpoint(script, call, latent):
    model, steps = latent("unconditional"), ("-c", 4)
    printed = {succeeded(call(script, option, model.weights, *steps, "--dry-run")).out for option in ("-r", "--resume")}
    assert len(printed) == 1 and json.loads(printed.pop())["weights"] == str(model.weights)
    # It does not load a quantized one: that is --cali_ckpt alone.
    quantized = ("--resume", model.weights, *steps, "--ptq", "--recon", "--dry-run")
    loaded = call(script, *quantized, "--cali_ckpt", "q")
    assert json.loads(succeeded(loaded).out)["ptq"]["action"] == "load"
    calibrated = call(script, *quantized)
    assert json.loads(succeeded(calibrated).out)["ptq"]["action"] == "calibrate"
    assert "--resume_base" in call(script, "--resume_base", model.weights, "--dry-run").error_line()


def test_captions_count_images_and_batches_apart(call, latent, tmp_path):
    options = (*latent("text").options, "--ddim_steps", 2)

    def prompts(*more):
        return json.loads(succeeded(call("sample_txt2img", *options, *more, "--dry-run")).out)["prompts"]

    assert prompts("--prompt", "two", "--n_samples", 5, "--n_batch", 2) == ["two"] * 5
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\n")
    listed = ("--from-file", tmp_path / "prompts.txt")
    assert prompts(*listed, "--n_samples", 2) == ["one", "two"]
    assert prompts(*listed, "--n_samples", 5, "--n_iter", 2) == ["one", "two", "three", "one", "two"]
    assert prompts(*listed, "--n_samples", 5, "--max_images", 1) == ["one"]
    for name in ("--n_samples", "--n_batch", "--max_images"):
        assert f"{name} is 0" in call("sample_txt2img", *options, name, 0).error_line()
    fixed = call("sample_txt2img", *options, "--fixed_code", "--n_samples", 5, "--n_batch", 2, "--dry-run")
    assert json.loads(succeeded(fixed).out)["sampler"]["fixed_code"] == 2


def test_contradictions_are_one_sentence(call, tiny, tmp_path):
    options = (*tiny.options, "--ptq", "--recon", "-l", tmp_path / "run")
    for more, says in {
        ("--method", "qdiff"): ("--recon", "--method qdiff"),
        ("--quant_mode", "linear"): ("--recon", "--quant_mode linear"),
        ("--block_recon", "--layer_recon"): ("--block_recon", "--layer_recon"),
    }.items():
        line = call("sample_diffusion_ddim", *options, *more).error_line()
        assert all(word in line for word in says)
    assert "finite" in call("sample_diffusion_ddim", *options, "--lamda", "inf").error_line()
    assert list(tmp_path.iterdir()) == []
