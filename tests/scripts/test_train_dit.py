"""The training command of a class-conditional DiT, in small: a folder that diffusers loads, continuing, bad input."""

from __future__ import annotations

import pytest
import torch
import yaml

diffusers = pytest.importorskip("diffusers")

SCRIPT = "train_dit"
IMAGES, BATCH = 20, 8
STEPS_PER_EPOCH = 2  # 20 images in full batches of 8
OPTIM = {"lr": 0.001, "warmup_steps": 2, "beta1": 0.9, "eps": 1e-8, "weight_decay": 0.0, "grad_clip": 1.0}
TRANSFORMER = {"num_attention_heads": 2, "attention_head_dim": 4, "in_channels": 2, "out_channels": 2, "num_layers": 1}
TRANSFORMER |= {"sample_size": 4, "patch_size": 1, "num_embeds_ada_norm": 1000}
UNET = {"block_out_channels": (8,), "norm_num_groups": 4, "layers_per_block": 1}
UNET |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}


def config(**transformer):
    return {
        "transformer": TRANSFORMER | transformer,
        "data": {"dataset": "DIGITS", "image_size": 8, "channels": 3},
        "training": {"n_epochs": 3, "batch_size": BATCH, "ema_rate": 0.5, "condition_dropout": 0.5, "optim": OPTIM},
    }


@pytest.fixture
def train(call, tmp_path, monkeypatch):
    """``train(config, *more)`` on 20 random images of 8×8, everything in tmp_path; writes ``dit``."""
    import ldm.transformer

    torch.manual_seed(0)
    images = torch.rand(IMAGES, 3, 8, 8) * 2 - 1
    monkeypatch.setattr(ldm.transformer, "load_training_images", lambda data: images)
    monkeypatch.setattr(ldm.transformer, "load_training_labels", lambda data: torch.arange(IMAGES) % 10)
    monkeypatch.chdir(tmp_path)
    two = {"block_out_channels": (4, 4), "norm_num_groups": 2, "latent_channels": 2, "sample_size": 8}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = diffusers.AutoencoderKL(**two, **blocks)
    unet = diffusers.UNet2DModel(4, 2, 2, **UNET)
    diffusers.LDMPipeline(vae, unet, diffusers.DDIMScheduler(clip_sample=False)).save_pretrained(tmp_path / "first")

    def run(config, *more):
        (tmp_path / "dit.yaml").write_text(yaml.safe_dump(config))
        files = ("--config", tmp_path / "dit.yaml", "--first_stage", tmp_path / "first", "--out", tmp_path / "dit")
        return call(SCRIPT, *files, "--threads", 1, *more)

    return run


@pytest.fixture
def labels(monkeypatch):
    """The labels of all training steps: a list that grows."""
    from ldm.transformer import ClassConditionalTransformer

    seen, forward = [], ClassConditionalTransformer.forward

    def heard(self, x, t, classes):
        seen.append(classes)
        return forward(self, x, t, classes)

    monkeypatch.setattr(ClassConditionalTransformer, "forward", heard)
    return seen


def test_a_pipeline_that_diffusers_samples(train, labels, tmp_path):
    outcome = train(config())
    assert outcome.code == 0, outcome.err
    assert len(labels) == 3 * STEPS_PER_EPOCH
    counted = torch.cat(labels).tolist()
    dropped = counted.count(1000) / len(counted)
    assert 0.25 < dropped < 0.75 and set(counted) <= {*range(10), 1000}
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "dit")
    assert type(pipe) is diffusers.DiTPipeline and next(pipe.transformer.parameters()).dtype == torch.float32
    saved = pipe.transformer.state_dict()
    assert all(torch.equal(v, v.half().float()) for v in saved.values())
    # The zeros of the start were trained; images depend on the class.
    assert saved["transformer_blocks.0.norm1.linear.weight"].abs().max() > 0
    two = pipe([1, 2], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
    assert two.shape == (2, 8, 8, 3)


@pytest.mark.slow
def test_a_repeated_command_continues(train, labels, tmp_path):
    assert train(config(), "--epochs", 10).code == 0
    assert len(labels) == 10 * STEPS_PER_EPOCH
    labels.clear()
    assert "dit exists and is not an empty folder" in train(config(), "--epochs", 11).error_line()
    (tmp_path / "dit").rename(tmp_path / "first-run")
    assert train(config(), "--epochs", 11).code == 0
    assert len(labels) == STEPS_PER_EPOCH
    (tmp_path / "dit").rename(tmp_path / "second-run")
    assert "was trained with another seed" in train(config(), "--epochs", 12, "--seed", 7).error_line()


@pytest.mark.parametrize(
    ("values", "more", "sentence"),
    [
        ({"num_embeds_ada_norm": 10}, (), "transformer.num_embeds_ada_norm 10; DiTPipeline needs 1000"),
        ({"in_channels": 3}, (), "transformer.in_channels 3; the autoencoder needs 2"),
        ({"sample_size": 8}, (), "transformer.sample_size 8; the autoencoder needs 4"),
        ({"layers": 2}, (), "describes no DiT: "),
        ({}, ("--epochs", 0), "--epochs is 0; give at least 1"),
        ({}, ("--threads", 0), "--threads is 0; give at least 1"),
        ({}, ("--seed", -1), "--seed is -1; give 0 or more"),
        ({}, ("--first_stage", "nowhere"), "nowhere is no pipeline of diffusers"),
    ],
)
def test_bad_input_is_one_sentence(values, more, sentence, train, tmp_path):
    assert sentence in train(config(**values), *more).error_line()
    assert not (tmp_path / "dit").exists()


def test_an_unknown_key_is_named(train):
    wrong = config()
    wrong["training"]["epochs"] = 3
    assert "the unknown key training.epochs; did you mean n_epochs?" in train(wrong).error_line()


def test_a_folder_without_an_autoencoder(train, tmp_path):
    unet = diffusers.UNet2DModel(4, 2, 2, **UNET)
    diffusers.DDIMPipeline(unet, diffusers.DDIMScheduler()).save_pretrained(tmp_path / "pixels")
    assert "has no AutoencoderKL with a scheduler" in train(config(), "--first_stage", "pixels").error_line()
