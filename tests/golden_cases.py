"""The golden cases of tests/golden: a published checkpoint, its options, and the outputs it must give.

The outputs are those of the published code in float64. Equality with them is tested in float64, where it depends on no
CPU: no value lies nearer to a rounding edge than 6e-9 of a level. In float32 a value on an edge falls to one side or
the other by the last bit of a sum, so there only what has float activations is compared.
"""

from __future__ import annotations

import functools
import json
import lzma
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qdiff.config import QuantConfig
from qdiff.quant_model import QuantModel

GOLDEN = Path(__file__).parent / "golden"
# Networks of 32 channels, where a group norm of 32 groups removes whatever is constant over a channel …
DDIM_CASES = ("ddim_w4a8_split", "ddim_w8_nosplit")
LDM_CASES = ("bedroom_w4a8", "church_w8a8", "imagenet_w4a8_split", "sd_w4a8_sm16_split")
# … and of 64, which see t and the biases before a norm.
WIDE_DDIM_CASES = ("wide_ddim_w4a8_split",)
WIDE_LDM_CASES = ("wide_imagenet_w4a8_split", "wide_sd_w4a8_sm16_split", "wide_sd_w8a8_sym")
WIDE_CASES = (*WIDE_DDIM_CASES, *WIDE_LDM_CASES)
ALL_CASES = (*DDIM_CASES, *LDM_CASES, *WIDE_CASES)

# Relative L2 in float64: ours gives 2e-15.
EXACT_TOLERANCE = 1e-9
# … and in float32 without quantized activations, for the order of sums.
FLOAT_TOLERANCE = 1e-5


@functools.cache
def _unpacked() -> tempfile.TemporaryDirectory:
    """Where unpacked checkpoints lie until this process ends."""
    return tempfile.TemporaryDirectory(prefix="golden-")


class GoldenCase:
    """One case by its name.

    Attributes:
        case: its ``case.json``.
        values: its ``golden64.pth``, float64.
        inputs: (x, t) or (x, t, context), float32.
        options: of `QuantConfig`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.folder = name, GOLDEN / name
        self.case: dict[str, Any] = json.loads((self.folder / "case.json").read_text())
        self.values: dict[str, Tensor] = torch.load(self.folder / "golden64.pth", weights_only=True)
        self.inputs = tuple(t.float() if t.is_floating_point() else t for t in self.exact_inputs)
        self.options: dict[str, Any] = {
            "weight_bits": self.case["weight_bit"],
            "act_bits": self.case["act_bit"] if self.case["quant_act"] else None,
            "act_symmetric": self.case["a_sym"],
            "softmax_bits": self.case["sm_abit"],
            "split_shortcut": self.case["split"],
        }

    @property
    def exact_inputs(self) -> tuple[Tensor, ...]:
        """The inputs in float64."""
        return tuple(self.values[k] for k in ("x", "t", "context") if k in self.values)

    @functools.cached_property
    def path(self) -> Path:
        """The published checkpoint, unpacked (tests/golden/README.md)."""
        made = Path(_unpacked().name) / f"{self.name}.pth"
        if not made.is_file():
            with lzma.open(self.folder / "ckpt.pth.xz") as file:
                state = torch.load(file, weights_only=True)
            torch.save({k: v.float() if k.endswith(".alpha") else v for k, v in state.items()}, made)
        return made

    def float_weights(self) -> dict[str, Tensor]:
        """Return the network's state dict, which the published checkpoint also holds."""
        state = torch.load(self.path, weights_only=True)
        return {k.removeprefix("model."): v for k, v in state.items() if "quantizer" not in k}

    def network(self) -> torch.nn.Module:
        """Return the case's float network with random weights."""
        torch.manual_seed(0)
        if self.case["family"] == "ddim":
            from omegaconf import OmegaConf

            from ddim.models.diffusion import Model

            return Model(OmegaConf.create(self.case["config"]))
        from ldm.modules.diffusionmodules.openaimodel import UNetModel

        return UNetModel(**self.case["model"])

    def wrapped(self, **changes: Any) -> QuantModel:
        """Return the network wrapped with the case's options, some of them changed."""
        return QuantModel(self.network(), QuantConfig(**{**self.options, **changes}))
