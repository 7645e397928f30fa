"""What the runs on the virtual GPU are held against."""

from __future__ import annotations

from virtual_cuda import Counts

SAMPLERS = ("ddim/samplers/",)
"""Where the loop over the steps is: nothing below may make the host wait."""
KEEPING = ("qdiff/calibration/collect.py", "qdiff/cli/command.py:on_step")
"""But for what is kept of a step: calibration sets, and --sequence's pictures."""
LEARNING = ("qdiff/calibration/reconstruction.py:optimise",)


def assert_sampling_never_waits(counts: Counts) -> None:
    """Fail where a step of a sampler makes the host wait, or copies from pageable memory."""
    assert counts.launches > 0
    assert counts.waits_inside(*SAMPLERS, but=KEEPING) == []
    assert [t for t in counts.pageable(*SAMPLERS) if not any(place in t for place in ("collect.py", "on_step"))] == []
