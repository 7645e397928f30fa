"""A DDIM model as a folder of diffusers' ``DDIMPipeline``, and such a folder as a checkpoint with its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from ddim.config import training_noise
from ddim.diffusers_layout import UNET, config_sections, unet_config, unet_layout
from ddim.models.diffusion import Model
from ddim.pipeline import DdimPipeline
from qdiff.errors import UserError
from qdiff.io.diffusers_files import (
    CONFIG,
    MakeComponent,
    ReadComponent,
    check_same_config,
    complete_config,
    component_of,
    import_diffusers,
    read_json,
    require_class,
    tensors_of,
)
from qdiff.io.files import check_new_folder, folder_written_whole
from qdiff.io.model_files import CONFIG_NAME, check_new_model, write_model
from qdiff.sampling import BetaKind
from qdiff.sampling.diffusers_scheduler import scheduler_config, training_noise_of

FREE = ("num_train_timesteps",)  # used only with another kind of time embedding


def write_pipeline(pipeline: DdimPipeline, folder: str | Path, make_unet: MakeComponent = component_of) -> str:
    """Write a model, which is loaded now, as a ``DDIMPipeline``; return a line that describes the folder.

    Args:
        make_unet: makes diffusers' network from ours, e.g. a quantized one.

    Raises:
        UserError: diffusers is missing or has no such network, the folder is not empty or cannot be written, or the
            weights cannot be loaded.
    """
    library = import_diffusers()
    check_new_folder(folder)
    config, origin = pipeline.model_config, f"the config {pipeline.name}"
    if not config.data.get("rescaled", True) or config.data.get("logit_transform", False):
        raise UserError(
            f"{origin} has data.rescaled false, or logit_transform; diffusers' pipelines have images in [−1, 1]"
        )
    unet = unet_config(config, origin)
    scheduler = library.DDIMScheduler(**scheduler_config(training_noise(config), pipeline.sampler.options))
    pipeline.load(torch.device("cpu"))
    parameters = sum(p.numel() for p in pipeline.network.parameters())
    network = make_unet(library.UNet2DModel, unet, unet_layout(pipeline.network), pipeline.network, origin)
    with folder_written_whole(folder) as made:
        library.DDIMPipeline(network, scheduler).save_pretrained(made)
    return f"{folder}: DDIMPipeline, {parameters:,} parameters"


def read_pipeline(folder: str | Path, out: str | Path, read_unet: ReadComponent = tensors_of) -> str:
    """Write the model in the folder of a pipeline without first stage; return a line that describes it.

    Args:
        out: the checkpoint to write, in safetensors; ``config.yaml`` is written beside it.
        read_unet: reads diffusers' network, e.g. a quantized one.

    Raises:
        UserError: the folder has no network of the papers, or is damaged; the files exist or cannot be written.
    """
    library = import_diffusers()
    folder = Path(folder) / "unet"
    check_new_model(out)
    given, origin = read_json(folder / CONFIG), str(folder / CONFIG)
    require_class(given, (UNET,), origin)
    unet = complete_config(library.UNet2DModel, given)
    config = OmegaConf.create(config_sections(unet, origin))
    again = complete_config(library.UNet2DModel, unet_config(config, origin))
    check_same_config(unet, again, FREE, origin)
    config.diffusion = _diffusion(folder.parent / "scheduler" / "scheduler_config.json")
    with torch.device("meta"):
        network = Model(config)
    write_model(out, read_unet(library.UNet2DModel, unet, unet_layout(network), network, folder), config)
    return f"{out}: the DDIM model of {folder.parent}, with {Path(out).with_name(CONFIG_NAME)}"


def _diffusion(path: Path) -> dict[str, Any]:
    """Return the section ``diffusion`` of a config, from the config of a scheduler."""
    noise = training_noise_of(read_json(path), str(path))
    return {
        "beta_schedule": BetaKind(noise.kind).value,
        "beta_start": noise.start,
        "beta_end": noise.end,
        "num_diffusion_timesteps": noise.count,
        "parameterization": noise.parameterization.value,
        "rescale_betas_zero_snr": noise.zero_terminal_snr,
    }
