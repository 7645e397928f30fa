"""Load checkpoints of latent diffusion models, released or trained here, strictly and without a second copy."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm.models.diffusion.ddpm import LatentDiffusion
from ldm.modules.encoders.modules import FrozenCLIPEmbedder
from ldm.util import instantiate_from_config
from qdiff.errors import UserError
from qdiff.io.tensor_files import check_state, read_float_tensors, unwrapped

log = logging.getLogger("qdiff")

UNET, EMA = "model.diffusion_model.", "model_ema."
# Tensors in released checkpoints that are not part of the model: schedules (here from the config), losses, training
# counters.
SCHEDULE = frozenset(
    {
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "logvar",
        "lvlb_weights",
        "cond_ids",
        "ddim_sigmas",
    }
)
LEFTOVERS = ("loss.", "first_stage_model.loss.", "cond_stage_model.model.visual.", EMA)


def build_without_weights(config: Any) -> LatentDiffusion:
    """Return the model of a config with UNet and first stage on the meta device, to be filled from a checkpoint."""
    params = config.model.params
    with torch.device("meta"):
        unet = instantiate_from_config(params.unet_config)
        first_stage = instantiate_from_config(params.first_stage_config)
    rest = {k: v for k, v in params.items() if k not in ("unet_config", "first_stage_config")}
    model = LatentDiffusion("__is_unconditional__", "__is_unconditional__", **rest)
    model.model.diffusion_model, model.first_stage_model = unet, first_stage
    return model


def load_latent_diffusion(config: Any, path: str | Path, network: bool = True) -> LatentDiffusion:
    """Build the model of a config and fill it from a checkpoint, in float32 on the CPU.

    Averaged weights (``model_ema.*``), if present and used, replace the UNet's. Schedules, losses and training counters
    in the file are ignored and reported.

    Args:
        network: False leaves the UNet without weights on the meta device.

    Raises:
        UserError: the file is missing, damaged, or holds the weights of another model.
    """
    path = Path(path)
    model = build_without_weights(config)
    state = unwrapped(read_float_tensors(path), model.state_dict())
    if not any(name.startswith(UNET) for name in state):
        raise UserError(
            f"{path} is not a latent diffusion checkpoint (it has no {UNET}*); give a released model.ckpt or a "
            "model.safetensors of models/ldm"
        )
    if model.use_ema:
        _take_averages(state, path)
    expected = model.state_dict()
    if isinstance(model.cond_stage_model, FrozenCLIPEmbedder) and not any(
        n.startswith("cond_stage_model.") for n in state
    ):
        model.cond_stage_model.load_pretrained()
        state |= {n: v for n, v in model.state_dict().items() if n.startswith("cond_stage_model.")}
    if "scale_factor" not in state:
        if model.scale_by_std:
            raise UserError(f"{path} has no scale_factor, which a config with scale_by_std needs; get the whole file")
        state["scale_factor"] = expected["scale_factor"]
    _ignore_leftovers(state, expected, path)
    check_state(state, expected, path)
    if not network:
        state = {name: value for name, value in state.items() if not name.startswith(UNET)}
    # Copied one by one, so that nothing refers to the mapped file and no half-precision copy stays in memory.
    tensors = {name: state.pop(name).to(torch.float32, copy=True) for name in list(state)}
    model.load_state_dict(tensors, strict=network, assign=True)
    return model.requires_grad_(False).eval()


def _take_averages(state: dict[str, Tensor], path: Path) -> None:
    """Replace ``model.*`` with its average, whose names have no dots."""
    names = {name.removeprefix("model.").replace(".", ""): name for name in state if name.startswith("model.")}
    averages = {n.removeprefix(EMA): n for n in state if n.startswith(EMA)}
    counters = {"decay", "num_updates"}
    if not averages.keys() - counters:
        return
    missing = sorted(names.keys() - averages.keys())
    if missing:
        raise UserError(
            f"{path} averages only some of the UNet's weights ({len(missing)} are missing, e.g. {names[missing[0]]}); "
            "get the file again, or set use_ema: false in the config"
        )
    for short, name in names.items():
        state[name] = state[averages[short]]


def _ignore_leftovers(state: dict[str, Tensor], expected: dict[str, Tensor], path: Path) -> None:
    def is_leftover(name: str) -> bool:
        return name in SCHEDULE or name.startswith(LEFTOVERS) or name.endswith(".position_ids")

    unused = [n for n in state if n not in expected and is_leftover(n)]
    kinds = Counter(n.split(".")[0] if "." in n else "schedule" for n in unused)
    for name in unused:
        del state[name]
    if unused:
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        log.info("%s: ignored %d tensors that sampling does not need (%s)", path, len(unused), listed)
