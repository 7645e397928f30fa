"""What the runs on the virtual GPU are held against."""

from __future__ import annotations

from virtual_cuda import Counts

SAMPLERS = ("qdiff/sampling/",)
"""Where the loop over the steps is: nothing below may make the host wait."""
KEEPING = ("qdiff/calibration/recording.py", "qdiff/calibration/noise_pairs.py", "qdiff/cli/sample.py:on_step")
"""But for what is kept of a step: calibration sets, ε of noise corrections, and --sequence's pictures."""
LEARNING = ("qdiff/calibration/reconstruction.py:optimise",)


def assert_sampling_never_waits(counts: Counts) -> None:
    """Fail where a step of a sampler makes the host wait, or copies from pageable memory."""
    assert counts.launches > 0, "nothing ran on the device"
    waits = counts.waits_inside(*SAMPLERS, but=KEEPING)
    assert not waits, waits[:3]
    pageable = [str(t) for t in counts.transfers if not t.pinned and t.inside(*SAMPLERS) and not t.inside(*KEEPING)]
    assert not pageable, pageable[:3]


def assert_learning_never_waits(counts: Counts, units: int) -> None:
    """Fail where iterations of the reconstruction make the host wait; once for each unit, at its end, it may.

    Copies are another matter: `pageable_copies_while_learning`.
    """
    waits = [str(w) for w in counts.waits if w.inside(*LEARNING) and not w.kind.endswith("copy")]
    assert len(waits) <= units, waits[:3] + waits[-3:]


def pageable_copies_while_learning(counts: Counts) -> list[str]:
    """Return the copies from or to pageable memory that iterations of the reconstruction make, as text."""
    return counts.pageable(*LEARNING)
