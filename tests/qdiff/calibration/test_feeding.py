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


def fed_on(cuda, resident_bytes, planted=False):
    """Return the passes on the virtual GPU, back on the CPU, and what was counted once the first had been asked for."""
    numbers, images = torch.arange(8), torch.arange(8.0)[:, None] * 10
    feeding = Feeding(torch.device("cuda", 0), 2, resident_bytes)
    samples = feeding.passes((numbers, images), drawn())
    first = next(samples)
    with cuda.counting() as counts:
        rest = [tuple(t.to("cuda") for t in (numbers[:2], images[:2])) for _ in range(8)] if planted else list(samples)
    assert all(t.device.type == "cuda" for passed in (first, *rest) for t in passed)
    return [tuple(t.cpu() for t in passed) for passed in (first, *rest)], counts


@pytest.mark.parametrize("resident_bytes", [0, 1 << 20])
def test_nothing_waits_for_the_gpu(resident_bytes, cuda):
    passes, counts = fed_on(cuda, resident_bytes)
    assert torch.equal(torch.cat([rows for rows, _ in passes]), drawn().flatten())
    assert all(torch.equal(i[:, 0], rows * 10.0) for rows, i in passes)
    assert counts.waits == [] and counts.pageable() == []
    if resident_bytes:
        assert counts.transfers == []
    else:
        assert len(counts.transfers) == 2 * (len(passes) - 1)
    assert len(fed_on(cuda, resident_bytes, planted=True)[1].pageable()) == 16


def test_what_is_on_the_gpu_already_takes_no_room(cuda):
    numbers = torch.arange(8, device="cuda")
    passes = list(Feeding(torch.device("cuda", 0), None, 0).passes((numbers,), drawn()))
    assert torch.equal(torch.stack([rows.cpu() for (rows,) in passes]), drawn())
