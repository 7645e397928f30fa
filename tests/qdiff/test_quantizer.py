"""Quantizer modules: state from construction, observing, counting, gradients."""

from __future__ import annotations

import torch

from qdiff.functional import fake_quantize_inference
from qdiff.quantizer import ActQuantizer, Quantizer, WeightQuantizer
from qdiff.ranges.min_max import MinMax


def test_all_state_is_there_from_construction():
    state = ActQuantizer(8).state_dict()
    assert {k: v.dtype for k, v in state.items()} == {
        "delta": torch.float32,
        "zero_point": torch.int32,
        "initialised": torch.bool,
    }
    assert not state["initialised"]


def test_setting_marks_it_initialised_and_survives_a_strict_load():
    quantizer = Quantizer(4, shape=(3, 1))
    quantizer.set(torch.tensor([[0.1], [0.2], [0.3]]), torch.tensor([[1], [2], [3]]))
    other = Quantizer(4, shape=(3, 1))
    other.load_state_dict(quantizer.state_dict(), strict=True)
    assert other.initialised
    assert torch.equal(other.delta, quantizer.delta) and torch.equal(other.zero_point, quantizer.zero_point)


def test_weight_quantizer_has_one_scale_a_row():
    assert WeightQuantizer(4, False, torch.zeros(5, 2, 3, 3)).delta.shape == (5, 1, 1, 1)
    assert WeightQuantizer(4, False, torch.zeros(5, 2)).delta.shape == (5, 1)


def test_observing_passes_values_unchanged_and_does_not_count():
    quantizer, x = ActQuantizer(4), torch.randn(20, generator=torch.Generator().manual_seed(0))
    quantizer.observer = MinMax()
    assert quantizer(x) is x
    assert quantizer.fired == 0 and not quantizer.initialised
    quantizer.settle()
    assert quantizer.observer is None and quantizer.initialised
    y = quantizer(x)
    assert quantizer.fired == 1
    assert not torch.equal(y, x)
    assert torch.equal(y, fake_quantize_inference(x, quantizer.delta, quantizer.zero_point, 4))


def test_step_size_gets_a_gradient_only_while_it_is_learned():
    quantizer, x = ActQuantizer(4), torch.linspace(-1, 1, 9)
    quantizer.set(torch.tensor(0.3), torch.tensor(7))
    assert not quantizer(x).requires_grad
    quantizer.delta.requires_grad_(True)
    quantizer(x).sum().backward()
    assert quantizer.delta.grad is not None
    with torch.no_grad():
        assert not quantizer(x).requires_grad


def test_gradients_reach_the_input_though_the_step_size_is_fixed():
    """Rounding of an early layer is learned through later quantized activations."""
    quantizer = ActQuantizer(4)
    quantizer.set(torch.tensor(0.3), torch.tensor(7))
    x = torch.zeros(3, requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == [1, 1, 1]
