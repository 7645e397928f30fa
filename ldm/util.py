"""Build the objects that released YAML files name, and nothing else."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from qdiff.errors import UserError, first_line
from qdiff.io.config_schema import check_section, keys_of

# YAML files are data: they may name only these classes and run no other code.
ALLOWED_TARGETS = frozenset(
    {
        "ldm.models.diffusion.ddpm.LatentDiffusion",
        "ldm.models.autoencoder.AutoencoderKL",
        "ldm.models.autoencoder.VQModelInterface",
        "ldm.modules.diffusionmodules.openaimodel.UNetModel",
        "ldm.modules.encoders.modules.ClassEmbedder",
        "ldm.modules.encoders.modules.FrozenCLIPEmbedder",
    }
)
NOTHING = ("__is_first_stage__", "__is_unconditional__")


def instantiate_from_config(config: Any) -> Any:
    """Return the object that ``{"target": dotted class, "params": {...}}`` describes; None for `NOTHING`.

    Raises:
        UserError: there is no target, it is not allowed, or it does not take these parameters.
    """
    if config in NOTHING:
        return None
    if not isinstance(config, Mapping) or "target" not in config:
        raise UserError(f"a part of the config has no target ({str(config)[:60]}); see configs/latent-diffusion")
    target = str(config["target"])
    if target not in ALLOWED_TARGETS:
        raise UserError(
            f"the config names the class {target}, which is not allowed; give one of "
            f"({', '.join(sorted(ALLOWED_TARGETS))}); correct the target"
        )
    module, name = target.rsplit(".", 1)
    params = config.get("params") or {}
    made = getattr(importlib.import_module(module), name)
    if (keys := keys_of(made)) is not None:
        check_section(params, keys, "", f"the config's part {name}")
    try:
        return made(**params)
    except UserError:
        raise
    except (TypeError, KeyError, IndexError, ValueError, ZeroDivisionError, OverflowError, RuntimeError) as error:
        raise UserError(
            f"the config's parameters of {target} do not fit ({first_line(error)}); correct them"
        ) from error
