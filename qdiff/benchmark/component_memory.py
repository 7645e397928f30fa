"""Size, work and memory of a diffusers network at full size with random weights: packing, saving and loading it."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.benchmark.fresh_process import FreshProcess, ProcessMemory
from qdiff.calibration.footprint import measure_footprint
from qdiff.calibration.memory_plan import plan_memory
from qdiff.config import QuantConfig
from qdiff.cost.account import account
from qdiff.io.diffusers_files import import_diffusers

# The published networks' arguments, as far as they differ from the defaults of UNet2DConditionModel.
SDXL = {
    "sample_size": 128,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
NETWORKS: Mapping[str, Mapping[str, Any]] = {
    "sd": {"sample_size": 64, "cross_attention_dim": 768},
    "sdxl": SDXL,
}
TOKENS = 77
SHARD = 2 << 30  # bytes
SAMPLES, BATCH, BUDGET = 64, 8, 16 << 30  # inputs, and bytes for their activations and the pass


def build(name: str) -> nn.Module:
    """Return the network on the meta device."""
    with torch.device("meta"):
        return import_diffusers().UNet2DConditionModel(**NETWORKS[name]).eval()


def inputs_of(network: nn.Module, device: str = "meta", batch: int = 1) -> dict[str, Any]:
    """Return the arguments of a call, zeros."""
    config = network.config
    size = (batch, config.in_channels, config.sample_size, config.sample_size)
    made: dict[str, Any] = {
        "sample": torch.zeros(size, device=device),
        "timestep": torch.zeros(batch, dtype=torch.long, device=device),
        "encoder_hidden_states": torch.zeros(batch, TOKENS, config.cross_attention_dim, device=device),
    }
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        made["added_cond_kwargs"] = {
            "text_embeds": torch.zeros(batch, pooled, device=device),
            "time_ids": torch.zeros(batch, 6, device=device),
        }
    return made


def count(name: str, config: QuantConfig) -> dict[str, Any]:
    """Return bytes and bit operations per call, in float and quantized, and the memory plan of a calibration on
    `SAMPLES` inputs in batches of `BATCH`, from shapes alone."""
    from qdiff.diffusers_backend.denoiser import read_call
    from qdiff.diffusers_backend.module import Denoiser
    from qdiff.quant_model import QuantModel

    network = build(name)
    denoiser = Denoiser(network)
    denoiser.describe(*read_call(network, (), inputs_of(network)))
    shapes = denoiser.input_shape, denoiser.context_shape
    found: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters())}
    found |= {f"float {k}": v for k, v in account(denoiser, *shapes).summary(1).items()}
    qnn = QuantModel(denoiser, config)
    found |= {f"quantized {k}": v for k, v in account(qnn, *shapes).summary(1).items()}
    steps = qnn.as_steps(denoiser.example_inputs())
    footprint = measure_footprint(steps, tuple(i[:1] for i in denoiser.example_inputs()))
    plan = plan_memory(qnn, footprint, SAMPLES, BATCH, BUDGET)
    return found | {"units": sum(1 for _ in steps.steps()), "calibration": str(plan)}


def write_random(name: str, folder: Path, dtype: torch.dtype = torch.float16) -> int:
    """Write a component's folder with random weights, shard by shard; return their bytes."""
    from safetensors.torch import save_file

    network = build(name)
    folder.mkdir(parents=True, exist_ok=True)
    network.save_config(folder)
    generator, places, total = torch.Generator().manual_seed(0), {}, 0
    shards = list(_shards(network, dtype))
    for number, names in enumerate(shards, 1):
        file = f"diffusion_pytorch_model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {n: _random(p, generator).to(dtype) for n, p in names.items()}
        save_file(tensors, folder / file)
        places |= dict.fromkeys(names, file)
        total += sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return total


def _shards(network: nn.Module, dtype: torch.dtype) -> Iterator[dict[str, Tensor]]:
    shard, size = {}, 0
    for name, tensor in network.state_dict().items():
        if shard and size + tensor.numel() * dtype.itemsize > SHARD:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.numel() * dtype.itemsize
    yield shard


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    values = torch.randn(like.shape, generator=generator)
    return values / max(1, like[0].numel()) ** 0.5 if like.dim() > 1 else values * 0.1


@dataclass(frozen=True)
class Measured:
    """Memory and seconds of one task in a fresh process."""

    memory: ProcessMemory
    seconds: float


def measure(folder: Path, config: QuantConfig) -> dict[str, Measured]:
    """Pack a random network while it is loaded, save it, and load it again, each in a fresh process.

    Args:
        folder: gets ``float`` and ``small``.
    """
    results = {}
    for title, task, args in (
        ("load float16 weights and pack them", _pack, (folder / "float", config.weight_bits)),
        ("write the packed file", _save, (folder / "float", folder / "small", config.weight_bits)),
        ("load the packed file", _load, (folder / "small",)),
    ):
        with FreshProcess() as process:
            process.run(_import_all)
            started = time.monotonic()
            memory = process.measured(task, *args)
            results[title] = Measured(memory, time.monotonic() - started)
    return results


def _import_all() -> None:
    """Import what the tasks import, so that the libraries' own memory is not counted."""
    importlib.import_module("accelerate")
    importlib.import_module("qdiff.diffusers_backend.registration")
    _ = import_diffusers().UNet2DConditionModel  # diffusers imports a class when it is first used


def _pack(folder: Path, bits: int) -> nn.Module:
    import qdiff

    kind = import_diffusers().UNet2DConditionModel
    return kind.from_pretrained(folder, quantization_config=qdiff.QDiffConfig(weight_bits=bits), dtype=torch.float16)


def _save(folder: Path, out: Path, bits: int) -> None:
    _pack(folder, bits).save_pretrained(out)


def _load(folder: Path) -> nn.Module:
    import qdiff  # noqa: F401, registers the backend

    return import_diffusers().UNet2DConditionModel.from_pretrained(folder, dtype=torch.float16)
