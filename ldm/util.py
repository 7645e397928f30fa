"""Build the objects that released YAML files name, and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from qdiff.errors import UserError

# A YAML file is data: it may name these classes and run no other code.
ALLOWED_TARGETS = frozenset(
    {
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.models.autoencoder.VQModelInterface",
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "ldm.modules.encoders.modules.ClassEmbedder",
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
        "torch.nn.Identity",
    }
)
NOTHING = ("__is_first_stage__", "__is_unconditional__")


def instantiate_from_config(config: Any) -> Any:
    """Return the object that ``{"target": dotted class, "params": {...}}`` describes; None for `NOTHING`.

    Raises:
        UserError: no target, a target that is not allowed, or parameters that it does not take.
    """
    if config in NOTHING:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"a part of the config has no target ({str(config)[:60]}); see configs/latent-diffusion")
    target = str(config["target"])
    if target not in ALLOWED_TARGETS:
        raise UserError(
            f"the config names {target}, which is not among the classes that a config may name "
            f"({', '.join(sorted(ALLOWED_TARGETS))}); correct the target"
        )
    module, name = target.rsplit(".", 1)
    params = config.get("params") or {}
    try:
        return getattr(importlib.import_module(module), name)(**params)
    except UserError:
        raise
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(f"the config's parameters of {target} do not fit ({error}); correct them") from error
