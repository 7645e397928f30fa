"""Encoders of conditions: classes, texts through a CLIP encoder, and the tokenizer that is made of captions."""

from __future__ import annotations

import json
import logging
import random

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from ldm.data.captions import SIGNS, TEMPLATES, WORDS, all_captions, random_caption, write_tokenizer
from ldm.modules.encoders import modules
from ldm.modules.encoders.modules import ClassEmbedder, FrozenCLIPEmbedder
from qdiff.errors import UserError

LENGTH = 8
CONFIG = {
    "vocab_size": 160,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path_factory):
    """No cache of this machine, and no network (a look-up would fail as one in tests/conftest.py)."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    empty = str(tmp_path_factory.mktemp("hub"))
    monkeypatch.setenv("HF_HOME", empty)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", empty)


@pytest.fixture
def folder(tmp_path):
    """An encoder's folder with tokenizer and architecture, without weights."""
    made = tmp_path / "text_encoder"
    write_tokenizer(made, all_captions(), vocab_size=160, max_length=LENGTH)
    CLIPTextConfig(**CONFIG).save_pretrained(made)
    return made


def test_classes():
    embedder = ClassEmbedder(6, n_classes=5)
    assert embedder.unconditional == 4
    for labels in ([3, 0], torch.tensor([3, 0]), torch.tensor([3, 0], dtype=torch.int32)):
        context = embedder(labels)
        assert context.shape == (2, 1, 6)
        assert torch.equal(context[:, 0], embedder.embedding.weight[[3, 0]])


@torch.no_grad()
def test_texts(folder):
    torch.manual_seed(0)
    embedder = FrozenCLIPEmbedder(version=str(folder)).eval()
    assert all(name.startswith("transformer.text_model.") for name in embedder.state_dict())
    assert embedder.max_length == LENGTH and embedder.unconditional == ""
    context = embedder(["seven", "a handwritten digit four", ""])
    assert context.shape == (3, LENGTH, 16)
    # The encoder itself on hand-made tokens: start, the word, end, and padding with end.
    vocabulary = json.loads((folder / "vocab.json").read_text())
    tokens = torch.full((1, LENGTH), 1)
    tokens[0, :2] = torch.tensor([0, vocabulary["seven</w>"]])
    expected = embedder.transformer.text_model(input_ids=tokens).last_hidden_state
    torch.testing.assert_close(context[:1], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(context[1], context[0], atol=1e-2)
    assert torch.equal(embedder(("seven",)), embedder(["SEVEN"]))
    # Tokens see those before them alone, and what is returned has passed the last norm.
    four, nine = embedder(["the digit four", "the digit nine"])
    torch.testing.assert_close(four[:3], nine[:3], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(four[3:], nine[3:], atol=1e-2)
    assert float(context.mean(-1).abs().max()) < 1e-6
    assert FrozenCLIPEmbedder(str(folder), device="cuda", max_length=5)(["seven"]).shape == (1, 5, 16)


def test_what_does_not_fit_is_told(folder, caplog):
    embedder = FrozenCLIPEmbedder(str(folder))
    fits = "a scan of the number nine"  # six words, start and end
    with caplog.at_level(logging.WARNING):
        assert embedder.cut(fits) == ""
        assert embedder.cut("") == ""
        assert embedder.cut(f"{fits} six seven") == "six seven"
    assert not caplog.records
    with torch.no_grad():
        assert torch.equal(embedder([f"{fits} six seven"]), embedder([fits]))


def test_weights_from_a_local_folder(folder):
    torch.manual_seed(1)
    source = CLIPTextModel(CLIPTextConfig(**CONFIG)).half()
    source.save_pretrained(folder)
    torch.manual_seed(2)
    embedder = FrozenCLIPEmbedder(str(folder))
    ours = dict(embedder.transformer.text_model.named_parameters())
    theirs = dict(getattr(source, "text_model", source).named_parameters())
    assert ours.keys() == theirs.keys()
    assert not all(torch.equal(ours[n], theirs[n].float()) for n in ours)
    embedder.load_pretrained()
    assert all(torch.equal(ours[n], theirs[n].float()) for n in ours)
    assert {p.dtype for p in embedder.parameters()} == {torch.float32}


def test_relative_folders_count_from_the_repository_too(folder, monkeypatch, tmp_path):
    monkeypatch.setattr(modules, "REPOSITORY", tmp_path)
    monkeypatch.chdir(tmp_path_elsewhere := tmp_path / "text_encoder")
    assert not (tmp_path_elsewhere / "text_encoder").exists()
    assert FrozenCLIPEmbedder("text_encoder").version == str(folder)
    monkeypatch.chdir(tmp_path)
    assert FrozenCLIPEmbedder("text_encoder").tokenizer is not None


def says_how_to_mend(call, version):
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert version in message and "hf download" in message and "HF_HOME" in message and "local folder" in message
    assert "\n" not in message


def test_without_network_the_error_says_how_to_mend_it(folder, monkeypatch):
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(modules, "_CLIP_VIT_L_14_TEXT", modules._CLIP_VIT_L_14_TEXT | small)
    embedder = FrozenCLIPEmbedder()  # its architecture is known
    says_how_to_mend(lambda: embedder(["text"]), modules.CLIP_VIT_L_14)
    says_how_to_mend(lambda: embedder.cut("text"), modules.CLIP_VIT_L_14)
    says_how_to_mend(embedder.load_pretrained, modules.CLIP_VIT_L_14)
    says_how_to_mend(lambda: FrozenCLIPEmbedder("someone/else"), "someone/else")
    says_how_to_mend(FrozenCLIPEmbedder(str(folder)).load_pretrained, str(folder))  # no weights there
    for name in ("merges.txt", "vocab.json"):  # transformers 5 takes a folder without them as a tokenizer without words
        (folder / name).unlink()
        says_how_to_mend(lambda: FrozenCLIPEmbedder(str(folder))(["seven"]), str(folder))


# ---------------------------------------------------------------------- captions


def test_captions_name_the_digit():
    made = {random_caption(7, random.Random(seed)) for seed in range(100)}
    assert made == {template.format("seven") for template in TEMPLATES}
    assert len(all_captions()) == len(set(all_captions())) == len(TEMPLATES) * len(WORDS)
    assert random_caption(3, random.Random(5)) == random_caption(3, random.Random(5))


def test_tokenizer_knows_every_caption_and_sign(folder):
    tokenizer = FrozenCLIPEmbedder(str(folder)).tokenizer
    for caption in all_captions():
        tokens = tokenizer(caption, add_special_tokens=False)["input_ids"]
        assert len(tokens) == len(caption.split()), "every word of a caption is one token"
        assert tokenizer.decode(tokens) == caption
    unknown = tokenizer.unk_token_id
    for word in (*SIGNS, *(f"{s}z" for s in SIGNS), "quick", "7up"):
        assert unknown not in tokenizer(word, add_special_tokens=False)["input_ids"], word
    assert unknown in tokenizer("ß", add_special_tokens=False)["input_ids"]
    assert tokenizer.model_max_length == LENGTH


def test_the_same_texts_give_the_same_tokenizer(folder, tmp_path):
    """Numbers of tokens that changed between two commands would make noise of trained weights."""
    for i in range(3):
        write_tokenizer(tmp_path / str(i), all_captions(), vocab_size=160, max_length=LENGTH)
        for path in (tmp_path / str(i)).iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


@pytest.mark.parametrize("size", [86, 100, 145, 300])
def test_vocabularies_keep_to_their_size(size, tmp_path):
    write_tokenizer(tmp_path, all_captions(), vocab_size=size, max_length=LENGTH)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert len(vocabulary) <= size
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    with pytest.raises(UserError, match="cannot hold all signs"):
        write_tokenizer(tmp_path, all_captions(), vocab_size=85, max_length=LENGTH)
