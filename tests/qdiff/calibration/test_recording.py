"""Recording a sampler's calls: which, for whom, and with which conditions."""

from __future__ import annotations

import pytest
import torch

from qdiff.calibration.recording import record_calls
from qdiff.calibration.samples import load_recording, save_recording, select_samples

CALLS, COUNT, SHAPE = 6, 5, (2, 4, 4)


def sampler(conditional=False, guided=False, dtype=torch.float32):
    """Every value says of which call and image it is; conditions belong to the image."""

    def sample(on_call, indices):
        numbers = torch.tensor(list(indices), dtype=dtype)
        context = numbers[:, None, None].expand(-1, 3, 2) if conditional else None
        nothing = -torch.ones_like(context) if guided else None
        for call in range(CALLS):
            x = (numbers + 100 * call)[:, None, None, None].expand(-1, *SHAPE).clone()
            on_call(x, torch.full((len(indices),), 900 - 100 * call), *([context, nothing] if conditional else []))
            x.zero_()  # samplers may reuse their memory

    return sample


@pytest.mark.parametrize("batch_size", [1, 2, 5, 64])
def test_chosen_calls_of_every_image(batch_size):
    finished = []
    made = record_calls(sampler(), COUNT, batch_size, keep=[0, 2, 5], on_batch=finished.append)
    assert set(made) == {"xs", "ts"}
    assert made["xs"].shape == (3, COUNT, *SHAPE) and made["xs"].dtype == torch.float32
    assert made["xs"][:, :, 0, 0, 0].tolist() == [[100 * call + i for i in range(COUNT)] for call in (0, 2, 5)]
    assert made["ts"].tolist() == [[900 - 100 * call] * COUNT for call in (0, 2, 5)]
    assert sum(finished) == COUNT and len(finished) == -(-COUNT // batch_size)


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("batch_size", [2, 5])
def test_conditions_are_kept_beside_their_samples(guided, batch_size):
    made = record_calls(sampler(True, guided), COUNT, batch_size, keep=[1, 4])
    assert set(made) == {"xs", "ts", "cs"} | ({"ucs"} if guided else set())
    assert made["cs"].shape == (2, COUNT, 3, 2)
    assert made["cs"][:, :, 0, 0].tolist() == [list(range(COUNT))] * 2
    if guided:
        assert made["ucs"].shape == (2, COUNT, 3, 2) and bool((made["ucs"] == -1).all())


def test_half_precision_calls_are_recorded_in_float():
    assert record_calls(sampler(dtype=torch.bfloat16), 2, 2, keep=[0])["xs"].dtype == torch.float32


@pytest.mark.parametrize("guided", [False, True])
def test_a_recording_becomes_a_calibration_set(guided, tmp_path):
    """Record, save, load and select: each sample keeps its own condition."""
    save_recording(record_calls(sampler(True, guided), COUNT, 2, keep=range(CALLS)), tmp_path / "data.pt")
    data = select_samples(load_recording(tmp_path / "data.pt"), 3, 2, SHAPE, conditional=True)
    x, t, context = data.inputs
    assert x[:6, 0, 0, 0].tolist() == [0, 1, 200, 201, 400, 401]
    assert t[:6].tolist() == [900, 900, 700, 700, 500, 500]
    assert context[:6, 0, 0].tolist() == [0, 1] * 3
    assert len(data) == len(t) == len(context) == (12 if guided else 6)
    if guided:
        assert torch.equal(x[6:], x[:6]) and bool((context[6:] == -1).all())
