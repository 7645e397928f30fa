"""Gradients of the output error at a step against autograd through the whole network."""

from __future__ import annotations

import pytest
import torch

from qdiff.calibration.fisher import output_gradients
from qdiff.calibration.storage import ActivationStorage
from qdiff.calibration.walk import Walker, walk
from qdiff.modes import LEAVES, leaf_modes

# Relative L2: the same backward pass at another batch size.
GRADIENT_TOLERANCE = 1e-4

STEPS = ["temb.dense.1", "conv_in", "down.0.block.0", "down.1.attn.0", "up.1.block.1", "up.0.block.1", "conv_out"]


def full_autograd(qnn, data, name, final, planted=1.0):
    """One forward of the whole network, weights quantized up to the step in execution order; ∂L/∂output by autograd."""
    steps = list(qnn.model.steps())
    index = [s.name for s in steps].index(name)
    outputs = []

    def watch(module, args, out):
        outputs.append(out.detach().requires_grad_(True))
        return outputs[-1]

    handle = steps[index].module.register_forward_hook(watch)
    try:
        with leaf_modes([s.module for s in steps[: index + 1]], weights=True, activations=False), torch.enable_grad():
            loss = (qnn(*data.inputs) - final * planted).square().sum()
            return torch.autograd.grad(loss, outputs[0])[0]
    finally:
        handle.remove()


@pytest.fixture
def tiny_config(tiny_config):
    """Two channels a norm group: with one, the norm takes out what the time embedding adds."""
    tiny_config.model.ch = 64
    return tiny_config


@pytest.mark.parametrize("name", STEPS)
def test_gradients_match_full_autograd(calibrated, data, relative, name):
    qnn = calibrated(weight_bits=4, split_shortcut=True)
    walker = Walker(ActivationStorage(), torch.device("cpu"), 5)  # a remainder of 2
    final = walker.run(qnn, data.inputs)
    for index, step, _, state in walk(qnn.model, data.inputs, walker, weights=True, activations=False):
        if step.name == name:
            skips = len(state["skips"])
            gradients = output_gradients(qnn.model, index, state, final, walker)
            assert len(state["skips"]) == skips, "the walk's state was changed"
            break
    expected = full_autograd(qnn, data, name, final)
    assert gradients.shape == expected.shape
    assert expected.norm() > 0
    assert relative(gradients, expected) < GRADIENT_TOLERANCE
    assert relative(gradients, full_autograd(qnn, data, name, final, planted=1.01)) > GRADIENT_TOLERANCE
    assert not any(getattr(m, "weights_quantized", False) for m in qnn.modules() if isinstance(m, LEAVES))
    assert not any(p.requires_grad for p in qnn.parameters())
