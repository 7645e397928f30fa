"""Widths of single layers in a pipeline of diffusers: its own names, chosen widths, and the folder that is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("diffusers")

import quantize_pipeline
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

from qdiff.modes import quantized_layers
from qdiff.weight_forms import WeightForm

DIT = str(Path(__file__).parents[2] / "models" / "dit_digits")
WORDS = ["--steps", "2", "--weight_bit", "4", "--quant_act", "--method", "linear", "--cali_st", "2", "--cali_n", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8,),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    path = tmp_path_factory.mktemp("pipeline") / "small"
    DDIMPipeline(network, DDIMScheduler()).save_pretrained(path)
    return path


@pytest.mark.slow
@torch.no_grad()
def test_widths_are_chosen_and_written(folder, tmp_path):
    out, run = tmp_path / "small", tmp_path / "run"
    widths = ["--layer_bits", "first=A16,conv_out=W32", "--target_bits", "5.5", "--candidate_bits", "3,8"]
    quantize_pipeline.main([str(folder), "--out", str(out), *WORDS, *widths, "-l", str(run), "--device", "cpu"])
    chosen = json.loads((run / "widths.json").read_text())
    assert chosen["mean_bits"] <= 5.5 and chosen["layer_bits"]["conv_in"] in ("W3A16", "W8A16")
    stored = json.loads((out / "unet" / "config.json").read_text())["quantization_config"]["layer_bits"]
    assert stored == chosen["layer_bits"]
    layers = quantized_layers(DiffusionPipeline.from_pretrained(out).unet)
    assert {n: len(layer.weight_quantizers) for n, layer in layers.items() if n == "conv_out"} == {"conv_out": 0}
    assert [q.bits for q in layers["conv_in"].act_quantizers] == [16]
    found = {n: f"W{layer.weight_quantizers[0].bits}" for n, layer in layers.items() if len(layer.weight_quantizers)}
    assert found == {n: bits.partition("A")[0] for n, bits in chosen["layer_bits"].items() if n in found}


@pytest.mark.slow
def test_grip_chooses_through_the_pipelines_loop(folder, tmp_path):
    grip = [*WORDS[:5], "--method", "grip", "--cali_st", "2", "--cali_n", "2", "--device", "cpu"]
    for name, more in {"chosen": [], "uniform": ["--uniform_widths"]}.items():
        out, run = str(tmp_path / f"{name}-out"), str(tmp_path / name)
        quantize_pipeline.main([str(folder), "--out", out, *grip, *more, "-l", run])
    assert not (tmp_path / "uniform" / "widths.json").exists()
    found = json.loads((tmp_path / "chosen" / "sensitivities.json").read_text())
    assert found["settings"]["measure"] == "trajectory"
    widths = json.loads((tmp_path / "chosen" / "widths.json").read_text())["layer_bits"]
    stored = json.loads((tmp_path / "chosen-out" / "unet" / "config.json").read_text())["quantization_config"]
    assert stored["layer_bits"] == widths and len(set(widths.values())) > 3


@pytest.mark.slow
def test_a_network_that_is_split_nowhere_is_loaded_again(tmp_path):
    out, words = (
        tmp_path / "dit",
        [*WORDS[:5], "--method", "grip", "--uniform_widths", "--cali_st", "2", "--cali_n", "2"],
    )
    quantize_pipeline.main([DIT, "--out", str(out), *words, "-l", str(tmp_path / "run"), "--device", "cpu"])
    assert not json.loads((out / "transformer" / "config.json").read_text())["quantization_config"]["split_shortcut"]
    layers = quantized_layers(DiffusionPipeline.from_pretrained(out).transformer)
    assert layers and all(layer.form is WeightForm.PACKED for layer in layers.values())

    again = [str(out), "--out", str(tmp_path / "twice"), *words, "-l", str(tmp_path / "again"), "--device", "cpu"]
    for more in ([], ["--target_bits", "4"]):
        with pytest.raises(SystemExit) as stopped:
            quantize_pipeline.main([*(word for word in again if not more or word != "--uniform_widths"), *more])
        assert stopped.value.code == 2 and not (tmp_path / "again").exists()


def test_a_wrong_name_is_told_in_the_pipelines_names(folder, tmp_path, capsys):
    words = [*WORDS, "--layer_bits", "conv_inn=W8", "-l", str(tmp_path / "run"), "--device", "cpu"]
    with pytest.raises(SystemExit):
        quantize_pipeline.main([str(folder), "--out", str(tmp_path / "small"), *words])
    assert "names conv_inn, which is no layer of Denoiser; give a layer's name, e.g. conv_in" in capsys.readouterr().err
