"""The folder of a latent diffusion pipeline of diffusers as a checkpoint with its config; undoes `ldm.to_diffusers`."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ldm import diffusers_first_stage, diffusers_unet
from ldm.config import HOLDER, NOTHING, TARGETS
from ldm.diffusers_first_stage import KL, VQ, first_stage_config, first_stage_section
from ldm.diffusers_layout import first_stage_layout, unet_layout
from ldm.diffusers_unet import CONDITIONAL, NARROW, PLAIN, diffusers_class, plain_config, unet_config, unet_params
from ldm.modules.encoders.modules import ClassEmbedder, FrozenCLIPEmbedder
from ldm.schedule import BETA_SCHEDULES
from ldm.util import instantiate_from_config
from qdiff.errors import UserError
from qdiff.io.diffusers_files import (
    CONFIG,
    ReadComponent,
    check_same_config,
    complete_config,
    component_names,
    import_diffusers,
    read_json,
    read_weights,
    require_class,
    tensors_of,
)
from qdiff.io.files import check_new_folder, folder_written_whole
from qdiff.io.model_files import CONFIG_NAME, check_new_model, write_model
from qdiff.io.tensor_files import check_state
from qdiff.io.tensor_layout import NetworkLayout
from qdiff.sampling import BetaKind
from qdiff.sampling.diffusers_scheduler import training_noise_of

UNET, VAES, CLASSES, TEXTS, TOKENIZER = "unet", ("vqvae", "vae"), "class_embedder", "text_encoder", "tokenizer"
TEXT_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
IGNORED = ("scheduler", "safety_checker", "feature_extractor")


@dataclass(frozen=True, eq=False)
class _Component:
    """A network of a pipeline, whose architecture is one of the papers'.

    Attributes:
        folder: its folder.
        kind, config: its class in diffusers, and all arguments.
        section: target and params of ours.
        layout: see `NetworkLayout`, as a function of our network.
    """

    folder: Path
    kind: type
    config: dict[str, Any]
    section: dict[str, Any]
    layout: Callable[[Any], NetworkLayout]

    def tensors(self, prefix: str, read: ReadComponent = tensors_of) -> dict[str, Tensor]:
        """Return its weights under our names, with what those begin with in a checkpoint."""
        with torch.device("meta"):
            network: nn.Module = instantiate_from_config(self.section)
        state = read(self.kind, self.config, self.layout(network), network, self.folder)
        return {f"{prefix}{name}": value for name, value in state.items()}


def read_pipeline(folder: str | Path, out: str | Path, read_unet: ReadComponent = tensors_of) -> str:
    """Write the model in the folder of a pipeline; return a line that describes it.

    Args:
        out: the checkpoint to write, in safetensors; ``config.yaml`` is written beside it, and ``text_encoder`` if the
            conditions are texts.
        read_unet: reads diffusers' UNet, e.g. a quantized one.

    Raises:
        UserError: the folder has no model of the papers, or is damaged; the files exist or cannot be written.
    """
    import_diffusers()
    folder, out = Path(folder), Path(out)
    check_new_model(out)
    parts = component_names(folder)
    vae = next((name for name in VAES if name in parts), VAES[0])
    condition = _CONDITIONS.get(frozenset(parts.keys() - {UNET, vae, *IGNORED}))
    if condition is None:
        raise UserError(
            f"{folder} has the components {', '.join(sorted(parts))}; a latent diffusion model has {UNET}, "
            f"{' or '.join(VAES)}, and for conditions {CLASSES}, or {TEXTS} and {TOKENIZER}"
        )
    unet, stage = _unet(folder / UNET), _first_stage(folder / vae)
    if (unet.kind.__name__ == CONDITIONAL) != (condition is not _nothing):
        raise UserError(
            f"{folder / UNET} is a {unet.kind.__name__}, which does not fit the other components; get "
            "the pipeline's folder again"
        )
    params = _noise(folder / "scheduler" / "scheduler_config.json")
    section, encoder = condition(folder, parts, out)
    scale = float(stage.config["scaling_factor"])
    params |= {
        "image_size": unet.config["sample_size"],
        "channels": stage.section["params"]["embed_dim"],
        **({} if section == NOTHING else {"conditioning_key": "crossattn"}),
        "scale_factor": scale,
        "use_ema": False,
        "unet_config": unet.section,
        "first_stage_config": stage.section,
        "cond_stage_config": section,
    }
    state = unet.tensors("model.diffusion_model.", read_unet) | stage.tensors("first_stage_model.")
    state |= {f"cond_stage_model.{name}": value for name, value in encoder.items()}
    write_model(out, state | {"scale_factor": torch.tensor(scale)}, {"model": {"target": HOLDER, "params": params}})
    return f"{out}: the latent diffusion model of {folder}, with {out.with_name(CONFIG_NAME)}"


def _unet(folder: Path) -> _Component:
    given, origin = read_json(folder / CONFIG), str(folder / CONFIG)
    name = require_class(given, (PLAIN, CONDITIONAL, NARROW), origin)
    kind = diffusers_class(name)
    config = plain_config(complete_config(kind, given))
    params = unet_params(name, config, origin)
    _, again = unet_config(params, config["sample_size"], origin)
    check_same_config(config, plain_config(complete_config(kind, again)), diffusers_unet.FREE, origin)
    return _Component(folder, kind, config, {"target": TARGETS["unet_config"][0], "params": params}, unet_layout)


def _first_stage(folder: Path) -> _Component:
    given, origin = read_json(folder / CONFIG), str(folder / CONFIG)
    kind = diffusers_class(require_class(given, (VQ, KL), origin))
    config = complete_config(kind, given)
    if config.get("vq_embed_dim", 0) is None:  # the default
        config["vq_embed_dim"] = config["latent_channels"]
    section = first_stage_section(kind.__name__, config, origin)
    _, again = first_stage_config(section, origin)
    check_same_config(config, complete_config(kind, again), diffusers_first_stage.FREE, origin)
    return _Component(folder, kind, config, section, first_stage_layout)


def _noise(path: Path) -> dict[str, Any]:
    """Return the keys of a config that describe the training noise, from the config of a scheduler."""
    noise = training_noise_of(read_json(path), str(path))
    name = next((name for name, kind in BETA_SCHEDULES.items() if kind is noise.kind), None)
    if name is None:
        names = ", ".join(kind.value for kind in BETA_SCHEDULES.values())
        raise UserError(
            f"{path} has the noise schedule {BetaKind(noise.kind).value}; latent diffusion's configs can have {names}"
        )
    return {
        "beta_schedule": name,
        "linear_start": noise.start,
        "linear_end": noise.end,
        "timesteps": noise.count,
        "parameterization": noise.parameterization.value,
        "rescale_betas_zero_snr": noise.zero_terminal_snr,
    }


def _nothing(folder: Path, parts: Mapping[str, str], out: Path) -> tuple[str, dict[str, Tensor]]:
    return NOTHING, {}


def _classes(folder: Path, parts: Mapping[str, str], out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the section of a class embedder, and its weights."""
    path = folder / CLASSES
    given = read_json(path / CONFIG)
    require_class(given, ("ClassEmbedder",), str(path / CONFIG))
    section = _section(ClassEmbedder, n_classes=given.get("num_classes"), embed_dim=given.get("embedding_dim"))
    with torch.device("meta"):
        expected = instantiate_from_config(section).state_dict()
    state = read_weights(path)
    check_state(state, expected, path)
    return section, state


def _texts(folder: Path, parts: Mapping[str, str], out: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the section of a text encoder, and its weights; write its config and tokenizer beside ``out``."""
    path, target = folder / TEXTS, out.with_name(TEXTS)
    if parts[TEXTS] != "CLIPTextModel":
        raise UserError(f"{path} is a {parts[TEXTS]}; the papers' models have a CLIPTextModel")
    if not (folder / TOKENIZER).is_dir():
        raise UserError(f"{folder / TOKENIZER} is missing; get the pipeline's folder again")
    check_new_folder(target)
    expected = FrozenCLIPEmbedder(version=str(path)).state_dict()
    prefix = next(iter(expected)).split(".embeddings.")[0]
    # With and without the name of the encoder inside the model, as versions of transformers differ.
    weights = {n.removeprefix("text_model."): v for n, v in read_weights(path, TEXT_WEIGHTS).items()}
    state = {f"{prefix}.{n}": v.float() for n, v in weights.items() if not n.endswith("position_ids")}
    check_state(state, expected, path)
    with folder_written_whole(target) as made:
        for file in [path / CONFIG, *(folder / TOKENIZER).iterdir()]:
            shutil.copyfile(file, made / file.name)
    return _section(FrozenCLIPEmbedder, version=str(target.resolve())), state


def _section(kind: type, **params: Any) -> dict[str, Any]:
    """Return the part of a config that `instantiate_from_config` makes an object of."""
    return {"target": f"{kind.__module__}.{kind.__name__}", "params": params}


# What the components of a pipeline besides UNet, first stage and scheduler say about its conditions.
_CONDITIONS = {
    frozenset(): _nothing,
    frozenset({CLASSES}): _classes,
    frozenset({TEXTS, TOKENIZER}): _texts,
}
