"""The DDPM UNet that DDIM samples from, with the parameter names of the released CIFAR-10 checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddim.models.layers import (
    AttnBlock,
    Downsample,
    ResnetBlock,
    Upsample,
    group_norm,
    timestep_embedding,
)
from qdiff.interface import Family, State, Step, SteppedNetwork, TemporalParts, register_family


class Model(SteppedNetwork):
    """Predicts the noise ε(x_t, t).

    Args:
        config: attribute-style tree with ``data.image_size`` and ``model.{in_channels, out_ch, ch, ch_mult,
            num_res_blocks, attn_resolutions, dropout, resamp_with_conv}``, as in ``configs/cifar10.yml``.

    Shapes: x [N, in_channels, H, W], t [N] → [N, out_ch, H, W].
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        model = config.model
        self.ch = model.ch
        widths = [model.ch * factor for factor in model.ch_mult]
        self.num_levels = len(widths)
        temb_ch = model.ch * 4
        with_conv = model.resamp_with_conv

        def attention(resolution: int, channels: int) -> nn.ModuleList:
            here = resolution in model.attn_resolutions
            return nn.ModuleList([AttnBlock(channels) for _ in range(model.num_res_blocks)] if here else [])

        self.temb = nn.Module()
        self.temb.dense = nn.ModuleList([nn.Linear(self.ch, temb_ch), nn.Linear(temb_ch, temb_ch)])
        self.conv_in = nn.Conv2d(model.in_channels, self.ch, 3, padding=1)

        resolution, channels = config.data.image_size, self.ch
        skip_channels = [channels]  # channels of every activation that an up block will consume, in order
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(model.num_res_blocks):
                level.block.append(ResnetBlock(channels, width, temb_ch, model.dropout))
                channels = width
                skip_channels.append(channels)
            level.attn = attention(resolution, width)
            if i < self.num_levels - 1:
                level.downsample = Downsample(channels, with_conv)
                skip_channels.append(channels)
                resolution //= 2
            self.down.append(level)

        self.mid = nn.Module()
        self.mid.block_1 = ResnetBlock(channels, channels, temb_ch, model.dropout)
        self.mid.attn_1 = AttnBlock(channels)
        self.mid.block_2 = ResnetBlock(channels, channels, temb_ch, model.dropout)

        ups = []
        for i, width in reversed(list(enumerate(widths))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(model.num_res_blocks + 1):
                level.block.append(
                    ResnetBlock(channels + skip_channels.pop(), width, temb_ch, model.dropout, split_at=channels)
                )
                channels = width
            level.attn = attention(resolution, width)
            if level.attn:
                level.attn.append(AttnBlock(width))  # one more block than on the way down
            if i > 0:
                level.upsample = Upsample(channels, with_conv)
                resolution *= 2
            ups.append(level)
        self.up = nn.ModuleList(reversed(ups))

        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, model.out_ch, 3, padding=1)

    def start(self, x: Tensor, t: Tensor) -> State:
        """State: ``x`` and ``t`` as given, ``temb``, the running activation ``h``, and the ``skips`` stack."""
        return {"x": x, "temb": timestep_embedding(t, self.ch, x.dtype), "h": x, "skips": []}

    def temporal_parts(self) -> TemporalParts:
        blocks = [step for step in self.steps() if isinstance(step.module, ResnetBlock)]
        names = tuple(f"{step.name}.temb_proj" for step in blocks)
        return TemporalParts("temb", ("temb.dense.0", "temb.dense.1"), names)

    def steps(self) -> Iterator[Step]:
        yield Step("temb.dense.0", self.temb.dense[0], lambda s: (s["temb"],), _set("temb"))
        yield Step("temb.dense.1", self.temb.dense[1], lambda s: (F.silu(s["temb"]),), _set("temb"))
        yield Step("conv_in", self.conv_in, lambda s: (s["x"],), _push)
        for i, level in enumerate(self.down):
            for j, block in enumerate(level.block):
                attn = level.attn[j] if level.attn else None
                yield Step(f"down.{i}.block.{j}", block, _h_and_temb, _push if attn is None else _set("h"))
                if attn is not None:
                    yield Step(f"down.{i}.attn.{j}", attn, _h, _push)
            if hasattr(level, "downsample"):
                yield Step(f"down.{i}.downsample", level.downsample, _h, _push)
        yield Step("mid.block_1", self.mid.block_1, _h_and_temb, _set("h"))
        yield Step("mid.attn_1", self.mid.attn_1, _h, _set("h"))
        yield Step("mid.block_2", self.mid.block_2, _h_and_temb, _set("h"))
        for i, level in reversed(list(enumerate(self.up))):
            for j, block in enumerate(level.block):
                yield Step(f"up.{i}.block.{j}", block, _h_skip_and_temb, _pop)
                if level.attn:
                    yield Step(f"up.{i}.attn.{j}", level.attn[j], _h, _set("h"))
            if hasattr(level, "upsample"):
                yield Step(f"up.{i}.upsample", level.upsample, _h, _set("h"))
        yield Step("conv_out", self.conv_out, lambda s: (F.silu(self.norm_out(s["h"])),), _set("h"))


def _h(state: State) -> tuple[Tensor, ...]:
    return (state["h"],)


def _h_and_temb(state: State) -> tuple[Tensor, ...]:
    return state["h"], state["temb"]


def _h_skip_and_temb(state: State) -> tuple[Tensor, ...]:
    return torch.cat([state["h"], state["skips"][-1]], dim=1), state["temb"]


def _set(key: str):
    return lambda state, out: state.__setitem__(key, out)


def _push(state: State, out: Tensor) -> None:
    state["h"] = out
    state["skips"].append(out)


def _pop(state: State, out: Tensor) -> None:
    state["skips"].pop()
    state["h"] = out


register_family(
    Family(
        network=Model,
        published_names=((r"\.core\.(act_quantizer_)", r".\1"),),
        symmetric_softmax=r"\.act_quantizer_w$",
        ends=("conv_in", "conv_out"),
        middle="mid.block_1",
    )
)
