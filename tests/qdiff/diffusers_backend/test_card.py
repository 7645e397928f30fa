"""The model card beside a component's weights, and the config that it is written from."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

import diffusers
import torch
from components import quantized, read_inputs
from tiny_models import MODELS, unet

import qdiff
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.card import card_of
from qdiff.diffusers_backend.config import QDiffConfig
from qdiff.errors import UserError


def test_what_the_card_says(quantized_folder):
    text = (quantized_folder / "unet" / "README.md").read_text()
    notes = json.loads((quantized_folder / "unet" / "config.json").read_text())["quantization_config"]["notes"]
    head, body = text.split("---\n")[1:]
    assert head.splitlines() == ["base_model: unknown", "base_model_relation: quantized", "library_name: diffusers"]
    for row in (
        "| weights | 4 bits, one range per output channel |",
        "| activations | 8 bits |",
        "| softmax outputs | 8 bits |",
        "| method | linear |",
        "| calibration | 4 images at 2 of the pipeline's steps |",
        f"| noise error | {notes['noise_error']} |",
        "| layers left in float | 0 |",
    ):
        assert row in body
    assert "import qdiff" in body and "licence" in body


def test_the_base_model_is_named(float_folder, tmp_path):
    network = diffusers.UNet2DModel.from_pretrained(
        float_folder / "unet", quantization_config=qdiff.QDiffConfig(weight_bits=4)
    )
    text = card_of(network)
    assert f"base_model: {float_folder / 'unet'}" in text and "| activations | float |" in text
    assert "| method | nearest rounding, no calibration |" in text
    network.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


def test_a_loaded_component_writes_its_card_again(quantized_folder, tmp_path):
    network = diffusers.UNet2DModel.from_pretrained(quantized_folder / "unet")
    network.save_pretrained(tmp_path)
    before = (quantized_folder / "unet" / "README.md").read_text().splitlines()
    after = (tmp_path / "README.md").read_text().splitlines()
    assert [line for line in after if line.startswith("|")] == [line for line in before if line.startswith("|")]


def test_float_components_write_none(tmp_path):
    unet().save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


def test_what_stays_in_float_is_in_the_config_and_counted(tmp_path):
    torch.manual_seed(0)
    network = MODELS["Sana"].make()
    call, samples = read_inputs(network, MODELS["Sana"].inputs(2))
    quantized(network, QuantConfig(4, 8), "linear", None, call, samples)
    network.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert set(stored["left_in_float"]) == {"transformer_blocks.0.attn1", "transformer_blocks.1.attn1"}
    assert "| layers left in float | 2 |" in (tmp_path / "README.md").read_text()


def test_a_config_is_what_its_dict_says():
    config = QDiffConfig(
        weight_bits=4, act_bits=8, attention={"attn": 1}, left_in_float={"x": "why"}, ends=["a", "b"], notes={"seed": 1}
    )
    values = json.loads(json.dumps(config.to_dict()))
    assert QDiffConfig.from_dict(values).to_dict() == values
    assert values["quant_method"] == "qdiff" and values["format_version"] == 1
    assert QDiffConfig(weight_bits=4).to_dict().keys() >= {"weight_bits", "act_bits", "quant_method"}
    assert "attention" not in QDiffConfig(weight_bits=4).to_dict()
    with pytest.raises(UserError, match=r"unknown keys \(weigth_bits\)"):
        QDiffConfig(weigth_bits=4)
