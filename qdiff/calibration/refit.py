"""Calibrate a network again from its float weights, on inputs of its own quantized trajectory (TCAQ-DM).

A calibration set from the float sampler holds inputs that the quantized network does not get: its errors move x_t, and
later steps start from there. So a network that was calibrated samples a new set, and is fitted again on it. What a fit
aims at stays the float network's output, on the new inputs. (Wang et al., AAAI 2025, arXiv 2412.16700, progressive
calibration.) The second fit starts from the float weights and not from the first fit's roundings, so its result depends
on the recording alone.
"""

from __future__ import annotations

import torch

from qdiff.quant_model import QuantModel
from qdiff.quantizer import calibrated_act_quantizers


def discard_calibration(qnn: QuantModel) -> None:
    """Put a network back to where it was when it was wrapped: in float, and without ranges.

    Ranges, rounded weights, corrected biases and input scales are forgotten; float weights and biases are kept.

    Raises:
        UserError: its weights are packed; nothing is changed.
        RuntimeError: its float weights were released; nothing is changed.
    """
    layers = qnn.layers().values()
    for layer in layers:
        layer.float_weight()
    for layer in layers:
        layer.discard_calibration()
    for quantizer in calibrated_act_quantizers(qnn.model).values():  # those of attention too
        quantizer.reset()
    if qnn.act_timesteps is not None:
        qnn.act_timesteps.set(torch.empty(0))
