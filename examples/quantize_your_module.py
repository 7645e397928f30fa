"""Quantize your own network: its forward is a sequence of named steps, which are fitted one by one."""

import sys

import torch
from torch import nn

import qdiff
from qdiff.interface import Step, SteppedNetwork
from qdiff.methods.eda_dm import EdaDmConfig


class Denoiser(SteppedNetwork):
    """ε(x, t) by three convolutions; x [N, 1, H, W], t [N]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.middle, self.leave = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 16), (16, 16), (16, 1)))

    def start(self, x, t):
        return {"x": x, "h": x + 0.1 * torch.sin(t.to(x) / 100).view(-1, 1, 1, 1)}

    def steps(self):
        for name in ("enter", "middle", "leave"):
            activation = nn.functional.silu if name != "enter" else nn.Identity()
            yield Step(name, getattr(self, name), lambda s, f=activation: (f(s["h"]),), lambda s, out: s.update(h=out))


def sampler(network, rows):
    """Ten sampling steps from noise that depends only on the sample's number."""
    noise = [torch.randn(1, 8, 8, generator=torch.Generator().manual_seed(row)) for row in rows]
    x = torch.stack(noise)
    for t in reversed(range(0, 1000, 100)):
        x = x - 0.1 * network(x, torch.full((len(x),), t))
    return x


def main(path: str = "mine.safetensors", iterations: int = 200) -> torch.Tensor:
    torch.manual_seed(0)
    qnn = qdiff.QuantModel(Denoiser().eval(), qdiff.QuantConfig(weight_bits=4, act_bits=8))
    data = qdiff.record(sampler, qnn, count=64, steps=5)
    errors = qdiff.calibrate(qnn, data, "eda-dm", EdaDmConfig(iterations=iterations))
    qdiff.save_checkpoint(qnn, path)
    print(f"{path}: {len(errors)} units fitted")
    return qdiff.sample(sampler, qnn, range(4))


if __name__ == "__main__":
    main(*sys.argv[1:2])
