"""Blocks of the latent UNet against plain implementations of their formulas."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm.modules.attention import FeedForward, SpatialTransformer
from ldm.modules.diffusionmodules.blocks import AttentionBlock, Downsample, ResBlock, Upsample
from ldm.modules.diffusionmodules.util import timestep_embedding
from qdiff.interface import AttentionCore

# Relative L2 of float32 outputs computed in another order.
SAME_TOLERANCE = 1e-5
# Of the sinusoidal embedding against float64, absolute: angles of up to 1000 are rounded to float32, 6e-5 apart.
EMBEDDING_TOLERANCE = 1e-4


@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_embedding(dim):
    t, half = torch.tensor([0.0, 1.0, 7.5, 999.0]), dim // 2
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
    expected = F.pad(torch.cat([angles.cos(), angles.sin()], dim=1), (0, dim % 2))
    made = timestep_embedding(t, dim, torch.float32)
    assert made.dtype == torch.float32
    assert float((made - expected).abs().max()) < EMBEDDING_TOLERANCE
    # Planted: DDIM's exponent, and its order.
    other = t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / (half - 1))
    assert float((made[:, :half] - other.cos()).abs().max()) > EMBEDDING_TOLERANCE
    assert float((made[:, :half] - angles.sin()).abs().max()) > EMBEDDING_TOLERANCE


def normed(x, norm, eps=1e-5):
    groups = x.double().reshape(len(x), 32, -1)
    variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
    shape = (1, -1, *[1] * (x.dim() - 2))
    out = ((groups - mean) / (variance + eps).sqrt()).reshape(x.shape).float()
    return out * norm.weight.reshape(shape) + norm.bias.reshape(shape)


def resblock(x, emb, block, scale_shift, resample):
    """The residual block in plain calls."""
    first, second = block.in_layers[2], block.out_layers[3]
    h = F.silu(normed(x, block.in_layers[0]))
    if resample == "up":
        h, x = (v.repeat_interleave(2, 2).repeat_interleave(2, 3) for v in (h, x))
    if resample == "down":
        h, x = (v.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).mean((3, 5)) for v in (h, x))
    h = F.conv2d(h, first.weight, first.bias, padding=1)
    projection = block.emb_layers[1]
    emb = F.linear(F.silu(emb), projection.weight, projection.bias)[:, :, None, None]
    half = h.shape[1]
    if scale_shift:
        h = normed(h, block.out_layers[0]) * (1 + emb[:, :half]) + emb[:, half:]
    else:
        h = normed(h + emb, block.out_layers[0])
    h = F.conv2d(F.silu(h), second.weight, second.bias, padding=1)
    if not isinstance(block.skip_connection, nn.Identity):
        x = F.conv2d(x, block.skip_connection.weight, block.skip_connection.bias)
    return x + h


@pytest.mark.parametrize("out", [64, 96])
@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("resample", [None, "up", "down"])
@torch.no_grad()
def test_resblock(out, scale_shift, resample, fill, relative):
    block = ResBlock(64, out, 24, dropout=0.5, use_scale_shift_norm=scale_shift, resample=resample)
    fill(block.eval())
    x, emb = torch.randn(2, 64, 4, 4), torch.randn(2, 24)
    made = block(x, emb)
    side = {None: 4, "up": 8, "down": 2}[resample]
    assert made.shape == (2, out, side, side)
    assert relative(made, resblock(x, emb, block, scale_shift, resample)) < SAME_TOLERANCE
    # Planted: the embedding of another sample, and no resampling where there should be.
    assert relative(made, resblock(x, emb.flip(0), block, scale_shift, resample)) > SAME_TOLERANCE
    if resample == "up":
        smoothed = F.interpolate(x, scale_factor=2.0, mode="bilinear")
        assert relative(Upsample(64, False)(x), smoothed) > SAME_TOLERANCE


@torch.no_grad()
def test_resampling_with_convolution(fill, relative):
    x = torch.randn(2, 32, 4, 6)
    up, down = fill(Upsample(32, use_conv=True)), fill(Downsample(32, use_conv=True))
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert relative(up(x), F.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1)) < SAME_TOLERANCE
    padded = F.pad(x, (1, 1, 1, 1))
    assert relative(down(x), F.conv2d(padded, down.op.weight, down.op.bias, stride=2)) < SAME_TOLERANCE
    # Planted: the padding of DDIM, at the lower right alone.
    other = F.conv2d(F.pad(x, (0, 1, 0, 1)), down.op.weight, down.op.bias, stride=2)
    assert relative(down(x), other) > SAME_TOLERANCE
    assert Downsample(1, use_conv=False)(torch.arange(16.0).reshape(1, 1, 4, 4)).flatten().tolist() == [
        2.5,
        4.5,
        10.5,
        12.5,
    ]


def softmax_attention(q, k, v):
    """Heads one by one, in float64; [heads, L, d]."""
    outs = []
    for head in range(len(q)):
        logits = q[head].double() @ k[head].double().T / q.shape[-1] ** 0.5
        outs.append(torch.softmax(logits, dim=1) @ v[head].double())
    return torch.stack(outs)


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_attention_block(heads, fill, relative):
    block, x = fill(AttentionBlock(64, heads)), torch.randn(2, 64, 3, 4)
    made = block(x)
    d = 64 // heads

    def reference(order):
        out = []
        for flat in normed(x, block.norm).flatten(2):
            qkv = block.qkv.weight[:, :, 0] @ flat + block.qkv.bias[:, None]  # [3·64, positions]
            picked = [torch.stack([qkv[order(h, part)].T for h in range(heads)]) for part in range(3)]
            out.append(softmax_attention(*picked).transpose(1, 2).reshape(64, -1).float())
        h = torch.stack(out)
        return x + (block.proj_out.weight[:, :, 0] @ h + block.proj_out.bias[:, None]).reshape(x.shape)

    def legacy(h, part):
        return slice((3 * h + part) * d, (3 * h + part + 1) * d)

    def new(h, part):
        return slice((part * heads + h) * d, (part * heads + h + 1) * d)

    assert relative(made, reference(legacy)) < SAME_TOLERANCE
    if heads > 1:  # planted: the other order
        assert relative(made, reference(new)) > SAME_TOLERANCE
    # Both orders are one function under a permutation of the projection's rows.
    rows = torch.cat([torch.arange(192)[legacy(h, part)] for part in range(3) for h in range(heads)])
    other = AttentionBlock(64, heads, new_order=True)
    other.load_state_dict(block.state_dict())
    assert (relative(other(x), made) > SAME_TOLERANCE) == (heads > 1)
    other.qkv.weight.copy_(block.qkv.weight[rows])
    other.qkv.bias.copy_(block.qkv.bias[rows])
    assert relative(other(x), made) < SAME_TOLERANCE


def test_only_unconditional_attention_scales_before_quantization():
    assert AttentionBlock(32, 2).attention.prescale
    cores = [m for m in SpatialTransformer(32, 2, 16, context_dim=8).modules() if isinstance(m, AttentionCore)]
    assert [c.prescale for c in cores] == [False, False]


def run_steps(transformer, x, context):
    state = {"h": x, "context": context}
    names = []
    for step in transformer.steps("t"):
        names.append(step.name)
        step(state)
    assert set(state) == {"h", "context"}
    return state["h"], names


def layer_norm(x, norm):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight + norm.bias


def attend(layer, x, context, heads):
    q, k, v = ((m.weight @ s.T).T for m, s in ((layer.to_q, x), (layer.to_k, context), (layer.to_v, context)))
    split = [part.unflatten(1, (heads, -1)).transpose(0, 1) for part in (q, k, v)]
    out = softmax_attention(*split).transpose(0, 1).flatten(1).float()
    return out @ layer.to_out[0].weight.T + layer.to_out[0].bias


def spatial_transformer(transformer, x, context, heads):
    """The transformer sample by sample, tokens as rows of a matrix."""
    results = []
    for image, tokens in zip(x, context, strict=True):
        maps = normed(image[None], transformer.norm, eps=1e-6)[0].flatten(1)  # [C, positions]
        rows = (transformer.proj_in.weight[:, :, 0, 0] @ maps + transformer.proj_in.bias[:, None]).T
        for block in transformer.transformer_blocks:
            own = layer_norm(rows, block.norm1)
            rows = rows + attend(block.attn1, own, own, heads)
            rows = rows + attend(block.attn2, layer_norm(rows, block.norm2), tokens, heads)
            gate = block.ff.net[0].proj
            both = layer_norm(rows, block.norm3) @ gate.weight.T + gate.bias
            half = both.shape[1] // 2
            gated = both[:, :half] * 0.5 * both[:, half:] * (1 + torch.erf(both[:, half:] / 2**0.5))
            rows = rows + gated @ block.ff.net[2].weight.T + block.ff.net[2].bias
        out = transformer.proj_out.weight[:, :, 0, 0] @ rows.T + transformer.proj_out.bias[:, None]
        results.append(image + out.reshape(image.shape))
    return torch.stack(results)


@pytest.mark.parametrize(("heads", "depth"), [(1, 1), (4, 2)])
@torch.no_grad()
def test_spatial_transformer(heads, depth, fill, relative):
    transformer = fill(SpatialTransformer(64, heads, 32 // heads, depth, context_dim=12)).eval()
    x, context = torch.randn(2, 64, 3, 4), torch.randn(2, 5, 12)
    made, names = run_steps(transformer, x, context)
    assert relative(made, spatial_transformer(transformer, x, context, heads)) < SAME_TOLERANCE
    # Planted: another sample's context, and another number of heads.
    assert relative(made, spatial_transformer(transformer, x, context.flip(0), heads)) > SAME_TOLERANCE
    assert relative(made, spatial_transformer(transformer, x, context, heads * 2)) > SAME_TOLERANCE
    assert names == ["t.proj_in", *(f"t.transformer_blocks.{i}" for i in range(depth)), "t.proj_out"]


def test_branches_end_in_zeros():
    """A new block is the identity: training starts from there."""
    torch.manual_seed(0)
    x, emb, context = torch.randn(2, 64, 4, 4), torch.randn(2, 24), torch.randn(2, 5, 12)
    assert torch.equal(ResBlock(64, 64, 24, dropout=0.0)(x, emb), x)
    assert torch.equal(AttentionBlock(64, 2)(x), x)
    assert torch.equal(run_steps(SpatialTransformer(64, 2, 32, context_dim=12), x, context)[0], x)


def test_feed_forward_drops_while_training_alone():
    torch.manual_seed(0)
    layer, x = FeedForward(32, dropout=0.5), torch.randn(2, 3, 32)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_checkpointing_recomputes_and_changes_nothing(fill, relative):
    inputs = {"attention": (torch.randn(2, 64, 3, 4),), "residual": (torch.randn(2, 64, 3, 4), torch.randn(2, 24))}
    for name, given in inputs.items():
        results, calls = {}, {}
        for use in (False, True):
            made = {
                "attention": lambda use=use: AttentionBlock(64, 4, use_checkpoint=use),
                "residual": lambda use=use: ResBlock(64, 96, 24, 0.0, use_checkpoint=use),
            }
            block = fill(made[name]())
            calls[use] = []
            compute = block.compute
            block.compute = lambda *a, compute=compute, seen=calls[use]: seen.append(1) or compute(*a)
            x = given[0].clone().requires_grad_()
            out = block(x, *given[1:])
            out.square().sum().backward()
            results[use] = [out.detach(), x.grad, *(p.grad for p in block.parameters())]
            with torch.no_grad():
                block(x, *given[1:])
        assert (len(calls[False]), len(calls[True])) == (2, 3), "recomputed once, and never without gradients"
        for plain, again in zip(results[False], results[True], strict=True):
            assert relative(again, plain) < SAME_TOLERANCE
