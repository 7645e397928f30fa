"""The model card (README.md) beside a quantized component's weights."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

from torch import nn

from qdiff.io.files import written_whole
from qdiff.io.markdown import markdown_table

LICENSE_NOTE = "The base model's licence applies."


def calibration_note(data: str, refits: int) -> str:
    """Return what a card says about a calibration.

    Args:
        data: describes its calibration set.
        refits: how often it was repeated on the quantized network's own samples.
    """
    return data if refits == 0 else f"{data}, refits on the quantized network's own samples: {refits}"


def card_of(network: nn.Module) -> str:
    """Return the Markdown text that describes a quantized component."""
    config = network.hf_quantizer.quantization_config
    widths, notes = config.quant_config, config.notes
    base = notes.get("base_model") or getattr(network.config, "_name_or_path", "") or "unknown"
    acts = "float" if widths.act_bits is None else f"{widths.act_bits} bits"
    if config.timesteps:
        acts += f", a range for each of {len(config.timesteps)} timesteps"
    if widths.power_of_two_scales:
        acts += ", finer step sizes for single channels of what shortcuts take"
    if config.first_tokens:
        acts += ", the first token of a text in float"
    rows = [
        (
            "weights",
            "float" if widths.weight_bits is None else f"{widths.weight_bits} bits, one range per output channel",
        ),
        ("activations", acts),
        ("softmax outputs", "float" if widths.attention_widths is None else f"{widths.attention_widths[1]} bits"),
        ("method", notes.get("method", "nearest rounding, no calibration")),
        *((f"{name}'s widths", bits) for name, bits in widths.layer_bits),
        *((name, notes[name]) for name in ("calibration", "noise_error", "seed") if name in notes),
        ("layers left in float", len(config.left_in_float)),
    ]
    table = markdown_table(([name.replace("_", " "), str(value)] for name, value in rows), ["", ""])
    return f"""---
base_model: {base}
base_model_relation: quantized
library_name: diffusers
---

# {type(network).__name__}, quantized with qdiff

{table}

Load it with plain diffusers (`pip install "qdiff[diffusers]"`):

    import qdiff
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained("this folder's parent")

{LICENSE_NOTE}
"""


def _save_config(network: nn.Module, save_directory: str | Path, *args: Any, **keywords: Any) -> None:
    type(network).save_config(network, save_directory, *args, **keywords)
    with written_whole(Path(save_directory) / "README.md") as temporary:
        temporary.write_text(card_of(network), encoding="utf-8")


_save_config.__name__ = "save_config"  # a bound method is pickled by its name


def writes_card(network: nn.Module) -> None:
    """Have a component write its card whenever it is saved: ``save_pretrained`` calls ``save_config``."""
    network.save_config = types.MethodType(_save_config, network)
