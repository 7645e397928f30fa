"""The released models: names and shapes of every tensor, from the manifests of the released checkpoints."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from golden_cases import GOLDEN

from ldm import checkpoint
from ldm.checkpoint import build_without_weights
from ldm.config import load_config
from ldm.modules.encoders import modules as encoders
from ldm.util import instantiate_from_config
from qdiff.io.repository import REPOSITORY

UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
MODELS = ["lsun_bedrooms_ldm4", "lsun_churches_ldm8", "imagenet_cin256v2", "sd_v1"]
# Config files -> the model whose manifests they must fit.
CONFIGS = {
    "configs/latent-diffusion/lsun_bedrooms-ldm-vq-4.yaml": "lsun_bedrooms_ldm4",
    "configs/latent-diffusion/celebahq-ldm-vq-4.yaml": "lsun_bedrooms_ldm4",  # LDM-4 of the same size
    "configs/latent-diffusion/ffhq-ldm-vq-4.yaml": "lsun_bedrooms_ldm4",
    "configs/latent-diffusion/lsun_churches-ldm-kl-8.yaml": "lsun_churches_ldm8",
    "configs/latent-diffusion/cin256-v2.yaml": "imagenet_cin256v2",
    "configs/stable-diffusion/v1-inference.yaml": "sd_v1",
    "models/ldm/lsun_beds256/config.yaml": "lsun_bedrooms_ldm4",
    "models/ldm/celeba256/config.yaml": "lsun_bedrooms_ldm4",
    "models/ldm/ffhq256/config.yaml": "lsun_bedrooms_ldm4",
    "models/ldm/lsun_churches256/config.yaml": "lsun_churches_ldm8",
    "models/ldm/cin256/config.yaml": "imagenet_cin256v2",
    "models/ldm/stable-diffusion-v1/config.yaml": "sd_v1",
}


def manifest(model: str, part: str) -> dict:
    return json.loads((GOLDEN / "manifests" / f"{model}_{part}.json").read_text())


def differences(module: torch.nn.Module, expected: dict) -> set[str]:
    """Return the names that are missing, too many, or of another shape; and "parameters" where their number differs."""
    shapes = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    wrong = {n for n in shapes.keys() | expected["tensors"].keys() if shapes.get(n) != expected["tensors"].get(n)}
    counted = sum(p.numel() for p in module.parameters())
    return wrong | ({"parameters"} if counted != expected["parameters"] else set())


def built(config: dict) -> torch.nn.Module:
    with torch.device("meta"):
        return instantiate_from_config(config)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("part", ["unet", "first_stage"])
def test_arguments_of_a_released_config(model, part):
    expected = manifest(model, part)
    source = expected["source"]
    network = built({"target": UNET, "params": source["unet_params"]} if part == "unet" else source)
    assert differences(network, expected) == set()
    # Planted: one wrong shape, one wrong name.
    wrong = copy.deepcopy(expected)
    name = next(n for n, shape in wrong["tensors"].items() if len(shape) == 4)
    wrong["tensors"][name][1] += 1
    last = list(wrong["tensors"])[-1]
    wrong["tensors"][f"{last}s"] = wrong["tensors"].pop(last)
    assert differences(network, wrong) == {name, last, f"{last}s"}


def test_a_wrong_argument_is_seen():
    expected = manifest("lsun_bedrooms_ldm4", "unet")
    params = expected["source"]["unet_params"] | {"attention_resolutions": [8, 4]}
    assert "parameters" in differences(built({"target": UNET, "params": params}), expected)


@pytest.mark.parametrize("path", CONFIGS)
def test_config_files(path, monkeypatch):
    """As `load_latent_diffusion` builds them: on the meta device, so without gigabytes."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    monkeypatch.setattr(encoders, "_CLIP_VIT_L_14_TEXT", encoders._CLIP_VIT_L_14_TEXT | small)
    model = build_without_weights(load_config(REPOSITORY / path))
    for part, module in (("unet", model.network), ("first_stage", model.first_stage_model)):
        assert differences(module, manifest(CONFIGS[path], part)) == set()
        assert {p.device.type for p in module.parameters()} == {"meta"}
    prefixes = {name.split(".")[0] for name in model.state_dict()}
    assert prefixes <= {"model", "first_stage_model", "cond_stage_model", "scale_factor"}


def test_all_config_files_are_covered():
    there = [*REPOSITORY.glob("configs/latent-diffusion/*.yaml"), *REPOSITORY.glob("configs/stable-diffusion/*.yaml")]
    there += [p for p in REPOSITORY.glob("models/ldm/*/config.yaml") if "digits" not in p.parent.name]
    assert {str(p.relative_to(REPOSITORY)) for p in there} == CONFIGS.keys()


@pytest.mark.parametrize("name", ["vq", "kl", "class", "text"])
def test_bundled_configs_build(name):
    config = load_config(REPOSITORY / "models" / "ldm" / f"digits_{name}" / "config.yaml")
    model = build_without_weights(config)
    assert sum(p.numel() for p in model.network.parameters()) < 5e6
    assert model.network.in_channels == config.model.params.channels == model.first_stage_model.embed_dim


def test_names_of_the_stable_diffusion_text_encoder():
    """197 tensors of the released file but ``position_ids``, which transformers no longer keeps."""
    with torch.device("meta"):
        encoder = encoders.FrozenCLIPEmbedder()
    shapes = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    prefix, width = "transformer.text_model", 768
    expected = {
        f"{prefix}.embeddings.token_embedding.weight": (49408, width),
        f"{prefix}.embeddings.position_embedding.weight": (77, width),
    }
    linear = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
    linear |= {"mlp.fc1": (4 * width, width), "mlp.fc2": (width, 4 * width)}
    for i in range(12):
        layer = f"{prefix}.encoder.layers.{i}"
        expected |= {f"{layer}.{n}.weight": shape for n, shape in linear.items()}
        expected |= {f"{layer}.{n}.bias": shape[:1] for n, shape in linear.items()}
        expected |= {f"{layer}.layer_norm{j}.{kind}": (width,) for j in (1, 2) for kind in ("weight", "bias")}
    expected |= {f"{prefix}.final_layer_norm.{kind}": (width,) for kind in ("weight", "bias")}
    assert len(expected) == 196
    assert shapes == expected


@pytest.mark.parametrize("model", MODELS)
def test_averaged_names_are_unambiguous(model):
    """An average's name has lost its dots; two weights must not share one."""
    names = [f"diffusion_model.{n}" for n in manifest(model, "unet")["tensors"]]
    assert len({n.replace(".", "") for n in names}) == len(names)
    state = {f"model.{n}": torch.zeros(1) for n in names}
    state |= {f"{checkpoint.EMA}{n.replace('.', '')}": torch.ones(1) for n in names}
    checkpoint._take_averages(state, "path")
    assert all(bool(state[f"model.{n}"]) for n in names)
