"""Conditions as one context: joined and divided again without a change."""

from __future__ import annotations

import pytest

pytest.importorskip("diffusers")

import torch

from qdiff.diffusers_backend.module import Conditions


def test_conditions_come_back():
    given = (
        torch.randn(3, 5, 4),
        torch.tensor([7, 999, 0]),
        torch.randn(3, 6),
        torch.tensor([[True], [False], [True]]),
    )
    conditions = Conditions.of(given)
    context = conditions.join(given)
    assert context.shape == (3, 1, conditions.size) and conditions.size == 20 + 1 + 6 + 1
    for back, wanted in zip(conditions.split(context), given, strict=True):
        assert back.dtype == wanted.dtype and torch.equal(back, wanted)


def test_floats_take_the_dtype_of_the_context():
    conditions = Conditions.of((torch.randn(2, 3), torch.tensor([1, 2])))
    floats, labels = conditions.split(torch.ones(2, 1, 4, dtype=torch.float64))
    assert floats.dtype == torch.float64 and labels.dtype == torch.int64
