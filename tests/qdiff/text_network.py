"""A network of some hundred weights that reads a text, and contexts whose first token is the same and far larger."""

from __future__ import annotations

import torch
from torch import nn

from ldm.modules.attention import BasicTransformerBlock
from qdiff.calibration.samples import CalibrationSet
from qdiff.config import QuantConfig
from qdiff.interface import Step, SteppedNetwork
from qdiff.quant_model import QuantModel

TOKENS, WIDTH, MAGNITUDE = 5, 8, 80.0
READERS = ["block.attn2.to_k", "block.attn2.to_v"]
OTHERS = ("conv_in", "conv_out", "block.attn1.to_q", "block.attn1.to_k", "block.attn1.to_v", "block.attn1.to_out.0")
OTHERS = (*OTHERS, "block.attn2.to_q", "block.attn2.to_out.0", "block.ff.net.0.proj", "block.ff.net.2")
CORES = ("block.attn1.core", "block.attn2.core")
# Everything but the layers that read the context in float.
READERS_ALONE = {**dict.fromkeys(OTHERS, "W32A32"), **dict.fromkeys(CORES, "A32")}


class TextNetwork(SteppedNetwork):
    """x [N, 2, 4, 4], t [N], context [N, L, 8] → [N, 2, 4, 4]: a convolution, a transformer block, a convolution."""

    def __init__(self):
        super().__init__()
        self.conv_in, self.conv_out = nn.Conv2d(2, 8, 1), nn.Conv2d(8, 2, 1)
        self.block = BasicTransformerBlock(8, 2, 4, WIDTH)

    def start(self, x, t, context):
        return {"x": x, "h": x + t.view(-1, 1, 1, 1).to(x) / 1000, "context": context}

    def steps(self):
        yield Step("conv_in", self.conv_in, lambda s: (s["h"],), lambda s, out: s.update(h=out.flatten(2).mT))
        yield Step("block", self.block, lambda s: (s["h"], s["context"]), lambda s, out: s.update(h=out))
        yield Step("conv_out", self.conv_out, _image, lambda s, out: s.update(h=out))


def _image(state):
    return (state["h"].mT.unflatten(2, state["x"].shape[2:]),)


def text_network(dtype: torch.dtype = torch.float32) -> TextNetwork:
    torch.manual_seed(0)
    return TextNetwork().eval().to(dtype)


def texts(count: int = 6, seed: int = 1, magnitude: float = MAGNITUDE, dtype: torch.dtype = torch.float32):
    """Return inputs (x, t, context) of some samples; the first token does not depend on the seed."""
    generator = torch.Generator().manual_seed(seed)
    x, context = (
        torch.randn(count, 2, 4, 4, generator=generator),
        torch.randn(count, TOKENS, WIDTH, generator=generator),
    )
    context[:, 0] = magnitude * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    return x.to(dtype), torch.arange(count) * (900 // count), context.to(dtype)


def other_texts(*args, **keywords):
    """Return inputs of which the last begins with another token."""
    x, t, context = texts(*args, **keywords)
    context[-1, 0] += context[-1, 0].roll(1)
    return x, t, context


def wrapped(dtype: torch.dtype = torch.float32, **config) -> QuantModel:
    config = {"weight_bits": 4, "act_bits": 8, "bos_aware": True, **config}
    return QuantModel(text_network(dtype), QuantConfig(**config)).to(dtype)


def text_data(*args, **keywords) -> CalibrationSet:
    return CalibrationSet(texts(*args, **keywords))
