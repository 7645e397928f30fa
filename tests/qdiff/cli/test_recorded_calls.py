"""What a float model records of its sampler's calls, alone and with the call before each."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qdiff.calibration.collect import record_evenly, recorded_calls
from qdiff.calibration.timesteps import Spacing
from qdiff.errors import UserError
from qdiff.pipeline import Pipeline

SHAPE = (1, 4, 4)


class Counted(Pipeline):
    """Every value says of which image and call it is; conditions belong to the image."""

    def __init__(self, calls=6, guided=False):
        super().__init__("counted", SimpleNamespace(seed=0), count=1, batch_size=2)
        self.made, self.guided, self.network = calls, guided, None

    @property
    def calls(self):
        return self.made

    def sample(self, network, rows, calibration=False, on_call=None, on_step=None):
        assert calibration
        numbers = torch.tensor(list(rows), dtype=torch.float32)
        contexts = [v[:, None, None].expand(-1, 3, 2) for v in (numbers, -numbers)] if self.guided else []
        for call in range(self.made):
            x = (numbers + 100 * call)[:, None, None, None].expand(-1, *SHAPE).clone()
            on_call(x, torch.full((len(rows),), 900 - 100 * call), *contexts)
            x.zero_()  # samplers may reuse their memory


@pytest.mark.parametrize(("calls", "steps"), [(6, 1), (6, 2), (6, 5), (10, 3), (2, 1)])
@pytest.mark.parametrize("guided", [False, True])
def test_the_step_before_is_the_call_before(calls, steps, guided):
    model = Counted(calls, guided)
    whole = record_evenly(model, calls, 5, first=7, show_progress=False)
    pairs = record_evenly(model, steps, 5, first=7, show_progress=False, pairs=True)
    kept = recorded_calls(model, steps, pairs=True)
    assert len(set(kept)) == len(kept) == steps and min(kept) >= 1
    assert set(pairs) == {"xs", "ts", "xs_prev", "ts_prev"} | ({"cs", "ucs"} if guided else set())
    for place, call in enumerate(kept):
        for key in set(pairs) - {"xs_prev", "ts_prev"}:
            assert torch.equal(pairs[key][place], whole[key][call]), key
        for key in ("xs", "ts"):
            assert torch.equal(pairs[f"{key}_prev"][place], whole[key][call - 1])
    assert pairs["xs"][0, :, 0, 0, 0].tolist() == [100 * kept[0] + i for i in range(7, 12)]


def test_without_pairs_nothing_of_them_is_kept():
    made = record_evenly(Counted(), 3, 4, show_progress=False)
    assert set(made) == {"xs", "ts"} and made["ts"][:, 0].tolist() == [900, 700, 500]


@pytest.mark.parametrize(("steps", "times"), [(3, [900, 700, 500, 400]), (6, [900, 800, 700, 600, 500, 400])])
def test_the_last_call_too(steps, times):
    made = record_evenly(Counted(guided=True), steps, 4, show_progress=False, and_last=True)
    assert made["ts"][:, 0].tolist() == times and made["xs"][-1, :, 0, 0, 0].tolist() == [500, 501, 502, 503]
    assert all(len(values) == len(times) for values in made.values())


@pytest.mark.parametrize(
    ("steps", "pairs", "calls"),
    [(3, False, [0, 2, 4]), (6, False, list(range(6))), (5, True, [1, 2, 3, 4, 5]), (1, True, [1]), (2, True, [1, 3])],
)
def test_calls_are_spaced_evenly(steps, pairs, calls):
    assert recorded_calls(Counted(6), steps, pairs) == calls


@pytest.mark.parametrize(("pairs", "calls"), [(False, [0, 3, 5]), (True, [1, 3, 5])])
def test_calls_from_end_to_end(pairs, calls):
    model = Counted(6)
    assert recorded_calls(model, 3, pairs, Spacing.ENDS) == calls
    made = record_evenly(model, 3, 4, show_progress=False, pairs=pairs, spacing=Spacing.ENDS)
    assert made["ts"][:, 0].tolist() == [900 - 100 * call for call in calls]
    if pairs:
        assert made["ts_prev"][:, 0].tolist() == [1000 - 100 * call for call in calls]


@pytest.mark.parametrize(
    ("steps", "pairs", "says"),
    [
        (7, False, "--cali_st 1 to 6"),
        (0, False, "--cali_st 1 to 6"),
        (6, True, "give --cali_st 5 or less"),
        (60, True, "more than the 6 steps of this sampler"),
        (0, True, "--cali_st 1 to 5"),
        (-1, True, "--cali_st 1 to 5"),
    ],
)
def test_steps_that_the_sampler_does_not_make(steps, pairs, says):
    with pytest.raises(UserError, match=says) as caught:
        recorded_calls(Counted(6), steps, pairs)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=says):
        record_evenly(Counted(6), steps, 2, show_progress=False, pairs=pairs)
