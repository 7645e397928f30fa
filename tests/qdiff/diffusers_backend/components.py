"""Quantize a component by itself, without a pipeline around it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdiff.api import calibrate
from qdiff.calibration.run import CalibrationRun
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.diffusers_backend.denoiser import DenoiserCall, read_call
from qdiff.diffusers_backend.quantize import attach
from qdiff.diffusers_backend.structure import ends_of, mark_concatenations
from qdiff.quant_model import QuantModel


def read_inputs(network: nn.Module, inputs: dict[str, Any]) -> tuple[DenoiserCall, tuple[Tensor, ...]]:
    """Return how a network is called with some keywords, and the samples among them."""
    return read_call(network, (), inputs)


@torch.no_grad()
def run(call: Callable[..., Tensor], network: nn.Module, samples: tuple[Tensor, ...]) -> Tensor:
    return call(network, *samples)


def quantized(
    network: nn.Module,
    config: QuantConfig,
    method: str,
    settings: Any,
    call: DenoiserCall,
    samples: tuple[Tensor, ...],
) -> QuantModel:
    """Calibrate a network on some samples and make it a component that diffusers saves."""
    if config.split_shortcut:
        mark_concatenations(network)
    qnn = QuantModel(network, config, samples, call=call, ends=ends_of(network))
    calibrate(qnn, CalibrationSet(samples), method, settings, run=CalibrationRun(show_progress=False))
    attach(network, qnn, {"method": method})
    return qnn
