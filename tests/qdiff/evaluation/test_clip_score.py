"""The CLIP score on a tiny random CLIP, against a cosine from the model's own towers."""

from __future__ import annotations

import json
import shutil
import socket

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from ldm.data.captions import all_captions, write_tokenizer
from qdiff.errors import UserError
from qdiff.evaluation.clip_score import clip_scores
from qdiff.evaluation.image_sets import open_images

SCORE_TOLERANCE = 1e-4  # of 100: float32 towers, other batch sizes
LENGTH, SIDE, WIDTH = 8, 16, 24
TEXT = {"vocab_size": 160, "max_position_embeddings": LENGTH, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TOWER = {"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = ["the digit four", "a handwritten seven", "the digit four", "a scan of the number nine", "zero"]
LONG = "a scan of the number nine and seven and one"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # Radford et al. 2021


@pytest.fixture(autouse=True)
def no_request(monkeypatch, tmp_path):
    """An empty cache, and not even an attempt to reach a network (huggingface_hub would swallow its failure)."""
    asked = []

    def refuse(host, *args, **kwargs):
        asked.append(host)
        raise OSError(f"no network in tests (asked for {host})")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    assert not asked


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tiny CLIP; weights large enough that embeddings differ."""
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    write_tokenizer(folder, all_captions(), vocab_size=160, max_length=LENGTH)
    vision = TOWER | {"image_size": SIDE, "patch_size": 4}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=TEXT | TOWER, vision_config=vision, projection_dim=6))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                torch.nn.init.normal_(parameter, std=0.5)
            elif "norm" not in name:
                torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    sides = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
    CLIPImageProcessor(**sides).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    """A copy that a test may spoil."""
    return shutil.copytree(made, tmp_path / "clip")


def pictures(count=5, height=SIDE, width=SIDE, seed=7):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def score(images, prompts, model, **options):
    return clip_scores(open_images(images), prompts, model, progress=False, **options)


@torch.no_grad()
def cosines(folder, images, prompts, std=STD, end=1):
    """One image and one text at a time through the two towers; cosines in float64 [N]."""
    model = CLIPModel.from_pretrained(folder).eval()
    vocabulary = json.loads((folder / "vocab.json").read_text())
    values = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = (image / 255 - np.array(MEAN)) / np.array(std)
        seen = model.vision_model(torch.from_numpy(pixels.transpose(2, 0, 1)[None]).float()).pooler_output
        # All words of the captions are tokens of their own: start, words, end.
        tokens = torch.tensor([[0, *(vocabulary[f"{word}</w>"] for word in prompt.split()), end]])
        read = model.text_model(tokens).last_hidden_state[:, -1]
        u = (model.visual_projection.weight.double() @ seen[0].double()).numpy()
        v = (model.text_projection.weight.double() @ read[0].double()).numpy()
        values.append(float(u @ v / np.linalg.norm(u) / np.linalg.norm(v)))
    return np.array(values)


@pytest.mark.slow
def test_the_score_is_the_mean_cosine(made):
    images = pictures()
    each = cosines(made, images, PROMPTS)
    expected = 100 * np.maximum(each, 0)
    assert each.min() < -0.01 and (each > 0.01).sum() >= 2 and np.ptp(expected) > 1  # the example shows something
    found = score(images, PROMPTS, made, batch_size=2)
    assert found.keys() == {
        "clip_score",
        "clip_score_spread",
        "clip_truncated",
        "clip_model",
        "clip_weights_hash",
    }
    assert found["clip_score"] == pytest.approx(expected.mean(), abs=SCORE_TOLERANCE)
    assert found["clip_score_spread"] == pytest.approx(expected.std(), abs=SCORE_TOLERANCE)
    assert found["clip_truncated"] == 0 and found["clip_model"] == str(made)
    # What the tolerance breaks on: no clamp, another normalisation, no end of text, prompts out of order.
    for planted in (
        each,
        cosines(made, images, PROMPTS, std=MEAN).clip(0),
        cosines(made, images, PROMPTS, end=2).clip(0),
        cosines(made, images, PROMPTS[::-1]).clip(0),
    ):
        assert abs(100 * planted.mean() - expected.mean()) > 100 * SCORE_TOLERANCE


@pytest.mark.slow
def test_neither_batches_nor_containers_matter(made):
    images = pictures()
    expected = score(images, PROMPTS, made)
    for size in (1, 3):
        again = score(images, tuple(PROMPTS), str(made), batch_size=size)
        assert again == pytest.approx(expected, abs=SCORE_TOLERANCE)
    alone = [score(images[i : i + 1], PROMPTS[i : i + 1], made) for i in range(5)]
    assert np.mean([a["clip_score"] for a in alone]) == pytest.approx(expected["clip_score"], abs=SCORE_TOLERANCE)
    assert {a["clip_score_spread"] for a in alone} == {0.0}


def test_images_of_any_size_become_the_models_own(made):
    small = pictures(count=2)
    large = small.repeat(2, 1).repeat(2, 2)  # bicubic shrinking does not undo it exactly
    wide = np.concatenate([np.zeros_like(small), small, np.zeros_like(small)], axis=2)
    expected = score(small, PROMPTS[:2], made)["clip_score"]
    assert score(wide, PROMPTS[:2], made)["clip_score"] == pytest.approx(expected, abs=SCORE_TOLERANCE)
    assert score(large, PROMPTS[:2], made)["clip_score"] >= 0
    assert score(pictures(count=2, height=4, width=5), PROMPTS[:2], made)["clip_score"] >= 0


def test_each_prompt_is_embedded_once(made, monkeypatch):
    seen = []
    original = CLIPModel.get_text_features
    monkeypatch.setattr(
        CLIPModel, "get_text_features", lambda self, **inputs: seen.append(inputs) or original(self, **inputs)
    )
    score(pictures(), PROMPTS, made)
    assert sum(len(inputs["input_ids"]) for inputs in seen) == len(set(PROMPTS)) == 4


def test_long_prompts_are_cut_and_counted(made):
    images = pictures()
    cut = score(images, [LONG, LONG, *PROMPTS[2:]], made)
    assert cut.pop("clip_truncated") == 2
    fits = " ".join(LONG.split()[: LENGTH - 2])
    expected = score(images, [fits, fits, *PROMPTS[2:]], made)
    assert expected.pop("clip_truncated") == 0
    assert cut == pytest.approx(expected, abs=SCORE_TOLERANCE)


def test_the_hash_is_that_of_the_weights(made, folder):
    images, prompts = pictures(1), PROMPTS[:1]
    expected = score(images, prompts, made)["clip_weights_hash"]
    assert len(expected) == 64
    assert score(images, prompts, folder)["clip_weights_hash"] == expected
    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"][0, 0] += 1
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    assert score(images, prompts, folder)["clip_weights_hash"] != expected


def test_half_precision_weights_run_in_float32(folder):
    images = pictures()
    CLIPModel.from_pretrained(folder).half().save_pretrained(folder)
    found = score(images, PROMPTS, folder)
    CLIPModel.from_pretrained(folder).float().save_pretrained(folder)
    assert score(images, PROMPTS, folder) == found


def test_a_model_in_the_cache_needs_no_network(made, tmp_path):
    commit = "0" * 40
    entry = tmp_path / "hub" / "models--someone--tiny"
    shutil.copytree(made, entry / "snapshots" / commit)
    (entry / "refs").mkdir()
    (entry / "refs" / "main").write_text(commit)
    found = score(pictures(), PROMPTS, "someone/tiny")
    assert found.pop("clip_model") == "someone/tiny"
    expected = score(pictures(), PROMPTS, made)
    del expected["clip_model"]
    assert found == expected


def test_downloads_are_made_when_asked_for_alone(monkeypatch):
    only_local = []

    def record(*args, local_files_only, **kwargs):
        only_local.append(local_files_only)
        raise OSError("stopped here")

    monkeypatch.setattr("transformers.utils.cached_file", record)
    says(lambda: score(pictures(), PROMPTS, "someone/else"))
    assert only_local == []
    says(lambda: score(pictures(), PROMPTS, "someone/else", download=True))
    assert set(only_local) == {False}


# ---------------------------------------------------------------------- what cannot be scored


def says(call):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def says_where_to_get_it(model):
    message = says(lambda: score(pictures(), PROMPTS, model))
    assert str(model) in message and "openai/clip-vit-large-patch14" in message
    assert "--clip-model FOLDER" in message and "--download" in message
    return message


def test_prompts_must_match_images(made):
    assert "5 images" in says(lambda: score(pictures(), PROMPTS[:4], made))
    assert "one string" in says(lambda: score(pictures(4), "zero", made))


def test_missing_models_are_told(tmp_path):
    says_where_to_get_it("openai/clip-vit-large-patch14")
    says_where_to_get_it(tmp_path / "nowhere")
    says_where_to_get_it(str(tmp_path / "nowhere"))
    says_where_to_get_it(tmp_path)


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("model.safetensors", "weights"),
        ("config.json", "weights"),
        ("vocab.json", "tokenizer"),
        ("merges.txt", "tokenizer"),
        ("preprocessor_config.json", "image processor"),
    ],
)
def test_missing_files_are_told(folder, name, what):
    (folder / name).unlink()
    assert f"the {what} of the CLIP model" in says_where_to_get_it(folder)


@pytest.mark.slow
def test_weights_with_gaps_are_told(folder, capfd):
    path = folder / "model.safetensors"
    state = load_file(path)
    name = "visual_projection.weight"
    kept = {n: v for n, v in state.items() if n != name}
    save_file(kept, path, metadata={"format": "pt"})
    message = says_where_to_get_it(folder)
    assert "1 tensors are missing" in message and name in message
    save_file(kept | {name: torch.zeros(6, 5)}, path, metadata={"format": "pt"})
    says_where_to_get_it(folder)
    path.write_bytes(path.read_bytes()[:100])
    says_where_to_get_it(folder)
    assert "MISSING" not in "".join(capfd.readouterr()), "the message says it"
    assert transformers.utils.logging.is_progress_bar_enabled()
    transformers.CLIPTextModel(transformers.CLIPTextConfig(**TEXT, **TOWER)).save_pretrained(folder)
    says_where_to_get_it(folder)


def test_files_of_different_models_are_told(folder):
    def edit(name, change):
        path = folder / name
        kept = path.read_text()
        content = json.loads(kept)
        change(content)
        path.write_text(json.dumps(content))
        message = says_where_to_get_it(folder)
        path.write_text(kept)
        assert "do not belong together" in message
        return message

    def keep_two(words):
        for word in list(words)[2:]:
            del words[word]

    def fewer_pixels(config):
        config["size"], config["crop_size"] = {"shortest_edge": 8}, {"height": 8, "width": 8}

    assert "168" in edit("vocab.json", lambda words: words.update({f"x{i}": 160 + i for i in range(9)}))
    assert "token 1" in edit("config.json", lambda config: config["text_config"].update(eos_token_id=7))
    assert "token 1" in edit("config.json", lambda config: config["text_config"].update(eos_token_id=2))
    assert "8×8" in edit("preprocessor_config.json", fewer_pixels)
    (folder / "merges.txt").write_text("#version: 0.2\n")
    assert "tokenizer has 2 tokens" in edit("vocab.json", keep_two)
