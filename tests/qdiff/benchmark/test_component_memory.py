"""Counting, writing and packing a diffusers network with random weights."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("diffusers")

import torch

from qdiff.benchmark import component_memory
from qdiff.benchmark.component_memory import SDXL, build, count, inputs_of, write_random
from qdiff.config import QuantConfig

pytestmark = pytest.mark.slow

TINY = {
    **SDXL,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "transformer_layers_per_block": (1, 1),
    "attention_head_dim": (2, 2),
    "cross_attention_dim": 16,
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 32,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(component_memory, "NETWORKS", {"tiny": TINY})


def test_counted_from_shapes():
    found = count("tiny", QuantConfig(weight_bits=4, act_bits=8))
    assert found["parameters"] == sum(p.numel() for p in build("tiny").parameters())
    assert found["float size_bytes"] == 4 * found["parameters"]
    assert found["quantized size_bytes"] < 0.4 * found["float size_bytes"]  # ranges weigh more in a tiny network
    assert found["quantized bops"] < found["float bops"] / 16
    assert found["units"] > 15 and found["calibration"].startswith("about ")


def test_random_weights_are_packed_saved_and_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(component_memory, "SHARD", 1 << 16)
    written = write_random("tiny", tmp_path / "float")
    index = json.loads((tmp_path / "float" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert written == index["metadata"]["total_size"] and len(set(index["weight_map"].values())) > 2
    network = component_memory._pack(tmp_path / "float", 4)
    assert network.conv_in.packed.bits == 4 and network.dtype == torch.float16
    component_memory._save(tmp_path / "float", tmp_path / "small", 4)
    loaded = component_memory._load(tmp_path / "small")
    assert {n: t.shape for n, t in loaded.state_dict().items()} == {n: t.shape for n, t in network.state_dict().items()}
    given = inputs_of(loaded, "cpu", batch=2)
    assert given["sample"].shape == (2, 4, 8, 8) and given["added_cond_kwargs"]["text_embeds"].shape == (2, 8)
