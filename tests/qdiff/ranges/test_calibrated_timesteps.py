"""Which entry of a table of ranges a timestep takes, and the average of extremes that such a range may come from."""

from __future__ import annotations

import copy

import pytest
import torch

from qdiff.errors import UserError
from qdiff.functional import fake_quantize_inference
from qdiff.ranges.calibrated_timesteps import CalibratedTimesteps, at_timestep, watched
from qdiff.ranges.least_error import LeastError
from qdiff.ranges.moving_average import MovingAverage


def calibrated(*values):
    made = CalibratedTimesteps()
    made.set(torch.tensor(values, dtype=torch.float32))
    return made


@pytest.mark.parametrize("steps", [2, 10, 20, 50, 200, 1000])
def test_uniform_steps_have_the_published_entries(steps):
    """TFMQ-DM counts entries from the noisiest: (T − 1) − (t − 1)//(1000//T)."""
    width = 1000 // steps
    made = calibrated(*range(1, 1001, width))
    t = torch.arange(1, 1001)
    published = (steps - 1) - (t - 1) // width
    assert torch.equal(made.entries(t), steps - 1 - published)
    assert not torch.equal(made.entries(t - 1), steps - 1 - published)  # a rule that is off by one


def test_a_calibrated_timestep_takes_its_own_entry_whatever_the_last_bit():
    values = torch.tensor([0.0, 0.3, 7.77, 33.3, 950.1, 999.0])
    made = calibrated(*values.tolist())
    for t in (values, values.nextafter(torch.tensor(-1.0)), values.double(), values.half().double()):
        assert made.entries(t).tolist() in ([0, 1, 2, 3, 4, 5],)
    assert made.entries(torch.tensor([7.0, 33.2, 40.0, 999.5])).tolist() == [1, 2, 3, 5]


def test_timesteps_far_beyond_the_calibrated_ones_have_no_entry():
    made = calibrated(40, 90, 140, 240)
    made.check([0, -10, 40, 100.5, 241, 340])
    for t in (-11, 341):
        with pytest.raises(UserError, match=f"timestep {t}.* 4 timesteps from 40 to 240; calibrate at more") as caught:
            made.check([50, t])
        assert "\n" not in str(caught.value)
    calibrated(500).check([0, 999])  # one range for all


def test_a_call_takes_the_entries_of_its_samples():
    made = calibrated(0, 100)
    assert made.rows is None
    with pytest.raises(RuntimeError, match="call the whole network"):
        made.rows_of(torch.zeros(3))
    with made.at(torch.tensor([5, 150, 20])):
        assert made.rows_of(torch.zeros(3, 2)).tolist() == [0, 1, 0]
        assert made.rows_of(torch.zeros(6, 2)).tolist() == [0, 0, 1, 1, 0, 0]
        assert made.rows_of(torch.zeros(1, 2)).tolist() == made.rows_of(torch.zeros(4, 2)).tolist() == [0]
    with made.at(torch.tensor(150)):
        assert made.rows_of(torch.zeros(6, 2)).tolist() == [1]
    assert made.rows is None


def test_a_call_without_timesteps():
    inputs = (torch.zeros(2, 1), torch.tensor([5, 150]))
    for made in (None, CalibratedTimesteps()):
        with at_timestep(made, inputs), watched(made):
            assert made is None or made.rows is None
    with pytest.raises(UserError, match="second argument"), at_timestep(calibrated(1, 2), inputs[:1]):
        pass


def test_its_state_moves_and_stays_exact():
    made = calibrated(0.1, 3, 951)
    values = made.values.clone()
    for changed in (copy.deepcopy(made).half(), copy.deepcopy(made).double()):
        assert torch.equal(changed.values, values) and changed.values.dtype == torch.float32
    other = CalibratedTimesteps()
    other.load_state_dict(made.state_dict(), strict=True)
    assert torch.equal(other.values, values)
    with pytest.raises(UserError):
        other.check([5000])


@torch.no_grad()
def test_on_a_gpu_a_call_does_not_wait(cuda):
    made, t = calibrated(0, 100).to("cuda"), torch.tensor([5, 150], device="cuda")
    far = torch.tensor([5, 500], device="cuda")
    with watched(made), cuda.counting() as counts, made.at(t):
        assert made.rows_of(t).device.type == "cuda"
    assert counts.waits == []
    with pytest.raises(UserError, match="timestep 500"), watched(made):
        for given in (far, t):
            with made.at(given):
                made.rows_of(given)


def averaged(batches, bits, symmetric, unsigned):
    """The rule of the paper's code in float64: the least-error range of the first batch, then all extremes."""

    def ends(low, high):
        low, high = min(low, 0.0), max(high, 0.0)
        if unsigned:
            return high / (2**bits - 1), 0
        if symmetric:
            return max(-low, high) / (2 ** (bits - 1) - 1), 2 ** (bits - 1)
        delta = (high - low) / (2**bits - 1)
        return delta, round(-low / delta)

    first, best = batches[0].double(), None
    for step in range(80):
        low, high = (float(end) * (1 - 0.01 * step) for end in (first.min(), first.max()))
        delta, zero = ends(low, high)
        restored = fake_quantize_inference(first, torch.tensor(delta).double(), torch.tensor(zero), bits)
        error = float((restored - first).abs().pow(2.4).mean())
        if best is None or error < best[0]:
            best = error, low, high
    _, low, high = best
    for batch in batches:
        low, high = 0.95 * low + 0.05 * float(batch.min()), 0.95 * high + 0.05 * float(batch.max())
    return ends(low, high)


@pytest.mark.parametrize(("bits", "symmetric", "unsigned"), [(4, False, False), (3, True, False), (4, False, True)])
def test_the_moving_average(bits, symmetric, unsigned):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(40, 6, generator=generator) * torch.linspace(1, 3, 40)[:, None]
    if unsigned:
        x = x.abs()
    made = MovingAverage()
    for part in (x[:32], x[32:]):
        made.update(part)
    delta, zero = made.qparams(bits, symmetric, unsigned)
    wanted, wanted_zero = averaged([x[:16], x[16:32], x[32:]], bits, symmetric, unsigned)
    assert float(delta) == pytest.approx(wanted, rel=1e-6) and int(zero) == wanted_zero
    planted = averaged([x[:16], x[16:32]], bits, symmetric, unsigned)[0]
    assert float(delta) != pytest.approx(planted, rel=1e-3)


def test_for_weights_it_is_the_least_error():
    rows = torch.randn(3, 50, generator=torch.Generator().manual_seed(1))
    given = (rows, rows.amin(1), rows.amax(1), 4, False, False)
    for found, wanted in zip(MovingAverage.choose(*given), LeastError.choose(*given), strict=True):
        assert torch.equal(found, wanted)
