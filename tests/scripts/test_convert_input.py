"""What scripts/convert.py refuses: one sentence, exit code 2, and nothing is written."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from run_checks import succeeded
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

LIKE = {
    "unconditional": "sample_diffusion_ldm",
    "class": "sample_diffusion_ldm_imagenet",
    "text": "txt2img",
}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def converted(latent, call, tmp_path_factory):
    """``converted(kind)``: the folder of a tiny model's pipeline, made once."""
    parent, made = tmp_path_factory.mktemp("converted"), {}

    def folder(kind: str) -> Path:
        if kind not in made:
            # Few steps, because these models have few training timesteps.
            named = ("--config", latent(kind).config, "--ckpt", latent(kind).weights, "--ddim_steps", 2)
            named = ("-r", latent(kind).folder, "--seed", 1, "-c", 2) if kind == "unconditional" else named
            succeeded(call("convert", "--like", LIKE[kind], *named, "--out", parent / kind))
            made[kind] = parent / kind
        return made[kind]

    return folder


@pytest.fixture
def refused(call, converted, tmp_path):
    """``refused(kind, change)``: the error of reading a copy of the model's folder after ``change(folder)``."""

    def line(kind: str, change) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(converted(kind), folder)
        change(folder)
        found = call("convert", folder, "--to-papers", "--out", tmp_path / "back" / "model.safetensors").error_line()
        assert not (tmp_path / "back" / "model.safetensors").exists()
        assert not (tmp_path / "back" / "config.yaml").exists()
        return found

    return line


def edited(path: str, **changes):
    """Return a change of the JSON file at a path inside the folder."""

    def change(folder: Path) -> None:
        file = folder / path
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def without_tensor(component: str, name: str):
    def change(folder: Path) -> None:
        state = load_file(folder / component / WEIGHTS)
        del state[name]
        save_file(state, folder / component / WEIGHTS)

    return change


def truncated(folder: Path) -> None:
    file = folder / "vqvae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.slow
def test_existing_output_is_kept(call, tiny, converted, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.yaml").write_text("x")
    line = call("convert", *tiny.options[:4], "--out", tmp_path / "full").error_line()
    assert f"{tmp_path / 'full'} exists and is not an empty folder; choose another folder" in line
    back = ("--to-papers", "--out", tmp_path / "full" / "model.safetensors")
    line = call("convert", converted("unconditional"), *back).error_line()
    assert f"{tmp_path / 'full' / 'config.yaml'} exists; choose another folder, or delete it" in line
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["config.yaml"]
    (tmp_path / "text" / "text_encoder" / "file").mkdir(parents=True)
    back = ("--to-papers", "--out", tmp_path / "text" / "model.safetensors")
    assert "text_encoder exists and is not an empty folder" in call("convert", converted("text"), *back).error_line()


def test_no_pipeline(call, latent, tmp_path):
    for folder in (latent("class").folder, tmp_path / "none"):
        line = call("convert", folder, "--to-papers", "--out", tmp_path / "a" / "b").error_line()
        assert f"{folder} is no pipeline of diffusers (it has no model_index.json)" in line
    assert list(tmp_path.iterdir()) == []


NO_TEXTS = {"text_encoder": [None, None], "tokenizer": [None, None]}
SCHEDULER = "scheduler/scheduler_config.json"
OTHERS = [
    ("text", edited("model_index.json", text_encoder_2=["t", "T"]), "has the components scheduler, text_encoder, "),
    ("text", edited("model_index.json", text_encoder=["t", "T5"]), "is a T5; the papers' models have a CLIPTextModel"),
    ("text", edited("model_index.json", **NO_TEXTS), "is a UNet2DConditionModel, which does not fit the other"),
    ("text", edited("unet/config.json", addition_embed_type="image"), 'addition_embed_type "image", where a network'),
    ("text", lambda folder: shutil.rmtree(folder / "tokenizer"), "tokenizer is missing; get the pipeline's folder"),
    ("class", edited("class_embedder/config.json", _class_name="Other"), "is the config of a Other"),
    ("class", edited("class_embedder/config.json", num_classes=5), "of another shape (e.g. embedding.weight)"),
    ("class", edited("unet/config.json", _class_name="UNet1DModel"), "the networks of the papers are UNet2DModel or"),
    ("unconditional", edited("vqvae/config.json", norm_type="spatial"), 'has norm_type "spatial", where a network'),
    ("unconditional", without_tensor("unet", "conv_in.bias"), "1 tensors missing (e.g. conv_in.bias)"),
    ("unconditional", without_tensor("vqvae", "quant_conv.bias"), "1 tensors missing (e.g. quant_conv.bias)"),
    ("unconditional", truncated, "is damaged or truncated"),
    ("unconditional", lambda folder: (folder / SCHEDULER).unlink(), "is missing or is not JSON"),
    ("unconditional", edited(SCHEDULER, trained_betas=[0.01] * 40, beta_end=0.01), "the noise schedule const; latent"),
]


@pytest.mark.parametrize(("kind", "change", "match"), OTHERS)
def test_folders_of_other_models(refused, kind, change, match):
    assert match in refused(kind, change)


def test_without_the_library(call, tiny, converted, tmp_path, monkeypatch):
    folder = converted("class")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sentence = 'diffusers is not installed; pip install "qdiff[diffusers]"'
    assert sentence in call("convert", *tiny.options[:4], "--out", tmp_path / "out").error_line()
    assert sentence in call("convert", folder, "--to-papers", "--out", tmp_path / "out").error_line()
    assert list(tmp_path.iterdir()) == []


def test_missing_options(call, tiny, tmp_path):
    assert "--out" in call("convert", *tiny.options[:4]).error_line()
    assert "folder" in call("convert", "--to-papers", "--out", tmp_path / "out").error_line()
