"""The latent UNet as a whole: its steps, its concatenations, gradients, and arguments that it does not take."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ldm.modules.diffusionmodules.openaimodel import UNetModel
from qdiff.config import QuantConfig
from qdiff.errors import UserError
from qdiff.interface import AttentionCore
from qdiff.quant_model import QuantModel

# Relative L2 of float32 outputs computed in another order.
SAME_TOLERANCE = 1e-5
# Norms that run between steps, which quantization leaves alone.
OUTSIDE = (".norm.weight", ".norm.bias", "out.0.weight", "out.0.bias")


@torch.no_grad()
def test_steps_are_the_forward_and_cover_every_layer_once(kind, make_unet, unet_inputs):
    network = make_unet(kind)
    inputs = unet_inputs(network)
    executed = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Conv1d | nn.Linear | AttentionCore):
            module.register_forward_hook(lambda *_, name=name: executed.append(name))
    state = network.start(*inputs)
    steps = list(network.steps())
    for step in steps:
        assert network.get_submodule(step.name) is step.module
        step(state)
    by_steps, executed[:] = executed[:], []
    assert torch.equal(state["h"], network(*inputs))
    assert executed == by_steps and len(set(executed)) == len(executed)
    layers = {n for n, m in network.named_modules() if isinstance(m, nn.Conv2d | nn.Conv1d | nn.Linear | AttentionCore)}
    assert set(executed) == layers
    assert state["skips"] == [] and "tokens" not in state
    # Every parameter belongs to exactly one step, but those of norms that run between steps.
    owners = [name for step in steps for name, p in network.named_parameters() if name.startswith(f"{step.name}.")]
    assert len(owners) == len(set(owners))
    left = {name for name, _ in network.named_parameters()} - set(owners)
    assert left == {n for n in left if n.endswith(OUTSIDE)}


@torch.no_grad()
@pytest.mark.parametrize("shape", [([1, 1], 1), ([1, 2], 2), ([2, 1, 3], 1)], ids=str)
def test_split_at_is_the_channel_count_of_h(kind, shape, make_unet, unet_inputs):
    network = make_unet(kind, channel_mult=shape[0], num_res_blocks=shape[1])
    state = network.start(*unet_inputs(network))
    seen = set()
    for step in network.steps():
        if step.name.startswith("output_blocks") and step.name.split(".")[2:] == ["0"]:
            shortcut, h, skip = step.module.skip_connection, state["h"].shape[1], state["skips"][-1].shape[1]
            assert shortcut.split_at == h, step.name
            assert shortcut.in_channels == h + skip
            seen.add(f"{step.name}.skip_connection")
        step(state)
    assert {n for n, m in network.named_modules() if hasattr(m, "split_at")} == seen  # and nowhere else
    split = {n for n, m in QuantModel(network, QuantConfig(4, split_shortcut=True)).layers().items() if m.slices[1:]}
    assert split == seen


@torch.no_grad()
def test_samples_do_not_see_each_other(kind, make_unet, unet_inputs, relative):
    network = make_unet(kind)
    x, t, *context = unet_inputs(network, count=3)
    together = network(x, t, *context)
    alone = torch.cat([network(x[i : i + 1], t[i : i + 1], *(c[i : i + 1] for c in context)) for i in range(3)])
    assert relative(alone, together) < SAME_TOLERANCE
    # Planted: others' timesteps, others' conditions.
    assert relative(network(x, t.flip(0), *context), together) > SAME_TOLERANCE
    for other in context:
        assert relative(network(x, t, other.flip(0)), together) > SAME_TOLERANCE


def test_checkpointing_changes_neither_output_nor_gradients(kind, make_unet, unet_inputs, relative):
    results = {}
    for use in (False, True):
        network = make_unet(kind, use_checkpoint=use).train()
        out = network(*unet_inputs(network))
        out.square().sum().backward()
        results[use] = {"out": out.detach()} | {n: p.grad for n, p in network.named_parameters()}
        assert all(g is not None and bool(g.abs().max() > 0) for g in results[use].values())
    for name, value in results[False].items():
        assert relative(results[True][name], value) < SAME_TOLERANCE, name


def test_training_works_in_any_memory_format(kind, make_unet, unet_inputs, relative):
    """The CPU's GroupNorm backward has crashed on channels-last memory."""
    gradients = []
    for given, stored in ((torch.contiguous_format,) * 2, (torch.channels_last,) * 2):
        network = make_unet(kind).train().to(memory_format=stored)
        x, *rest = unet_inputs(network)
        out = network(x.contiguous(memory_format=given), *rest)
        out.square().sum().backward()
        gradients.append({n: p.grad.contiguous() for n, p in network.named_parameters()})
    for name, value in gradients[0].items():
        assert relative(gradients[1][name], value) < SAME_TOLERANCE, name


def test_a_new_network_predicts_zero(unet_inputs, fill):
    made = UNetModel(8, 3, 64, 3, 1, [2], channel_mult=[1, 1], num_heads=2)
    assert not made(*unet_inputs(made)).any()
    assert fill(made)(*unet_inputs(made)).all()


@torch.no_grad()
def test_other_resolutions_and_integer_dtypes(make_unet):
    network = make_unet("bedroom")
    assert network(torch.randn(1, 3, 4, 12), torch.tensor([5], dtype=torch.int32)).shape == (1, 3, 4, 12)


@torch.no_grad()
@pytest.mark.parametrize("released", ["bedroom", "church"])
def test_half_precision_stays_half(released, make_unet, unet_inputs):
    network = make_unet(released).to(torch.bfloat16)
    x, t = unet_inputs(network)
    assert network(x.bfloat16(), t).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dims": 3}, "dims 2"),
        ({"num_classes": 10}, "num_classes"),
        ({"n_embed": 5}, "n_embed"),
        ({"num_heads": -1}, "num_heads or num_head_channels"),
        ({"use_spatial_transformer": True}, "context_dim"),
    ],
)
def test_arguments_of_no_released_model(changes, match):
    with pytest.raises(UserError, match=match):
        UNetModel(8, 3, 64, 3, 1, [2], **{"channel_mult": [1, 1], "num_heads": 2, **changes})


def test_context_must_fit(make_unet, unet_inputs):
    with_context, without = make_unet("sd"), make_unet("bedroom")
    x, t, context = unet_inputs(with_context)
    with pytest.raises(ValueError, match="needs a context"):
        with_context(x, t)
    with pytest.raises(ValueError, match="takes no context"):
        without(x, t, context)


def test_heads():
    """``num_head_channels`` is a width, ``num_heads`` a number; on the way up it may differ."""

    def heads(**arguments):
        network = UNetModel(8, 3, 64, 3, 1, [1, 2], channel_mult=[1, 2], **arguments)
        return [(n.split("_")[0], m.heads, m.qkv.in_channels) for n, m in network.named_modules() if hasattr(m, "qkv")]

    assert {(h, c // h) for _, h, c in heads(num_head_channels=32)} == {(2, 32), (4, 32)}
    assert {h for _, h, _ in heads(num_heads=8)} == {8}
    assert {(part, h) for part, h, _ in heads(num_heads=8, num_heads_upsample=2)} == {
        ("input", 8),
        ("middle", 8),
        ("output", 2),
    }
