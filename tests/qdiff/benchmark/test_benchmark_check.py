"""A variant that computes another network than it is called is not timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qdiff.benchmark.files import FLOAT, NATIVE
from qdiff.benchmark.parity import LAST_BITS
from qdiff.benchmark.variants import _check
from qdiff.errors import UserError

CALLS = [(torch.full((4,), float(i)),) for i in range(3)]
SIMULATED = [torch.tensor([1.0, 2, 3, 4]) + i for i in range(3)]
QUANTIZATION = 0.2  # relative error of the simulation against float


def job(last_bits: float = 0.0) -> SimpleNamespace:
    """Args: last_bits: relative error that last bits make."""
    factors = {FLOAT: 1 + QUANTIZATION, NATIVE: 1, LAST_BITS: 1 + last_bits}
    return SimpleNamespace(
        outputs=lambda name: [factors[name] * out for out in SIMULATED],
        checked_calls=CALLS,
    )


JOB = job()


def network(*factors: float):
    """Off by a factor at each call."""
    outputs = iter(factor * out for factor, out in zip(factors, SIMULATED, strict=True))
    return lambda x: next(outputs)


@pytest.mark.parametrize("variant", ["torch-int8", "onnxruntime", "openvino"])
def test_of_quantized_variants(variant):
    _check(network(1, 1.05, 0.95), JOB, variant)  # rounding edges
    for wrong, error in (
        ((1.2, 1.2, 1.2), "0.2"),  # float in the place of integers
        ((1, 1, 1.2), "0.2"),  # a later step alone, of a modulated network
        ((1, float("nan"), 1), "nan"),
    ):
        with pytest.raises(
            UserError, match=rf"computes something else \(relative error {error} against the simulation"
        ):
            _check(network(*wrong), JOB, variant)


@pytest.mark.parametrize("variant", ["torch-int8", "openvino"])
def test_what_last_bits_do_is_allowed(variant):
    """To a modulated network of random weights they do more than rounding edges to others."""
    right = network(1, 1.14, 0.86)
    with pytest.raises(UserError, match="computes something else"):
        _check(right, JOB, variant)
    _check(network(1, 1.14, 0.86), job(last_bits=0.1), variant)
    with pytest.raises(UserError, match="computes something else"):
        _check(network(1.2, 1.2, 1.2), job(last_bits=0.1), variant)


@pytest.mark.parametrize("variant", ["simulated", "torch"])
def test_of_what_computes_the_simulation_to_the_bit(variant):
    _check(network(1, 1, 1 + 1e-5), job(last_bits=0.1), variant)
    with pytest.raises(UserError, match=r"relative error 0\.01 against the simulation"):
        _check(network(1, 1, 1.01), job(last_bits=0.1), variant)


def test_of_float_variants():
    right = [1 + QUANTIZATION] * 3
    _check(network(*right), JOB, "openvino-float")
    with pytest.raises(UserError, match="against float"):
        _check(network(*right[:2], right[2] * 1.01), JOB, "openvino-float")
