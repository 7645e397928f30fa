"""Check that the sizes of a DDIM config fit each other, without weights."""

from __future__ import annotations

from typing import Any

import torch

from ddim.models.diffusion import Model
from qdiff.errors import UserError
from qdiff.machine.meta_device import check_runs


def check_sizes(config: Any, origin: str) -> None:
    """Raise a `UserError` if the network of a config cannot run on its images.

    Args:
        origin: the config's name in error messages.
    """
    data, model = config.data, config.model
    for name in ("in_channels", "out_ch"):
        if model[name] != data.channels:
            raise UserError(
                f"{origin} has data.channels {data.channels} and model.{name} {model[name]}; the network takes and "
                "returns images, so make them equal"
            )
    halvings = len(model.ch_mult) - 1
    if data.image_size % 2**halvings:
        raise UserError(
            f"{origin} has data.image_size {data.image_size}, which the {halvings} halvings of model.ch_mult do not "
            f"divide; give a multiple of {2**halvings}"
        )
    with check_runs(origin, "data.image_size and the numbers in model"), torch.device("meta"):
        shape = (1, data.channels, data.image_size, data.image_size)
        Model(config)(torch.zeros(shape), torch.zeros(1))
