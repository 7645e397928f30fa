"""The training command of latent models, both stages in small: files, continuing, the tokenizer, bad input."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from thorough import thorough_except

pytestmark = pytest.mark.slow

SCRIPT = "train_ldm"
IMAGES, BATCH = 20, 8
STEPS_AN_EPOCH = 2  # 20 images in full batches of 8
CHECKPOINT_EVERY = 10  # epochs
# Of weights that pass through float16, relative to the largest.
HALF_TOLERANCE = 1e-3

OPTIM = {"lr": 0.001, "warmup_steps": 2, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0, "grad_clip": 1.0}
UNET = {"image_size": 4, "model_channels": 32, "attention_resolutions": [1], "num_res_blocks": 1, "channel_mult": [1]}
SPATIAL = {"num_heads": 1, "use_spatial_transformer": True, "context_dim": 12}
DDCONFIG = {"resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1}
ENCODER = {"vocab_size": 160, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1}
ENCODER |= {"num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}


def config(kind, folder):
    """The config of a tiny model: unconditional with VQ ("vq") or KL ("kl"), of classes (VQ) or of texts (KL)."""
    is_vq = kind in ("vq", "class")
    channels = 3 if is_vq else 4
    ddconfig = DDCONFIG | {"z_channels": channels, "double_z": not is_vq, "attn_resolutions": [], "dropout": 0.1}
    params = {"embed_dim": channels, "ddconfig": ddconfig} | ({"n_embed": 16} if is_vq else {})
    encoder = "VQModelInterface" if is_vq else "AutoencoderKL"
    unet = UNET | {"in_channels": channels, "out_channels": channels}
    condition, data = "__is_unconditional__", {"dataset": "DIGITS", "image_size": 16, "channels": 3}
    diffusion = {"n_epochs": 3, "batch_size": BATCH, "ema_rate": 0.5, "condition_dropout": 0.2, "optim": OPTIM}
    if kind == "class":
        condition = {"target": "ldm.modules.encoders.modules.ClassEmbedder"}
        condition["params"] = {"embed_dim": 12, "n_classes": 11}
    if kind == "text":
        condition = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
        condition["params"] = {"version": str(folder / "encoder")}
        data["captions"] = {"vocab_size": 160, "max_length": 16}
    return {
        "model": {
            "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
            "params": {
                "image_size": 4,
                "channels": channels,
                "scale_by_std": True,
                "use_ema": False,
                "unet_config": {
                    "target": "ldm.modules.diffusionmodules.openaimodel.UNetModel",
                    "params": unet | (SPATIAL if kind in ("class", "text") else {"num_heads": 2}),
                },
                "first_stage_config": {"target": f"ldm.models.autoencoder.{encoder}", "params": params},
                "cond_stage_config": condition,
                "conditioning_key": "crossattn",
            },
        },
        "data": data,
        "training": {
            "first_stage": {"n_epochs": 3, "batch_size": BATCH, "regulariser_weight": 0.1, "optim": OPTIM},
            "diffusion": diffusion,
        },
    }


@pytest.fixture
def train(call, tmp_path, monkeypatch):
    """``train(kind, stage, *more)`` on 20 random images, everything in tmp_path; weights are ``out/KIND-STAGE``."""
    import ldm.stages

    generator = torch.Generator().manual_seed(0)
    images = torch.rand(IMAGES, 3, 16, 16, generator=generator) * 2 - 1
    monkeypatch.setattr(ldm.stages, "load_training_images", lambda data: images)
    monkeypatch.setattr(ldm.stages, "load_training_labels", lambda data: torch.arange(IMAGES) % 10)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder" / "config.json").write_text(json.dumps({"model_type": "clip_text_model", **ENCODER}))

    def run(kind, stage, *more, first="vq"):
        path = tmp_path / f"{kind}.yaml"
        path.write_text(yaml.safe_dump(config(kind, tmp_path)))
        options = ["--config", path, "--stage", stage, "--out", tmp_path / "out" / f"{kind}-{stage}", "--threads", 1]
        if stage == "diffusion":
            options += ["--first_stage", tmp_path / "out" / f"{first}-first"]
        return call(SCRIPT, *options, *more)

    return run


@pytest.fixture
def steps(monkeypatch):
    """The training steps that were done: a list that grows."""
    from ldm.training import FirstStageTask, LatentDenoisingTask

    done = []
    for task in (FirstStageTask, LatentDenoisingTask):

        def counted(self, batch, index, step=task.training_step):
            done.append(self.global_step)
            return step(self, batch, index)

        monkeypatch.setattr(task, "training_step", counted)
    return done


def notes_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["training"])


FIRST_STAGES = {"vq": "vq", "class": "vq", "kl": "kl", "text": "kl"}


@pytest.mark.parametrize("kind", thorough_except(FIRST_STAGES, "class", "text"))
def test_both_stages_make_a_model_that_samples(kind, train, steps, tmp_path):
    first = FIRST_STAGES[kind]
    from ldm.checkpoint import load_latent_diffusion
    from ldm.config import load_config

    outcome = train(first, "first", "--epochs", 2)
    assert outcome.code == 0, outcome.err
    assert len(steps) == 2 * STEPS_AN_EPOCH
    stage = load_file(tmp_path / "out" / f"{first}-first")
    assert all(n.startswith("first_stage_model.") and v.dtype == torch.float16 for n, v in stage.items())
    assert 0 < json.loads(outcome.out[outcome.out.rindex("{") :])["mean_absolute_error"] < 2

    outcome = train(kind, "diffusion", first=first)
    assert outcome.code == 0, outcome.err
    out = tmp_path / "out" / f"{kind}-diffusion"
    notes = notes_of(out)
    assert (notes["epochs"], notes["steps"], notes["images"], notes["seed"]) == (3, 6, IMAGES, 1234)
    assert notes["stage"] == "diffusion" and 0 < notes["final_loss"] < 3
    weights = load_file(out)
    assert {n: v.dtype for n, v in weights.items() if v.dtype != torch.float16} == {"scale_factor": torch.float32}
    assert all(torch.equal(weights[n], stage[n]) for n in stage), "the first stage is taken over unchanged"

    model = load_latent_diffusion(load_config(tmp_path / f"{kind}.yaml"), out)
    z, t = torch.randn(2, model.network.in_channels, 4, 4), torch.tensor([1, 900])
    values = {"class": [3, 10], "text": ["a handwritten seven", ""]}.get(kind)
    context = () if values is None else (model.condition(values),)
    assert torch.isfinite(model.network(z, t, *context)).all()
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.is_file()) == sorted({f"{first}-first", out.name})


def test_latents_of_the_model_have_unit_deviation(train, tmp_path):
    import ldm.stages
    from ldm.checkpoint import load_latent_diffusion
    from ldm.config import load_config

    assert train("vq", "first", "--epochs", 1).code == 0
    assert train("vq", "diffusion", "--epochs", 1).code == 0
    model = load_latent_diffusion(load_config(tmp_path / "vq.yaml"), tmp_path / "out" / "vq-diffusion")
    latents = model.encode(ldm.stages.load_training_images(None))  # without dropout, as the factor was measured
    assert float(latents.std()) == pytest.approx(1.0, rel=HALF_TOLERANCE)
    assert float(latents.std() / model.scale_factor) != pytest.approx(1.0, rel=HALF_TOLERANCE)  # planted: not scaled


def test_averaged_weights_are_written(train, tmp_path, monkeypatch):
    """Of the denoiser and of the condition encoder."""
    import ldm.stages

    kept = []
    fit = ldm.stages.fit
    monkeypatch.setattr(ldm.stages, "fit", lambda task, *rest: kept.append(task) or fit(task, *rest))
    assert train("vq", "first", "--epochs", 1).code == 0
    assert train("class", "diffusion").code == 0
    task, weights = kept[-1], load_file(tmp_path / "out" / "class-diffusion")
    for name, ours in (("diffusion_model", "model.diffusion_model"), ("cond_stage_model", "cond_stage_model")):
        averaged = task.ema.module.get_submodule(name).state_dict()
        current = task.model.get_submodule(name).state_dict()
        assert all(torch.equal(weights[f"{ours}.{n}"], v.half()) for n, v in averaged.items())
        assert not all(torch.equal(weights[f"{ours}.{n}"], v.half()) for n, v in current.items())


@pytest.mark.parametrize("stage", thorough_except(("first", "diffusion"), "diffusion"))
def test_repeated_command_continues_from_the_last_checkpoint(stage, train, steps, tmp_path):
    if stage == "diffusion":
        assert train("vq", "first", "--epochs", 1).code == 0
    steps.clear()
    assert train("vq", stage, "--epochs", CHECKPOINT_EVERY).code == 0
    assert steps == list(range(CHECKPOINT_EVERY * STEPS_AN_EPOCH))
    work = tmp_path / "out" / f"vq-{stage}.work"
    assert [p.name for p in work.iterdir()] == ["last.ckpt"]
    before = load_file(tmp_path / "out" / f"vq-{stage}")
    steps.clear()
    assert train("vq", stage, "--epochs", CHECKPOINT_EVERY).code == 0  # nothing to do: the same weights
    after = load_file(tmp_path / "out" / f"vq-{stage}")
    assert steps == [] and all(torch.equal(after[n], before[n]) for n in before)
    assert train("vq", stage, "--epochs", CHECKPOINT_EVERY + 1).code == 0
    first = CHECKPOINT_EVERY * STEPS_AN_EPOCH
    assert steps == [first, first + 1]


def test_a_tokenizer_that_is_there_is_kept(train, tmp_path):
    """Another one would number the tokens of trained weights anew."""
    assert train("kl", "first", "--epochs", 1).code == 0
    assert train("text", "diffusion", "--epochs", 1, first="kl").code == 0
    vocabulary = tmp_path / "encoder" / "vocab.json"
    tokens = list(json.loads(vocabulary.read_text()))
    other = json.dumps({token: i for i, token in enumerate([*tokens[:2], *reversed(tokens[2:])])})
    vocabulary.write_text(other)
    shutil.rmtree(tmp_path / "out" / "text-diffusion.work", ignore_errors=True)
    assert train("text", "diffusion", "--epochs", 1, first="kl").code == 0
    assert vocabulary.read_text() == other


def test_bad_input_is_one_sentence_before_any_training(train, call, steps, tmp_path):
    assert train("vq", "first", "--epochs", 1).code == 0
    steps.clear()
    first = tmp_path / "out" / "vq-first"
    assert "needs --first_stage" in train("vq", "first", "--first_stage", first).error_line()
    fixed = ("--config", tmp_path / "vq.yaml", "--out", tmp_path / "new", "--stage", "diffusion", "--threads", 1)
    assert "needs --first_stage" in call(SCRIPT, *fixed).error_line()
    assert "none does not exist" in call(SCRIPT, *fixed, "--first_stage", "none").error_line()
    assert (
        "kl.yaml does not exist"
        in call(SCRIPT, *fixed, "--first_stage", first, "--config", tmp_path / "kl.yaml").error_line()
    )
    assert "--stage" in call(SCRIPT, *fixed, "--stage", "second").error_line()
    for option, value in (("--epochs", 0), ("--epochs", -1), ("--threads", 0)):
        line = call(SCRIPT, *fixed, "--first_stage", first, option, value).error_line()
        assert f"{option} is {value}" in line
    assert "cannot be written" in call(SCRIPT, *fixed, "--first_stage", first, "--out", first / "w").error_line()
    # Weights of another first stage, of none, and a file that is damaged.
    assert "vq-first does not hold the weights" in train("kl", "diffusion").error_line()
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "foreign")
    assert "tensors missing" in call(SCRIPT, *fixed, "--first_stage", tmp_path / "foreign").error_line()
    (tmp_path / "damaged").write_bytes(first.read_bytes()[:-100])
    assert "damaged" in call(SCRIPT, *fixed, "--first_stage", tmp_path / "damaged").error_line()
    # A config that does not say how to train.
    for part in ("training", "data"):
        made = config("vq", tmp_path)
        del made[part]
        (tmp_path / "untrained.yaml").write_text(yaml.safe_dump(made))
        options = ("--config", tmp_path / "untrained.yaml", "--first_stage", first)
        assert "has no data or training.diffusion" in call(SCRIPT, *fixed, *options).error_line()
    assert steps == [] and not (tmp_path / "new").exists()
