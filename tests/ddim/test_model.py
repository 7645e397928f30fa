"""The UNet: published outputs, names and shapes of the released checkpoint, and where concatenations meet."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_cases import DDIM_CASES, GOLDEN, WIDE_DDIM_CASES, GoldenCase
from thorough import thorough_except

from ddim.config import load_config
from ddim.models.diffusion import Model
from ddim.models.layers import Downsample, ResnetBlock, timestep_embedding

REPOSITORY = Path(__file__).parents[2]

# Relative L2 error of float outputs against the published code's: float32 rounding in another order gives about 1e-6.
GOLDEN_TOLERANCE = 1e-5
# Of the sinusoidal embedding against float64, absolute: angles of up to 1000 are rounded to float32, 6e-5 apart.
EMBEDDING_TOLERANCE = 1e-4


def golden_network(case: str) -> tuple[Model, GoldenCase]:
    """Return the float network of a published case, and the case."""
    golden = GoldenCase(case)
    network = golden.network().eval()
    network.load_state_dict(golden.float_weights())
    return network, golden


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    return float((out - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", thorough_except(DDIM_CASES + WIDE_DDIM_CASES, *DDIM_CASES))
@torch.no_grad()
def test_float_output_is_the_published_one(case):
    network, golden = golden_network(case)
    assert relative_error(network(*golden.inputs), golden.values["fp"]) < GOLDEN_TOLERANCE


PLANTED = {
    "norm epsilon": lambda n: [setattr(m, "eps", 1e-5) for m in n.modules() if isinstance(m, torch.nn.GroupNorm)],
    "one weight": lambda n: n.up[0].block[0].nin_shortcut.weight.data[0, 0].mul_(1.1),
    "attention skipped": lambda n: setattr(n.mid, "attn_1", torch.nn.Identity()),
    "padding on the other side": lambda n: setattr(
        n.down[0].downsample, "forward", lambda x: n.down[0].downsample.conv(torch.nn.functional.pad(x, (1, 0, 1, 0)))
    ),
}


@pytest.mark.parametrize("error", PLANTED)
@torch.no_grad()
def test_planted_errors_are_beyond_the_tolerance(error):
    network, golden = golden_network(DDIM_CASES[0])
    PLANTED[error](network)
    assert relative_error(network(*golden.inputs), golden.values["fp"]) > GOLDEN_TOLERANCE


def test_names_and_shapes_of_the_released_checkpoint():
    manifest = json.loads((GOLDEN / "ddim_cifar10_unet.json").read_text())
    with torch.device("meta"):
        network = Model(load_config(REPOSITORY / "configs" / "cifar10.yml"))
    shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    assert shapes == manifest["tensors"]
    assert sum(p.numel() for p in network.parameters()) == manifest["parameters"]


@pytest.fixture
def wide_network(tiny_config):
    """A network that hears the timestep: at 32 channels each of the 32 norm groups is one channel, and the norm
    after the time embedding takes away what was added to the channel."""
    tiny_config.model.ch = 64
    torch.manual_seed(0)
    return Model(tiny_config).eval()


@pytest.fixture(params=[([1, 1], 1), ([1, 2], 1), ([1, 2, 2], 2), ([2, 1, 3], 1)], ids=str)
def shaped(request, tiny_config):
    """Networks whose h and skip differ in width."""
    config = copy.deepcopy(tiny_config)
    config.model.ch_mult, config.model.num_res_blocks = request.param
    torch.manual_seed(0)
    return Model(config).eval()


@torch.no_grad()
def test_split_at_is_the_channel_count_of_h(shaped):
    state = shaped.start(torch.randn(2, 1, 8, 8), torch.tensor([3, 700]))
    seen = 0
    for step in shaped.steps():
        if step.name.startswith("up.") and ".block." in step.name:
            shortcut, h, skip = step.module.nin_shortcut, state["h"].shape[1], state["skips"][-1].shape[1]
            assert shortcut.split_at == h, step.name
            assert shortcut.in_channels == h + skip
            seen += 1
        step(state)
    marked = [n for n, m in shaped.named_modules() if hasattr(m, "split_at")]
    assert len(marked) == seen > 0  # and nowhere else
    assert state["skips"] == []
    assert state["h"].shape == (2, 1, 8, 8)


@torch.no_grad()
def test_steps_name_their_modules_in_execution_order(shaped):
    steps, executed = list(shaped.steps()), []
    for step in steps:
        assert shaped.get_submodule(step.name) is step.module
        step.module.register_forward_hook(lambda *_, name=step.name: executed.append(name))
    shaped(torch.randn(1, 1, 8, 8), torch.tensor([5]))
    assert executed == [step.name for step in steps]
    covered = {id(p) for step in steps for p in step.module.parameters()}
    left = {name for name, p in shaped.named_parameters() if id(p) not in covered}
    assert left == {"norm_out.weight", "norm_out.bias"}  # no layer that could be quantized is outside of the steps


@torch.no_grad()
def test_samples_do_not_see_each_other(wide_network):
    x, t = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 500, 999])
    together = wide_network(x, t)
    alone = torch.cat([wide_network(x[i : i + 1], t[i : i + 1]) for i in range(3)])
    assert relative_error(alone, together) < GOLDEN_TOLERANCE
    assert relative_error(wide_network(x, t.flip(0)), together) > GOLDEN_TOLERANCE  # planted: others' timesteps


@torch.no_grad()
def test_time_embedding_against_the_formula(wide_network):
    """emb → dense → SiLU → dense; the golden networks are deaf to it (see `wide_network`)."""
    t, first, second = torch.tensor([0, 7, 999]), *wide_network.temb.dense
    state = wide_network.start(torch.zeros(3, 1, 8, 8), t)
    for step in itertools.islice(wide_network.steps(), 2):
        step(state)
    hidden = first(timestep_embedding(t, wide_network.ch, torch.float32))
    assert relative_error(state["temb"], second(F.silu(hidden))) < GOLDEN_TOLERANCE
    assert relative_error(state["temb"], second(hidden)) > GOLDEN_TOLERANCE


@pytest.mark.parametrize(("wide_in", "wide_out"), [(64, 64), (64, 128)])
@torch.no_grad()
def test_resnet_block_against_the_formula(wide_in, wide_out):
    torch.manual_seed(0)
    block = ResnetBlock(wide_in, wide_out, 16, dropout=0.5).eval()
    for norm in (block.norm1, block.norm2):
        torch.nn.init.normal_(norm.weight)
        torch.nn.init.normal_(norm.bias)
    x, temb = torch.randn(2, wide_in, 4, 4), torch.randn(2, 16)

    def normed(h, norm):
        groups = h.double().reshape(2, 32, -1)
        variance, mean = torch.var_mean(groups, dim=2, correction=0, keepdim=True)
        h = ((groups - mean) / (variance + 1e-6).sqrt()).reshape(h.shape).float()
        return h * norm.weight[:, None, None] + norm.bias[:, None, None]

    def reference(heard):
        h = F.conv2d(F.silu(normed(x, block.norm1)), block.conv1.weight, block.conv1.bias, padding=1)
        h = h + F.linear(heard, block.temb_proj.weight, block.temb_proj.bias)[:, :, None, None]
        h = F.conv2d(F.silu(normed(h, block.norm2)), block.conv2.weight, block.conv2.bias, padding=1)
        shortcut = x if wide_in == wide_out else F.conv2d(x, block.nin_shortcut.weight, block.nin_shortcut.bias)
        return shortcut + h

    out = block(x, temb)
    assert relative_error(out, reference(F.silu(temb))) < GOLDEN_TOLERANCE
    assert relative_error(out, reference(temb)) > GOLDEN_TOLERANCE  # planted: no SiLU before the projection


@torch.no_grad()
def test_dropout_only_while_training(tiny_network):
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([1, 2])
    assert torch.equal(tiny_network(x, t), tiny_network(x, t))
    tiny_network.train()
    assert not torch.equal(tiny_network(x, t), tiny_network(x, t))


@pytest.mark.parametrize("dim", [32, 33])
def test_timestep_embedding_against_the_formula(dim):
    t = torch.tensor([0.0, 1.0, 7.5, 999.0])
    half = dim // 2
    angles = t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / (half - 1))
    expected = torch.zeros(4, dim, dtype=torch.float64)
    expected[:, :half], expected[:, half : 2 * half] = angles.sin(), angles.cos()
    made = timestep_embedding(t, dim, torch.float32)
    assert made.dtype == torch.float32
    assert float((made - expected).abs().max()) < EMBEDDING_TOLERANCE
    # Planted: the exponent of the original Transformer, i / (dim/2).
    other = (t.double()[:, None] * 10000.0 ** (-torch.arange(half).double() / half)).sin()
    assert float((made[:, :half] - other).abs().max()) > EMBEDDING_TOLERANCE


def test_downsampling_without_convolution_averages():
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert Downsample(1, with_conv=False)(x)[0, 0].tolist() == [[2.5, 4.5], [10.5, 12.5]]
