"""How the samples of a unit's batches come to its device: every pass has the rows that were drawn."""

from __future__ import annotations

import pytest
import torch

from qdiff.calibration.feeding import Feeding

CPU = torch.device("cpu")


def drawn(iterations=3, batch=5, count=8):
    return torch.stack([torch.randperm(count, generator=torch.Generator().manual_seed(i))[:batch] for i in range(3)])


@pytest.mark.parametrize("pass_size", [None, 2, 5, 99])
def test_passes_are_the_batches_in_order(pass_size):
    numbers, images = torch.arange(8), torch.arange(8.0)[:, None] * 10
    batches, feeding = drawn(), Feeding(CPU, pass_size)
    passes = list(feeding.passes((numbers, images), batches))
    assert [len(rows) for rows, _ in passes] == feeding.pass_counts(5) * 3
    assert torch.equal(torch.cat([rows for rows, _ in passes]), batches.flatten())
    assert all(torch.equal(i[:, 0], rows * 10.0) for rows, i in passes)


def test_pass_counts_add_up_to_the_batch():
    assert Feeding(CPU, 2).pass_counts(5) == [2, 2, 1]
    assert Feeding(CPU).pass_counts(5) == [5] == Feeding(CPU, 7).pass_counts(5)
