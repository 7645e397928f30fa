"""A variant that computes another network than it is called is not timed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qdiff.benchmark.files import FLOAT, NATIVE
from qdiff.benchmark.variants import _check
from qdiff.errors import UserError

CALLS = [(torch.full((4,), float(i)),) for i in range(3)]
SIMULATED = [torch.tensor([1.0, 2, 3, 4]) + i for i in range(3)]
QUANTIZATION = 0.2  # relative error of the simulation against float
JOB = SimpleNamespace(
    outputs=lambda name: {FLOAT: [(1 + QUANTIZATION) * out for out in SIMULATED], NATIVE: SIMULATED}[name],
    checked_calls=CALLS,
)


def network(*factors: float):
    """Off by a factor at each call."""
    outputs = iter(factor * out for factor, out in zip(factors, SIMULATED, strict=True))
    return lambda x: next(outputs)


@pytest.mark.parametrize("variant", ["simulated", "torch-int8", "onnxruntime", "openvino"])
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


def test_of_float_variants():
    right = [1 + QUANTIZATION] * 3
    _check(network(*right), JOB, "openvino-float")
    with pytest.raises(UserError, match="against float"):
        _check(network(*right[:2], right[2] * 1.01), JOB, "openvino-float")
