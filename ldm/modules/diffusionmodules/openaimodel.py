"""The UNet of latent diffusion and Stable Diffusion, with the parameter names of the released checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ldm.modules.attention import SpatialTransformer
from ldm.modules.diffusionmodules.blocks import AttentionBlock, Downsample, ResBlock, Upsample
from ldm.modules.diffusionmodules.util import normalization, timestep_embedding, zero_module
from qdiff.errors import UserError
from qdiff.interface import Family, State, Step, SteppedNetwork, TemporalParts, register_family


class UNetModel(SteppedNetwork):
    """Predicts the noise ε(z_t, t, condition) of a latent.

    Args:
        image_size: side of the latent; kept as an attribute only.
        model_channels: width of the first level.
        channel_mult: width factors of the levels.
        attention_resolutions: downsampling factors at which attention follows every block.
        num_heads: heads per attention, unless ``num_head_channels`` (channels per head) is given.
        num_heads_upsample: heads on the way up, if different.
        use_scale_shift_norm, resblock_updown: see `ResBlock`.
        use_new_attention_order: see `AttentionBlock`.
        use_spatial_transformer: attention is a `SpatialTransformer` of ``transformer_depth`` blocks that reads a
            context of width ``context_dim``.
        use_checkpoint: recompute blocks in the backward pass.
        legacy: with a spatial transformer the head width follows from ``num_heads`` (all released models except
            Stable Diffusion, where ``num_heads`` decides as well).
        use_fp16: accepted but not used; `torch.autocast` replaces it.

    Shapes: x [N, in_channels, H, W], t [N], context [N, L, context_dim] → [N, out_channels, H, W].

    Raises:
        UserError: an argument has an unsupported value, which no released model uses.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int,
        model_channels: int,
        out_channels: int,
        num_res_blocks: int,
        attention_resolutions: Sequence[int],
        dropout: float = 0.0,
        channel_mult: Sequence[int] = (1, 2, 4, 8),
        conv_resample: bool = True,
        dims: int = 2,
        num_classes: int | None = None,
        use_checkpoint: bool = False,
        use_fp16: bool = False,
        num_heads: int = -1,
        num_head_channels: int = -1,
        num_heads_upsample: int = -1,
        use_scale_shift_norm: bool = False,
        resblock_updown: bool = False,
        use_new_attention_order: bool = False,
        use_spatial_transformer: bool = False,
        transformer_depth: int = 1,
        context_dim: int | None = None,
        n_embed: int | None = None,
        legacy: bool = True,
    ) -> None:
        super().__init__()
        if dims != 2 or num_classes is not None or n_embed is not None:
            raise UserError("UNetModel supports dims 2, num_classes null and n_embed null; change the config")
        if num_heads == num_head_channels == -1:
            raise UserError("UNetModel needs num_heads or num_head_channels; add one to the config")
        if use_spatial_transformer and context_dim is None:
            raise UserError("UNetModel with use_spatial_transformer needs context_dim; add it to the config")
        self.image_size, self.in_channels, self.model_channels = image_size, in_channels, model_channels
        self.context_dim = context_dim if use_spatial_transformer else None
        emb_channels = model_channels * 4

        def attention(channels: int, going_up: bool = False) -> nn.Module:
            heads = num_heads_upsample if going_up and num_heads_upsample != -1 else num_heads
            if num_head_channels != -1:
                heads = channels // num_head_channels
            if use_spatial_transformer:
                return SpatialTransformer(
                    channels, heads, channels // heads, transformer_depth, context_dim, use_checkpoint=use_checkpoint
                )
            return AttentionBlock(channels, heads, use_new_attention_order, use_checkpoint)

        def resblock(channels: int, out: int, resample: str | None = None, split_at: int | None = None) -> ResBlock:
            return ResBlock(
                channels,
                out,
                emb_channels,
                dropout,
                use_scale_shift_norm=use_scale_shift_norm,
                resample=resample,
                split_at=split_at,
                use_checkpoint=use_checkpoint,
            )

        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, emb_channels), nn.SiLU(), nn.Linear(emb_channels, emb_channels)
        )
        channels, factor = model_channels, 1
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, channels, 3, padding=1)])])
        skip_channels = [channels]  # channels of every activation that an output block will consume, in order
        for level, mult in enumerate(channel_mult):
            for _ in range(num_res_blocks):
                layers = [resblock(channels, mult * model_channels)]
                channels = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(channels))
                self.input_blocks.append(nn.ModuleList(layers))
                skip_channels.append(channels)
            if level < len(channel_mult) - 1:
                down = resblock(channels, channels, "down") if resblock_updown else Downsample(channels, conv_resample)
                self.input_blocks.append(nn.ModuleList([down]))
                skip_channels.append(channels)
                factor *= 2

        self.middle_block = nn.ModuleList(
            [resblock(channels, channels), attention(channels), resblock(channels, channels)]
        )
        self.output_blocks = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for i in range(num_res_blocks + 1):
                layers = [resblock(channels + skip_channels.pop(), mult * model_channels, split_at=channels)]
                channels = mult * model_channels
                if factor in attention_resolutions:
                    layers.append(attention(channels, going_up=True))
                if level > 0 and i == num_res_blocks:
                    up = resblock(channels, channels, "up") if resblock_updown else Upsample(channels, conv_resample)
                    layers.append(up)
                    factor //= 2
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(
            normalization(channels), nn.SiLU(), zero_module(nn.Conv2d(channels, out_channels, 3, padding=1))
        )

    def start(self, x: Tensor, t: Tensor, context: Tensor | None = None) -> State:
        """State: ``x``, ``emb``, ``context``, the running activation ``h``, and the ``skips`` stack."""
        if (context is None) != (self.context_dim is None):
            needs = "needs a context" if context is None else "takes no context"
            raise ValueError(f"this UNetModel {needs} (context_dim {self.context_dim})")
        emb = timestep_embedding(t, self.model_channels, x.dtype)
        return {"x": x, "emb": emb, "context": context, "h": x, "skips": []}

    def temporal_parts(self) -> TemporalParts:
        blocks = [step for step in self.steps() if isinstance(step.module, ResBlock)]
        names = tuple(f"{step.name}.emb_layers.1" for step in blocks)
        return TemporalParts("emb", ("time_embed.0", "time_embed.2"), names)

    def steps(self) -> Iterator[Step]:
        first, _, second = self.time_embed
        yield Step("time_embed.0", first, lambda s: (s["emb"],), _set_emb)
        yield Step("time_embed.2", second, lambda s: (nn.functional.silu(s["emb"]),), _set_emb)
        for i, layers in enumerate(self.input_blocks):
            yield from _layer_steps(f"input_blocks.{i}", layers, after=_push)
        yield from _layer_steps("middle_block", self.middle_block)
        for i, layers in enumerate(self.output_blocks):
            yield from _layer_steps(f"output_blocks.{i}", layers, takes_skip=True)
        norm, silu, conv = self.out
        yield Step("out.2", conv, lambda s: (silu(norm(s["h"])),), _set_h)


def _layer_steps(name: str, layers: nn.ModuleList, takes_skip: bool = False, after=None) -> Iterator[Step]:
    """Yield the steps of one entry of the UNet's block lists; ``after`` acts on the state after the last."""
    for j, layer in enumerate(layers):
        steps = [_layer_step(f"{name}.{j}", layer, takes_skip and j == 0)]
        if isinstance(layer, SpatialTransformer):
            steps = list(layer.steps(f"{name}.{j}"))
        if after is not None and j == len(layers) - 1:
            last = steps[-1]
            steps[-1] = Step(last.name, last.module, last.inputs, _then(last.output, after))
        yield from steps


def _layer_step(name: str, layer: nn.Module, takes_skip: bool) -> Step:
    if takes_skip:
        return Step(name, layer, _h_skip_and_emb, _pop)
    return Step(name, layer, _h_and_emb if isinstance(layer, ResBlock) else _h, _set_h)


def _then(output, after):
    def both(state: State, out: Tensor) -> None:
        output(state, out)
        after(state)

    return both


def _h(state: State) -> tuple[Tensor, ...]:
    return (state["h"],)


def _h_and_emb(state: State) -> tuple[Tensor, ...]:
    return state["h"], state["emb"]


def _h_skip_and_emb(state: State) -> tuple[Tensor, ...]:
    return torch.cat([state["h"], state["skips"][-1]], dim=1), state["emb"]


def _set_h(state: State, out: Tensor) -> None:
    state["h"] = out


def _set_emb(state: State, out: Tensor) -> None:
    state["emb"] = out


def _push(state: State) -> None:
    state["skips"].append(state["h"])


def _pop(state: State, out: Tensor) -> None:
    state["skips"].pop()
    state["h"] = out


register_family(
    Family(
        network=UNetModel,
        published_names=(
            (r"\.attention\.(act_quantizer_[qk])", r".attention.qkv_matmul.\1"),
            (r"\.attention\.(act_quantizer_[vw])", r".attention.smv_matmul.\1"),
            (r"\.core\.(act_quantizer_)", r".\1"),
        ),
        symmetric_softmax=r"\.attn[12]\.act_quantizer_w$",  # only in transformer blocks, not in `AttentionBlock`
        ends=("input_blocks.0.0", "out.2"),
        middle="middle_block.0",
    )
)
